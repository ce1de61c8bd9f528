"""The page of what was run says what runs, and what is refused."""

from __future__ import annotations

import re

import prompt_table
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:.*pad token|.*deprecated")


@pytest.mark.slow
def test_the_page_is_what_the_script_writes() -> None:
    # The losses depend on rounding, and so on the machine; that each fell is checked as it is made.
    page, made = (re.sub(r"-?\d+\.\d\d", "x", text) for text in (prompt_table.TARGET.read_text(), prompt_table.table()))
    assert made == page


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("GPTNeo", "causal LM", "LLaMA-Adapter"),  # masks of its own, by position
        ("GPTJ", "causal LM", "LLaMA-Adapter"),  # sine before cosine
        ("Bloom", "causal LM", "LLaMA-Adapter"),  # biases by distance, and the residual inside
        ("Bart", "conditional generation", "multitask prompts"),
        ("Deberta", "sequence classification", "prompt tuning"),
    ],
)
def test_some_of_it(family: str, task: str, method: str) -> None:
    result = prompt_table.run(family, task, method)
    assert not result.refused and result.after < result.before
