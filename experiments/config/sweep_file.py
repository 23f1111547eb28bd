"""From a file to its configs: one, or one for each point of a grid and each seed.

A sweep file is a config with two more keys, `grid` and `seeds`:

    extends: ../mlp_sgd.yaml
    epochs: 20
    grid:
      proxprop.optimization_mode: [prox_cg3, prox_exact]
      proxprop.tau_prox: [0.5, 0.05]
    seeds: 3

stands for 2 · 2 · 3 runs. A list of grids stands for all points of each. A key may name several keys of the config,
joined by commas, which take the same value: `proxprop.tau_prox, optimizer.lr: [1, 0.1]`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from experiments.command.errors import ConfigError
from experiments.config.loading import parse_mapping
from experiments.config.schema import Config, Count, Seed
from experiments.config.wording import short
from experiments.config.yaml_mapping import Mapping, apply_overrides, overlap, override_key, read_with_bases, set_key

Point = dict[str, Any]
"""The value of each key of a grid at one of its points; keys as they are written there."""

_SEED = "seed="
_MOST_RUNS = 10_000
"""More in one file are a slip; naming and checking them would take minutes."""


@dataclass(frozen=True)
class ConfigFile:
    """A config file, or a sweep file, and what it stands for."""

    path: Path
    is_sweep: bool
    configs: tuple[Config, ...]


def load_config_file(path: Path, overrides: Sequence[str] = (), seeds: int | None = None) -> ConfigFile:
    """All configs that `path` stands for, each under a name of its own.

    Args:
        overrides: `key=value`, for all of them; a key that varies is not for them.
        seeds: run each with the seeds 0 to `seeds` - 1, whatever the file says.

    Raises:
        ConfigError: with one line that names the key and what is allowed.
    """
    mapping = read_with_bases(path)
    for key in ("grid", "seeds"):
        if key in mapping and mapping[key] is None:  # as where all entries are commented out
            raise ConfigError(f"{key}: is empty; give it an entry, or leave the key out")
    grid, listed = mapping.pop("grid", None), mapping.pop("seeds", None)
    chosen = _seeds(listed if seeds is None else seeds)
    points = [{}] if grid is None else list(_points(grid, _MOST_RUNS // max(1, len(chosen))))
    is_sweep = grid is not None or listed is not None
    varied = {key for point in points for written in point for key in _keys(written)}
    _check_overrides(overrides, varied | ({"seed"} if chosen else set()) | ({"name"} if is_sweep else set()))
    mapping = apply_overrides(mapping, overrides)
    if not is_sweep:
        return ConfigFile(path, False, tuple(_with_seeds(parse_mapping(mapping, overrides), chosen)))
    labels = _labels(points)
    configs = tuple(
        parse_mapping(_at(mapping, point, seed, labels), overrides) for point in points for seed in chosen or [None]
    )  # fmt: skip
    _check_different(configs)
    return ConfigFile(path, True, configs)


def without_seed(name: str) -> str:
    """The name that the runs of one config share which differ in their seeds alone; '' of a sweep over nothing else."""
    return re.sub(rf"(^|,){_SEED}\d+$", "", name)


def _with_seeds(config: Config, seeds: Sequence[int]) -> Iterator[Config]:
    """A plain config keeps its name with its own seed, so that a run made without others counts among them."""
    for seed in seeds or [config.seed]:
        name = config.name if seed == config.seed else f"{config.name},{_SEED}{seed}"
        yield config.model_copy(update={"name": name, "seed": seed})


def _points(grid: Any, most: int) -> Iterator[Point]:
    """The points of a grid or of a list of grids, the last key varying fastest."""
    grids = grid if isinstance(grid, list) else [grid]
    if not grids:
        raise ConfigError("grid: must hold at least one key")
    for one in grids:
        _check_grid(one)
    count = sum(math.prod(map(len, one.values())) for one in grids)
    if count > most:
        raise ConfigError(f"grid: has {count} points; a file may stand for at most {_MOST_RUNS} runs, seeds included")
    for one in grids:
        for combination in itertools.product(*one.values()):
            yield dict(zip(one, combination, strict=True))


def _check_grid(grid: Any) -> None:
    if not isinstance(grid, dict) or not grid:
        raise ConfigError(f"grid: must be a mapping of keys to lists of values, or a list of such, got {short(grid)}")
    seen: list[str] = []
    for written, values in grid.items():
        if not isinstance(written, str) or not all(part for key in _keys(written) for part in key.split(".")):
            raise ConfigError(f"grid: {short(written)} is no key; it has the form optimizer.lr, or several joined by "
                              "commas")  # fmt: skip
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{written}: must be a list of at least one value, got {short(values)}")
        for key in _keys(written):
            if key in ("seed", "name"):
                raise ConfigError(f"grid.{written}: names come from what varies, and seeds have a key of their own, "
                                  "seeds")  # fmt: skip
            if twice := [other for other in seen if overlap(key, other)]:
                raise ConfigError(f"grid.{written}: {key} is varied twice in one grid (see {twice[0]})")
            seen.append(key)


def _keys(key: str) -> list[str]:
    return [part.strip() for part in key.split(",")]


_SEEDS: TypeAdapter[Any] = TypeAdapter(Annotated[list[Seed], Field(min_length=1)])
_COUNT: TypeAdapter[Any] = TypeAdapter(Annotated[Count, Field(le=_MOST_RUNS)])


def _seeds(value: Any) -> list[int]:
    """Seeds as a list: of the seeds themselves, or of the first so many."""
    if value is None:
        return []
    try:
        seeds = _SEEDS.validate_python(value, strict=True) if isinstance(value, list) else None
        seeds = list(range(_COUNT.validate_python(value))) if seeds is None else seeds
    except ValidationError:
        raise ConfigError(f"seeds: must be how many (at most {_MOST_RUNS}), or a list of seeds (integers from 0 on), "
                          f"got {short(value)}") from None  # fmt: skip
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: must be different from each other, got {short(value)}")
    return seeds


def _check_overrides(overrides: Sequence[str], varied: set[str]) -> None:
    for key in map(override_key, overrides):
        if any(overlap(key, other) for other in varied):
            raise ConfigError(f"{key}: varies from run to run here, so it cannot be set for all of them")


def _at(mapping: Mapping, point: Point, seed: int | None, labels: dict[str, str]) -> Mapping:
    parts = [f"{labels[key]}={_text(value)}" for key, value in point.items()]
    for written, value in point.items():
        for key in _keys(written):
            mapping = set_key(mapping, key, value)
    if seed is not None:
        mapping = set_key(mapping, "seed", seed)
        parts.append(f"{_SEED}{seed}")
    return set_key(mapping, "name", ",".join(parts))


def _labels(points: Sequence[Point]) -> dict[str, str]:
    """What stands for each key in names: its last part, or all of it where two keys end alike."""
    firsts = {written: _keys(written)[0] for point in points for written in point}

    def label(key: str) -> str:
        alike = {other for other in firsts.values() if _last(other) == _last(key)}
        return _last(key) if len(alike) == 1 else key

    return {written: label(first) for written, first in firsts.items()}


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, list):
        return "x".join(map(_text, value))
    text = value if isinstance(value, str) else short(value)
    if value is None or isinstance(value, bool):
        text = text.lower()
    return re.sub(r"[^A-Za-z0-9._-]", "-", text.replace("e+", "e"))


def _check_different(configs: Sequence[Config]) -> None:
    for name, count in Counter(config.name for config in configs).items():
        if count > 1:
            raise ConfigError(f"grid: two runs would both be named {name}; give each value once")
    names: dict[Config, str] = {}
    for config in configs:
        nameless = config.model_copy(update={"name": ""})
        if nameless in names:
            raise ConfigError(f"grid: {names[nameless]} and {config.name} are one config; give each value once")
        names[nameless] = config.name
