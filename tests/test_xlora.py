"""X-LoRA: the paper's two passes by hand, HF PEFT's outputs, and everything a mixture of adapters must survive."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import peft
import pytest
import torch

from peft_core import (
    AdapterNameError,
    AdapterNotFoundError,
    ConfigError,
    MergeError,
    PeftError,
    PeftModel,
    RequestError,
    TargetError,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft_ia3 import IA3Config
from peft_lora import LoraConfig, XLoraConfig, xlora_controls
from tests.tiny_transformers import fresh, make

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 5, 3, 4, 11]])
EXPERTS = ("0", "1", "2")  # HF PEFT 0.21.2 knows no other names
TARGETS = ["q_proj", "down_proj"]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 7, "softmax_temperature": 0.5},
    {"xlora_depth": 3, "xlora_size": 6, "xlora_dropout_p": 0.0},
    {"top_k_lora": 2, "global_scaling_weight": 1.7},
    {"layerwise_scalings": True, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
]


def randomise(model: Any, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model._peft.adapters[name].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_experts(model: Any = None) -> Any:
    """A Llama with three LoRAs whose values are random; not all adapt the same layers."""
    model = make("llama") if model is None else model
    for number, name in enumerate(EXPERTS):
        config = LoraConfig(r=2 + number, lora_alpha=5, target_modules=TARGETS if number else ["q_proj", "down_proj"])
        if number:
            model.add_adapter(name, config)
        else:
            get_peft_model(model, config, name)
        randomise(model, name, number)
    return model


def mixed(model: Any = None, **settings: Any) -> Any:
    model = with_experts(model)
    model.add_adapter("mix", XLoraConfig(adapters=EXPERTS, **settings))
    randomise(model, "mix", 7)
    model.set_adapter("mix")
    return model


def test_two_passes_by_hand() -> None:
    """Section 2 of the paper, with the scalings of every token and layer put together from the experts' factors."""
    model = mixed(layerwise_scalings=True)
    with torch.no_grad():
        found = model(IDS).logits
        with model.disable_adapter():
            hidden = model(IDS, output_hidden_states=True).hidden_states[-1]
        weight, bias = get_peft_model_state_dict(model, adapter_name="mix").values()
        sites = [site for path, site in model._peft.sites.items() if path.endswith(tuple(TARGETS))]
        paths = [path for path, _ in make("llama").named_modules()]
        order = sorted(range(4), key=lambda i: paths.index(sites[i]._layer.path))
        scalings = (hidden @ weight.t() + bias).view(*IDS.shape, 4, 3).softmax(-1)
        torch.testing.assert_close(xlora_controls(model).get_latest_scalings(), scalings)

        plain = copy.deepcopy(model).unload()
        for index, at in enumerate(order):
            module = plain.get_submodule(sites[at]._layer.path)
            loras = [sites[at].of(name)[""] for name in EXPERTS]

            def add(_: Any, args: Any, out: Any, loras: Any = loras, g: Any = scalings[:, :, index]) -> Any:
                x = args[0].view(*IDS.shape, -1)
                parts = [s * (x @ a.t() @ b.t()) for s, a, b in ((m.scaling, m.lora_A, m.lora_B) for m in loras)]
                return out + sum(g[..., k, None] * part for k, part in enumerate(parts)).view(out.shape)

            module.register_forward_hook(add)
        expected = plain(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # float32, sums in another order
    with torch.no_grad(), model.disable_adapter():
        assert (model(IDS).logits - expected).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")  # the other library's
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
def test_the_same_as_hf(settings: dict[str, Any], tmp_path: Any) -> None:
    ours = mixed(**settings)
    ours.save_pretrained(tmp_path, selected_adapters=EXPERTS)
    base = make("llama")
    base.config.use_cache = False
    theirs = peft.get_peft_model(
        base,
        peft.XLoraConfig(hidden_size=16, adapters={n: str(tmp_path / n) for n in EXPERTS}, **settings),
    ).eval()
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, value in get_peft_model_state_dict(ours, adapter_name="mix").items():
            parameters[key].copy_(value)  # the very names that HF has, or this fails
        found, expected = ours(IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))  # float32
    torch.testing.assert_close(xlora_controls(ours).get_latest_scalings(), theirs.get_latest_scalings())


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["shared", "layerwise"])
def test_generation_with_the_cache_is_generation_without(settings: dict[str, Any]) -> None:
    model = mixed(**settings)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, **options), plain)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), plain)
    beams = model.generate(IDS, use_cache=False, num_beams=3, **options)
    assert torch.equal(model.generate(IDS, num_beams=3, **options), beams)
    alone = model.generate(IDS[1:, 2:], max_new_tokens=6, do_sample=False)
    assert torch.equal(plain[1, 2:], alone[0])
    # By hand, step by step, from the cache that the first call makes.
    with torch.no_grad():
        first = model(IDS[:, :3], use_cache=True)
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        step = model(IDS[:, 3:], **{name: first.past_key_values}).logits
        torch.testing.assert_close(step, model(IDS).logits[:, 3:], rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            other = model(IDS[:, :3], use_cache=True).past_key_values
        with pytest.raises(RequestError, match="filled while X-LoRA was not active"):
            model(IDS[:, 3:], **{name: other})


@pytest.mark.parametrize("trains", [False, True], ids=["classifier", "and experts"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_training(trains: bool, recompute: bool) -> None:
    model = mixed(fresh("llama"), layerwise_scalings=True, use_trainable_adapters=trains).train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(("classifier" in name) or trains for name in trained) and len(trained) == 2 + trains * 24
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    # What trained along goes to rest again.
    model.set_adapter("0")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} <= {"0", "default"}


def test_recompute_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        model = mixed(layerwise_scalings=True, xlora_dropout_p=0.0).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-7)


def test_saved_whole_and_reloaded_exactly(tmp_path: Any) -> None:
    """HF's file loses the classifier, or part of it; its experts' folders hold the base."""
    model = mixed(xlora_depth=3, xlora_size=6, top_k_lora=2)
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    keys = [f"base_model.internal_xlora_classifier.layers.{i}.{n}" for i in (0, 3, 6) for n in ("weight", "bias")]
    assert list(get_peft_model_state_dict(model, adapter_name="mix")) == keys
    again = make("llama")
    with pytest.raises(AdapterNotFoundError, match=r"lacks \['0', '1', '2'\].*load those first"):
        PeftModel.from_pretrained(again, tmp_path / "mix")
    for name in EXPERTS:
        PeftModel.from_pretrained(again, tmp_path / name, name)
    again.load_adapter(tmp_path / "mix", "mix")
    again.set_adapter("mix")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
    with pytest.raises(AdapterNameError, match=r"'1' is part of \['mix'\]"):
        again.delete_adapter("1")
    again.delete_adapter("mix")
    again.delete_adapter("1")
    # A file of another writer names paths: they are names alone.
    config = json.loads((tmp_path / "mix" / "adapter_config.json").read_text())
    config["adapters"] = dict.fromkeys(EXPERTS, "/nowhere")
    assert XLoraConfig.from_dict(config).refers_to() == EXPERTS


def test_experts_of_other_methods() -> None:
    """Scaled activations, magnitudes around a LoRA, and a plain one, which adapts a layer more."""
    model = make("llama")
    get_peft_model(model, IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), "scale")
    model.add_adapter("dora", LoraConfig(target_modules=TARGETS, use_dora=True))
    model.add_adapter("lora", LoraConfig(target_modules=[*TARGETS, "o_proj"]))
    for number, name in enumerate(("scale", "dora", "lora")):
        randomise(model, name, number)
    model.add_adapter("mix", XLoraConfig(adapters=["scale", "dora", "lora"], xlora_dropout_p=0.0))
    # All weight on one expert is that expert.
    classifier = model._peft.adapters["mix"].shared.internal_xlora_classifier.layers[0]
    for number, name in enumerate(("scale", "dora", "lora")):
        with torch.no_grad():
            classifier.weight.zero_()
            classifier.bias.copy_(torch.tensor([1000.0 * (number == k) for k in range(3)]))
            model.set_adapter("mix")
            found = model(IDS).logits
            model.set_adapter(name)
            torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-5)  # float32 sums and differences


def test_controls() -> None:
    model = mixed()
    control = xlora_controls(model)
    with torch.no_grad():
        plain = model(IDS).logits
        with pytest.raises(PeftError, match="enable_scalings_logging"):
            control.get_scalings_log()
        control.enable_scalings_logging()
        model(IDS)
        model(IDS[:, :3])
        assert [tuple(s.shape) for s in control.get_scalings_log()] == [(2, 5, 4, 3), (2, 3, 4, 3)]
        assert {length: numbers for length, (numbers, _) in control.get_bucketed_scalings_log().items()} == {
            5: [0],
            3: [1],
        }
        control.clear_scalings_log()
        assert control.get_scalings_log() == []
        control.disable_scalings_logging()
        control.set_topk_lora(1)
        assert (model(IDS).logits - plain).abs().max() > 1e-3
        control.set_topk_lora(None)
        control.set_global_scaling_weight(0.0)
        with model.disable_adapter():
            base = model(IDS).logits
        assert torch.equal(model(IDS).logits, base)
        control.set_global_scaling_weight(1.0)
        assert torch.equal(model(IDS).logits, plain)
    with pytest.raises(PeftError, match="set_topk_lora: 4 of 3"):
        control.set_topk_lora(4)
    with pytest.raises(PeftError, match="no X-LoRA adapter 'other'.*'mix'"):
        xlora_controls(model, "other")


def test_refusals() -> None:
    for settings, message in [
        ({}, "name the adapters"),
        ({"adapters": EXPERTS, "top_k_lora": 4}, "there are 3 adapters"),
        ({"adapters": EXPERTS, "softmax_temperature": 0.0}, "above 0"),
        ({"adapters": EXPERTS, "enable_softmax_topk": True}, "enable_softmax=False"),
        ({"adapters": EXPERTS, "xlora_depth": 0}, "positive"),
    ]:
        with pytest.raises(ConfigError, match=message):
            XLoraConfig(**settings)
    with pytest.raises(AdapterNotFoundError, match="lacks"):
        get_peft_model(make("llama"), XLoraConfig(adapters=EXPERTS))
    model = mixed()
    with pytest.raises(MergeError):
        model.merge_adapter()
    encoder_decoder = get_peft_model(make("t5"), LoraConfig(target_modules=["q"]), "0")
    with pytest.raises(TargetError, match="one stack of layers"):
        encoder_decoder.add_adapter("mix", XLoraConfig(adapters=["0"], hidden_size=16))
