"""From YAML files and `key=value` overrides to one plain mapping, not yet validated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.command.cli import user_path
from experiments.command.errors import ConfigError, reason

Mapping = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `1e-3` as a number, and refuses a key given twice and numbers that are not decimal."""

    # As it is written: when it is constructed, keys of merged mappings (`<<: *anchor`) stand beside its own.
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _refusal(f"the key {key.value!r} is given twice", key)
            seen.add(key.value)
        return node

    # YAML 1.1 takes 0100 for 64 and 1:30 for 90, which hardly anybody means.
    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", node.value):
            raise _refusal(f"{node.value[:30]!r} is no decimal integer (no leading zero, colon or 0x); {_TEXT}", node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        if ":" in node.value:
            raise _refusal(f"{node.value[:30]!r} is no decimal number; {_TEXT}", node)
        return super().construct_yaml_float(node)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number."""


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_TEXT = "text goes in quotes"
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
# YAML 1.1 wants a dot and a signed exponent in a float, so `1e-3` would be a string.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def dump_yaml(mapping: Mapping) -> str:
    """YAML that `read_yaml` and `parse_yaml` read back as `mapping`, its keys in their order."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str | bytes) -> Any:
    """What a text of YAML holds."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> Mapping:
    """The mapping in one YAML file, `extends` left as it stands.

    Raises:
        ConfigError: the file is missing, broken or holds something else than a mapping.
    """
    try:
        content = parse_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{str(path)[:200]}: cannot read this config: {error.strerror}") from error
    except Exception as error:  # bytes that are no YAML can raise nearly anything inside yaml
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(f"{path}: not valid YAML: {line}{_problem(error)}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigError(f"{path}: must hold a mapping `key: value`, but {found}")
    return content


def read_with_bases(path: Path) -> Mapping:
    """The mapping in `path` merged over the file it `extends` (relative to it), and so on."""
    merged: Mapping = {}
    for mapping in reversed(_chain_of(path).values()):
        merged = _merge(merged, mapping)
    return merged


def _chain_of(path: Path) -> dict[Path, Mapping]:
    """`path`, the file it `extends`, and so on, each with its own mapping.

    Raises:
        ConfigError: as `read_yaml`, or a file extends what is no file, or itself.
    """
    chain: dict[Path, Mapping] = {}
    current: Path | None = path
    while current is not None:
        if chain and not _is_file(current):
            raise ConfigError(f"extends: {list(chain)[-1]} extends {str(current)[:200]}, which is not a file")
        if current.resolve() in (one.resolve() for one in chain):
            names = " -> ".join(str(one) for one in [*chain, current])
            raise ConfigError(f"extends: the files extend each other in a circle: {names}")
        chain[current] = mapping = read_yaml(current)
        current = _base_of(current, mapping)
    return chain


def apply_overrides(mapping: Mapping, overrides: Sequence[str]) -> Mapping:
    """`mapping` with dotted `key=value` overrides applied in order, values read as YAML."""
    for text in overrides:
        key, value = override_key(text), text.partition("=")[2]
        try:
            parsed = parse_yaml(value)
        except Exception as error:  # as in a file
            raise ConfigError(f"{key}: cannot read the value {value[:60]!r} as YAML: {_problem(error)}") from error
        mapping = set_key(mapping, key, parsed)
    return mapping


def override_key(text: str) -> str:
    """The dotted key of an override `key=value`."""
    key, equals, _ = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text!r}: an override has the form key=value, e.g. optimizer.lr=0.1")
    return key


def set_key(mapping: Mapping, key: str, value: Any) -> Mapping:
    """`mapping` with `value` under the dotted `key`; a mapping as the value is merged with what is there."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merge(mapping, value)


def overlap(key: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is a section that holds the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or no name at all
        return False


def _base_of(path: Path, mapping: Mapping) -> Path | None:
    """Take `extends` out of `mapping`; the path of the file it names."""
    if "extends" not in mapping:
        return None
    base = mapping.pop("extends")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"extends: must be the path of a YAML file, got {base!r} in {path}")
    return path.parent / user_path(base)


def _merge(base: Mapping, over: Mapping) -> Mapping:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _problem(error: Exception) -> str:
    """What yaml says about a text, without the lines around it."""
    return " ".join((getattr(error, "problem", None) or reason(error)).split())
