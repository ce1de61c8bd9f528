"""Starts of LoRA: what they compute by the papers' formulas, and what all of them leave as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from starts_by_hand import (
    BATCHES,
    FROM_DATA,
    FROM_WEIGHT,
    IDS,
    STARTS,
    TARGETS,
    adapted,
    batch,
    config,
    lora,
    move,
    net,
    sgd,
    train,
    weights,
)
from torch import Tensor, nn

from peft_core import PeftModel, get_peft_model, plan
from peft_core.errors import ConfigError, TargetError
from peft_core.lifecycle import checked_draft
from peft_lora import LoraConfig
from peft_lora.starts import mica, olora, pissa

S = 4 / 3
# Products of factors of a few entries, in float32: rounding of 2⁻²⁴ by some tens of terms.
CLOSE: dict[str, float] = {"rtol": 2e-5, "atol": 2e-6}
ANCHORED = tuple(start for start in STARTS if start not in ("eva", "mica"))


def out(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS)["logits"]
    return result


# ---- what each start is


def principal(weight: Tensor, r: int) -> Tensor:
    """The best approximation of rank r."""
    u, s, vh = torch.linalg.svd(weight)
    return (u[:, :r] * s[:r]) @ vh[:r]


def test_pissa_is_the_principal_part_shared_evenly() -> None:
    model = adapted("pissa")
    for path in TARGETS:
        one = lora(model, path)
        weight = net().get_submodule(path).weight
        torch.testing.assert_close(S * one.b @ one.a, principal(weight, 3), **CLOSE)
        singular = torch.linalg.svdvals(weight)[:3]
        torch.testing.assert_close((one.a @ one.a.t()), torch.diag(singular / S), **CLOSE)
        torch.testing.assert_close((one.b.t() @ one.b), torch.diag(singular / S), **CLOSE)


def test_pissa_of_an_embedding_and_of_a_kernel() -> None:
    model = adapted("pissa", target_modules=["embed", "conv"])
    embed, conv = lora(model, "embed"), lora(model, "conv")
    torch.testing.assert_close(S * (embed.b @ embed.a).t(), principal(net().embed.weight, 3), **CLOSE)
    kernel = net().conv.weight
    product = S * conv.b.flatten(1) @ conv.a.flatten(1)
    torch.testing.assert_close(product, principal(kernel.flatten(1), 3), **CLOSE)


def test_randomised_pissa_finds_a_part_that_stands_out() -> None:
    """Few power iterations are exact to rounding where the rest of the spectrum is far below."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(60, 40, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(50, 40, generator=generator)).Q
    weight = (left * torch.tensor([9.0, 7.0, 5.0, *[1e-3] * 37])) @ right.t()
    a, b = pissa.factors(weight, 3, S, niter=2)
    torch.testing.assert_close(S * b @ a, principal(weight, 3), rtol=1e-5, atol=1e-5)


def test_a_negative_alpha_turns_one_side() -> None:
    weight = net().down.weight
    a, b = pissa.factors(weight, 3, -2.0)
    torch.testing.assert_close(-2.0 * b @ a, principal(weight, 3), **CLOSE)


def test_olora_is_the_beginning_of_qr() -> None:
    model = adapted("olora")
    for path in TARGETS:
        one = lora(model, path)
        # Gram-Schmidt on the weight's columns; a sign for each is free.
        basis: list[Tensor] = []
        for column in net().get_submodule(path).weight.double().t()[:3]:
            rest = column - sum((b * (b @ column) for b in basis), torch.zeros(()))
            basis.append(rest / rest.norm())
        q = torch.stack(basis, 1)
        torch.testing.assert_close((q.t() @ one.b.double()).abs(), torch.eye(3).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            one.a.double(), one.b.double().t() @ net().get_submodule(path).weight.double(), **CLOSE
        )


def test_mica_holds_the_minor_directions_and_trains_a_alone() -> None:
    model = adapted("mica")
    for path in TARGETS:
        one = lora(model, path)
        u = torch.linalg.svd(net().get_submodule(path).weight, full_matrices=False).U
        torch.testing.assert_close((u[:, -3:].t() @ one.b).abs(), torch.eye(3), rtol=0, atol=1e-5)
        assert not one.a.any() and one.a.requires_grad and not one.b.requires_grad


def test_factors_have_signs_of_their_own_choice() -> None:
    """MiCA's B trains never, so it must not depend on which sign a decomposition happened to choose."""
    weight = net().down.weight
    _, b = mica.factors(weight, 3)
    _, turned = mica.factors(weight.flip(1), 3)  # the same left singular vectors, by another computation
    torch.testing.assert_close(b, turned, rtol=0, atol=1e-5)
    assert olora.factors(weight, 3)[1].shape == (16, 3)


# ---- what all of them keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_the_model_starts_as_the_base_bit_for_bit(start: str, dtype: torch.dtype) -> None:
    expected = out(net(dtype))
    model = adapted(start, net(dtype))
    assert torch.equal(out(model), expected)
    if start in ANCHORED:
        assert all(lora(model, path).a.abs().sum() > 0 and lora(model, path).b.abs().sum() > 0 for path in TARGETS)
    # Not for lack of an effect.
    move(model)
    assert not torch.equal(out(model), expected)


@pytest.mark.parametrize("start", STARTS)
def test_adapters_in_half_precision_start_as_the_base_too(start: str, tmp_path: Path) -> None:
    """The factors are rounded first; what is subtracted is what was rounded."""
    base, calibration = net(torch.bfloat16), BATCHES if start in FROM_DATA else None
    model = get_peft_model(base, config(start), calibration=calibration, autocast_adapter_dtype=False).eval()
    assert lora(model, "down").a.dtype == torch.bfloat16
    assert torch.equal(out(model), out(net(torch.bfloat16)))
    move(model)
    expected = out(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(out(loaded), expected)


@pytest.mark.parametrize("start", STARTS)
def test_the_base_is_never_written(start: str) -> None:
    base = net()
    before = weights(base)
    model = adapted(start, base)
    model.train()
    train(model, sgd(model), range(2))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    model.unload()
    assert all(torch.equal(value, before[name]) for name, value in weights(base).items())
    assert torch.equal(out(base), out(net()))


@pytest.mark.parametrize("start", ANCHORED)
def test_the_delta_counts_from_the_start(start: str) -> None:
    """Merged weight = W + s (B A - B0 A0), in float64."""
    model = adapted(start, net(torch.float64))
    first = {path: (lora(model, path).b @ lora(model, path).a).detach().clone() for path in TARGETS}
    move(model)
    expected = out(model)
    now = {path: (lora(model, path).b @ lora(model, path).a).detach() for path in TARGETS}
    model.merge_adapter()
    for path in TARGETS:
        wanted = net(torch.float64).get_submodule(path).weight + S * (now[path] - first[path])
        torch.testing.assert_close(model.get_submodule(path).base_layer.weight, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out(model), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", ANCHORED)
def test_gradients_are_those_of_the_factors_on_a_moved_base(start: str) -> None:
    """W - s B0 A0 + s B A: what training does where the base is changed instead (HF PEFT's way)."""
    model = adapted(start, net(torch.float64))
    frozen = net(torch.float64).requires_grad_(False)
    factors = {}
    for path in TARGETS:
        a, b = (t.detach().clone().requires_grad_() for t in (lora(model, path).a, lora(model, path).b))
        factors[path] = a, b
        with torch.no_grad():
            frozen.get_submodule(path).weight -= S * b @ a
    values = {f"{path}.weight": frozen.get_submodule(path).weight + S * b @ a for path, (a, b) in factors.items()}
    loss = torch.func.functional_call(frozen, values, kwargs=batch(9))["loss"]
    wanted = torch.autograd.grad(loss, [factor for pair in factors.values() for factor in pair])
    model(**batch(9))["loss"].backward()
    found = [factor.grad for path in TARGETS for factor in (lora(model, path).a, lora(model, path).b)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_adapters_of_different_starts_share_one_base() -> None:
    base = net()
    model = get_peft_model(base, config("pissa"), "one")
    model.add_adapter("other", config("olora"))
    model.add_adapter("third", config("corda"), calibration=BATCHES)
    model.eval()
    alone = {}
    for name, start in (("one", "pissa"), ("other", "olora"), ("third", "corda")):
        model.set_adapter(name)
        assert torch.equal(out(model), out(net())), name
        move(model, seed=len(name))
        alone[name] = out(model)
        single = adapted(start)
        move(single, seed=len(name))
        assert torch.equal(out(single), alone[name])
    # A start looks at the base, whatever adapters are active.
    model.set_adapter(["one", "other"])
    model.add_adapter("again", config("pissa"))
    model.set_adapter("again")
    assert torch.equal(model.eval() and out(model), out(net()))
    assert torch.equal(lora(model, "down", "again").a, lora(adapted("pissa"), "down").a)


@pytest.mark.parametrize("start", ["pissa", "corda"])
def test_with_dora_the_norms_are_those_of_the_whole_weight(start: str) -> None:
    model = adapted(start, net(torch.float64), use_dora=True)
    assert torch.equal(out(model), out(net(torch.float64)))
    site = model.get_submodule("down").adapters.get_submodule("default")
    torch.testing.assert_close(
        site.lora_magnitude_vector, net(torch.float64).down.weight.norm(dim=1), rtol=1e-12, atol=0
    )
    move(model)
    a, b = site.lora.factors()
    moved = net(torch.float64).down.weight + S * b @ a
    wanted = site.lora_magnitude_vector[:, None] * moved / moved.norm(dim=1, keepdim=True)
    model.merge_adapter()
    torch.testing.assert_close(model.down.base_layer.weight, wanted, rtol=1e-12, atol=1e-12)


# ---- files


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(
    start: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    if start == "mica":  # refused with use_dora
        fields = {**fields, "use_dora": False}
    fields |= {"rank_pattern": {"down": 2}, "alpha_pattern": {"block.up": 5}} if start != "eva" else {}
    straight = adapted(start, **fields)
    losses = train(straight, sgd(straight), range(4))
    model = adapted(start, **fields)
    first = train(model, sgd(model), range(2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].resolve(inference_mode=False) == model.peft_config["default"]
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trains[0] == trains[1]
    assert first + train(loaded, sgd(loaded), range(2, 4)) == losses
    assert torch.equal(out(loaded), out(straight))


@pytest.mark.parametrize("start", ANCHORED)
def test_a_file_is_plain_lora_of_twice_the_rank(start: str, tmp_path: Path) -> None:
    """Any reader computes the delta from the file alone, without a word of ours."""
    model = adapted(start, rank_pattern={"down": 2}, alpha_pattern={"block.up": 5}, use_rslora=True)
    move(model)
    expected = out(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written["init_lora_weights"] is True and written["r"] == 6 and written["rank_pattern"] == {"down": 4}
    own = written.pop("started_from")
    assert own["init_lora_weights"] == start and own["r"] == 3
    tensors = model.get_adapter_state_dict()
    plain = get_peft_model(net(), LoraConfig.from_dict(written)).eval()
    from peft_core import set_peft_model_state_dict

    set_peft_model_state_dict(plain, tensors)
    torch.testing.assert_close(out(plain), expected, **CLOSE)


def test_values_of_a_file_go_into_the_tensors_that_are_there(tmp_path: Path) -> None:
    model = adapted("pissa")
    move(model)
    expected = out(model)
    model.save_pretrained(tmp_path)
    optimizer = sgd(model)
    move(model, seed=6)
    report = model.load_adapter(tmp_path, "default", replace=True)
    assert not report.missing and torch.equal(out(model), expected)
    assert optimizer.param_groups[0]["params"][0] is lora(model, "block.q").a


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "One of the two was edited"),
        ({"started_from": {"init_lora_weights": "pissa"}}, "holds the fields"),
        ({"started_from": [1]}, "holds the fields"),
        (
            {
                "started_from": {
                    "init_lora_weights": True,
                    "r": 3,
                    "lora_alpha": 4,
                    "rank_pattern": {},
                    "alpha_pattern": {},
                }
            },
            "edited",
        ),
        (
            {
                "started_from": {
                    "init_lora_weights": "pissa",
                    "r": 3,
                    "lora_alpha": 4,
                    "rank_pattern": {},
                    "alpha_pattern": {},
                    "target_modules": ["x"],
                }
            },
            "holds the fields",
        ),
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself(change: dict[str, Any], message: str) -> None:
    written = config("pissa").beside_tensors()
    assert LoraConfig.from_dict(written) == config("pissa")
    with pytest.raises(ConfigError, match=message):
        LoraConfig.from_dict({**written, **change})


def test_a_file_with_tensors_of_another_rank(tmp_path: Path) -> None:
    adapted("pissa").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(TargetError, match=r"asks for 8 rows, and the file has shape \(6, "):
        PeftModel.from_pretrained(net(), tmp_path, config=config("pissa", r=4))


# ---- what is refused


@pytest.mark.parametrize("start", [*FROM_WEIGHT, *FROM_DATA])
def test_a_rank_that_the_weight_has_not(start: str) -> None:
    with pytest.raises(TargetError, match="nothing was changed" if start in FROM_WEIGHT else "directions"):
        get_peft_model(net(), config(start, r=13), calibration=BATCHES if start in FROM_DATA else None)


@pytest.mark.parametrize("start", FROM_DATA)
def test_data_are_asked_for(start: str) -> None:
    base = net()
    with pytest.raises(TargetError, match="calibration=batches"):
        get_peft_model(base, config(start))
    assert type(base).__name__ == "Net" and not hasattr(base, "_peft")
    assert not plan(base, config(start)).problems


@pytest.mark.parametrize("start", [True, "gaussian", *FROM_WEIGHT])
def test_data_without_a_start_that_needs_them(start: Any) -> None:
    with pytest.raises(ConfigError, match="does not start from data"):
        get_peft_model(net(), config(start), calibration=BATCHES)


@pytest.mark.parametrize("start", FROM_DATA)
@pytest.mark.parametrize("target", ["conv", "embed"])
def test_starts_from_data_are_for_linear_layers(start: str, target: str) -> None:
    with pytest.raises(TargetError, match="for layers of kind linear"):
        get_peft_model(net(), config(start, target_modules=[target]), calibration=BATCHES)


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_layers_without_one_weight_of_their_own(start: str) -> None:
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match="for layers of kind linear"):
        get_peft_model(attention, config(start, target_modules=["attn"]))
    with pytest.raises(TargetError, match="not a single parameter"):
        get_peft_model(attention, config(start, target_modules=[], target_parameters=["linear.weight"]))
    with pytest.raises(TargetError, match="2 groups"):
        get_peft_model(nn.Sequential(nn.Conv1d(8, 8, 1, groups=2)), config(start, r=2, target_modules=["0"]))


@pytest.mark.parametrize("start", FROM_WEIGHT)
def test_a_weight_that_is_not_finite(start: str) -> None:
    base = net()
    with torch.no_grad():
        base.down.weight[0, 0] = float("nan")
    with pytest.raises(TargetError, match="NaN or infinity"):
        get_peft_model(base, config(start))


def test_loftq_and_tied_layers_and_mica_with_dora() -> None:
    with pytest.raises(TargetError, match="replace_lora_weights_loftq"):
        get_peft_model(net(), config("loftq", loftq_config={"loftq_bits": 4}))
    with pytest.raises(ConfigError, match="mica.*exclude each other"):
        config("mica", use_dora=True)
    with pytest.raises(ConfigError, match="eva_config is for init_lora_weights='eva'"):
        config("pissa", eva_config={})
    tied = nn.ModuleDict({"embed": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(TargetError, match="not there for tied layers"):
        get_peft_model(tied, config("pissa", target_modules=["embed"], ensure_weight_tying=True))


def test_a_plan_of_a_start_needs_no_weights_and_no_data() -> None:
    with torch.device("meta"):
        base = net()
    for start in STARTS:
        found = plan(base, config(start))
        assert not found.problems and len(found.sites) == len(TARGETS), start
        # A and B; the factors that stay are no trained parameters.
        halves = 2 if start == "mica" else 1
        full = sum(3 * sum(net().get_submodule(path).weight.shape) for path in TARGETS)
        assert found.trainable == (
            full if halves == 1 else sum(3 * net().get_submodule(p).in_features for p in TARGETS)
        )


def test_a_draft_with_a_start_leaves_the_model_alone() -> None:
    base = net()
    before = weights(base)
    checked_draft(base, "default", config("pissa"), True, None)
    assert all(torch.equal(value, before[name]) for name, value in weights(base).items())


# ---- with the rest of the package


def test_combined_with_others_by_what_it_adds() -> None:
    """A sum of deltas counts the subtracted start, exactly (cat) and by decomposition (svd)."""
    model = get_peft_model(net(torch.float64), config("pissa"), "one")
    model.add_adapter("other", config("olora"))
    for name in ("one", "other"):
        model.set_adapter(name)
        move(model, seed=len(name))
    wanted = {}
    for path in TARGETS:
        pairs = [lora(model, path, name).factors() for name in ("one", "other")]
        wanted[path] = 0.7 * S * pairs[0][1] @ pairs[0][0] - 0.4 * S * pairs[1][1] @ pairs[1][0]
    for way in ("cat", "svd"):
        model.add_weighted_adapter(
            ["one", "other"], [0.7, -0.4], way, combination_type=way, **({"svd_rank": 12} if way == "svd" else {})
        )
        for path in TARGETS:
            found = lora(model, path, way)
            assert found.anchor is None
            torch.testing.assert_close(found.weight_delta(), wanted[path], rtol=1e-9, atol=1e-12)
