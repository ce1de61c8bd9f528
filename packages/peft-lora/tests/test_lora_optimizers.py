"""LoRA+ and LoRA-FA: the papers' steps written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_core import PeftError, get_peft_model
from peft_lora import LoraConfig, create_lorafa_optimizer, create_loraplus_optimizer

IDS = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.lower = nn.Linear(6, 5)
        self.upper = nn.Linear(5, 4)

    def forward(self, ids):
        return self.upper(torch.tanh(self.lower(self.embedding(ids))))


def adapted(targets=("embedding", "lower", "upper"), **options):
    torch.manual_seed(0)
    model = Net().double()
    return get_peft_model(
        model, LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **options)
    )


def test_loraplus_groups():
    model = adapted(lora_bias=True, targets=("lower", "upper"))
    model.add_adapter("table", LoraConfig(r=2, target_modules=["embedding"]))
    model.set_adapter(["default", "table"])
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=16, loraplus_weight_decay=0.5, betas=(0.8, 0.9)
    )
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (group["lr"], group["weight_decay"], sorted(names[id(p)].rpartition(".")[2] for p in group["params"]))
        for group in optimizer.param_groups
    ]
    assert found == [
        (0.1, 0.5, ["lora_A", "lora_A"]),
        (1e-6, 0.5, ["lora_embedding_A", "lora_embedding_B"]),
        (1.6, 0.5, ["lora_B", "lora_B"]),
        (1.6, 0.0, ["lora_bias", "lora_bias"]),
    ]
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    with pytest.raises(PeftError, match="ratio is positive"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=0)


def test_lorafa_takes_the_step_nearest_to_the_full_gradients():
    """G (A Aᵀ)⁻¹ / s² minimises ‖s (ΔB) A - G_W‖ where G = s G_W Aᵀ; A stays, and Adam does the rest."""
    model = adapted(targets=("lower", "upper"), rank_pattern={"upper": 4})
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=0.05, weight_decay=0.1)
    site = model.upper.of("default")[""]
    a, s = site.lora_A.detach().clone(), site.scaling
    assert not site.lora_A.requires_grad and s == 3 / 4
    b = site.lora_B.detach().clone()
    mean = variance = torch.zeros_like(b)
    seen: list[torch.Tensor] = []
    model.upper.base_layer.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    for step in range(1, 4):
        seen.clear()
        out = model(IDS)
        (gradient_out,) = torch.autograd.grad(out.square().sum(), out, retain_graph=True)
        out.square().sum().backward()
        gradient_w = gradient_out.flatten(0, 1).t() @ seen[0].reshape(-1, 5)  # that of the whole weight
        nearest = torch.linalg.lstsq(s * a.t(), gradient_w.t()).solution.t()
        mean = 0.9 * mean + 0.1 * nearest
        variance = 0.999 * variance + 0.001 * nearest.square()
        corrected = 0.05 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        b = b - corrected * mean / (variance.sqrt() + 1e-6)
        b = b * (1 - 0.05 * 0.1)
        optimizer.step()
        optimizer.zero_grad()
        # The regulariser of the inverse is 1e-8 of a Gram matrix of order 1.
        torch.testing.assert_close(site.lora_B.detach(), b, rtol=0, atol=1e-6)
    assert torch.equal(site.lora_A, a)


def test_lorafa_state_is_saved_and_other_tensors_train():
    model = adapted(targets=("lower",), modules_to_save=["upper"])
    optimizer = create_lorafa_optimizer(model, lr=0.01)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        model(IDS).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    again = create_lorafa_optimizer(model, lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert [state["step"] for state in again.state.values()] == [2, 2, 2]
    with pytest.raises(PeftError, match="no LoRA of a linear layer trains"):
        create_lorafa_optimizer(adapted(targets=("embedding",)), lr=0.1)
