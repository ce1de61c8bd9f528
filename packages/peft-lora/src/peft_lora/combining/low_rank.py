"""Low-rank forms of a delta, dense or a sum of products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """A delta (out, in) as B A, with B (out, r) and A (r, in); whatever scales it is in B."""

    b: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        """The delta itself."""
        return self.b @ self.a

    def scaled(self, weight: float) -> Product:
        """weight · B A."""
        return Product(self.b * weight, self.a)


def stacked(products: Sequence[Product]) -> Product:
    """The sum of products as one product, of the sum of their ranks: exact."""
    return Product(torch.cat([p.b for p in products], 1), torch.cat([p.a for p in products], 0))


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition U diag(s) Vᵀ of a delta, as far as it has a rank."""

    u: Tensor
    s: Tensor
    v: Tensor

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps the share `energy` of Σ s²."""
        total = self.s.double().square().cumsum(0)
        if total.numel() == 0 or total[-1] == 0:
            return 1
        return min(int((total < energy * total[-1]).sum()) + 1, len(self.s))

    def product(self, rank: int, clamp: float | None = None) -> tuple[Product, float]:
        """The best product of that rank (Eckart and Young 1936), and ‖delta - product‖ / ‖delta‖ (Frobenius).

        Singular values are shared evenly: B = U √s, A = √s Vᵀ. Directions that the delta does not have are zero. With
        `clamp`, as in HF PEFT, B = U s and A = Vᵀ, whose entries beyond that quantile of them all are cut to it.
        """
        kept = min(rank, len(self.s))
        u, s, v = self.u[:, :kept], self.s[:kept], self.v[:, :kept]
        b, a = u * s.sqrt(), (v * s.sqrt()).t()
        squares = self.s.double().square()
        whole, rest = squares.sum(), squares[kept:].sum()
        if clamp is not None:
            b, a = u * s, v.t()
            bound = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
            b, a = b.clamp(-bound, bound), a.clamp(-bound, bound)
            rest = (self.u * self.s @ self.v.t() - b @ a).double().square().sum()
        b, a = F.pad(b, (0, rank - kept)), F.pad(a, (0, 0, 0, rank - kept))
        return Product(b, a), float(rest / whole) ** 0.5 if whole else 0.0


def spectrum(delta: Product | Tensor) -> Spectrum:
    """Decompose a delta; a product through its factors, at the cost of its rank (two QR, one small SVD)."""
    if isinstance(delta, Product) and delta.b.shape[1] < min(delta.b.shape[0], delta.a.shape[1]):
        q_b, r_b = torch.linalg.qr(delta.b)
        q_a, r_a = torch.linalg.qr(delta.a.t())
        u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
        return Spectrum(q_b @ u, s, q_a @ v.t())
    u, s, v = torch.linalg.svd(delta.dense() if isinstance(delta, Product) else delta, full_matrices=False)
    return Spectrum(u, s, v.t())
