"""Adapters around the whole model: a site that is not at a module's place but in front of the model's own call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RequestError
from .layers import BaseLayer
from .site import Site
from .stand_in import shadowed
from .subclass import base_class


def call_past(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's call as its own class has it, without the adapters around it."""
    return base_class(type(model)).__call__(model, *args, **kwargs)


class RootLayer(BaseLayer):
    """View of the model itself."""

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RequestError("adapters of the model's own parameters cannot be compiled; call the model uncompiled")
        return call_past(shadowed(self.module, params), *args, **kwargs)


class RootSite(Site):
    """The site of the model itself. The model holds it, so it refers to the model without registering it."""

    def _hold(self, module: nn.Module) -> None:
        self.__dict__["base_layer"] = module

    def run_base(self, *args: Any, **kwargs: Any) -> Any:
        return call_past(self.base_layer, *args, **kwargs)
