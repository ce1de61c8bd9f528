"""Run by the main job as a process of its own: is the saved adapter the model that was trained?

    python -m examples.check_smollm2 outputs/smollm2

It loads the base and the adapter afresh, merges, opens the same files with Hugging Face's `peft` where that
is installed, and compares each with what the training process left behind. It fails where they differ.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from examples.smollm2 import answer, load_base, load_tokenizer, logits_and_loss
from peft_core import PeftModel

PROMPT = "My neighbour has stolen my cat. What shall I do?"
EVIDENCE = "evidence.safetensors"

# Largest differences that rounding explains: of float32 logits when the same sums are taken in another order,
# and of the loss when every weight and activation is rounded to the 8 bits of bfloat16.
FLOAT32_LOGITS = 1e-3
BFLOAT16_LOSS = 0.05


@dataclass(frozen=True)
class Outcome:
    """What a model says to the same batch and the same prompt."""

    logits: Tensor  # (tokens of the answers, vocabulary), float32
    loss: float
    text: str


def save_evidence(folder: Path, model: Any, batch: dict[str, Tensor], text: str) -> None:
    """Leave beside the adapter what the trained model makes of a batch, for another process to compare."""
    logits, loss = logits_and_loss(model, batch)
    save_file({**batch, "logits": logits}, folder / EVIDENCE, metadata={"text": text, "loss": repr(loss)})


def main(folder: Path) -> int:
    logging.disable_progress_bar()
    batch, trained = _evidence(folder)
    tokenizer = load_tokenizer()

    def look(model: Any) -> Outcome:
        logits, loss = logits_and_loss(model, batch)
        return Outcome(logits.float(), loss, answer(model, tokenizer, PROMPT))

    reloaded_model = PeftModel.from_pretrained(load_base(), folder)
    reloaded = look(reloaded_model)
    merged = look(reloaded_model.merge_and_unload(progressbar=True))

    # A weight merged in bfloat16 is rounded to 8 bits once more; float32 shows that the maths is the same.
    exact_model = PeftModel.from_pretrained(load_base(torch.float32), folder)
    exact = look(exact_model)
    exact_merged = look(exact_model.merge_and_unload())

    print(f"\n{'':36}{'max |Δ logits|':>14}  {'loss':>6}  same answer")
    checks = [
        _compare("trained and reloaded, bfloat16", reloaded, trained, logits=0.0),
        _compare("trained and reloaded into float32", exact, trained, loss=BFLOAT16_LOSS),
        _compare("trained and merged, bfloat16", merged, trained, loss=BFLOAT16_LOSS),
        _compare("reloaded and merged, float32", exact_merged, exact, logits=FLOAT32_LOGITS),
    ]
    if importlib.util.find_spec("peft"):
        opened = look(_open_with_hf_peft(folder))
        checks.append(_compare("reloaded and HF peft's, float32", opened, exact, logits=FLOAT32_LOGITS))
    else:
        print("HF peft is not installed: not compared")
    return 0 if all(checks) else 1


def _evidence(folder: Path) -> tuple[dict[str, Tensor], Outcome]:
    with safe_open(folder / EVIDENCE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        noted = file.metadata()
    logits = tensors.pop("logits").float()
    return tensors, Outcome(logits, float(noted["loss"]), noted["text"])


def _compare(
    what: str, outcome: Outcome, other: Outcome, *, logits: float | None = None, loss: float | None = None
) -> bool:
    """Print a row. With a bound on the logits the answers must be equal too."""
    difference = (outcome.logits - other.logits).abs().max().item()
    same = outcome.text == other.text
    good = abs(outcome.loss - other.loss) <= (loss if loss is not None else float("inf"))
    if logits is not None:
        good = good and same and difference <= logits
    verdict = "" if good else "   <- DIFFERS"
    print(f"{what:36}{difference:14.2g}  {outcome.loss:6.3f}  {'yes' if same else 'no'}{verdict}", flush=True)
    return good


def _open_with_hf_peft(folder: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it calls what transformers has renamed
        return peft.PeftModel.from_pretrained(load_base(torch.float32), folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
