"""Promises about training: gradients reach the adapter, are right, and reach nothing else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check
from .models import token_ids
from .setup import Setup, record, trained


class Gradients(Setup):
    """One method in training."""

    def test_gradients_reach_the_adapter_alone(self) -> None:
        """Backward fills every trained tensor, and no tensor of the base."""
        model = self.adapted()
        backward(self.call(model, token_ids()))
        parameters = trained(model, "a")
        check(
            parameters,
            "an adapter has something to train",
            "no trained tensor",
            "Adapter.__init__, peft_prepare",
        )
        missing = without_gradient(model, self.unused)
        missing += [name for name, p in parameters.items() if p.grad is not None and not p.grad.any()]
        check(
            not missing,
            "gradients reach every trained tensor of the adapter",
            f"none, zero or not finite: {missing}",
            "Adapter.forward: a tensor that is not used, or a .detach() / no_grad on its way; a tensor that is "
            "never trained is marked with requires_grad_(False) in __init__; one that only later layers use is named "
            "in `unused`",
        )
        used = {name for name, p in parameters.items() if p.grad is not None}
        unknown = [name for name in self.unused if not name.startswith("layer.") and name not in parameters]
        check(
            not unknown and used.isdisjoint(self.unused),
            "`unused` names trained tensors that get no gradient",
            f"with gradients: {sorted(used & set(self.unused))}; not among the trained tensors: {unknown}",
            f"`unused`: take the names out; the trained tensors are {sorted(parameters)}",
        )
        leaked = [name for name, p in base_parameters(model) if p.requires_grad or p.grad is not None]
        check(
            not leaked,
            "no tensor of the base trains",
            f"with gradients: {leaked}",
            "peft_build / peft_prepare: base parameters registered with, or switched on by, the adapter",
        )

    def test_gradients_are_the_derivative(self) -> None:
        """Gradients agree with finite differences along a random direction of all trained tensors."""
        if not self.exact_gradients:
            return
        # Without the padding token: an embedding's row for it acts, and by torch's rule never gets a gradient.
        model, x = self.adapted(), token_ids(padding=False)
        parameters = list(trained(model, "a").values())
        backward(self.call(model, x))
        generator = torch.Generator().manual_seed(7)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        by_autograd = sum(
            float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None
        )
        # Central differences: an error of step² = 1e-10 from the maths, of 1e-16/step = 1e-11 from rounding.
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * step)
                values.append(float(loss(self.call(model, x))))
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * step)
        by_difference = (values[0] - values[1]) / (2 * step)
        check(
            abs(by_autograd - by_difference) <= 1e-5 * max(1.0, abs(by_difference)),
            "gradients are the derivative of what the forward computes",
            f"autograd says {by_autograd:.8g}, finite differences say {by_difference:.8g}",
            "Adapter.forward: a custom backward, a .detach(), or a cast to float32 (it rounds too much; cast "
            "to the dtype of x or of the tensor); if detaching is the method's design, set `exact_gradients = False`",
        )


def without_gradient(model: nn.Module, unused: Collection[str] = ()) -> list[str]:
    """Names of the trained tensors whose gradient is missing or not finite; those of `unused` may be missing."""
    return [
        name
        for name, p in trained(model, "a").items()
        if not (name in unused if p.grad is None else bool(p.grad.isfinite().all()))
    ]


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an adapted model that are not the adapter's, by the names they have in the base.

    Those of adapters that its config refers to are its own where it trains them.
    """
    config = record(model, "a").config
    names = ("a", *config.refers_to()) if config.trains_referred else ("a",)
    own = {id(parameter) for name in names for parameter in trained(model, name).values()}
    return [(name.replace(".base_layer.", "."), p) for name, p in model.named_parameters() if id(p) not in own]


def loss(output: Tensor) -> Tensor:
    """A scalar in which every output has a weight of its own."""
    generator = torch.Generator().manual_seed(3)
    return (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)).sum()


def backward(output: Any) -> None:
    """Gradients of that scalar."""
    torch.autograd.backward(loss(output))
