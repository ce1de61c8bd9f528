"""Promises about living with torch: checkpointing, half precision, compile; with transformers; and with
imports."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from peft_core.discovery import METHODS, entries
from peft_core.planned import plan

from .behaviour import backward
from .checks import check, flat, gap, promised
from .models import TIME, TinyNet, token_ids
from .setup import Setup, record, run, trained

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
                backward(model(token_ids()))
            # Through the reentrant kind no gradient comes out at the model's start: the embedding gets none.
            grads.append({n: p.grad for n, p in trained(model, "a").items() if not n.startswith("embedding.")})
        missing = [name for name, grad in grads[1].items() if grad is None]
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
        model = self.adapted(base=self.base(torch.bfloat16))
        wrong = {name: p.dtype for name, p in trained(model, "a").items() if p.dtype != torch.float32}
        check(
            not wrong,
            "trained tensors on a bfloat16 base are float32",
            f"{wrong}",
            "Adapter.__init__: allocate with layer.parameter(...)",
        )
        with promised("forward and backward run on a bfloat16 base", "Adapter.forward: as_compute(tensor, x)"):
            out = model(x)
            backward(out)
        check(
            out.dtype == torch.bfloat16 and bool(out.isfinite().all()),
            "the output of a bfloat16 base stays bfloat16 and finite",
            f"{out.dtype}, finite: {bool(out.isfinite().all())}",
            "Adapter.forward: cast the adapter's tensors to the dtype of x or of the output, never the other way",
        )
        bad = [
            name for name, p in trained(model, "a").items()
            if p.grad is None or p.grad.dtype != torch.float32 or not p.grad.isfinite().all()
        ]  # fmt: skip
        check(not bad, "gradients on a bfloat16 base are float32 and finite", f"{bad}", "Adapter.forward")
        # The same numbers in float64. A unit of bfloat16 is 2⁻⁸; a dozen roundings, which partly cancel, are
        # allowed.
        exact = self.adapted(base=self.base(torch.bfloat16).double())
        for name, tensor in trained(exact, "a").items():
            tensor.data.copy_(trained(model, "a")[name])
        difference = gap(out, run(exact, x))
        check(
            difference <= 12 * 2**-8,
            "on a bfloat16 base the adapter computes the same, up to bfloat16's rounding",
            f"outputs differ by {difference:.2g} of the largest value",
            "Adapter.forward: sums of many terms in bfloat16, differences of large numbers",
        )

    def test_autocast(self) -> None:
        """Under autocast a float32 base and adapter run, forward and backward."""
        model = self.adapted(base=self.base(torch.float32))
        with promised(
            "forward and backward run under autocast", "Adapter.forward: dtypes that differ within a product"
        ):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(token_ids())
            backward(out.float())
        bad = [n for n, p in trained(model, "a").items() if p.grad is None or not p.grad.isfinite().all()]
        check(not bad, "gradients under autocast are there and finite", f"{bad}", "Adapter.forward")

    def test_compile(self) -> None:
        """`torch.compile(fullgraph=True)` makes one graph that computes the same, forward and backward."""
        eager, twin = self.adapted(), self.adapted()
        torch._dynamo.reset()
        try:
            with promised(
                "the adapted model compiles into one graph",
                "Adapter.forward: Python that depends on tensor values, attributes written in forward, foreign code",
            ):
                compiled: Any = torch.compile(twin, fullgraph=True, backend="aot_eager")
                outs = [model(token_ids()) for model in (eager, compiled)]
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
        config = self.configure(TinyNet.targets(self.layer_kinds))
        with promised("the method can be planned on the meta device", "peft_build: device of what it allocates"):
            planned = plan(self.base().to("meta"), config)
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
        code = (
            "import json, sys; from peft_core import load_method; load_method(sys.argv[1]); "
            "print(json.dumps(sorted(sys.modules)))"
        )
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, name],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
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

    # -- a language model ------------------------------------------------------------------------------------

    def test_language_model(self) -> None:
        """A transformers Llama: generation, rows of their own, gradient checkpointing, merging."""
        if "linear" not in self.layer_kinds or not importlib.util.find_spec("transformers"):
            return
        config = self.configure(["q_proj", "v_proj", "down_proj"])
        model = self.adapted("a", "b", base=_llama(), config=config)
        ids = token_ids(rows=3, seed=2)
        look = "Adapter.forward: it is called with any number of positions, one at a time while generating"
        with promised("an adapted language model generates", look):
            tokens = {"a": _generate(model, ids)}
            model.set_adapter("b")
            tokens["b"] = _generate(model, ids)
            model.set_adapter("a")
        if all(adapter.rowwise for adapter in record(model, "a").adapters):
            mixed = _generate(model, ids, adapter_names=["a", "b", "a"])
            check(
                bool((mixed[0] == tokens["a"][0]).all() and (mixed[1] == tokens["b"][1]).all()),
                "`generate(adapter_names=...)` gives each row the tokens of its own adapter",
                f"{mixed[:2].tolist()} for {[tokens['a'][0].tolist(), tokens['b'][1].tolist()]}",
                look,
            )
        plain = self._gradients(model, ids)
        # The name since transformers 5.24, and the one before.
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(model, name):
                getattr(model, name)({"use_reentrant": False})
                break
        again = self._gradients(model.train(), ids)
        worst = max(gap(again[name], grad) for name, grad in plain.items())
        check(
            worst <= self.tolerance,
            "gradient checkpointing of a language model changes no gradient",
            f"gradients differ by {worst:.2g}",
            "Adapter.forward: it runs twice, so it must not depend on how often it ran",
        )
        if self.mergeable:
            merged = _generate(model.eval().merge_and_unload(), ids)
            check(
                bool((merged == tokens["a"]).all()),
                "a merged language model generates the tokens of the adapted one",
                f"{merged.tolist()} for {tokens['a'].tolist()}",
                "Adapter.merge",
            )

    def _gradients(self, model: Any, ids: torch.Tensor) -> dict[str, Any]:
        model.zero_grad()
        backward(model(ids, use_cache=False).logits)
        return {name: p.grad for name, p in trained(model, "a").items()}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from .models import seeded

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.5,
        attention_bias=True,
        mlp_bias=True,
    )
    return seeded(lambda: LlamaForCausalLM(config))


def _generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Three more tokens for rows of TIME tokens."""
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **kwargs)
    assert out.shape[1] == TIME + 3
    return out
