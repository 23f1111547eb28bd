"""A sweep file stands for its grid times its seeds, each run under a name that says what varies."""

from pathlib import Path

import pytest
import yaml

from experiments import run, sweep
from experiments.command.errors import ConfigError
from experiments.config import load_config
from experiments.config.sweep_file import load_config_file, without_seed

ROOT = Path(__file__).resolve().parents[3]
TINY = Path("configs/tiny.yaml")

LR, TAU, MODE = "optimizer.lr", "proxprop.tau_prox", "proxprop.optimization_mode"


@pytest.fixture(autouse=True)
def tiny(write_config):
    return write_config()


def write_sweep(path="sweep.yaml", **keys):
    Path(path).write_text(yaml.safe_dump({"extends": str(TINY), **keys}, sort_keys=False))
    return Path(path)


def load_sweep(overrides=(), **keys):
    return load_config_file(write_sweep(**keys), overrides)


def names(file):
    return [config.name for config in file.configs]


def test_a_plain_config_stands_for_itself():
    file = load_config_file(TINY, ["epochs=7"])
    assert not file.is_sweep
    assert file.configs == (load_config(TINY, ["epochs=7"]),)


def test_a_grid_stands_for_all_its_points():
    file = load_sweep(grid={LR: [1, 0.1], MODE: ["prox_cg3", "gradient"]})
    assert file.is_sweep
    assert names(file) == [
        "lr=1,optimization_mode=prox_cg3",
        "lr=1,optimization_mode=gradient",
        "lr=0.1,optimization_mode=prox_cg3",
        "lr=0.1,optimization_mode=gradient",
    ]
    assert [(config.optimizer.lr, config.proxprop.optimization_mode) for config in file.configs] == [
        (1, "prox_cg3"), (1, "gradient"), (0.1, "prox_cg3"), (0.1, "gradient"),
    ]  # fmt: skip
    plain = load_config(TINY)
    assert all(config.epochs == plain.epochs and config.model == plain.model for config in file.configs)


def test_a_list_of_grids_stands_for_the_points_of_each():
    file = load_sweep(grid=[{MODE: ["gradient"], LR: [1, 2]}, {TAU: [3]}])
    assert names(file) == ["optimization_mode=gradient,lr=1", "optimization_mode=gradient,lr=2", "tau_prox=3"]
    assert [config.optimizer.lr for config in file.configs] == [1, 2, 0.1]
    assert [config.proxprop.tau_prox for config in file.configs] == [1, 1, 3]


@pytest.mark.parametrize("key", [f"{TAU},{LR}", f" {TAU} , {LR} "])
def test_keys_joined_by_commas_take_one_value(key):
    file = load_sweep(grid={key: [0.5, 5]})
    assert names(file) == ["tau_prox=0.5", "tau_prox=5"]
    assert [(config.proxprop.tau_prox, config.optimizer.lr) for config in file.configs] == [(0.5, 0.5), (5, 5)]


@pytest.mark.parametrize(("seeds", "expected"), [(3, [0, 1, 2]), (1, [0]), ([7, 3], [7, 3]), ([5], [5])])
def test_seeds_are_listed_or_counted(seeds, expected):
    file = load_sweep(seeds=seeds)
    assert file.is_sweep
    assert [config.seed for config in file.configs] == expected
    assert names(file) == [f"seed={seed}" for seed in expected]


def test_seeds_vary_fastest():
    file = load_sweep(grid={LR: [1, 2]}, seeds=[4, 9])
    assert names(file) == ["lr=1,seed=4", "lr=1,seed=9", "lr=2,seed=4", "lr=2,seed=9"]
    assert [config.seed for config in file.configs] == [4, 9, 4, 9]
    assert [without_seed(name) for name in names(file)] == ["lr=1", "lr=1", "lr=2", "lr=2"]


@pytest.mark.parametrize("own", [{}, {"seeds": [4, 9]}, {"seeds": 5}])
def test_the_number_of_seeds_can_be_given_from_outside(own):
    file = load_config_file(write_sweep(grid={LR: [1]}, **own), seeds=2)
    assert names(file) == ["lr=1,seed=0", "lr=1,seed=1"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (0, ["tiny", "tiny,seed=1", "tiny,seed=2"]),
        (1, ["tiny,seed=0", "tiny", "tiny,seed=2"]),
        (9, ["tiny,seed=0", "tiny,seed=1", "tiny,seed=2"]),
    ],
)
def test_seeds_of_a_plain_config_leave_its_own_run_its_name(write_config, own, expected):
    file = load_config_file(write_config(seed=own), seeds=3)
    assert not file.is_sweep
    assert names(file) == expected
    assert [config.seed for config in file.configs] == [0, 1, 2]
    assert {without_seed(name) for name in expected} == {"tiny"}


def test_keys_that_end_alike_are_named_in_full():
    same = "data.name"
    file = load_sweep(grid={"optimizer.name": ["adam", "sgd"], same: ["digits"], LR: [1]})
    assert names(file) == [
        "optimizer.name=adam,data.name=digits,lr=1",
        "optimizer.name=sgd,data.name=digits,lr=1",
    ]
    # In another grid of the list, too: all names of a file are made alike.
    assert names(load_sweep(grid=[{"optimizer.name": ["adam"]}, {same: ["digits"]}])) == [
        "optimizer.name=adam",
        "data.name=digits",
    ]


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        (LR, 1e-7, "lr=1e-07"),
        (LR, 1e30, "lr=1e30"),
        ("optimizer.nesterov", False, "nesterov=false"),
        ("data.train_samples", None, "train_samples=none"),
        ("model.hidden_features", [8, 4], "hidden_features=8x4"),
        ("data.root", "/data/of mine", "root=-data-of-mine"),
    ],
)
def test_values_in_names(key, value, name):
    file = load_sweep(grid={key: [value]})
    assert names(file) == [name]


def test_a_section_may_vary_as_a_whole():
    file = load_sweep(grid={"model": [{"hidden_features": [4]}, {"hidden_features": [5]}]})
    assert [config.model.hidden_features for config in file.configs] == [(4,), (5,)]


def test_names_come_from_what_varies_whatever_the_base_is_called():
    assert names(load_sweep(name="mine", grid={LR: [1]})) == ["lr=1"]


def test_the_grid_may_come_from_a_base():
    write_sweep("base.yaml", grid={LR: [1, 2], TAU: [3]}, seeds=2)
    Path("leaf.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", "epochs": 9, "grid": {LR: [5]}}))
    file = load_config_file(Path("leaf.yaml"))
    assert names(file) == ["lr=5,tau_prox=3,seed=0", "lr=5,tau_prox=3,seed=1"]
    assert {config.epochs for config in file.configs} == {9}


def test_overrides_are_for_all_runs():
    file = load_sweep(["epochs=9", f"{TAU}=0.25"], grid={LR: [1, 2]})
    assert [(config.epochs, config.proxprop.tau_prox) for config in file.configs] == [(9, 0.25)] * 2


@pytest.mark.parametrize(
    ("keys", "override", "key"),
    [
        ({"grid": {LR: [1, 2]}}, f"{LR}=3", LR),
        ({"grid": {f"{TAU}, {LR}": [1, 2]}}, f"{LR}=3", LR),
        ({"grid": [{MODE: ["gradient"]}, {TAU: [1]}]}, f"{TAU}=3", TAU),
        ({"seeds": 2}, "seed=1", "seed"),
        ({"grid": {"optimizer": [{"lr": 1}, {"lr": 2}]}}, f"{LR}=3", LR),  # it would not come to anything
        ({"grid": {LR: [1, 2]}}, "optimizer={lr: 3}", "optimizer"),
    ],
)
def test_what_varies_cannot_be_set_for_all(keys, override, key):
    with pytest.raises(ConfigError, match=rf"^{key}: varies from run to run here, so it cannot"):
        load_sweep([override], **keys)


def test_a_seed_cannot_be_set_where_seeds_are_asked_for():
    with pytest.raises(ConfigError, match=r"^seed: varies from run to run here"):
        load_config_file(TINY, ["seed=1"], seeds=2)
    assert load_config_file(TINY, ["seed=1"]).configs[0].seed == 1


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"grid": {LR: [1, 1]}}, r"grid: two runs would both be named lr=1; give each value once"),
        ({"grid": [{LR: [1]}, {LR: [1]}]}, r"grid: two runs would both be named lr=1; give each value once"),
        ({"grid": {LR: [1, 1.0]}}, r"grid: lr=1 and lr=1\.0 are one config; give each value once"),
        ({"grid": [{LR: [1]}, {TAU: [2]}, {TAU: [2], LR: [0.1]}]}, r"grid: tau_prox=2 and tau_prox=2,lr=0\.1 are .*"),
        ({"seeds": [1, 2, 1]}, r"seeds: must be different from each other, got \[1, 2, 1\]"),
        ({"seeds": None}, r"seeds: is empty; give it an entry, or leave the key out"),
        ({"grid": None, "seeds": 2}, r"grid: is empty; give it an entry, or leave the key out"),
        ({"grid": {"data.root": ["a b", "a-b"]}}, r"grid: two runs would both be named root=a-b; .*"),
        ({"grid": []}, r"grid: must hold at least one key"),
        ({"grid": {}}, r"grid: must be a mapping of keys to lists of values, or a list of such, got {}"),
        ({"grid": [{}]}, r"grid: must be a mapping of keys .*, got {}"),
        ({"grid": "optimizer.lr"}, r"grid: must be a mapping of keys .*, got 'optimizer\.lr'"),
        ({"grid": 3}, r"grid: must be a mapping of keys .*, got 3"),
        ({"grid": [[LR]]}, r"grid: must be a mapping of keys .*, got \['optimizer\.lr'\]"),
        ({"grid": {LR: 1}}, r"grid\.optimizer\.lr: must be a list of at least one value, got 1"),
        ({"grid": {LR: []}}, r"grid\.optimizer\.lr: must be a list of at least one value, got \[\]"),
        ({"grid": {LR: {"from": 1}}}, r"grid\.optimizer\.lr: must be a list of at least one value, got {'from': 1}"),
        ({"grid": {LR: None}}, r"grid\.optimizer\.lr: must be a list of at least one value, got None"),
        ({"grid": {1: [2]}}, r"grid: 1 is no key; it has the form optimizer\.lr, or several joined by commas"),
        ({"grid": {"": [2]}}, r"grid: '' is no key; .*"),
        ({"grid": {f"{LR},": [2]}}, r"grid: 'optimizer\.lr,' is no key; .*"),
        ({"grid": {"optimizer..lr": [2]}}, r"grid: 'optimizer\.\.lr' is no key; .*"),
        ({"grid": {"seed": [1, 2]}}, r"grid\.seed: names come from what varies, and seeds have a key of their own, .*"),
        ({"grid": {f"{LR},seed": [1]}}, r"grid\.optimizer\.lr,seed: names come from what varies, and seeds .*"),
        ({"grid": {"name": ["a"]}}, r"grid\.name: names come from what varies, and seeds have a key of their own, .*"),
        ({"grid": {"optimizer.lrr": [1]}}, r"optimizer\.lrr: unknown key; did you mean lr\? .*"),
        ({"grid": {LR: [1, -1]}}, r"optimizer\.lr: must be greater than 0, got -1"),
        ({"grid": {LR: ["1"]}}, r"optimizer\.lr: must be a valid number, got '1'"),
        ({"grid": {"extends": ["a.yaml"]}}, r"extends: unknown key; .*"),
        ({"grid": {"grid": [1]}}, r"grid: unknown key; .*"),
        ({"grid": {"data.root": ["a" * 300]}}, r"name: .*"),
        ({"grid": {LR: [1], f"{LR},{TAU}": [2]}}, r"grid\..*: optimizer\.lr is varied twice .*"),  # one key, two values
        ({"grid": {f"{LR},{LR}": [2]}}, r"grid\..*: optimizer\.lr is varied twice .*"),
        *(
            (
                {"seeds": value},
                r"seeds: must be how many \(at most 10000\), or a list of seeds \(integers from 0 on\), got .*",
            )
            for value in (0, -1, 2.0, "3", True, [], [-1], [1.5], ["1"], [True], [2**63], [None], {"from": 1}, [[1]])
        ),
    ],
)
def test_what_is_no_sweep_is_one_line(capsys, keys, line):
    path = write_sweep(**keys)
    with pytest.raises(ConfigError, match=f"^{line}$"):
        load_config_file(path)
    assert sweep.main([str(path), "--check"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: sweep.yaml: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("seeds", ["0", "-1", "1.5", "many", str(10**30)])
def test_a_bad_number_of_seeds_is_one_line(capsys, seeds):
    for path in (TINY, write_sweep(grid={LR: [1]})):
        assert sweep.main([str(path), f"--seeds={seeds}", "--check"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "seeds: " in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"seeds": 10**30}, r"seeds: must be how many \(at most 10000\), .*"),
        ({"seeds": 20_000}, r"seeds: must be how many \(at most 10000\), .*"),
        ({"grid": {LR: list(range(1, 150)), TAU: list(range(1, 150))}}, r"grid: has 22201 points; a file may .*"),
        ({"grid": {LR: list(range(1, 150))}, "seeds": 150}, r"grid: has 149 points; a file may .* seeds included"),
    ],
)
def test_more_runs_than_anyone_could_want_are_refused_at_once(keys, line):
    with pytest.raises(ConfigError, match=f"^{line}$"):
        load_config_file(write_sweep(**keys))


@pytest.mark.parametrize(("values", "seeds", "runs"), [([1, 2], 2, "4 runs"), ([1], 1, "1 run")])
def test_one_run_alone_does_not_take_a_sweep_file(capsys, values, seeds, runs):
    assert run.main([str(write_sweep(grid={LR: values}, seeds=seeds))]) == 2
    assert capsys.readouterr().err == f"error: sweep.yaml stands for {runs}: use python -m experiments.sweep\n"


def test_runs_go_to_a_folder_of_the_sweeps_own(capsys):
    write_sweep("tau.yaml", grid={TAU: [1, 2]}, seeds=[3], epochs=1)
    assert sweep.main(["tau.yaml", "configs", "--output", "out"]) == 0
    assert sorted(path.parent.relative_to("out").as_posix() for path in Path("out").rglob("summary.json")) == [
        "configs/tiny",
        "tau/tau_prox=1,seed=3",
        "tau/tau_prox=2,seed=3",
    ]
    capsys.readouterr()
    assert sweep.main(["tau.yaml", "configs", "--output", "out"]) == 0
    assert capsys.readouterr().out.count("skipped, already in out/") == 3


def test_a_plain_run_counts_among_the_runs_with_other_seeds(capsys):
    assert sweep.main(["configs", "--output", "out"]) == 0
    assert sweep.main(["configs", "--output", "out", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "tiny: skipped, already in out/configs/tiny\n" in out
    assert "tiny,seed=1: finished" in out


VALUES = {50, 10, 5, 1, 0.5, 0.1, 0.05, 0.005, 0.0005}


def test_table_1_varies_the_learning_rate_alone():
    file = load_config_file(ROOT / "configs" / "sweeps" / "table1.yaml")
    modes = ["gradient"] + [f"{solver}_cg{n}" for solver in ("published", "prox") for n in (1, 3, 5)]
    assert len(set(names(file))) == len(file.configs) == 9 * len(modes)
    for mode in modes:
        configs = [config for config in file.configs if config.proxprop.optimization_mode == mode]
        assert {config.optimizer.lr for config in configs} == VALUES
        assert {config.proxprop.tau_prox for config in configs} == {1.0}
        assert {(config.epochs, config.batch_size, config.seed) for config in configs} == {(50, 500, 0)}


def test_the_sweep_over_tau_prox_holds_the_learning_rate():
    file = load_config_file(ROOT / "configs" / "sweeps" / "tau_prox.yaml")
    assert len(set(names(file))) == len(file.configs) == 36
    for mode in ("prox_exact", "prox_cg1", "prox_cg3", "prox_cg5"):
        configs = [config for config in file.configs if config.proxprop.optimization_mode == mode]
        assert {config.proxprop.tau_prox for config in configs} == VALUES
        assert {config.optimizer.lr for config in configs} == {1.0}
