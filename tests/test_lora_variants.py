"""aLoRA, QA-LoRA and layer replication: formulas by hand, generation, files, and HF PEFT where it runs."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from peft_core import MergeError, PeftModel, RequestError, TargetError, get_peft_model, get_peft_model_state_dict
from peft_core.layers import LinearLayer
from peft_lora import LoraConfig
from peft_lora.alora import last_occurrence
from tests.tiny_transformers import batch, make

CALL = (7, 8)  # the invocation
IDS = torch.tensor([[5, 7, 8, 6, 7, 8, 9, 4], [7, 8, 3, 5, 6, 9, 10, 11], [3, 4, 5, 6, 9, 10, 11, 12]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
ALORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "alora_invocation_tokens": list(CALL)}
# Float32; the masked sum is made in another order than the whole one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def filled(model: Any, config: LoraConfig) -> Any:
    """With values for every tensor, drawn from a seed."""
    get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model._peft.adapters["default"].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


# -- aLoRA --------------------------------------------------------------------------------------------------------


def test_the_last_occurrence() -> None:
    found = last_occurrence(IDS, CALL)
    assert found[:2].tolist() == [4, 0] and found[2] > 10**9
    assert (last_occurrence(IDS[:, :1], CALL) > 10**9).all()


def test_alora_by_hand() -> None:
    """Tokens before the invocation are the base's, bit for bit; those from it on see W + sBA."""
    model = filled(make("llama"), LoraConfig(**ALORA))
    plain = filled(make("llama"), LoraConfig(**{**ALORA, "alora_invocation_tokens": None}))
    starts = [4, 0, 8]
    for path, site in model._peft.sites.items():
        lora = plain._peft.sites[path].of("default")[""]
        x = torch.randn(3, 8, lora.lora_A.shape[1], generator=torch.Generator().manual_seed(1))
        seen: list[Any] = []

        def keep(module: Any, args: Any, out: Any, seen: list[Any] = seen) -> None:
            seen.append((args[0], out))

        handle = site.register_forward_hook(keep)
        base = copy.deepcopy(site.base_layer)
        with torch.no_grad():
            model(IDS)
        handle.remove()
        x, out = seen[0]
        expected = base(x)
        for row, start in enumerate(starts):
            expected[row, start:] += lora.scaling * x[row, start:] @ lora.lora_A.t() @ lora.lora_B.t()
        torch.testing.assert_close(out, expected, **CLOSE)
    with torch.no_grad():
        found = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits[2], found[2]) and torch.equal(model(IDS).logits[0, :4], found[0, :4])
        torch.testing.assert_close(found[1], plain(IDS).logits[1], **CLOSE)


@pytest.mark.filterwarnings("ignore")  # the other library's
def test_alora_is_hfs() -> None:
    ours = filled(make("llama"), LoraConfig(task_type="CAUSAL_LM", **ALORA))
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **ALORA)).eval()
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    with torch.no_grad():
        found, expected = ours(IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(input_ids=IDS, **options))


def test_alora_generates_with_the_cache_as_without() -> None:
    model = filled(make("llama"), LoraConfig(**ALORA))
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], 1)
    mask = (padded != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(padded, use_cache=False, **options)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(padded, **more, **options), plain)
    beams = model.generate(padded, use_cache=False, num_beams=3, **options)
    assert torch.equal(model.generate(padded, num_beams=3, **options), beams)
    for row in range(3):
        alone = model.generate(IDS[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(plain[row, 2:], alone[0])
    with model.disable_adapter():
        base = model.generate(padded, **options)
    assert torch.equal(plain[2], base[2]) and not torch.equal(plain[:2], base[:2])


def test_alora_offsets_for_calls_that_do_not_show_the_prompt() -> None:
    model = filled(make("llama"), LoraConfig(**ALORA))
    with torch.no_grad():
        whole = model(IDS).logits
        torch.testing.assert_close(model(IDS, alora_offsets=[4, 8, None]).logits, whole, rtol=0, atol=0)
        embedded = model.get_input_embeddings()(IDS)
        with pytest.raises(RequestError, match="looks for its invocation in input_ids"):
            model(inputs_embeds=embedded)
        torch.testing.assert_close(model(inputs_embeds=embedded, alora_offsets=[4, 8, 0]).logits, whole, **CLOSE)
        cache = model(IDS[:, :6], use_cache=True, alora_offsets=[2, 6, None]).past_key_values
        with pytest.raises(RequestError, match="the prompt is not known in this call; give alora_offsets"):
            model(IDS[:, 6:], cache=copy.deepcopy(cache))
        last = model(IDS[:, 6:], cache=cache, alora_offsets=[4, 8, None]).logits
        torch.testing.assert_close(last, whole[:, 6:], **CLOSE)


def test_alora_trains_recomputes_saves_and_is_not_merged(tmp_path: Any) -> None:
    model = filled(make("llama"), LoraConfig(**ALORA)).train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(g.any() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        # Beside another adapter, each row with its own.
        again.add_adapter("other", LoraConfig(**{**ALORA, "alora_invocation_tokens": [9]}))
        names = ["default", "other", "__base__"]
        assert torch.equal(again(IDS, adapter_names=names).logits[0], again(IDS[:1]).logits[0])
    with pytest.raises(MergeError):
        model.merge_adapter()
    with pytest.raises(TargetError, match="for linear layers"):
        get_peft_model(make("llama"), LoraConfig(**{**ALORA, "target_modules": ["embed_tokens"]}))


# -- QA-LoRA ------------------------------------------------------------------------------------------------------


def test_qalora_by_hand() -> None:
    """y = base(x) + s B A (p · in / g), p the mean of x over each group of g inputs; ΔW is constant in a group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5)).double()
    before = copy.deepcopy(model)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_qalora=True, qalora_group_size=4)
    get_peft_model(model, config)
    adapter = model[0].of("default")[""]
    assert adapter.lora_A.shape == (3, 3) and adapter.lora_B.shape == (5, 3)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert torch.equal(model(x), before(x))
    nn.init.normal_(adapter.lora_B)
    pooled = torch.stack([x[..., 4 * g : 4 * g + 4].mean(-1) for g in range(3)], -1) * (12 / 4)
    expected = before(x) + 5 / 3 * pooled @ adapter.lora_A.t() @ adapter.lora_B.t()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)
    delta = (merged[0].weight - before[0].weight).view(5, 3, 4)
    torch.testing.assert_close(delta, delta[..., :1].expand_as(delta), rtol=0, atol=1e-14)
    with pytest.raises(TargetError, match="qalora_group_size=5 does not divide its 12 inputs"):
        get_peft_model(copy.deepcopy(before), config.resolve(qalora_group_size=5))


def test_qalora_is_taken_in_by_zero_points() -> None:
    """A storage with a scale and a zero point for each group: merging changes the zero points alone, exactly."""
    from peft_core import hookimpl, register_extension, unregister_extension

    class Grouped(nn.Module):
        """W[o, i] = scale[o, g] · (code[o, i] - zero[o, g])"""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach().view(5, 3, 4)
            self.scale = nn.Parameter((weight.amax(-1) - weight.amin(-1)) / 15, requires_grad=False)
            self.zero = nn.Parameter(-weight.amin(-1) / self.scale, requires_grad=False)
            code = (weight / self.scale[..., None] + self.zero[..., None]).round().to(torch.uint8)
            self.register_buffer("code", code)

        def dense(self) -> torch.Tensor:
            return (self.scale[..., None] * (self.code - self.zero[..., None])).flatten(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.dense().t()

    class View(LinearLayer):
        group_size = 4
        in_features, out_features, transposed, names = 12, 5, False, ("zero",)

        def __init__(self, module: nn.Module, path: str) -> None:
            super(LinearLayer, self).__init__.__func__.__globals__["BaseLayer"].__init__(self, module, path)

        positionwise = True

        def params(self) -> Any:
            return {"weight": self.module.dense()}

        def write(self, params: Any) -> None:
            module: Any = self.module
            delta = (params["weight"] - module.dense()).view(5, 3, 4)
            module.zero = nn.Parameter(module.zero - delta.mean(-1) / module.scale, requires_grad=False)

        def snapshot(self, names: Any = None) -> Any:
            return {"zero": self.module.zero}

    class Backend:
        @staticmethod
        @hookimpl
        def peft_layer(path: str, module: nn.Module) -> Any:
            return View(module, path) if isinstance(module, Grouped) else None

    register_extension(Backend(), "grouped")
    try:
        torch.manual_seed(0)
        model = nn.Sequential(Grouped(nn.Linear(12, 5, bias=False).double()))
        code = model[0].code.clone()
        config = LoraConfig(r=3, target_modules=["0"], use_qalora=True, qalora_group_size=4, init_lora_weights=False)
        get_peft_model(model, config)
        x = torch.randn(6, 12, dtype=torch.float64)
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(model[0].base_layer.code, code)
        model.unload()
        with pytest.raises(TargetError, match="quantised in groups of 4, and qalora_group_size is 3"):
            get_peft_model(model, config.resolve(qalora_group_size=3))
    finally:
        unregister_extension("grouped")


# -- layer replication --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_replication(kind: str, tmp_path: Any) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query"]}[kind]
    config = LoraConfig(r=4, target_modules=targets, layer_replication=[[0, 2], [1, 2], [0, 2]])
    base, inputs = make(kind), batch(kind)
    with torch.no_grad():
        expected = base(**inputs).logits
    count = base.config.num_hidden_layers
    model = filled(base, config)
    sites = [path for path in model._peft.sites if path.endswith(targets[0])]
    assert len(sites) == 5 and model.config.num_hidden_layers == 5
    with torch.no_grad():
        deeper = model(**inputs).logits
    assert not torch.allclose(deeper, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(kind), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, deeper)
    if kind != "bert":
        options = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 5, "do_sample": False}
        ids = inputs["input_ids"]
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    model.unload()
    assert model.config.num_hidden_layers == count
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(TargetError, match="are not ranges of"):
        get_peft_model(model, config.resolve(layer_replication=[[0, 3]]))


@pytest.mark.filterwarnings("ignore")  # the other library's
def test_replication_is_hfs() -> None:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]}
    ours = filled(make("llama"), LoraConfig(**settings))
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(**settings)).eval()
    tensors = get_peft_model_state_dict(ours)
    assert tensors.keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.set_peft_model_state_dict(theirs, tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=0)
