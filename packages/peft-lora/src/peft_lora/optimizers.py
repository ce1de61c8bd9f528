"""Optimizers that know A from B.

LoRA+: Hayou et al. 2024, https://arxiv.org/abs/2402.12354: B learns faster than A, by a ratio.
LoRA-FA: Zhang et al. 2023, https://arxiv.org/abs/2308.03303: A stays as it is, and the step of B is the one that brings
the product nearest to the full gradient's, G (A Aᵀ)⁻¹ / s².
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import PeftError, PeftModel


def create_loraplus_optimizer(
    model: Any,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer of what trains in a model: B, biases and other vectors at `lr` times the ratio, the rest at `lr`.

    Factors of embeddings learn at `loraplus_lr_embedding`; vectors have no weight decay. `kwargs` are the optimizer's.
    """
    if loraplus_lr_ratio <= 0:
        raise PeftError(f"create_loraplus_optimizer: loraplus_lr_ratio is positive, not {loraplus_lr_ratio}")
    fast: list[nn.Parameter] = []
    slow: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    for name, parameter in _trained(model):
        if "lora_embedding" in name:
            embedding.append(parameter)
        elif parameter.dim() == 1:
            plain.append(parameter)
        else:
            (fast if "lora_B" in name else slow).append(parameter)
    groups = [
        {"params": slow, "lr": lr, "weight_decay": loraplus_weight_decay},
        {"params": embedding, "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        {"params": fast, "lr": lr * loraplus_lr_ratio, "weight_decay": loraplus_weight_decay},
        {"params": plain, "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    ]
    return optimizer_cls([group for group in groups if group["params"]], **{"lr": lr, **kwargs})


def create_lorafa_optimizer(
    model: Any,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFA:
    """LoRA-FA for the active adapters of a model; every A is frozen. What else trains gets plain steps of Adam.

    Rank and scaling are those of each layer, whatever its patterns: `r`, `lora_alpha` and `use_rslora` are accepted
    from callers that pass them. Raises `PeftError` where no B trains.
    """
    partners: list[tuple[nn.Parameter, nn.Parameter, float]] = []
    for adapter in _adapters(model):
        a, b = (adapter._parameters.get(name) for name in ("lora_A", "lora_B"))
        if a is not None and b is not None and b.requires_grad and a.dim() == 2:
            a.requires_grad_(False)
            partners.append((b, a, float(adapter.scaling)))  # type: ignore[arg-type]
    if not partners:
        raise PeftError("create_lorafa_optimizer: no LoRA of a linear layer trains in this model")
    known = {id(b) for b, _, _ in partners}
    rest = [parameter for _, parameter in _trained(model) if id(parameter) not in known]
    return LoraFA(partners, rest, lr=lr, weight_decay=weight_decay)


class LoraFA(torch.optim.Optimizer):
    """Adam with decoupled weight decay, on G (A Aᵀ)⁻¹ / s² for each B.

    `partners` are (B, A, s); `rest` are tensors that get plain steps.
    """

    def __init__(
        self,
        partners: Iterable[tuple[nn.Parameter, nn.Parameter, float]],
        rest: Iterable[nn.Parameter] = (),
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        found = list(partners)
        self._partners = {id(b): (a, scaling) for b, a, scaling in found}
        groups = [{"params": [b for b, _, _ in found]}, {"params": list(rest)}]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self._gradient(parameter), group)
        return loss

    def _gradient(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if id(parameter) not in self._partners:
            return gradient
        a, scaling = self._partners[id(parameter)]
        wide = a.to(torch.promote_types(a.dtype, torch.float32))
        gram = wide @ wide.t() + 1e-8 * torch.eye(len(wide), device=wide.device, dtype=wide.dtype)
        nearest: Tensor = (gradient.to(wide) @ torch.linalg.pinv(gram) / scaling**2).to(gradient.dtype)
        return nearest

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = group["lr"] * (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _adapters(model: Any) -> Iterator[nn.Module]:
    if not isinstance(model, PeftModel):
        raise PeftError("this model has no adapters; make one with get_peft_model(model, config)")
    for name in model.active_adapters:
        for adapter in model.get_adapters(name).values():
            yield from adapter.modules()


def _trained(model: Any) -> list[tuple[str, nn.Parameter]]:
    if not isinstance(model, nn.Module):
        raise PeftError(f"an optimizer is made for a torch.nn.Module, not for a {type(model).__name__}")
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
