"""One adapter per row in one computation: what is kept between calls follows every change of what it was made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_core import get_peft_model, hotswap_adapter
from peft_core.memo import Memo
from peft_core.testing.setup import record
from peft_ia3 import IA3Config
from peft_lora import LoraConfig
from peft_orthogonal import BOFTConfig, OFTConfig

NAMES = ["a", "b", "__base__", "c", "a", "b"]
X = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FORMS: dict[str, Callable[[int], Any]] = {
    "lora": lambda r: LoraConfig(r=r, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False),
    "lora with bias": lambda r: LoraConfig(r=r, lora_bias=True, target_modules=["0", "2"], init_lora_weights=False),
    "pissa": lambda r: LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights="pissa"),
    "dora": lambda r: LoraConfig(r=r, use_dora=True, target_modules=["0", "2"], init_lora_weights=False),
    "ia3": lambda r: IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False),
    "oft": lambda r: OFTConfig(oft_block_size=4, target_modules=["0", "2"], init_weights=False),
    "boft": lambda r: BOFTConfig(boft_block_size=4, target_modules=["0", "2"], init_weights=False),
}
forms = pytest.mark.parametrize("form", FORMS)


def adapted(form: str) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    for r, name in enumerate("abc", 1):
        config = FORMS[form](r)
        model.add_adapter(name, config) if r > 1 else get_peft_model(model, config, name)
        stir(model, name)
    return model.eval()


def stir(model: Any, name: str) -> None:
    with torch.no_grad():
        for adapter in model.get_adapters(name).values():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)


def alone(model: Any) -> torch.Tensor:
    """Each row by a call of its own."""
    twin = copy.deepcopy(model)  # what is kept is not copied
    rows = []
    for name, row in zip(NAMES, X, strict=True):
        twin.set_adapter([] if name == "__base__" else name)
        rows.append(twin(row[None]))
    return torch.cat(rows)


def check(model: Any) -> None:
    with torch.no_grad():
        # Batched products add in another order, in float64.
        torch.testing.assert_close(model(X, adapter_names=NAMES), alone(model), rtol=0, atol=1e-12)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@forms
def test_every_change_is_followed(form: str, tmp_path: Path) -> None:
    model = adapted(form)
    check(model)
    check(model)
    stir(model, "b")  # as an optimizer writes
    check(model)
    model.save_pretrained(tmp_path)
    stir(model, "b")
    check(model)
    model.load_adapter(tmp_path / "b", "b", replace=True)  # new memory in the tensors that are there
    check(model)
    stir(model, "b")
    check(model)
    hotswap_adapter(model, tmp_path / "b", "b")
    check(model)
    model.delete_adapter("b")
    model.add_adapter("b", FORMS[form](2))
    stir(model, "b")
    check(model.eval())
    model.float()
    model.double()  # values are rounded, and may lie where they did
    check(model)
    with torch.no_grad():
        model[0].base_layer.weight.mul_(1.5)
    check(model)


@forms
def test_nothing_is_made_again_while_nothing_changes(form: str) -> None:
    model = adapted(form)
    with torch.no_grad():
        with Operations() as first:
            model(X, adapter_names=NAMES)
        with Operations() as second:
            model(X, adapter_names=NAMES)
        with Operations() as third:
            model(X, adapter_names=NAMES)
    assert len(second.names) < len(first.names)
    assert second.names == third.names
    assert not any(name.startswith(("aten.stack", "aten.cat", "aten.index")) for name in second.names)


@forms
def test_gradients_are_those_of_each_row_alone(form: str) -> None:
    model = adapted(form)
    with torch.no_grad():
        model(X, adapter_names=NAMES)  # something is kept that must not be used
    twin = copy.deepcopy(model)
    for name in "abc":
        record(model, name).require_grad(True)
    model(X, adapter_names=NAMES).square().sum().backward()
    for name, row in zip(NAMES, X, strict=True):
        if name != "__base__":
            twin.set_adapter(name)
            twin(row[None]).square().sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)


@forms
def test_inference_mode_leaves_nothing_that_training_trips_over(form: str) -> None:
    model = adapted(form)
    with torch.inference_mode():
        model(X, adapter_names=NAMES)
    x = X.clone().requires_grad_(True)
    model.set_requires_grad(list("abc"), False)
    model(x, adapter_names=NAMES).sum().backward()
    assert x.grad is not None
    check(model)


def test_memory_of_what_was_deleted_is_given_back() -> None:
    import weakref

    model = adapted("lora")
    with torch.no_grad():
        model(X, adapter_names=NAMES)
    kept = weakref.ref(model[0].adapters.b.lora_A)
    model.delete_adapter("b")
    assert kept() is None


def test_a_memo_compares_memory_versions_and_key() -> None:
    memo, made, tensor = Memo(), [], torch.zeros(3)

    def make() -> int:
        made.append(tensor.sum())
        return len(made)

    assert [memo.of("k", 1, [tensor], make) for _ in range(2)] == [1, 1]
    tensor.add_(1)
    assert memo.of("k", 1, [tensor], make) == 2
    tensor.data = torch.ones(3)
    assert memo.of("k", 1, [tensor], make) == 3
    assert memo.of("k", 2, [tensor], make) == 4
    assert memo.of("other", 2, [tensor], make) == 5
    assert memo.of("k", 2, [tensor], make) == 4
    assert copy.deepcopy(memo).of("k", 2, [tensor], make) == 6
    tensor.requires_grad_(True)
    assert memo.of("k", 2, [tensor], make) == 7  # somebody may want its gradient
