"""Models of transformers with adapters: everything one does with them goes on as before."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from peft_core import MergeError, PeftModel, TargetError, get_peft_model, get_peft_model_state_dict
from tests.tiny_transformers import adapted, batch, gradients, ia3, lora, make, randomise, scores

KINDS = ["llama", "gpt2", "t5", "bert"]
WRITERS = ["llama", "gpt2", "t5"]


# -- forward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_fresh_adapter_changes_nothing(kind: str, method: str) -> None:
    model, given = make(kind), batch(kind)
    before, signature = scores(model, given), inspect.signature(model.forward)
    cls = type(model)
    get_peft_model(model, lora(kind) if method == "lora" else ia3())
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert inspect.signature(model.forward) == signature
    assert torch.equal(scores(model, given), before)
    randomise(model)
    assert not torch.allclose(scores(model, given), before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(scores(model, given), before)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_adapters_of_their_own(kind: str) -> None:
    model, given = adapted(kind, both=True), batch(kind)
    names = ["a", "b", "__base__", "a"]
    mixed = scores(model, given, adapter_names=names)
    for row, name in enumerate(names):
        with alone(model, name):
            single = scores(model, {key: value[row : row + 1] for key, value in given.items()})
        # Products of one row and of several are summed in another order.
        torch.testing.assert_close(mixed[row : row + 1], single, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def alone(model: Any, name: str) -> Iterator[None]:
    """Only this adapter, for all rows."""
    before = model.active_adapters
    if name == "__base__":
        with model.disable_adapter():
            yield
        return
    model.set_adapter(name)
    yield
    model.set_adapter(before)


# -- generate ----------------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def write(model: Any, given: dict[str, Tensor], **others: Any) -> Tensor:
    inputs = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **others)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_an_adapter_per_row(kind: str, mode: str) -> None:
    model, given = adapted(kind, both=True), batch(kind)
    names = ["a", "b", "__base__", "b"]
    mixed = write(model, given, adapter_names=names, **MODES[mode])
    copies = len(mixed) // len(names)
    for row, name in enumerate(names):
        with alone(model, name):
            single = write(model, {key: value[row : row + 1] for key, value in given.items()}, **MODES[mode])
        assert torch.equal(mixed[row * copies : (row + 1) * copies], single), (row, name)
    uniform = write(model, given, adapter_names=["__base__"] * 4, **MODES[mode])
    assert not torch.equal(uniform, mixed)  # the adapters do change what is written
    assert not model._peft.routing._requests


@pytest.mark.parametrize("kind", WRITERS)
def test_sampling_with_an_adapter_per_row(kind: str) -> None:
    """A row's draws depend on its place in the batch, and not on what the other rows use."""
    model, given = adapted(kind, both=True), batch(kind)

    def sample(**others: Any) -> Tensor:
        torch.manual_seed(3)
        return write(model, given, do_sample=True, top_k=0, **others)

    names = ["a", "b", "__base__", "b"]
    mixed = sample(adapter_names=names)
    assert torch.equal(mixed, sample(adapter_names=names))
    for row, name in enumerate(names):
        with alone(model, name):
            assert torch.equal(mixed[row], sample()[row])


def test_generation_served_from_several_threads_equals_serial() -> None:
    model, given = adapted("llama", both=True), batch("llama")
    choices = [["a"] * 4, ["b"] * 4, ["__base__"] * 4, ["a", "b", "a", "b"], None]
    expected = [write(model, given, adapter_names=names, do_sample=False) for names in choices]
    assert len({str(tokens.tolist()) for tokens in expected}) == len(choices)
    wrong: list[Any] = []

    def serve(index: int) -> None:
        for _ in range(3):
            tokens = write(model, given, adapter_names=choices[index], do_sample=False)
            if not torch.equal(tokens, expected[index]):
                wrong.append(choices[index])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(choices))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_streamer_reads_what_another_thread_generates() -> None:
    model, given = adapted("llama", both=True), batch("llama", rows=1)

    class Tokens(transformers.generation.BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None: ...

    expected = {name: write(model, given, adapter_names=[name], do_sample=False)[0].tolist() for name in "ab"}
    streams = {name: Tokens() for name in "ab"}
    threads = [
        threading.Thread(
            target=write, args=(model, given), kwargs={"adapter_names": [n], "streamer": s, "do_sample": False}
        )
        for n, s in streams.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: stream.seen for name, stream in streams.items()} == expected


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 32)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_pipelines_take_the_model_for_what_it_is() -> None:
    model = adapted("llama")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
        text = pipe("w3 w4 w5", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    finally:
        logger.removeHandler(handler)
    assert not messages
    tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = tokenizer().decode(tokens[0], skip_special_tokens=True)
    assert text.replace(" ", "") == expected.replace(" ", "")  # the pipeline decodes the prompt on its own
    classify = transformers.pipeline("text-classification", model=adapted("bert"), tokenizer=tokenizer(), device="cpu")
    assert classify("w3 w4")[0]["label"].startswith("LABEL_")


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind: str) -> None:
    model, given = adapted(kind, both=True), batch(kind)
    before = scores(model, given)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(model) and torch.equal(scores(twin, given), before)
        randomise(twin, "a", seed=9)
        assert not torch.equal(scores(twin, given), before)
        assert torch.equal(scores(model, given), before)
        twin.unload()
        assert type(twin) is not type(model) and type(twin) is type(make(kind))


# -- activation checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [None, ["a", "b", "__base__", "a"]], ids=["all", "per row"])
def test_activation_checkpointing_leaves_gradients_as_they_are(kind: str, rows: list[str] | None) -> None:
    def run(reentrant: bool | None, first: bool = False) -> dict[str, Tensor]:
        model = make(kind)
        enable = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if first:
            model.activation_checkpointing_enable(**enable)
        get_peft_model(model, lora(kind), "a")
        model.add_adapter("b", ia3())
        randomise(model, "a", seed=1)
        randomise(model, "b", seed=2)
        model.set_adapter(["a", "b"])
        if reentrant is not None and not first:
            model.activation_checkpointing_enable(**enable)
        model.train()
        loss = scores(model, batch(kind), adapter_names=rows).float().square().mean()
        with torch.no_grad():  # what happens between forward and backward does not matter
            scores(model, batch(kind), adapter_names=["b"] * 4)
        with model.disable_adapter():
            loss.backward()
        return gradients(model)

    plain = run(None)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    for reentrant in (True, False):
        for first in (True, False):
            again = run(reentrant, first)
            # T5 without adapters is not exact here either: the shared position bias sums in another order.
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "t5" and reentrant else {"rtol": 0, "atol": 0}
            for name, gradient in plain.items():
                torch.testing.assert_close(again[name], gradient, **tolerance)


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bases(kind: str, dtype: torch.dtype) -> None:
    model, given = adapted(kind, both=True, dtype=dtype), batch(kind)
    weights = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in weights} == {torch.float32}
    assert {t.dtype for t in model.base_state_dict().values() if t.is_floating_point()} == {dtype}
    model.train()
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    out = scores(model, given)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() and p.grad.abs().sum() > 0 for p in weights)
    assert scores(model, given).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    model, given = adapted(kind, both=True), batch(kind)
    exact = scores(model, given).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scores(model, given)
        loss = out.float().square().mean()
    loss.backward()
    # bfloat16 has eight bits; errors add up over two layers.
    assert (out.float() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Summed in another order where the compiler rewrites a product.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])])
def test_one_graph_in_training_and_evaluation(kind: str) -> None:
    model, given = adapted(kind, both=True), batch(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given).logits, scores(model, given), **CLOSE)
    model.train()
    scores(model, given).square().mean().backward()
    eager = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    compiled(**given).logits.square().mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, eager[name], **CLOSE)


@pytest.mark.usefixtures("fresh_compiler")
def test_switching_what_a_compiled_model_uses() -> None:
    model, given = adapted("llama", both=True), batch("llama")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
                model.set_adapter(names)
                torch.testing.assert_close(compiled(**given).logits, scores(model, given), **CLOSE)
            with model.disable_adapter():
                torch.testing.assert_close(compiled(**given).logits, scores(model, given), **CLOSE)
    assert counter.frame_count == 5  # once per choice, however often one comes back to it


def whole(model: Any, **how: Any) -> Any:
    return torch.compile(model, **how)


def in_place(model: Any, **how: Any) -> Any:
    model.compile(**how)
    return model


def its_forward(model: Any, **how: Any) -> Any:
    model.forward = torch.compile(model.forward, **how)
    return model


def its_blocks(model: Any, **how: Any) -> Any:
    for block in model.model.layers:
        block.compile(**how)
    return model


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compile_", [whole, in_place, its_forward, its_blocks], ids=lambda f: f.__name__)
def test_adapters_per_row_however_the_model_is_compiled(compile_: Any) -> None:
    plain, model, given = adapted("llama", both=True), adapted("llama", both=True), batch("llama")
    compiled = compile_(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for names in (None, ["a", "b", "__base__", "a"], ["b"] * 4, None):
            torch.testing.assert_close(
                compiled(**given, adapter_names=names).logits, scores(plain, given, adapter_names=names), **CLOSE
            )
        if compile_ in (in_place, its_forward):  # blocks would be compiled for each length of the cache
            how: dict[str, Any] = {
                "do_sample": False,
                "max_new_tokens": 2,
                "adapter_names": ["a", "b", "__base__", "a"],
            }
            assert torch.equal(model.generate(given["input_ids"], **how), plain.generate(given["input_ids"], **how))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_generation_that_compiles_itself_keeps_adapters_per_row() -> None:
    """On accelerators a static cache makes `generate` compile the model's call; here it is asked to."""
    model, given = adapted("llama", both=True), batch("llama")
    how = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    how._compile_all_devices = True
    names = ["a", "b", "__base__", "b"]
    kwargs: dict[str, Any] = {"do_sample": False, "cache_implementation": "static"}
    expected = write(model, given, adapter_names=names, **kwargs)
    assert torch.equal(write(model, given, adapter_names=names, compile_config=how, **kwargs), expected)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_on_a_base_from_files(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, lora("llama", task_type="CAUSAL_LM")))
    expected = scores(model, batch("llama"))
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(scores(again, batch("llama")), expected) and not again.training
    # The class still does what it did: a base from its files.
    other = type(again).from_pretrained(tmp_path / "base")
    assert type(other) is transformers.LlamaForCausalLM and not isinstance(other, PeftModel)
    assert type(type(again)(again.config)) is transformers.LlamaForCausalLM


def test_a_merged_model_is_saved_whole(tmp_path: Path) -> None:
    model = adapted("llama", both=True)
    expected = scores(model, batch("llama"))
    model.merge_and_unload().save_pretrained(tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(scores(merged, batch("llama")), expected, rtol=1e-4, atol=1e-4)


# -- embeddings --------------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_grows_after_adapting(tmp_path: Path) -> None:
    model = make("llama", tie_word_embeddings=True)
    get_peft_model(model, lora("llama", target_modules=["q_proj"]))
    randomise(model)
    before = scores(model, batch("llama"))
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight and len(model.lm_head.weight) == 40
    torch.testing.assert_close(scores(model, batch("llama"))[..., :32], before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert {key.split(".")[-3] for key in get_peft_model_state_dict(model)} == {"q_proj"}
    fresh = make("llama", tie_word_embeddings=True)
    fresh.resize_token_embeddings(40, mean_resizing=False)
    fresh.load_state_dict(model.base_state_dict())
    PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(scores(fresh, batch("llama")), scores(model, batch("llama")))


def test_tied_weights_stay_tied_under_an_adapted_head() -> None:
    model = make("llama", tie_word_embeddings=True)
    get_peft_model(model, lora("llama", target_modules=["lm_head", "embed_tokens"]))
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight is table
    before = scores(randomise(model), batch("llama"))
    model.tie_weights()
    assert model.lm_head.weight is table and model.lm_head.base_layer.weight is table
    assert torch.equal(scores(model, batch("llama")), before)
    assert set(model.base_state_dict()) == set(make("llama", tie_word_embeddings=True).state_dict())
    # transformers grows only layers of its own kinds; with adapters on them it says so and changes nothing.
    with pytest.raises(TypeError):
        model.resize_token_embeddings(40, mean_resizing=False)
    assert torch.equal(scores(model, batch("llama")), before)


# -- offloaded bases ---------------------------------------------------------------------------------------------------


def offloaded(tmp_path: Path, where: str) -> Any:
    folder = tmp_path / "base"
    if not folder.exists():
        make("llama").save_pretrained(folder)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": where,
        "model.norm": where,
        "lm_head": "cpu",
    }
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )


OFFLOADED: dict[str, Any] = {
    "lora": lambda: lora("llama"),
    "lora of all": lambda: lora("llama", target_modules="all-linear", lora_dropout=0.1),
    "dora": lambda: lora("llama", use_dora=True),
    "ia3": ia3,
}


@pytest.mark.parametrize("method", OFFLOADED)
def test_a_base_whose_weights_are_on_disk(method: str, tmp_path: Path) -> None:
    config, given = OFFLOADED[method](), batch("llama")
    plain = make("llama")
    base = scores(plain, given)
    trained = get_peft_model(plain, config).eval()
    fresh = scores(trained, given)
    randomise(trained).save_pretrained(tmp_path / "adapter")
    model = offloaded(tmp_path, "disk")
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert torch.equal(scores(model, given), base)
    get_peft_model(model, config)
    assert torch.equal(scores(model, given), fresh)
    if method != "dora":  # which goes over the norms of the weights, and is exact up to their rounding
        assert torch.equal(fresh, base)
    assert not any(p.is_meta for p in model._peft.adapters["default"].parameters())
    scores(model, given).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    loaded = PeftModel.from_pretrained(offloaded(tmp_path, "disk"), tmp_path / "adapter")
    assert torch.equal(scores(loaded, given), scores(trained, given))
    names = {"adapter_names": ["default", "__base__", "default", "__base__"]}
    assert torch.equal(scores(loaded, given, **names), scores(trained, given, **names))
    loaded.load_adapter(tmp_path / "adapter", "default", replace=True)
    assert torch.equal(scores(loaded, given), scores(trained, given))
    with pytest.raises(MergeError, match="offloaded"):
        loaded.merge_adapter()
    assert torch.equal(scores(loaded, given), scores(trained, given))
    loaded.unload()
    assert torch.equal(scores(loaded, given), base)


def test_a_trainable_copy_of_an_offloaded_module_is_refused(tmp_path: Path) -> None:
    model = offloaded(tmp_path, "disk")
    with pytest.raises(TargetError, match="offloaded"):
        get_peft_model(model, lora("llama", modules_to_save=["mlp"]))
    assert not isinstance(model, PeftModel)
    get_peft_model(model, lora("llama", modules_to_save=["lm_head"]))


# -- torch's functional forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_export(kind: str) -> None:
    model, given = adapted(kind, both=True), batch(kind)
    others = {"use_cache": False} if kind == "llama" else {}
    program = torch.export.export(model, (), {**given, **others}, strict=False)
    torch.testing.assert_close(program.module()(**given, **others).logits, scores(model, given), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str) -> None:
    model, given = adapted(kind, both=True), batch(kind)
    before = scores(model, given)
    tensors = dict(model.named_parameters())  # tied ones once
    assert torch.equal(torch.func.functional_call(model, tensors, (), given).logits, before)
    other = {name: value + 0.1 if ".adapters." in name else value for name, value in tensors.items()}
    assert not torch.equal(torch.func.functional_call(model, other, (), given).logits, before)
    assert torch.equal(scores(model, given), before)
