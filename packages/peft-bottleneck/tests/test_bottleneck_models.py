"""Every style on the classes of transformers, in training, generation and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bottleneck_toys import fill
from torch import Tensor

from peft_bottleneck import BottleneckConfig
from peft_core import PeftModel, get_peft_model

STYLES = ("houlsby", "pfeiffer", "parallel", "scaled_parallel")
W = 16
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": W, "intermediate_size": 24}
TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**LAYERS, **TOKENS, "max_position_embeddings": 32, "num_labels": 3}
SIDES = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
T = transformers
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (T.BertConfig, T.BertForSequenceClassification, ENCODER),
    "roberta": (T.RobertaConfig, T.RobertaForSequenceClassification, ENCODER),
    "gpt2": (T.GPT2Config, T.GPT2LMHeadModel, {**TOKENS, "n_embd": W, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, {**LAYERS, **TOKENS}),
    "gemma2": (T.Gemma2Config, T.Gemma2ForCausalLM, {**LAYERS, **TOKENS, "head_dim": 8, "num_key_value_heads": 2}),
    "olmo2": (T.Olmo2Config, T.Olmo2ForCausalLM, {**LAYERS, **TOKENS}),
    "phi": (T.PhiConfig, T.PhiForCausalLM, {**LAYERS, **TOKENS}),
    "mixtral": (T.MixtralConfig, T.MixtralForCausalLM, {**LAYERS, **TOKENS, **EXPERTS}),
    "t5": (
        T.T5Config,
        T.T5ForConditionalGeneration,
        {**TOKENS, "d_model": W, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "bart": (
        T.BartConfig,
        T.BartForConditionalGeneration,
        {**TOKENS, **SIDES, "d_model": W, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
        | {"decoder_start_token_id": 2, "forced_eos_token_id": None},
    ),
    "vit": (
        T.ViTConfig,
        T.ViTForImageClassification,
        {**LAYERS, "image_size": 4, "patch_size": 2, "num_labels": 3},
    ),
}
ENCODER_DECODERS = ("t5", "bart")
DECODERS = ("gpt2", "llama", "gemma2", "olmo2", "phi", "mixtral")
CLASSIFIERS = ("bert", "roberta", "vit")

every_model = pytest.mark.parametrize("kind", MODELS)
every_style = pytest.mark.parametrize("style", STYLES)


def make(kind: str) -> Any:
    config_class, model_class, fields = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**fields)).eval()
    with torch.no_grad():  # the customary deviation of 0.02 leaves all outputs about alike
        for parameter in model.parameters():
            if parameter.dim() > 1 and kind != "t5":
                parameter.mul_(5)
    return model


def config_for(kind: str, style: str, **fields: Any) -> Any:
    return BottleneckConfig(style=style, reduction_factor=2, cross_adapter=kind in ENCODER_DECODERS, **fields)  # type: ignore[arg-type]


def adapted(kind: str, style: str, **fields: Any) -> Any:
    return fill(get_peft_model(make(kind), config_for(kind, style, **fields)))


def training(model: Any) -> Any:
    """In training mode, without the base's dropout: a step must not be a matter of luck."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for field in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return model


def batch(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2])
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 4, 4, generator=generator), "labels": labels}
    ids = torch.randint(3, 32, (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels if kind in CLASSIFIERS else ids}


@every_style
@every_model
def test_it_acts_and_trains(kind: str, style: str) -> None:
    """Outputs change, every parameter of the adapter gets a gradient, no other does, and a loss goes down."""
    given = batch(kind)
    base = make(kind)
    with torch.no_grad():
        before = base(**given).logits
    model = adapted(kind, style)
    with torch.no_grad():
        assert (model(**given).logits - before).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, before)
    training(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=3e-2)
    losses = []
    for _ in range(60):
        loss = model(**given).loss
        loss.backward()
        if not losses:
            assert all(p.grad is not None and p.grad.any() for p in trained.values())
            assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@every_style
@every_model
@torch.no_grad()
def test_save_and_load_are_exact(kind: str, style: str, tmp_path: Path) -> None:
    given = batch(kind)
    model = adapted(kind, style)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(kind), tmp_path)
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert again.peft_config["default"].style == style


@every_style
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
@torch.no_grad()
def test_generation_with_a_cache_is_that_without(kind: str, style: str) -> None:
    """The adapters see one position at a time, and what they add is the same."""
    model = adapted(kind, style)
    given = {name: tensor for name, tensor in batch(kind).items() if name != "labels"}
    settings: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**given, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**given, **settings, use_cache=False))
    with model.disable_adapter():
        base = model.generate(**given, **settings)
    assert not torch.equal(cached, base)
    assert torch.equal(base, make(kind).generate(**given, **settings))


@every_style
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
@torch.no_grad()
def test_hidden_states_are_those_of_the_adapted_blocks(kind: str, style: str) -> None:
    """Each is what the next block gets: adapters act inside the blocks, so that recorders see what they do."""
    given = {name: tensor for name, tensor in batch(kind).items() if name != "labels" or kind == "t5"}
    model = adapted(kind, style)
    blocks = {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer", "t5": "decoder.block"}
    seen: list[Tensor] = []
    for block in model.get_submodule(blocks[kind]):
        block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    out = model(**given, output_hidden_states=True)
    states = out.decoder_hidden_states if kind == "t5" else out.hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[1], seen[0], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@every_style
@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_activation_checkpointing_gives_the_same_gradients(kind: str, style: str, reentrant: bool) -> None:
    given = batch(kind)
    found = []
    for checkpointing in (False, True):
        model = training(adapted(kind, style))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**given).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        # The fused attention kernels may differ in the last bit where the input has a gradient.
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


@every_style
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
@torch.no_grad()
def test_rows_with_different_adapters(kind: str, style: str) -> None:
    given = {name: tensor for name, tensor in batch(kind).items() if name != "labels" or kind == "t5"}
    model = adapted(kind, style)
    model.add_adapter("b", config_for(kind, style))
    fill(model, "b", 5)
    mixed = model(**given, adapter_names=["b", "default", "__base__"]).logits
    for row, name in enumerate(["b", "default"]):
        model.set_adapter(name)
        # A batch of one row takes another path through the matrix products.
        torch.testing.assert_close(mixed[row], model(**given).logits[row], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], model(**given).logits[2], rtol=1e-4, atol=1e-4)


@every_style
@torch.no_grad()
def test_half_precision_keeps_its_dtype(style: str) -> None:
    model = make("bert").to(torch.bfloat16)
    model = fill(get_peft_model(model, config_for("bert", style)))
    out = model(**{name: tensor for name, tensor in batch("bert").items() if name != "labels"}).logits
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert {p.dtype for p in model._peft.adapters["default"].parameters()} == {torch.float32}


@every_style
def test_compiled_it_is_one_graph(style: str) -> None:
    model = adapted("llama", style)
    given = {"input_ids": batch("llama")["input_ids"]}
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**given, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
