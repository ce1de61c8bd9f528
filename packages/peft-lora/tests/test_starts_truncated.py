"""Singular directions of large matrices: the exact ones where they stand out, the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_lora import LoraGAConfig
from peft_lora.starts import lora_ga, truncated
from peft_lora.starts.eva import Pca


def falling(m: int = 300, n: int = 240, by: float = 0.9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix in float64 whose singular values fall by a constant factor, and its decomposition."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    s = by ** torch.arange(n, dtype=torch.float64)
    return (u * s) @ v.t(), u, s, v.t()


def test_the_first_directions() -> None:
    """Nine powers of the spectrum leave (σ₂₀ / σₖ)⁹ of the rest: 2e-5 of it in the tenth direction."""
    matrix, u, s, vh = falling()
    for shape in (matrix, matrix.t()):
        found_u, found_s, found_v = truncated.svd(shape, 10)
        left, right = (u, vh) if shape is matrix else (vh.t(), u.t())
        assert found_u.shape == (len(shape), 10) and found_v.shape == (10, shape.shape[1])
        torch.testing.assert_close(found_s, s[:10], rtol=1e-6, atol=0)
        one = torch.ones(10, dtype=torch.float64)
        torch.testing.assert_close((found_u * left[:, :10]).sum(0).abs(), one, rtol=0, atol=1e-4)
        torch.testing.assert_close((found_v * right[:10]).sum(1).abs(), one, rtol=0, atol=1e-4)
        # The signs of a pair belong together.
        torch.testing.assert_close(
            (found_u * found_s) @ found_v, (left[:, :10] * s[:10]) @ right[:10], rtol=0, atol=1e-3
        )


def test_no_random_number_of_the_user_is_used() -> None:
    matrix = falling()[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = truncated.svd(matrix, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(one, other) for one, other in zip(first, truncated.svd(matrix, 5), strict=True))


def test_a_small_matrix_is_decomposed_exactly_whatever_k() -> None:
    matrix = falling(12, 7)[0]
    u, s, vh = truncated.svd(matrix, 20)
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=1e-14)


def test_lora_ga_of_a_large_gradient() -> None:
    gradient, u, _, vh = falling(by=0.7)
    a, b = lora_ga.factors(gradient, 4, 1.0, LoraGAConfig(scale="unit"))
    torch.testing.assert_close((a @ vh[:4].t()).abs(), torch.eye(4).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close((u[:, 4:8].t() @ b).abs(), torch.eye(4).double(), rtol=0, atol=1e-8)


def test_eva_of_wide_inputs() -> None:
    """The directions of all rows at once, found from four batches of them."""
    matrix, *_ = falling(by=0.8)
    rows = torch.cat([matrix, matrix.flip(0) * 0.5])
    pca = Pca(6, 0.99)
    for part in rows.split(150):
        pca.update(part)
    centred = rows - rows.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    # What a batch has beyond six directions is forgotten by the next one; σ₇ / σ₁ is 0.26.
    torch.testing.assert_close(pca.values[:3], values[:3], rtol=0.02, atol=0)
    torch.testing.assert_close(
        (pca.components[:3] * directions[:3]).sum(1).abs(), torch.ones(3).double(), rtol=0, atol=0.02
    )
