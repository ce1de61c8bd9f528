"""Trap T16: accelerate sets an instance's `forward` on modules it offloads; what hosts adapters composes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from peft_core import Adapter, AdapterConfig, PeftModel, SiteRequest, get_peft_model
from tests.tiny_transformers import gradients, make
from tests.toy_plugins import plugin, randomise, registered

IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4], [6, 6, 9, 10]])
TASKS = [2, 0, 1]
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
DEVICES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
DEVICES |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")


class MixedConfig(AdapterConfig):
    """Adapters on layers, on a block, on the backbone and on the model itself, all with request arguments."""

    peft_type: ClassVar[str] = "TOYMIXED"
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)


class Mixed(Adapter):
    uses_call = True

    def __init__(self, layer: Any, config: MixedConfig) -> None:
        super().__init__(layer)
        self.shift = layer.parameter(3, layer.request.meta["width"])

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out, call = base(*args, **kwargs), base.call
        assert call.scratch.setdefault((self.shared, "of one call"), call.phase) == call.phase
        states = out if isinstance(out, Tensor) else out.get("logits", out.get("last_hidden_state"))
        shifted = states + self.shift[call.rows("task_ids", len(states))][:, None]
        if isinstance(out, Tensor):
            return shifted
        out["logits" if "logits" in out else "last_hidden_state"] = shifted
        return out


def sites(model: Any) -> list[SiteRequest]:
    widths = {"": 32, "model": 16, "model.layers.0": 16, "model.layers.1": 16, "model.embed_tokens": 16}
    widths |= {f"model.layers.{i}.mlp.up_proj": 24 for i in range(2)} | {"lm_head": 32}
    return [SiteRequest(path, meta={"width": width}) for path, width in widths.items()]


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(plugin(MixedConfig, Mixed, peft_sites=sites)):
        yield


def cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model: Any, folder: Path) -> Any:
    devices = DEVICES
    if isinstance(model, PeftModel):  # a block's parts are one level further in
        devices = {"model": "disk", "lm_head": "cpu", "_peft_root": "cpu"}
    return accelerate.dispatch_model(
        model, device_map=devices, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def answers(model: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        logits = model(IDS, task_ids=TASKS).logits
        tokens = model.generate(IDS, task_ids=TASKS, num_beams=2, **OPTIONS)
    model.zero_grad()
    model.train()
    model(IDS, labels=IDS, task_ids=TASKS).loss.backward()
    model.eval()
    # The model computes the loss from logits that the outermost adapter has not shifted yet.
    grads = {name: grad.clone() for name, grad in gradients(model).items() if "_peft_root" not in name}
    return logits, tokens, grads


def equal(model: Any, expected: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    logits, tokens, grads = answers(model)
    assert torch.equal(logits, expected[0]) and torch.equal(tokens, expected[1])
    assert grads.keys() == expected[2].keys()
    for name, grad in grads.items():
        assert torch.equal(grad, expected[2][name]), name


@pytest.fixture
def expected(tmp_path: Path) -> Any:
    model = randomise(get_peft_model(make("llama"), MixedConfig()), std=1.0)
    model.save_pretrained(tmp_path / "saved")
    found = answers(model)
    with model.disable_adapter():
        assert (model(IDS).logits - found[0]).abs().max() > 0.1
    return found


@pytest.mark.parametrize("offload", [cpu, dispatched])
def test_t16_adapters_of_an_offloaded_model(offload: Callable[[Any, Path], Any], expected: Any, tmp_path: Path) -> None:
    model = offload(make("llama"), tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in model.parameters())
    PeftModel.from_pretrained(model, tmp_path / "saved", is_trainable=True)
    adapters = model._peft.record("default")
    assert all(tensor.device.type == "cpu" for tensor in adapters.tensors())
    equal(model, expected)
    equal(model, expected)  # what was fetched is gone, and comes again
    model.add_adapter("fresh", MixedConfig())
    model.set_adapter("fresh")
    fresh = model._peft.record("fresh")
    assert all(tensor.device.type == "cpu" for tensor in fresh.tensors()), "built where the layers compute"
    with model.disable_adapter():
        base = model(IDS).logits
    assert torch.equal(model(IDS, task_ids=TASKS).logits, base)
    plain = model.unload()
    assert type(plain) is type(make("llama")) and torch.equal(plain(IDS).logits, make("llama")(IDS).logits)


@pytest.mark.parametrize("offload", [cpu, dispatched])
def test_t16_offloading_a_model_with_adapters(
    offload: Callable[[Any, Path], Any], expected: Any, tmp_path: Path
) -> None:
    """Adapters go where the blocks go."""
    model = PeftModel.from_pretrained(make("llama"), tmp_path / "saved")
    model = offload(model, tmp_path / "offloaded")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(IDS, task_ids=TASKS).logits, expected[0])
        assert torch.equal(model.generate(IDS, task_ids=TASKS, num_beams=2, **OPTIONS), expected[1])
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, make("llama")(IDS).logits)
        remove_hook_from_module(model, recurse=True)  # each weight comes back to its module
        assert not any(hasattr(module, "_hf_hook") for module in model.modules())
        assert torch.equal(model(IDS, task_ids=TASKS).logits, expected[0])


def test_t16_hooks_on_sites_of_hooked_modules_go_on_calling_the_adapters(expected: Any, tmp_path: Path) -> None:
    model = cpu(make("llama"), tmp_path)
    PeftModel.from_pretrained(model, tmp_path / "saved")
    for site in model._peft.sites.values():
        add_hook_to_module(site, ModelHook())
    with torch.no_grad():
        assert torch.equal(model(IDS, task_ids=TASKS).logits, expected[0])
        for site in model._peft.sites.values():
            remove_hook_from_module(site)
        assert torch.equal(model(IDS, task_ids=TASKS).logits, expected[0])
