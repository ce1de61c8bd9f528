"""Data for starts that depend on it: batches run through the model, which comes out of it unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .layers import BaseLayer
from .records import state_of
from .routing import Request


class Batches:
    """What `peft_calibrate` gets: the user's batches, and ways to see the model work on them.

    Iterate for the batches themselves, or over `inputs` or `gradients`; stop at any time. Each batch is a mapping
    of the model's arguments, a tuple of them, or one tensor.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], name: str) -> None:
        self.model = model
        self._batches = batches
        self._name = name
        self._spent = False

    def __iter__(self) -> Iterator[Any]:
        """The user's batches, as they are. Raises `ConfigError` for a second pass over what can be read once only."""
        from tqdm.auto import tqdm

        if isinstance(self._batches, Iterator):
            if self._spent:
                raise ConfigError(
                    f"calibration of adapter {self._name!r} goes over the batches a second time, but they come from a "
                    "generator or another iterator, which can be read once; give a list or a DataLoader (a method that "
                    "needs a batch and its inputs together takes `batches.inputs_of(batch, layers)`)"
                )
            self._spent = True
        yield from tqdm(self._batches, desc=f"Calibrating {self._name}", unit="batch", leave=False, disable=None)

    def run(self, batch: Any) -> Any:
        """The model's output for one batch, without adapters."""
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)

    def inputs(self, layers: Sequence[BaseLayer]) -> Iterator[dict[str, Tensor]]:
        """For each batch, the first argument of each layer's call, by path; without gradients.

        A layer that a batch does not reach is left out; of several calls the last one counts. Where the batch itself is
        needed too (its mask, say), iterate the batches and ask `inputs_of`.
        """
        for batch in self:
            yield self.inputs_of(batch, layers)

    def inputs_of(self, batch: Any, layers: Sequence[BaseLayer]) -> dict[str, Tensor]:
        """The same for one batch."""
        seen: dict[str, Tensor] = {}
        handles = []
        try:
            for layer in layers:
                handles.append(layer.module.register_forward_pre_hook(_keep_input(seen, layer.path), with_kwargs=True))
            with torch.no_grad():
                self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def gradients(
        self, layers: Sequence[BaseLayer], each: Callable[[str, Tensor], None] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """For each batch, the gradient of the model's loss for each layer's weight (out, in), by path.

        With `each`, a gradient is handed over, with its path, as soon as the backward pass has it, and is let go then:
        one is in memory at a time. What is yielded is empty.

        Raises `ConfigError` where the model's output has no loss.
        """
        weights: dict[int, tuple[nn.Parameter, list[BaseLayer]]] = {}
        for layer in layers:
            weight = layer.module.get_parameter("weight")
            weights.setdefault(id(weight), (weight, []))[1].append(layer)
        found: dict[str, Tensor] = {}

        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            for layer in weights[id(weight)][1]:
                value = gradient.t() if getattr(layer, "transposed", False) else gradient
                if each is None:
                    found[layer.path] = value
                else:
                    each(layer.path, value)

        for batch in self:
            found.clear()
            flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            before = [(weight, weight.grad) for weight, _ in weights.values()]
            handles = []
            try:
                for parameter, _ in flags:
                    parameter.requires_grad_(id(parameter) in weights)
                for weight, _ in weights.values():
                    weight.grad = None
                    handles.append(weight.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
                with torch.enable_grad():
                    loss = _loss(self.run(batch))
                    if loss.requires_grad:  # otherwise the batch reached none of the layers
                        loss.backward()  # type: ignore[no-untyped-call]
            finally:
                for handle in handles:
                    handle.remove()
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
                for weight, gradient in before:
                    weight.grad = gradient
            yield dict(found)


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError("calibration needs the model's loss, and its output has none; put labels into the batches")
    return loss


def _keep_input(seen: dict[str, Tensor], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is not None:
            seen[path] = first.detach()

    return hook


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The base alone in eval mode; modes, gradients and `requires_grad` are put back whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    state = state_of(model)
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.grad = None  # a backward would add to the values of those there are
        if state is None:
            yield
        else:
            with state.routing.use(Request()):
                yield
    finally:
        for module, mode in modes:
            module.__dict__["training"] = mode  # past sites, which look where an attribute belongs
        for parameter, flag, gradient in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
