"""EVA, CorDA and LoRA-GA: what they make of batches, by the papers' formulas, and what a calibration costs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from starts_by_hand import BATCHES, TARGETS, adapted, batch, config, lora, net, weights
from torch import Tensor, nn

from peft_core import PeftModel, get_peft_model
from peft_core.errors import ConfigError, TargetError
from peft_lora import CordaConfig, EvaConfig, LoraConfig, LoraGAConfig
from peft_lora.starts.corda import Covariance
from peft_lora.starts.eva import Pca

S = 4 / 3
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


def inputs(path: str, batches: list[Any] = BATCHES) -> list[Tensor]:
    """What the layer reads, batch by batch, as rows in float64."""
    found: list[Tensor] = []
    model = net(torch.float64)
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for one in batches:
            model(**one)
    return found


class Counted(list[Any]):
    """Batches that know how many of them were asked for."""

    asked = 0

    def __iter__(self) -> Iterator[Any]:
        for one in super().__iter__():
            self.asked += 1
            yield one


# ---- EVA


def test_eva_takes_the_directions_that_explain_most() -> None:
    """All components kept, the incremental analysis is the exact one, and ranks go where the variance is."""
    model = adapted("eva", eva_config={"rho": 9.0, "tau": 0.0})
    # tau = 0 is content with the second batch; an input that several layers read is analysed once.
    rows = {path: torch.cat(inputs(path, BATCHES[:2])) for path in TARGETS}
    centred = {path: x - x.mean(0) for path, x in rows.items()}
    spectra = {path: torch.linalg.svdvals(x).square() / x.square().sum() for path, x in centred.items()}
    best = sorted(((float(v), path) for path, s in spectra.items() for v in s), reverse=True)[: 3 * len(TARGETS)]
    ranks = {path: sum(where == path for _, where in best) for path in TARGETS}
    found = model.peft_config["default"]
    assert {path: found.rank_pattern.get(path, 3) for path in found.target_modules} == {
        p: r for p, r in ranks.items() if r
    }
    for path in found.target_modules:
        one = lora(model, path)
        directions = torch.linalg.svd(centred[path], full_matrices=False).Vh[: ranks[path]]
        torch.testing.assert_close((one.a.double() @ directions.t()).abs(), torch.eye(ranks[path]).double(), **CLOSE)
        assert not one.b.any() and one.scaling == pytest.approx(S, rel=1e-12)


def test_eva_without_adjusted_scaling_keeps_alpha() -> None:
    model = adapted("eva", eva_config={"tau": 0.0, "adjust_scaling_factors": False})
    found = model.peft_config["default"]
    assert found.rank_pattern and not found.alpha_pattern
    assert all(lora(model, path).scaling == 4 / rank for path, rank in found.rank_pattern.items())


@pytest.mark.parametrize("adjust", [True, False])
def test_eva_with_rslora_and_alphas_of_single_layers(adjust: bool) -> None:
    eva = {"tau": 0.0, "adjust_scaling_factors": adjust}
    model = adapted("eva", eva_config=eva, use_rslora=True, alpha_pattern={"down": 9})
    for path in model.peft_config["default"].target_modules:
        one = lora(model, path)
        alpha = 9 if path == "down" else 4
        assert one.scaling == pytest.approx(alpha / (3 if adjust else one.settings.r) ** 0.5, rel=1e-12)


def test_eva_drops_layers_and_the_file_says_so(tmp_path: Path) -> None:
    """Where no direction stands out a layer gets no rank: it has no adapter, now and when the file is loaded."""
    base = net()
    with torch.no_grad():
        base.block.up.weight[:, 2:] = 0  # two directions are all that the last layer reads
        base.conv.weight.zero_()
    ids = torch.randint(0, 20, (2, 30, 6), generator=torch.Generator().manual_seed(0))
    fields = {"r": 1, "eva_config": {"tau": 0.0}}
    model = get_peft_model(base, config("eva", **fields), calibration=[{"ids": one} for one in ids]).eval()
    found = model.peft_config["default"]
    assert "down" in found.target_modules and set(found.target_modules) < set(TARGETS)
    assert sum(lora(model, path).settings.r for path in found.target_modules) == len(TARGETS)
    for path in set(TARGETS) - set(found.target_modules):
        assert isinstance(model.get_submodule(path), nn.Linear)
    model.save_pretrained(tmp_path)
    fresh = net()
    fresh.load_state_dict(model.base_state_dict())
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert set(loaded.peft_config["default"].target_modules) == set(found.target_modules)


def test_eva_whitened() -> None:
    plain, white = (adapted("eva", eva_config={"tau": 0.0, "whiten": flag}) for flag in (False, True))
    for path in plain.peft_config["default"].target_modules:
        x = torch.cat(inputs(path, BATCHES[:2]))
        singular = torch.linalg.svdvals(x - x.mean(0))[: len(lora(plain, path).a)]
        ratio = lora(white, path).a.norm(dim=1) / lora(plain, path).a.norm(dim=1)
        # The analysis keeps 2r components from batch to batch, and loses a little of the rest.
        torch.testing.assert_close(ratio.double(), singular.rsqrt(), rtol=0.02, atol=0)


def test_eva_stops_when_the_directions_have_settled() -> None:
    calm = Counted([BATCHES[0]] * 50)
    get_peft_model(net(), config("eva", eva_config={"tau": 0.99}), calibration=calm)
    assert calm.asked == 2
    wild = Counted(BATCHES)
    with pytest.warns(UserWarning, match="had not settled"):
        get_peft_model(net(), config("eva", eva_config={"tau": 1.0}), calibration=wild)
    assert wild.asked == len(BATCHES)


@pytest.mark.parametrize("use", [True, False])
def test_eva_looks_at_positions_that_have_a_label(use: bool) -> None:
    """A position without one changes nothing; without labels the attention mask counts."""
    masked, cut = [], []
    for one in BATCHES[:2]:
        ids, labels = one["ids"].clone(), one["labels"].clone()
        ids[:, 4:], labels[:, 4:] = 7, -100
        mask = (labels != -100).long()
        masked.append({"ids": ids, "labels": labels} if use else {"ids": ids, "attention_mask": mask})
        cut.append({"ids": ids[:, :4]})
    eva = {"tau": 0.0}
    found = [
        get_peft_model(net(), config("eva", target_modules=["block.q"], eva_config=eva), calibration=batches)
        for batches in (masked, cut)
    ]
    torch.testing.assert_close(lora(found[0], "block.q").a, lora(found[1], "block.q").a, **CLOSE)
    if use:
        # Told not to look at labels, it sees the rest as well.
        other = config("eva", target_modules=["block.q"], eva_config={**eva, "use_label_mask": False})
        ignored = get_peft_model(net(), other, calibration=masked)
        assert (lora(ignored, "block.q").a.abs() - lora(found[0], "block.q").a.abs()).abs().max() > 1e-3


def test_components_in_batches_are_those_of_everything_at_once() -> None:
    """While none is dropped, that is: with as many components as features."""
    x = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6) + 3
    pca = Pca(5, 0.99)
    for part in x.split([7, 1, 2, 50]):
        pca.update(part)
    centred = x - x.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(pca.values, values, rtol=1e-10, atol=0)
    torch.testing.assert_close((pca.components @ directions.t()).abs(), torch.eye(5).double(), rtol=0, atol=1e-8)
    assert sum(pca.ratios) == pytest.approx(1, rel=1e-12)


def test_eva_needs_rows() -> None:
    one = [{"ids": torch.tensor([[1, 2]])}] * 2
    with pytest.raises(ConfigError, match=r"block.q: the calibration batches have 4 rows"):
        get_peft_model(net(), config("eva", eva_config={"tau": 1.0}), calibration=one)


# ---- CorDA


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_decomposes_the_weight_by_what_it_does_to_the_inputs(method: str) -> None:
    model = adapted("corda", net(torch.float64), corda_config={"corda_method": method})
    for path in TARGETS:
        xs = [x / x.max().abs() for x in inputs(path)]
        c = torch.stack([x.t() @ x for x in xs]).mean(0)
        c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c))
        weight = net(torch.float64).get_submodule(path).weight.detach()
        u, s, vh = torch.linalg.svd(weight @ c, full_matrices=False)
        vh = vh @ torch.linalg.inv(c)
        chosen = slice(0, 3) if method == "ipm" else slice(-3, None)
        one = lora(model, path)
        # Inputs are gathered in float32.
        torch.testing.assert_close(S * one.b @ one.a, (u[:, chosen] * s[chosen]) @ vh[chosen], **CLOSE)
        torch.testing.assert_close(one.b.norm(dim=0), (s[chosen] / S).sqrt(), **CLOSE)


def test_corda_keeps_covariances_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "of" / "covariances.safetensors"
    corda = CordaConfig(covariance_file=str(path))
    first, second = Counted(BATCHES), Counted(BATCHES)
    one = get_peft_model(net(), config("corda", corda_config=corda), calibration=first)
    other = get_peft_model(net(), config("corda", corda_config=corda), calibration=second)
    assert (first.asked, second.asked) == (len(BATCHES), 0)
    assert set(load_file(path)) == set(TARGETS)
    assert torch.equal(lora(one, "down").a, lora(other, "down").a)
    base = net()
    base.block.extra = nn.Linear(12, 10)
    with pytest.raises(ConfigError, match="no covariance of 12 inputs for block.extra"):
        get_peft_model(base, config("corda", corda_config=corda, target_modules=["extra"]), calibration=[])
    path.write_bytes(b"not one")
    with pytest.raises(ConfigError, match="cannot be read"):
        get_peft_model(net(), config("corda", corda_config=corda), calibration=[])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_file": "x.pt"}, "covariance_file keeps"),
        ({"covariance_file": "x.pt"}, "pickles are neither"),
        ({"use_float16_for_covariance": True}, "overflow"),
        ({"corda_method": "other"}, "'ipm' or 'kpm'"),
    ],
    ids=str,
)
def test_corda_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CordaConfig(**fields)
    with pytest.raises(ConfigError, match=message):
        config("corda", corda_config=fields)


def test_corda_of_inputs_that_are_zero() -> None:
    base = net()
    with torch.no_grad():
        base.embed.weight.zero_()
    with pytest.raises(TargetError, match=r"block.q .*no inverse"):
        get_peft_model(base, config("corda"), calibration=BATCHES)


# ---- LoRA-GA


def gradient(path: str) -> Tensor:
    """The mean gradient of the loss over the batches, in float64."""
    model = net(torch.float64)
    weight = model.get_submodule(path).weight
    return torch.stack([torch.autograd.grad(model(**one)["loss"], weight)[0] for one in BATCHES]).mean(0)


DIRECTIONS = {
    "ArB2r": (slice(0, 3), slice(3, 6)),
    "A2rBr": (slice(3, 6), slice(0, 3)),
    "ArBr": (slice(1, 6, 2), slice(0, 6, 2)),
}


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_ga_takes_the_gradients_directions(direction: str, scale: str) -> None:
    ga = LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    model = adapted("lora_ga", net(torch.float64), lora_ga_config=ga)
    of_a, of_b = DIRECTIONS[direction]
    for path in TARGETS:
        one = lora(model, path)
        u, _, vh = torch.linalg.svd(gradient(path), full_matrices=False)
        singular = torch.linalg.svdvals(net(torch.float64).get_submodule(path).weight)[:3]
        length = {
            "stable": len(u) ** 0.25 / 3,
            "weight_svd": float((singular / S).sqrt().mean().detach()),
            "gd_scale": 1 / S,
            "unit": 1.0,
        }[scale]
        torch.testing.assert_close((one.a @ vh[of_a].t()).abs(), length * torch.eye(3).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close((u[:, of_b].t() @ one.b).abs(), length * torch.eye(3).double(), rtol=0, atol=1e-6)


def test_lora_ga_s_first_step_is_the_best_of_its_rank() -> None:
    """Theorem 3.1: what a step of SGD does to the weight is the best approximation of rank 2r of the gradient."""
    model = adapted("lora_ga", net(torch.float64), target_modules=["block.up"], lora_ga_config={"scale": "unit"})
    g = gradient("block.up")
    one = lora(model, "block.up")
    # To first order: B (dA) + (dB) A = -lr s (B Bᵀ G + G Aᵀ A), of rank 2r.
    step = one.b @ one.b.t() @ g + g @ one.a.t() @ one.a
    u, s, vh = torch.linalg.svd(g)
    torch.testing.assert_close(step, (u[:, :6] * s[:6]) @ vh[:6], rtol=1e-9, atol=1e-12)


def test_lora_ga_at_random_stays_among_the_first_directions() -> None:
    model = adapted("lora_ga", net(torch.float64), lora_ga_config={"direction": "random", "scale": "unit"})
    u, _, vh = torch.linalg.svd(gradient("block.up"), full_matrices=False)
    one = lora(model, "block.up")
    of_a = (one.a @ vh.t()).abs().argmax(1).tolist()
    of_b = (u.t() @ one.b).abs().argmax(0).tolist()
    assert sorted(of_a + of_b) == list(range(6))


def test_lora_ga_needs_a_loss_and_gradients() -> None:
    with pytest.raises(ConfigError, match="put labels into the batches"):
        get_peft_model(net(), config("lora_ga"), calibration=[{"ids": batch(0)["ids"]}])
    with pytest.raises(ConfigError, match="no calibration batches"):
        get_peft_model(net(), config("lora_ga"), calibration=[])
    base = net()
    base.idle = nn.Linear(8, 8)
    with pytest.raises(ConfigError, match="idle: its weight gets no gradient"):
        get_peft_model(base, config("lora_ga", target_modules=["idle"]), calibration=BATCHES)
    with pytest.raises(TargetError, match="2r = 14 directions, and it has 12"):
        get_peft_model(net(), config("lora_ga", r=7), calibration=BATCHES)


# ---- all of them


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_a_calibration_leaves_the_model_as_it_was(start: str) -> None:
    base = net()
    base.train()
    base.block.eval()
    base.down.weight.requires_grad_(False)
    base.conv.weight.grad = torch.ones_like(base.conv.weight)
    before = weights(base)
    modes = [module.training for module in base.modules()]
    hooks = [len(m._forward_pre_hooks) for m in base.modules()]
    failing = [*BATCHES[:1], {"ids": torch.tensor([[99]])}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IndexError):
            get_peft_model(
                base, config(start, eva_config=None if start != "eva" else {"tau": 1.0}), calibration=failing
            )
        get_peft_model(base, config(start), calibration=BATCHES).unload()
    assert [module.training for module in base.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in base.modules()] == hooks
    assert not base.down.weight.requires_grad and base.block.q.weight.requires_grad
    assert torch.equal(base.conv.weight.grad, torch.ones_like(base.conv.weight)) and base.block.q.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in weights(base).items())


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_one_pass_over_the_batches(start: str) -> None:
    batches = Counted(BATCHES)
    calls = []
    base = net()
    base.register_forward_hook(lambda *_: calls.append(1))
    get_peft_model(base, config(start), calibration=batches)
    assert batches.asked == len(calls) == len(BATCHES)
    # An iterator that can be read once is enough.
    get_peft_model(net(), config(start), calibration=iter(BATCHES))


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_layers_that_some_batches_do_not_reach(start: str) -> None:
    class Gated(nn.Module):
        """Reads one layer or two, as the batch says."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            return self.a(x) + self.b(x) if both else self.a(x)

    x = torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0))
    fields = {"r": 2, "target_modules": ["a", "b"]}
    mixed = [{"x": x[i], "both": i < 2} for i in range(4)]
    alone = [{"x": x[i], "both": True} for i in range(2)]
    eva = {"eva_config": {"tau": 1.0, "rho": 1.0}} if start == "eva" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gated = get_peft_model(Gated(), LoraConfig(init_lora_weights=start, **fields, **eva), calibration=mixed)
        plain = get_peft_model(Gated(), LoraConfig(init_lora_weights=start, **fields, **eva), calibration=alone)
        if start == "eva":  # B saw the first two batches only, A all of them
            torch.testing.assert_close(lora(gated, "b").a, lora(plain, "b").a, **CLOSE)
            assert not torch.allclose(lora(gated, "a").a, lora(plain, "a").a, **CLOSE)
        never = [{"x": x[0], "both": False}]
        with pytest.raises(ConfigError, match="b: no calibration batch reached this layer"):
            get_peft_model(Gated(), LoraConfig(init_lora_weights=start, **fields, **eva), calibration=never)


def test_settings_are_objects_or_mappings() -> None:
    for given in (EvaConfig(rho=3.0), {"rho": 3.0}):
        found = LoraConfig(init_lora_weights="eva", eva_config=given)
        assert found.eva_config == EvaConfig(rho=3.0) and hash(found) == hash(found.resolve())
        assert LoraConfig.from_dict(found.to_dict()) == found
    for fields in ({"rho": 0.5}, {"tau": 1.5}, {"unknown": 1}, {"rho": "2"}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            EvaConfig(**fields)


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_a_weight_that_is_stored_the_other_way_round(start: str) -> None:
    """transformers' `Conv1D` holds (in, out): its start is that of the linear layer that computes the same."""
    from transformers.pytorch_utils import Conv1D

    plain, turned = net(torch.float64), net(torch.float64)
    stored = Conv1D(16, 12).double()
    stored.weight.data.copy_(plain.block.up.weight.t())
    stored.bias.data.copy_(plain.block.up.bias)
    turned.block.up = stored  # type: ignore[assignment]
    models = [adapted(start, base, target_modules=["block.up"]) for base in (plain, turned)]
    one, other = (lora(model, "block.up").factors() for model in models)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine.abs(), theirs.abs(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_what_several_layers_read_is_looked_at_once(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has settled is not looked at again, while another layer's input has not."""
    kind = Pca if start == "eva" else Covariance
    seen: list[int] = []
    update = kind.update

    def counted(self: Any, x: Tensor) -> None:
        seen.append(id(self))
        update(self, x)

    monkeypatch.setattr(kind, "update", counted)

    class Two(nn.Module):
        """Queries and keys of one input, and a layer with an input of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.own = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.own(y)

    random = torch.randn(6, 20, 6, generator=torch.Generator().manual_seed(0))
    calm = random[0] * torch.tensor([9.0, 5.0, 1e-2, 1e-2, 1e-2, 1e-2])
    batches = [{"x": calm, "y": y} for y in random[1:]]
    eva = {"eva_config": {"tau": 0.9999, "rho": 1.0}} if start == "eva" else {}
    config = LoraConfig(r=2, target_modules=["q", "k", "own"], init_lora_weights=start, **eva)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(Two(), config, calibration=batches)
    calls = sorted(seen.count(one) for one in set(seen))
    assert calls == ([2, 5] if start == "eva" else [5, 5])
    assert torch.equal(lora(model, "q").a, lora(model, "k").a) == (start == "eva")
