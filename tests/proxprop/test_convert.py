"""A user's whole model: converted, trained, copied, and made plain again."""

import copy
import dataclasses
import io
import pickle
import re
from pathlib import Path

import oracle
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers_like import Conv1D

import proxprop
from proxprop import (
    ProxPropConv1d,
    ProxPropConv2d,
    ProxPropConv3d,
    ProxPropConvTranspose1d,
    ProxPropConvTranspose2d,
    ProxPropConvTranspose3d,
    ProxPropEmbedding,
    ProxPropLinear,
    convert,
    diagnose,
    param_groups,
    proxprop_module_generator,
    revert,
)

DOCS = Path(__file__).parents[2] / "docs" / "your_model.md"
CLASSES = {
    nn.Linear: (ProxPropLinear, (5, 3)),
    nn.Conv1d: (ProxPropConv1d, (2, 3, 3)),
    nn.Conv2d: (ProxPropConv2d, (2, 3, 3)),
    nn.Conv3d: (ProxPropConv3d, (2, 3, 2)),
    nn.ConvTranspose1d: (ProxPropConvTranspose1d, (2, 3, 3)),
    nn.ConvTranspose2d: (ProxPropConvTranspose2d, (2, 3, 3)),
    nn.ConvTranspose3d: (ProxPropConvTranspose3d, (2, 3, 2)),
    nn.Embedding: (ProxPropEmbedding, (5, 3)),
    Conv1D: (proxprop_module_generator(Conv1D), (5, 3)),
}


def small_net():
    """Two hidden layers of each kind that there is, and an output layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Tanh(),
        nn.Linear(5, 4),
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers}


def converted(report):
    return [layer.name for layer in report.converted]


def types(model):
    return [type(module) for module in model.modules()]


# Directions


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "published_cg3"])
def test_converted_layers_get_their_own_direction_and_the_others_their_gradient(mode):
    model = small_net().double()
    plain = copy.deepcopy(model)
    convert(model, skip="^6$", overrides={"^0$": {"tau_prox": 0.3}}, tau_prox=2.0, optimization_mode=mode)
    seen = {}

    def keep(module, inputs, output):
        output.retain_grad()
        seen[module] = inputs[0], output

    for index in (0, 4):
        model[index].register_forward_hook(keep)
    x, seed = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    model[2].inplace = plain[2].inplace = False
    model(x).backward(seed)
    plain(x).backward(seed)
    for index, tau in ((0, 0.3), (4, 2.0)):
        inputs, output = seen[model[index]]
        if mode == "prox_exact":
            expected = oracle.exact(plain[index], [inputs], output.grad, tau)
        else:
            published = mode == "published_cg3"
            expected = oracle.conjugate_gradients(
                plain[index],
                [inputs],
                output.grad,
                tau,
                int(mode[-1]),
                published=published,
                one_step_length=published and index == 0,
            )
        assert oracle.relative_error(gradients(model[index]), expected) < 1e-9
    for index in (1, 6):
        assert oracle.relative_error(gradients(model[index]), gradients(plain[index])) < 1e-12


@pytest.mark.parametrize("plain_class", CLASSES)
def test_a_converted_layer_is_the_one_that_its_constructor_makes(plain_class):
    proximal_class, arguments = CLASSES[plain_class]
    torch.manual_seed(0)
    built = proximal_class(*arguments, tau_prox=0.3, optimization_mode="prox_cg2")
    torch.manual_seed(0)
    layer = plain_class(*arguments)
    untouched = copy.deepcopy(layer)
    convert(layer, tau_prox=0.3, optimization_mode="prox_cg2")
    assert type(layer) is proximal_class
    assert vars(layer).keys() == vars(built).keys()
    assert repr(layer) == repr(built)
    assert revert(layer) == ("",)
    assert type(layer) is plain_class
    assert vars(layer).keys() == vars(untouched).keys()
    assert repr(layer) == repr(untouched)


# In place


def test_whoever_holds_modules_and_parameters_holds_them_still():
    model = small_net()
    model[4].register_buffer("mask", torch.ones(5))
    model.eval()
    modules, parameters = list(model.modules()), list(model.parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    convert(model)
    for step in (lambda: None, lambda: revert(model)):
        step()
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert not any(module.training for module in model.modules())


def test_hooks_go_on_in_order():
    layer = nn.Linear(3, 2)
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append("parameter"))
    for change in (convert, revert):
        change(layer)
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
        assert calls[:2] == ["pre", "forward"]
        assert sorted(calls[2:]) == ["backward", "parameter"]
        calls.clear()


def test_an_optimizer_made_before_goes_on_with_its_state():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(6, 2, 4, 4)
    model(x).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[model[4].weight]["momentum_buffer"].clone()
    convert(model)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    direction, before = model[4].weight.grad.clone(), model[4].weight.detach().clone()
    optimizer.step()
    assert torch.allclose(model[4].weight, before - 0.1 * (0.9 * momentum + direction), atol=1e-7)


def test_a_module_under_two_names_is_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.blocks = nn.ModuleList([self.first, nn.Linear(3, 3)])

    model = Twice()
    report = convert(model)
    assert [(layer.name, layer.other_names) for layer in report.layers] == [("first", ("blocks.0",)), ("blocks.1", ())]
    assert type(model.blocks[0]) is ProxPropLinear
    assert "first = blocks.0  Linear" in str(report)
    assert revert(model) == ("first", "blocks.1")
    assert reasons(convert(model, skip=r"blocks\.0")) == {"first": "in skip", "blocks.1": None}


def test_a_module_that_knows_its_parent_ends():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].parent = model
    assert converted(convert(model)) == ["0"]


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_converted_model_compute_the_same(copied):
    model = small_net()
    convert(model, tau_prox=0.3, optimization_mode="prox_exact", skip="^6$")
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin[4].tau_prox = 5.0
    assert model[4].tau_prox == 0.3
    twin[4].tau_prox = 0.3
    x = torch.randn(6, 2, 4, 4)
    for each in (model, twin):
        each(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(twin).values(), gradients(model).values(), strict=True))
    assert revert(twin) == ("0", "4")
    assert type(model[4]) is ProxPropLinear


def test_a_checkpoint_goes_either_way():
    model, plain = small_net(), small_net()
    convert(model)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_a_model_compiled_before_takes_the_step():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(6, 4)
    compiled(x).square().sum().backward()
    model.zero_grad()
    convert(model, optimization_mode="prox_exact")
    for change in (lambda: None, lambda: revert(model)):
        change()
        results = []
        for run in (compiled, model):
            run(x).square().sum().backward()
            results.append(gradients(model))
            model.zero_grad()
        assert oracle.relative_error(*results) < 1e-5


# Which layers, which settings


def named_net():
    return nn.ModuleDict(
        {"conv1": nn.Conv1d(2, 2, 3), "fc1": nn.Linear(3, 3), "fc2": nn.Linear(3, 3), "bn": nn.BatchNorm1d(3)}
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["conv1", "fc1", "fc2"]),
        ({"only": "fc"}, ["fc1", "fc2"]),
        ({"only": re.compile("FC1", re.IGNORECASE)}, ["fc1"]),
        ({"only": lambda name, module: isinstance(module, nn.Conv1d)}, ["conv1"]),
        ({"skip": "^fc2$|^bn$"}, ["conv1", "fc1"]),
        ({"skip": lambda name, module: name.endswith("1")}, ["fc2"]),
        ({"only": "1", "skip": "conv"}, ["fc1"]),
    ],
)
def test_only_and_skip(arguments, expected):
    model = named_net()
    report = convert(model, **arguments)
    assert converted(report) == expected
    assert [
        name for name, module in model.named_modules() if isinstance(module, proxprop.layers.ProxPropLayer)
    ] == expected
    for layer in report.left_alone:
        assert layer.reason in ("not in only", "in skip", "no ProxProp class")


@pytest.mark.parametrize(
    "overrides",
    [
        {"fc1": {"tau_prox": 0.1}, "fc": {"optimization_mode": "prox_exact"}},
        lambda name, module: {"fc1": {"tau_prox": 0.1}, "fc2": {"optimization_mode": "prox_exact"}}.get(name),
    ],
    ids=["mapping", "function"],
)
def test_overrides_are_settings_of_single_layers(overrides):
    model = named_net()
    report = convert(model, tau_prox=2, optimization_mode="prox_cg3", overrides=overrides)
    expected = {"conv1": (2.0, "prox_cg3"), "fc1": (0.1, "prox_cg3"), "fc2": (2.0, "prox_exact")}
    assert {n: (model[n].tau_prox, model[n].optimization_mode) for n in expected} == expected
    assert {layer.name: (layer.tau_prox, layer.optimization_mode) for layer in report.converted} == expected


def test_converting_again_gives_new_settings_to_what_is_taken():
    model = named_net()
    convert(model, tau_prox=0.1, optimization_mode="prox_exact")
    report = convert(model, tau_prox=0.2, only="fc2")
    assert [(layer.name, layer.class_name) for layer in report.converted] == [("fc2", "ProxPropLinear")]
    assert (model["fc1"].tau_prox, model["fc1"].optimization_mode) == (0.1, "prox_exact")
    assert (model["fc2"].tau_prox, model["fc2"].optimization_mode) == (0.2, "prox_cg1")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tau_prox": 0}, ValueError, "convert: tau_prox must be a positive finite number, got 0"),
        ({"optimization_mode": "cg"}, ValueError, "convert: optimization_mode must be 'prox_exact'"),
        ({"only": "("}, ValueError, r"convert: only: '\(' is no regular expression"),
        ({"skip": "["}, ValueError, r"convert: skip: '\[' is no regular expression"),
        ({"overrides": {"*": {}}}, ValueError, r"convert: overrides: '\*' is no regular expression"),
        ({"only": ["fc"]}, TypeError, r"convert: only must be a regular expression or a function .*, got \['fc'\]"),
        ({"only": nn.Linear}, TypeError, "convert: only must be a regular expression or a function .*, got <class"),
        ({"skip": nn.Linear(3, 3)}, TypeError, "convert: skip must be a regular expression .*, got Linear"),
        ({"skip": 3}, TypeError, "convert: skip must be a regular expression or a function of name and module, got 3"),
        ({"overrides": 3}, TypeError, "convert: overrides must be a mapping or a function of name and module, got 3"),
        ({"overrides": {"fc": 0.1}}, TypeError, r"convert: overrides\['fc'\]: settings must be a mapping, got 0.1"),
        ({"overrides": lambda name, module: 0.1}, TypeError, r"convert: overrides\('conv1'\): settings must be a map"),
        ({"overrides": {"fc": {"tau": 1}}}, ValueError, r"\['fc'\]: unknown setting 'tau'; there are tau_prox, opt"),
        ({"overrides": {"fc": {"tau_prox": -1}}}, ValueError, r"overrides\['fc'\]: tau_prox must be .*, got -1"),
        (
            {"overrides": lambda name, module: {"tau_prox": -1} if name == "fc2" else None},
            ValueError,
            r"overrides\('fc2'\): tau_prox must be .*, got -1",
        ),
        (
            {"overrides": {"fx": {}}},
            ValueError,
            "overrides: 'fx' is found in no converted layer's name; there are conv1, ",
        ),
        ({"overrides": {"fc": {}}, "skip": "fc"}, ValueError, "overrides: 'fc' is found in no converted layer's name"),
        ({"skip": "head"}, ValueError, "skip='head' is found in no layer's name; there are conv1, fc1, fc2$"),
        ({"only": "head"}, ValueError, "convert: nothing to convert; not in only: conv1, fc1, fc2; .*: 1 BatchNorm1d$"),
        ({"skip": ""}, ValueError, "convert: nothing to convert; in skip: conv1, fc1, fc2; without"),
        ({"only": "fc", "skip": "fc1|fc2"}, ValueError, "nothing to convert; not in only: conv1; in skip: fc1, fc2;"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(arguments, error, message):
    model = named_net()
    before = types(model)
    with pytest.raises(error, match=message) as caught:
        convert(model, **arguments)
    assert "\n" not in str(caught.value)
    assert types(model) == before


def test_a_predicate_that_raises_changes_nothing():
    model = named_net()
    before = types(model)
    with pytest.raises(AttributeError, match="in_features"):
        convert(model, only=lambda name, module: module.in_features > 2 or name == "fc1")
    assert types(model) == before


def test_a_model_without_layers_says_what_it_has():
    model = nn.ModuleList([nn.Bilinear(3, 2, 2), nn.GRU(2, 2), nn.GRU(2, 2)])
    with pytest.raises(ValueError, match=r"nothing to convert \(no Linear, .*\); without .* class: 1 Bilinear, 2 GRU$"):
        convert(model)
    with pytest.raises(
        ValueError, match=r"nothing to convert \(no Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding\)$"
    ):
        convert(nn.ReLU())


@pytest.mark.parametrize("function", [convert, revert])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got str"):
        function("resnet18")


# What is left alone


class Standardised(nn.Conv2d):
    """As timm's ScaledStdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Adapter(nn.Module):
    """As PEFT's layers."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(3, 1, bias=False)
        self.lora_B = nn.Linear(1, 3, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class FusedProjection(nn.Module):
    """Uses a layer's weight, and calls the layer only where ``called``."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(3, 3)
        self.proj = nn.Linear(3, 3)
        self.cast = nn.Linear(3, 3)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        x = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        return self.cast(self.proj(x).to(self.cast.weight.dtype))


class SometimesFused(FusedProjection):
    def forward(self, x):
        return self.qkv(x) if self.training else super().forward(x)


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "layer": nn.Linear(3, 4)})
    model["layer"].weight = model["embed"].weight
    return model


def frozen():
    return nn.ModuleDict({"layer": nn.Linear(3, 3).requires_grad_(False)})


def forward_set():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    return nn.ModuleDict({"layer": layer})


def quantised_weight():
    class Int4Parameter(nn.Parameter):
        pass

    layer = nn.Linear(3, 3)
    layer.weight = Int4Parameter(torch.randn(3, 3))
    return nn.ModuleDict({"layer": layer})


def without_parameters():
    class QuantLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.zeros(3, dtype=torch.int8))

    return nn.ModuleDict({"layer": QuantLinear()})


def plain_tensor():
    layer = nn.Linear(3, 3)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return nn.ModuleDict({"layer": layer})


def flattened():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.zeros(9))
    return nn.ModuleDict({"layer": layer})


def generated():
    layer = proxprop_module_generator(nn.Sequential)(nn.Linear(3, 3))
    return nn.ModuleDict({"layer": layer})


def one(layer):
    return nn.ModuleDict({"layer": layer})


OtherConv1D = type("Conv1D", (nn.Bilinear,), {"__init__": lambda self, *a: nn.Bilinear.__init__(self, *a, 3)})
LEFT_ALONE = {
    "subclass": (lambda: one(Standardised(2, 2, 3)), "layer", "a subclass of Conv2d"),
    "attention": (
        lambda: one(nn.MultiheadAttention(4, 2)),
        "layer.out_proj",
        "MultiheadAttention reads its weight and does not call it",
    ),
    "fused": (lambda: one(FusedProjection()), "layer.qkv", "FusedProjection reads its weight and does not call it"),
    "swin": (
        lambda: one(torchvision.models.swin_transformer.ShiftedWindowAttention(4, [2, 2], [0, 0], 2)),
        "layer.proj",
        "ShiftedWindowAttention reads its weight and does not call it",
    ),
    "tied": (tied, "layer", "weight shared with embed"),
    "frozen": (frozen, "layer", "frozen"),
    "adapter": (lambda: one(Adapter(nn.Linear(3, 3))), "layer.base_layer", "an adapter's base layer"),
    "parametrized": (lambda: one(parametrizations.orthogonal(nn.Linear(3, 3))), "layer", "parametrized"),
    "pruned": (
        lambda: one(prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)),
        "layer",
        "its weight is computed from weight_orig",
    ),
    "pruned bias": (
        lambda: one(prune.random_unstructured(nn.Linear(3, 3), "bias", 0.5)),
        "layer",
        "its bias is computed from bias_orig",
    ),
    "weight_norm": (
        lambda: one(weight_norm(nn.Linear(3, 3))),
        "layer",
        "its weight is computed from weight_g, weight_v",
    ),
    "plain tensor": (plain_tensor, "layer", "its weight is no parameter (sharded?)"),
    "flattened": (flattened, "layer", "sharded: its weight is not here"),
    "quantised weight": (quantised_weight, "layer", "its weight is a Int4Parameter"),
    "quantised": (without_parameters, "layer", "no parameters (quantised?)"),
    "lazy": (lambda: one(nn.LazyLinear(3)), "layer", "lazy: its shape is known after a first batch"),
    "forward": (forward_set, "layer", "its forward is set on the instance"),
    "complex": (lambda: one(nn.Linear(3, 3, dtype=torch.complex64)), "layer", "complex"),
    "generated": (generated, "layer", "a subclass of ProxPropLayer"),
    "in generated": (generated, "layer.0", "part of a ProxProp layer, layer"),
    "bilinear": (lambda: one(nn.Bilinear(3, 3, 2)), "layer", "no ProxProp class"),
    "max_norm": (lambda: one(nn.Embedding(3, 3, max_norm=1.0)), "layer", "max_norm=1.0"),
    "sparse": (lambda: one(nn.Embedding(3, 3, sparse=True)), "layer", "sparse=True"),
    "scale_grad_by_freq": (
        lambda: one(nn.Embedding(3, 3, scale_grad_by_freq=True)),
        "layer",
        "scale_grad_by_freq=True",
    ),
    "Conv1D": (lambda: one(type("Rescaled", (Conv1D,), {})(3, 3)), "layer", "a subclass of Conv1D"),
    "Conv1D of another package": (lambda: one(OtherConv1D(3, 3)), "layer", "no ProxProp class"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:Complex modules are a new feature", "ignore:Lazy modules")
@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_its_reason(case):
    make, name, reason = LEFT_ALONE[case]
    model = make()
    model["other"] = nn.Linear(2, 2)
    before = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    report = convert(model)
    assert reasons(report)[name] == reason
    assert model["other"].tau_prox == 1
    module = model.get_submodule(name)
    assert before[name] == (type(module), set(vars(module)))


def test_what_is_beside_those_is_converted():
    assert converted(convert(Adapter(nn.Linear(3, 3)))) == ["lora_A", "lora_B"]
    assert converted(convert(FusedProjection())) == ["proj", "cast"]
    attention = nn.TransformerEncoderLayer(4, 2, 8)
    assert converted(convert(attention)) == ["linear1", "linear2"]


def test_a_weight_that_is_also_read_is_noted():
    report = convert(SometimesFused())
    assert [layer.note for layer in report.layers] == ["SometimesFused also reads its weight", None, None]
    assert "qkv    Linear  tau_prox=1, prox_cg1; SometimesFused also reads its weight\n" in str(report)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_is_converted_after_its_first_batch():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    model(torch.randn(2, 4))
    assert converted(convert(model)) == ["0", "1"]


def test_a_layer_frozen_in_part_is_solved_over_the_rest():
    layer = nn.Linear(3, 2).double()
    layer.weight.requires_grad_(False)
    convert(layer, optimization_mode="prox_exact")
    x, seed = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    layer(x).backward(seed)
    assert oracle.relative_error({"bias": layer.bias.grad}, oracle.exact(layer, [x], seed, 1.0)) < 1e-9


@pytest.fixture
def process_group():
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # FSDP's own
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("how", ["FSDP2", "FSDP1", "FSDP1 with original parameters", "DTensor"])
def test_sharded_layers_are_left_alone(how):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if how == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "DTensor":
        from torch.distributed.tensor import DTensor, Replicate

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model:
            layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Replicate()]))
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(
            model, use_orig_params=how == "FSDP1 with original parameters", device_id=torch.device("cpu")
        )
    with pytest.raises(ValueError, match=r"nothing to convert; .*shard"):
        convert(model)


# The report


def test_the_report_is_data_and_prints_as_an_aligned_table():
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 3), "longer": nn.Conv2d(2, 2, 3), "bn": nn.BatchNorm1d(2), "z": nn.Linear(3, 3)}
    )
    report = convert(model, tau_prox=0.05, optimization_mode="prox_exact", skip="longer")
    assert (
        str(report)
        == repr(report)
        == (
            "layer   class   settings\n"
            "a       Linear  tau_prox=0.05, prox_exact\n"
            "longer  Conv2d  left alone: in skip\n"
            "z       Linear  tau_prox=0.05, prox_exact\n"
            "2 of 3 converted; without a ProxProp class: 1 BatchNorm1d\n"
            "The paper leaves the output layer plain; z is the last one here."
        )
    )
    assert reasons(report) == {"a": None, "longer": "in skip", "bn": "no ProxProp class", "z": None}
    assert dataclasses.asdict(report)["layers"][0]["tau_prox"] == 0.05
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'layers'"):
        report.layers = ()


def test_a_single_layer_is_a_model():
    layer = nn.Linear(3, 3)
    assert "(the model itself)  Linear  tau_prox=1, prox_cg1\n1 of 1 converted" in str(convert(layer))
    assert type(layer) is ProxPropLinear


# Back to plain


def test_revert_gives_ordinary_gradients():
    model, plain = small_net(), small_net()
    convert(model)
    assert revert(model) == ("0", "4", "6")
    assert revert(model) == ()
    x = torch.randn(6, 2, 4, 4)
    for each in (model, plain):
        each(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(plain).values(), strict=True))


def test_a_backward_pass_ends_as_it_began():
    model = small_net()
    convert(model, optimization_mode="prox_exact")
    x = torch.randn(6, 2, 4, 4)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    loss = model(x).square().sum()
    revert(model)
    loss.backward()
    assert oracle.relative_error(gradients(model), expected) < 1e-6


def test_revert_takes_layers_that_convert_did_not_make():
    model = nn.Sequential(ProxPropLinear(3, 3), proxprop_module_generator(nn.Bilinear)(2, 2, 3))
    assert revert(model) == ("0", "1")
    assert types(model)[1:] == [nn.Linear, nn.Bilinear]
    assert vars(model[1]).keys() == vars(nn.Bilinear(2, 2, 3)).keys()


class Scaled(ProxPropLinear):
    pass


def proximal_with_forward():
    layer = ProxPropLinear(3, 3)
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scaled(3, 3), "revert: 1 is a Scaled; its plain form is not known"),
        (lambda: parametrizations.orthogonal(ProxPropLinear(3, 3)), "revert: 1 is a ParametrizedProxPropLinear; its"),
        (proximal_with_forward, "revert: 1 has a forward set on the instance; its plain form is not known"),
    ],
)
def test_revert_refuses_what_it_cannot_undo_and_changes_nothing(make, message):
    model = nn.Sequential(ProxPropLinear(3, 3), make())
    before = types(model)
    with pytest.raises(ValueError, match=message):
        revert(model)
    assert types(model) == before


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_reverted_model_can_be_exported_scripted_and_traced():
    model = small_net().eval()
    x = torch.randn(2, 2, 4, 4)
    convert(model)
    revert(model)
    expected = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    for make in (torch.jit.script, lambda m: torch.jit.trace(m, x)):
        assert torch.equal(make(model)(x), expected)


@pytest.mark.filterwarnings("ignore")  # deprecated, and widely used
def test_a_reverted_model_can_be_quantised():
    model = small_net().eval()
    convert(model)
    revert(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "quantized.dynamic" in type(quantised[4]).__module__
    assert reasons(convert(quantised)) == {
        "0": None,
        "1": "no ProxProp class",
        "4": "no parameters (quantised?)",
        "6": "no parameters (quantised?)",
    }


# Other people's networks


class GPT(nn.Module):
    """A small GPT whose head has the embedding's weight."""

    def __init__(self, vocabulary=17, width=8, context=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position.weight
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(x + self.mlp(x))


class GPT2(nn.Module):
    """As transformers builds it: linear layers are Conv1D, and the head has the embedding's weight."""

    def __init__(self, vocabulary=17, width=8, context=6):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.ln_1 = nn.LayerNorm(width)
        self.c_attn = Conv1D(3 * width, width)
        self.c_proj = Conv1D(width, width)
        self.c_fc = Conv1D(4 * width, width)
        self.mlp_c_proj = Conv1D(width, 4 * width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1])[None])
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.lm_head(x + self.mlp_c_proj(nn.functional.gelu(self.c_fc(x))))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([x, self.up(self.norm(self.down(x)).relu(), output_size=x.shape)], 1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def small_vit():
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision's is zero, and so would be all gradients before it
    return model


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), (2, 3, 64, 64), 21, 0),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(weights=None), (4, 3, 64, 64), 54, 0),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(weights=None), (2, 3, 32, 32), 59, 0),
    "vit": (small_vit, (3, 3, 16, 16), 6, 2),
    "swin": (
        lambda: torchvision.models.SwinTransformer([2, 2], 8, [1, 2], [2, 2], [4, 4], num_classes=5),
        (2, 3, 32, 32),
        9,
        6,
    ),
    "gpt": (GPT, None, 4, 3),
    "gpt2": (GPT2, None, 5, 2),
    "unet": (UNet, (3, 3, 8, 8), 3, 0),
    "lstm": (Recurrent, (4, 6, 3), 1, 0),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 5, 8), 2, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_with_descent_directions(name):
    make, shape, count, refused = NETWORKS[name]
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    x = torch.randint(17, (3, 6)) if shape is None else torch.randn(shape)
    report = convert(model, tau_prox=0.5, optimization_mode="prox_cg1")
    assert len(report.converted) == count
    assert sum(layer.reason != "no ProxProp class" for layer in report.left_alone) == refused

    outputs = []
    for each in (plain, model):
        torch.manual_seed(1)  # dropout, stochastic depth
        outputs.append(each(x))
        outputs[-1].square().mean().backward()
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    directions, expected = gradients(model), gradients(plain)
    taken = {f"{layer.name}.{p}" for layer in report.converted for p in ("weight", "bias")} & directions.keys()
    rest = expected.keys() - taken
    assert oracle.relative_error({n: directions[n] for n in rest}, {n: expected[n] for n in rest}) < 1e-4
    for layer in report.converted:
        pairs = [(directions[n].double(), expected[n].double()) for n in taken if n.rpartition(".")[0] == layer.name]
        assert sum((d * g).sum() for d, g in pairs) > 0
        assert not all(torch.allclose(d, g, rtol=1e-3, atol=0) for d, g in pairs)
    before = [p.detach().clone() for p in model.parameters()]
    torch.optim.AdamW(param_groups(model, proximal={"lr": 0.01}, plain={"lr": 0.001})).step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_transformers_fast_path_computes_the_same(monkeypatch):
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = copy.deepcopy(plain)
    convert(model)
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: (calls.append(1), fast(*a))[1])
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert len(calls) == 2


def test_a_traced_graph_is_a_model():
    model = torch.fx.symbolic_trace(small_net())
    plain = copy.deepcopy(model)
    assert converted(convert(model, optimization_mode="prox_exact")) == ["0", "4", "6"]
    x = torch.randn(6, 2, 4, 4)
    for each in (model, plain):
        each(x).square().sum().backward()
    assert oracle.relative_error(gradients(model), gradients(plain)) > 0.1


# Parameters in two groups


def test_param_groups_have_each_parameter_once():
    model = small_net()
    model[1].weight.requires_grad_(False)
    convert(model, skip="^6$")
    proximal, plain = param_groups(model, proximal={"lr": 1.0}, plain={"lr": 0.1, "weight_decay": 0.0})
    assert [id(p) for p in proximal["params"]] == [id(p) for i in (0, 4) for p in model[i].parameters()]
    assert [id(p) for p in plain["params"]] == [id(p) for i in (1, 6) for p in model[i].parameters()]
    optimizer = torch.optim.SGD([proximal, plain], lr=0.5, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1.0, 0.2), (0.1, 0.0)]


def test_a_parameter_that_a_plain_module_has_too_is_in_the_plain_group():
    model = nn.Sequential(nn.Embedding(4, 3), ProxPropLinear(3, 4))
    model[1].weight = model[0].weight
    proximal, plain = param_groups(model)
    assert [id(p) for p in proximal["params"]] == [id(model[1].bias)]
    assert [id(p) for p in plain["params"]] == [id(model[0].weight)]


def test_parts_of_a_proxprop_layer_are_in_its_group():
    model = nn.Sequential(proxprop_module_generator(nn.Sequential)(nn.Linear(3, 3)), nn.Linear(3, 1))
    proximal, plain = param_groups(model)
    assert [len(group["params"]) for group in (proximal, plain)] == [2, 2]


def test_param_groups_of_a_fully_converted_model_make_an_optimizer():
    model = nn.Sequential(nn.Linear(3, 3))
    convert(model)
    model(torch.randn(2, 3)).sum().backward()
    torch.optim.Adam(param_groups(model), lr=0.1).step()


def test_param_groups_refuse_a_model_without_proxprop_layers_and_foreign_parameters():
    with pytest.raises(ValueError, match="no ProxProp layer with parameters of its own; convert it first"):
        param_groups(small_net())
    with pytest.raises(ValueError, match="'params' is no option"):
        param_groups(ProxPropLinear(2, 2), proximal={"params": []})


# The documentation


def test_the_documentation_names_every_reason():
    text = DOCS.read_text()
    table = [cell.replace("…", ".*") for cell in re.findall(r"`([^`]+)`", text[text.index("## What is left alone") :])]
    for _, _, reason in LEFT_ALONE.values():
        pattern = reason.replace("bias", "weight")
        assert any(re.match(re.escape(cell).replace(r"\.\*", ".*"), pattern) for cell in table), reason


def test_automatic_modes_are_exact_where_the_gram_matrix_fits():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(9, 4),  # 10 columns
            "wide": nn.Linear(11, 4, bias=False),  # 11
            "grouped": nn.Conv2d(8, 4, 3, groups=4),  # 4 groups of 19
            "transposed": nn.ConvTranspose1d(2, 6, 5, groups=2),  # 2 groups of 6
            "embedding": nn.Embedding(101, 3),
        }
    )
    report = convert(model, optimization_mode="auto", gram_budget=8 * 10**2)
    modes = {layer.name: layer.optimization_mode for layer in report.converted}
    exact = {"linear", "transposed"}
    assert modes == {name: "prox_exact" if name in exact else "prox_cg3" for name in model}
    assert "linear      Linear           tau_prox=1, prox_exact" in str(report)
    report = convert(model, optimization_mode="auto", gram_budget=8 * 4 * 19**2, overrides={"wide": {"tau_prox": 2.0}})
    assert {layer.optimization_mode for layer in report.converted} == {"prox_exact"}
    with pytest.raises(ValueError, match="gram_budget must be a number of bytes, at least 0, got -1"):
        convert(model, optimization_mode="auto", gram_budget=-1)
    with pytest.raises(ValueError, match=r"optimization_mode must be .*, got 'auto'"):
        ProxPropLinear(2, 2, optimization_mode="auto")


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(6, 4), (50, 6)), (nn.Conv2d(4, 6, 3, groups=2, bias=False), (50, 4, 8, 8))]
)
def test_the_budget_counts_the_matrix_that_a_step_makes(layer, shape):
    convert(layer, optimization_mode="prox_exact")
    (row,) = diagnose(layer, torch.randn(shape), lambda m, b: m(b).sum()).layers
    size = 8 * getattr(layer, "groups", 1) * row.columns**2
    assert row.form == "Primal"
    assert row.matrix_bytes in (size, size // 2)  # in float64, or in float32
    for budget, mode in ((size, "prox_exact"), (size - 1, "prox_cg3")):
        convert(layer, optimization_mode="auto", gram_budget=budget)
        assert layer.optimization_mode == mode


def test_a_budget_that_nothing_reads():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match="gram_budget counts with optimization_mode='auto' alone, and no layer has that"
    ):
        convert(model, optimization_mode="prox_exact", gram_budget=1e6)
    assert type(model[0]) is nn.Linear
    convert(model, gram_budget=1e6, overrides={"0": {"optimization_mode": "auto"}})
