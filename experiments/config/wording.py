"""The wording of errors in a config: pydantic's as one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
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
from experiments.config.yaml_mapping import overlap

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
#: For those who try to run a file that is there to be extended.
WITH_A_NAME = "configs/paper/mlp_sgd_cg3.yaml"


def one_line(error: ValidationError, given: Sequence[str] = ()) -> str:
    """The key, what is wrong with it and what is allowed; then which other keys are wrong.

    Args:
        given: keys of the command line, which come first.
    """

    # Then an unknown key: a typo is often the reason why another key is missing.
    def rank(one: Any) -> tuple[bool, bool]:
        return not any(overlap(_key(one), key) for key in given), one["type"] != "extra_forbidden"

    first, *others = sorted(error.errors(), key=rank)
    listed = isinstance(first["input"], list) and first["type"] in _OF_ONE_VALUE and error.title == "Config"
    return _describe(first) + "; several values go under grid, in a sweep file" * listed + _also(others)


def _also(errors: Sequence[Any]) -> str:
    keys = [_key(error) + " (missing)" * (error["type"] == "missing") for error in errors]
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return f"; also wrong: {', '.join(keys[:_MOST_KEYS])}{more}" if keys else ""


_MOST_KEYS = 5
_OF_ONE_VALUE = ("float_type", "int_type", "bool_type", "string_type", "literal_error")


def _key(error: Any) -> str:
    where = error["loc"]
    return ".".join(str(part) for part in where if where[0] != "model" or part not in _MODEL_TAGS)


def _describe(error: Any) -> str:
    where, kind, got, key = error["loc"], error["type"], short(error["input"]), _key(error)
    match kind:
        case "extra_forbidden":
            return f"{key}: unknown key; {_allowed_keys(where)}"
        case "missing" if key == "name":
            return (f"{key}: missing; give it as name=NAME or in the file, or take a config that has one, such as "
                    f"{WITH_A_NAME}")  # fmt: skip
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
