"""BOFT: the inputs of a layer are rotated by a product of butterfly factors, and its outputs scaled.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
https://arxiv.org/abs/2311.06243, section 4: W is multiplied by R(m, b) = B_{m-1} ... B_0, each factor block-diagonal up
to a permutation, each block the Cayley transform of a learned skew-symmetric one (see `rotation`). m = 1 is
block-diagonal, as in OFT; with m = 1 + log₂(n / b) all features meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import field_validator
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.biases import bias_sites, is_bias, own_bias
from peft_core.errors import CheckpointMismatchError
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, ConvLayer, SiteRequest

from .adapter import RotationAdapter
from .cayley import cayley
from .config import OrthogonalConfig, check_probability
from .rotation import Rotation, assemble
from .sizes import block_size, rotated_size, size_in_file


class BOFTConfig(OrthogonalConfig):
    """Butterfly orthogonal fine-tuning, y = s ∘ (W (x R)) + b with R = B_{m-1} ... B_0.

    Args:
        boft_block_size: b, the size of a block, or 0 where `boft_block_num` is given.
        boft_block_num: the number of blocks of a factor, or 0 where `boft_block_size` is given.
        boft_n_butterfly_factor: m, the number of factors. b must divide the layer's inputs (times the kernel's size,
            for convolutions; in each group); for m > 1 it must be even, and the number of blocks divisible by 2^(m-1).
        boft_dropout: probability with which, in training, a block of any factor is the identity for a call.
        bias: which of the base's own biases are trained as well: "none", "all", or those of the targets ("boft_only").
            The base keeps its biases; the adapter has its own.
        fan_in_fan_out: kept for files of other writers: how a layer stores its weight is seen from the layer.
        init_weights: True (R = I and s = 1), or False (A from N(0, 0.1), s from N(1, 0.1)).
        round_block_size: where the size or number of blocks does not fit, take the nearest one that does.

    The other fields are those of `TargetedConfig`.
    """

    peft_type: ClassVar[str] = "BOFT"
    blocks: ClassVar[tuple[str, str]] = ("boft_block_size", "boft_block_num")

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    bias: Literal["none", "all", "boft_only"] = "none"

    _probability = field_validator("boft_dropout")(check_probability)

    @field_validator("boft_n_butterfly_factor")
    @classmethod
    def _factors(cls, value: int) -> int:
        if value < 1:
            raise ValueError("a positive number of factors")
        return value


class BOFT(RotationAdapter):
    """`boft_R` (m, blocks, b, b), of which (A - Aᵀ) / 2 counts, and `boft_s` (out, 1), for convolutions (1, out)."""

    def __init__(self, layer: BaseLayer, config: BOFTConfig, n: int, b: int, factors: int) -> None:
        super().__init__(layer, config.boft_dropout)
        self.starts_as_base = config.init_weights
        self.boft_R = layer.parameter(factors, n // b, b, b)
        out: int = layer.out_features  # type: ignore[attr-defined]
        self.boft_s = layer.parameter(*((1, out) if isinstance(layer, ConvLayer) else (out, 1)))

    def reset_parameters(self) -> None:
        if self.starts_as_base:
            nn.init.zeros_(self.boft_R)
            nn.init.ones_(self.boft_s)
        else:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1, std=0.1)

    def rotation(self, training: bool) -> Rotation:
        return assemble(self.drop(cayley(self.boft_R - self.boft_R.mT, 0.5), training))

    def scale(self) -> Tensor:
        return self.boft_s.flatten()


@hookimpl
def peft_config() -> type[BOFTConfig]:
    return BOFTConfig


@hookimpl
def peft_sites(config: BOFTConfig, model: nn.Module, matched: Sequence[str]) -> list[SiteRequest]:
    return bias_sites(config, model, matched)


@hookimpl
def peft_build(config: BOFTConfig, layer: BaseLayer, shared: Any, tensors: Mapping[str, Tensor] | None) -> Adapter:
    if is_bias(layer):
        return own_bias(layer)
    n = rotated_size(layer, "BOFT", embeddings=False)
    given = (tensors or {}).get("boft_R")
    factors = config.boft_n_butterfly_factor
    if given is not None and given.dim() == 4:
        if given.shape[0] != factors and given.shape[0] != 1:
            raise CheckpointMismatchError(
                f"{layer.path}.boft_R: the config asks for {factors} factors, the file has shape {tuple(given.shape)}"
            )
        if given.shape[0] != factors and not shared.__dict__.get("warned"):
            shared.__dict__["warned"] = True
            warnings.warn(
                f"the config of this BOFT adapter says boft_n_butterfly_factor={factors}, but its tensors have one "
                "factor, as peft writes them where its CUDA extension does not compile. It is read as it was trained, "
                "with one",
                stacklevel=2,
            )
        factors = given.shape[0]
        b = size_in_file(layer, "boft_R", tuple(given.shape), n, given.shape[2], given.shape[1])
    else:
        size, number, rounded = config.boft_block_size, config.boft_block_num, config.round_block_size
        b = block_size(layer, n, size, number, BOFTConfig.blocks, factors, rounded)
    return BOFT(layer, config, n, b, factors)


__all__ = ["BOFT", "BOFTConfig"]
