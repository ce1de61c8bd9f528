"""AdaLoRA at one layer: ΔW = s B diag(E) A, on linear layers and (A read as a kernel) convolutions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_core.adapter import DeltaAdapter, as_compute, dropout
from peft_core.layers import ConvLayer, LinearLayer

from .allocation import Allocation
from .config import AdaLoraConfig

FACTORS = ("lora_A", "lora_B", "lora_E")
# Running averages per factor, by their names in files of unfinished trainings. HF PEFT passes over them.
AVERAGES = tuple(f"{kind}_{factor[-1]}" for kind in ("sensitivity", "uncertainty") for factor in FACTORS)


class AdaLora(DeltaAdapter):
    """`lora_A` (r, in · ∏ kernel), `lora_B` (out, r), `lora_E` (r, 1); and averages while ranks are being chosen."""

    may_be_empty = True  # a layer that lost all its ranks

    def __init__(
        self,
        layer: LinearLayer | ConvLayer,
        config: AdaLoraConfig,
        allocation: Allocation,
        rank: int,
        found: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__(layer)
        self.kernel = layer.kernel_size if isinstance(layer, ConvLayer) else ()
        columns = layer.in_features
        for size in self.kernel:
            columns *= size
        # HF PEFT's scaling: it divides by the rank at the beginning plus 1e-5, and goes on doing so after pruning.
        self.scaling = config.lora_alpha / (config.init_r + 1e-5)
        self.starts_as_base = config.init_lora_weights
        self.orthogonality = config.orth_reg_weight
        self.allocation = allocation
        self.pruned: Tensor | None = None  # which rows stay zero at the present step, once ranks stay
        self.lora_A = layer.parameter(rank, columns)
        self.lora_B = layer.parameter(layer.out_features, rank)
        self.lora_E = layer.parameter(rank, 1)
        self.dropout = dropout(config.lora_dropout)
        for name in AVERAGES:
            factor = self.get_parameter(f"lora_{name[-1]}")
            self.register_buffer(name, torch.empty_like(factor) if name in (found or ()) else None)

    def reset_parameters(self) -> None:
        deviation = 0.02 if self.starts_as_base else 1.0
        for name in FACTORS:
            nn.init.normal_(self.get_parameter(name), std=deviation)
        if self.starts_as_base:
            nn.init.zeros_(self.lora_E)

    # -- what it computes ----------------------------------------------------------------------------------------

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        if not self.lora_E.shape[0]:  # all pruned; convolutions do not take kernels of no channels
            return out
        x = x if self.dropout is None else self.dropout(x)
        down = as_compute(self.lora_A * self.lora_E, x)
        if isinstance(self.layer, ConvLayer):
            hidden = self.layer.convolve(x, down.view(-1, self.layer.in_features, *self.kernel))
            up = as_compute(self.lora_B * self.scaling, hidden)
            up = up.view(*up.shape, *(1,) * len(self.kernel))
            pointwise = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.kernel) - 1]
            return out + as_compute(pointwise(hidden, up), out)
        if x.dim() != 2:
            return self.accumulate(out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])).view(out.shape)
        hidden = as_compute(torch.mm(x, down.t()), out)
        return torch.addmm(out, hidden, as_compute(self.lora_B, out).t(), alpha=self.scaling)

    def delta(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, ConvLayer):
            return self.accumulate(x.new_zeros(()), x)
        return self.accumulate(x.new_zeros((*x.shape[:-1], self.lora_B.shape[0])), x)

    def weight_delta(self) -> Tensor:
        delta = (self.lora_B @ (self.lora_A * self.lora_E)) * self.scaling
        return delta.view(delta.shape[0], -1, *self.kernel)

    def losses(self) -> Mapping[str, Tensor]:
        """‖A Aᵀ - I‖ + ‖Bᵀ B - I‖ (Frobenius), averaged over the matrices of all layers; paper, equation 4.

        The paper squares the norms; HF PEFT, whose weights and defaults these are, does not.
        """
        self.allocation.expect_driving(self.layer.path, self.lora_E)
        if not self.orthogonality or not self.lora_A.requires_grad or not self.lora_A.numel():
            return {}
        unit = torch.eye(self.lora_A.shape[0], device=self.lora_A.device, dtype=self.lora_A.dtype)
        a = torch.linalg.matrix_norm(self.lora_A @ self.lora_A.t() - unit)
        b = torch.linalg.matrix_norm(self.lora_B.t() @ self.lora_B - unit)
        return {"orthogonality": (a + b) * (self.orthogonality / (2 * self.allocation.layers))}

    # -- what training does to it --------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take the present gradients into the running averages; paper, equations 8 to 10. None counts as zero."""
        for factor in FACTORS:
            parameter = self.get_parameter(factor)
            names = f"sensitivity_{factor[-1]}", f"uncertainty_{factor[-1]}"
            if self._buffers[names[0]] is None:
                for name in names:
                    self._buffers[name] = torch.zeros_like(parameter)
            mean, spread = (self.get_buffer(name) for name in names)
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs_()
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs_(), alpha=1 - beta2)

    @torch.no_grad()
    def importance(self) -> Tensor:
        """S (r,): sensitivity times uncertainty, E's own plus the mean over A's row and over B's column; equation 7."""
        a, b, e = (
            self.get_buffer(f"sensitivity_{end}") * self.get_buffer(f"uncertainty_{end}") for end in ("A", "B", "E")
        )
        return e[:, 0] + (a.mean(1) + b.mean(0))

    @torch.no_grad()
    def prune(self, mask: Tensor) -> None:
        """Zero the rows of E where `mask` (r,) is true; the rest of the row may bring them back."""
        self.lora_E.masked_fill_(mask[:, None], 0)

    def forget(self) -> None:
        """Drop the running averages: they are not saved any more."""
        for name in AVERAGES:
            self._buffers[name] = None

    def cut(self, optimizer: torch.optim.Optimizer | None = None) -> list[bool]:
        """Keep only the rows where E is not zero, in new parameters; returns which of all rows these are.

        `optimizer` goes on with the new ones, and with their part of its state.
        """
        keep = self.lora_E.detach()[:, 0] != 0
        for name in FACTORS:
            old, dim = self.get_parameter(name), 1 if name == "lora_B" else 0
            rows = keep.nonzero()[:, 0]
            # Another object, not other data: graphs and hooks that still hold the old one go by its shape.
            new = nn.Parameter(old.detach().index_select(dim, rows), requires_grad=old.requires_grad)
            if old.grad is not None:
                new.grad = old.grad.index_select(dim, rows)
            self._parameters[name] = new
            if optimizer is not None:
                _hand_over(optimizer, old, new, dim, rows)
        return [bool(kept) for kept in keep.tolist()]


def _hand_over(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, dim: int, rows: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    tensors = {key: value for key, value in (state or {}).items() if isinstance(value, Tensor) and value.dim()}
    # A state in a form of the optimizer's own (factored, quantised) begins anew.
    if state and all(value.shape == old.shape for value in tensors.values()):
        cut = {key: value.index_select(dim, rows.to(value.device)) for key, value in tensors.items()}
        optimizer.state[new] = {**state, **cut}
