"""Trained rows of embeddings, biases of the base, and layers that share a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_by_hand import gap
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from peft_core import PeftModel, get_peft_model
from peft_core.errors import ConfigError, TargetError
from peft_lora import LoraConfig

IDS = torch.tensor([[5, 3, 0, 7, 3], [1, 2, 9, 11, 4]])


def llama(tied: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("indices", [[7, 3], {"embed_tokens": [3, 11, 5]}], ids=["list", "mapping"])
def test_rows_are_replaced(tied: bool, indices: Any, tmp_path: Path) -> None:
    """As if the rows stood in the table; a tied head has them too, an untied one does not."""
    reference, model = llama(tied), llama(tied)
    rows = indices if isinstance(indices, list) else indices["embed_tokens"]
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices))
    # float32; the head's rows are multiplied in a product of their own
    assert gap(model(IDS).logits, reference(IDS).logits) < 1e-6
    (adapter,) = model.model.embed_tokens.of("default").values()
    assert adapter.trainable_tokens_delta.shape == (len(rows), 16)
    nn.init.normal_(adapter.trainable_tokens_delta)
    with torch.no_grad():
        reference.model.embed_tokens.weight[torch.tensor(rows)] = adapter.trainable_tokens_delta
    out, expected = model(IDS).logits, reference(IDS).logits
    assert gap(out, expected) < 1e-6
    out.square().sum().backward()
    expected.square().sum().backward()
    grad = reference.model.embed_tokens.weight.grad
    assert grad is not None
    assert gap(adapter.trainable_tokens_delta.grad, grad[torch.tensor(rows)]) < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tied), tmp_path)
    assert torch.equal(again(IDS).logits, out)
    model.merge_adapter()
    assert gap(model(IDS).logits, expected) < 1e-6
    assert (model.lm_head.weight is model.model.embed_tokens.base_layer.weight) is tied
    model.unmerge_adapter()
    assert gap(model(IDS).logits, expected) < 1e-6


def test_a_head_of_its_own(tmp_path: Path) -> None:
    reference, model = llama(False), llama(False)
    wanted = {"embed_tokens": [3], "lm_head": [2, 39]}
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=wanted))
    (adapter,) = model.lm_head.of("default").values()
    nn.init.normal_(adapter.trainable_tokens_delta)
    with torch.no_grad():
        reference.lm_head.weight[torch.tensor([2, 39])] = adapter.trainable_tokens_delta
    assert gap(model(IDS).logits, reference(IDS).logits) < 1e-6
    model.merge_adapter()
    assert gap(model(IDS).logits, reference(IDS).logits) < 1e-6


def test_padding_has_no_gradient_and_embed_scale_counts() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    base = nn.ModuleDict({"embed_tokens": Scaled(12, 4, padding_idx=0)})
    model = get_peft_model(base, LoraConfig(target_modules=[], trainable_token_indices=[0, 5]))
    (adapter,) = model["embed_tokens"].of("default").values()
    nn.init.normal_(adapter.trainable_tokens_delta)
    out = model["embed_tokens"](IDS)
    assert torch.equal(out[0, 0], adapter.trainable_tokens_delta[1] * 3)
    assert torch.equal(out[0, 2], adapter.trainable_tokens_delta[0] * 3)
    out.sum().backward()
    assert not adapter.trainable_tokens_delta.grad[0].any()
    assert adapter.trainable_tokens_delta.grad[1].any()


class LargestCopy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(isinstance(a, Tensor) and a._is_view() for a in (out,)):
            self.largest = max(self.largest, out.numel())
        return out


def test_the_table_is_not_copied() -> None:
    base = nn.ModuleDict({"embed_tokens": nn.Embedding(500, 8)})
    model = get_peft_model(base, LoraConfig(target_modules=[], trainable_token_indices=[3, 7]))
    with LargestCopy() as seen:
        model["embed_tokens"](IDS)
    assert seen.largest <= IDS.numel() * 8


def test_all_that_share_the_table_follow(tmp_path: Path) -> None:
    """T5: one table for the encoder's and the decoder's embedding, and for the head."""

    def t5() -> T5ForConditionalGeneration:
        torch.manual_seed(0)
        config = T5Config(
            d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0
        )
        return T5ForConditionalGeneration(config).eval()

    reference, model = t5(), t5()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q"], trainable_token_indices=[3, 11]))
    deltas = [n for n, _ in model.named_parameters() if "trainable_tokens_delta" in n]
    assert len(deltas) == 1
    (adapter,) = model.shared.of("default").values()
    nn.init.normal_(adapter.trainable_tokens_delta)
    with torch.no_grad():
        reference.shared.weight[torch.tensor([3, 11])] = adapter.trainable_tokens_delta
    expected = reference(input_ids=IDS, decoder_input_ids=IDS).logits
    assert gap(model(input_ids=IDS, decoder_input_ids=IDS).logits, expected) < 1e-6
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(t5(), tmp_path)
    assert gap(again(input_ids=IDS, decoder_input_ids=IDS).logits, expected) < 1e-6


@pytest.mark.parametrize(
    ("indices", "message"),
    [([], "empty"), ([3, 3], "twice"), ([-1], "0 on"), ({}, "empty"), ({"embed_tokens": []}, "empty")],
    ids=str,
)
def test_indices_that_make_no_sense(indices: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(trainable_token_indices=indices)


def test_indices_that_do_not_fit_the_model() -> None:
    with pytest.raises(TargetError, match=r"\[40\], and it has 40 rows"):
        get_peft_model(llama(False), LoraConfig(trainable_token_indices=[40]))
    with pytest.raises(TargetError, match="'wte' matches no module"):
        get_peft_model(llama(False), LoraConfig(trainable_token_indices={"wte": [1]}))
    with pytest.raises(TargetError, match="both name it"):
        get_peft_model(llama(False), LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[1]))
    with pytest.raises(TargetError, match="does not say which module"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], trainable_token_indices=[1]))


# -- weights that two layers share -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "both"])
def test_tied_layers_share_one_adapter(target: str, tmp_path: Path) -> None:
    """Adapting one of them changes the table for both; files hold both sets of factors."""
    targets = ["embed_tokens", "lm_head"] if target == "both" else [target]
    config = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True)
    model = get_peft_model(llama(True), config)
    move(model)
    (embedding,) = model.model.embed_tokens.of("default").values()
    (head,) = model.lm_head.of("default").values()
    assert sum(p.requires_grad for p in model.parameters()) == 2
    reference = llama(True)
    with torch.no_grad():
        reference.model.embed_tokens.weight.add_(embedding.weight_delta())
    out, expected = model(IDS).logits, reference(IDS).logits
    assert gap(out, expected) < 1e-5
    out.square().sum().backward()
    assert embedding.lora_embedding_A.grad is not None
    assert torch.equal(head.lora_A, embedding.lora_embedding_B.t())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(True), tmp_path)
    assert gap(again(IDS).logits, out) < 1e-6
    model.merge_adapter()
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight
    assert gap(model(IDS).logits, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_tied_modules_share_their_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(llama(True, dtype), config)
    move(model)
    reference = llama(True, dtype)
    (embedding,) = model.model.embed_tokens.of("default").values()
    (head,) = model.lm_head.of("default").values()
    assert head.modules_to_save.weight is embedding.modules_to_save.weight
    get_peft_model(reference, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        reference.model.embed_tokens.weight.copy_(embedding.modules_to_save.weight)
        for ours, theirs in zip(
            (p for n, p in model.named_parameters() if "lora" in n),
            (p for n, p in reference.named_parameters() if "lora" in n),
            strict=True,
        ):
            theirs.copy_(ours)
    out = model(IDS).logits
    assert torch.equal(out, reference(IDS).logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(True, dtype), tmp_path)
    assert torch.equal(again(IDS).logits, out)
    (one,), (two,) = again.model.embed_tokens.of("default").values(), again.lm_head.of("default").values()
    assert one.modules_to_save.weight is two.modules_to_save.weight
    model.merge_adapter()
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight


def test_naming_both_of_two_tied_modules_to_save_is_refused() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    with pytest.raises(TargetError, match="share their weight"):
        get_peft_model(llama(True), config)


def test_without_it_only_the_named_layer_is_adapted() -> None:
    model = get_peft_model(llama(True), LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert list(model._peft.sites) == ["model.embed_tokens"]


def test_tied_layers_cannot_have_dora() -> None:
    with pytest.raises(TargetError, match="use_dora"):
        get_peft_model(
            llama(True), LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True)
        )


# -- biases ------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attn(x, x, x)[0])
        x = self.conv(self.up(x).transpose(1, 2)).transpose(1, 2)
        return self.classifier(x)


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_are_trained_apart_from_the_base(which: str, dora: bool, tmp_path: Path) -> None:
    targets = ["up", "conv"] if dora else ["up", "conv", "attn"]
    base = mixed()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    fields: dict[str, Any] = {"r": 2, "target_modules": targets, "bias": which, "use_dora": dora}
    model = get_peft_model(base, LoraConfig(**fields, modules_to_save=["classifier"]))
    x = torch.randn(2, 5, 8)
    assert gap(model(x), mixed()(x)) < 1e-5  # float32; DoRA's gain is one but for rounding
    move(model)
    out = model(x)
    out.sum().backward()
    names = {n for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
    assert all(p.grad is not None for n, p in model.named_parameters() if n in names)
    # In "all": norm, both of the attention's, up and conv; the classifier is a copy and has its own.
    assert len(names) == {"all": 6, "lora_only": 3 if dora else 5}[which]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixed(), tmp_path)
    assert gap(again(x), out) < 1e-6
    model.merge_adapter()
    assert gap(model(x), out) < 1e-5
    model.unmerge_adapter()
    for name, value in model.base_state_dict().items():
        assert torch.equal(value, before[name])
    assert gap(model(x), out) < 1e-6
