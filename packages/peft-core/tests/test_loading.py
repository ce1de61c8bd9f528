"""An adapter from files onto a model: strict, whole, and touching nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import GainConfig, SumConfig, digest, net, randomise

from peft_core import (
    AdapterNameError,
    CheckpointError,
    CheckpointMismatchError,
    MethodError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hookimpl,
)
from peft_core.extensions import extensions

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
CONFIG = SumConfig(target_modules=["up", "down"], modules_to_save=["classifier"], scale=0.5)

pytestmark = pytest.mark.usefixtures("toy_methods")


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(net(), CONFIG)
    randomise(model)
    model.save_pretrained(tmp_path)
    return tmp_path, model(IDS)


def test_reload_on_a_fresh_base_is_exact(saved):
    path, expected = saved
    assert sorted(p.name for p in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = net()
    assert PeftModel.from_pretrained(model, path) is model
    assert torch.equal(model(IDS), expected)
    assert model.training and not any(p.requires_grad for p in model.parameters())  # a load changes no mode
    assert not PeftModel.from_pretrained(net().eval(), path, is_trainable=True).training
    assert model.peft_config["default"].scale == 0.5 and model.peft_config["default"].inference_mode
    trainable = PeftModel.from_pretrained(net(), path, is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) == 8 + 2


def test_several_adapters_and_their_folders(saved, tmp_path):
    path, expected = saved
    model = get_peft_model(net(), GainConfig(target_modules=["up"]), "first")
    randomise(model, "first", seed=5)
    before = model(IDS)
    report = model.load_adapter(path, "second")
    assert not report.missing and not report.unexpected
    assert model.active_adapters == ["first"] and torch.equal(model(IDS), before)
    model.set_adapter("second")
    assert torch.equal(model(IDS), expected)
    target = tmp_path / "both"
    model.save_pretrained(target)
    assert sorted(p.name for p in target.iterdir()) == ["first", "second"]
    model.save_pretrained(tmp_path / "one", selected_adapters=["first"])
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path / "one" / "first")(IDS), before)
    with pytest.raises(AdapterNameError, match="replace=True"):
        model.load_adapter(path, "second")


def test_replacing_keeps_tensors_where_only_values_change(saved):
    path, expected = saved
    model = get_peft_model(net(), CONFIG)
    identities = [id(p) for p in model.parameters() if p.requires_grad]
    model.load_adapter(path, "default", replace=True)
    assert torch.equal(model(IDS), expected)
    assert [id(p) for p in model.parameters() if p.requires_grad] == identities
    other = get_peft_model(net(), GainConfig(target_modules=["up"]))
    other.load_adapter(path, "default", replace=True)
    assert torch.equal(other(IDS), expected) and other.active_adapters == ["default"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_does_not_fit_changes_nothing(saved, replace):
    path, _ = saved
    weights = path / "adapter_model.safetensors"
    good = load_file(weights)
    first = next(key for key in good if key.endswith("up.u"))
    spoiled = {
        "missing": ({k: v for k, v in good.items() if k != first}, first),
        "unknown": ({**good, "base_model.model.embed.weight_2": torch.ones(3)}, "embed.weight_2"),
        "shape": ({**good, first: torch.ones(3)}, first),
        "infinite": ({**good, first: torch.full_like(good[first], torch.nan)}, first),
        "foreign": ({**good, "base_model.model.layers.0.norm.u": torch.ones(8)}, "layers.0.norm.u"),
    }
    model = get_peft_model(net(), CONFIG, "default" if replace else "other")
    before = digest(model)
    for kind, (tensors, culprit) in spoiled.items():
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(CheckpointMismatchError) as caught:
            model.load_adapter(path, "default", replace=replace)
        assert culprit.removeprefix("base_model.model.") in str(caught.value), kind
        assert digest(model) == before, kind


def test_not_strict_loads_what_fits_and_says_what_does_not(saved):
    path, _ = saved
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    gone = next(key for key in tensors if key.endswith("up.u"))
    kept = next(key for key in tensors if key.endswith("up.v"))
    del tensors[gone]
    save_file({**tensors, "extra": torch.ones(1)}, weights, metadata={"format": "pt"})
    model = get_peft_model(net(), CONFIG, "other")
    report = model.load_adapter(path, "default", strict=False)
    assert list(report.missing) == [gone] and list(report.unexpected) == ["extra"]
    state = get_peft_model_state_dict(model, adapter_name="default")
    assert torch.equal(state[kept], tensors[kept]) and torch.equal(state[gone], torch.zeros_like(state[gone]))


def test_a_tensor_of_another_shape_is_reported_and_keeps_its_start_without_strict(saved):
    path, _ = saved
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    wrong, kept = "base_model.model.layers.0.up.u", "base_model.model.layers.1.up.u"
    save_file({**tensors, wrong: torch.ones(3)}, weights, metadata={"format": "pt"})
    model = get_peft_model(net(), CONFIG, "other")
    report = model.load_adapter(path, "default", strict=False)
    assert list(report.mismatched) == [wrong] and not report.missing
    state = get_peft_model_state_dict(model, adapter_name="default")
    assert torch.equal(state[kept], tensors[kept]) and torch.equal(state[wrong], torch.zeros_like(state[wrong]))


def test_base_weights_in_a_file_never_reach_the_model(saved):
    path, expected = saved
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    base = net().embed.weight.detach()
    save_file({**tensors, "base_model.model.embed.weight": base}, weights, metadata={"format": "pt"})
    assert torch.equal(PeftModel.from_pretrained(net(), path)(IDS), expected)
    save_file({**tensors, "base_model.model.embed.weight": base + 1}, weights, metadata={"format": "pt"})
    model = net()
    before = digest(model)
    with pytest.raises(CheckpointMismatchError, match=r"embed\.weight.*never writes the base"):
        PeftModel.from_pretrained(model, path)
    assert digest(model) == before


def test_missing_files_and_methods_are_named(saved, tmp_path):
    path, _ = saved
    with pytest.raises(CheckpointError, match="nowhere"):
        PeftModel.from_pretrained(net(), tmp_path / "nowhere")
    (path / "adapter_model.safetensors").unlink()
    tensors = get_peft_model_state_dict(get_peft_model(net(), CONFIG))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NOSUCH"}))
    with pytest.raises(MethodError, match="nosuch"):
        PeftModel.from_pretrained(net(), path)


def test_half_precision_bases_keep_float32_adapters(saved):
    path, _ = saved
    model = PeftModel.from_pretrained(net().to(torch.bfloat16), path)
    dtypes = {p.dtype for p in model._peft.adapters["default"].parameters()}
    assert dtypes == set() or dtypes == {torch.float32}
    assert {t.dtype for t in get_peft_model_state_dict(model).values()} == {torch.float32}
    assert model(IDS).dtype == torch.bfloat16
    low = PeftModel.from_pretrained(net().to(torch.bfloat16), path, autocast_adapter_dtype=False)
    assert {t.dtype for t in get_peft_model_state_dict(low).values()} == {torch.bfloat16}


def test_replacing_takes_the_files_config_even_where_shapes_agree(saved):
    path, expected = saved
    model = get_peft_model(net(), CONFIG.resolve(scale=2.0))
    model.load_adapter(path, "default", replace=True, is_trainable=True)
    assert model.peft_config["default"].scale == 0.5 and torch.equal(model(IDS), expected)
    assert all(p.requires_grad for p in model._peft.adapters["default"].parameters())


def test_adapters_are_loaded_to_where_the_layers_are(saved):
    path, expected = saved
    with pytest.raises(CheckpointError, match="torch_device='meta'.*cpu"):
        PeftModel.from_pretrained(net(), path, torch_device="meta")
    assert torch.equal(PeftModel.from_pretrained(net(), path, torch_device="cpu")(IDS), expected)


def test_pickled_files_are_not_written(saved, tmp_path):
    model = PeftModel.from_pretrained(net(), saved[0])
    with pytest.raises(CheckpointError, match="safetensors only"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_an_extension_reads_foreign_files(saved, tmp_path):
    path, expected = saved
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())

    class Foreign:
        @hookimpl
        def peft_checkpoint(self, path):
            return (config, tensors) if path.suffix == ".foreign" else None

    (tmp_path / "x.foreign").write_text("not ours")
    extensions.register(Foreign(), "foreign")
    try:
        model = PeftModel.from_pretrained(net(), tmp_path / "x.foreign")
        # Not to the bit: how the reader's tensors lie in memory decides which kernels run.
        torch.testing.assert_close(model(IDS), expected, rtol=1e-6, atol=1e-6)
    finally:
        extensions.unregister("foreign")
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(net(), tmp_path / "x.foreign")
