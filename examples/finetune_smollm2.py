"""The main job: SmolLM2-135M learns to answer like a character of Shakespeare's, with LoRA, on two CPU cores.

    python -m examples.finetune_smollm2

It trains on the dialogue of Hamlet, King Lear and Othello, measures the loss on Macbeth, which it does not
see, saves the adapter, and has a fresh process prove that the saved file is the trained model
(`examples/check_smollm2.py`). Everything it writes is under `outputs/smollm2`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from examples.check_smollm2 import PROMPT, save_evidence
from examples.plays import Exchange, collate, exchanges
from examples.smollm2 import answer, load_base, load_tokenizer, logits_and_loss
from peft_core import get_peft_model, plan
from peft_lora import LoraConfig
from tools import assets

TRAINED = ("hamlet", "king-lear", "othello")
HELD_OUT = "macbeth"
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
BATCH = 6
MAX_TOKENS = 112
LEARNING_RATE = 2e-3
EVALUATE_EVERY = 10


@dataclass
class History:
    """Losses: of each training step's batch, and of the held-out text by the number of steps done."""

    trained: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)

    @property
    def before_and_after(self) -> tuple[float, float]:
        return self.held_out[0], self.held_out[len(self.trained)]


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    started = time.perf_counter()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)

    tokenizer, model = load_tokenizer(), load_base()
    train, held_out = _texts(TRAINED, tokenizer), _texts((HELD_OUT,), tokenizer)[: options.held_out]
    print(f"answers: {len(train)} of {', '.join(TRAINED)}; held out: {len(held_out)} of {HELD_OUT}\n")
    print(plan(model, CONFIG), end="\n\n")
    said_before = answer(model, tokenizer, PROMPT)

    model = get_peft_model(model, CONFIG)
    model.print_trainable_parameters()
    history = finetune(model, train, held_out, tokenizer.pad_token_id, options.steps)
    said_after = answer(model, tokenizer, PROMPT)

    model.save_pretrained(output)
    _plot(history, output / "loss.png")
    save_evidence(output, model, collate(held_out[:2], tokenizer.pad_token_id), said_after)

    print("\nheld-out loss: {:.3f} before, {:.3f} after".format(*history.before_and_after))
    print(f"prompt: {PROMPT}\n  before: {said_before}\n  after:  {said_after}")
    for file in [*sorted(output.glob("adapter_*")), output / "loss.png"]:
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    print(f"\n{time.perf_counter() - started:.0f} s; a fresh process now loads what was saved", flush=True)
    subprocess.run([sys.executable, "-m", "examples.check_smollm2", str(output)], check=True)
    print(f"\ndone in {time.perf_counter() - started:.0f} s, {time.process_time():.0f} CPU-s of them here")


def finetune(model: Any, train: list[Exchange], held_out: list[Exchange], pad: int, steps: int) -> History:
    """An ordinary training loop; only the adapter's parameters ask for gradients."""
    history = History()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 5) * max(0.05, 1 - step / steps)
    )
    history.held_out[0] = held_out_loss(model, held_out, pad)
    progress = tqdm(range(steps), desc="training", unit="step", mininterval=1.0)
    for step in progress:
        start = step * BATCH % (len(train) - BATCH)
        model.train()
        loss = model(**collate(train[start : start + BATCH], pad)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.trained.append(loss.item())
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            history.held_out[step + 1] = held_out_loss(model, held_out, pad)
        progress.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{[*history.held_out.values()][-1]:.3f}")
    return history


def held_out_loss(model: Any, held_out: list[Exchange], pad: int) -> float:
    """Mean loss over all answer tokens."""
    total = tokens = 0.0
    for start in range(0, len(held_out), 16):
        batch = held_out[start : start + 16]
        count = sum(exchange.answer_length for exchange in batch)
        total += logits_and_loss(model, collate(batch, pad))[1] * count
        tokens += count
    return total / tokens


def _texts(plays: tuple[str, ...], tokenizer: Any) -> list[Exchange]:
    folder = assets.fetch("shakespeare") / "tragedies"
    files = [folder / f"{play}.md" for play in plays]
    return exchanges(files, tokenizer, max_tokens=MAX_TOKENS, min_words=10, seed=0)


def _plot(history: History, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(history.trained) + 1), history.trained, color="0.75", label="training batch")
    axes.plot(*zip(*history.held_out.items(), strict=True), marker="o", label=f"held out: {HELD_OUT}")
    axes.set(xlabel="step", ylabel="loss per token", title="SmolLM2-135M, LoRA r=8 on all linear layers")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help=f"training steps of {BATCH} answers each")
    parser.add_argument("--held-out", type=int, default=48, help="answers of the held-out play to measure on")
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
