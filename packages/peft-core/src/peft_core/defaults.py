"""What a method gets without saying anything. A plugin like any other, asked last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from .adapter import Adapter
    from .config import AdapterConfig


@hookimpl(trylast=True)
def peft_resolve(config: AdapterConfig) -> AdapterConfig:
    """The config as it is."""
    return config


@hookimpl(trylast=True)
def peft_merge(adapter: Adapter, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ask the adapter."""
    return adapter.merge(params)


@hookimpl(trylast=True)
def peft_state_key(key: str) -> str:
    """The slot's own name."""
    return key
