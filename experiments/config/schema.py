"""One run's config: frozen, validated, and an error of one line for everything else."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from experiments.command.errors import ConfigError
from experiments.config.yaml_mapping import apply_overrides, dump_yaml, parse_yaml, read_with_bases, read_yaml
from proxprop.modes import parse_mode, parse_tau

Count = Annotated[int, Field(strict=True, ge=1, le=2**40)]
Positive = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False)]  # in float32
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Compile = Literal["none", "default", "cudagraph"]

#: Keys of `Config` that decide where and how a run is carried out, not what it computes.
_EXECUTION = ("device", "compile", "checkpoint_every", "tensorboard")


class _Section(BaseModel):
    # strict: neither true nor "3" passes as a number
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MLPConfig(_Section):
    name: Literal["mlp"]
    hidden_features: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (
        4000,
        1000,
        4000,
    )


class ConvNetConfig(_Section):
    name: Literal["convnet"]
    channels: Annotated[tuple[Count, Count, Count], Field(strict=False)] = (16, 20, 20)
    kernel_size: Count = 5

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError(f"must be odd, so that padding keeps the image's size, got {size}")
        return size


class DataConfig(_Section):
    name: Literal["cifar10", "digits"] = "digits"
    root: Annotated[str, Field(min_length=1)] = "data"
    train_samples: Count | None = None


class OptimizerConfig(_Section):
    name: Literal["sgd", "adam"]
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)] = 0.0

    @field_validator("momentum")
    @classmethod
    def _momentum_is_for_sgd(cls, momentum: float, info: ValidationInfo) -> float:
        if momentum > 0 and info.data.get("name") == "adam":
            raise ValueError(f"must be 0 with adam (only sgd has momentum), got {momentum}")
        return momentum

    @field_validator("nesterov")
    @classmethod
    def _nesterov_has_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("must be false unless optimizer.momentum is greater than 0, got true")
        return nesterov


class ProxPropConfig(_Section):
    optimization_mode: str = "prox_cg1"
    tau_prox: Positive = 1.0

    @field_validator("optimization_mode")
    @classmethod
    def _known_mode(cls, text: str) -> str:
        parse_mode(text)
        return text

    @field_validator("tau_prox")
    @classmethod
    def _usable_tau(cls, tau: float) -> float:
        return parse_tau(tau)


class Config(_Section):
    """Everything that decides a run's numbers, and, last, how it is carried out.

    `proxprop` applies to all layers but the last. `seed` is that of the weights and, unless
    `order_seed` is given, of the order of the examples. `checkpoint_every` counts epochs.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,=-]*$", max_length=200)]
    model: Annotated[MLPConfig | ConvNetConfig, Field(discriminator="name")]
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig
    proxprop: ProxPropConfig = ProxPropConfig()
    epochs: Count
    batch_size: Count
    seed: Seed = 0
    order_seed: Seed | None = None
    deterministic: bool = False
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"
    compile: Compile = "none"
    checkpoint_every: Count = 1
    tensorboard: bool = False


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files it `extends`, and dotted `key=value` overrides.

    Raises:
        ConfigError: with one line that names the key and what is allowed.
    """
    return parse_mapping(apply_overrides(read_with_bases(Path(path)), overrides))


def load_resolved(path: Path) -> Config:
    """Read back what `dump_config` wrote; a key added since then takes its default."""
    return parse_mapping(read_yaml(path))


def parse_config(text: str) -> Config:
    """The config whose text `dump_config` gave."""
    return parse_mapping(parse_yaml(text))


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return dump_yaml(config.model_dump(mode="json"))


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted names of the keys whose values differ, of those that decide the numbers."""
    first, second = flat(one), flat(other)
    return [key for key in {**first, **second} if key not in _EXECUTION and first.get(key) != second.get(key)]


def flat(config: Config) -> dict[str, Any]:
    """All keys of `config`, dotted, and their values."""
    return _flat(config.model_dump())


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def parse_mapping(mapping: dict[str, Any]) -> Config:
    """The config that a plain mapping holds; errors are those of `load_config`."""
    try:
        return Config.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


# --- pydantic's errors as one line -----------------------------------------------------------

_SECTIONS: dict[tuple[str, ...], type[_Section]] = {
    (): Config,
    ("model", "mlp"): MLPConfig,
    ("model", "convnet"): ConvNetConfig,
    ("data",): DataConfig,
    ("optimizer",): OptimizerConfig,
    ("proxprop",): ProxPropConfig,
}
_PATTERNS = {
    "name": "must be letters, digits and any of '._,=-' (it names a folder), beginning with a letter or digit",
    "device": "must be auto, cpu, cuda or cuda:N",
}


def _one_line(error: ValidationError) -> str:
    # An unknown key first: a typo is often the reason why another key is missing.
    errors = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _describe(errors[0]) + more


def _describe(error: Any) -> str:
    where, kind, got = error["loc"], error["type"], short(error["input"])
    key = ".".join(str(part) for part in where if where[0] != "model" or part not in _MODEL_TAGS)
    match kind:
        case "extra_forbidden":
            return f"{key}: unknown key; {_allowed_keys(where)}"
        case "missing":
            return f"{key}: missing, it must be given"
        case "union_tag_not_found":
            return f"{key}.name: missing, it must be {_MODEL_NAMES}"
        case "union_tag_invalid":
            return f"{key}.name: must be {_MODEL_NAMES}, got {error['ctx']['tag']!r}"
        case "model_type" | "model_attributes_type":
            return f"{key}: must be a mapping of keys to values, got {got}"
        case "string_pattern_mismatch" | "string_type" if key in _PATTERNS:
            return f"{key}: {_PATTERNS[key]}, got {got}"
        case "too_short":
            return f"{key}: must have at least {error['ctx']['min_length']} entry, got {got}"
        case "tuple_type":
            return f"{key}: must be a list of integers, got {got}"
        case "value_error":
            problem = str(error["ctx"]["error"]).removeprefix(f"{where[-1]} ")
            return f"{key}: {problem}"
        case _:
            return f"{key}: {error['msg'].replace('Input should', 'must')}, got {got}"


_MODEL_TAGS = ("mlp", "convnet")
_MODEL_NAMES = "'mlp' or 'convnet'"


def _allowed_keys(where: tuple[str, ...]) -> str:
    allowed = list(_SECTIONS[where[:-1]].model_fields)
    close = difflib.get_close_matches(str(where[-1]), allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed here: {', '.join(allowed)}"


def short(value: Any, limit: int = 60) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, lists in lists in lists
        return "a value too long to print"
    return text if len(text) <= limit else text[: limit - 3] + "..."
