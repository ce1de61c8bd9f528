"""Hot swap: an adapter takes another one's values in place, ranks padded, without a new compilation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_core import (
    AdapterNotFoundError,
    CheckpointMismatchError,
    ConfigError,
    MergeError,
    PeftError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    load_method,
)
from peft_core.testing import TinyNet
from peft_core.testing.models import seeded, token_ids
from peft_ia3 import IA3Config
from peft_lora import LoraConfig, check_hotswap_configs_compatible, prepare_model_for_compiled_hotswap
from peft_orthogonal import OFTConfig

EVERYWHERE = ["up", "down", "embedding", "mixer.attention", "mixer.conv1d", "mixer.conv2d"]
LINEAR = ["up", "down"]


def base() -> Any:
    return seeded(TinyNet, torch.float64)


def randomise(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return model.eval()


def adapted(config: Any, seed: int = 1, model: nn.Module | None = None) -> Any:
    torch.manual_seed(seed)
    return randomise(get_peft_model(base() if model is None else model, config), seed)


def saved(config: Any, path: Path, seed: int = 2) -> Any:
    model = adapted(config, seed)
    model.save_pretrained(path)
    return model


def identity(model: nn.Module) -> list[tuple[str, int, int, bool]]:
    """Every tensor's name, object, memory and flag: what compiled code and optimizers hold on to."""
    return [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]


# The adapter on the model, and the one that is swapped in. Where nothing is folded the values are copied.
PAIRS: dict[str, tuple[Any, Any]] = {
    "equal": (LoraConfig(r=4, target_modules=EVERYWHERE), LoraConfig(r=4, target_modules=EVERYWHERE)),
    "smaller rank, other alpha": (
        LoraConfig(r=8, lora_alpha=16, target_modules=EVERYWHERE),
        LoraConfig(r=4, lora_alpha=3, target_modules=EVERYWHERE),
    ),
    "patterns and rsLoRA": (
        LoraConfig(r=8, target_modules=LINEAR),
        LoraConfig(r=4, rank_pattern={"up": 6}, alpha_pattern={"down": 5}, use_rslora=True, target_modules=LINEAR),
    ),
    "fewer sites": (
        LoraConfig(r=4, target_modules=EVERYWHERE),
        LoraConfig(r=4, target_modules=["up", "embedding"]),
    ),
    "bias into bias": (
        LoraConfig(r=4, lora_bias=True, target_modules=["up"]),
        LoraConfig(r=2, lora_bias=True, target_modules=["up"]),
    ),
    "no bias into bias": (
        LoraConfig(r=4, lora_bias=True, target_modules=["up"]),
        LoraConfig(r=2, target_modules=["up"]),
    ),
    "dora": (
        LoraConfig(r=4, use_dora=True, target_modules=["up", "mixer.conv2d", "embedding"]),
        LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["up", "mixer.conv2d", "embedding"]),
    ),
    "dora with fewer sites": (
        LoraConfig(r=4, use_dora=True, target_modules=["up", "down"]),
        LoraConfig(r=4, use_dora=True, target_modules=["up"]),
    ),
    "a start that is subtracted": (
        LoraConfig(r=8, target_modules=LINEAR),
        LoraConfig(r=4, init_lora_weights="pissa", target_modules=LINEAR),
    ),
    "qalora": (
        LoraConfig(r=4, use_qalora=True, qalora_group_size=4, target_modules=LINEAR),
        LoraConfig(r=2, lora_alpha=3, use_qalora=True, qalora_group_size=4, target_modules=["up"]),
    ),
    "parameters": (
        LoraConfig(r=4, target_modules=[], target_parameters=["blocks.0.up.weight"]),
        LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["blocks.0.up.weight"]),
    ),
    "rows, biases and a whole module": (
        LoraConfig(r=4, target_modules=["up"], bias="lora_only", modules_to_save=["head"],
                   trainable_token_indices={"embedding": [1, 5]}),
        LoraConfig(r=2, target_modules=["up"], bias="lora_only", modules_to_save=["head"],
                   trainable_token_indices={"embedding": [1, 5]}),
    ),
    "ia3": (
        IA3Config(target_modules=LINEAR, feedforward_modules=["down"]),
        IA3Config(target_modules=["up"], feedforward_modules=[]),
    ),
    "oft": (OFTConfig(oft_block_size=4, target_modules=LINEAR), OFTConfig(oft_block_size=4, target_modules=LINEAR)),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_the_present_adapter_computes_what_the_saved_one_did(pair: str, tmp_path: Path) -> None:
    present, incoming = PAIRS[pair]
    x = token_ids()
    expected = saved(incoming, tmp_path)(x)
    model = adapted(present)
    config, before = model.peft_config["default"], identity(model)
    report = hotswap_adapter(model, tmp_path)
    assert not report.missing
    # float64: what was folded into B is rounded once, at 1e-16.
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert identity(model) == before
    assert model.peft_config["default"] is config
    # What is saved now is the swapped adapter, under the present config.
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again").eval()
    torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-12)


def test_values_are_copied_bit_for_bit_where_configs_agree(tmp_path: Path) -> None:
    source = saved(PAIRS["equal"][1], tmp_path)
    model = adapted(PAIRS["equal"][0])
    hotswap_adapter(model, tmp_path)
    theirs = get_peft_model_state_dict(source)
    assert all(torch.equal(value, theirs[key]) for key, value in get_peft_model_state_dict(model).items())


def test_a_state_dict_in_memory() -> None:
    present, incoming = PAIRS["smaller rank, other alpha"]
    source, model, x = adapted(incoming, 2), adapted(present), token_ids()
    hotswap_adapter_from_state_dict(
        model, get_peft_model_state_dict(source), "default", incoming, parameter_prefix="lora_"
    )
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=1e-12)


def test_flags_and_other_adapters_stay(tmp_path: Path) -> None:
    saved(LoraConfig(r=2, target_modules=LINEAR), tmp_path)
    model, x = adapted(LoraConfig(r=4, target_modules=LINEAR)), token_ids()
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False))
    model.set_adapter("other")
    other = model(x)
    before = identity(model)
    hotswap_adapter(model, tmp_path)
    assert identity(model) == before
    assert model.active_adapter == "other"
    assert torch.equal(model(x), other)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a larger rank": (
        LoraConfig(r=4, target_modules=["up"]),
        LoraConfig(r=8, target_modules=["up"]),
        r"blocks\.0\.up: .*rank 8.*room for 4.*target_rank=8",
    ),
    "more sites": (
        LoraConfig(r=4, target_modules=["up"]),
        LoraConfig(r=4, target_modules=LINEAR),
        r"blocks\.0\.down: the adapter on the model has no part there",
    ),
    "another kind": (
        LoraConfig(r=4, target_modules=["up"]),
        LoraConfig(r=4, use_dora=True, target_modules=["up"]),
        r"blocks\.0\.up.*LoraLinear cannot express",
    ),
    "a bias without a place": (
        LoraConfig(r=4, target_modules=["up"]),
        LoraConfig(r=4, lora_bias=True, target_modules=["up"]),
        "LoraLinear cannot express",
    ),
    "other rows": (
        LoraConfig(r=4, target_modules=["up"], trainable_token_indices={"embedding": [1, 5]}),
        LoraConfig(r=4, target_modules=["up"], trainable_token_indices={"embedding": [1, 6]}),
        "embedding.*EmbeddingRows cannot express",
    ),
    "a start that is subtracted, on the model": (
        LoraConfig(r=4, init_lora_weights="pissa", target_modules=["up"]),
        LoraConfig(r=4, target_modules=["up"]),
        "LoraLinear cannot express",
    ),
    "another series": (
        OFTConfig(oft_block_size=4, target_modules=["up"]),
        OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["up"]),
        "OFT cannot express",
    ),
    "ia3 on the other side": (
        IA3Config(target_modules=["up"], feedforward_modules=[]),
        IA3Config(target_modules=["up"], feedforward_modules=["up"]),
        "IA3Adapter cannot express",
    ),
    "another method": (
        LoraConfig(r=4, target_modules=["up"]),
        IA3Config(target_modules=["up"], feedforward_modules=[]),
        "load it under another name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_swapped_is_refused_and_changes_nothing(case: str, tmp_path: Path) -> None:
    present, incoming, message = REFUSED[case]
    saved(incoming, tmp_path)
    model = adapted(present)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointMismatchError, match=f"(?s){message}") as error:
        hotswap_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_states_that_cannot_be_swapped(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["up"])
    saved(config, tmp_path)
    with pytest.raises(PeftError, match="no adapters; load one first"):
        hotswap_adapter(base(), tmp_path)
    model = adapted(config)
    with pytest.raises(AdapterNotFoundError, match="'other'"):
        hotswap_adapter(model, tmp_path, "other")
    model.merge_adapter()
    with pytest.raises(MergeError, match="swapping an adapter"):
        hotswap_adapter(model, tmp_path)


def test_a_failure_while_values_are_written_takes_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(LoraConfig(r=2, target_modules=LINEAR), tmp_path)
    model = adapted(LoraConfig(r=4, target_modules=LINEAR))
    before = copy.deepcopy(model.state_dict())
    names = dict(model.named_parameters())
    last = names["blocks.1.down.adapters.default.lora_B"]
    original, written = torch.Tensor.copy_, []

    def copy_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is last and not written:
            written.append(True)
            raise MemoryError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with pytest.raises(MemoryError):
        hotswap_adapter(model, tmp_path)
    monkeypatch.undo()
    assert written
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- room for larger ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=12, target_modules=EVERYWHERE),
        LoraConfig(r=4, rank_pattern={"up": 6}, alpha_pattern={"down": 5}, use_rslora=True, target_modules=LINEAR),
        LoraConfig(r=2, use_dora=True, target_modules=["up"], modules_to_save=["head"]),
        LoraConfig(r=4, init_lora_weights="pissa", target_modules=LINEAR),
    ],
    ids=["plain", "patterns", "dora", "pissa"],
)
def test_making_room_changes_no_output(config: LoraConfig, tmp_path: Path) -> None:
    model, x = adapted(config), token_ids()
    model.add_adapter("ia3", IA3Config(target_modules=["up"], feedforward_modules=[]))
    expected, flags = model(x), {name: p.requires_grad for name, p in model.named_parameters()}
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert model.peft_config["default"].r == 12
    assert model.active_adapter == "default"
    known = {name: p.requires_grad for name, p in model.named_parameters()}
    assert known == {name: flag for name, flag in flags.items() if ".anchor." not in name}
    if config.use_dora:
        return
    saved(LoraConfig(r=12, lora_alpha=7, target_modules=["up"]), tmp_path)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), PeftModel.from_pretrained(base(), tmp_path).eval()(x), rtol=0, atol=1e-12)


def test_room_by_the_configs_to_come() -> None:
    model = adapted(LoraConfig(r=2, target_modules=["up"]))
    coming = {"a": LoraConfig(r=4), "b": LoraConfig(r=3, rank_pattern={"up": 7})}
    prepare_model_for_compiled_hotswap(model, config=coming)
    assert model.peft_config["default"].r == 7


def test_room_is_refused() -> None:
    model = adapted(LoraConfig(r=8, target_modules=["up"]))
    with pytest.raises(ConfigError, match="target_rank=4, but there are adapters of rank 8"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    with pytest.raises(PeftError, match="no adapters"):
        prepare_model_for_compiled_hotswap(base())
    with pytest.raises(PeftError, match="no adapter of this model is a LoRA"):
        prepare_model_for_compiled_hotswap(adapted(IA3Config(target_modules=["up"], feedforward_modules=[])))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(PeftError, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=9)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=9, check_compiled="warn")
    with pytest.raises(ConfigError, match="check_compiled='maybe'"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=9, check_compiled="maybe")  # type: ignore[arg-type]
    assert model.peft_config["default"].r == 9


def test_configs_are_compared() -> None:
    plain = LoraConfig(r=4)
    check_hotswap_configs_compatible(plain, LoraConfig(r=8, use_rslora=True, alpha_pattern={"up": 3}, lora_dropout=0.1))
    with pytest.raises(ConfigError, match="use_dora: False and True"):
        check_hotswap_configs_compatible(plain, LoraConfig(r=4, use_dora=True))
    with pytest.raises(ConfigError, match="lora_bias"):
        check_hotswap_configs_compatible(plain, LoraConfig(r=4, lora_bias=True))


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.compile", "model.compile"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_a_compiled_model_is_not_compiled_again(wrapped: bool, tmp_path: Path) -> None:
    ranks = {"a": 2, "b": 5, "c": 8}
    for seed, (name, r) in enumerate(ranks.items(), 2):
        saved(LoraConfig(r=r, lora_alpha=3 + r, target_modules=LINEAR), tmp_path / name, seed)
    x = token_ids()
    torch.compiler.reset()
    frames: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    model = PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    if wrapped:
        called: Any = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
        called = model
    with torch.no_grad():
        called(x)
        first = len(frames)
        for name in ("b", "c", "a", "b"):
            hotswap_adapter(called, tmp_path / name)
            expected = PeftModel.from_pretrained(base(), tmp_path / name).eval()(x)
            torch.testing.assert_close(called(x), expected, rtol=0, atol=1e-12)
    assert first == 1
    assert len(frames) == first
    torch.compiler.reset()


def test_the_same_as_hf_after_hf_swaps(tmp_path: Path) -> None:
    """What HF PEFT computes after its hot swap of the same files."""
    import peft
    from peft.utils.hotswap import hotswap_adapter as theirs

    for name, (r, seed) in {"a": (8, 2), "b": (4, 3)}.items():
        saved(LoraConfig(r=r, lora_alpha=5, target_modules=LINEAR), tmp_path / name, seed)
    x = token_ids()
    model = PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    hotswap_adapter(model, tmp_path / "b")
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "a", autocast_adapter_dtype=False).eval()
    theirs(other, tmp_path / "b", "default")
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-12)


def test_methods_without_a_form_say_so(tmp_path: Path) -> None:
    config = load_method("boft")(boft_block_size=4, target_modules=["up"])
    other = load_method("boft")(boft_block_size=2, target_modules=["up"])
    saved(other, tmp_path)
    with pytest.raises(CheckpointMismatchError, match="BOFT cannot express"):
        hotswap_adapter(adapted(config), tmp_path)
