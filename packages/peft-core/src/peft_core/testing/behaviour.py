"""Promises about what an active, inactive, stacked or mixed adapter does to the model's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_core.adapter_file import all_finite
from peft_core.errors import RequestError
from peft_core.routing import BASE
from peft_core.site import Site

from .checks import check, gap, refused, same
from .models import token_ids
from .setup import Setup, record, state, tensors, uninitialised_is_nan, weights


class Behaviour(Setup):
    """One method on a model that has a layer of every kind."""

    def test_start_equals_base(self) -> None:
        """A new adapter leaves the model's function as it was, or the method says that it does not."""
        x = token_ids()
        expected = self.run(self.fresh(), x)
        model = self.adapted(random=False)
        if all(adapter.starts_as_base for adapter in record(model, "a").adapters):
            difference = gap(self.run(model, x), expected)
            check(
                difference <= self.tolerance,
                "an adapter at its start leaves the base's output unchanged",
                f"outputs differ by {difference:.2g} of the largest value",
                "Adapter.reset_parameters (start values); or set `starts_as_base = False` on the adapter's class",
            )

    def test_every_tensor_gets_a_start(self) -> None:
        """No tensor of a new adapter is left as it was allocated, with whatever the memory held."""
        with uninitialised_is_nan():
            model = self.adapted(random=False)
        owner = record(model, "a")
        left = [
            f"{request.path or 'the model'}.{slot}"
            for request, adapter in zip(owner.requests, owner.adapters, strict=True)
            for slot, tensor in adapter.state().items()
            if not all_finite(tensor)
        ]
        left += [f"shared.{name}" for name, tensor in owner.shared.state_dict().items() if not all_finite(tensor)]
        check(
            not left,
            "every tensor of a new adapter has a starting value",
            f"left as allocated, or not finite: {left}",
            "Adapter.reset_parameters: `layer.parameter(...)` is memory without values; peft_prepare for shared ones",
        )

    def test_active_adapter_changes_the_output(self) -> None:
        """An adapter with trained values acts."""
        x = token_ids()
        difference = gap(self.run(self.adapted(), x), self.run(self.fresh(), x))
        check(
            1e-6 < difference < float("inf"),
            "an active adapter with random values gives another, finite output than the base",
            f"outputs differ by {difference:.2g} of the largest value",
            "Adapter.forward: does it use the adapter's tensors, and return its result?",
        )

    def test_disabled_is_the_base(self) -> None:
        """Switching adapters off gives the base, bit for bit; switching on gives the adapter again."""
        x = token_ids()
        expected = self.run(self.fresh(), x)
        model = self.adapted()
        active = self.run(model, x)
        with model.disable_adapter():
            off = self.run(model, x)
            with model.disable_adapter():
                nested = self.run(model, x)
            still = self.run(model, x)
        check(
            same(off, expected) and same(nested, expected) and same(still, expected),
            "inside `disable_adapter()` the model computes the base bit for bit",
            f"outputs differ by {max(gap(out, expected) for out in (off, nested, still)):.2g}",
            "peft_build / Adapter.__init__: an adapter must not write into the base layer",
        )
        check(
            same(self.run(model, x), active),
            "after `disable_adapter()` the adapter acts as before",
            "the output changed",
            "Adapter.forward: state kept between calls",
        )

    def test_forward_keeps_nothing(self) -> None:
        """A call in eval mode leaves nothing behind that a later call could see."""
        model = self.adapted()
        before = tensors(model, "a")
        first = self.run(model, token_ids())
        self.run(model, token_ids(rows=3, seed=5))
        again = self.run(model, token_ids())
        check(
            same(first, again),
            "the same input gives the same output, whatever was computed in between",
            f"the second output differs by {gap(again, first):.2g}",
            "Adapter.forward: it must not keep state on the adapter, nor draw random numbers in eval mode",
        )
        after = tensors(model, "a")
        changed = [name for name in before if not same(before[name], after[name])]
        check(
            not changed,
            "a forward in eval mode writes into no tensor of the adapter",
            f"changed: {changed}",
            "Adapter.forward: in-place operations (add_, copy_ ...)",
        )

    # -- several adapters ------------------------------------------------------------------------------------

    def test_switch_stack_delete(self) -> None:
        """Adapters of one method live side by side: each acts alone, several act together, one goes without a
        trace."""
        x = token_ids()
        fresh = self.fresh()
        base, others, sites = self.run(fresh, x), list(getattr(fresh, "peft_config", ())), _sites(fresh)
        alone = {name: self.run(self.adapted(name), x) for name in ("a", "b")}
        model = self.adapted("a", "b")
        for name in ("b", "a"):
            model.set_adapter(name)
            difference = gap(self.run(model, x), alone[name])
            check(
                difference <= self.tolerance,
                "an adapter computes the same whether or not others are on the model",
                f"{name!r} beside another adapter differs by {difference:.2g} from {name!r} alone",
                "peft_prepare / Adapter.__init__: state shared between adapters of different names",
            )
        model.set_adapter(["a", "b"])
        stacked = self.run(model, x)
        closest = min(gap(stacked, other) for other in (alone["a"], alone["b"], base))
        check(
            closest > 1e-6,
            "two active adapters both act",
            f"the output of both is within {closest:.2g} of that of one, or none",
            "Adapter.forward: the result of `base(...)` must be used",
        )
        model.set_adapter("a")
        model.delete_adapter("b")
        check(
            gap(self.run(model, x), alone["a"]) <= self.tolerance and list(model.peft_config) == [*others, "a"],
            "deleting an adapter leaves the others as they were",
            f"the output differs by {gap(self.run(model, x), alone['a']):.2g}; adapters: {list(model.peft_config)}",
            "peft_prepare: state shared between adapters of different names",
        )
        model.delete_adapter("a")
        left = sorted(_sites(model) - sites)
        check(
            same(self.run(model, x), base) and not left,
            "after the last adapter is deleted the model is the base, bit for bit",
            f"the output differs by {gap(self.run(model, x), base):.2g}; sites left: {left}",
            "peft_build / Adapter.__init__: an adapter must not write into the base layer",
        )

    def test_start_leaves_other_adapters_alone(self) -> None:
        """An adapter that does nothing yet does nothing to the adapters it is stacked with."""
        x = token_ids()
        model = self.adapted("a")
        expected = self.run(model, x)
        with torch.random.fork_rng(devices=[]):
            model.add_adapter("new", self.configure(self.targets()))
        model.eval()
        model.set_adapter("new")
        alone = self.run(model, x)
        for order in (["a", "new"], ["new", "a"]):
            model.set_adapter(order)
            out = self.run(model, x)
            look = (
                "Adapter.forward / merge: start from `base(...)` or `base.params()`, never from the layer's own "
                "weights or module, or the adapters further in are lost"
            )
            check(
                gap(out, alone) > 1e-6,
                "an adapter stacked with another does not silence it",
                f"stacked as {order} the output is within {gap(out, alone):.2g} of that of 'new' alone",
                look,
            )
            starts = all(adapter.starts_as_base for adapter in record(model, "new").adapters)
            check(
                gap(out, expected) <= self.tolerance or not (starts and self.neutral_at_start),
                "an adapter at its start, stacked with another, leaves the other's output unchanged",
                f"stacked as {order} the output differs by {gap(out, expected):.2g} from 'a' alone",
                look + "; if the start depends on the layer's weights by design, set `neutral_at_start = False`",
            )

    def test_mixed_rows(self) -> None:
        """One adapter per row gives each row what a run of its own gives, or the method refuses."""
        x = token_ids()
        names = ["b", "a", BASE, "b"]
        model = self.adapted("a", "b")
        if not all(adapter.rowwise for adapter in record(model, "a").adapters):
            with refused(
                RequestError,
                "a method whose rows depend on each other refuses `adapter_names`",
                "`rowwise` on the adapter's class",
            ):
                model(x, adapter_names=names, **self.call_arguments(len(names)))
            return
        mixed = self.run(model, x, adapter_names=names)
        expected = self.run(self.fresh(), x)
        for name in ("a", "b"):
            model.set_adapter(name)
            rows = [index for index, wanted in enumerate(names) if wanted == name]
            expected[rows] = self.run(model, x)[rows]
        difference = gap(mixed, expected)
        check(
            difference <= self.tolerance,
            "with `adapter_names`, each row comes out as in a run with its adapter alone",
            f"rows differ by {difference:.2g}",
            "Adapter.forward: does a row depend on the other rows (a mean over the batch)? Then set `rowwise = "
            "False` on the adapter's class",
        )

    # -- leaving ---------------------------------------------------------------------------------------------

    def test_unload_gives_the_base_back(self) -> None:
        """`unload` returns the very model that came: modules, weights, modes and trainability."""
        base = self.base()
        base.train()
        base.blocks[0].eval()
        base.head.requires_grad_(False)
        kind, before = type(base), _looks(base)
        saved = weights(base)
        self.prepare(base, self.targets())
        model = self.adapted(base=base)
        model.train()
        base.blocks[0].eval()
        self.call(model, token_ids())
        model.unload()
        check(
            type(base) is kind and not hasattr(base, "_peft"),
            "`unload` gives the model its own class back",
            f"{type(base).__name__}",
            "the core",
        )
        after = _looks(base)
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        check(
            not changed,
            "`unload` leaves modules, train/eval modes and requires_grad as they came",
            f"changed: {sorted(changed)}",
            "peft_prepare / Adapter.__init__: changes of the base",
        )
        rewritten = [name for name, tensor in weights(base).items() if not same(tensor, saved[name])]
        check(
            not rewritten,
            "`unload` leaves the base's weights as they came, bit for bit",
            f"changed: {rewritten}",
            "peft_prepare / Adapter.__init__ / forward: writes into the base",
        )

    def test_config_is_left_alone(self) -> None:
        """The config object the user passed is read, never written."""
        config = self.configure(self.targets())
        before = config.to_json()
        model = self.adapted(config=config)
        self.run(model, token_ids())
        check(
            config.to_json() == before and state(model).record("a").config is not None,
            "using a config does not change it",
            f"before {before}, after {config.to_json()}",
            "peft_prepare / peft_build",
        )


def _sites(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Site)}


def _looks(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {f"module {name}": (id(m), m.training) for name, m in model.named_modules()}
    return found | {f"parameter {name}": (id(p), p.requires_grad) for name, p in model.named_parameters()}
