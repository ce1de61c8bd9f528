"""The example methods against the formulas of their papers, written naively, and against HF PEFT where it has them.

Comparisons are in float64, where orders of summation differ by about 1e-15 of values of the order of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from examples.methods import bitfit, bottleneck, ia3, ln_tuning, poly
from peft_core import (
    ConfigError,
    MergeError,
    PeftModel,
    RequestError,
    TargetError,
    get_peft_model,
    register_method,
    unregister_method,
)
from tests.tiny_transformers import batch, make, randomise, scores

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    methods = [register_method(module, replace=True) for module in (bitfit, bottleneck, ia3, ln_tuning, poly)]
    yield
    for method in methods:
        unregister_method(method.name)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(self.norm(x))))
        return out


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def adapted(config: Any) -> tuple[Any, Net]:
    """An adapted model with values that matter, and the base it was made of."""
    return randomise(get_peft_model(net(), config).eval()), net()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def one(model: Any, path: str) -> Any:
    (adapter,) = model.get_submodule(path).of("default").values()
    return adapter


# -- formulas ----------------------------------------------------------------------------------------------------


def test_ia3() -> None:
    model, base = adapted(ia3.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]))
    out, inner = one(model, "first").ia3_l.flatten(), one(model, "second").ia3_l.flatten()
    x = draw(3, 8)
    first = out * (base.first.weight @ base.norm(x).T + base.first.bias[:, None]).T
    expected = (base.second.weight @ (inner * torch.tanh(first)).T).T
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_ia3_finds_the_feed_forward_layers_and_refuses_others() -> None:
    model = get_peft_model(make("llama"), ia3.IA3Config())
    assert model.peft_config["default"].feedforward_modules == ("down_proj",)
    shapes = {name.rpartition(".")[2]: tuple(layer.of("default")[""].ia3_l.shape) for name, layer in _sites(model)}
    assert shapes == {"k_proj": (8, 1), "v_proj": (8, 1), "down_proj": (1, 24)}
    with pytest.raises(ConfigError, match="name them in target_modules"):
        ia3.IA3Config(target_modules=["q_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(TargetError, match="not known"):
        get_peft_model(net(), ia3.IA3Config(target_modules=["first"]))


def _sites(model: Any) -> list[tuple[str, Any]]:
    return list(model._peft.sites.items())


def test_bottleneck() -> None:
    model, base = adapted(bottleneck.BottleneckConfig(target_modules=["first"], r=3, activation="relu"))
    adapter, x = one(model, "first"), draw(3, 8)
    h = base.first(base.norm(x))
    inner = (h @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    h = h + inner @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(model(x), base.second(torch.tanh(h)), **EXACT)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_bottlenecks_stand_behind_attention_and_feed_forward(kind: str) -> None:
    model = get_peft_model(make(kind), bottleneck.BottleneckConfig(r=4))
    ends = {path.rpartition(".")[2] for path, _ in _sites(model)}
    expected = {"llama": {"o_proj", "down_proj"}, "gpt2": {"c_proj"}, "t5": {"o", "wo"}, "bert": {"dense"}}
    blocks = 2 if kind != "t5" else 4
    extra = 2 if kind == "t5" else 0  # attention to the encoder
    assert ends == expected[kind] and len(_sites(model)) == 2 * blocks + extra


def test_ln_tuning() -> None:
    model, base = adapted(ln_tuning.LnTuningConfig())
    own = one(model, "norm").ln_tuning_layers
    x = draw(3, 8)
    normalised = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + base.norm.eps).sqrt()
    expected = base.second(torch.tanh(base.first(normalised * own["weight"] + own["bias"])))
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert [path for path, _ in _sites(model)] == ["norm"]


def test_ln_tuning_of_a_llama_trains_the_norms() -> None:
    model = get_peft_model(make("llama"), ln_tuning.LnTuningConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 5 * 16  # two in each of two blocks, and the last


def test_bitfit() -> None:
    model, base = adapted(bitfit.BitFitConfig())
    x = draw(3, 8)
    expected = base.norm(x) + one(model, "norm").bias
    expected = base.second(torch.tanh(expected @ base.first.weight.T + base.first.bias + one(model, "first").bias))
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert [path for path, _ in _sites(model)] == ["norm", "first"]  # the other has none


def test_bitfit_trains_all_biases_of_a_bert() -> None:
    model = get_peft_model(make("bert"), bitfit.BitFitConfig())
    biases = {name: p for name, p in model.base_state_dict().items() if name.endswith("bias")}
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in biases.values())


def mixed_row(adapter: Any, task: int, x: Tensor, shares: Tensor | None = None) -> Tensor:
    """What Poly adds for one row, skill by skill and split by split."""
    splits, skills, _, rank = adapter.poly_lora_A.shape
    if shares is None:
        shares = torch.sigmoid(adapter.poly_router.module_logits[task].view(splits, skills))
        shares = shares / shares.sum(-1, keepdim=True)
    parts = x.chunk(splits)
    hidden = sum(shares[q, s] * (parts[q] @ adapter.poly_lora_A[q, s]) for q in range(splits) for s in range(skills))
    out = [sum(shares[q, s] * (hidden @ adapter.poly_lora_B[q, s]) for s in range(skills)) for q in range(splits)]
    return torch.cat(out) / rank


@pytest.mark.parametrize("splits", [1, 4])
def test_poly(splits: int) -> None:
    model, base = adapted(poly.PolyConfig(target_modules=["first"], r=2, n_tasks=3, n_skills=5, n_splits=splits))
    tasks, x = [2, 0, 1, 2], draw(4, 8)
    inner = base.norm(x)
    rows = [mixed_row(one(model, "first"), task, row) for task, row in zip(tasks, inner, strict=True)]
    expected = base.second(torch.tanh(base.first(inner) + torch.stack(rows)))
    torch.testing.assert_close(model(x, task_ids=torch.tensor(tasks)), expected, **EXACT)
    torch.testing.assert_close(model(x.view(4, 1, 8), task_ids=tasks)[:, 0], expected, **EXACT)
    torch.testing.assert_close(model(x[:2], task_ids=1), model(x[:2], task_ids=[1, 1]), rtol=0, atol=0)


def test_poly_samples_in_training() -> None:
    model, base = adapted(poly.PolyConfig(target_modules=["first"], r=2, n_tasks=3, n_skills=5))
    adapter, x = one(model, "first"), draw(2, 8)
    model.train()
    torch.manual_seed(3)
    out = model(x, task_ids=[2, 1])
    torch.manual_seed(3)
    logits = adapter.poly_router.module_logits[[2, 1]].view(2, 1, 5)
    noise = torch.distributions.utils.clamp_probs(torch.rand_like(logits))
    chosen = torch.sigmoid(logits + noise.log() - (-noise).log1p())  # a temperature of one
    shares = chosen / chosen.sum(-1, keepdim=True)
    inner = base.norm(x)
    rows = [mixed_row(adapter, 0, row, share) for row, share in zip(inner, shares, strict=True)]
    torch.testing.assert_close(out, base.second(torch.tanh(base.first(inner) + torch.stack(rows))), **EXACT)
    out.sum().backward()
    gradient = adapter.poly_router.module_logits.grad
    assert gradient is not None and gradient[1:].any() and not gradient[0].any()  # no row had the first task


def test_poly_merges_for_one_task() -> None:
    model, _ = adapted(poly.PolyConfig(target_modules=["first", "second"], r=2, n_tasks=3, n_skills=5, n_splits=2))
    x = draw(3, 8)
    expected = model(x, task_ids=1)
    before = {name: tensor.clone() for name, tensor in model.base_state_dict().items()}
    with pytest.raises(MergeError, match="say which, as task_ids"):
        model.merge_adapter()
    with pytest.raises(RequestError, match="tusk_ids"):
        model.merge_adapter(tusk_ids=1)
    model.merge_adapter(task_ids=1)
    torch.testing.assert_close(model(x), expected, **EXACT)
    torch.testing.assert_close(model(x, task_ids=[1, 1, 1]), expected, **EXACT)
    with pytest.raises(RequestError, match="merged for"):
        model(x, task_ids=[1, 2, 1])
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_state_dict().items())
    torch.testing.assert_close(model.merge_and_unload(task_ids=1)(x), expected, **EXACT)


def test_poly_refuses_calls_that_do_not_fit() -> None:
    model, _ = adapted(poly.PolyConfig(target_modules=["first"], r=2, n_tasks=3, n_skills=5))
    x = draw(4, 8)
    with pytest.raises(RequestError, match="needs task_ids"):
        model(x)
    with pytest.raises(RequestError, match="3 entries"):
        model(x, task_ids=[0, 1, 2])
    for task in (3, -1):
        with pytest.raises(IndexError) as caught:
            model(x, task_ids=task)
        assert "first" in caught.value.__notes__[0]
    with pytest.raises(TargetError, match="n_splits=5 must divide"):
        get_peft_model(net(), poly.PolyConfig(target_modules=["first"], n_splits=5))


def test_poly_beside_other_adapters_in_one_batch() -> None:
    model, base = adapted(poly.PolyConfig(target_modules=["first"], r=2, n_tasks=3, n_skills=5))
    model.add_adapter("other", ia3.IA3Config(target_modules=["first"], feedforward_modules=[]))
    randomise(model, "other").eval()
    tasks, x = [2, 0, 1, 2], draw(4, 8)
    expected = model(x, task_ids=tasks)
    model.set_adapter("other")
    other = model(x)
    mixed = model(x, task_ids=tasks, adapter_names=["default", "other", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([expected[0], other[1], base(x)[2], expected[3]]), **EXACT)


@pytest.mark.parametrize("beams", [1, 3])
def test_poly_generates_for_a_task_in_each_row(beams: int) -> None:
    model = get_peft_model(make("llama"), poly.PolyConfig(r=2, n_tasks=2, n_skills=3)).eval()
    randomise(model, std=1.0)
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "min_new_tokens": 4}
    given = {name: value[:1].repeat(2, 1) for name, value in batch("llama").items()}
    both = model.generate(**given, task_ids=torch.tensor([0, 1]), **options)
    alone = [model.generate(**given, task_ids=[task], **options)[0] for task in (0, 1)]
    assert both.tolist() == [row.tolist() for row in alone]
    assert both[0].tolist() != both[1].tolist()


# -- HF PEFT -----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ia3": (
        peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
        ia3.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
        {},
    ),
    "ln_tuning": (peft.LNTuningConfig(target_modules=["norm"]), ln_tuning.LnTuningConfig(target_modules=["norm"]), {}),
    "poly": (
        peft.PolyConfig(target_modules=["first", "second"], r=2, n_tasks=3, n_skills=5, n_splits=2),
        poly.PolyConfig(target_modules=["first", "second"], r=2, n_tasks=3, n_skills=5, n_splits=2),
        {"task_ids": torch.tensor([2, 0, 1, 2])},
    ),
}
every_method = pytest.mark.parametrize("name", CASES)
# Said of every LayerNorm that it adapts.
warned = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


class Hidden(nn.Module):
    """HF PEFT passes the request's arguments on to the model; this one takes and drops them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def theirs(config: Any) -> Any:
    model = peft.get_peft_model(Hidden(net()), config).double().eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


@warned
@every_method
def test_a_file_of_hf_peft_computes_the_same_here(name: str, tmp_path: Path) -> None:
    config, _, arguments = CASES[name]
    hf = theirs(config)
    hf.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(Hidden(net()), tmp_path).eval()
    x = draw(4, 3, 8)  # their Poly takes three axes only
    expected = hf.base_model(x, **arguments)
    assert (expected - net()(x)).abs().max() > 0.1
    torch.testing.assert_close(ours(x, **arguments), expected, **EXACT)
    state, mine = get_peft_model_state_dict(hf), ours.get_adapter_state_dict()
    assert {key: tensor.tolist() for key, tensor in mine.items()} == {k: t.tolist() for k, t in state.items()}


@warned
@every_method
def test_a_file_of_ours_computes_the_same_there(name: str, tmp_path: Path) -> None:
    _, config, arguments = CASES[name]
    ours = randomise(get_peft_model(Hidden(net()), config).eval())
    ours.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(Hidden(net()), tmp_path).double().eval()
    # Their load takes float32 tensors; the values in ours are of float64.
    peft.set_peft_model_state_dict(hf, {k: t.double() for k, t in ours.get_adapter_state_dict().items()})
    x = draw(4, 3, 8)  # their Poly takes three axes only
    torch.testing.assert_close(hf.base_model(x, **arguments), ours(x, **arguments), **EXACT)


# transformers renamed what HF PEFT looks at.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_ia3_of_a_llama_is_that_of_hf_peft(tmp_path: Path) -> None:
    """Default targets of both; float32, the same products in the same order."""
    hf = peft.get_peft_model(make("llama"), peft.IA3Config(task_type="CAUSAL_LM")).eval()
    for parameter in hf.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    hf.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    given = batch("llama")
    torch.testing.assert_close(scores(ours, given), hf(**given).logits, rtol=0, atol=1e-5)
    assert ours.peft_config["default"].target_modules is not None
    fresh = get_peft_model(make("llama"), ia3.IA3Config())
    assert fresh.get_adapter_state_dict().keys() == get_peft_model_state_dict(hf).keys()
