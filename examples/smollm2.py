"""The base model of the demo: SmolLM2-135M-Instruct, from a file, no hub asked."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.plays import IGNORED, prompt_ids
from tools import assets

CACHE = assets.ROOT.parent / "models" / "smollm2-135m-instruct"


def load_base(dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model in `dtype`; its weights are stored in bfloat16, so float32 holds the same numbers."""
    return AutoModelForCausalLM.from_pretrained(converted(), dtype=dtype)


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(converted())


def converted() -> Path:
    """The folder of the model as transformers writes it, converted from the quantised GGUF file once."""
    if not CACHE.is_dir():
        _convert(assets.fetch("smollm2"), CACHE)
    return CACHE


def _convert(source: Path, target: Path) -> None:
    print("converting the GGUF file to safetensors, once ...", flush=True)
    # Read in float32, which transformers recommends for GGUF files, and rounded to bfloat16 afterwards.
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=assets.SMOLLM2_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=assets.SMOLLM2_FILE)
    # The weights are plain tensors by now, but the model still carries the marks of a quantised one, with
    # which transformers refuses to save it.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        Path(scratch).rename(target)
        Path(scratch).mkdir()  # for the context manager to remove


@torch.no_grad()
def answer(model: Any, tokenizer: Any, said: str) -> str:
    """What the model says, token by token the likeliest one, with a mild penalty on repeating itself."""
    model.eval()
    prompt = torch.tensor([prompt_ids(said, tokenizer)])
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


@torch.no_grad()
def logits_and_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    """The logits that predict the answers' tokens, (tokens, vocabulary), and their mean loss."""
    model.eval()
    output = model(**batch)
    predicted = batch["labels"][:, 1:] != IGNORED
    return output.logits[:, :-1][predicted], output.loss.item()
