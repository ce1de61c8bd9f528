"""Adapters made of others: sums are exact, approximations the best of their rank, and the papers' formulas hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_core import CombineError, PeftModel, get_peft_model, get_peft_model_state_dict
from peft_ia3 import IA3Config
from peft_lora import LoraConfig, convert_to_lora, save_as_lora
from peft_lora.combining.arithmetic import Arithmetic, dropped, elected, trimmed
from peft_lora.combining.low_rank import Product, spectrum

IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
TARGETS = ["embedding", "first", "conv", "last"]
WEIGHTS = [0.7, -0.4, 1.3]
NAMES = ["a", "b", "c"]


class Net(nn.Module):
    """A layer of every kind that a LoRA adapts, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 8)

    def forward(self, ids):
        h = torch.tanh(self.first(self.embedding(ids)))
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.last(h)


def base() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def adapted(*configs, model=None):
    """A model with the adapters a, b, c ..., all of whose values are random."""
    model = base() if model is None else model
    generator = torch.Generator().manual_seed(1)
    for name, config in zip(NAMES, configs, strict=False):
        if hasattr(model, "_peft"):
            model.add_adapter(name, config)
        else:
            get_peft_model(model, config, name)
        for parameter in model._peft.adapters[name].parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return model.eval()


def lora(r, targets=TARGETS, **options):
    return LoraConfig(r=r, lora_alpha=2 * r + 1, target_modules=targets, **options)


def deltas(model, name):
    """What an adapter adds to each weight, by merging it into a copy."""
    merged = copy.deepcopy(model)
    merged.set_adapter(name)
    merged = merged.merge_and_unload()
    before = base().state_dict()
    return {key: value - before[key] for key, value in merged.state_dict().items()}


def weighted(model):
    found = [deltas(model, name) for name in NAMES]
    return {key: sum(w * one[key] for w, one in zip(WEIGHTS, found, strict=True)) for key in found[0]}


# Double precision; a few thousand additions and two decompositions stay well below.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("how", ["cat", "linear"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3)])
def test_sums_are_exact_whatever_the_ranks(how, ranks):
    model = adapted(*(lora(r, [*TARGETS, "attention"]) for r in ranks))
    report = model.add_weighted_adapter(NAMES, WEIGHTS, "sum", how)
    assert model.peft_config["sum"].r == sum(ranks)
    assert set(report) == {"embedding", "first", "conv", "attention", "last"} and not any(report.values())
    expected, found = weighted(model), deltas(model, "sum")
    assert any(value.abs().max() > 0.1 for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE)
    # The factors of a sum are not the sums of the factors.
    if len(set(ranks)) == 1:
        model.add_weighted_adapter(NAMES, WEIGHTS, "crossed", "linear_factors")
        assert (deltas(model, "crossed")["first.weight"] - expected["first.weight"]).abs().max() > 0.1


def test_svd_is_the_best_product_of_its_rank_and_says_how_far_it_is_off():
    model = adapted(lora(2), lora(5), lora(3))
    report = model.add_weighted_adapter(NAMES, WEIGHTS, "low", svd_rank=4)
    expected, found = weighted(model), deltas(model, "low")
    for path in TARGETS:
        whole, low = (d[f"{path}.weight"].flatten(1) for d in (expected, found))
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(low, u[:, :4] @ torch.diag(s[:4]) @ v[:4], **CLOSE)
        assert report[path] == pytest.approx(float((whole - low).norm() / whole.norm()), rel=1e-6)
    assert model.peft_config["low"].r == 4


def test_a_share_of_the_energy_gives_each_layer_a_rank_of_its_own(tmp_path):
    model = adapted(lora(2), lora(5, ["first"]), lora(3))
    model.add_weighted_adapter(NAMES, WEIGHTS, "low", svd_rank=0.9)
    config = model.peft_config["low"]
    for path in TARGETS:
        s = torch.linalg.svdvals(weighted(model)[f"{path}.weight"].flatten(1)).square()
        rank = config.rank_pattern.get(path, config.r)
        assert s[:rank].sum() >= 0.9 * s.sum() > s[: rank - 1].sum()
    # Ranks and all else are in the file.
    model.save_pretrained(tmp_path, selected_adapters=["low"])
    again = PeftModel.from_pretrained(base(), tmp_path / "low")
    expected, found = (get_peft_model_state_dict(m, adapter_name=n) for m, n in ((model, "low"), (again, "default")))
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_as_in_the_paper(sign):
    """Section 3: trim to the top share, elect signs, average those that agree."""
    tensors = [torch.randn(7, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = Arithmetic("ties", density=0.4, sign=sign, seed=0)(tensors, WEIGHTS)
    kept = [trimmed(t, 0.4) for t in tensors]
    for t, k in zip(tensors, kept, strict=True):
        assert int((k != 0).sum()) == int(0.4 * t.numel())
        assert t[k == 0].abs().max() <= k[k != 0].abs().min()
    for at in range(7 * 9):
        entries = [k.flatten()[at].item() for k in kept]
        votes = [(e > 0) - (e < 0) for e in entries] if sign == "frequency" else entries
        majority = 1 if sum(votes) >= 0 else -1
        agreeing = [(w, e) for w, e in zip(WEIGHTS, entries, strict=True) if e * majority > 0]
        mean = sum(w * e for w, e in agreeing) / max(len(agreeing), 1)
        assert found.flatten()[at].item() == pytest.approx(mean, abs=1e-6)  # float32


def test_dare_keeps_a_share_rescales_it_and_is_seeded():
    """Section 3.1: δ̂ = m ∘ δ / (1 - p), so that the mean stays."""
    tensor = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    found = dropped(tensor, 0.25, torch.Generator().manual_seed(5))
    kept = found != 0
    torch.testing.assert_close(found[kept], tensor[kept] / 0.25)
    assert kept.double().mean().item() == pytest.approx(0.25, abs=0.02)  # 20,000 draws: a deviation of 0.003
    assert torch.equal(found, dropped(tensor, 0.25, torch.Generator().manual_seed(5)))
    assert not torch.equal(found, dropped(tensor, 0.25, torch.Generator().manual_seed(6)))
    tensors = [tensor, -tensor]
    generator = torch.Generator().manual_seed(9)
    expected = [dropped(t, 0.5, generator) for t in tensors]
    linear = Arithmetic("dare_linear", density=0.5, sign="total", seed=9)(tensors, [1.0, 2.0])
    torch.testing.assert_close(linear, expected[0] + 2 * expected[1])
    ties = Arithmetic("dare_ties", density=0.5, sign="total", seed=9)(tensors, [1.0, 2.0])
    torch.testing.assert_close(ties, elected(expected, [1.0, 2.0], "total"))


def test_random_ways_depend_on_the_seed_alone():
    model = adapted(lora(4), lora(4), lora(4))
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        torch.rand(7)  # the global generator does not matter
        model.add_weighted_adapter(NAMES, WEIGHTS, name, "dare_ties", density=0.5, svd_rank=8, seed=seed)
    one, same, other = (get_peft_model_state_dict(model, adapter_name=n) for n in ("one", "same", "other"))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_adapters_of_any_method_with_a_delta():
    """A LoRA with magnitudes, one with a bias and scaled activations become one LoRA."""
    targets = ["first", "last"]
    model = adapted(
        lora(3, targets, use_dora=True),
        lora(2, targets, lora_bias=True),
        IA3Config(target_modules=targets, feedforward_modules=[]),
    )
    model.add_weighted_adapter(NAMES, WEIGHTS, "all", svd_rank=12, config=LoraConfig())
    expected, found = weighted(model), deltas(model, "all")
    assert expected["first.bias"].abs().max() > 0.1
    for key in ("first.weight", "first.bias", "last.weight", "last.bias"):
        torch.testing.assert_close(found[key], expected[key], **CLOSE)


def test_conversion_to_lora(tmp_path):
    model = adapted(IA3Config(target_modules=["first", "last"], feedforward_modules=["last"]))
    before = get_peft_model_state_dict(model, adapter_name="a")
    expected = deltas(model, "a")
    config, tensors = convert_to_lora(model, 8, "a")
    assert config.r == 8 and list(model.peft_config) == ["a"]
    assert all(
        torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model, adapter_name="a").items()
    )
    assert tensors["base_model.model.first.lora_A.weight"].shape == (8, 12)

    errors = save_as_lora(tmp_path, model, 3, "a")
    again = PeftModel.from_pretrained(base(), tmp_path)
    found = deltas(again, "default")
    for path in ("first", "last"):
        whole = expected[f"{path}.weight"]
        error = (found[f"{path}.weight"] - whole).norm() / whole.norm()
        s = torch.linalg.svdvals(whole)
        assert errors[path] == pytest.approx(float((s[3:].square().sum() / s.square().sum()).sqrt()), rel=1e-6)
        assert float(error) == pytest.approx(errors[path], rel=1e-6)
    exact = convert_to_lora(model, 1.0, "a")
    assert max(exact.errors.values()) < 1e-9


def test_products_are_decomposed_through_their_factors():
    """The same as the dense decomposition, of matrices no larger than the rank."""
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((40, 5), (5, 30)))
    found, dense = spectrum(Product(b, a)), spectrum(b @ a)
    torch.testing.assert_close(found.s, dense.s[:5], **CLOSE)
    torch.testing.assert_close(found.u @ torch.diag(found.s) @ found.v.t(), b @ a, **CLOSE)
    assert found.u.shape == (40, 5) and found.v.shape == (30, 5)


def test_refusals_name_the_culprit_and_change_nothing():
    model = adapted(lora(4), lora(2), lora(3))
    model.add_adapter("head", lora(4, ["first"], modules_to_save=["last"]))
    before = get_peft_model_state_dict(model, adapter_name="a")
    for arguments, options, message in [
        ((NAMES, WEIGHTS, "new", "product"), {}, "cannot be combined by 'product'"),
        ((NAMES, WEIGHTS, "new", "ties"), {}, "needs density"),
        ((NAMES, WEIGHTS, "new", "ties"), {"density": 1.5}, "needs density"),
        ((NAMES, WEIGHTS, "new", "ties"), {"density": 0.5, "majority_sign_method": "loud"}, "'total' or 'frequency'"),
        ((NAMES, WEIGHTS, "new", "svd"), {"svd_rnak": 3}, "no option 'svd_rnak'"),
        ((NAMES, WEIGHTS, "new", "svd"), {"svd_rank": 0}, "positive integer"),
        ((NAMES, WEIGHTS, "new", "linear_factors"), {}, "ranks differ"),
        ((["a", "head"], [1.0, 1.0], "new"), {}, "'head' also trains last"),
    ]:
        with pytest.raises(CombineError, match=message):
            model.add_weighted_adapter(*arguments, **options)
    with pytest.raises(CombineError, match="adapters of IA3 become one"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "new", config=IA3Config())
    assert list(model.peft_config) == [*NAMES, "head"]
    after = get_peft_model_state_dict(model, adapter_name="a")
    assert all(torch.equal(before[key], after[key]) for key in before)
