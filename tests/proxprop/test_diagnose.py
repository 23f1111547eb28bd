"""What diagnose says of a layer against the dense float64 oracle, and that it leaves the model as it was."""

import dataclasses
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_directions import GENERATED, LAYERS, directions, expected, prepared
from torch import nn

import proxprop
from proxprop import ProxPropConv2d, ProxPropLinear, diagnose, suggest_tau
from proxprop.observe import observing

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

MODES = ["prox_exact", "prox_cg1", "prox_cg3", "published_cg3", "gradient"]
SOME = ["wide", "tall", "no bias", "one output", "sequence", "conv2d", "conv2d groups", "conv2d same", "conv2d reflect",
        "conv1d strided", "conv3d groups strided", "transposed linear wide", "embedding", "embedding few tokens",
        "conv_transpose2d strided", "conv_transpose2d groups"]  # fmt: skip


def flat(directions):
    return torch.cat([d.double().flatten() for d in directions.values()])


def with_gradient(gradient, *inputs):
    """A batch and a loss whose gradient for a layer's output is ``gradient``."""
    return inputs, lambda layer, batch: (layer(*batch) * gradient).sum()


def numbers(layer, inputs, gradient, d, tau):
    """What the report should say of the direction ``d``, by dense products."""
    a, shapes = oracle.design_matrix(layer, inputs)
    right, d = a.T @ gradient.double().flatten(), flat({name: d[name] for name in shapes})
    weights = flat({name: p.detach() for name, p in layer.named_parameters() if p.requires_grad})
    return {
        "step_ratio": d.norm() / (tau * right.norm()),
        "weight_ratio": d.norm() / weights.norm(),
        "cosine": d @ right / (d.norm() * right.norm()),
        "residual": (a.T @ (a @ d) + d / tau - right).norm() / right.norm(),
        "below_adam_eps": (d[d != 0].abs() < 1e-8).double().mean(),
    }


def assert_numbers(row, wanted, tolerance):
    for name, value in wanted.items():
        assert getattr(row, name) == pytest.approx(float(value), rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SOME)
def test_numbers_agree_with_the_dense_oracle(name, mode):
    layer, x, gradient = prepared(*LAYERS[name], mode, 0.7)
    (row,) = diagnose(layer, *with_gradient(gradient, x)).layers
    wanted = numbers(layer, [x], gradient, expected(layer, [x], gradient, mode, 0.7), 0.7)
    if mode == "gradient":
        assert (row.step_ratio, row.residual, row.digits, row.form) == (None, None, None, None)
        wanted = {key: value for key, value in wanted.items() if key not in ("step_ratio", "residual")}
    else:
        assert row.digits > 8
        assert row.form in ("Primal", "Dual", "Spectral", "Bordered", "MatrixFree", "Diagonal")
    assert_numbers(row, wanted, 1e-7)
    groups = getattr(layer, "groups", 1)
    a, shapes = oracle.design_matrix(layer, [x])
    weight = shapes["weight"]
    outputs = shapes["bias"][0] if "bias" in shapes else weight[isinstance(layer, nn.Embedding)]
    assert (row.columns * outputs, row.rows * outputs, row.outputs) == (a.shape[1], a.shape[0], outputs)
    assert row.matrix_bytes in {
        0,
        *(8 * groups * n * n for n in (row.rows, row.columns)),
        8 * min(row.rows, row.columns),
    }
    assert (row.form == "Diagonal") is (isinstance(layer, nn.Embedding) and mode != "gradient")
    assert (row.name, row.call, row.tau_prox, row.optimization_mode) == ("", 1, 0.7, mode)
    factorised = mode == "prox_exact" and not isinstance(layer, nn.Embedding)
    assert row.factorisation_failed is (False if factorised else None)
    assert row.seconds > 0


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["wide", "conv2d groups"])
def test_what_is_frozen_counts_nowhere(name, frozen):
    layer, x, gradient = prepared(*LAYERS[name], "prox_exact", 0.7)
    getattr(layer, frozen).requires_grad_(False)
    (row,) = diagnose(layer, *with_gradient(gradient, x)).layers
    wanted = numbers(layer, [x], gradient, oracle.exact(layer, [x], gradient, 0.7), 0.7)
    assert_numbers(row, wanted, 1e-7)


@pytest.mark.parametrize("mode", ["prox_cg2", "published_cg2"])
@pytest.mark.parametrize("name", GENERATED)
def test_layers_of_unknown_structure(name, mode):
    make, inputs = GENERATED[name]
    layer = make(tau_prox=0.7, optimization_mode=mode).double()
    gradient = torch.randn(layer(*inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (row,) = diagnose(layer, *with_gradient(gradient, *inputs)).layers
    d = expected(layer, inputs, gradient, mode, 0.7, stacked=True)
    assert_numbers(row, numbers(layer, inputs, gradient, d, 0.7), 1e-7)
    a, _ = oracle.design_matrix(layer, inputs)
    assert (row.rows, row.columns, row.outputs) == (*a.shape, 1)
    assert (row.form, row.digits) == ("MatrixFree", None)


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3", "published_cg3"])
@pytest.mark.parametrize("name", ["wide", "tall", "conv2d", "conv2d groups"])
def test_digits_are_those_that_the_direction_has(name, mode):
    tau = 50.0
    layer, x, gradient = prepared(*LAYERS[name], mode, tau)
    layer, x, gradient = layer.float(), 30 * x.float(), gradient.float()  # ill-conditioned, so that digits are lost
    (row,) = diagnose(layer, *with_gradient(gradient, x)).layers
    error = oracle.relative_error(directions(layer, [x], gradient), expected(layer, [x], gradient, mode, tau))
    assert row.digits == pytest.approx(max(0.0, -math.log10(error)), abs=0.3)
    assert 0 <= row.digits < 8


def test_digits_are_sampled_from_many_outputs():
    layer, x = ProxPropLinear(30, 40, tau_prox=5.0, optimization_mode="prox_exact"), torch.randn(20, 30)
    gradient = torch.randn(20, 40)
    gradient[:, ::2] = 0  # outputs that get no step say nothing
    (row,) = diagnose(layer, *with_gradient(gradient, x)).layers
    error = oracle.relative_error(directions(layer, [x], gradient), oracle.exact(layer, [x], gradient, 5.0))
    assert row.digits == pytest.approx(-math.log10(error), abs=0.5)


def test_digits_are_those_of_the_parameters_precision():
    layer = ProxPropLinear(9, 5, optimization_mode="prox_exact").to(torch.bfloat16)
    x = torch.randn(7, 9, dtype=torch.bfloat16)
    (row,) = diagnose(layer, *with_gradient(torch.randn(7, 5, dtype=torch.bfloat16), x)).layers
    assert 2 < row.digits < 3.5


# --- words --------------------------------------------------------------------------------------------------------


def verdict(mode, tau, x, gradient, **linear):
    layer = ProxPropLinear(x.shape[1], gradient.shape[1], tau_prox=tau, optimization_mode=mode, **linear).to(x)
    (row,) = diagnose(layer, *with_gradient(gradient, x)).layers
    return row, layer


@pytest.mark.parametrize(("tau", "factor"), [(1e6, 1000), (3000.0, 100), (200.0, 10), (1.0, None), (1e-4, None)])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg20"])
def test_a_saturated_layer_could_have_a_smaller_tau(mode, tau, factor):
    x = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64))[0] * 3  # AᵀA = 9
    gradient = torch.randn(9, 4, dtype=torch.float64)
    row, layer = verdict(mode, tau, x, gradient, bias=False)
    if factor is None:
        assert row.verdict == ("ok" if tau == 1 else "explicit: D is τ times the gradient")
        return
    assert row.verdict == f"saturated: τ could be {factor} times smaller without a change"
    now = flat(directions(layer, [x], gradient))
    for times, same in ((factor, True), (10 * factor, factor == 1000)):
        layer.zero_grad()
        layer.tau_prox = tau / times
        assert (bool((flat(directions(layer, [x], gradient)) - now).norm() < 0.01 * now.norm())) is same


def test_a_factorisation_that_failed_is_told():
    x, gradient = torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    row, layer = verdict("prox_exact", 1e30, x, gradient, bias=False)
    assert row.factorisation_failed is True
    assert row.verdict.startswith("factorisation failed: the short explicit step")
    assert row.cosine == pytest.approx(1)
    d = directions(layer, [x], gradient)["weight"]
    torch.testing.assert_close(d, torch.full((3, 2), 4 / 8, dtype=torch.float64))  # AᵀG / trace


@pytest.mark.parametrize(
    ("tau", "words"),
    [(1e13, "ill-conditioned: rounding leaves a residual of"), (1e18, "ill-conditioned: 1/τ is lost in the rounding")],
)
def test_an_exact_solve_beyond_the_precision_is_told(tau, words):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] for _ in range(2))
    x = left * torch.logspace(0, -4, 6, dtype=torch.float64) @ right
    row, _ = verdict("prox_exact", tau, x.float(), left[:, -1:].float(), bias=False)  # along the smallest eigenvalue
    assert row.verdict.startswith(words)
    assert row.factorisation_failed is False


def test_a_published_solve_that_rounding_has_undone_is_told():
    torch.manual_seed(0)
    x = torch.rand(64, 300) + 10
    row, _ = verdict("published_cg3", 1.0, x, torch.randn(64, 50) * 1e-6)
    assert row.digits < 1
    # What is left of it may point anywhere.
    assert row.verdict.startswith(("inaccurate: rounding leaves 0.", "no descent direction: "))
    assert row.form == "Bordered"


@pytest.mark.parametrize(
    ("x", "gradient", "words"),
    [
        (torch.ones(3, 2), torch.zeros(3, 4), "no gradient: it is zero"),
        (torch.zeros(3, 2), torch.ones(3, 4), "no gradient: it is zero"),
        (torch.full((3, 2), math.nan), torch.ones(3, 4), "not finite: NaN or infinity in the input or in the gradient"),
        (torch.ones(3, 2), torch.full((3, 4), math.inf), "not finite: NaN or infinity in the input or in the gradient"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_has_no_direction(x, gradient, words, mode):
    row, _ = verdict(mode, 1.0, x, gradient, bias=False)
    assert row.verdict == words
    assert row.cosine is None


def test_an_ascent_is_told():
    layer, x, gradient = prepared(*LAYERS["wide"], "gradient", 0.7)

    @dataclasses.dataclass(frozen=True)
    class Ascent:
        needs_matrix = needs_parameters = False
        implicit = True

        def direction(self, design, gradient, tau, parameters):
            return tuple(-d for d in design.adjoint(gradient))

    layer._proximal.mode = Ascent()
    (row,) = diagnose(layer, *with_gradient(gradient, x)).layers
    assert row.cosine == pytest.approx(-1)
    assert row.verdict == "no descent direction: its cosine to the gradient is not positive"


def test_entries_below_adams_eps_are_told():
    x, gradient = torch.randn(9, 6), torch.randn(9, 4)
    gradient[:, :1] *= 1e-9
    row, _ = verdict("prox_exact", 1.0, x, gradient)
    assert row.below_adam_eps == pytest.approx(0.25)
    assert row.verdict == "ok; 25% of D's entries are below Adam's eps"


class Twice(nn.Module):
    """A layer called twice, one that is not reached, a frozen one, and plain modules with states."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = ProxPropConv2d(2, 3, 3, padding=1, tau_prox=0.1, optimization_mode="prox_cg3")
        self.norm = nn.BatchNorm2d(3)
        self.again = ProxPropLinear(5, 5, tau_prox=0.1, optimization_mode="prox_exact")
        self.idle = ProxPropLinear(5, 2)
        self.frozen = ProxPropLinear(5, 5).requires_grad_(False)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        x = F.dropout(F.relu(self.norm(self.first(x))), 0.3, self.training)
        h = F.relu(self.again(x.flatten(0, 2)))
        h = self.again(h.unflatten(0, x.shape[:3])[:, 0].flatten(0, 1))
        return self.last(self.frozen(h))


def cross_entropy(model, batch):
    output = model(batch)
    return F.cross_entropy(output, torch.arange(len(output)) % 4)


def test_each_call_is_a_row_and_what_is_not_reached_says_so():
    report = diagnose(Twice(), torch.randn(4, 2, 6, 5), cross_entropy)
    assert [(row.name, row.call, row.rows) for row in report.layers] == [
        ("first", 1, 120),
        ("again", 1, 72),
        ("again", 2, 24),
        ("idle", 0, None),
        ("frozen", 0, None),
    ]
    assert report.layers[3].verdict == "not reached: no gradient came to it"
    assert report.layers[4].verdict == "frozen: nothing to train"
    lines = repr(report).splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:3] == ["layer", "mode", "tau"]
    assert lines[3].startswith("again (call 2)  prox_exact  0.1")
    assert lines[4].endswith("not reached: no gradient came to it")
    assert proxprop.diagnose(ProxPropLinear(3, 2), torch.randn(4, 3), lambda m, x: m(x).sum()).layers[0].name == ""


# --- what is not changed --------------------------------------------------------------------------------------------


def state(model):
    return {
        "parameters": {name: (p, p.clone(), p._version) for name, p in model.named_parameters()},
        "buffers": {name: (b, b.clone()) for name, b in model.named_buffers()},
        "grad": {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
        "settings": [(m.tau_prox, m._proximal.mode) for m in model.modules() if hasattr(m, "tau_prox")],
    }


def assert_same(one, other):
    for key in ("parameters", "buffers", "grad"):
        for name, (tensor, value, *version) in one[key].items():
            same, now, *later = other[key][name]
            assert tensor is same, name
            assert value is now is None or torch.equal(value, now), name
            assert version == later, name
    assert torch.equal(one["random"], other["random"])
    assert one["training"] == other["training"]
    assert all(a == b and m is n for (a, m), (b, n) in zip(one["settings"], other["settings"], strict=True))


def troubled(model, batch):
    model.eval()
    torch.rand(3)
    model.norm.running_var = torch.zeros(3)  # another object
    cross_entropy(model, batch)
    raise ArithmeticError("mine")


@pytest.mark.parametrize("tool", [diagnose, suggest_tau])
@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_as_before(tool, train):
    model, x = Twice().train(train), torch.randn(4, 2, 6, 5)
    cross_entropy(model, x).backward()  # gradients that must stay
    model.last.bias.grad = None
    model.norm.eval()
    fired = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(fired.append)
    before = state(model)
    tool(model, x, cross_entropy)
    assert_same(before, state(model))
    with pytest.raises(ArithmeticError, match="mine"):
        tool(model, x, troubled)
    assert_same(before, state(model))
    with torch.no_grad():  # where the caller has gradients off
        tool(model, x, cross_entropy)
    assert_same(before, state(model))
    assert not fired


def test_training_goes_on_as_if_nothing_had_been():
    def losses(between):
        model, x = Twice(), torch.randn(4, 2, 6, 5, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = cross_entropy(model, x)
            loss.backward()
            between(model, x)  # with its gradients, even
            optimizer.step()
            result.append(loss.item())
        return result

    undisturbed = losses(lambda model, x: None)
    assert losses(lambda model, x: diagnose(model, x, cross_entropy)) == undisturbed
    assert losses(lambda model, x: suggest_tau(model, x, cross_entropy)) == undisturbed


def test_parameters_that_a_forward_pass_changes_are_put_back():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), ProxPropLinear(3, 2))
    before = model[0].weight.clone()
    diagnose(model, torch.tensor([0, 1, 4]), lambda m, x: m(x).sum())
    assert torch.equal(model[0].weight, before)
    model(torch.tensor([0, 1, 4]))
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    model, x = Twice(), torch.randn(4, 2, 6, 5)

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return cross_entropy(model, batch)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        rows = diagnose(model, x, loss_fn).layers[:3]
    assert [row.digits > 4 for row in rows] == [True] * 3
    assert all(0 < row.cosine <= 1 for row in rows)


def test_a_checkpointed_layer_is_seen_once():
    model = ProxPropLinear(6, 4, optimization_mode="prox_exact")
    run = torch.utils.checkpoint.checkpoint
    (row,) = diagnose(model, torch.randn(5, 6), lambda m, x: run(m, x, use_reentrant=False).sum()).layers
    assert (row.call, row.verdict) == (1, "ok")


def test_compiled_code_runs_uncompiled_and_stays_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, x = nn.Sequential(ProxPropLinear(5, 4, optimization_mode="prox_exact"), nn.ReLU()), torch.randn(6, 5)
    compiled = torch.compile(model, backend=backend)
    compiled(x).sum().backward()
    count = len(graphs)
    assert count
    (row,) = diagnose(compiled, x, lambda m, x: m(x).sum()).layers
    assert row.digits > 4
    compiled(x).sum().backward()
    assert len(graphs) == count


@pytest.mark.parametrize("mode", MODES)
def test_observing_changes_no_bit(mode):
    model, x = Twice(), torch.randn(4, 2, 6, 5)
    for layer in (model.first, model.again):
        layer.optimization_mode = mode
    seen = []

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        cross_entropy(model, x).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with observing(model, seen.append):
        assert model.first.optimization_mode == mode
        observed = gradients()
    assert all(map(torch.equal, plain, observed))
    assert [direction.name for direction in seen] == ["again", "again", "first"]
    assert all(map(torch.equal, plain, gradients()))
    assert len(seen) == 3


# --- step sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("name", [name for name in SOME if name != "no bias" and not name.startswith("embedding")])
def test_tau_is_the_inverse_mean_eigenvalue(name, frozen):
    layer, x, gradient = prepared(*LAYERS[name], "gradient", 0.7)
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    a, _ = oracle.design_matrix(layer, [x])
    (row,) = diagnose(layer, *with_gradient(gradient, x)).layers
    outputs = row.outputs
    mean = float((a * a).sum()) / outputs / min(a.shape[0] // outputs, a.shape[1] // outputs)
    assert suggest_tau(layer, *with_gradient(gradient, x), scale=3.0) == {"": pytest.approx(3 / mean, rel=1e-12)}


def test_tau_for_a_mean_is_so_many_times_that_for_the_sum():
    layer, x, gradient = prepared(*LAYERS[SOME[0]], "gradient", 0.7)
    (for_sum,) = suggest_tau(layer, *with_gradient(gradient, x)).values()
    layer.gram_reduction = "mean"
    rows = (
        oracle.design_matrix(layer, [x])[0].shape[0] // diagnose(layer, *with_gradient(gradient, x)).layers[0].outputs
    )
    assert suggest_tau(layer, *with_gradient(gradient, x)) == {"": pytest.approx(rows * for_sum, rel=1e-12)}


def test_tau_of_an_embedding_is_that_of_the_mean_count():
    layer, x, gradient = prepared(*LAYERS["embedding"], "gradient", 0.7)
    assert suggest_tau(layer, *with_gradient(gradient, x)) == {"": pytest.approx(1)}  # of 6 rows, and 7 tokens
    layer, x, gradient = prepared(*LAYERS["embedding few tokens"], "gradient", 0.7)
    assert suggest_tau(layer, *with_gradient(gradient, x), scale=3.0) == {"": pytest.approx(3 / (6 / 4))}


@pytest.mark.parametrize("name", ["BatchNorm1d", "Bilinear"])
def test_tau_of_unknown_structure_is_an_estimate(name):
    make, inputs = GENERATED[name]
    layer = make(optimization_mode="prox_cg1").double()
    a, _ = oracle.design_matrix(layer, inputs)
    gradient = torch.ones_like(layer(*inputs))
    tau = suggest_tau(layer, *with_gradient(gradient, *inputs))[""]
    assert tau == pytest.approx(min(a.shape) / float((a * a).sum()), rel=0.25)


def test_tau_of_a_model():
    model, x = Twice(), torch.randn(4, 2, 6, 5)
    taus = suggest_tau(model, x, cross_entropy)
    assert list(taus) == ["first", "again"]
    for name, tau in taus.items():
        model.get_submodule(name).tau_prox = tau
    larger = suggest_tau(model, 10 * x, cross_entropy)
    assert larger["first"] < taus["first"] / 50
    rows = {(row.name, row.call): row for row in diagnose(model, x, cross_entropy).layers}
    assert 0.1 < rows["first", 1].step_ratio < 0.9  # neither explicit nor saturated


# --- errors ---------------------------------------------------------------------------------------------------------


def frozen_but_one(module):
    return nn.Sequential(ProxPropLinear(3, 2), module).requires_grad_(False)


@pytest.mark.parametrize("tool", [diagnose, suggest_tau])
@pytest.mark.parametrize(
    ("model", "loss_fn", "error", "words"),
    [
        (nn.Linear(3, 2), lambda m, x: m(x).sum(), ValueError, "the model has no ProxProp layer; convert it first"),
        ("net", lambda m, x: m(x).sum(), TypeError, "takes a torch.nn.Module, got str"),
        (ProxPropLinear(3, 2), F.cross_entropy(torch.rand(2, 2), torch.tensor([0, 1])), TypeError,
         "loss_fn must be a function of model and batch"),
        (ProxPropLinear(3, 2), lambda m, x: m(x), ValueError, r"of one element, got a tensor of shape \(4, 2\)"),
        (ProxPropLinear(3, 2), lambda m, x: m(x).sum().item(), ValueError, "a tensor of one element, got 'float'"),
        (ProxPropLinear(3, 2), lambda m, x: x.sum(), ValueError, "the loss depends on no parameter of the model"),
        (frozen_but_one(nn.Linear(2, 2)), lambda m, x: m(x).sum(), ValueError, "depends on no parameter of the model"),
    ],
    ids=["plain", "no module", "no function", "vector", "number", "independent", "frozen"],
)  # fmt: skip
def test_one_clear_line(tool, model, loss_fn, error, words):
    with pytest.raises(error, match=f"^{tool.__name__}.*{words}") as caught:
        tool(model, torch.randn(4, 3), loss_fn)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("scale", [0, -1, math.inf, math.nan])
def test_a_scale_that_is_none(scale):
    with pytest.raises(ValueError, match=r"^suggest_tau: scale must be a positive finite number, got"):
        suggest_tau(ProxPropLinear(3, 2), torch.randn(4, 3), lambda m, x: m(x).sum(), scale=scale)


def test_running_statistics_stay():
    """Their kernel does not count its writes as changes of the tensor."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("expanded", torch.tensor(math.nan).expand(3))
    proxprop.convert(model)
    batch = torch.randn(16, 3, 8, 8)
    before = {"buffers": {name: (b, b.clone()) for name, b in model.named_buffers() if "running" in name}}
    for look in (diagnose, suggest_tau):
        look(model, batch, lambda model, batch: model(batch).square().mean())
        assert all(torch.equal(buffer, value) for buffer, value in before["buffers"].values())


def test_a_layer_called_twice_has_the_smaller_tau():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ProxPropLinear(4, 4)

        def forward(self, x):
            return self.layer(x) + self.layer(100 * x)

    x = torch.randn(7, 4)
    a = torch.cat([100 * x, torch.ones(7, 1)], 1).double()
    taus = suggest_tau(Called(), x, lambda m, x: m(x).square().sum())
    assert taus == {"layer": pytest.approx(5 / float(a.square().sum()), rel=1e-5)}


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_inputs_that_say_nothing_have_no_tau(value):
    layer = ProxPropLinear(4, 3, bias=False)
    assert suggest_tau(layer, torch.full((5, 4), value), lambda m, x: m(x).sum()) == {}
