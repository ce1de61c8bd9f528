"""Adapter records without a model: a minimal two-factor method in the layout of low-rank adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import checkpoint, layout
from peft_core.adapter import Adapter
from peft_core.config import TargetedConfig
from peft_core.hookspecs import hookimpl
from peft_core.layers import LinearLayer, SiteRequest
from peft_core.methods import Method, register_method, unregister_method
from peft_core.records import AdapterRecord


class HandConfig(TargetedConfig):
    peft_type: ClassVar[str] = "LORA"
    r: int = 2
    lora_alpha: int = 2


class HandAdapter(Adapter):
    def __init__(self, layer: LinearLayer, r: int) -> None:
        super().__init__(layer)
        self.first = layer.parameter(r, layer.in_features)
        self.second = layer.parameter(layer.out_features, r)


class HandPlugin:
    """Slot names differ from the names in files, so that the mapping is seen to act."""

    keys: Mapping[str, str] = {"first": "lora_A.weight", "second": "lora_B.weight"}

    @hookimpl
    def peft_config(self) -> type[HandConfig]:
        return HandConfig

    @hookimpl
    def peft_build(self, config: Any, layer: Any) -> Adapter:
        return HandAdapter(layer, config.r)

    @hookimpl
    def peft_state_key(self, key: str) -> str:
        return self.keys.get(key, key)


def method(plugin: object | None = None) -> Method:
    """A method that is known to its caller only, whatever is installed."""
    made = register_method(plugin or HandPlugin(), replace=True)
    unregister_method(made.name)
    return made


def record(
    seed: int = 0,
    *,
    paths: tuple[str, ...] = ("layers.0.q_proj", "layers.0.v_proj"),
    config: HandConfig | None = None,
    sizes: Callable[[str], tuple[int, int]] = lambda path: (6, 4),
    plugin: object | None = None,
    requests: list[SiteRequest] | None = None,
    shared: nn.Module | None = None,
) -> AdapterRecord:
    """A record with random tensors at `paths`, or at `requests`; `sizes` gives a layer's (in, out)."""
    config = config or HandConfig(target_modules=["q_proj", "v_proj"])
    wanted = [SiteRequest(path) for path in paths] if requests is None else requests
    generator = torch.Generator().manual_seed(seed)
    adapters: list[Adapter] = []
    for request in wanted:
        layer = LinearLayer(nn.Linear(*sizes(request.path)), request.path, request)
        adapter = HandAdapter(layer, config.r)
        with torch.no_grad():
            for parameter in (adapter.first, adapter.second):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        adapters.append(adapter)
    return AdapterRecord("default", method(plugin), config, wanted, adapters, shared or nn.Module())


def digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """One string for everything that an adapter computes with."""
    found = hashlib.sha256(repr(sorted(checkpoint._essential(config).items())).encode())
    for key in sorted(tensors):
        found.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype}".encode())
        found.update(tensors[key].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_record(made: AdapterRecord) -> str:
    return digest(made.config.to_dict(), layout.collect(made))


def digest_of_directory(directory: Path) -> str:
    with checkpoint.read(directory) as file:
        return digest(file.config, file.load(list(file.shapes)))
