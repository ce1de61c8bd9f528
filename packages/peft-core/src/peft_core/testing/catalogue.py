"""The catalogue: one case per kind of layer and per hyper-parameter that changes what the layer computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models import INNER, VOCABULARY, WIDTH, Block

ROWS = 4


@dataclass(frozen=True)
class Case:
    """A layer and an input for it. `rows` is the size of the input's batch, None where it has no batch."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]] = lambda x: ((x,), {})
    rows: int | None = ROWS
    ids: bool = False

    def inputs(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids:
            return self.call(torch.randint(0, VOCABULARY, self.shape, generator=generator))
        return self.call(torch.randn(self.shape, generator=generator, dtype=torch.float64))


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its output, as some language models have."""

    def __init__(self, count: int, width: int, scale: float) -> None:
        super().__init__(count, width)
        self.embed_scale: Tensor
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = super().forward(ids) * self.embed_scale
        return out


def _hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    make: Any = Conv1D
    layer: nn.Module = make(INNER, WIDTH)
    return layer


def _masked(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[1, -2:] = True
    return (x, x, x), {"key_padding_mask": mask, "average_attn_weights": False}


def _wide(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    wide = torch.cat([x, x[..., : INNER - WIDTH] * 0.5], -1)
    return (x, wide, wide), {}


def _self(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x, x, x), {}


def _cases() -> list[Case]:
    linear = [
        Case("linear", "linear", lambda: nn.Linear(WIDTH, INNER), (ROWS, 3, WIDTH)),
        Case("linear-no-bias", "linear", lambda: nn.Linear(WIDTH, INNER, bias=False), (ROWS, WIDTH)),
        Case("linear-four-axes", "linear", lambda: nn.Linear(INNER, WIDTH), (ROWS, 2, 3, INNER)),
        Case("linear-one-vector", "linear", lambda: nn.Linear(WIDTH, INNER), (WIDTH,), rows=None),
        Case("linear-no-rows", "linear", lambda: nn.Linear(WIDTH, INNER), (0, WIDTH), rows=None),
        Case(
            "linear-strided-input", "linear", lambda: nn.Linear(WIDTH, INNER), (ROWS, WIDTH, 3),
            lambda x: ((x.transpose(1, 2),), {}),
        ),
    ]  # fmt: skip
    if importlib.util.find_spec("transformers"):
        linear.append(Case("transformers-conv1d", "linear", _hf_conv1d, (ROWS, 3, WIDTH)))

    conv = []
    shapes = {"conv1d": (ROWS, 8, 11), "conv2d": (ROWS, 8, 9, 7), "conv3d": (ROWS, 8, 5, 6, 4)}
    classes: dict[str, Callable[..., nn.Module]] = {
        "conv1d": nn.Conv1d,
        "conv2d": nn.Conv2d,
        "conv3d": nn.Conv3d,
    }
    options: dict[str, dict[str, Any]] = {
        "": {},
        "no-bias": {"bias": False},
        "stride-padding": {"stride": 2, "padding": 1},
        "dilation": {"dilation": 2, "padding": 2},
        "same": {"padding": "same"},
        "groups": {"groups": 2},
        "depthwise": {"groups": 8},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "circular": {"padding": 1, "padding_mode": "circular"},
        "replicate": {"padding": 1, "padding_mode": "replicate"},
    }
    for kind, shape in shapes.items():
        for label, values in options.items():
            if kind == "conv3d" and label in ("no-bias", "reflect", "circular", "replicate", "same"):
                continue  # the same code as for two axes
            out = 8 if label == "depthwise" else 12
            conv.append(
                Case(
                    f"{kind}-{label}" if label else kind,
                    kind,
                    lambda kind=kind, out=out, values=values: classes[kind](8, out, 3, **values),  # type: ignore[misc]
                    shape,
                )
            )
    conv += [
        Case("conv2d-uneven-kernel", "conv2d", lambda: nn.Conv2d(8, 12, (1, 3)), shapes["conv2d"]),
        Case("conv2d-pointwise", "conv2d", lambda: nn.Conv2d(8, 12, 1), shapes["conv2d"]),
        Case("conv2d-unbatched", "conv2d", lambda: nn.Conv2d(8, 12, 3), shapes["conv2d"][1:], rows=None),
    ]

    def embedding(**options: Any) -> Callable[[], nn.Module]:
        return lambda: nn.Embedding(VOCABULARY, WIDTH, **options)

    other = [
        Case("embedding", "embedding", embedding(), (ROWS, 5), ids=True),
        Case("embedding-padding", "embedding", embedding(padding_idx=3), (ROWS, 5), ids=True),
        Case("embedding-flat", "embedding", embedding(), (ROWS,), ids=True),
        Case(
            "embedding-scaled",
            "embedding",
            lambda: ScaledEmbedding(VOCABULARY, WIDTH, 4.0),
            (ROWS, 5),
            ids=True,
        ),
        Case("attention", "attention", _attention(), (ROWS, 5, WIDTH), _self),
        Case("attention-time-first", "attention", _attention(batch_first=False), (5, ROWS, WIDTH), _self),
        Case("attention-no-bias", "attention", _attention(bias=False), (ROWS, 5, WIDTH), _self),
        Case("attention-mask", "attention", _attention(), (ROWS, 5, WIDTH), _masked),
        Case("attention-wide-keys", "attention", _attention(kdim=INNER, vdim=INNER), (ROWS, 5, WIDTH), _wide),
        Case("norm-layer", "norm", lambda: nn.LayerNorm(WIDTH), (ROWS, 3, WIDTH)),
        Case("norm-rms", "norm", lambda: nn.RMSNorm(WIDTH), (ROWS, 3, WIDTH)),
        Case("block", "block", Block, (ROWS, 3, WIDTH)),
        Case("block-keywords", "block", Block, (ROWS, 3, WIDTH), lambda x: ((x,), {"scale": 0.5})),
    ]
    return linear + conv + other


def _attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(WIDTH, 2, **{"batch_first": True, **options})


CASES: dict[str, Case] = {case.name: case for case in _cases()}
# "model" has no case: such a method is proved on whole models.
KINDS: frozenset[str] = frozenset(case.kind for case in CASES.values()) | {"model"}
