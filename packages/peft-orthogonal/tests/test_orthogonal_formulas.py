"""The maths of OFT and BOFT, against references written out from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_core import drive, get_peft_model
from peft_orthogonal import BOFTConfig, OFTConfig
from peft_orthogonal.cayley import cayley, cayley_series, skew_from_rows
from peft_orthogonal.rotation import WIDTH, assemble, rotate, rotate_back

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * std


def skew_part(matrices: Tensor) -> Tensor:
    return (matrices - matrices.mT) / 2


# -- references --------------------------------------------------------------------------------------------------------


def butterfly_component(blocks: Tensor, k: int, half: int) -> Tensor:
    """B̃^h(d, k) of the BOFT paper, equation 1 and what follows it: block-diagonal with segments of k units of h
    numbers, each segment [[D1, D2], [D3, D4]] with block-diagonal D of k / 2 blocks; the j-th blocks of D1 ... D4
    together are one of `blocks` (b × b, b = 2h)."""
    d = len(blocks) * 2 * half
    dense, taken = torch.zeros(d, d, dtype=blocks.dtype), iter(blocks)
    for segment in range(0, d, k * half):
        for j in range(k // 2):
            upper = slice(segment + j * half, segment + (j + 1) * half)
            lower = slice(upper.start + k // 2 * half, upper.stop + k // 2 * half)
            block = next(taken)
            dense[upper, upper], dense[upper, lower] = block[:half, :half], block[:half, half:]
            dense[lower, upper], dense[lower, lower] = block[half:, :half], block[half:, half:]
    return dense


def butterfly(factors: Tensor) -> Tensor:
    """R(m, h) = B̃(d, 2^m) ... B̃(d, 4) B̃(d, 2), dense."""
    m, k, b, _ = factors.shape
    result = torch.eye(k * b, dtype=factors.dtype)
    for i in range(m):
        result = butterfly_component(factors[i], 2 ** (i + 1), b // 2) @ result
    return result


def rotation_by_definition(a: Tensor) -> Tensor:
    """The Cayley transform (I - S)(I + S)⁻¹ of each matrix's skew part, one after the other."""
    found = []
    for matrix in a.flatten(0, -3):
        s, eye = (matrix - matrix.T) / 2, torch.eye(a.shape[-1], dtype=a.dtype)
        found.append((eye - s) @ torch.linalg.inv(eye + s))
    return torch.stack(found).view(a.shape)


def reached(m: int, k: int, b: int) -> Tensor:
    """Which inputs reach which outputs: a walk over the butterfly network, unit by unit."""
    d, half = k * b, b // 2
    reach = torch.zeros(d, d, dtype=torch.bool)
    for start in range(d):
        units = {start // half}
        for i in range(m):
            units |= {unit ^ (1 << i) for unit in units}
        for unit in units:
            reach[start, unit * half : (unit + 1) * half] = True
    return reach


def only(model: Any, name: str = "default") -> Any:
    """The adapter of a model that is one layer."""
    return getattr(model[0].adapters, name)


def adapted(layer: nn.Module, config: Any, random: float = 0.3, seed: int = 1) -> Any:
    model: Any = get_peft_model(nn.Sequential(layer), config.resolve(target_modules=["0"]))
    with torch.no_grad():
        for parameter in only(model).parameters():
            parameter.add_(drawn(*parameter.shape, seed=seed, std=random).to(parameter.dtype))
    return model


# -- the Cayley transform ----------------------------------------------------------------------------------------------


class TestCayley:
    def test_rows_are_upper_triangles(self) -> None:
        q = skew_from_rows(torch.arange(1.0, 13.0).view(2, 6), 4)
        assert q[0].tolist() == [[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]
        assert torch.equal(q[1, 0], torch.tensor([0.0, 7, 8, 9]))

    def test_the_exact_transform(self) -> None:
        for size in (2, 3, 8):
            a = drawn(5, size, size)
            torch.testing.assert_close(cayley(skew_part(a)), rotation_by_definition(a), rtol=0, atol=1e-12)

    def test_large_angles_stay_orthogonal(self) -> None:
        """In float32, with angles near a half turn as well."""
        for size, std in ((4, 100.0), (32, 10.0), (64, 1.0)):
            r = cayley(skew_part(drawn(6, size, size, std=std).float()))
            # R comes from an inverse with a condition number up to ‖Q‖, about 100 here: 100 · 6e-8.
            torch.testing.assert_close(r @ r.mT, torch.eye(size).expand_as(r), rtol=0, atol=1e-5)
            assert torch.allclose(torch.linalg.det(r.double()), torch.ones(6, dtype=DOUBLE), atol=1e-4)

    def test_the_series_is_cut_off_as_the_files_mean_it(self) -> None:
        q = skew_part(drawn(3, 5, 5, std=0.3))
        eye = torch.eye(5, dtype=DOUBLE)
        power = [eye, q, q @ q, q @ q @ q, q @ q @ q @ q]
        expected = {
            1: eye.expand_as(q),
            2: eye + 2 * q,
            3: eye + 2 * q + 2 * power[2] + power[3],
            4: eye + 2 * q + 2 * power[2] + power[3],
            5: eye + 2 * q + 2 * power[2] + 2 * power[3] + power[4],
        }
        for terms, value in expected.items():
            torch.testing.assert_close(cayley_series(q, terms), value, rtol=0, atol=1e-12)

    def test_the_series_tends_to_the_transpose_of_the_exact_one(self) -> None:
        q = skew_part(drawn(1, 6, 6))
        q = 0.5 * q / torch.linalg.matrix_norm(q, 2)
        errors = [float((cayley_series(q, n) - cayley(q).mT).abs().max()) for n in (4, 6, 8, 30)]
        # The first term left out is Qⁿ⁻¹, of norm 2^(1-n), and those after it are at most twice that in sum.
        assert all(error <= 4 * 0.5 ** (n - 1) for error, n in zip(errors, (4, 6, 8, 30), strict=True))
        assert errors[0] > 10 * errors[2]

    def test_half_precision_and_autocast_lose_nothing(self) -> None:
        a = drawn(4, 8, 8).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            found = [cayley(skew_part(a)), cayley_series(skew_part(a) / 100, 30)]
        for r in found:
            assert r.dtype == torch.float32
            torch.testing.assert_close(r @ r.mT, torch.eye(8).expand_as(r), rtol=0, atol=2e-6)


# -- products with many blocks -----------------------------------------------------------------------------------------

SHAPES = [
    (1, 8, 4),
    (1, 5, 3),
    (1, 1, 6),
    (2, 8, 4),
    (2, 2, 32),
    (3, 8, 4),
    (3, 12, 6),
    (4, 8, 4),
    (4, 64, 2),
    (4, 24, 2),
]


@pytest.mark.parametrize(("m", "k", "b"), SHAPES)
@pytest.mark.parametrize("width", [1, 8, WIDTH, 64])
def test_rotation_is_the_papers_product(m: int, k: int, b: int, width: int) -> None:
    a = drawn(m, k, b, b)
    factors = rotation_by_definition(a)
    dense = torch.block_diag(*factors[0]) if m == 1 else butterfly(factors)
    eye = torch.eye(k * b, dtype=DOUBLE)
    torch.testing.assert_close(dense @ dense.T, eye, rtol=0, atol=1e-12)
    x = drawn(2, 3, k * b, seed=5)
    parts = assemble(cayley(skew_part(a)), width)
    torch.testing.assert_close(rotate(x, parts), x @ dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate_back(x, parts), x @ dense.T, rtol=0, atol=1e-12)
    assert all(part.blocks.shape[-1] <= max(width, b) for part in parts)


@pytest.mark.parametrize(("m", "k", "b"), [s for s in SHAPES if s[0] > 1 or s[2] % 2 == 0])
def test_what_reaches_what(m: int, k: int, b: int) -> None:
    """Two units meet where the m lowest bits alone tell them apart; m = 1 + log₂ k factors reach everything."""
    dense = reached(m, k, b)
    found = rotate(torch.eye(k * b, dtype=DOUBLE), assemble(cayley(skew_part(drawn(m, k, b, b))))) != 0
    assert torch.equal(found, dense)
    assert bool(found.all()) == (k == 2 ** (m - 1))


@pytest.mark.parametrize(("m", "k", "b"), [(1, 8, 4), (3, 8, 4)])
def test_gradients_of_products(m: int, k: int, b: int) -> None:
    """First and second derivatives, of x and of the blocks."""
    factors, x = drawn(m, k, b, b, std=0.3).requires_grad_(), drawn(2, k * b, seed=3).requires_grad_()

    def run(x: Tensor, factors: Tensor) -> Tensor:
        return rotate(x, assemble(cayley(skew_part(factors))))

    assert torch.autograd.gradcheck(run, (x, factors))
    assert torch.autograd.gradgradcheck(run, (x, factors))
    loss = lambda f: run(x.detach(), f).pow(3).sum()  # noqa: E731
    expected = torch.autograd.grad(loss(factors), factors)[0]
    torch.testing.assert_close(torch.func.grad(loss)(factors.detach()), expected)


# -- layers ------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 10), (2, 5, 24)),
    "linear-no-bias": (lambda: nn.Linear(24, 10, bias=False), (3, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 4, stride=2, dilation=2, padding=1), (2, 6, 17)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), bias=False), (2, 4, 7, 8)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 7, 8)),
    "conv2d-point": (lambda: nn.Conv2d(24, 6, 1, stride=2), (2, 24, 7, 8)),
    "conv2d-point-groups": (lambda: nn.Conv2d(24, 6, 1, groups=2, dilation=3), (2, 24, 7, 8)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What the outputs of a layer see of x, (batch, places, inputs), channel by channel as the kernel is stored."""
    if isinstance(layer, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    settings = [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
    if isinstance(layer, nn.Conv1d):
        x, settings = x.unsqueeze(2), [(0 if i == 2 else 1, *given) for i, given in enumerate(settings)]  # type: ignore[misc]
    return F.unfold(x, *settings).transpose(1, 2)  # type: ignore[arg-type]


def by_definition(layer: Any, x: Tensor, rotation: Tensor, s: Tensor | None) -> Tensor:
    """Patches times dense R, then the layer's weight, group by group; (batch, places, out)."""
    p = patches(layer, x) @ rotation
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.flatten(1)
    outs = [part @ rows.T for part, rows in zip(p.chunk(groups, -1), weight.chunk(groups), strict=True)]
    out = torch.cat(outs, -1)
    out = out if s is None else out * s.flatten()
    return out if layer.bias is None else out + layer.bias


def places(layer: nn.Module, out: Tensor) -> Tensor:
    """A layer's output as (batch, places, out)."""
    if isinstance(layer, nn.Linear):
        return out.reshape(out.shape[0], -1, out.shape[-1])
    return out.flatten(2).transpose(1, 2)


@every_layer
@pytest.mark.parametrize("series", [False, True], ids=["exact", "series"])
def test_oft_is_its_formula(name: str, series: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), drawn(*shape, seed=4)
    model = adapted(layer, OFTConfig(oft_block_size=4, use_cayley_neumann=series), random=0.2)
    q = skew_from_rows(only(model).oft_R.detach(), 4)
    eye = torch.eye(4, dtype=DOUBLE)
    blocks = (eye - q) @ torch.linalg.inv(eye + q)
    if series:
        blocks = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    with torch.no_grad():
        expected = by_definition(layer, x, torch.block_diag(*blocks), None)
        torch.testing.assert_close(places(layer, model(x)), expected, rtol=0, atol=1e-12)
        model.merge_adapter()
        torch.testing.assert_close(places(layer, model(x)), expected, rtol=0, atol=1e-12)


@every_layer
@pytest.mark.parametrize("m", [1, 2])
def test_boft_is_its_formula(name: str, m: int) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), drawn(*shape, seed=4)
    model = adapted(layer, BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=m))
    adapter = only(model)
    with torch.no_grad():
        rotation = butterfly(rotation_by_definition(adapter.boft_R.detach()))
        expected = by_definition(layer, x, rotation, adapter.boft_s)
        torch.testing.assert_close(places(layer, model(x)), expected, rtol=0, atol=1e-12)
        model.merge_adapter()
        torch.testing.assert_close(places(layer, model(x)), expected, rtol=0, atol=1e-12)


def test_oft_on_embeddings_turns_what_comes_out() -> None:
    layer, ids = nn.Embedding(9, 8).double(), torch.tensor([[1, 8, 0], [3, 3, 2]])
    model = adapted(layer, OFTConfig(oft_block_size=4, use_cayley_neumann=False))
    q = skew_from_rows(only(model).oft_embedding_R.detach(), 4)
    eye = torch.eye(4, dtype=DOUBLE)
    rotation = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q)))
    torch.testing.assert_close(model(ids), layer.weight.detach()[ids] @ rotation, rtol=0, atol=1e-12)


# -- what rotations keep -----------------------------------------------------------------------------------------------


def hyperspherical_energy(weight: Tensor) -> Tensor:
    """Σ 1 / ‖w_i - w_j‖ over pairs of a weight's rows, each scaled to length 1 (OFT, equation 2)."""
    rows = F.normalize(weight.double(), dim=1)
    return (1 / torch.pdist(rows)).sum()


def trained(config: Any, steps: int = 100, lr: float = 0.02) -> tuple[Any, Tensor, nn.Linear]:
    """A layer, in float32, taught another layer's outputs; and the inputs."""
    torch.manual_seed(0)
    layer, other = nn.Linear(64, 48), nn.Linear(64, 48)
    model: Any = get_peft_model(nn.Sequential(layer), config.resolve(target_modules=["0"]))
    x = torch.randn(256, 64)
    target = other(x).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    driving = drive(model, optimizer)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del driving
    assert losses[-1] < 0.99 * losses[0]
    return model, x, layer


TRAINED = {
    "oft": OFTConfig(oft_block_size=16, use_cayley_neumann=False),
    "oft-shared": OFTConfig(oft_block_size=16, use_cayley_neumann=False, block_share=True),
    "boft": BOFTConfig(boft_block_size=8),
    "boft-4": BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=4),
}


@pytest.mark.parametrize("name", TRAINED)
def test_after_training(name: str) -> None:
    """After 100 steps in float32: R orthogonal, merging exact, and the energy of the neurons as before."""
    model, x, layer = trained(TRAINED[name])
    rotation = only(model).rotation(False)
    dense = rotate(torch.eye(64), rotation).detach()
    assert float((dense - torch.eye(64)).abs().max()) > 0.1  # it has turned
    # Inverses and products in float32, whose unit is 6e-8, of matrices of norm about 1, up to four one after the other.
    torch.testing.assert_close(dense @ dense.T, torch.eye(64), rtol=0, atol=1e-5)
    before, attached = layer.weight.detach().clone(), model(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(x).detach(), attached, rtol=0, atol=1e-5)
    turned = layer.weight.detach() / (only(model).boft_s.detach() if name.startswith("boft") else 1)
    assert float((turned - before).abs().max()) > 0.01
    energy = hyperspherical_energy(before)
    torch.testing.assert_close(hyperspherical_energy(turned), energy, rtol=1e-6, atol=0)
    # The scale of BOFT changes lengths, and the directions that the energy is about not at all.
    torch.testing.assert_close(hyperspherical_energy(layer.weight.detach()), energy, rtol=1e-6, atol=0)


def test_the_series_is_orthogonal_as_long_as_it_turns_little() -> None:
    """Error of the last term: ‖Q‖⁴ and beyond, for five terms."""
    model, *_ = trained(OFTConfig(oft_block_size=16), steps=20, lr=1e-3)
    dense = rotate(torch.eye(64), only(model).rotation(False)).detach()
    norm = float(torch.linalg.matrix_norm(skew_from_rows(only(model).oft_R.detach(), 16), 2).max())
    error = float((dense @ dense.T - torch.eye(64)).abs().max())
    assert 0.02 < norm < 0.3
    assert error <= 4 * norm**4 + 1e-6


# -- constrained -------------------------------------------------------------------------------------------------------


def norms(model: Any) -> Tensor:
    return torch.linalg.matrix_norm(skew_from_rows(only(model).oft_R.detach(), 16))


def test_constrained_parameters_stay_within_their_bound() -> None:
    config = OFTConfig(oft_block_size=16, use_cayley_neumann=False, coft=True, eps=0.2)
    model, x, _ = trained(config, lr=0.05)
    assert float(norms(model).max()) <= 0.2 / math.sqrt(4) * (1 + 1e-5)
    assert float(norms(model).max()) > 0.9 * 0.2 / math.sqrt(4)
    # Without `drive` the parameters go where they like, and the function stays within the bound all the same.
    expected = model(x).detach()
    with torch.no_grad():
        only(model).oft_R.mul_(7)
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-5)
    assert float(norms(model).max()) > 0.5
    inside, free = (
        adapted(nn.Linear(64, 4), OFTConfig(oft_block_size=16, use_cayley_neumann=False, coft=c, eps=1e3), 0.01)
        for c in (True, False)
    )
    inside[0].weight.data = free[0].weight.data
    inside[0].bias.data = free[0].bias.data
    assert torch.equal(inside(x), free(x))


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(oft_block_size=4, use_cayley_neumann=False, module_dropout=0.25),
        OFTConfig(oft_block_size=4, use_cayley_neumann=False, module_dropout=0.25, block_share=True),
        BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, boft_dropout=0.25),
    ],
    ids=["oft", "oft-shared", "boft"],
)
def test_dropout_replaces_blocks_by_the_identity(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(nn.Linear(256, 4), config)
    adapter, seen = only(model), []
    monkeypatch.setattr(type(adapter), "drop", lambda self, b, t: seen.append(_drop(self, b, t)) or seen[-1])
    _drop = adapter.__class__.__mro__[1].__dict__["drop"]
    torch.manual_seed(0)
    for _ in range(20):
        model(torch.randn(2, 256))
    eye = torch.eye(4)
    left = torch.stack([(blocks == eye).all(-1).all(-1).float().mean() for blocks in seen]).mean()
    # 20 calls of 64 blocks or more: the share's deviation is 0.012.
    assert abs(float(left) - 0.25) < 0.05
    for blocks in seen:
        torch.testing.assert_close(blocks @ blocks.mT, eye.expand_as(blocks), rtol=0, atol=1e-6)
    model.eval()
    seen.clear()
    model(torch.randn(2, 256))
    assert not (seen[0] == eye).all(-1).all(-1).any()


# -- costs -------------------------------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Shapes of everything that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in _flat(out)}
        return out


def _flat(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from _flat(item)


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(),
        OFTConfig(use_cayley_neumann=False),
        BOFTConfig(),
        BOFTConfig(boft_n_butterfly_factor=6),
        BOFTConfig(boft_block_size=32, boft_n_butterfly_factor=3),
    ],
    ids=["oft", "oft-exact", "boft", "boft-6", "boft-3-wide"],
)
def test_a_training_step_makes_nothing_of_the_weights_size(config: Any) -> None:
    model = adapted(nn.Linear(256, 192), config, random=0.01)
    x = torch.randn(8, 256, requires_grad=True)
    with Shapes() as shapes:
        model(x).square().sum().backward()
    made = {shape for shape in shapes.seen if math.prod(shape) >= 192 * 256}
    # Views of the weight itself, which costs nothing, are what is left.
    assert made <= {(192, 256), (256, 192)}
    assert not {(256, 256)} & shapes.seen
    weight = model[0].base_layer.weight
    assert weight.grad is None


def test_identity_is_no_work_for_a_disabled_adapter() -> None:
    model = adapted(nn.Linear(64, 8), OFTConfig())
    x = torch.randn(2, 64)
    with model.disable_adapter():
        assert torch.equal(model(x), model[0].base_layer(x))


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [OFTConfig(oft_block_size=8), BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=4)],
    ids=["oft", "boft"],
)
def test_rows_with_adapters_of_their_own_at_once(config: Any) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(128, 8)), config.resolve(target_modules=["0"]), "a")
    for name in ("b", "c"):
        model.add_adapter(name, config.resolve(target_modules=["0"]))
    for name in ("a", "b", "c"):
        for parameter in only(model, name).parameters():
            nn.init.normal_(parameter.data, std=0.2)
    x = torch.randn(5, 3, 128)
    names = ["c", "a", "__base__", "b", "a"]
    kind = type(only(model, "a"))
    calls: list[Any] = []
    original = kind.forward_rows.__func__  # type: ignore[attr-defined]
    kind.forward_rows = classmethod(lambda cls, *args, **kw: calls.append(original(cls, *args, **kw)) or calls[-1])
    try:
        mixed = model(x, adapter_names=names)
    finally:
        del kind.forward_rows
    assert len(calls) == 1
    assert calls[0] is not NotImplemented
    for row, name in enumerate(names):
        with model.disable_adapter():
            expected = model(x[row])
        if name != "__base__":
            model.set_adapter(name)
            expected = model(x[row])
        # float32, products of the same numbers in another order.
        torch.testing.assert_close(mixed[row], expected, rtol=0, atol=1e-5)


def test_rows_with_blocks_of_two_sizes_go_one_after_the_other() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(128, 8)), OFTConfig(oft_block_size=64, target_modules=["0"]), "a"
    )
    model.add_adapter("b", OFTConfig(oft_block_size=32, target_modules=["0"]))
    for name in ("a", "b"):
        nn.init.normal_(only(model, name).oft_R.data, std=0.05)
    x = torch.randn(2, 128)
    mixed = model(x, adapter_names=["a", "b"])
    model.set_adapter("b")
    torch.testing.assert_close(mixed[1], model(x)[1], rtol=0, atol=1e-5)
