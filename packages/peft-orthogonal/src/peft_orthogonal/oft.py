"""OFT, orthogonal fine-tuning: the inputs of a layer are rotated, so that angles between its neurons stay as they are.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", https://arxiv.org/abs/2306.07280,
equations 4 to 6: W is multiplied by a block-diagonal orthogonal matrix, each block the Cayley transform of a learned
skew-symmetric one. Qiu et al. 2025, "Orthogonal Finetuning Made Scalable" (OFT v2), https://arxiv.org/abs/2506.19847:
activations are rotated instead of the weight, and the Cayley transform may be a series.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.biases import bias_sites, is_bias, own_bias
from peft_core.errors import CheckpointError, ConfigError
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, SiteRequest

from .adapter import RotationAdapter
from .cayley import cayley, cayley_series, skew_from_rows
from .config import OrthogonalConfig, check_probability
from .rotation import Rotation, assemble
from .sizes import block_size, rotated_size, size_in_file

_VERSION_1 = (
    "it was written by the first version of OFT in peft, whose blocks are full matrices and rotate otherwise than "
    "those of version 2. Load and merge it with a peft of that time, or train it again"
)


class OFTConfig(OrthogonalConfig):
    """Orthogonal fine-tuning, y = W (x R) + b with R block-diagonal and orthogonal.

    Args:
        r: the number of blocks, or 0 where `oft_block_size` is given.
        oft_block_size: b, the size of a block, or 0 where `r` is given. It must divide the layer's inputs (times the
            kernel's size, for convolutions; in each group).
        module_dropout: probability with which, in training, a block is the identity for a call.
        bias: which of the base's own biases are trained as well: "none", "all", or those of the targets ("oft_only").
            The base keeps its biases; the adapter has its own.
        fan_in_fan_out: kept for files of other writers: how a layer stores its weight is seen from the layer.
        init_weights: True (R = I), or False (N(0, 0.1), R is then some rotation).
        coft: constrained: ‖Q‖ ≤ eps / √(number of learned blocks) for each block's skew-symmetric matrix Q. The forward
            sees to that; and with `peft_core.drive` (or `Trainer`) the parameters themselves stay there.
        eps: that bound.
        block_share: all blocks of a layer are one and the same.
        use_cayley_neumann: R as a series, (I + Q)(I - Q)⁻¹ ≈ I + 2Q + 2Q² + ..., which is orthogonal for small Q only.
            False: exactly (I - Q)(I + Q)⁻¹, which turns the other way: the same tensor means opposite rotations.
        num_cayley_neumann_terms: terms of the series.
        round_block_size: where the size or number of blocks does not divide, take the nearest one that does.

    The other fields are those of `TargetedConfig`.
    """

    peft_type: ClassVar[str] = "OFT"
    blocks: ClassVar[tuple[str, str]] = ("oft_block_size", "r")

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    bias: Literal["none", "all", "oft_only"] = "none"
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    _probability = field_validator("module_dropout")(check_probability)

    @field_validator("eps")
    @classmethod
    def _bound(cls, value: float) -> float:
        if not 0 < value < math.inf:
            raise ValueError("a positive bound")
        return value

    @field_validator("num_cayley_neumann_terms")
    @classmethod
    def _terms(cls, value: int) -> int:
        if value < 1:
            raise ValueError("a positive number of terms; with 1 alone nothing is rotated")
        return value

    def beside_tensors(self, *, inference_mode: bool | None = None) -> dict[str, Any]:
        data = super().beside_tensors(inference_mode=inference_mode)
        if self.use_cayley_neumann:
            # Which series is meant: HF PEFT warns of files that do not say so.
            data["peft_version"] = "0.18.0"
        return data

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data and "oft_block_size" not in data:
            raise ConfigError(f"no oft_block_size: {_VERSION_1}")
        version = re.match(r"0\.(\d+)\.", str(data.get("peft_version") or ""))
        if version and int(version[1]) < 18 and data.get("use_cayley_neumann"):
            warnings.warn(
                f"this OFT adapter was written by peft {data['peft_version']}, whose Neumann series was another one; "
                "it is read with that of peft 0.18 and later, and may compute something else than it did",
                stacklevel=2,
            )
        return data


class OFT(RotationAdapter):
    """`oft_R` (blocks, b (b - 1) / 2), or (1, ...) for shared blocks: strict upper triangles of Q, row by row.

    An embedding's is `oft_embedding_R`.
    """

    def __init__(self, layer: BaseLayer, config: OFTConfig, n: int, b: int) -> None:
        super().__init__(layer, config.module_dropout)
        self.config = config
        self.size, self.number = b, n // b
        self.starts_as_base = config.init_weights
        self.name = "oft_embedding_R" if layer.kind == "embedding" else "oft_R"
        rows = layer.parameter(1 if config.block_share else self.number, b * (b - 1) // 2)
        self.register_parameter(self.name, rows)

    @property
    def rows(self) -> nn.Parameter:
        """The parameter."""
        return self.get_parameter(self.name)

    def reset_parameters(self) -> None:
        if self.starts_as_base:
            nn.init.zeros_(self.rows)
        else:
            nn.init.normal_(self.rows, std=0.1)

    def rotation(self, training: bool) -> Rotation:
        rows: Tensor = self.rows
        if self.config.coft:
            with torch.no_grad():
                shrunk = self._shrink(rows)
            rows = rows * shrunk
        skew = skew_from_rows(rows, self.size)
        if self.config.use_cayley_neumann:
            blocks = cayley_series(skew, self.config.num_cayley_neumann_terms)
        else:
            blocks = cayley(skew)
        blocks = self.drop(blocks.expand(self.number, -1, -1), training)
        return assemble(blocks.unsqueeze(0))

    def project(self) -> None:
        """Put the parameter itself within the bound of COFT."""
        with torch.no_grad():
            self.rows.mul_(self._shrink(self.rows))

    def _shrink(self, rows: Tensor) -> Tensor:
        """(blocks, 1): 1 for blocks within the bound. ‖Q‖ is √2 times the norm of a row: each number occurs twice."""
        bound = self.config.eps / math.sqrt(len(rows))
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True) * math.sqrt(2)
        shrunk: Tensor = (bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)
        return shrunk


@hookimpl
def peft_config() -> type[OFTConfig]:
    return OFTConfig


@hookimpl
def peft_sites(config: OFTConfig, model: nn.Module, matched: Sequence[str]) -> list[SiteRequest]:
    return bias_sites(config, model, matched)


@hookimpl
def peft_build(config: OFTConfig, layer: BaseLayer, tensors: Mapping[str, Tensor] | None) -> Adapter:
    if is_bias(layer):
        return own_bias(layer)
    n = rotated_size(layer, "OFT", embeddings=True)
    given = next((tensor for name, tensor in (tensors or {}).items() if name.endswith("_R.weight")), None)
    if given is not None and given.dim() == 2:
        # A size that did not divide was rounded by the writer, and its config does not say so.
        b = (1 + math.isqrt(1 + 8 * given.shape[1])) // 2
        blocks = n // b if config.block_share else given.shape[0]
        return OFT(layer, config, n, size_in_file(layer, "oft_R", tuple(given.shape), n, b, blocks))
    if any(name.split(".")[0] == "oft_r" for name in tensors or ()):
        raise CheckpointError(f"{layer.path}.oft_r: {_VERSION_1}")
    b = block_size(layer, n, config.oft_block_size, config.r, OFTConfig.blocks, rounded=config.round_block_size)
    return OFT(layer, config, n, b)


@hookimpl
def peft_state_key(key: str) -> str:
    """Files have "oft_R.weight" for a slot "oft_R"."""
    return f"{key}.weight" if key.endswith("_R") else key


@hookimpl
def peft_step(config: OFTConfig, adapters: Mapping[str, Adapter], event: str) -> None:
    """After a step, the parameters of constrained OFT go back within their bound."""
    if config.coft and event == "after":
        for adapter in adapters.values():
            if isinstance(adapter, OFT):
                adapter.project()


__all__ = ["OFT", "OFTConfig"]
