"""What LoHa and LoKr have in common: the fields of their configs, their dropouts, and how a ΔW acts that is not formed.

Both are described by Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation", https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_core.adapter import DeltaAdapter, as_compute
from peft_core.config import TargetedConfig
from peft_core.errors import TargetError
from peft_core.layers import BaseLayer, ConvLayer, LinearLayer
from peft_core.patterns import PatternMap

from .config import LoraConfig


class ProductConfig(TargetedConfig):
    """The fields that LoHa and LoKr share; see their configs."""

    # Customary targets are those of LoRA (so it is in HF PEFT too).
    default_roles: ClassVar[tuple[str, ...]] = LoraConfig.default_roles
    default_roles_for: ClassVar[Mapping[str, tuple[str, ...]]] = LoraConfig.default_roles_for

    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)

    @field_validator("r")
    @classmethod
    def _positive_rank(cls, value: int) -> int:
        if value < 1:
            raise ValueError("the rank is a positive integer")
        return value

    @field_validator("alpha")
    @classmethod
    def _alpha(cls, value: int | float) -> int | float:
        if value == 0:
            raise ValueError("with alpha=0 the adapter can never do anything")
        return value

    @field_validator("rank_dropout", "module_dropout")
    @classmethod
    def _probability(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError("a probability, from 0 to below 1")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _positive_ranks(cls, value: dict[str, int]) -> dict[str, int]:
        for key, rank in value.items():
            if rank < 1:
                raise ValueError(f"the rank of {key!r} is not a positive integer")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas(cls, value: dict[str, int | float]) -> dict[str, int | float]:
        for key, alpha in value.items():
            if alpha == 0:
                raise ValueError(f"with 0 for {key!r} the adapter can never do anything there")
        return value

    @classmethod
    def _switched_off(cls, data: dict[str, object]) -> dict[str, object]:
        patterns = ("rank_pattern", "alpha_pattern")
        return super()._switched_off({k: v for k, v in data.items() if not (k in patterns and not v)})


@dataclass(frozen=True)
class Dropouts:
    """`rows`: chance that an output feature of ΔW is left out in a call; `module`: that the whole ΔW is.

    `scaled`: the features that stay are multiplied by (their number / all)⁻¹.
    """

    rows: float = 0.0
    module: float = 0.0
    scaled: bool = True


C = TypeVar("C", bound=ProductConfig)


class Patterns(Generic[C]):
    """`rank_pattern` and `alpha_pattern`, compiled, on top of `r` and `alpha`."""

    def __init__(self, config: C, layers: Sequence[BaseLayer], trusted: bool) -> None:
        """Raises `TargetError` for a key of the user's that decides nothing."""
        self._config = config
        self._ranks = PatternMap(config.rank_pattern, what="rank_pattern", trusted=trusted)
        self._alphas = PatternMap(config.alpha_pattern, what="alpha_pattern", trusted=trusted)
        for layer in layers:
            self.rank_and_scale(layer.path)
        both = (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas))
        vain = [f"{what}: {key!r} matches none of the adapted layers" for what, m in both for key in m.unmatched()]
        if trusted and vain:
            raise TargetError("; ".join(vain))

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """r and s = alpha / r of the layer at `path`."""
        r = self._ranks.get(path, self._config.r)
        return r, self._alphas.get(path, self._config.alpha) / r


class ProductAdapter(DeltaAdapter):
    """y = base(x) + op(x, ΔW), op being the layer's own (a product, a convolution), and ΔW a product of factors.

    Subclasses give ΔW, and where it is cheaper, how it acts without being formed. Where it is formed, backward forms
    it again: what is kept between forward and backward are x and the factors.
    """

    layer: LinearLayer | ConvLayer

    def __init__(self, layer: LinearLayer | ConvLayer, scaling: float, dropouts: Dropouts) -> None:
        super().__init__(layer)
        self.scaling = scaling
        self.dropouts = dropouts

    @abstractmethod
    def weight_delta(self) -> Tensor:
        """s ΔW, in the shape of the layer's weight."""

    def add_rows(self, out: Tensor, x: Tensor) -> Tensor | None:
        """`out` (rows, out) + s x ΔWᵀ for `x` (rows, in), without ΔW; None where forming it is cheaper."""
        return None

    def convolved(self, x: Tensor) -> Tensor | None:
        """The convolution of x with s ΔW, without ΔW; None where forming it is cheaper."""
        return None

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        gain = self._gain(out)
        if isinstance(self.layer, ConvLayer):
            change = self.convolved(x)
            change = as_compute(self._dense(x) if change is None else change, out)
            return out + (change if gain is None else change * gain)
        if x.dim() != 2:
            return self.accumulate(out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])).view(out.shape)
        if gain is not None:
            return torch.addcmul(out, self._added(torch.zeros_like(out), x), gain)
        return self._added(out, x)

    def delta(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, ConvLayer):
            change = self.convolved(x)
            return self._dense(x) if change is None else change
        return self.accumulate(x.new_zeros((*x.shape[:-1], self.layer.out_features)), x)

    def _added(self, out: Tensor, x: Tensor) -> Tensor:
        found = self.add_rows(out, x)
        return out + as_compute(self._dense(x), out) if found is None else found

    def _dense(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            # Backward forms ΔW again: the weight's size is not kept per layer.
            result: Tensor = checkpoint(self._by_weight, x, use_reentrant=False, preserve_rng_state=False)
            return result
        return self._by_weight(x)

    def _by_weight(self, x: Tensor) -> Tensor:
        weight = as_compute(self.weight_delta(), x)
        return self.layer.convolve(x, weight) if isinstance(self.layer, ConvLayer) else F.linear(x, weight)

    def _gain(self, out: Tensor) -> Tensor | None:
        """Factors of the output's features in this call, (out, 1, ...) or a scalar; None where there is no dropout."""
        rows, module = self.dropouts.rows, self.dropouts.module
        if not self.training or not (rows or module):
            return None
        gain = out.new_ones(())
        if rows:
            axes = len(self.layer.kernel_size) if isinstance(self.layer, ConvLayer) else 0
            size = self.layer.out_features
            gain = (torch.rand((size, *(1,) * axes), device=out.device) >= rows).to(out.dtype)
            if self.dropouts.scaled:
                gain = gain * (size / gain.sum().clamp_min(1))
        if module:
            gain = gain * (torch.rand((), device=out.device) >= module).to(out.dtype)
        return gain


def layer_of_product(layer: BaseLayer, method: str) -> LinearLayer | ConvLayer:
    """The layer, if a product of factors can stand beside its weight. Raises `TargetError`."""
    if layer.kind == "linear" or isinstance(layer, ConvLayer):
        return layer  # type: ignore[return-value]
    raise layer.refuse(f"{method} adapts linear layers and convolutions; exclude this one")
