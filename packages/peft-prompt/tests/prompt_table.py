"""Run every method on every architecture and task, and write what came of it into ARCHITECTURES.md.

The models are tiny and seeded. Each adapter is trained for some steps on one batch (the loss must fall), saved, and
loaded onto a fresh base (the outputs must be the same); language models generate, and a left-padded row must give what
it gives alone.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from peft_core import PeftModel, TargetError, get_peft_model
from peft_core.config import AdapterConfig
from peft_prompt import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

TARGET = Path(__file__).parents[1] / "ARCHITECTURES.md"
VOCABULARY, N, STEPS, ROWS, LENGTH = 32, 3, 20, 4, 6

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = {**LAYERS, "num_key_value_heads": 2, "head_dim": 8}
ENCODER = {**LAYERS, "max_position_embeddings": 64}
BART_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
SETTINGS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "OPT": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24}
    | {"word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "GPTNeo": {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    | {"max_position_embeddings": 64},
    "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "GPTNeoX": LAYERS,
    "Llama": {**LAYERS, "num_key_value_heads": 2},
    "Glm": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Qwen2": {**LAYERS, "num_key_value_heads": 2},
    "Gemma": GROUPED,
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "Bart": {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, **BART_LAYERS}
    | {"max_position_embeddings": 64, "forced_eos_token_id": None},
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "Deberta": ENCODER,
    "DebertaV2": ENCODER,
}
CAUSAL = ("GPT2", "Bloom", "OPT", "GPTNeo", "GPTJ", "GPTNeoX", "Llama", "Glm", "Mistral", "Qwen2", "Gemma")
TASKS: dict[str, tuple[str, ...]] = {
    "causal LM": CAUSAL,
    "conditional generation": ("T5", "Bart"),
    "sequence classification": ("Bert", "Roberta", "Deberta", "DebertaV2", "GPT2", "Bloom", "OPT", "GPTNeo", "GPTJ"),
    "token classification": ("Bert", "Roberta", "Deberta"),
    "question answering": ("Bert", "GPT2"),
    "feature extraction": ("Bert", "Llama"),
}
HEADS = {
    "causal LM": ("ForCausalLM", "CAUSAL_LM"),
    "conditional generation": ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "sequence classification": ("ForSequenceClassification", "SEQ_CLS"),
    "token classification": ("ForTokenClassification", "TOKEN_CLS"),
    "question answering": ("ForQuestionAnswering", "QUESTION_ANS"),
    "feature extraction": ("Model", "FEATURE_EXTRACTION"),
}
METHODS: dict[str, Callable[..., AdapterConfig]] = {
    "prompt tuning": lambda **k: PromptTuningConfig(num_virtual_tokens=N, **k),
    "P-tuning, MLP": lambda **k: PromptEncoderConfig(num_virtual_tokens=N, **k),
    "P-tuning, LSTM": lambda **k: PromptEncoderConfig(
        num_virtual_tokens=N, encoder_reparameterization_type="LSTM", encoder_num_layers=1, **k
    ),
    "prefix tuning": lambda **k: PrefixTuningConfig(num_virtual_tokens=N, **k),
    "prefix tuning, projected": lambda **k: PrefixTuningConfig(num_virtual_tokens=N, prefix_projection=True, **k),
    "multitask prompts": lambda **k: MultitaskPromptTuningConfig(num_virtual_tokens=N, num_tasks=2, **k),
    "LLaMA-Adapter": lambda **k: AdaptionPromptConfig(adapter_len=N, adapter_layers=2, **k),
}
CLASS_NAMES = {"GPT2ForCausalLM": "GPT2LMHeadModel"}


class Result(NamedTuple):
    """What came of one cell: the loss before and after training, or why the method refuses."""

    before: float = 0.0
    after: float = 0.0
    refused: str = ""

    def text(self, notes: list[str]) -> str:
        """The cell, its reason a footnote."""
        if not self.refused:
            return f"{self.before:.2f} → {self.after:.2f}"
        if self.refused not in notes:
            notes.append(self.refused)
        return f"refused [{notes.index(self.refused) + 1}]"


def make(family: str, task: str) -> Any:
    """A tiny model that tells tokens apart, always with the same weights."""
    config = getattr(transformers, f"{family}Config")(
        **SETTINGS[family], vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    if "classification" in task:
        config.num_labels = 3
    name = family + HEADS[task][0]
    torch.manual_seed(0)
    model = getattr(transformers, CLASS_NAMES.get(name, name))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8 if family != "T5" else 2)
    return model


def batch(task: str, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch whose second row is padded, and what the model is to say of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids, mask = draw(VOCABULARY, ROWS, LENGTH, low=3), torch.ones(ROWS, LENGTH, dtype=torch.long)
    padded = slice(0, 2) if task == "causal LM" else slice(LENGTH - 2, LENGTH)
    ids[1, padded], mask[1, padded] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask}
    if "task_ids" in config.request_arguments:
        given["task_ids"] = torch.arange(ROWS) % 2
    wanted = {
        "causal LM": {"labels": torch.where(mask.bool(), ids, -100)},
        "conditional generation": {"labels": draw(VOCABULARY, ROWS, LENGTH - 1, low=3)},
        "sequence classification": {"labels": draw(3, ROWS)},
        "token classification": {"labels": draw(3, ROWS, LENGTH)},
        "question answering": {"start_positions": draw(3, ROWS), "end_positions": 1 + draw(3, ROWS)},
        "feature extraction": {},
    }[task]
    return given, wanted


def loss_of(model: Any, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """The model's own loss; for features, how far the first one is from 1."""
    out = model(**given, **wanted)
    found: Tensor = out.loss if wanted else (out.last_hidden_state[..., 0] - 1).square().mean()
    return found


def outputs(model: Any, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[Tensor]:
    """Everything floating-point that the model returns."""
    with torch.no_grad():
        return [v for v in model(**given, **wanted).values() if isinstance(v, Tensor) and v.is_floating_point()]


def run(family: str, task: str, method: str) -> Result:
    """Adapt, train, save, load, generate. Raises `AssertionError` where something is not as it should be."""
    given, wanted = batch(task, config := METHODS[method](task_type=HEADS[task][1]))
    torch.manual_seed(1)
    try:
        model = get_peft_model(make(family, task), config)
    except TargetError as error:
        reason = str(error).rpartition("\n- ")[2].partition("): ")
        return Result(refused=(reason[2] or reason[0]).strip())
    with torch.no_grad():
        before = float(loss_of(model, given, wanted))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(STEPS):
        loss_of(model, given, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        after = float(loss_of(model, given, wanted))
    assert after < before - 0.01, f"the loss went from {before} to {after}"
    expected = outputs(model, given, wanted)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = PeftModel.from_pretrained(make(family, task), directory)
    for one, other in zip(outputs(loaded, given, wanted), expected, strict=True):
        # The LSTM has another kernel where no gradients are recorded, which rounds otherwise.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if "LSTM" in method else 0)
    if task in ("causal LM", "conditional generation"):
        generate(loaded, given, task)
    return Result(before, after)


def generate(model: Any, given: dict[str, Tensor], task: str) -> None:
    """Each row of a padded batch generates what it generates alone, with and without a cache."""
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = model.generate(**given, **how)[:, -5:]
    assert torch.equal(model.generate(**given, **how, use_cache=False)[:, -5:], together), "without a cache"
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in given.items()}
        seen = own["attention_mask"][0].bool()
        own = {n: v[:, seen] if v.dim() == 2 else v for n, v in own.items()}
        assert torch.equal(model.generate(**own, **how)[0, -5:], together[row]), f"row {row} alone"


def table() -> str:
    """The whole page."""
    notes: list[str] = []
    lines = ["# What was run", "", *(__doc__ or "").split("\n", 2)[2].strip().splitlines(), ""]
    lines += ["A cell gives the loss before and after. The page is written by `python tests/prompt_table.py`.", ""]
    for task, families in TASKS.items():
        lines += [
            f"## {task[0].upper()}{task[1:]}",
            "",
            f"| | {' | '.join(METHODS)} |",
            "|---|" + "---|" * len(METHODS),
        ]
        for family in families:
            cells = [run(family, task, method).text(notes) for method in METHODS]
            lines.append(f"| {family} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Refused", ""] + [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TARGET.write_text(table(), encoding="utf-8")
