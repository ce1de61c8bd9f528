"""The contract suite passes methods that are right, and fails those that are not, by the right test and words."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_toys import PLUGINS
from torch import nn

from peft_core import MethodNotFoundError, load_method, register_method, unregister_method
from peft_core.testing import MethodContract

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
    pytester: pytest.Pytester,
    plugin: str,
    tests: Iterable[str] = (),
    selection: str = "",
    config: str = "ToyConfig()",
    body: str = "",
    **attributes: object,
) -> Outcome:
    """Run the suite on one toy in this process, as its author would.

    `plugin` is the name of a toy, or an expression; `body` is more of the class, in lines.
    """
    pytester.syspathinsert(Path(__file__).parent)
    lines = [f"    {name} = {value!r}" for name, value in attributes.items()]
    lines += [f"    {line}" for line in body.splitlines()]
    file = pytester.makepyfile(
        "\n".join(
            [
                "import torch",
                "from contract_toys import *",
                "from peft_core.testing import MethodContract",
                "class TestToy(MethodContract):",
                f"    config = {config}",
                f"    plugin = {plugin if '(' in plugin else f'PLUGINS.{plugin}'}",
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
        ("MergesRoughly", {}),
        ("FrozenDown", {}),
        ("Penalised", {}),
        ("trains", {}),
        ("NormGain", {"layer_kinds": ("norm",)}),
        (
            "OnBlocks",
            {"layer_kinds": ("block",), "mergeable": False, "unused": ("blocks.1.update", "layer.update")},
        ),
        ("whole", {"layer_kinds": ("model",), "mergeable": False, "config": "WholeConfig()"}),
        (
            "per_task",
            {
                "config": "TaskConfig()",
                "body": "def call_arguments(self, rows):\n    return {'task_ids': torch.arange(rows) % 3}\n"
                "def merge_arguments(self):\n    return {'task_ids': 2}",
            },
        ),
    ],
)
def test_right_methods_pass(pytester: pytest.Pytester, plugin: str, attributes: dict[str, Any]) -> None:
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
        "test_merge_and_unload": "`merge_and_unload` computes what the adapted model computed",
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
        "test_language_model": "gives each row the tokens of its own adapter",
        "test_forward_keeps_nothing": "the same input gives the same output",
        "test_checkpointing": "gradients under reentrant checkpointing",
    },
    "MixesRows": {
        "test_mixed_rows": "each row comes out as in a run with its adapter alone",
        "test_layer_mixed_rows": "linear: with `adapter_names`, each row",
        "test_merge_and_unmerge": "cannot be expressed in the base layer's weights",
    },
    "ForgetsToSave": {"test_save_and_load": "something that acts is not saved"},
    "WritesIntoTheBase": {
        "test_disabled_is_the_base": "computes the base bit for bit",
        "test_unload_gives_the_base_back": r"changed: \['blocks.0.up.weight'",
    },
    "CastsUp": {"test_bfloat16_base": "on a bfloat16 base"},
    "DoesNothing": {
        "test_active_adapter_changes_the_output": "gives another, finite output than the base",
        "test_layer": "linear: an adapter with random values acts",
    },
    "StartsNowhere": {"test_every_tensor_gets_a_start": r"left as allocated, or not finite: \['blocks.0.up.up'"},
    "ThawsTheBase": {"test_gradients_reach_the_adapter_alone": r"no tensor of the base trains\n.*'blocks.0.up.weight'"},
    "MergesIntoTheModule": {
        "test_unmerge_is_exact_in_bfloat16": "unmerging a bfloat16 base is exact",
    },
    "FreezesLate": {"test_loaded_adapter_trains_on": r"before \['blocks.0.down.up', .*, after \['blocks.0.down.down'"},
    "HoldsALock": {
        "test_deepcopy": r"survives copy.deepcopy\n.*cannot pickle '_thread.lock'",
        "test_pickle": r"survives pickle\n.*cannot pickle '_thread.lock'",
    },
    "WantsItsDtype": {
        "test_autocast": r"run under autocast\n(.*\n)*.*look at: WantsItsDtype.delta \(.*; Adapter.forward: dtypes"
    },
    "LooksAtValues": {"test_plan_counts": r"planned on the meta device\n(.*\n)*.*LooksAtValues.__init__ \("},
    "ReturnsNothing": {
        "test_layer": r"linear: the output has the shape and dtype of the base's\n  seen:    NoneType",
        "test_start_equals_base": "look at: Adapter.forward",  # the base fails, on what it was given
    },
    "DependsOnTheBatch": {
        "test_mixed_rows": "each row comes out as in a run with its adapter alone",
        "test_layer_mixed_rows": "linear: with `adapter_names`",
        "test_language_model": "gives each row the tokens of its own adapter",
    },
    "StartsSomewhere": {"test_start_equals_base": "leaves the base's output unchanged"},
    "TakesAnyLayer": {"test_layer": "a layer the method does not adapt is refused with TargetError"},
    "BranchesOnValues": {"test_compile": "compiles into one graph"},
    "PenaltyIsInfinite": {"test_loss_terms": "a term of the loss is finite\n.*size: -inf"},
    "PenaltyHasNoGradient": {"test_loss_terms": "has a finite gradient for a tensor of the adapter\n.*size: none"},
    "PenaltyIsATable": {"test_loss_terms": "a call in training gives the terms of the loss"},
    "steps_replace": {"test_steps": r"the optimizer holds every tensor that trains\n.*'blocks.0.up.up'"},
    "steps_write": {"test_steps": r"steps write nothing into the base\n.*'blocks.0.up.weight'"},
    "steps_diverge": {"test_steps": r"every tensor of the adapter is finite\n.*'blocks.0.up::up'"},
    "steps_beside": {"test_steps": "an adapter loaded after steps computes what the saved one computed"},
    "groups_forget": {"test_parameter_groups": r"gives groups that an optimizer takes\n.*missing \['blocks.0.up.down'"},
    "negative_lr": {"test_parameter_groups": r"learning rates and weight decays are finite numbers.*\n.*\(-1.0, 0.1\)"},
    "infinite_lr": {"test_parameter_groups": r"learning rates and weight decays are finite numbers.*\n.*\(inf, 0.1\)"},
}


# Faults that are not in the adapter: extra arguments of `run_suite`, the test that fails, and its words.
MISCONFIGURED: dict[str, tuple[dict[str, Any], str, str]] = {
    "kind-misspelt": ({"layer_kinds": ("linear", "conv9d")}, "test_layer_kinds_exist", r"unknown: \['conv9d'\]"),
    "module-misspelt": ({"left_out": ("blocks.7.up",)}, "test_layer_kinds_exist", r"unknown: \['blocks.7.up'\]"),
    "unused-is-used": (
        {"unused": ("blocks.0.up.up",)},
        "test_gradients_reach_the_adapter_alone",
        r"with gradients: \['blocks.0.up.up'\]",
    ),
    "unused-misspelt": (
        {"unused": ("blocks.0.upp",)},
        "test_gradients_reach_the_adapter_alone",
        r"not among the trained tensors: \['blocks.0.upp'\]",
    ),
    "field-does-not-come-back": (
        {"plugin": "forgetful_config", "config": "ForgetfulConfig(r=3)"},
        "test_config_round_trip",
        "a config read from its own JSON is the config",
    ),
    "copies-write": (
        {
            "plugin": "writing_config",
            "config": "WritingConfig()",
            "body": "def configure(self, targets):\n    return WritingConfig(target_modules=targets)",
        },
        "test_config_is_left_alone",
        "using a config does not change it",
    ),
    "no-identifier": (
        {"plugin": "odd_name", "config": "OddConfig()"},
        "test_config_names_its_method",
        "the method's name is an identifier",
    ),
    "no-config-class": (
        {"plugin": "exploding('peft_config')"},
        "test_pickle",
        r"the method can be registered\n.*RuntimeError in peft_config: boom\n(.*\n)*.*Exploding.peft_config \(",
    ),
}


def three_parts(message: str) -> bool:
    parts = [re.search(rf"^  {part} +\S", message, re.MULTILINE) for part in ("promise:", "seen:", "look at:")]
    return all(parts) and [part.start() for part in parts if part] == sorted(part.start() for part in parts if part)


@pytest.mark.parametrize("plugin", WRONG)
def test_wrong_methods_fail(pytester: pytest.Pytester, plugin: str) -> None:
    outcome = run_suite(pytester, plugin, WRONG[plugin])
    assert outcome.failed.keys() == WRONG[plugin].keys()
    for test, words in WRONG[plugin].items():
        messages = outcome.failed[test]
        assert any(re.search(words, message) for message in messages), messages[0][-2000:]
        for message in messages:
            assert three_parts(message), message[-2000:]


@pytest.mark.parametrize("fault", MISCONFIGURED)
def test_wrong_settings_fail(pytester: pytest.Pytester, fault: str) -> None:
    options, test, words = MISCONFIGURED[fault]
    outcome = run_suite(pytester, **{"plugin": "LowRank", "tests": (test,), **options})
    (message,) = outcome.failed[test]
    assert re.search(words, message), message
    assert three_parts(message), message


def test_every_test_of_the_suite_fails_for_some_method() -> None:
    """A check that no wrong method fails would prove nothing."""
    provoked = {test for tests in WRONG.values() for test in tests} | {test for _, test, _ in MISCONFIGURED.values()}
    provoked.add("test_import_isolation")  # below: it needs methods that are installed
    assert provoked == {name for name, _ in inspect.getmembers(MethodContract) if name.startswith("test_")}


# What the core calls of a plugin's while the suite runs.
CALLED = (
    "peft_match", "peft_resolve", "peft_sites", "peft_structure", "peft_prepare", "peft_build", "peft_merge",
    "peft_state_key", "__init__", "reset_parameters", "delta", "accumulate", "weight_delta", "merge", "forward",
    "forward_rows", "slots", "state", "load_state", "losses", "peft_step", "peft_param_groups",
)  # fmt: skip


@pytest.mark.parametrize(
    ("called", "error"), [*((name, "RuntimeError") for name in CALLED), ("delta", "AssertionError")]
)
def test_exceptions_of_plugins_are_explained(pytester: pytest.Pytester, called: str, error: str) -> None:
    """Wherever a plugin raises, the message has its three parts, and names the function and the line."""
    # Without pickle: the class of the toy is made here, and is in no module.
    selection = f"{SLOW} and not isolation and not pickle and not (test_layer and not four-axes)"
    outcome = run_suite(pytester, f"exploding({called!r}, {error})", selection=selection)
    assert outcome.failed
    for messages in outcome.failed.values():
        for message in messages:
            assert three_parts(message), message
            assert re.search(rf"seen: .*{error}: boom", message), message
            assert re.search(rf"look at: Exploding.{called} \(.*contract_toys.py, line \d+\)", message), message


def test_wrong_methods_fail_nowhere_else(pytester: pytest.Pytester) -> None:
    """One fault, few complaints: the author is led to it, not buried."""
    outcome = run_suite(pytester, "MergesWrongly", selection=SLOW)
    assert set(outcome.failed) == {"test_merge_and_unmerge", "test_merge_and_unload", "test_layer_merges"}
    assert outcome.passed > 100


def test_what_was_registered_before_is_there_again(pytester: pytest.Pytester) -> None:
    """A module that registers its method may be proved: afterwards its own registration is in force."""
    mine = register_method(PLUGINS.Gain)
    try:
        assert run_suite(pytester, "LowRank", ["test_active_adapter_changes_the_output"]).failed == {}
        assert load_method("toy") is mine
    finally:
        unregister_method("toy")
    with pytest.raises(MethodNotFoundError):
        load_method("toy")


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
