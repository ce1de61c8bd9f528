"""MiniLM learns to tell enthusiastic food reviews from the others: LoRA and IA3 beside the two usual ways.

    python -m examples.classify_reviews

Prints accuracy on 1000 unseen reviews for a classifier on frozen features, LoRA, IA3 and full fine-tuning,
with the number of parameters that each of them trains. `--quick` takes a twentieth of the data, which shows
that it runs and not what the methods are worth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from peft_core import get_peft_model
from peft_ia3 import IA3Config
from peft_lora import LoraConfig
from tools import assets

HEAD = ("classifier",)  # new, so trained and saved whole
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"], modules_to_save=HEAD)
IA3 = IA3Config(
    target_modules=["key", "value", "output.dense"],
    feedforward_modules=("output.dense",),
    modules_to_save=HEAD,
)


@dataclass(frozen=True)
class Reviews:
    """Token ids and their mask, (reviews, length) each, and whether a review is enthusiastic, (reviews,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def batches(self, order: Tensor, size: int = 32) -> Iterator[dict[str, Tensor]]:
        for rows in order.split(size):
            yield {
                "input_ids": self.input_ids[rows],
                "attention_mask": self.attention_mask[rows],
                "labels": self.labels[rows],
            }


@dataclass(frozen=True)
class Result:
    method: str
    trained: int
    accuracy: float
    cpu_seconds: float

    def __str__(self) -> str:
        return f"{self.method:32}{self.trained:12,}{self.accuracy:10.3f}{self.cpu_seconds:8.0f}"


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    train, test = load("training", options.train), load("testing", options.test)

    great = test.labels.float().mean().item()
    print(
        f"{len(train.labels)} reviews to train on, {len(test.labels)} to test; "
        f"always the commoner answer is right for {max(great, 1 - great):.3f}"
    )
    results = [
        probe(train, test),
        finetune("LoRA r=8", lambda model: get_peft_model(model, LORA), train, test, options.epochs, 1e-3),
        finetune("IA3", lambda model: get_peft_model(model, IA3), train, test, options.epochs, 1e-2),
        finetune("full fine-tuning", lambda model: model, train, test, options.epochs, 1e-4),
    ]
    print(f"\n{'':32}{'trained':>12}{'accuracy':>10}{'CPU-s':>8}")
    print(*results, sep="\n")


def load(part: str, count: int) -> Reviews:
    """The first `count` reviews. The file is a pickle, opened because `assets` has compared its digest."""
    file = assets.fetch("reviews") / f"{part}_data.pkl.compress"
    table = pandas.read_pickle(file, compression="xz")[:count]
    tokens = _tokenizer()(list(table["review"]), padding=True, truncation=True, max_length=64, return_tensors="pt")
    labels = torch.tensor([score == "great" for score in table["score"]]).long()
    return Reviews(tokens["input_ids"], tokens["attention_mask"], labels)


def probe(train: Reviews, test: Reviews) -> Result:
    """Logistic regression on the frozen encoder's mean-pooled features."""
    started = time.process_time()
    encoder: Any = AutoModel.from_pretrained(assets.fetch("minilm")).eval()
    classifier = LogisticRegression(max_iter=1000).fit(_features(encoder, train), train.labels)
    accuracy = classifier.score(_features(encoder, test), test.labels)
    return Result("frozen features", classifier.coef_.size + 1, accuracy, time.process_time() - started)


def finetune(
    method: str,
    adapt: Callable[[Any], Any],
    train: Reviews,
    test: Reviews,
    epochs: int,
    learning_rate: float,
) -> Result:
    """The same loop for all; they differ in what `adapt` leaves trainable, and in the learning rate."""
    started = time.process_time()
    torch.manual_seed(0)
    model = adapt(AutoModelForSequenceClassification.from_pretrained(assets.fetch("minilm"), num_labels=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = [batch for _ in range(epochs) for batch in train.batches(torch.randperm(len(train.labels)))]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches))
    model.train()
    for batch in tqdm(batches, desc=method, unit="step", mininterval=1.0):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Result(method, sum(p.numel() for p in trained), _accuracy(model, test), time.process_time() - started)


@torch.no_grad()
def _features(encoder: Any, reviews: Reviews) -> Any:
    pooled = []
    for batch in reviews.batches(torch.arange(len(reviews.labels))):
        del batch["labels"]
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled).numpy()


@torch.no_grad()
def _accuracy(model: Any, reviews: Reviews) -> float:
    model.eval()
    right = 0
    for batch in reviews.batches(torch.arange(len(reviews.labels))):
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(reviews.labels)


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.fetch("minilm"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 reviews, once, to see that it runs")
    options = parser.parse_args()
    options.train, options.test, options.epochs = (100, 50, 1) if options.quick else (2000, 1000, 2)
    return options


if __name__ == "__main__":
    main()
