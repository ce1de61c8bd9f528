"""Promises about single layers: every kind the method adapts, with every hyper-parameter; every other kind
refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_core.errors import MergeError, TargetError
from peft_core.link import Link
from peft_core.model import get_peft_model
from peft_core.routing import BASE
from peft_core.site import Site

from .catalogue import CASES, KINDS, ROWS, Case
from .checks import check, flat, gap, kinds, promised, refused, same
from .gradients import base_parameters, without_gradient
from .models import Holder, TinyNet, seeded
from .setup import Setup, record, weights

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Layers(Setup):
    """One method on one layer at a time."""

    def test_layer_kinds_exist(self) -> None:
        """The suite's attributes name things the suite has."""
        wrong = [
            name
            for given, known in (
                (self.layer_kinds, KINDS),
                (self.refused_cases, CASES.keys() | {"transformers-conv1d"}),
                (self.unmergeable_cases, CASES.keys() | {"transformers-conv1d"}),
                (self.left_out, {path for paths in TinyNet.kinds.values() for path in paths}),
            )
            for name in given
            if name not in known
        ]
        check(
            not wrong,
            "layer_kinds, refused_cases, unmergeable_cases and left_out name what the suite has",
            f"unknown: {wrong}; kinds: {sorted(KINDS)}",
            "peft_core.testing.KINDS, peft_core.testing.CASES, peft_core.testing.TinyNet.kinds",
        )

    @every_case
    def test_layer(self, case: Case) -> None:
        """Start, action, forward and gradients on one layer; or a refusal that leaves the model alone."""
        if not self._adapts(case):
            if "model" not in self.layer_kinds:
                self._check_refused(case)
            return
        if self._cannot_be_called(case):
            return
        layer, (args, kwargs) = seeded(case.make), case.inputs()
        expected = self.run(layer, *args, **kwargs)
        model = self._adapt(case, random=False)
        starts = all(adapter.starts_as_base for adapter in record(model, "a").adapters)
        start = self.run(model, *args, rows=case.rows, **kwargs)
        look = "Adapter.forward: shapes, and the layer's own hyper-parameters"
        check(
            [(t.shape, t.dtype) for t in flat(start)] == [(t.shape, t.dtype) for t in flat(expected)],
            f"{case.name}: the output has the shape and dtype of the base's",
            f"{kinds(start)}, and the base's is {kinds(expected)}",
            look,
        )
        check(
            gap(start, expected) <= self.tolerance or not starts,
            f"{case.name}: an adapter at its start leaves the layer's output unchanged",
            f"outputs differ by {gap(start, expected):.2g}",
            f"Adapter.reset_parameters; {look}",
        )
        self.fill(model, "a")
        out = self.run(model, *args, rows=case.rows, **kwargs)
        empty = not any(tensor.numel() for tensor in flat(expected))
        check(
            empty or 1e-6 < gap(out, expected) < float("inf"),
            f"{case.name}: an adapter with random values acts",
            f"outputs differ by {gap(out, expected):.2g}",
            look,
        )
        self._check_forward_in_force(model, case, out)
        if not empty:
            self._check_gradients(model, case)

    @every_case
    def test_layer_merges(self, case: Case) -> None:
        """On one layer, merged weights compute what the adapter computes and unmerging is exact, or merging
        is refused."""
        if not self._adapts(case) or self._cannot_be_called(case):
            return
        args, kwargs = case.inputs()
        model = self._adapt(case)

        def run() -> Any:
            return self.run(model, *args, rows=case.rows, merging=True, **kwargs)

        before, expected = weights(model), run()
        if not self.mergeable or case.name in self.unmergeable_cases:
            with refused(
                MergeError,
                f"{case.name}: what cannot be merged is refused with MergeError",
                "Adapter.merge / peft_merge",
            ):
                model.merge_adapter(**self.merge_arguments())
            difference = gap(run(), expected)
        else:
            look = f"Adapter.merge; or list {case.name!r} in `unmergeable_cases`, or set `mergeable = False`"
            self.merge(model, f"{case.name}: the adapter merges", look)
            difference = gap(run(), expected)
            model.unmerge_adapter()
        check(
            difference <= self.tolerance or not self.merges_exactly(model),
            f"{case.name}: merged weights compute what the adapter computed; after a refusal it goes on acting",
            f"outputs differ by {difference:.2g}",
            "Adapter.merge / weight_delta against Adapter.forward / delta: scaling, transposition, groups, bias",
        )
        changed = [name for name, tensor in weights(model).items() if not same(tensor, before[name])]
        check(
            not changed,
            f"{case.name}: unmerging, or a refusal, leaves every weight as it was, bit for bit",
            f"changed: {changed}",
            "Adapter.merge / peft_merge: in-place operations",
        )

    @every_case
    def test_layer_mixed_rows(self, case: Case) -> None:
        """On one layer, one adapter per row gives each row what a run of its own gives."""
        if not self._adapts(case) or case.rows is None:
            return
        model = self._adapt(case, "a", "b")
        if not all(adapter.rowwise for adapter in record(model, "a").adapters):
            return
        args, kwargs = case.inputs()
        names = ["b", "a", BASE, "b"]
        with promised(f"{case.name}: adapters can be chosen per row", "Adapter.forward; or set `rowwise = False`"):
            mixed = flat(self.run(model, *args, rows=case.rows, adapter_names=names, **kwargs))
        alone: dict[str, Any] = {BASE: flat(self.run(seeded(case.make), *args, **kwargs))}
        for name in ("a", "b"):
            model.set_adapter(name)
            alone[name] = flat(self.run(model, *args, rows=case.rows, **kwargs))
        worst = 0.0
        for position, out in enumerate(mixed):
            axis = 0 if out.shape[0] == ROWS else 1
            for row, name in enumerate(names):
                worst = max(worst, gap(out.select(axis, row), alone[name][position].select(axis, row)))
        check(
            worst <= self.tolerance,
            f"{case.name}: with `adapter_names`, each row comes out as in a run with its adapter alone",
            f"rows differ by {worst:.2g}",
            "Adapter.forward: does a row depend on the other rows? Then set `rowwise = False` on the adapter's class",
        )

    # -- parts -----------------------------------------------------------------------------------------------

    def _adapts(self, case: Case) -> bool:
        return case.kind in self.layer_kinds and case.name not in self.refused_cases

    def _cannot_be_called(self, case: Case) -> bool:
        """Request arguments have an entry per row of the batch, and this input has no rows."""
        return case.rows is None and bool(self.call_arguments(ROWS))

    def _adapt(self, case: Case, *names: str, random: bool = True) -> Any:
        holder = Holder(seeded(case.make)).eval()
        self.prepare(holder, ["layer"])
        return self.adapted(
            *names,
            base=holder,
            random=random,
            config=self.configure(["layer"]),
            look=f"peft_build; or leave {case.kind!r} out of `layer_kinds`, or list {case.name!r} in `refused_cases`",
        )

    def _check_refused(self, case: Case) -> None:
        model = Holder(seeded(case.make))
        try:
            self.prepare(model, ["layer"])
        except TargetError:
            return  # what the method builds on refuses it
        kind, inner, before = type(model), model.layer, weights(model)
        with refused(
            TargetError,
            f"{case.name}: a layer the method does not adapt is refused with TargetError",
            "peft_build: raise layer.refuse(reason); or add the kind to `layer_kinds`",
        ):
            get_peft_model(model, self.configure(["layer"]))
        check(
            model.layer is inner and type(model) is kind and same(weights(model), before),
            f"{case.name}: a refusal leaves the model as it was",
            f"the model is now {model}",
            "peft_prepare / Adapter.__init__: changes of the base before the refusal",
        )

    def _check_forward_in_force(self, model: Any, case: Case, out: Any) -> None:
        """The site may take a shorter way than `forward`; both must agree, and both are the method's."""
        site = model.layer
        adapters = record(model, "a").adapters
        if len(adapters) != 1 or not isinstance(site, Site) or not adapters[0].additive:
            return  # the site itself calls `forward`
        (adapter,) = adapters
        args, kwargs = case.inputs()
        with torch.no_grad(), promised(f"{case.name}: the adapter's `forward` runs", "Adapter.forward"):
            direct = adapter(Link(site), *args, **kwargs)
        difference = gap(out, direct)
        check(
            difference <= self.tolerance,
            f"{case.name}: the model computes what the adapter's `forward` computes",
            f"outputs differ by {difference:.2g}; the adapter counts as additive",
            "a DeltaAdapter's subclass that overrides `forward` but is marked additive, or whose `accumulate` is "
            "not out + delta(x): derive from Adapter, or let delta say everything",
        )

    def _check_gradients(self, model: Any, case: Case) -> None:
        __tracebackhide__ = True
        args, kwargs = case.inputs()
        output = self.call(model, *args, rows=case.rows, **kwargs)
        scalar: Any = sum(
            (tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).sum() for tensor in flat(output)
        )
        with promised(f"{case.name}: backward runs", "Adapter.forward: a custom backward, in-place operations"):
            scalar.backward()
        missing = without_gradient(model, self.unused)
        check(
            not missing,
            f"{case.name}: gradients reach every trained tensor of the adapter",
            f"none or not finite: {missing}",
            "Adapter.forward: a tensor that is not used, or a .detach() on its way; `unused`",
        )
        leaked = [name for name, p in base_parameters(model) if p.grad is not None]
        check(
            not leaked,
            f"{case.name}: no tensor of the base trains",
            f"with gradients: {leaked}",
            "Adapter.__init__",
        )
