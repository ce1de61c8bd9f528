"""BitFit, Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199: the biases, and nothing else, are trained."""

from typing import ClassVar

from torch import Tensor, nn

from peft_core import BaseLayer, TargetedConfig, WeightAdapter, as_compute, hookimpl


class BitFitConfig(TargetedConfig):
    """Without `target_modules`, every module with a bias."""

    peft_type: ClassVar[str] = "BITFIT"


class BitFitAdapter(WeightAdapter):
    """What training adds to the bias of one module, of whatever class."""

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        self.bias = layer.parameter(*layer.params()["bias"].shape)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**params, "bias": params["bias"] + as_compute(self.bias, params["bias"])}


@hookimpl
def peft_config() -> type[BitFitConfig]:
    return BitFitConfig


@hookimpl
def peft_match(config: BitFitConfig, module: nn.Module) -> bool | None:
    return module._parameters.get("bias") is not None if config.target_modules is None else None


@hookimpl
def peft_build(layer: BaseLayer) -> BitFitAdapter:
    if "bias" not in layer.names:
        raise layer.refuse("it has no bias")
    return BitFitAdapter(layer)
