"""Plays of Shakespeare as a conversation: what is said, and what the next speaker answers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that the loss leaves out

_SPEECH = re.compile(r"^\*\*.+?\*\* *\n(?P<text>.+?)\n\n", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
_STAGE_DIRECTION = re.compile(r"_.*?_", re.DOTALL)


@dataclass(frozen=True)
class Exchange:
    """Tokens of one prompt and answer; `labels` equal `ids` in the answer and are ignored before it."""

    ids: list[int]
    labels: list[int]

    @property
    def answer_length(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def exchanges(plays: list[Path], tokenizer: Any, *, max_tokens: int, min_words: int, seed: int) -> list[Exchange]:
    """Answers of at least `min_words` words, with the speech before each, shuffled; cut at `max_tokens`."""
    found = []
    for play in plays:
        for said, answer in _pairs(play.read_text(encoding="utf-8")):
            if len(answer.split()) >= min_words:
                found.append(_encode(said, answer, tokenizer, max_tokens))
    found = [exchange for exchange in found if exchange.answer_length >= 4]
    random.Random(seed).shuffle(found)
    return found


def prompt_ids(said: str, tokenizer: Any) -> list[int]:
    """Tokens of a chat in which the user has spoken and the model is to answer; no system message."""
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": said}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return ids


def collate(batch: list[Exchange], pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (batch, length), padded on the right."""
    length = max(len(exchange.ids) for exchange in batch)
    fill = [length - len(exchange.ids) for exchange in batch]
    rows = list(zip(batch, fill, strict=True))
    return {
        "input_ids": torch.tensor([exchange.ids + [pad] * n for exchange, n in rows]),
        "attention_mask": torch.tensor([[1] * len(exchange.ids) + [0] * n for exchange, n in rows]),
        "labels": torch.tensor([exchange.labels + [IGNORED] * n for exchange, n in rows]),
    }


def _pairs(play: str) -> Iterator[tuple[str, str]]:
    for scene in _HEADING.split(play):
        speeches = [_plain(match["text"]) for match in _SPEECH.finditer(scene + "\n\n")]
        yield from ((said, answer) for said, answer in pairwise(speeches) if said and answer)


def _plain(speech: str) -> str:
    return " ".join(_STAGE_DIRECTION.sub("", speech).split())


def _encode(said: str, answer: str, tokenizer: Any, max_tokens: int) -> Exchange:
    prompt = prompt_ids(said, tokenizer)
    reply: list[int] = tokenizer(answer + tokenizer.eos_token)["input_ids"]
    labels = [IGNORED] * len(prompt) + reply
    return Exchange((prompt + reply)[:max_tokens], labels[:max_tokens])
