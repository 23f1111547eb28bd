"""Configs from YAML and back to it; everything else is an error of one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.command.errors import ConfigError
from experiments.config.schema import Config
from experiments.config.wording import one_line
from experiments.config.yaml_mapping import (
    apply_overrides,
    dump_yaml,
    override_key,
    parse_yaml,
    read_with_bases,
    read_yaml,
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files it `extends`, and dotted `key=value` overrides.

    Raises:
        ConfigError: with one line that names the key and what is allowed.
    """
    return parse_mapping(apply_overrides(read_with_bases(Path(path)), overrides), overrides)


def load_resolved(path: Path) -> Config:
    """Read back what `dump_config` wrote; a key added since then takes its default."""
    return parse_mapping(read_yaml(path))


def parse_config(text: str) -> Config:
    """The config whose text `dump_config` gave."""
    return parse_mapping(parse_yaml(text))


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return dump_yaml(config.model_dump(mode="json"))


def parse_mapping(mapping: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config that a plain mapping holds; errors are those of `load_config`, first those about `overrides` in it."""
    try:
        return Config.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(one_line(error, [override_key(text) for text in overrides])) from None
