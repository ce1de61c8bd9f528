"""LN tuning, Zhao et al. 2023, https://arxiv.org/abs/2312.11420: normalisations alone are trained."""

from typing import ClassVar

from torch import Tensor, nn

from peft_core import BaseLayer, TargetedConfig, WeightAdapter, as_compute, hookimpl


class LnTuningConfig(TargetedConfig):
    """Without `target_modules`, every module whose class is called a norm."""

    peft_type: ClassVar[str] = "LN_TUNING"
    # Fields that the class of HF PEFT lacks.
    written_if_set: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})


class LnTuningAdapter(WeightAdapter):
    """Values of its own for the parameters of one module; `ln_tuning_layers` is the name in files of HF PEFT."""

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        own = {name: layer.parameter(*value.shape) for name, value in layer.params().items()}
        self.ln_tuning_layers = nn.ParameterDict(own)

    def reset_parameters(self) -> None:
        for name, value in self.layer.params().items():
            self.ln_tuning_layers[name].copy_(value)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        # As a change of the module's own values, so that adapters further in are not lost.
        changes = {name: self.ln_tuning_layers[name] - value for name, value in self.layer.params().items()}
        return {name: value + as_compute(changes[name], value) for name, value in params.items()}


@hookimpl
def peft_config() -> type[LnTuningConfig]:
    return LnTuningConfig


@hookimpl
def peft_match(config: LnTuningConfig, module: nn.Module) -> bool | None:
    return type(module).__name__.endswith("Norm") if config.target_modules is None else None


@hookimpl
def peft_build(layer: BaseLayer) -> LnTuningAdapter:
    if not layer.names or any("." in name for name in layer.names):
        raise layer.refuse("it has no parameters of its own, or modules inside it do")
    return LnTuningAdapter(layer)
