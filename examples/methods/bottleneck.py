"""Bottleneck adapters, Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, figure 2.

    h ← h + f(h W_down + b_down) W_up + b_up

for the output h of the attention and of the feed-forward network, before each is added to the residual stream. W_up
starts at zero rather than near it, so that the start is the base exactly.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from peft_core import Adapter, BaseLayer, LinearLayer, Link, TargetedConfig, as_compute, hookimpl


class BottleneckConfig(TargetedConfig):
    """`r` is the size of the bottleneck, m in the paper."""

    peft_type: ClassVar[str] = "HOULSBY"
    default_roles: ClassVar[tuple[str, ...]] = ("output", "down")

    r: int = Field(64, ge=1)
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"


class BottleneckAdapter(Adapter):
    """Two small layers, one after the other, behind a linear layer."""

    def __init__(self, layer: LinearLayer, config: BottleneckConfig) -> None:
        super().__init__(layer)
        self.activation = getattr(F, config.activation)
        self.down = nn.Linear(layer.out_features, config.r, device=layer.device, dtype=layer.dtype)
        self.up = nn.Linear(config.r, layer.out_features, device=layer.device, dtype=layer.dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down.weight, std=0.01)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        h = base(*args, **kwargs)
        return h + _linear(self.up, self.activation(_linear(self.down, h)))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, as_compute(layer.weight, x), as_compute(layer.bias, x))


@hookimpl
def peft_config() -> type[BottleneckConfig]:
    return BottleneckConfig


@hookimpl
def peft_build(config: BottleneckConfig, layer: BaseLayer) -> BottleneckAdapter:
    if not isinstance(layer, LinearLayer):
        raise layer.refuse("bottlenecks stand behind linear layers")
    return BottleneckAdapter(layer, config)
