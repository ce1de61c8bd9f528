"""A decoder of transformers in the place of the suite's own model, for methods by role, prompts and prefixes.

A GPT-NeoX, since it computes in float64 throughout: others round to float32 inside their norms. Needs transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .models import INNER, VOCABULARY, WIDTH


class Decoder(GPTNeoXForCausalLM):  # type: ignore[no-untyped-call]
    """Token ids (batch, time) -> scores (batch, time, VOCABULARY), with the names that the suite asks for.

    As the base of a contract:

        def base(self, dtype=torch.float64):
            return seeded(Decoder, dtype)
    """

    def __init__(self) -> None:
        super().__init__(
            GPTNeoXConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=INNER,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                initializer_range=0.5,
                pad_token_id=0,
            )
        )
        self.head = self.lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return self.gpt_neox.layers

    @property
    def checkpointing(self) -> str | None:
        """Set it to recompute the layers in backward: "reentrant" or "non-reentrant"."""
        return None

    @checkpointing.setter
    def checkpointing(self, kind: str | None) -> None:
        self.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})

    def forward(self, ids: Tensor, **kwargs: Any) -> Any:
        """The scores; no cache is kept."""
        return super().forward(ids, use_cache=False, **kwargs).logits
