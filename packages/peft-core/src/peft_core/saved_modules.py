"""`modules_to_save`: training a module in full is one more adapter at a site, a copy that stands in for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, as_compute
from .errors import CheckpointMismatchError
from .layers import BaseLayer, Params, SiteRequest, layer_of
from .link import Link
from .stand_in import shadowed


class SavedModule(Adapter):
    """A trainable copy of a module (a task head, say); the module's own weights stay as they are.

    The copy is kept in float32 over a half-precision base and computes in the base's dtype. In a checkpoint its
    tensors stand under the module's own names.
    """

    by_values = True

    def __init__(self, layer: BaseLayer, tied_to: SavedModule | None = None) -> None:
        """`tied_to` is the copy of another module, whose `weight` this one has too."""
        super().__init__(layer)
        self.modules_to_save = self._copy(layer)  # filters of parameter names look for this word
        self.__dict__["tied_to"] = tied_to  # by reference: it is registered at its own site
        self._tie()

    def _tie(self) -> None:
        tied_to: SavedModule | None = self.__dict__["tied_to"]
        if tied_to is not None:
            self.modules_to_save._parameters["weight"] = tied_to.modules_to_save._parameters["weight"]

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """As every adapter's. Raises `CheckpointMismatchError` too where two tied weights differ in the file."""
        super().load_state(tensors)
        mine = self.modules_to_save._parameters.get("weight")
        self._tie()
        tied = self.modules_to_save._parameters.get("weight")
        if mine is not tied and mine is not None and tied is not None and not torch.equal(mine, tied):
            raise CheckpointMismatchError(
                f"{self.layer.path}.weight: the config says that it is tied to another saved module's, and the file "
                "holds two that differ; untie them in the config to load both"
            )

    @staticmethod
    def _copy(layer: BaseLayer) -> nn.Module:
        memo: dict[int, Any] = {}
        for tensor in layer.module.parameters():
            if tensor.is_meta and layer.device.type != "meta":
                raise layer.refuse(
                    "its weights are offloaded, so that a trainable copy would be written over at each call; load the "
                    "model with this module on a device (device_map)"
                )
            dtype = layer.dtype if tensor.is_floating_point() else tensor.dtype
            value = (
                torch.empty_like(tensor, device="meta", dtype=dtype)
                if layer.device.type == "meta"
                else (tensor.detach().clone().to(dtype))
            )
            memo[id(tensor)] = nn.Parameter(value, requires_grad=value.is_floating_point())
        try:
            return copy.deepcopy(layer.module, memo)
        except Exception as error:
            raise layer.refuse(
                f"it cannot be copied for training ({error}); make its weights plain parameters first "
                "(remove_weight_norm, prune.remove), or leave it out of modules_to_save"
            ) from error

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        own = dict(self.layer.module.named_parameters(remove_duplicate=False))
        params = dict(self.modules_to_save.named_parameters(remove_duplicate=False))
        if all(parameter.dtype == own[name].dtype for name, parameter in params.items()):
            return self.modules_to_save(*args, **kwargs)
        cast = {name: as_compute(parameter, own[name]) for name, parameter in params.items()}
        return shadowed(self.modules_to_save, cast)(*args, **kwargs)

    def merge(self, params: Params) -> Params:
        # Read as the module itself is: the weight with its output rows first.
        trained = layer_of(self.modules_to_save, SiteRequest(self.layer.path)).params()
        own = dict(self.layer.module.named_buffers(remove_duplicate=False))
        buffers = self.modules_to_save.named_buffers(remove_duplicate=False)
        return {
            **{name: as_compute(parameter, params[name]) for name, parameter in trained.items()},
            **{name: buffer for name, buffer in buffers if not torch.equal(buffer, own[name])},
        }

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {slot.removeprefix("modules_to_save."): where for slot, where in super().slots().items()}


def saved_module_requests(paths: list[str]) -> list[SiteRequest]:
    """One request per module to copy."""
    return [SiteRequest(path, copied=True) for path in paths]
