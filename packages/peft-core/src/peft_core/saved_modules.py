"""`modules_to_save`: training a module in full is one more adapter at a site, a copy that stands in for it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .layers import BaseLayer, Params, SiteRequest, shadowed
from .site import Link


class SavedModule(Adapter):
    """A trainable copy of a module (a task head, say); the module's own weights stay as they are.

    The copy is kept in float32 over a half-precision base and computes in the base's dtype. In a checkpoint its
    tensors stand under the module's own names.
    """

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        dtypes = [p.dtype for p in layer.module.parameters()]
        self.compute_dtype = dtypes[0] if dtypes else None
        self.module = self._copy(layer)

    @staticmethod
    def _copy(layer: BaseLayer) -> nn.Module:
        memo: dict[int, Any] = {}
        for tensor in layer.module.parameters():
            dtype = layer.dtype if tensor.is_floating_point() else tensor.dtype
            value = (
                torch.empty_like(tensor, device="meta", dtype=dtype)
                if layer.device.type == "meta"
                else (tensor.detach().clone().to(dtype))
            )
            memo[id(tensor)] = nn.Parameter(value, requires_grad=value.is_floating_point())
        return copy.deepcopy(layer.module, memo)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        if self.compute_dtype is None or self.compute_dtype == self.layer.dtype:
            return self.module(*args, **kwargs)
        params = {n: p.to(self.compute_dtype) for n, p in self.module.named_parameters()}
        return shadowed(self.module, params)(*args, **kwargs)

    def merge(self, params: Params) -> Params:
        return {name: parameter.to(params[name].dtype) for name, parameter in self.module.named_parameters()}

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {slot.removeprefix("module."): where for slot, where in super().slots().items()}


def saved_module_requests(paths: list[str]) -> list[SiteRequest]:
    """One request per module to copy."""
    return [SiteRequest(path, copied=True) for path in paths]
