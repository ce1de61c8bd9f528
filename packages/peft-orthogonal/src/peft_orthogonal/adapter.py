"""What OFT and BOFT share: the input of a layer is rotated, or, where that is the same and cheaper, its weight is.

    y = W (x R) + b = (W Rᵀ) x + b          (x a row)

Linear layers and convolutions with kernels of one: the activations are rotated. Larger kernels: R acts on patches, all
inputs under the kernel, channel by channel as the kernel is stored; a patch's inputs occur in many patches, so the
kernel is rotated instead, block by block. Backward does it again rather than keep the result. Embeddings: the vectors
that come out are rotated.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_core.adapter import Adapter, as_compute
from peft_core.layers import BaseLayer, ConvLayer, Params
from peft_core.link import Link

from .rotation import Part, Rotation, rotate, rotate_back
from .scaling import scaled


class RotationAdapter(Adapter):
    """A rotation of n features, and perhaps a scale of the outputs. Subclasses give both.

    `dropout` is the probability with which, in training, a block is replaced by the identity for a call.
    """

    def __init__(self, layer: BaseLayer, dropout: float = 0.0) -> None:
        super().__init__(layer)
        self.dropout = dropout
        self.patches = isinstance(layer, ConvLayer) and math.prod(layer.kernel_size) > 1

    @abstractmethod
    def rotation(self, training: bool) -> Rotation:
        """R, with dropout where `training`."""

    def scale(self) -> Tensor | None:
        """s (out,), factors of the outputs without the bias; None for none."""
        return None

    def drop(self, blocks: Tensor, training: bool) -> Tensor:
        """Blocks (..., b, b), some of them replaced by the identity."""
        if not (training and self.dropout):
            return blocks
        eye = torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype)
        kept = torch.rand((*blocks.shape[:-2], 1, 1), device=blocks.device) >= self.dropout
        return torch.where(kept, blocks, eye)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        rotation = self.rotation(self.training)
        if self.layer.kind == "embedding":
            return rotate(base(*args, **kwargs), rotation)
        if self.patches:
            params = base.params()

            def run(x: Tensor, *rest: Any) -> Any:
                return base.layer.call(self._merged(params, rotation), x, *rest, **kwargs)

            if torch.is_grad_enabled():
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
            return run(*args)
        x, *rest = args
        return self._scaled(base(self._turned(x, rotation), *rest, **kwargs))

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """Linear layers whose adapters have blocks of one size: every row gets the blocks of its own."""
        first = adapters[0]
        if first.layer.kind != "linear" or len(args) != 1 or kwargs or args[0].dim() < 2:
            return NotImplemented
        (x,) = args

        def make() -> tuple[Rotation, Tensor | None] | None:
            rotations = [adapter.rotation(adapter.training) for adapter in adapters]
            if len({tuple((*part.blocks.shape, part.low) for part in rotation) for rotation in rotations}) > 1:
                return None
            parts = []
            for same in zip(*rotations, strict=True):
                # Last of all the identity, which is where the index -1 points.
                eye = torch.eye(same[0].blocks.shape[-1], device=index.device, dtype=same[0].blocks.dtype)
                stacked = torch.stack([*(part.blocks for part in same), eye.expand_as(same[0].blocks)])
                parts.append(Part(as_compute(stacked, x)[index], *same[0][1:]))
            scales = [adapter.scale() for adapter in adapters]
            gain = None
            if scales[0] is not None:
                gain = torch.stack([*scales, torch.ones_like(scales[0])])[index]
                gain = gain.view(len(index), *(1,) * (x.dim() - 2), -1)
            return tuple(parts), gain

        tensors = [tensor for adapter in adapters for tensor in adapter._parameters.values()]
        drawn = any(adapter.training and adapter.dropout for adapter in adapters)
        key = base.request.rows, len(index), x.dim(), x.dtype
        made = make() if drawn else base.remembered("rotations", key, tensors, make)
        if made is None:
            return NotImplemented
        rotation, gain = made
        return first._scaled(base(rotate(x, rotation)), gain)

    def merge(self, params: Params) -> Params:
        return self._merged(params, self.rotation(training=False))

    def _merged(self, params: Params, rotation: Rotation) -> Params:
        weight = params["weight"]
        if self.layer.kind == "embedding":
            return {**params, "weight": rotate(weight, rotation)}
        # The outputs of group g read the g-th part of the features: (groups · out, in) -> (out, groups · in) and back.
        groups = self.layer.groups if isinstance(self.layer, ConvLayer) else 1
        flat = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(0, 1)
        turned = rotate_back(flat.reshape(flat.shape[0], -1), rotation).view(flat.shape)
        merged = {**params, "weight": turned.transpose(0, 1).reshape(weight.shape)}
        scale = self.scale()
        if scale is not None:
            gain = as_compute(scale, weight).view(-1, *(1,) * (weight.dim() - 1))
            merged["weight"] = merged["weight"] * gain
            if "bias" in params:
                own = self._own_bias(params["bias"])
                merged["bias"] = torch.addcmul(own, params["bias"] - own, gain.flatten())
        return merged

    def _turned(self, x: Tensor, rotation: Rotation) -> Tensor:
        if not isinstance(self.layer, ConvLayer):
            return rotate(x, rotation)
        channels = -1 - len(self.layer.kernel_size)
        return rotate(x.movedim(channels, -1), rotation).movedim(-1, channels)

    def _scaled(self, out: Tensor, scale: Tensor | None = None) -> Tensor:
        """s ∘ (out - b) + b, b being the layer's own bias; `scale` is another s (out,), or (rows, ..., out)."""
        scale = self.scale() if scale is None else scale
        if scale is None:
            return out
        gain = as_compute(scale, out)
        spatial = (1,) * len(self.layer.kernel_size) if isinstance(self.layer, ConvLayer) else ()
        gain = gain.view(*gain.shape, *spatial)
        if "bias" not in self.layer.names:
            return scaled(out, gain)
        bias = self._own_bias(out).view(-1, *spatial)
        return scaled(out, gain, bias)

    def _own_bias(self, like: Tensor) -> Tensor:
        bias: Tensor | None = getattr(self.layer, "bias", None)
        if bias is None or bias.is_meta:  # a storage of its own kind, or kept elsewhere
            bias = self.layer.params()["bias"]
        return as_compute(bias, like)
