"""One run's config: its keys, their types and what they allow; frozen."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from proxprop.modes import check_together, parse_mode, parse_tau

Count = Annotated[int, Field(strict=True, ge=1, le=2**40)]
Positive = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False)]  # in float32
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Compile = Literal["none", "default", "cudagraph"]
DEVICE = r"cpu|cuda(:(0|[1-9][0-9]?))?"
"""What names one device."""

#: Keys of `Config` that decide where and how a run is carried out, not what it computes.
EXECUTION_KEYS = (
    "device",
    "compile",
    "checkpoint_every",
    "keep_checkpoint",
    "tensorboard",
    "diagnostics_every",
    "time_limit",
    "min_epochs",
)


#: Optimizers that put plain layers, or layers of their own, in the place of ProxProp layers.
WITHOUT_PROXPROP = ("kfac", "isaac")


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
    poolings: Annotated[int, Field(strict=True, ge=0, le=3)] = 2

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError(f"must be odd, so that padding keeps the image's size, got {size}")
        return size


class ResNet18Config(_Section):
    name: Literal["resnet18"]
    stem: Literal["imagenet", "cifar"] = "cifar"


class DataConfig(_Section):
    name: Literal["cifar10", "digits"] = "digits"
    root: Annotated[str, Field(min_length=1)] = "data"
    train_samples: Count | None = None


#: Keys of `optimizer`, beside `lr` and `weight_decay`, and the optimizers that take them.
OPTIMIZER_KEYS = {
    "momentum": ("sgd", "muon", "kfac", "isaac"),
    "nesterov": ("sgd", "muon", "kfac", "isaac"),
    "damping": ("kfac", "isaac"),
    "update_every": ("soap", "shampoo", "kfac"),
}


class OptimizerConfig(_Section):
    """`damping` is what is added to the curvature, `update_every` the steps from one preconditioner to the next."""

    name: Literal["sgd", "adam", "adamw", "muon", "soap", "shampoo", "kfac", "isaac"]
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)] = 0.0
    damping: Annotated[Positive | None, Field(validate_default=True)] = None
    update_every: Annotated[Count | None, Field(validate_default=True)] = None

    @field_validator("momentum")
    @classmethod
    def _momentum_is_for_some(cls, momentum: float, info: ValidationInfo) -> float:
        if momentum > 0 and (name := info.data.get("name")) not in (None, *OPTIMIZER_KEYS["momentum"]):
            allowed = ", ".join(OPTIMIZER_KEYS["momentum"])
            raise ValueError(f"must be 0 with {name} (only {allowed} have momentum), got {momentum}")
        return momentum

    @field_validator("nesterov")
    @classmethod
    def _nesterov_has_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and (name := info.data.get("name")) not in (None, *OPTIMIZER_KEYS["nesterov"]):
            allowed = ", ".join(OPTIMIZER_KEYS["nesterov"])
            raise ValueError(f"must be false with {name} (only {allowed} have momentum), got true")
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("must be false unless optimizer.momentum is greater than 0, got true")
        return nesterov

    @field_validator("damping", "update_every")
    @classmethod
    def _where_it_is_used(cls, value: float | None, info: ValidationInfo) -> float | None:
        name, users = info.data.get("name"), OPTIMIZER_KEYS[str(info.field_name)]
        if name in users and value is None:
            raise ValueError(f"must be given with {name}")
        if name not in (None, *users) and value is not None:
            raise ValueError(f"must be left out with {name} (it is for {', '.join(users)}), got {value:g}")
        return value


class ProxPropConfig(_Section):
    optimization_mode: str = "prox_cg1"
    tau_prox: Positive = 1.0
    gram_reduction: Literal["sum", "mean"] = "sum"

    @field_validator("optimization_mode")
    @classmethod
    def _known_mode(cls, text: str) -> str:
        parse_mode(text)
        return text

    @field_validator("tau_prox")
    @classmethod
    def _usable_tau(cls, tau: float) -> float:
        return parse_tau(tau)

    @field_validator("gram_reduction")
    @classmethod
    def _goes_with_the_mode(cls, reduction: str, info: ValidationInfo) -> str:
        if "optimization_mode" in info.data:
            check_together(parse_mode(info.data["optimization_mode"]), reduction, deferred=False)
        return reduction


class Config(_Section):
    """Everything that decides a run's numbers, and, last, how it is carried out.

    `proxprop` applies to all layers but the last. `seed` is that of the weights and, unless
    `order_seed` is given, of the order of the examples. `checkpoint_every` and
    `diagnostics_every` count epochs.
    `time_limit` is in seconds of training: the epoch that passes it is the last, but `min_epochs`
    are made in any case.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,=-]*$", max_length=200)]
    model: Annotated[MLPConfig | ConvNetConfig | ResNet18Config, Field(discriminator="name")]
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig
    proxprop: Annotated[ProxPropConfig, Field(validate_default=True)] = ProxPropConfig()
    epochs: Count
    batch_size: Count
    seed: Seed = 0
    order_seed: Seed | None = None
    deterministic: bool = False
    device: Annotated[str, Field(pattern=rf"^(auto|{DEVICE})$")] = "auto"
    compile: Compile = "none"
    checkpoint_every: Count = 1
    keep_checkpoint: bool = False
    tensorboard: bool = False
    diagnostics_every: Count | None = None
    time_limit: Positive | None = None
    min_epochs: Count = 1

    @field_validator("optimizer")
    @classmethod
    def _rivals_know_the_models_layers(cls, optimizer: OptimizerConfig, info: ValidationInfo) -> OptimizerConfig:
        model = getattr(info.data.get("model"), "name", None)
        if optimizer.name == "isaac" and model not in (None, "mlp"):
            raise ValueError(f"isaac has no convolutions: model.name must be mlp with it, got {model}")
        if optimizer.name == "kfac" and model == "resnet18":
            raise ValueError("kfac is for networks without batch norm: model.name must be mlp or convnet with it, "
                             "got resnet18")  # fmt: skip
        return optimizer

    @field_validator("proxprop")
    @classmethod
    def _plain_layers_take_gradients(cls, proxprop: ProxPropConfig, info: ValidationInfo) -> ProxPropConfig:
        name, mode = getattr(info.data.get("optimizer"), "name", None), proxprop.optimization_mode
        if name in WITHOUT_PROXPROP and mode != "gradient":
            raise ValueError(f"optimization_mode must be gradient with optimizer.name: {name}, which has directions of "
                             f"its own, got {mode}")  # fmt: skip
        return proxprop

    @field_validator("compile")
    @classmethod
    def _hooks_are_not_compiled(cls, how: Compile, info: ValidationInfo) -> Compile:
        if how != "none" and getattr(info.data.get("optimizer"), "name", None) == "kfac":
            raise ValueError(f"must be none with optimizer.name: kfac, got {how}")
        return how

    @field_validator("diagnostics_every")
    @classmethod
    def _observed_steps_are_not_compiled(cls, every: int | None, info: ValidationInfo) -> int | None:
        if every is not None and (how := info.data.get("compile", "none")) != "none":
            raise ValueError(f"must be left out with compile: {how} (steps are observed uncompiled), got {every}")
        name = getattr(info.data.get("optimizer"), "name", None)
        if every is not None and name in WITHOUT_PROXPROP:
            raise ValueError(f"must be left out with optimizer.name: {name} (it has no ProxProp layers), got {every}")
        return every

    def is_complete(self, epoch: int, seconds: float) -> bool:
        """Whether a run ends after `epoch` epochs that took `seconds` of training."""
        return epoch >= self.epochs or self._is_out_of_time(epoch, seconds)

    def expected_epochs(self, epoch: int, seconds: float) -> int:
        """How many epochs a run will have, judged by the first `epoch` ones, which took `seconds` of training."""
        if self.time_limit is None or not seconds:
            return self.epochs
        until_limit = math.floor(min(self.time_limit / seconds * epoch, self.epochs)) + 1
        return min(self.epochs, max(self.min_epochs, epoch, until_limit))

    def _is_out_of_time(self, epoch: int, seconds: float) -> bool:
        return self.time_limit is not None and seconds > self.time_limit and epoch >= self.min_epochs


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted names of the keys whose values differ, of those that decide the numbers."""
    first, second = flat(one), flat(other)
    return [key for key in {**first, **second} if key not in EXECUTION_KEYS and first.get(key) != second.get(key)]


STEP_KEYS = ("model", "optimizer", "proxprop", "batch_size")
"""What the cost of a training step depends on; but the learning rate, which costs nothing."""


def what_a_step_costs(settings: dict[str, Any]) -> str:
    """Those of a dumped config, as a text: equal for configs whose steps cost the same."""
    kept = {key: settings[key] for key in STEP_KEYS}
    kept["optimizer"] = {key: value for key, value in kept["optimizer"].items() if key != "lr"}
    return json.dumps(kept, sort_keys=True)


def lengthens(config: Config, earlier: Config) -> bool:
    """Whether `config` is `earlier` with more epochs; without schedules, its run begins with that of `earlier`."""
    return differing_keys(earlier, config) == ["epochs"] and config.epochs > earlier.epochs


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
