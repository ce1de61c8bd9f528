"""Starts of LoRA next to HF PEFT's: the same factors, the same training, and files both ways.

HF writes the base's weights where a start is not zero; here the base stays and the start is subtracted. The models
compute the same all the same: W - s B0 A0 + s B A in two orders.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft as hf
import pytest
import torch
from torch import Tensor, nn

from peft_core import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_core.errors import ConfigError, TargetError
from peft_lora import LoraConfig
from tests.tiny_transformers import make

IDS = [torch.randint(3, 32, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "up_proj", "down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa", **LLAMA}),
    "pissa-rslora": ("llama", {"init_lora_weights": "pissa", "use_rslora": True, **LLAMA}),
    "pissa-patterns": (
        "llama",
        {"init_lora_weights": "pissa", "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}, **LLAMA},
    ),
    "pissa-dora": ("llama", {"init_lora_weights": "pissa", "use_dora": True, **LLAMA}),
    "pissa-conv1d": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc"]}),
    "olora": ("llama", {"init_lora_weights": "olora", **LLAMA}),
    "olora-rslora": ("llama", {"init_lora_weights": "olora", "use_rslora": True, **LLAMA}),
    "mica": ("llama", {"init_lora_weights": "mica", **LLAMA}),
    "mica-conv1d": ("gpt2", {"init_lora_weights": "mica", "target_modules": ["c_attn", "c_fc"]}),
}
MOVED = [name for name in CASES if not name.startswith("mica")]


@contextmanager
def oracle() -> Iterator[None]:
    """HF's warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def settings(name: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, **CASES[name][1]}


def theirs(name: str) -> Any:
    with oracle():
        return hf.get_peft_model(make(CASES[name][0]), hf.LoraConfig(**settings(name))).eval()


def mine(name: str, **kwargs: Any) -> Any:
    return get_peft_model(make(CASES[name][0]), LoraConfig(**settings(name)), **kwargs).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS[0]).logits
    return out


def close(one: Tensor, other: Tensor) -> None:
    """float32, relative to the largest value: some hundred additions, and W - sB0A0 + sBA in another order."""
    assert (one - other).abs().max() <= 3e-6 * other.abs().max()


def factors(model: Any) -> dict[str, Tensor]:
    """A and B by key; of ours without the part that is subtracted."""
    if isinstance(model, hf.PeftModel):
        found = hf.get_peft_model_state_dict(model)
    else:
        found = get_peft_model_state_dict(model)
        if "started_from" in model.peft_config["default"].beside_tensors():
            found = {k: v.chunk(2, 1 if "_B" in k else 0)[0] for k, v in found.items() if "magnitude" not in k}
    return {key: value for key, value in found.items() if "lora_A" in key or "lora_B" in key or "embedding_" in key}


def train(model: Any, steps: int = 5) -> list[float]:
    """Losses of SGD on fixed data."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        ids = IDS[step % len(IDS)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_up_to_sign(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Rows of A and columns of B; the smallest singular values that the cases have are an eighth of the largest."""
    assert one.keys() == other.keys()
    for key in one:
        a, b = (value if "_A" in key else value.t() for value in (one[key], other[key]))
        signs = (a * b).sum(1, keepdim=True).sign()
        torch.testing.assert_close(a, b * signs, rtol=0, atol=tolerance * float(b.abs().max().clamp_min(1e-3)))


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_theirs(name: str) -> None:
    model, other = mine(name), theirs(name)
    assert torch.equal(logits(model), logits(make(CASES[name][0])))
    close(logits(other), logits(model))
    same_up_to_sign(factors(model), factors(other), 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_training_goes_the_same_way(name: str) -> None:
    model, other = mine(name), theirs(name)
    ours, their = train(model), train(other)
    assert ours[-1] != ours[0]
    # A dozen units of float32.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(their), rtol=1e-6, atol=0)
    close(logits(model), logits(other))


@pytest.mark.parametrize("name", CASES)
def test_mine_is_read_there(name: str, tmp_path: Path) -> None:
    """As plain LoRA of twice the rank, with one warning about a key that it does not know."""
    model = mine(name)
    train(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = hf.PeftModel.from_pretrained(make(CASES[name][0]), tmp_path).eval()
    about_keys = [str(item.message) for item in caught if "started_from" in str(item.message)]
    assert len(about_keys) == (name in MOVED) and all("ignored" in message for message in about_keys)
    close(logits(other), logits(model))
    with oracle():
        other.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make(CASES[name][0]), tmp_path / "again")
    close(logits(again), logits(model))


@pytest.mark.parametrize("name", CASES)
def test_theirs_is_read_here(name: str, tmp_path: Path) -> None:
    """Without conversion: what HF takes out of the base at every load is computed again, and subtracted."""
    other = theirs(name)
    train(other)
    with oracle():
        other.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make(CASES[name][0]), tmp_path, is_trainable=True).eval()
    close(logits(model), logits(other))
    same_up_to_sign(factors(model), factors(other), 0)
    # It goes on where it was, and what is written next has everything in it.
    torch.testing.assert_close(torch.tensor(train(model)), torch.tensor(train(other)), rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path / "mine")
    again = PeftModel.from_pretrained(make(CASES[name][0]), tmp_path / "mine")
    assert torch.equal(logits(again), logits(model))


def test_embeddings_start_from_their_table_here_only(tmp_path: Path) -> None:
    """HF starts them from zero whatever the config says; its files are read as that, and ours there as plain LoRA."""
    fields: dict[str, Any] = {"r": 4, "init_lora_weights": "pissa", "target_modules": ["embed_tokens"]}
    with oracle():
        other = hf.get_peft_model(make("llama"), hf.LoraConfig(**fields)).eval()
        assert not any(value.any() for key, value in factors(other).items() if "_A" in key)
        train(other)
        other.save_pretrained(tmp_path / "theirs")
    close(logits(PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")), logits(other))
    model = get_peft_model(make("llama"), LoraConfig(**fields)).eval()
    assert all(value.any() for value in factors(model).values())
    train(model)
    model.save_pretrained(tmp_path / "mine")
    with oracle():
        close(logits(hf.PeftModel.from_pretrained(make("llama"), tmp_path / "mine")), logits(model))


def test_gpt2_with_olora_which_hf_cannot_run() -> None:
    """HF decomposes the weight as `Conv1D` stores it, and fails in the forward; here its rows are outputs."""
    config: dict[str, Any] = {"r": 4, "target_modules": ["c_attn"], "init_lora_weights": "olora"}
    with oracle(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        hf.get_peft_model(make("gpt2"), hf.LoraConfig(**config))(input_ids=IDS[0])
    model = get_peft_model(make("gpt2"), LoraConfig(**config)).eval()
    assert torch.equal(logits(model), logits(make("gpt2")))
    train(model)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_files_whose_start_cannot_be_found_again_are_refused(start: str, tmp_path: Path) -> None:
    """A randomised decomposition, data and a quantised base are not in the file."""
    with oracle():
        hf.get_peft_model(make("llama"), hf.LoraConfig(r=4, **LLAMA)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    base = make("llama")
    with pytest.raises((ConfigError, TargetError), match="path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not isinstance(base, PeftModel)


# ---- starts from data


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(method: str) -> None:
    pytest.importorskip("attr", reason="HF's CorDA needs attrs")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": "corda", **LLAMA}
    ours = LoraConfig(**fields, corda_config={"corda_method": method})
    model = get_peft_model(make("llama"), ours, calibration=[{"input_ids": ids} for ids in IDS]).eval()
    config = hf.LoraConfig(**fields, corda_config=CordaConfig(corda_method=method))
    base = make("llama")

    def run() -> None:
        with torch.no_grad():
            for ids in IDS:
                base(input_ids=ids)

    with oracle():
        preprocess_corda(base, config, run_model=run)
        other = hf.get_peft_model(base, config).eval()
    assert torch.equal(logits(model), logits(make("llama")))
    # Both in float32, through an inverse: of a condition of some hundreds.
    same_up_to_sign(factors(model), factors(other), 5e-4)
    torch.testing.assert_close(torch.tensor(train(model)), torch.tensor(train(other)), rtol=1e-6, atol=0)


def test_eva(tmp_path: Path) -> None:
    """One batch over and over has settled with the second; its few rows leave nothing to HF's randomised SVD."""
    batches = [{"input_ids": torch.tensor([[3, 9, 14, 20, 5, 31, 11, 26]])}] * 4
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["up_proj", "down_proj"], "init_lora_weights": "eva"}
    model = get_peft_model(make("llama"), LoraConfig(**fields, eva_config={"tau": 0.0}), calibration=batches).eval()
    with oracle():
        other = hf.get_peft_model(make("llama"), hf.LoraConfig(**fields, eva_config=hf.EvaConfig(tau=0.0))).eval()
        hf.initialize_lora_eva_weights(other, batches, show_progress_bar=False)
    ours, their = model.peft_config["default"], other.peft_config["default"]
    assert ours.rank_pattern == their.rank_pattern and ours.alpha_pattern == their.alpha_pattern
    assert set(ours.target_modules) == set(their.target_modules)
    same_up_to_sign(factors(model), factors(other), 1e-5)
    torch.testing.assert_close(torch.tensor(train(model)), torch.tensor(train(other)), rtol=1e-6, atol=0)
    # Files, both ways.
    model.save_pretrained(tmp_path / "mine")
    with oracle():
        other.save_pretrained(tmp_path / "theirs")
        loaded = hf.PeftModel.from_pretrained(make("llama"), tmp_path / "mine").eval()
    close(logits(loaded), logits(model))
    close(logits(PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")), logits(other))


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga(direction: str) -> None:
    """The same singular vectors. HF also multiplies B by the gradient's singular values and leaves A at length one;
    here both have the length of the paper's theorem 3.2."""
    from peft.tuners.lora.loraga import preprocess_loraga

    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": "lora_ga", **LLAMA}
    batches = [{"input_ids": ids, "labels": ids} for ids in IDS]
    ga = {"direction": direction}
    model = get_peft_model(make("llama"), LoraConfig(**fields, lora_ga_config=ga), calibration=batches)
    base = make("llama")
    config = hf.LoraConfig(**fields, lora_ga_config=hf.LoraGAConfig(**ga))

    def step() -> None:
        for one in batches:
            base(**one).loss.backward()

    with oracle():
        preprocess_loraga(base, config, step)
        other = hf.get_peft_model(base, config)
    ours, their = factors(model), factors(other)
    for key, value in ours.items():
        dim = 1 if "_A" in key else 0
        one, two = (v / v.norm(dim=dim, keepdim=True) for v in (value, their[key]))
        # Gradients summed in two orders; singular values of neighbours may be near each other.
        torch.testing.assert_close((one * two).sum(dim).abs(), torch.ones(4), rtol=0, atol=1e-3)
        lengths = value.norm(dim=dim)
        rows = {"q_proj": 16, "up_proj": 24, "down_proj": 16}[key.split(".")[-3]]
        torch.testing.assert_close(lengths, torch.full((4,), rows**0.25 / 4), rtol=1e-5, atol=0)
