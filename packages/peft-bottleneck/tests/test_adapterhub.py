"""AdapterHub's folders give AdapterHub's numbers, and what cannot be read is refused by name.

The files in `data` were written by AdapterHub's own library (data/make_adapterhub.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_core import CheckpointError, CheckpointMismatchError, ConfigError, PeftModel

DATA = Path(__file__).parent / "data"
EXPECTED = load_file(DATA / "expected.safetensors")
CASES = sorted(key for key in EXPECTED if "/" in key and "+" not in key)
STACKS = sorted(key for key in EXPECTED if "+" in key)

CLASSES: dict[str, tuple[Any, Any]] = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
    "vit": (transformers.ViTConfig, transformers.ViTForImageClassification),
}
STYLES = {
    "houlsby": "houlsby",
    "pfeiffer": "pfeiffer",
    "parallel": "parallel",
    "cross": "houlsby",
    "norm": "pfeiffer",
    "with": "houlsby",
}


def base(kind: str, tmp_path: Path) -> Any:
    """The base as transformers loads it, which knows what a file of its earlier release means."""
    config_class, model_class = CLASSES[kind]
    fields = json.loads((DATA / kind / "base.json").read_text())
    config_class(**fields, architectures=[model_class.__name__]).save_pretrained(tmp_path / "base")
    save_file(load_file(DATA / kind / "base.safetensors"), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    return model_class.from_pretrained(tmp_path / "base").eval()


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    if kind == "vit":
        found: Tensor = model(pixel_values=EXPECTED["pixel_values"]).logits
        return found
    given = {"input_ids": EXPECTED["input_ids"], "attention_mask": EXPECTED["attention_mask"]}
    if kind in ("t5", "bart"):
        given["decoder_input_ids"] = EXPECTED["input_ids"].flip(1)
    found = model(**given).logits
    return found


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Two releases of transformers and two ways to order sums: float32 has 6e-8, and these models some dozens of operations.
NEAR = 2e-6


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_adapterhub(case: str, tmp_path: Path) -> None:
    kind, _, name = case.partition("/")
    model = base(kind, tmp_path)
    assert gap(logits(model, kind), EXPECTED[kind]) < NEAR, "the base itself differs"
    model = PeftModel.from_pretrained(model, DATA / kind / name)
    assert gap(logits(model, kind), EXPECTED[case]) < NEAR
    assert gap(EXPECTED[case], EXPECTED[kind]) > 100 * NEAR
    assert model.peft_config["default"].style == STYLES[name.partition("_")[0]]


@pytest.mark.parametrize("case", STACKS)
def test_stacks_are_those_of_adapterhub(case: str, tmp_path: Path) -> None:
    """`Stack("a", "b")` is `set_adapter(["a", "b"])`: the first is the innermost, at norms too.

    Where the two sit at different modules (before the sum and at the norm behind it) their order is the modules'.
    """
    kind, _, names = case.partition("/")
    model = base(kind, tmp_path)
    first, second = names.split("+")
    model = PeftModel.from_pretrained(model, DATA / kind / first, first)
    model.load_adapter(DATA / kind / second, second)
    model.set_adapter([first, second])
    assert gap(logits(model, kind), EXPECTED[case]) < NEAR
    model.set_adapter([second, first])
    same_place = kind not in ("bert", "roberta", "bart") or "houlsby" not in case
    assert (gap(logits(model, kind), EXPECTED[case]) > 100 * NEAR) == same_place


def test_saved_again_it_is_a_file_of_this_library(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(base("t5", tmp_path), DATA / "t5/houlsby_extras")
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(base("t5", tmp_path), tmp_path / "ours")
    assert torch.equal(logits(again, "t5"), logits(model, "t5"))
    config = again.peft_config["default"]
    assert config.reduction_factor == {"0": 2, "default": 4} and config.leave_out == (1,) and config.ln_after
    assert (config.scaling, config.non_linearity, config.cross_adapter) == ("learned", "gelu", False)


class TestHeads:
    def test_the_models_own_is_taken_along(self, tmp_path: Path) -> None:
        """The case "bert/with_head" above has the right logits; here, that they come from a copy."""
        model = base("bert", tmp_path)
        before = model.classifier.weight.clone()
        model = PeftModel.from_pretrained(model, DATA / "bert/with_head")
        assert torch.equal(model.base_state_dict()["classifier.weight"], before)
        assert model.peft_config["default"].modules_to_save == ("classifier",)
        with model.disable_adapter():
            assert gap(logits(model, "bert"), EXPECTED["bert"]) < NEAR

    def test_one_that_is_the_models_needs_no_copy(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        shutil.copytree(DATA / "gpt2/houlsby", folder)
        weights = load_file(DATA / "gpt2/base.safetensors")
        save_file({"lm_head.weight": weights["transformer.wte.weight"]}, folder / "model_head.safetensors")
        model = PeftModel.from_pretrained(base("gpt2", tmp_path), folder)
        assert model.peft_config["default"].modules_to_save is None

    def test_one_of_adapterhubs_is_left_out_with_a_warning(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        shutil.copytree(DATA / "bert/houlsby", folder)
        save_file({"heads.sst-2.1.weight": torch.ones(8, 8)}, folder / "model_head.safetensors")
        with pytest.warns(UserWarning, match=r"heads\.sst-2\.1\.weight.*was not read"):
            model = PeftModel.from_pretrained(base("bert", tmp_path), folder)
        assert gap(logits(model, "bert"), EXPECTED["bert/houlsby"]) < NEAR


# ---- what is refused


Edit = Callable[[Path], None]


def config_with(**fields: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        meta = json.loads(file.read_text())
        meta["config"].update(fields)
        file.write_text(json.dumps(meta))

    return edit


def tensors_with(change: Callable[[dict[str, Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")

    return edit


def instead(name: str, content: bytes, *, of: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / of).unlink()
        (folder / name).write_bytes(content)

    return edit


def whole_config(value: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "config": value}))

    return edit


DOWN = "bert.encoder.layer.1.output.adapters.houlsby.adapter_down.0.weight"
REFUSALS: dict[str, tuple[Edit, type[Exception], str]] = {
    "invertible": (config_with(inv_adapter="nice"), CheckpointError, "inv_adapter='nice': an invertible adapter"),
    "compacter": (config_with(phm_layer=True), CheckpointError, r"phm_layer=True: hypercomplex projections"),
    "gate": (config_with(use_gating=True), CheckpointError, "use_gating=True: a trained gate"),
    "depth": (config_with(stochastic_depth=0.5), CheckpointError, "stochastic_depth=0.5: stochastic depth"),
    "inner norm": (config_with(ln_after=True, adapter_residual_before_ln=True), CheckpointError, "behind the sum"),
    "order": (config_with(residual_before_ln=False), CheckpointError, "residual_before_ln=False: another order"),
    "parallel order": (config_with(is_parallel=True, original_ln_before=True), CheckpointError, "another order"),
    "no norm": (config_with(original_ln_after=False), CheckpointError, "original_ln_after=False"),
    "unknown field": (config_with(frequency=3), CheckpointError, "frequency=3: unknown here"),
    "activation": (config_with(non_linearity="mish"), ConfigError, "unknown activation function"),
    "lora": (config_with(architecture="lora"), CheckpointError, "architecture 'lora', and only bottleneck adapters"),
    "name": (whole_config("pfeiffer"), CheckpointError, "its config is 'pfeiffer'"),
    "missing": (lambda folder: (folder / "adapter.safetensors").unlink(), CheckpointError, "is missing"),
    "pickle": (
        instead("pytorch_adapter.bin", b"cos\nsystem\n", of="adapter.safetensors"),
        CheckpointError,
        r"a pickle, which can run any code.*weights_only=True.*'adapter.safetensors'",
    ),
    "head pickle": (
        lambda folder: (folder / "pytorch_model_head.bin").write_bytes(b""),
        CheckpointError,
        r"pytorch_model_head.bin: a pickle.*'model_head.safetensors'",
    ),
    "cut": (lambda folder: (folder / "adapter.safetensors").write_bytes(b"short"), CheckpointError, "cannot be read"),
    "other layer": (
        tensors_with(lambda t: t.update({DOWN.replace("layer.1", "layer.7"): t.pop(DOWN)})),
        CheckpointMismatchError,
        r"1 of its tensors belong to no sub-layer.*layer\.7",
    ),
    "other slot": (tensors_with(lambda t: t.update({f"{DOWN}2": t.pop(DOWN)})), CheckpointMismatchError, "weight2"),
    "too few": (tensors_with(lambda t: t.pop(DOWN)), CheckpointMismatchError, r"1 missing:[\s\S]*down\.weight"),
    "shape": (
        tensors_with(lambda t: t.update({DOWN: torch.ones(3, 8)})),
        CheckpointMismatchError,
        r"1 mismatched:[\s\S]*\(3, 8\)",
    ),
    "fusion": (
        lambda folder: (folder / "adapter_fusion_config.json").write_text("{}"),
        CheckpointError,
        r"a fusion of adapters \(AdapterFusion\)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_read_is_refused(case: str, tmp_path: Path) -> None:
    edit, error, message = REFUSALS[case]
    folder = tmp_path / "folder"
    shutil.copytree(DATA / "bert/houlsby", folder)
    edit(folder)
    model = base("bert", tmp_path)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(model, folder)
    assert type(model) is CLASSES["bert"][1]
    assert gap(logits(model, "bert"), EXPECTED["bert"]) < NEAR


def test_all_that_is_wrong_with_a_config_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(DATA / "bert/houlsby", folder)
    config_with(inv_adapter="nice", use_gating=True)(folder)
    with pytest.raises(CheckpointError, match=r"invertible[\s\S]*gate"):
        PeftModel.from_pretrained(base("bert", tmp_path), folder)


@pytest.mark.parametrize("config", ["{}", "[]", "not json", '{"config": {}, "model_type": "bert"}'])
def test_other_folders_are_left_to_others(config: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing"):
        PeftModel.from_pretrained(base("bert", tmp_path), tmp_path)


def test_the_conversion_that_the_message_gives(tmp_path: Path) -> None:
    """A file with one norm under two names, which safetensors refuses to write as it is."""
    file = load_file(DATA / "bert/norm_before/adapter.safetensors")
    start = "bert.encoder.layer.0.output.adapters.norm_before."
    norm = file[f"{start}adapter_norm_before.weight"]
    assert torch.equal(norm, file[f"{start}adapter_down.0.weight"])  # the numbers are those of the case above
    torch.save({f"{start}adapter_down.0.weight": norm, f"{start}twice": norm}, tmp_path / "pytorch_adapter.bin")
    shutil.copy(DATA / "bert/norm_before/adapter_config.json", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(base("bert", tmp_path), tmp_path)
    command = str(caught.value).partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert load_file(tmp_path / "adapter.safetensors").keys() == {f"{start}adapter_down.0.weight", f"{start}twice"}
