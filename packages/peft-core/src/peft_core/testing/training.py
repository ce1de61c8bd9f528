"""Promises about what a method does while it trains: steps of the optimizer, groups of parameters, terms of the loss.

Nothing is asked of a method that does none of these.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from peft_core.adapter_file import all_finite
from peft_core.model import PeftModel
from peft_core.training import drive

from .checks import check, gap, promised, same
from .gradients import loss
from .models import token_ids
from .setup import Setup, fixed_seed, record, tensors, trained, weights

_STEPS = 3


class Training(Setup):
    """One method under an optimizer."""

    def test_steps(self, tmp_path: Path) -> None:
        """A method with `peft_step` lives through steps of a driven optimizer, and is saved as they left it."""
        model = self.adapted()
        if not record(model, "a").method.hook.peft_step.get_hookimpls():
            return
        before = weights(model)
        optimizer = torch.optim.AdamW([p for p in trained(model, "a").values() if p.requires_grad])
        with promised("a driven optimizer steps", "peft_step, on its events 'before' and 'after'"), fixed_seed("steps"):
            drive(model.train(), optimizer)
            for index in range(_STEPS):
                optimizer.zero_grad()
                torch.autograd.backward(loss(self.call(model, token_ids(seed=index))) + terms(model))
                optimizer.step()
        model.eval()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [name for name, p in trained(model, "a").items() if id(p) not in held]
        check(
            not lost,
            "after steps the optimizer holds every tensor that trains",
            f"not held: {lost}",
            "peft_step: change tensors in place (or their `.data`); a new parameter is unknown to the optimizer",
        )
        odd = [name for name, tensor in tensors(model, "a").items() if not all_finite(tensor)]
        check(not odd, "after steps every tensor of the adapter is finite", f"not finite: {odd}", "peft_step")
        changed = [name for name, tensor in weights(model).items() if not same(tensor, before[name])]
        check(not changed, "steps write nothing into the base", f"changed: {changed}", "peft_step")
        x = token_ids()
        expected = self.run(model, x)
        look = "peft_step: return config.resolve(...) for what files must say; peft_build: shapes by `tensors`"
        with promised("an adapter is saved and loaded after steps", look), fixed_seed("loading"):
            model.save_pretrained(tmp_path)
            fresh = self.fresh()
            PeftModel.from_pretrained(fresh, tmp_path / "a", "a")
        # The same numbers, perhaps in another layout of memory, so up to the order of sums.
        difference = gap(self.run(fresh.eval(), x), expected)
        check(
            difference <= self.tolerance,
            "an adapter loaded after steps computes what the saved one computed",
            f"outputs differ by {difference:.2g}",
            f"state of steps that acts and is not saved; {look}",
        )

    def test_parameter_groups(self) -> None:
        """A method with `peft_param_groups` gives groups that an optimizer takes, with each tensor once."""
        model = self.adapted()
        if not record(model, "a").method.hook.peft_param_groups.get_hookimpls():
            return
        with promised("`parameter_groups(lr, weight_decay)` gives groups that an optimizer takes", "peft_param_groups"):
            groups = model.parameter_groups(lr=1e-3, weight_decay=0.1)
            torch.optim.AdamW(groups)
        wrong = [(g["lr"], g["weight_decay"]) for g in groups if not _usable(g["lr"], g["weight_decay"])]
        check(
            not wrong,
            "learning rates and weight decays are finite numbers, not below 0",
            f"(lr, weight_decay): {wrong}",
            "peft_param_groups",
        )

    def test_loss_terms(self) -> None:
        """Terms of the loss are finite, and have finite gradients."""
        model = self.adapted()
        x = token_ids()
        with promised("a call in training gives the terms of the loss", "Adapter.losses; base.call.add_loss"):
            with fixed_seed("training"):
                self.call(model.train(), x)
            found = model.adapter_losses()
        for name, term in found.items():
            check(
                bool(term.isfinite()),
                "a term of the loss is finite",
                f"{name}: {float(term.detach())}",
                "Adapter.losses / base.call.add_loss: divisions by zero, logarithms",
            )
            parameters = list(trained(model, "a").values())
            grads = (
                torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                if term.requires_grad
                else ()
            )
            check(
                any(grad is not None for grad in grads)
                and all(bool(g.isfinite().all()) for g in grads if g is not None),
                "a term of the loss has a finite gradient for a tensor of the adapter",
                f"{name}: none, or not finite",
                "Adapter.losses / base.call.add_loss: a .detach() / no_grad on its way, square roots at zero",
            )


def terms(model: Any) -> Any:
    """The sum of the terms that the adapters added to the loss of the last call."""
    return sum(model.adapter_losses().values())


def _usable(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 for value in values)
