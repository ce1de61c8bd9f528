"""Scripts as users of HF PEFT write them: with other import lines they run here, and give the same."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_transformers import batch, make

pytestmark = pytest.mark.filterwarnings("ignore")  # the other library's

OURS = {"LoraConfig": "peft_lora", "IA3Config": "peft_ia3"}

SCRIPTS = {
    "causal language model": """
        from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=4, lora_alpha=32, lora_dropout=0.0)
        model = get_peft_model(make("llama"), config)
        settle(model)
        model.train()
        model(**batch("llama"), labels=batch("llama")["input_ids"]).loss.backward()
        model.print_trainable_parameters()
        model.save_pretrained("out", save_embedding_layers="auto")
        config = PeftConfig.from_pretrained("out")
        result["config"] = [config.task_type == TaskType.CAUSAL_LM, config.peft_type == "LORA", config.r]
        model = PeftModel.from_pretrained(make("llama").eval(), "out")
        result["training"] = model.training
        result["logits"] = model(**batch("llama")).logits
        result["training again"] = PeftModel.from_pretrained(make("llama").train(), "out", is_trainable=True).training
    """,
    "classification": """
        from peft import LoraConfig, TaskType, get_peft_model
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "value"])
        model = get_peft_model(make("bert"), config)
        settle(model)
        for word in ("lora_", "lora_A", "lora_B", "modules_to_save", ".default", "classifier"):
            named = [p for n, p in model.named_parameters() if word in n and p.requires_grad]
            result[word] = sum(p.numel() for p in named)
        result["counts"] = model.get_nb_trainable_parameters()
        result["logits"] = model(**batch("bert")).logits
    """,
    "ia3": """
        from peft import IA3Config, TaskType, get_peft_model
        names = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}
        model = get_peft_model(make("t5"), IA3Config(peft_type="IA3", task_type=TaskType.SEQ_2_SEQ_LM, **names))
        settle(model)
        result["logits"] = model(**batch("t5")).logits
        result["merged"] = model.merge_and_unload()(**batch("t5")).logits
    """,
    "state dicts": """
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(make("llama"), config)
        settle(model)
        state = get_peft_model_state_dict(model)
        whole = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        result["of"] = dict(sorted(get_peft_model_state_dict(model, whole).items()))
        result["keys"] = sorted(get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name="default"))
        torch.save(state, "adapter.bin")
        other = get_peft_model(make("llama"), config)
        report = set_peft_model_state_dict(other, torch.load("adapter.bin"))
        result["unexpected"] = list(report.unexpected_keys)
        result["logits"] = other(**batch("llama")).logits
        small = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        result["loaded"] = other.load_state_dict(small, strict=False).unexpected_keys
    """,
    "files": """
        from peft import LoraConfig, get_peft_config, get_peft_model, load_peft_weights, set_peft_model_state_dict
        said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], "bias": "none"}
        model = get_peft_model(make("llama"), get_peft_config(said))
        settle(model)
        model.save_pretrained("out", state_dict=model.state_dict(), save_function=torch.save, max_shard_size="1GB")
        weights = load_peft_weights("out", device="cpu")
        result["weights"] = dict(sorted(weights.items()))
        model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
        set_peft_model_state_dict(model, weights, adapter_name="default")
        result["logits"] = model(**batch("llama")).logits
        report = model.load_adapter("out", "second")
        result["report"] = [report.missing_keys, report.unexpected_keys]
    """,
    "plain modules": """
        from peft import LoraConfig, get_layer_status, get_model_status, inject_adapter_in_model
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
        settle(model)
        result["output"] = model(torch.arange(8.0).view(2, 4))
        result["layers"] = [(s.name, s.active_adapters) for s in get_layer_status(model)]
        result["adapters"] = get_model_status(model).available_adapters
    """,
    "auto": """
        from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
        import transformers
        make("llama").save_pretrained("base")
        base = transformers.AutoModelForCausalLM.from_pretrained("base")
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        settle(model)
        model.save_pretrained("out")
        model = AutoPeftModelForCausalLM.from_pretrained("out")
        result["logits"] = model(**batch("llama")).logits
        result["merged"] = model.merge_and_unload()(**batch("llama")).logits
        model = AutoPeftModelForCausalLM.from_pretrained("out", is_trainable=True, dtype=torch.bfloat16)
        result["trained"] = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
        result["dtype"] = str(model.get_input_embeddings().weight.dtype)
    """,
    "several adapters": """
        from peft import LoraConfig, PeftModel, get_peft_model
        model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="a")
        settle(model)
        model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("b")
        settle(model)
        model.save_pretrained("out")
        model = PeftModel.from_pretrained(make("llama"), "out", subfolder="a", adapter_name="a")
        model.load_adapter("out/b", adapter_name="b")
        rows = ["a", "b", "__base__", "b"]
        result["rows"] = model(**batch("llama"), adapter_names=rows).logits
        result["said"] = model.generate(**batch("llama"), adapter_names=rows, max_new_tokens=3, do_sample=False)
        with model.disable_adapter():
            result["off"] = model(**batch("llama")).logits
    """,
}


def settle(model: Any) -> None:
    """Values for what trains, the same whatever library named it and in whatever order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3
                parameter.copy_(noise) if "lora_" in name else parameter.add_(noise)


def moved(script: str) -> str:
    """The script with import lines of these packages."""

    def lines(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[1].split(",")]
        return "\n".join(f"from {OURS.get(name, 'peft_core')} import {name}" for name in names)

    return re.sub(r"^from peft import (.*)$", lines, script, flags=re.MULTILINE)


def run(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder.mkdir()
    monkeypatch.chdir(folder)
    result: dict[str, Any] = {}
    names = {"result": result, "make": make, "batch": batch, "settle": settle, "torch": torch, "nn": nn}
    torch.manual_seed(0)
    exec(compile(script, "script", "exec"), names)
    return result


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_users_script_gives_the_same_after_a_change_of_import_lines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = textwrap.dedent(SCRIPTS[name])
    theirs = run(script, tmp_path / "theirs", monkeypatch)
    printed = capsys.readouterr().out
    ours = run(moved(script), tmp_path / "ours", monkeypatch)
    assert capsys.readouterr().out == printed
    assert list(ours) == list(theirs)
    assert theirs, "it found something out"
    for key, value in theirs.items():
        if isinstance(value, (Tensor, dict)):
            # The same sums in another order, in float32.
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")  # type: ignore[misc]
        else:
            assert ours[key] == value, key
