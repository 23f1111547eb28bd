"""The list of full-length runs, and how long a baseline's curve must be."""

from pathlib import Path

import pytest

from experiments.command.errors import ExperimentError
from experiments.folder.read import find_runs, read_run
from scripts.full_length import UNITS, main
from scripts.longest_curve import longest_curve
from scripts.longest_curve import main as longest_curve_main

from .synthetic import write_run


def planned(root: Path) -> dict[str, list]:
    return {unit.title: unit.runs([], root) for unit in UNITS}


def test_the_list_holds_every_run_of_the_papers_figures_and_table(root: Path, tmp_path: Path) -> None:
    runs = {run.folder.relative_to(tmp_path).as_posix(): run for unit in planned(tmp_path).values() for run in unit}
    for folder in ("paper", "paper_published", "paper_text", "paper_text_published"):
        for path in (root / "configs" / folder).glob("*.yaml"):
            config = runs[f"cpu-50-epochs/{folder}/{path.stem}"].config
            # As long as in the paper's figures, whatever the config's own length.
            length = config.epochs if config.time_limit is None else config.min_epochs
            assert length == (110 if path.stem.endswith("gradient") else 50)
            assert config.data.train_samples is None
    there = {folder.name for folder in find_runs(root / "results/h100-50-epochs/table1") if read_run(folder).summary}
    table = {Path(name).name for name in runs if name.startswith("cpu-50-epochs/table1/")}
    assert len(there | table) == 63


def test_what_is_left_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run, *_) = planned(tmp_path)["Figure 2"]
    assert run.config.name == "mlp_sgd_exact"
    settings = run.config.model_dump(mode="json")
    write_run(run.folder, settings=settings, epochs=50)
    second = planned(tmp_path)["Figure 2"][1]
    write_run(second.folder, settings=second.config.model_dump(mode="json"), epochs=20, finished=False)
    assert main(["--left", "--output", str(tmp_path)]) == 0
    lines = {line[:35].strip(): line[35:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["Figure 2"][-4:] == ["1", "of", "4", "130"]
    assert lines["Figure 2, BackProp"][-1] == "110"


def test_a_folder_with_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run, *_) = planned(tmp_path)["Figure 2"]
    write_run(run.folder, settings=run.config.model_dump(mode="json") | {"batch_size": 100})
    assert main(["--left", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds a run of another config (different: batch_size)" in error
    assert error.count("\n") == 1


def test_no_jobs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--jobs", "0", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --jobs must be at least 1, got 0\n"


def test_a_baseline_is_as_long_as_the_longest_curve_of_its_figure(tmp_path: Path, capsys) -> None:
    for name, seconds in (("mlp_sgd_exact", 3.0), ("mlp_sgd_cg3", 2.0), ("convnet_adam_cg3", 9.0)):
        write_run(tmp_path / name, epochs=4, epoch_seconds=seconds)
    write_run(tmp_path / "mlp_sgd_cg3,seed=1", epochs=4, epoch_seconds=50.0, seed=1)  # other seeds change nothing
    write_run(tmp_path / "mlp_sgd_cg5", epochs=4, epoch_seconds=50.0, finished=False)
    write_run(tmp_path / "mlp_sgd_gradient", epochs=4, epoch_seconds=50.0)
    assert longest_curve(tmp_path, "mlp_sgd_gradient") == 12
    assert longest_curve(tmp_path, "convnet_adam_gradient") == 36
    assert longest_curve(tmp_path, "convnet_text_adam_gradient") == 1e-9  # the least that a limit can be
    assert longest_curve_main([str(tmp_path), "mlp_sgd_gradient"]) == 0
    assert capsys.readouterr().out == "12\n"
    with pytest.raises(ExperimentError, match="BASELINE must be one of mlp_sgd_gradient, convnet_adam_gradient"):
        longest_curve(tmp_path, "mlp_sgd_cg3")
