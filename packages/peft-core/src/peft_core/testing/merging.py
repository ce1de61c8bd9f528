"""Promises about folding an adapter into the base weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_core import hook_results
from peft_core.errors import MergeError

from .checks import check, gap, promised, refused, same
from .models import token_ids
from .setup import Setup, record, state, weights


class Merging(Setup):
    """Merge computes the same, unmerge is exact; or the method says clearly that it cannot be merged."""

    def test_merge_and_unmerge(self) -> None:
        """Merged weights compute what the adapter computed; unmerging gives back every bit."""
        x = token_ids()
        model = self.adapted("a", "b")
        before, expected = weights(model), self.run(model, x)
        if not self.mergeable:
            with refused(MergeError, "a method that cannot be merged refuses with MergeError", "Adapter.merge"):
                model.merge_adapter(**self.merge_arguments())
            _check_weights(model, before, "a refused merge leaves every weight as it was")
            check(
                same(self.run(model, x), expected),
                "a refused merge changes no output",
                "the output changed",
                "Adapter.merge",
            )
            return
        for names in (["a"], ["a", "b"], ["b", "a"]):
            model.set_adapter(names)
            expected = self.run(model, x, merging=True)
            look = "Adapter.merge; or set `mergeable = False`, or leave modules that cannot be merged out (`left_out`)"
            self.merge(model, f"adapters stacked as {names} merge", look)
            difference = gap(self.run(model, x, merging=True), expected)
            check(
                difference <= self.tolerance or not self.merges_exactly(model),
                f"merged weights compute what the adapters {names} computed",
                f"outputs differ by {difference:.2g}",
                "Adapter.merge / weight_delta against Adapter.forward / delta: scaling, transposition, order; a "
                "forward of a DeltaAdapter's subclass that differs from base + delta",
            )
            model.unmerge_adapter()
            _check_weights(model, before, "unmerging gives back the base's weights bit for bit")
            again = self.run(model, x, merging=True)
            check(
                same(again, expected),
                "after unmerging the adapters compute as before, bit for bit",
                f"outputs differ by {gap(again, expected):.2g}",
                "Adapter.merge: it must not write into the adapter",
            )

    def test_merge_writes_nothing(self) -> None:
        """`merge` returns new tensors: those it is given may be the base's own."""
        if not self.mergeable:
            return
        model = self.adapted()
        for request, adapter in zip(record(model, "a").requests, record(model, "a").adapters, strict=True):
            given = {name: tensor.detach().clone() for name, tensor in adapter.layer.params().items()}
            kept = {name: tensor.clone() for name, tensor in given.items()}
            with torch.no_grad(), promised("the method merges", "peft_merge / Adapter.merge"):
                merged = self._merge(model, adapter, dict(given))
            written = [name for name in given if not same(given[name], kept[name])]
            check(
                not written,
                "`merge` never writes into the tensors it is given",
                f"{request.path}: {written} changed in place",
                "Adapter.merge / peft_merge: return new tensors, {**params, 'weight': ...}; no add_, mul_, copy_",
            )
            wrong = [n for n, t in merged.items() if n not in kept or t.shape != kept[n].shape]
            check(
                not wrong,
                "`merge` returns weights of the layer's own names and shapes",
                f"{request.path}: {wrong} among {sorted(merged)}",
                "Adapter.merge / peft_merge",
            )

    def test_merge_and_unload(self) -> None:
        """`merge_and_unload` leaves a plain model that computes what the adapted one did."""
        if not self.mergeable:
            return
        x = token_ids()
        base = self.fresh()
        kind, names = type(base), [name for name, _ in base.named_modules()]
        model = self.adapted(base=base)
        expected = self.run(model, x, merging=True)
        approximate = not self.merges_exactly(model)
        self.merge(model, "the adapter merges", "Adapter.merge; or set `mergeable = False`")
        plain = model.merge_and_unload()
        difference = gap(self.run(plain, x), expected)
        check(
            plain is base and type(base) is kind and [name for name, _ in base.named_modules()] == names,
            "`merge_and_unload` gives the plain base model back",
            f"{type(plain).__name__} with modules {[name for name, _ in plain.named_modules()]}",
            "peft_prepare / Adapter.__init__: modules added to the base",
        )
        check(
            difference <= self.tolerance or approximate,
            "`merge_and_unload` computes what the adapted model computed",
            f"outputs differ by {difference:.2g}",
            "Adapter.merge",
        )

    def test_unmerge_is_exact_in_bfloat16(self) -> None:
        """Rounding on the way in loses nothing on the way out."""
        if not self.mergeable:
            return
        model = self.adapted(base=self.fresh(torch.bfloat16))
        before = weights(model)
        for _ in range(2):
            self.merge(model, "the adapter merges into a bfloat16 base", "Adapter.merge: dtypes that differ")
            model.unmerge_adapter()
        _check_weights(model, before, "unmerging a bfloat16 base is exact, however often")

    def _merge(self, model: nn.Module, adapter: Any, params: dict[str, Any]) -> dict[str, Any]:
        owner = state(model).record("a")
        merged: dict[str, Any] = hook_results.call(
            owner.method,
            "peft_merge",
            config=owner.config,
            adapter=adapter,
            params=params,
            arguments=self.merge_arguments(),
        )
        return merged


def _check_weights(model: Any, before: dict[str, Any], promise: str) -> None:
    __tracebackhide__ = True
    after = weights(model)
    changed = [name for name in before if not same(before[name], after[name])]
    check(not changed, promise, f"changed: {changed}", "Adapter.merge / peft_merge: in-place operations")
