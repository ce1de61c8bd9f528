"""The free functions: what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from toys import GainConfig, SumConfig, net, randomise

from peft_core import (
    AdapterConfig,
    AdapterNotFoundError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    MergeError,
    PeftConfig,
    PeftError,
    PeftModel,
    TaskType,
    get_layer_status,
    get_model_status,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
CONFIG = SumConfig(target_modules=["up", "down"], modules_to_save=["classifier"])


pytestmark = pytest.mark.usefixtures("toy_methods")


def adapted():
    model = get_peft_model(net(), CONFIG)
    randomise(model)
    return model


def test_tensors_go_from_one_model_into_another():
    model, other = adapted(), get_peft_model(net(), CONFIG)
    before = {id(p) for p in other.parameters()}
    report = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert report.ok and report.missing_keys == report.unexpected_keys == []
    assert {id(p) for p in other.parameters()} == before, "an optimizer's parameters stay"
    assert torch.equal(other(IDS), model(IDS))
    # Keys of a writer that puts nothing in front.
    bare = {key.removeprefix("base_model.model."): 2 * t for key, t in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(other, bare)
    assert torch.equal(next(iter(get_peft_model_state_dict(other).values())), next(iter(bare.values())))


def test_what_does_not_fit_is_refused_and_nothing_changed():
    model = adapted()
    expected = model(IDS)
    state = {key: tensor.detach() + 1 for key, tensor in get_peft_model_state_dict(model).items()}
    first, *rest = state
    wrong = [
        {key: state[key] for key in rest},
        {**state, "else.weight": torch.ones(1)},
        {**state, first: torch.ones(1, 1)},
        {**state, first: torch.full_like(state[first], float("nan"))},
        {**state, "base_model.model.layers.0.up.base_layer.weight": torch.ones(1)},
    ]
    for given in wrong:
        with pytest.raises(CheckpointError):
            set_peft_model_state_dict(model, given)
        assert torch.equal(model(IDS), expected)
    report = set_peft_model_state_dict(model, {**wrong[0], "else.weight": torch.ones(1)}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([first], ["else.weight"])
    assert torch.equal(get_peft_model_state_dict(model)[rest[0]], state[rest[0]])


def test_adapters_are_named_and_must_be_there_and_unmerged():
    model = adapted()
    state = get_peft_model_state_dict(model)
    for call in (lambda: get_peft_model_state_dict(model, adapter_name="b"), lambda: set_b(model, state)):
        with pytest.raises(AdapterNotFoundError, match="no adapter 'b'"):
            call()
    model.merge_adapter()
    with pytest.raises(MergeError, match="set_peft_model_state_dict"):
        set_peft_model_state_dict(model, state)
    for call in (get_peft_model_state_dict, get_layer_status, get_model_status, lambda m: set_b(m, {})):
        with pytest.raises(PeftError, match="no adapters; make one with get_peft_model"):
            call(net())


def set_b(model, state):
    return set_peft_model_state_dict(model, state, adapter_name="b")


def test_a_gathered_state_dict_gives_the_values():
    model = adapted()
    model.add_adapter("b", GainConfig(target_modules=["up"]))
    whole = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for name in ("default", "b"):
        mine = get_peft_model_state_dict(model, adapter_name=name)
        gathered = get_peft_model_state_dict(model, whole, name)
        assert gathered.keys() == mine.keys()
        assert all(torch.equal(gathered[key], mine[key] + 1) for key in mine)
    lacking = {name: tensor for name, tensor in whole.items() if "adapters" not in name}
    with pytest.raises(CheckpointError, match=r"the state dict lacks layers\.0\.up\.adapters\.default"):
        get_peft_model_state_dict(model, lacking)


def test_weights_of_a_directory(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded, state = load_peft_weights(tmp_path), get_peft_model_state_dict(model)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    with pytest.raises(CheckpointError, match="no such sub-folder"):
        load_peft_weights(tmp_path, subfolder="b")


def test_injecting_is_adapting():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    config = SumConfig(target_modules=["0"])
    assert inject_adapter_in_model(config, model) is model and isinstance(model, PeftModel)
    inject_adapter_in_model(config, model, "b")
    assert (list(model.peft_config), model.active_adapter) == (["default", "b"], "b")
    assert get_model_status(model) == model.get_model_status()
    assert get_layer_status(model) == model.get_layer_status()


def test_other_names_of_configs_and_tasks():
    assert PeftConfig is AdapterConfig
    config = get_peft_config({"peft_type": "TOYSUM", "scale": 2.0, "task_type": "SEQ_CLS"})
    assert config == SumConfig(peft_type="TOYSUM", scale=2.0, task_type=TaskType.SEQ_CLS)
    assert config.task_type == TaskType.SEQ_CLS and type(config.task_type) is str
    with pytest.raises(ConfigError, match="peft_type: SumConfig has no such field"):
        SumConfig(peft_type="TOYGAIN")


def test_words_of_parameter_names_that_filters_look_for():
    names = [name for name, parameter in adapted().named_parameters() if parameter.requires_grad]
    assert {name for name in names if "classifier" in name} == {name for name in names if "modules_to_save" in name}
    assert all(".default." in name for name in names)


def test_the_base_is_not_saved_and_its_class_is(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, save_embedding_layers=False, save_function=torch.save, max_shard_size="1GB")
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["auto_mapping"] == {"base_model_class": "Net", "parent_library": type(net()).__module__}
    with pytest.raises(CheckpointError, match="save_embedding_layers: the base's tables are not written"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    model = get_peft_model(net(), CONFIG.resolve(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert "auto_mapping" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_a_load_changes_no_mode(tmp_path):
    adapted().save_pretrained(tmp_path)
    for trainable in (False, True):
        for mode in (False, True):
            model = PeftModel.from_pretrained(net().train(mode), tmp_path, is_trainable=trainable)
            modules = [module for module in model.modules() if type(module) is not nn.Module]  # no mere containers
            assert {module.training for module in modules} == {mode}
    model = net().train()
    with pytest.raises(CheckpointMismatchError):
        PeftModel.from_pretrained(model, tmp_path, config=CONFIG.resolve(modules_to_save=None))
    assert model.training
