"""Single parameters and fused experts: the factored weight computes what the dense one would, without being formed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_by_hand import gap
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssForCausalLM

from peft_core import get_peft_model
from peft_core.errors import ConfigError, TargetError
from peft_lora import LoraConfig
from peft_lora.factored import Factored
from peft_lora.parameters import LoraParameter

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS: dict[str, Callable[[str], nn.Module]] = {
    "mixtral": lambda how: MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4, experts_implementation=how)
    ),
    "qwen3_moe": lambda how: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            intermediate_size=48,
            moe_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
            experts_implementation=how,
        )
    ),
    "gpt_oss": lambda how: GptOssForCausalLM(
        GptOssConfig(**SIZES, intermediate_size=48, num_local_experts=4, experts_implementation=how)
    ),
}
IDS = torch.arange(20).view(2, 10)


def adapted(name: str, how: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS[name](how).to(dtype)
    assert model.config._experts_implementation == how  # type: ignore[union-attr]
    config = LoraConfig(**{"r": 3, "target_parameters": ["gate_up_proj", "down_proj"], **fields})
    get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@contextlib.contextmanager
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same forward with W + ΔW formed first."""
    with monkeypatch.context() as patch:
        patch.setattr(LoraParameter, "effective", LoraParameter.merge)
        yield


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_factored_equals_dense(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name, how)
    factored = model(IDS).logits
    factored.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with dense(monkeypatch):
        reference = model(IDS).logits
        reference.square().sum().backward()
    with model.disable_adapter():
        assert gap(model(IDS).logits, reference) > 1e-2
    assert gap(factored, reference) < 1e-5  # float32, some dozen terms in another order
    assert len(gradients) == 8
    for n, p in model.named_parameters():
        if n in gradients:
            assert gap(gradients[n], p.grad) < 1e-4  # sums over all tokens
    model.merge_adapter()
    assert gap(model(IDS).logits, reference) < 1e-5


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_bfloat16(how: str) -> None:
    """One block of experts at a given routing: half precision computes what single precision does, but for rounding."""
    experts = adapted("mixtral", how, torch.bfloat16).model.layers[0].mlp.experts
    hidden = torch.randn(12, 32, dtype=torch.bfloat16, requires_grad=True)
    routes = torch.randint(0, 4, (12, 2), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(12, 2, dtype=torch.bfloat16)
    out = experts(hidden, routes, weights)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    parameters = [p for p in experts.parameters() if p.requires_grad]
    assert len(parameters) == 4
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    exact = experts.to(torch.float32)(hidden.float(), routes, weights.float())
    assert gap(out, exact) < 12 * 2**-9  # two products in a row, each some roundings of 2⁻⁹


def test_one_adapter_per_row() -> None:
    """Experts see the tokens of all rows in one list, row by row, so each token gets its row's adapter."""
    model = adapted("mixtral", "grouped_mm")
    model.add_adapter("other", LoraConfig(r=2, target_parameters=["down_proj"], init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        first = model(IDS).logits[0]
        model.set_adapter("other")
        second = model(IDS).logits[1]
        mixed = model(IDS, adapter_names=["default", "other"]).logits
    assert gap(mixed, torch.stack([first, second])) < 1e-5  # float32


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_one_compiled_graph(how: str) -> None:
    """Compiled as the base is, without a break. (The eager experts loop over data: no graph holds them.)"""
    model = adapted("mixtral", how)
    expected = model(IDS).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert gap(compiled(IDS).logits, expected) < 1e-5  # the sum is formed there: other roundings


class Makes(TorchDispatchMode):
    """Remembers the largest tensor that an operation makes (views apart)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_no_tensor_of_the_weights_size_is_made(how: str) -> None:
    model = adapted("mixtral", how)
    experts = model.model.layers[0].mlp.experts
    with Makes() as seen, torch.no_grad():
        model(IDS)
    assert seen.largest < experts.base_layer.down_proj.numel()


def test_forward_and_gradients_of_each_operation() -> None:
    """Everything experts are known to do with a weight, and things they are not."""
    torch.manual_seed(0)
    weight, up, down = torch.randn(3, 16, 8), torch.randn(3, 16, 2), torch.randn(3, 2, 8)
    factored, whole = Factored(weight, up, down, 0.5), weight + 0.5 * up @ down
    nested = Factored(factored, up, down, 0.25)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x8, x16, ids = torch.randn(5, 8), torch.randn(5, 16), torch.tensor([2, 0, 0, 1, 2])

    def uses(w: Any) -> list[Any]:
        return [
            F.linear(x8, w[1]),
            F.linear(x8, w[torch.tensor(2)], torch.ones(16)),
            F.linear(x8.view(1, 5, 8), w[0]),
            x16 @ w[0],
            w[0] @ x8.t(),
            torch.matmul(x16, w[1]),
            torch.mm(x16, w[1]),
            x16[:2] @ w,
            torch.bmm(w[ids], x8.unsqueeze(-1)),
            torch.bmm(x16.unsqueeze(1), w[ids]),
            torch.bmm(w.transpose(1, 2)[ids], x16.unsqueeze(-1)),
            x8 @ w[0].t(),
            x8 @ w[1].T,
            F.grouped_mm(x16, w, offs=offsets),
            F.grouped_mm(x8, w.transpose(-2, -1), offs=offsets),
            # From here on the sum is formed.
            w.transpose(0, 1).contiguous(),
            w[0, 1],
            w[1:],
            w.mean(),
            torch.einsum("eoi,ti->teo", w, x8),
            torch.stack([w, w]),
            torch.cat([w, weight]),
            w[0].chunk(2, 0)[1],
        ]

    for mine, theirs in zip(uses(factored), uses(whole), strict=True):
        assert gap(mine, theirs) < 1e-5  # float32
    for mine, theirs in zip(uses(nested), uses(whole + 0.25 * up @ down), strict=True):
        assert gap(mine, theirs) < 1e-5
    assert (factored.shape, factored.dim(), len(factored)) == (whole.shape, 3, 3)
    assert factored.dtype == torch.float32
    assert factored.requires_grad is False


def test_a_router_and_a_linear_layers_weight() -> None:
    """2-D parameters of any module, one that stores its weight transposed included."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    for module in (nn.Linear(6, 8), Conv1D(8, 6)):
        model = get_peft_model(nn.ModuleDict({"layer": module}), LoraConfig(r=2, target_parameters=["layer.weight"]))
        site = model["layer"]
        ((part, adapter),) = site.of("default").items()
        assert part == "weight"
        nn.init.normal_(adapter.lora_B)
        x = torch.randn(3, 6)
        delta = adapter.lora_B @ adapter.lora_A  # alpha / r is 4
        assert delta.shape == module.weight.shape
        stored = module.weight + 4 * delta
        expected = F.linear(x, stored if isinstance(module, nn.Linear) else stored.t(), module.bias)
        assert gap(site(x), expected) < 1e-5
        model.merge_adapter()
        torch.testing.assert_close(module.weight, stored.detach(), rtol=1e-6, atol=1e-6)
    router = adapted("mixtral", "eager", target_parameters=["gate.weight"])
    factored = router(IDS).logits
    router.merge_adapter()
    assert gap(router(IDS).logits, factored) < 1e-5


def test_patterns_name_parameters() -> None:
    model = adapted("mixtral", "eager", rank_pattern={"experts.down_proj": 5}, alpha_pattern={"gate_up_proj": 3})
    adapters = model.model.layers[1].mlp.experts.of("default")
    assert adapters["down_proj"].lora_A.shape == (5 * 4, 48)
    assert adapters["gate_up_proj"].lora_A.shape == (3 * 4, 32)
    assert adapters["gate_up_proj"].scaling == 1.0
    assert adapters["down_proj"].scaling == 8 / 5


@pytest.mark.parametrize("field", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_a_parameter_cannot_have(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        LoraConfig(target_parameters=["x"], **field)


def test_problems_of_the_selection() -> None:
    model = MODELS["mixtral"]("eager")
    with pytest.raises(TargetError, match="'nope'.* matches no parameter"):
        get_peft_model(model, LoraConfig(target_parameters=["down_proj", "nope"]))
    with pytest.raises(TargetError, match=r"q_proj: target_modules adapts the module as a whole"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=["q_proj.weight"]))
    with pytest.raises(TargetError, match="not a stack of matrices"):
        get_peft_model(model, LoraConfig(target_parameters=["norm.weight"]))
    with pytest.raises(ConfigError, match="list"):
        LoraConfig(target_parameters="down_proj")
