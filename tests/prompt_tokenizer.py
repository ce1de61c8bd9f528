"""A tokenizer of a few words, made on the spot."""

from __future__ import annotations

from typing import Any


def tokenizer() -> Any:
    """Words "a" to "f" have the ids 3 to 8; every text begins with 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{word: 3 + at for at, word in enumerate("abcdef")}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")
