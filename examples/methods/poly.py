"""Poly, Ponti et al. 2022, https://arxiv.org/abs/2202.13914: tasks share skills, a router tells which.

    y = W x + Σ_s α_ts B_s A_s x / r        α_t = z_t / Σ_s z_ts

A skill s is a low-rank adapter. z_ts is sampled from a relaxed Bernoulli distribution with logits of the task t while
training, and their sigmoid otherwise. `n_splits` slices of the input and of the output may choose skills of their own
(Caccia et al. 2022, https://arxiv.org/abs/2211.03831).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli
from torch.nn import functional as F

from peft_core import Adapter, BaseLayer, LinearLayer, Link, MergeError, TargetedConfig, as_compute, hookimpl


class PolyConfig(TargetedConfig):
    """With more than one task, calls say `task_ids`: a number for each row of the batch."""

    peft_type: ClassVar[str] = "POLY"
    # Fields that the class of HF PEFT lacks.
    written_if_set: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})
    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)

    r: int = Field(8, ge=1)
    n_tasks: int = Field(1, ge=1)
    n_skills: int = Field(4, ge=1)
    n_splits: int = Field(1, ge=1)
    poly_type: Literal["poly"] = "poly"
    init_weights: bool = True


class Router(nn.Module):
    """Shares of the skills for each task."""

    def __init__(self, layer: LinearLayer, config: PolyConfig) -> None:
        super().__init__()
        self.sizes = (config.n_splits, config.n_skills)
        self.module_logits = layer.parameter(config.n_tasks, config.n_splits * config.n_skills)

    def forward(self, tasks: Tensor, sample: bool) -> Tensor:
        logits = F.embedding(tasks, self.module_logits).unflatten(-1, self.sizes)
        chosen = RelaxedBernoulli(logits.new_tensor(1.0), logits=logits).rsample() if sample else logits.sigmoid()
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-12)


class PolyAdapter(Adapter):
    """The skills of one layer: A (splits, skills, in / splits, r) and B (splits, skills, r, out / splits)."""

    def __init__(self, layer: LinearLayer, config: PolyConfig) -> None:
        super().__init__(layer)
        self.config, self.sizes = config, (layer.in_features, layer.out_features)
        splits, self.starts_as_base = config.n_splits, config.init_weights
        if any(size % splits for size in self.sizes):
            raise layer.refuse(f"n_splits={splits} must divide its sizes {self.sizes}")
        self.poly_router = Router(layer, config)
        self.poly_lora_A = layer.parameter(splits, config.n_skills, self.sizes[0] // splits, config.r)
        self.poly_lora_B = layer.parameter(splits, config.n_skills, config.r, self.sizes[1] // splits)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.poly_router.module_logits, -1e-3, 1e-3)
        bound = self.poly_lora_A.shape[2] ** -0.5
        nn.init.uniform_(self.poly_lora_A, -bound, bound)
        nn.init.uniform_(self.poly_lora_B, -bound, bound)
        self.poly_lora_B.mul_(not self.starts_as_base)

    def factors(self, tasks: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
        """What the skills of each task come to: (tasks, in, r) and (tasks, r, out)."""
        shares = self.poly_router(tasks, sample)
        down = torch.einsum("tqs,qsir->tqir", shares, self.poly_lora_A).flatten(1, 2)
        up = torch.einsum("tqs,qsro->trqo", shares, self.poly_lora_B).flatten(2, 3)
        return down, up / self.config.r

    def forward(self, base: Link, x: Tensor) -> Any:
        several = self.config.n_tasks > 1
        tasks = base.call.rows("task_ids", len(x)) if several else torch.zeros(1, dtype=torch.long)
        down, up = self.factors(tasks.to(x.device), sample=self.training)
        flat = x.reshape(len(tasks), -1, self.sizes[0])
        return base(x) + (flat @ as_compute(down, x) @ as_compute(up, x)).view(*x.shape[:-1], self.sizes[1])

    def merge(self, params: dict[str, Tensor], task: Any = None) -> dict[str, Tensor]:
        if task is None and self.config.n_tasks > 1:
            raise MergeError(f"{self.layer.path}: the weights of one task can be merged; say which, as task_ids=...")
        down, up = self.factors(torch.as_tensor(task or 0, device=self.layer.device).view(1), sample=False)
        return {**params, "weight": params["weight"] + (down[0] @ up[0]).t()}


@hookimpl
def peft_config() -> type[PolyConfig]:
    return PolyConfig


@hookimpl
def peft_merge(adapter: PolyAdapter, params: dict[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    return adapter.merge(params, arguments.get("task_ids"))


@hookimpl
def peft_build(config: PolyConfig, layer: BaseLayer) -> PolyAdapter:
    if not isinstance(layer, LinearLayer):
        raise layer.refuse("Poly adapts linear layers")
    return PolyAdapter(layer, config)
