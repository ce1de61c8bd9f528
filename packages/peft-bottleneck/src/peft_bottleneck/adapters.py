"""The maths: one bottleneck, and the four things that stand at a model's modules.

With d the width of the stream, r that of the bottleneck, u (..., d) its input:

    Δ(u) = W_up f(W_down u + b_down) + b_up        W_down (r, d), W_up (d, r)

(Houlsby et al. 2019, arXiv 1902.00751, section 2.1; the residual connection inside their adapter is the sum that
the classes below write.)
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import Adapter, BaseLayer, Link, MergeError, RequestError, as_compute

from .activations import ACTIVATIONS
from .config import BottleneckConfig

_STREAM, _PASSING = "peft_bottleneck stream", "peft_bottleneck passing"


class _Affine(nn.Module):
    """A weight and a bias, of a projection (out, in) or of a norm (d,)."""

    def __init__(self, layer: BaseLayer, *shape: int) -> None:
        super().__init__()
        self.weight = layer.parameter(*shape)
        self.bias = layer.parameter(shape[0])

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, as_compute(self.weight, x), as_compute(self.bias, x))

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, as_compute(self.weight, x), as_compute(self.bias, x))


class _Bottleneck(Adapter):
    """What the adapters with parameters have in common: `delta`."""

    def __init__(self, layer: BaseLayer, config: BottleneckConfig, width: int, size: int) -> None:
        super().__init__(layer)
        self.width, self.size = width, size
        self.init_weights = config.init_weights
        self.starts_as_base = config.init_weights == "mam_adapter"
        self.activation = ACTIVATIONS[config.non_linearity or ""]
        self.norm_before = _Affine(layer, width) if config.ln_before else None
        self.down = _Affine(layer, size, width)
        self.up = _Affine(layer, width, size)
        self.norm_after = _Affine(layer, width) if config.ln_after else None
        self.scaling = layer.parameter(1) if config.scaling == "learned" else None
        self.scale = config.scaling if isinstance(config.scaling, (int, float)) else 1.0
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def reset_parameters(self) -> None:
        for projection in (self.down, self.up):
            if self.init_weights == "bert":
                nn.init.normal_(projection.weight, std=0.02)
            elif self.init_weights == "houlsby":
                nn.init.trunc_normal_(projection.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(projection.bias)
        if self.init_weights == "mam_adapter":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                nn.init.ones_(norm.weight)
                nn.init.zeros_(norm.bias)
        if self.scaling is not None:
            nn.init.ones_(self.scaling)

    def delta(self, u: Tensor) -> Tensor:
        """s·Δ(u), in the shape and dtype of `u` (..., d)."""
        if self.norm_before is not None:
            u = self.norm_before.norm(u)
        out = self.up.linear(self.activation(self.down.linear(u)))
        if self.scaling is not None:
            out = out * as_compute(self.scaling, out)
        elif self.scale != 1:
            out = out * self.scale
        if self.dropout is not None:
            out = self.dropout(out)
        return out if self.norm_after is None else self.norm_after.norm(out)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        raise _not_weights(self.layer)


class OutputAdapter(_Bottleneck):
    """h + s·Δ(h), at the module whose output is h: the sequential adapter of Houlsby et al.

    Of an output that is a tuple h is the first element.
    """

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        h = _first(out)
        return _with_first(out, h + self.delta(h))


class SumAdapter(_Bottleneck):
    """LN(z + s·Δ(LN(z))), at a norm LN behind the sum z = h + x: Pfeiffer et al. where norms stand there.

    Of several of these at one norm each changes z in turn, the innermost first, and sees the norm of what the
    ones before it have made of z.
    """

    uses_call: ClassVar[bool] = True

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        notes = base.call.scratch
        if notes.get(_PASSING):
            return base(*args, **kwargs)
        notes.pop(_STREAM, None)
        normed = base(*args, **kwargs)
        stream = notes.pop(_STREAM, args[0]) + self.delta(normed)
        notes[_PASSING] = True
        try:
            out = base(stream, *args[1:], **kwargs)
        finally:
            del notes[_PASSING]
        notes[_STREAM] = stream
        return out


class ResidualRecorder(Adapter):
    """Leaves a module's input x for the `ResidualAdapter` of the same sub-layer. It has no parameters."""

    uses_call: ClassVar[bool] = True

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        base.call.scratch[self.shared, self.layer.path] = args[0]
        return base(*args, **kwargs)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        raise _not_weights(self.layer)


class ResidualAdapter(_Bottleneck):
    """h + s·Δ(x), or with `summed` h + s·Δ(h + x), at the module whose output is h.

    The former is the parallel adapter of He et al., the latter that of Pfeiffer et al. where no norm stands behind
    the sum. x is what the recorder at `source` has seen; `last` says that nobody needs it afterwards.
    """

    uses_call: ClassVar[bool] = True

    def __init__(
        self, layer: BaseLayer, config: BottleneckConfig, width: int, size: int, source: str, summed: bool, last: bool
    ) -> None:
        super().__init__(layer, config, width, size)
        self.source, self.summed, self.last = source, summed, last

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        h, notes, key = _first(out), base.call.scratch, (self.shared, self.source)
        if key not in notes:
            raise RequestError(
                f"{self.layer.path}: the input of {self.source}, which the adapter here needs, was not seen in this "
                "call. Call the model itself, not a part of it; and another adapter at that module must run it, not "
                "compute it anew with other weights"
            )
        x = (notes.pop(key) if self.last else notes[key]).view_as(h)
        return _with_first(out, h + self.delta(x + h if self.summed else x))


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _with_first(out: Any, h: Tensor) -> Any:
    return (h, *out[1:]) if isinstance(out, tuple) else h


def _not_weights(layer: BaseLayer) -> MergeError:
    return MergeError(
        f"{layer.path}: a bottleneck adapter has an activation function between its projections, so no weights of the "
        "base layer compute what it does, and it cannot be merged. Keep it attached: saving, loading and inference "
        "do not need a merge"
    )
