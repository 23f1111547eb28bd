"""Every unusable config is one line that names the key and what is allowed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments import sweep
from experiments.command.errors import ConfigError
from experiments.config import differing_keys, dump_config, load_config, load_resolved
from experiments.config.yaml_mapping import dump_yaml, parse_yaml
from experiments.run import main

ROOT = Path(__file__).resolve().parents[3]


def one_line_error(capsys) -> str:
    """What `main` printed: nothing on stdout and a single line on stderr."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: "), err
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "optimizer.lrr=1",
            "optimizer.lrr: unknown key; did you mean lr? allowed here: name, lr, momentum, nesterov, weight_decay",
        ),
        ("model.channels=[1,2,3]", "model.channels: unknown key; allowed here: name, hidden_"),
        ("extends=a.yaml", "extends: unknown key; allowed here: name, model, data, optimizer"),
        ("optimizer.lr=-1", "optimizer.lr: must be greater than 0, got -1"),
        ("optimizer.lr=true", "optimizer.lr: must be a valid number, got True"),
        ("optimizer.lr='0.1'", "optimizer.lr: must be a valid number, got '0.1'"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a finite number, got inf"),
        ("optimizer.lr=.nan", "optimizer.lr: must be "),
        ("optimizer.lr=1e39", "optimizer.lr: must be less than or equal to 1e+38, got 1e+39\n"),
        ("epochs=2000000000000", "epochs: must be less than or equal to 1099511627776, got 2000000000000\n"),
        (
            "optimizer.lr=[1,2]",
            "optimizer.lr: must be a valid number, got [1, 2]; several values go under grid, in a sweep file\n",
        ),
        ("compile=[none,default]", "compile: must be 'none', 'default' or 'cudagraph', got ['none', 'default']; sev"),
        ("optimizer=[1]", "optimizer: must be a mapping of keys to values, got [1]\n"),
        ("optimizer.momentum=1", "optimizer.momentum: must be less than 1, got 1"),
        ("optimizer.nesterov=true", "optimizer.nesterov: must be false unless optimizer.momentum"),
        (
            "optimizer.name=lion",
            "optimizer.name: must be 'sgd', 'adam', 'adamw', 'muon', 'soap', ",
        ),
        ("optimizer=", "optimizer: must be a mapping of keys to values, got None"),
        ("proxprop.tau_prox=-1", "proxprop.tau_prox: must be greater than 0, got -1"),
        ("proxprop.tau_prox=.inf", "proxprop.tau_prox: must be a finite number, got inf"),
        ("proxprop.optimization_mode=prox_cg0", "proxprop.optimization_mode: must be "),
        ("proxprop.gram_reduction=max", "proxprop.gram_reduction: must be 'sum' or 'mean', got 'max'"),
        ("epochs=0", "epochs: must be greater than or equal to 1, got 0"),
        ("epochs=2.5", "epochs: must be a valid integer, got 2.5"),
        ("batch_size=true", "batch_size: must be a valid integer, got True"),
        ("seed=-1", "seed: must be greater than or equal to 0, got -1"),
        ("data.train_samples=0", "data.train_samples: must be greater than or equal to 1, got 0"),
        ("data.name=mnist", "data.name: must be 'cifar10' or 'digits', got 'mnist'"),
        ("model.name=vgg", "model.name: must be 'mlp', 'convnet' or 'resnet18', got 'vgg'"),
        ("model.hidden_features=[]", "model.hidden_features: must have at least 1 entry, got []"),
        ("model.hidden_features=[8,true]", "model.hidden_features.1: must be a valid integer"),
        ("name=a/b", "name: must be letters, digits"),
        ("device=tpu", "device: must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("device=cuda:٣", "device: must be auto, cpu, cuda or cuda:N, got 'cuda:٣'"),
        ("device=cuda:00", "device: must be auto, cpu, cuda or cuda:N, got 'cuda:00'"),
        ("device=cuda:256", "device: must be auto, cpu, cuda or cuda:N, got 'cuda:256'"),
        ("epochs", "'epochs': an override has the form key=value"),
        ("optimizer.lr=[1", "optimizer.lr: cannot read the value '[1' as YAML: expected ',' or ']', but got"),
        ("epochs=0100", "epochs: cannot read the value '0100' as YAML: '0100' is no decimal integer (no leading zero"),
        ("epochs=1:30", "epochs: cannot read the value '1:30' as YAML: '1:30' is no decimal integer"),
        ("optimizer.lr=1:30.5", "optimizer.lr: cannot read the value '1:30.5' as YAML: '1:30.5' is no decimal number"),
        ("epochs=08", "epochs: must be a valid integer, got '08'"),
    ],
)
def test_bad_value_is_one_line_and_writes_nothing(write_config, capsys, override, line):
    assert main([str(write_config()), override]) == 2
    assert f"{one_line_error(capsys)}\n".startswith(line)
    assert not Path("results").exists()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_has_no_momentum(write_config, name):
    path = write_config(optimizer={"name": name, "lr": 1, "momentum": 0.9})
    with pytest.raises(ConfigError, match=rf"^optimizer\.momentum: must be 0 with {name} .* got 0\.9$"):
        load_config(path)
    path = write_config(optimizer={"name": name, "lr": 1, "nesterov": True})
    with pytest.raises(ConfigError, match=rf"^optimizer\.nesterov: must be false with {name} \(only .* got true$"):
        load_config(path)


def test_the_published_solver_has_no_other_gram_matrix(write_config):
    path = write_config(proxprop={"optimization_mode": "published_cg3", "gram_reduction": "mean"})
    with pytest.raises(ConfigError, match=r"^proxprop\.gram_reduction: optimization_mode 'published_cg3', .* has no"):
        load_config(path)


def test_a_models_unknown_key_is_told_with_those_of_that_model(write_config):
    with pytest.raises(ConfigError, match=r"^model\.stam: unknown key; did you mean stem\? allowed here: name, stem$"):
        load_config(write_config(model={"name": "resnet18", "stam": "cifar"}))


def test_even_kernel_is_refused(write_config):
    path = write_config(model={"name": "convnet", "kernel_size": 4})
    with pytest.raises(ConfigError, match=r"^model\.kernel_size: must be odd.* got 4$"):
        load_config(path)


def test_missing_key_and_which_others_are_wrong(write_config):
    path = write_config(optimizer={}, epochs=-1)
    with pytest.raises(
        ConfigError, match=r"^optimizer\.name: missing.*; also wrong: optimizer\.lr \(missing\), epochs$"
    ):
        load_config(path)
    many = {f"key{number}": 1 for number in range(8)}
    with pytest.raises(ConfigError, match=r"^key0: unknown .*: key1, key2, key3, key4, key5 and 2 more$"):
        load_config(write_config(**many))


def test_keys_of_the_command_line_come_first(write_config):
    path = write_config(lr=1, epochs=-1)
    with pytest.raises(ConfigError, match=r"^model\.hidden_features: must be a list .*; also wrong: lr, epochs$"):
        load_config(path, ["model.hidden_features=40"])
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: must be greater than 0.*; also wrong: lr, epochs$"):
        load_config(path, ["optimizer={lr: -1}"])


def test_an_unknown_key_is_named_before_the_key_that_it_left_missing(write_config):
    path = write_config(optimizer={"name": "sgd", "learning_rate": 1})
    with pytest.raises(ConfigError, match=r"^optimizer\.learning_rate: unknown key"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("name: [1\nepochs: 3\n", r"broken\.yaml: not valid YAML: line 2: "),
        ("a: 1\nb: 2\na: 3\n", r"broken\.yaml: not valid YAML: line 3: the key 'a' is given twice"),
        ("- 1\n", r"broken\.yaml: must hold a mapping .* but holds a list"),
        ("", r"broken\.yaml: must hold a mapping .* but is empty"),
        (b"\xff\xfe\xfd", r"broken\.yaml: not valid YAML: "),
        ("day: 2024-13-45\n", r"broken\.yaml: not valid YAML: "),
        ("a: 1\nb: {c: [3, 010]}\n", r"broken\.yaml: not valid YAML: line 2: '010' is no decimal integer \(no leading"),
        ("a: 1\n01: 2\n", r"broken\.yaml: not valid YAML: line 2: '01' is no decimal integer"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", r"line 4: the key '<<' is given twice"),
        ("a: &a {b: 1}\nc: {<<: *a, d: 1, d: 2}\n", r"line 2: the key 'd' is given twice"),
    ],
)
def test_broken_file_is_one_line(tmp_path, content, problem):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file_through_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", str(tmp_path / "none.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (f"error: {tmp_path}/none.yaml: cannot read this config: No such file or directory\n")


def test_the_config_alone_is_required(capsys):
    assert main([]) == 2
    assert one_line_error(capsys) == "the following arguments are required: CONFIG.yaml (see --help)"


def test_unknown_option_is_one_line(write_config, capsys):
    assert main([str(write_config()), "--outptu", "x"]) == 2
    assert "--outptu" in one_line_error(capsys)


def test_extends_merges_from_the_far_base_to_the_override(write_config, tmp_path):
    base = write_config("base", epochs=1, seed=1, batch_size=10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "middle.yaml").write_text(f"extends: {base}\nname: middle\nseed: 2\nepochs: 2\n")
    leaf = tmp_path / "sub" / "leaf.yaml"
    leaf.write_text("extends: ../middle.yaml\nepochs: 3\noptimizer: {momentum: 0.5}\n")
    config = load_config(leaf, ["optimizer.nesterov=true", "epochs=4"])
    assert (config.name, config.batch_size, config.seed, config.epochs) == ("middle", 10, 2, 4)
    assert config.optimizer.lr == 0.1  # a section is merged, not replaced
    assert config.optimizer.momentum == 0.5
    assert config.optimizer.nesterov is True


def test_a_file_without_a_name_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for main_of_one in (main, sweep.main):
        assert main_of_one(["configs/mlp_sgd.yaml", "--output", str(tmp_path / "run")]) == 2
        line = one_line_error(capsys).removeprefix("configs/mlp_sgd.yaml: ")
        assert line.startswith("name: missing; give it as name=NAME or in the file, or take a config that has one")
        assert load_config(line.rpartition(" ")[2]).name
    assert load_config("configs/mlp_sgd.yaml", ["name=tiny"]).name == "tiny"


def test_extends_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"^extends: .* circle: \S+a\.yaml -> \S+b\.yaml -> \S+a"):
        load_config(tmp_path / "a.yaml")


def test_extends_a_missing_file(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"^extends: \S+a\.yaml extends \S+none\.yaml, which is"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".1e-2", "1.e-3", "0.001", "10e-4"])
def test_numbers_with_an_exponent_are_numbers(write_config, text):
    path = write_config()
    path.write_text(path.read_text().replace("lr: 0.1", f"lr: {text}"))
    assert load_config(path).optimizer.lr == pytest.approx(1e-3)
    assert load_config(path, [f"optimizer.lr={text}"]).optimizer.lr == pytest.approx(1e-3)


@pytest.mark.parametrize("text", ["0100", "-0100", "00", "0x1F", "0b11", "1:30", "-1:30", "1:30:00", "1:30.5", "0_7"])
def test_numbers_that_are_not_decimal_are_refused(text):
    """YAML 1.1 reads 0100 as 64 and 1:30 as 90."""
    with pytest.raises(yaml.YAMLError, match=f"'{text}' is no decimal"):
        parse_yaml(text)
    assert parse_yaml(f"'{text}'") == text
    assert parse_yaml(dump_yaml({"a": text})) == {"a": text}


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("-0", 0), ("100", 100), ("+7", 7), ("10_000", 10_000), ("0.5", 0.5), ("00.5", 0.5), ("1e05", 1e5)],
)
def test_decimal_numbers(text, number):
    parsed = parse_yaml(text)
    assert parsed == number
    assert type(parsed) is type(number)


def test_a_merged_mapping_may_be_merged_again():
    """Its anchor stands deeper than the alias, so that it is constructed later, when it has all keys of both."""
    text = """
base: &base {lr: 1, momentum: 0}
deep: {inner: &inner {<<: *base, lr: 2}}
outer: &outer {<<: *inner, momentum: 3}
both: {<<: [*outer, *base], lr: 4}
"""
    assert parse_yaml(text) == {
        "base": {"lr": 1, "momentum": 0},
        "deep": {"inner": {"lr": 2, "momentum": 0}},
        "outer": {"lr": 2, "momentum": 3},
        "both": {"lr": 4, "momentum": 3},
    }


def test_home_is_meant_by_a_tilde(write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write_config("base", folder="home", seed=7)
    (tmp_path / "a.yaml").write_text("extends: ~/base.yaml\nname: a\n")
    assert load_config(tmp_path / "a.yaml").seed == 7
    (tmp_path / "a.yaml").write_text("extends: ~/none.yaml\n")
    with pytest.raises(ConfigError, match=rf"extends: .* extends {tmp_path}/home/none\.yaml, which is not a file"):
        load_config(tmp_path / "a.yaml")


def test_resolved_config_reads_back_equal_and_holds_every_key(write_config, tmp_path):
    config = load_config(write_config(), ["optimizer.lr=1e-7"])
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(config))
    assert load_resolved(stored) == config
    assert yaml.safe_load(stored.read_text())["optimizer"] == {
        "name": "sgd",
        "lr": 1e-7,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "damping": None,
        "update_every": None,
    }


def test_differing_keys_are_dotted(write_config):
    path = write_config()
    other = load_config(path, ["optimizer.lr=0.5", "seed=3"])
    assert differing_keys(load_config(path), other) == ["optimizer.lr", "seed"]
