"""What a config says about one layer, and the starting values of its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_core.errors import CheckpointMismatchError
from peft_core.layers import BaseLayer
from peft_core.patterns import PatternMap

from .config import LoraConfig, is_anchored


@dataclass(frozen=True)
class Settings:
    """The settings of one layer, after patterns. `scaling` is the s of y = base(x) + s B A x."""

    r: int
    scaling: float
    dropout: float = 0.0
    bias: bool = False
    init: bool | str = True

    @property
    def anchored(self) -> bool:
        """Whether A and B start as something that must not count, so that it is kept and subtracted."""
        return is_anchored(self.init)


class Patterns:
    """`rank_pattern` and `alpha_pattern`, compiled."""

    def __init__(self, config: LoraConfig, trusted: bool) -> None:
        self.config = config
        self.ranks = PatternMap(config.rank_pattern, what="rank_pattern", trusted=trusted)
        self.alphas = PatternMap(config.alpha_pattern, what="alpha_pattern", trusted=trusted)

    def settings(self, path: str) -> Settings:
        """The settings at `path` (of a module, or of a single parameter)."""
        config = self.config
        r = self.ranks.get(path, config.r)
        alpha = self.alphas.get(path, config.lora_alpha)
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        return Settings(r, scaling, config.lora_dropout, config.lora_bias, config.init_lora_weights)

    def unmatched(self) -> list[str]:
        """What the user wrote in vain, as problems."""
        return [
            f"{what}: {key!r} matches none of the adapted layers"
            for what, patterns in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas))
            for key in patterns.unmatched()
        ]


def check_file(layer: BaseLayer, tensors: Mapping[str, Tensor] | None, slot: str, rows: int) -> None:
    """Compare the rank with the file's before anything of its size is made.

    Raises `CheckpointMismatchError`.
    """
    found = None if tensors is None else tensors.get(slot)
    if found is not None and (found.dim() == 0 or found.shape[0] != rows):
        raise CheckpointMismatchError(
            f"{layer.path}.{slot}: the config asks for {rows} rows, and the file has shape {tuple(found.shape)}"
        )


def start(a: Tensor, b: Tensor, bias: Tensor | None, init: bool | str, r: int) -> None:
    """Fill A (rows, in, ...) and B (out, rows, ...), and the bias (out,), with starting values.

    Kaiming-uniform with a = √5 is U(-1/√fan_in, 1/√fan_in), what `nn.Linear` begins with. Raises `ValueError`
    for a start that is not one of random values alone.
    """
    if init is True or init is False:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    elif init == "gaussian":
        nn.init.normal_(a, std=1 / r)
    elif init == "orthogonal":
        _orthogonal(a, b, r)
        return
    else:
        raise ValueError(f"init_lora_weights={init!r} has no random start")
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        if bias is not None:
            bound = 1 / math.sqrt(b[0].numel())
            nn.init.uniform_(bias, -bound, bound)
    else:
        nn.init.zeros_(b)
        if bias is not None:
            nn.init.zeros_(bias)


def _orthogonal(a: Tensor, b: Tensor, r: int) -> None:
    """A and B in complementary subspaces of one orthogonal basis of R^r, so that B A = 0.

    "LoRA with orthogonal initialisation" as in HF PEFT: A from the odd rows of Q, B from the even ones, each a tenth.
    """
    if r % 2:
        raise ValueError(f"the orthogonal start needs an even rank, not {r}")
    dtype = torch.promote_types(a.dtype, torch.float32)
    q = torch.linalg.qr(torch.randn(r, r, device=a.device, dtype=dtype)).Q
    odd, even = q[1::2], q[0::2]  # (r/2, r) each
    mix_a = torch.randn(a.shape[1], r // 2, device=a.device, dtype=dtype)
    mix_b = torch.randn(b.shape[0], r // 2, device=b.device, dtype=dtype)
    a.copy_((mix_a @ odd).t() / 10)
    b.copy_((mix_b @ even) / 10)
