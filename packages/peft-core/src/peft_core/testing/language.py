"""Promises about a language model of transformers: generation, rows of their own, checkpointing, merging."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from .checks import check, gap, promised
from .gradients import backward
from .models import TIME, seeded, token_ids
from .setup import Setup, fixed_seed, record, trained

# What the kinds of layers are called in a Llama; "model" needs no name.
NAMES = {
    "linear": ("q_proj", "v_proj", "down_proj"),
    "embedding": ("embed_tokens",),
    "norm": ("input_layernorm", "norm"),
    "block": ("layers.0", "layers.1"),
    "model": (),
}


class LanguageModel(Setup):
    """One method on a Llama; nothing is asked where transformers is not installed."""

    def test_language_model(self) -> None:
        """A transformers Llama: generation, rows of their own, gradient checkpointing, merging."""
        places = [NAMES[kind] for kind in self.layer_kinds if kind in NAMES]
        if not places or not importlib.util.find_spec("transformers"):
            return
        targets = [name for names in places for name in names]
        llama = _llama()
        self.prepare(llama, targets)
        model = self.adapted("a", "b", base=llama, config=self.configure(targets))
        ids = token_ids(rows=3, seed=2)
        look = "Adapter.forward: it is called with any number of positions, one at a time while generating"
        with promised("an adapted language model generates", look):
            tokens = {"a": self._generate(model, ids)}
            model.set_adapter("b")
            tokens["b"] = self._generate(model, ids)
            model.set_adapter("a")
        if all(adapter.rowwise for adapter in record(model, "a").adapters):
            rows = (
                f"{look}; a place that keeps keys and values in a cache cannot be run on some rows of the batch: give "
                "Adapter.forward_rows, or set `rowwise = False` on the class"
            )
            with promised("`generate(adapter_names=...)` runs", rows):
                mixed = self._generate(model, ids, adapter_names=["a", "b", "a"])
            check(
                bool((mixed[0] == tokens["a"][0]).all() and (mixed[1] == tokens["b"][1]).all()),
                "`generate(adapter_names=...)` gives each row the tokens of its own adapter",
                f"{mixed[:2].tolist()} for {[tokens['a'][0].tolist(), tokens['b'][1].tolist()]}",
                look,
            )
        plain = self._gradients(model.train(), ids)
        # The name since transformers 5.24, and the one before.
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(model, name):
                getattr(model, name)({"use_reentrant": False})
                break
        again = self._gradients(model, ids)
        worst = max(gap(again[name], grad) for name, grad in plain.items())
        check(
            worst <= self.tolerance,
            "gradient checkpointing of a language model changes no gradient",
            f"gradients differ by {worst:.2g}",
            "Adapter.forward: it runs twice, so it must not depend on how often it ran",
        )
        if self.mergeable and self.merges_exactly(model):
            expected = self._generate(model.eval(), ids, merging=True)
            with promised("an adapted language model merges", "Adapter.merge"):
                plain_model = model.merge_and_unload(**self.merge_arguments())
            merged = self._generate(plain_model, ids)
            check(
                bool((merged == expected).all()),
                "a merged language model generates the tokens of the adapted one",
                f"{merged.tolist()} for {expected.tolist()}",
                "Adapter.merge",
            )

    def _gradients(self, model: Any, ids: torch.Tensor) -> dict[str, Any]:
        """With the same random numbers each time, for methods that draw some in training."""
        model.zero_grad()
        look = "Adapter.forward"
        with promised("forward and backward of an adapted language model run", look), fixed_seed("training"):
            backward(model(ids, use_cache=False, **self.arguments(model, (ids,), None)).logits)
        return {name: p.grad for name, p in trained(model, "a").items()}

    def _generate(self, model: Any, ids: torch.Tensor, merging: bool = False, **kwargs: Any) -> torch.Tensor:
        """Three more tokens for rows of TIME tokens."""
        mask = torch.ones_like(ids)
        given = {**self.arguments(model, (ids,), None, merging), **kwargs}
        with torch.no_grad():
            out: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **given)
        if out.shape[1] != TIME + 3:
            raise RuntimeError(f"generate gave {out.shape[1] - TIME} new tokens, not the 3 that were asked for")
        return out


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

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
