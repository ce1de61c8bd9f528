"""The contract suite passes methods that are right, and fails those that are not, by the right test and words."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest_plugins = ["pytester"]

# What needs seconds: run for the methods that are right, and where it is the point.
SLOW = "not compile and not language_model"


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """pytester forgets what was imported inside it, and parts of torch cannot be imported twice."""
    model = nn.Linear(2, 2)
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.ones(1, 2)).sum().backward()
    torch._dynamo.reset()
    if importlib.util.find_spec("transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, bos_token_id=0, eos_token_id=0))
        llama.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=1, pad_token_id=0)


@dataclass
class Outcome:
    passed: int
    failed: dict[str, list[str]]  # names of tests without their parameters -> messages


def run_suite(
    pytester: pytest.Pytester, plugin: str, *tests: str, selection: str = "", **attributes: object
) -> Outcome:
    """Run the suite on one toy in this process, as its author would."""
    pytester.syspathinsert(Path(__file__).parent)
    lines = [f"    {name} = {value!r}" for name, value in attributes.items()]
    file = pytester.makepyfile(
        "\n".join(
            [
                "from contract_toys import PLUGINS, ToyConfig",
                "from peft_core.testing import MethodContract",
                "class TestToy(MethodContract):",
                "    config = ToyConfig()",
                f"    plugin = PLUGINS.{plugin}",
                *lines,
            ]
        )
    )
    wanted = [f"{file}::TestToy::{test}" for test in tests] or [str(file)]
    record: Any = pytester.inline_run("-p", "no:cacheprovider", "--tb=short", "-k", selection, *wanted)
    passed, skipped, failed = record.listoutcomes()
    assert not skipped
    found: dict[str, list[str]] = {}
    for report in failed:
        name = re.sub(r"\[.*", "", report.nodeid.rpartition("::")[2])
        found.setdefault(name, []).append(report.longrepr.reprcrash.message)
    return Outcome(len(passed), found)


@pytest.mark.parametrize(
    ("plugin", "attributes"),
    [
        ("LowRank", {}),
        ("Gain", {}),
        ("Doubling", {}),
        ("Centred", {"mergeable": False}),
    ],
)
def test_right_methods_pass(pytester: pytest.Pytester, plugin: str, attributes: dict[str, object]) -> None:
    outcome = run_suite(pytester, plugin, **attributes)
    assert outcome.failed == {}
    assert outcome.passed > 100


WRONG: dict[str, dict[str, str]] = {
    "MergesInPlace": {
        "test_merge_writes_nothing": r"blocks.0.up: \['weight'\] changed in place",
        "test_merge_and_unmerge": "unmerging gives back the base's weights bit for bit",
    },
    "MergesWrongly": {
        "test_merge_and_unmerge": r"merged weights compute what the adapters \['a'\] computed",
        "test_layer_merges": "linear: merged weights compute what the adapter computed",
    },
    "LosesInner": {
        "test_switch_stack_delete": "two active adapters both act",
        "test_start_leaves_other_adapters_alone": "does not silence it",
        "test_merge_and_unmerge": r"\['a', 'b'\]",
    },
    "ClaimsToBeAdditive": {"test_layer": "what the adapter's `forward` computes"},
    "CutsGradient": {
        "test_gradients_reach_the_adapter_alone": "'blocks.0.up.down'",
        "test_gradients_are_the_derivative": "autograd says",
    },
    "colliding_keys": {"test_state_keys": r"blocks.0.up: \{'factor': \['down', 'up'\]\}"},
    "Remembers": {
        "test_forward_keeps_nothing": "the same input gives the same output",
        "test_checkpointing": "gradients under reentrant checkpointing",
    },
    "MixesRows": {
        "test_mixed_rows": "each row comes out as in a run with its adapter alone",
        "test_merge_and_unmerge": "cannot be expressed in the base layer's weights",
    },
    "ForgetsToSave": {"test_save_and_load": "something that acts is not saved"},
    "WritesIntoTheBase": {
        "test_disabled_is_the_base": "computes the base bit for bit",
        "test_unload_gives_the_base_back": r"changed: \['blocks.0.up.weight'",
    },
    "CastsUp": {"test_bfloat16_base": "on a bfloat16 base"},
    "StartsSomewhere": {"test_start_equals_base": "leaves the base's output unchanged"},
    "TakesAnyLayer": {"test_layer": "a layer the method does not adapt is refused with TargetError"},
    "BranchesOnValues": {"test_compile": "compiles into one graph"},
}


@pytest.mark.parametrize("plugin", WRONG)
def test_wrong_methods_fail(pytester: pytest.Pytester, plugin: str) -> None:
    outcome = run_suite(pytester, plugin, *WRONG[plugin])
    assert outcome.failed.keys() == WRONG[plugin].keys()
    for test, words in WRONG[plugin].items():
        messages = outcome.failed[test]
        assert any(re.search(words, message) for message in messages), messages[0][-2000:]
        for message in messages:
            assert all(part in message for part in ("promise:", "seen:", "look at:")), message[-2000:]


def test_wrong_methods_fail_nowhere_else(pytester: pytest.Pytester) -> None:
    """One fault, few complaints: the author is led to it, not buried."""
    outcome = run_suite(pytester, "MergesWrongly", selection=SLOW)
    assert set(outcome.failed) == {"test_merge_and_unmerge", "test_merge_and_unload", "test_layer_merges"}
    assert outcome.passed > 100


def test_misspelt_attributes_are_noticed(pytester: pytest.Pytester) -> None:
    outcome = run_suite(pytester, "LowRank", "test_layer_kinds_exist", layer_kinds=("linear", "conv9d"))
    assert "conv9d" in outcome.failed["test_layer_kinds_exist"][0]


def test_a_suite_without_config_says_so(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("from peft_core.testing import MethodContract\nclass TestNothing(MethodContract):\n    pass\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_pickle")
    result.stdout.fnmatch_lines(["*TestNothing gives no config; write `config = YourConfig(...)` in the class*"])


def test_warnings_are_errors(pytester: pytest.Pytester) -> None:
    pytester.syspathinsert(Path(__file__).parent)
    pytester.makepyfile(
        """
        import warnings
        from contract_toys import LowRank, Plugin, ToyConfig
        from peft_core.testing import MethodContract

        class Warns(LowRank):
            def delta(self, x):
                warnings.warn("old", DeprecationWarning)
                return super().delta(x)

        class TestWarns(MethodContract):
            config = ToyConfig()
            plugin = Plugin(Warns)
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_active_adapter")
    result.assert_outcomes(failed=1)
