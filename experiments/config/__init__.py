"""From YAML files, sweep files and overrides to validated configs. Of the other rooms, imports `command`."""

from experiments.config.loading import dump_config, load_config, load_resolved, parse_config
from experiments.config.schema import (
    DEVICE,
    EXECUTION_KEYS,
    WITHOUT_PROXPROP,
    Compile,
    Config,
    ConvNetConfig,
    DataConfig,
    MLPConfig,
    OptimizerConfig,
    ResNet18Config,
    differing_keys,
    flat,
    lengthens,
)

__all__ = [
    "DEVICE",
    "EXECUTION_KEYS",
    "WITHOUT_PROXPROP",
    "Compile",
    "Config",
    "ConvNetConfig",
    "DataConfig",
    "MLPConfig",
    "OptimizerConfig",
    "ResNet18Config",
    "differing_keys",
    "dump_config",
    "flat",
    "lengthens",
    "load_config",
    "load_resolved",
    "parse_config",
]
