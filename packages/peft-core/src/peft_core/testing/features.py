"""Promises about living with torch: checkpointing, half precision, compile; and about imports."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from peft_core.discovery import METHODS, entries
from peft_core.planned import plan

from .checks import check, flat, gap, promised
from .gradients import backward, without_gradient
from .models import token_ids
from .setup import Setup, copy_tensors, trained

HEAVY = (
    "transformers",
    "accelerate",
    "huggingface_hub",
    "peft",
    "datasets",
    "bitsandbytes",
    "scipy",
    "pandas",
)


@contextmanager
def _without_traces() -> Iterator[None]:
    """pytest would put the compiler's records of itself, hundreds of empty lines, in front of a failure's message."""
    log = logging.getLogger("torch.__trace")
    ours = [handler for handler in log.handlers if type(handler).__module__.partition(".")[0] == "_pytest"]
    for handler in ours:
        log.removeHandler(handler)
    try:
        yield
    finally:
        for handler in ours:
            log.addHandler(handler)


class Features(Setup):
    """One method under the tools people use."""

    @pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
    def test_checkpointing(self, kind: str) -> None:
        """Activation checkpointing changes no gradient."""
        plain, twin = self.adapted(), self.adapted()
        twin.checkpointing = kind
        grads = []
        for model in (plain, twin):
            with promised(f"forward and backward run under {kind} checkpointing", "Adapter.forward"):
                backward(self.call(model, token_ids()))
            # Through the reentrant kind no gradient comes out at the model's start: the embedding gets none.
            grads.append({n: p.grad for n, p in trained(model, "a").items() if not n.startswith("embedding.")})
        missing = [name for name, grad in grads[0].items() if grad is not None and grads[1][name] is None]
        worst = max((gap(grads[1][n], grad) for n, grad in grads[0].items() if grads[1][n] is not None), default=0.0)
        check(
            not missing and worst <= self.tolerance,
            f"gradients under {kind} checkpointing are those without",
            f"missing: {missing}; the others differ by {worst:.2g}",
            "Adapter.forward: it runs twice, so it must not depend on how often it ran, nor keep state",
        )

    def test_bfloat16_base(self) -> None:
        """On a half-precision base the adapter stays float32 and computes in the base's dtype."""
        x = token_ids()
        model = self.adapted(base=self.fresh(torch.bfloat16))
        wrong = {name: p.dtype for name, p in trained(model, "a").items() if p.dtype != torch.float32}
        check(
            not wrong,
            "trained tensors on a bfloat16 base are float32",
            f"{wrong}",
            "Adapter.__init__: allocate with layer.parameter(...)",
        )
        with promised("forward and backward run on a bfloat16 base", "Adapter.forward: as_compute(tensor, x)"):
            out = self.call(model, x)
            backward(out)
        check(
            out.dtype == torch.bfloat16 and bool(out.isfinite().all()),
            "the output of a bfloat16 base stays bfloat16 and finite",
            f"{out.dtype}, finite: {bool(out.isfinite().all())}",
            "Adapter.forward: cast the adapter's tensors to the dtype of x or of the output, never the other way",
        )
        bad = without_gradient(model, self.unused)
        bad += [n for n, p in trained(model, "a").items() if p.grad is not None and p.grad.dtype != torch.float32]
        check(not bad, "gradients on a bfloat16 base are float32 and finite", f"{bad}", "Adapter.forward")
        # The same numbers in float64, also those that do not train: draws differ between dtypes. A unit of bfloat16
        # is 2⁻⁸; a dozen roundings, which partly cancel, are allowed.
        exact = self.adapted(base=self.fresh(torch.bfloat16).double())
        copy_tensors(model, exact)
        difference = gap(out, self.run(exact, x))
        check(
            difference <= 12 * 2**-8,
            "on a bfloat16 base the adapter computes the same, up to bfloat16's rounding",
            f"outputs differ by {difference:.2g} of the largest value",
            "Adapter.forward: sums of many terms in bfloat16, differences of large numbers",
        )

    def test_autocast(self) -> None:
        """Under autocast a float32 base and adapter run, forward and backward."""
        model = self.adapted(base=self.fresh(torch.float32))
        with promised(
            "forward and backward run under autocast", "Adapter.forward: dtypes that differ within a product"
        ):
            with torch.autocast("cpu", torch.bfloat16):
                out = self.call(model, token_ids())
            backward(out.float())
        bad = without_gradient(model, self.unused)
        check(not bad, "gradients under autocast are there and finite", f"{bad}", "Adapter.forward")

    def test_compile(self) -> None:
        """`torch.compile(fullgraph=True)` makes one graph that computes the same, forward and backward."""
        eager, twin = self.adapted(), self.adapted()
        torch._dynamo.reset()
        try:
            with (
                _without_traces(),
                promised(
                    "the adapted model compiles into one graph",
                    "Adapter.forward: Python that depends on tensor values, attributes written in forward, foreign "
                    "code",
                ),
            ):
                compiled: Any = torch.compile(twin, fullgraph=True, backend="aot_eager")
                x = token_ids()
                arguments = self.arguments(twin, (x,), None)
                outs = [model(x, **arguments) for model in (eager, compiled)]
                for out in outs:
                    backward(out)
        finally:
            torch._dynamo.reset()
        grads = [{n: p.grad for n, p in trained(model, "a").items()} for model in (eager, twin)]
        worst = max(gap(outs[1], outs[0]), *(gap(flat(grads[1][n]), flat(grad)) for n, grad in grads[0].items()))
        check(
            worst <= self.tolerance,
            "the compiled model computes what the eager one does, gradients included",
            f"they differ by {worst:.2g}",
            "Adapter.forward: a custom autograd function, in-place operations",
        )

    def test_plan_counts(self) -> None:
        """`plan` says beforehand, without allocating anything, how many parameters will train."""
        config = self.configure(self.targets())
        with promised("the method can be planned on the meta device", "peft_build: device of what it allocates"):
            planned = plan(self.fresh().to("meta"), config)
        seen = sum(p.numel() for p in trained(self.adapted(config=config), "a").values())
        check(
            not planned.problems and planned.trainable == seen,
            "the plan of a meta model counts the parameters that will train",
            f"planned {planned.trainable} with problems {list(planned.problems)}, found {seen}",
            "peft_build / peft_prepare: shapes that depend on values; tensors not made with layer.parameter(...)",
        )

    # -- imports ---------------------------------------------------------------------------------------------

    def test_import_isolation(self) -> None:
        """Loading the method imports its own module, no sibling, and nothing heavy."""
        name = type(self.config).peft_type.lower()
        module = next((entry.module for entry in entries(METHODS) if entry.name == name), None)
        if self.plugin is not None or module is None:
            return  # registered at run time: its module is imported already
        done = _loaded_afresh(name, os.pathsep.join(path for path in sys.path if path))
        check(
            done.returncode == 0,
            "the method loads in a fresh interpreter, without a warning",
            done.stderr.strip()[-2000:],
            f"the imports of {module}",
        )
        imported = set(json.loads(done.stdout.splitlines()[-1]))
        heavy = [package for package in HEAVY if package in imported]
        check(
            not heavy,
            "loading a method imports nothing heavy",
            f"imported: {heavy}",
            f"the imports of {module}: move them into the function that needs them",
        )
        others = {entry.module for entry in entries(METHODS)} - {module, *self.siblings}
        siblings = sorted(others & imported)
        check(
            not siblings,
            "loading a method imports no other method, so that a broken one harms nobody else",
            f"imported: {siblings}",
            f"the package's __init__: re-export lazily (PEP 562); the imports of {module}; or name what the method "
            "needs in `siblings`",
        )


@functools.cache
def _loaded_afresh(name: str, path: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that loads a method and lists what that imported; once for all variants of the method."""
    code = (
        "import json, sys; from peft_core import load_method; load_method(sys.argv[1]); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, name],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
