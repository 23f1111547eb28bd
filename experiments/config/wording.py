"""The wording of errors in a config: pydantic's as one line."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from experiments.config.schema import (
    Config,
    ConvNetConfig,
    DataConfig,
    MLPConfig,
    OptimizerConfig,
    ProxPropConfig,
    ResNet18Config,
)

_SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Config,
    ("model", "mlp"): MLPConfig,
    ("model", "convnet"): ConvNetConfig,
    ("model", "resnet18"): ResNet18Config,
    ("data",): DataConfig,
    ("optimizer",): OptimizerConfig,
    ("proxprop",): ProxPropConfig,
}
#: What texts are allowed, where a pattern says which.
PATTERNS = {
    "name": "must be letters, digits and any of '._,=-' (it names a folder), beginning with a letter or digit",
    "device": "must be auto, cpu, cuda or cuda:N",
}


def one_line(error: ValidationError) -> str:
    """The key, what is wrong with it and what is allowed."""
    # An unknown key first: a typo is often the reason why another key is missing.
    errors = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    listed = isinstance(errors[0]["input"], list) and errors[0]["type"] in _OF_ONE_VALUE and error.title == "Config"
    return _describe(errors[0]) + "; several values go under grid, in a sweep file" * listed + more


_OF_ONE_VALUE = ("float_type", "int_type", "bool_type", "string_type", "literal_error")


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
        case "string_pattern_mismatch" | "string_type" if key in PATTERNS:
            return f"{key}: {PATTERNS[key]}, got {got}"
        case "too_short":
            return f"{key}: must have at least {error['ctx']['min_length']} entry, got {got}"
        case "tuple_type":
            return f"{key}: must be a list of integers, got {got}"
        case "value_error":
            problem = str(error["ctx"]["error"]).removeprefix(f"{where[-1]} ")
            return f"{key}: {problem}"
        case "less_than_equal":
            return f"{key}: must be less than or equal to {error['ctx']['le']:.16g}, got {got}"  # 1e+38 in few digits
        case _:
            return f"{key}: {error['msg'].replace('Input should', 'must')}, got {got}"


_MODEL_TAGS = [section[1] for section in _SECTIONS if section[0:1] == ("model",)]
_MODEL_NAMES = " or ".join([", ".join(map(repr, _MODEL_TAGS[:-1])), repr(_MODEL_TAGS[-1])])


def _allowed_keys(where: tuple[str, ...]) -> str:
    allowed = list(_SECTIONS[where[:-1]].model_fields)
    close = difflib.get_close_matches(str(where[-1]), allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed here: {', '.join(allowed)}"


def short(value: Any, limit: int = 60) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, lists in lists in lists
        return "a value too long to print"
    return text if len(text) <= limit else text[: limit - 3] + "..."
