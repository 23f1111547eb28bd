"""Whatever a config file, a sweep file or an override holds: it is accepted, or refused with one line."""

import contextlib
import copy
import io
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from experiments import run, sweep
from experiments.command.errors import ConfigError
from experiments.config import dump_config, load_resolved, parse_config
from experiments.config.sweep_file import load_config_file

VALID = {
    "name": "tiny",
    "model": {"name": "mlp", "hidden_features": [8]},
    "data": {"name": "digits", "root": "data", "train_samples": 100},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.0},
    "proxprop": {"optimization_mode": "prox_cg3", "tau_prox": 0.1},
    "epochs": 2,
    "batch_size": 40,
    "seed": 0,
    "order_seed": None,
    "deterministic": False,
    "device": "cpu",
    "checkpoint_every": 1,
    "keep_checkpoint": False,
    "tensorboard": False,
}
SECTIONS = ["", "model", "data", "optimizer", "proxprop"]
KEYS = [
    f"{section}.{key}" if section else key for section in SECTIONS for key in (VALID[section] if section else VALID)
]

tried = settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("valid.yaml").write_text(yaml.safe_dump(VALID))


def printed(main, arguments):
    """The exit code, and what is on stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*arguments, "--output", "out"])
    return code, out.getvalue(), err.getvalue()


def assert_accepted_or_one_line(path, overrides=()):
    """By what loads the file, and by both command lines; nothing is run."""
    problem = problem_of(path, overrides)
    arguments = [str(path), *overrides]
    commands = [(sweep.main, [*arguments, "--check"])]
    if problem is not None:
        assert problem.isprintable(), problem
        commands += [(run.main, arguments)]
    for main, given_arguments in commands:
        code, out, err = printed(main, given_arguments)
        assert out == ""
        assert (code, err) == (0, "") or (code == 2 and err.startswith("error: ") and is_one_line(err)), err
        assert code == 2 or problem is None
    assert not Path("out").exists()
    return problem


def is_one_line(text):
    return text.endswith("\n") and text[:-1].isprintable()


def problem_of(path, overrides):
    """None of an accepted file, all of whose configs read back as they are."""
    try:
        file = load_config_file(path, overrides)
    except ConfigError as error:
        return str(error)
    assert file.configs
    for config in file.configs[:3]:
        text = dump_config(config)
        assert parse_config(text) == config
        Path("stored.yaml").write_text(text, encoding="utf-8")
        assert load_resolved(Path("stored.yaml")) == config
    return None


# --- values ---------------------------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "\n", "a\nb", "1e5", "null", "~", "é", "\u2028", "\x1b[1m", "a" * 300, "../x", "0x1F"]),
    st.from_regex(r"[0-9][0-9.]{0,3}[eE][-+]?[0-9]{1,3}", fullmatch=True),
)
numbers = st.one_of(
    st.integers(-3, 100),
    st.integers(),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 10**30, -(10**30)]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e-320, 1e36, 3.5e38, 1e308]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.dates())
values = st.recursive(
    scalars,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(st.one_of(texts, st.sampled_from(KEYS), st.integers(-1, 3), st.none()), children, max_size=3),
    ),
    max_leaves=6,
)


def as_yaml(content):
    """As files hold it; strings are quoted."""
    return yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False).encode()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


# --- configs --------------------------------------------------------------------------------------------------------


@st.composite
def changed_configs(draw):
    """A valid config with some keys changed, added, removed or renamed, at any depth."""
    config = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from(SECTIONS))
        target = config.get(section) if section else config
        if not isinstance(target, dict):
            continue
        known = st.sampled_from(sorted(target, key=str)) if target else texts
        match draw(st.sampled_from(["change", "change", "change", "add", "remove", "rename"])):
            case "change":
                target[draw(known)] = draw(values)
            case "add":
                target[draw(st.one_of(texts, st.sampled_from(["grid", "seeds", "extends"])))] = draw(values)
            case "remove":
                target.pop(draw(known), None)
            case "rename":
                target[draw(texts)] = target.pop(draw(known), None)
    return config


@tried
@given(changed_configs())
def test_a_changed_config_is_accepted_or_one_line(config):
    Path("a.yaml").write_bytes(as_yaml(config))
    assert_accepted_or_one_line(Path("a.yaml"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "1e5"),
        ("name", "2024-01-01"),
        ("data.root", "1e5"),
        ("data.root", "a\nb\x85"),
        ("data.root", "=1"),
        ("optimizer.lr", 1e-320),
        ("optimizer.lr", 5),
        ("order_seed", 2**63 - 1),
        ("epochs", 10**12),
    ],
)
def test_unusual_values_that_are_accepted(key, value):
    config = copy.deepcopy(VALID)
    *section, last = key.split(".")
    (config[section[0]] if section else config)[last] = value
    Path("a.yaml").write_bytes(as_yaml(config))
    assert assert_accepted_or_one_line(Path("a.yaml")) is None


@pytest.mark.parametrize(
    "override",
    [
        f"batch_size={10**30}",
        f"epochs=0x{'f' * 5000}",
        f"model.hidden_features=[{10**30}]",
        f"model.hidden_features=[{2**62}]",
        f"model={{name: convnet, hidden_features: , kernel_size: {10**30 + 1}}}",
        "optimizer.lr=1e308",
        "optimizer.weight_decay=1e308",
        "optimizer={name: adam, momentum: 0, nesterov: false, lr: 3.4e38}",
        'data={name: cifar10, root: "a\\nb"}',
        f"data={{name: cifar10, root: {'a' * 300}}}",
    ],
)
def test_a_size_that_nothing_can_have_is_one_line(override):
    """If not where the config is read, then where the run begins."""
    code, out, err = printed(run.main, ["valid.yaml", override])
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert is_one_line(err)


# --- overrides ------------------------------------------------------------------------------------------------------

override_texts = st.one_of(
    st.builds(
        "{}={}".format,
        st.one_of(st.sampled_from(KEYS), texts, st.lists(st.sampled_from(["a", "", "lr", "optimizer"])).map(".".join)),
        st.one_of(texts, values.map(lambda value: as_yaml(value).decode().removesuffix("\n...\n"))),
    ),
    texts,
)
# An argument of a program cannot hold NUL, and one with a dash in front is an option.
override_texts = override_texts.filter(lambda text: text and "\0" not in text and not text.startswith("-"))


@tried
@given(st.lists(override_texts, min_size=1, max_size=2))
@example([f"name={'x' * 300}"])
@example(["a\nb=1"])
@example(["seed=\udcff"])
@example(["\udcff=1"])
@example([".".join(["a"] * 3000) + "=1"])
@example(["epochs=" + "[" * 1000])
@example(["epochs=!!timestamp x"])
def test_an_override_is_accepted_or_one_line(overrides):
    overrides = [text if "=" in text else f"{text}=" for text in overrides]  # else it names a config file
    assert_accepted_or_one_line(Path("valid.yaml"), overrides)


@pytest.mark.parametrize(
    "argument", ["x" * 300, "a\nb", "\udcff", "x" * 300 + "=1", "/" + "y/" * 3000, "--a\nb", "-\x1b"]
)
@pytest.mark.parametrize("main", [run.main, sweep.main])
def test_an_argument_that_names_nothing_is_one_line(main, argument):
    code, out, err = printed(main, [argument])
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert is_one_line(err)


# --- files ----------------------------------------------------------------------------------------------------------

TOKENS = [
    *"[]{}:,?-&*!|>'\"%@`#~=\n\n\n \t\\0x",
    *(
        "? ",
        "- ",
        ": ",
        "&a ",
        "*a ",
        "<<: ",
        "--- ",
        "... ",
        "!!int ",
        "!!timestamp ",
        "!!bool ",
        "!!float ",
        "!!null ",
    ),
    *("!!binary ", "!!set ", "!!omap ", "!!pairs ", "!!str ", "!!seq ", "!!map ", "!a ", "0x", "1e5", "0b_", "1:2:3"),
    *("2024-99-99", "name: ", "extends: ", "grid: ", "seeds: ", "valid.yaml", "'", "\u2028", "\xa0", "\ufeff"),
]
contents = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(TOKENS), max_size=12).map(lambda parts: "".join(parts).encode()),
    values.map(as_yaml),
)


@tried
@given(contents)
@example(b"[1]: 2\n")
@example(b"? {a: b}\n: 3\n")
@example(b"&a {? *a : b}")
@example(b"&a {optimizer: *a}")
@example(b"name: !!timestamp x")
@example(b"name: !!int ''")
@example(b"name: !!bool x")
@example(b"a: {[1]: 2}")
@example(b"[" * 1000)
@example(b"{a: " * 1000)
@example(b'extends: "a\\0b"')
@example(b"extends: " + b"a" * 300)
@example(b'extends: "a\\nb"')
@example(b"extends: a.yaml")
@example(b"extends: .")
@example(b'"a\\nb": 1')
@example(b"epochs: 0x" + b"f" * 5000)
@example(b"extends: valid.yaml\nseeds: 0x" + b"f" * 5000)
@example(b"extends: valid.yaml\ngrid: {epochs: [0x" + b"f" * 5000 + b"]}")
def test_a_file_of_any_bytes_is_accepted_or_one_line(content):
    Path("a.yaml").write_bytes(content)
    assert_accepted_or_one_line(Path("a.yaml"))


# --- sweeps ---------------------------------------------------------------------------------------------------------

some_values = st.one_of(st.lists(values, max_size=4), values)
grids = st.one_of(
    st.dictionaries(
        st.one_of(st.sampled_from(KEYS), st.lists(st.sampled_from(KEYS), min_size=2, max_size=2).map(", ".join), texts),
        some_values,
        max_size=3,
    ),
    values,
)
sensible_grids = st.dictionaries(
    st.sampled_from(["optimizer.lr", "proxprop.tau_prox", "optimizer.lr, proxprop.tau_prox"]),
    st.lists(st.one_of(st.integers(1, 9), st.floats(1e-6, 1e6)), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)
# Not so many that they would fill the memory if they were not refused: test_sweep_file.py has a number just too large.
seeds = st.one_of(
    st.integers(1, 3),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3),
    values.filter(lambda value: not isinstance(value, int) or value < 10 or value >= 2**63),
)


@tried
@given(
    st.one_of(grids, sensible_grids, st.lists(sensible_grids, max_size=3), st.lists(grids, max_size=2)),
    st.one_of(st.none(), seeds),
)
@example({"optimizer.lr": [0.1]}, 10**30)
@example({"a\nb": [1]}, None)
@example({"data.root": ["a\nb"]}, 2)
def test_any_grid_and_seeds_are_accepted_or_one_line(grid, listed):
    content = {"extends": "valid.yaml", "grid": grid}
    if listed is not None:
        content["seeds"] = listed
    Path("sweep.yaml").write_bytes(as_yaml(content))
    assert_accepted_or_one_line(Path("sweep.yaml"))


@settings(tried, max_examples=50)
@given(sensible_grids, st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
def test_a_sensible_grid_is_accepted_or_names_a_run_twice(grid, listed):
    """That not everything is refused above."""
    Path("sweep.yaml").write_bytes(as_yaml({"extends": "valid.yaml", "grid": grid, "seeds": listed}))
    problem = assert_accepted_or_one_line(Path("sweep.yaml"))
    if problem is None:
        configs = load_config_file(Path("sweep.yaml")).configs
        assert len(configs) == math.prod(map(len, grid.values())) * len(listed)
        assert len({config.name for config in configs}) == len(configs)
    else:
        assert "two runs would both be named" in problem or "is varied twice in one grid" in problem
