"""Helpers of LoRA's tests: one layer with an adapter, and the papers' formulas written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_core.adapter import Adapter
from peft_core.layers import BaseLayer, SiteRequest, layer_of
from peft_core.routing import Request, Routing
from peft_core.site import Site
from peft_lora import LoraConfig, lora


def adapter_for(layer: BaseLayer, config: LoraConfig) -> Adapter:
    """The adapter that the plugin's hooks build, at random values."""
    shared = nn.Module()
    lora.peft_prepare(config=config, layers=[layer], shared=shared, trusted=True)
    adapter = lora.peft_build(config=config, layer=layer, shared=shared, tensors=None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        adapter.reset_parameters()
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(noise * 0.3)
    return adapter


def site_with(module: nn.Module, seed: int = 0, request: SiteRequest | None = None, **fields: Any) -> Any:
    """A site around `module` with one active LoRA of rank 4, alpha 6; the module's weights are frozen."""
    module.requires_grad_(False)
    layer = layer_of(module, request or SiteRequest("layer"))
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **fields})
    adapter = adapter_for(layer, config)
    site = Site(layer_of(module, SiteRequest("layer")), Routing())
    site.attach("a", "", adapter)
    site._routing.default = Request(("a",))
    return site, adapter


def merged(site: Site, adapter: Adapter, *args: Any) -> Tensor:
    """The bare layer's output with merged weights."""
    out: Tensor = site._layer.call(adapter.merge(site._layer.params()), *args)
    return out


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


class Recorder(TorchDispatchMode):
    """Names of the operations that run, and the largest tensor that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.made.append(tensor.numel())
        return out


def operations(call: Any) -> list[str]:
    with Recorder() as recorder:
        call()
    return recorder.names


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, by its address."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
