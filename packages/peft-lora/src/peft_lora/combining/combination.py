"""The hook behind `add_weighted_adapter`, for adapters of any method that has a delta; the result is a LoRA.

Deltas are combined, never factors: the factors of a sum are not the sums of the factors. Two ways are exact and add
the ranks, "cat" and "linear"; the others give the best product of a rank (`svd_rank`), and say how far it is off.
Those that HF PEFT makes of the factors are there under names that say so ("linear_factors" and so on).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_core import Adapter, AdapterConfig, AdapterState, CombineError, CombineSource, hookimpl
from peft_lora.config import LoraConfig

from .arithmetic import WAYS, Arithmetic
from .deltas import Delta, Matrix, changes, matrices, products
from .low_rank import Product, spectrum, stacked

EXACT = ("cat", "linear")
FACTORS = {f"{way}_factors": way for way in WAYS}
DENSE = {
    "svd": "linear",
    **{way: way for way in WAYS if way != "linear"},
    **{f"{way}_svd": way for way in WAYS if way != "linear"},
}
"""Ways that combine whole deltas. HF PEFT's names without "_svd" work on factors there."""

OPTIONS = {
    "svd_rank": None,
    "svd_clamp": None,
    "density": None,
    "majority_sign_method": "total",
    "seed": 0,
    "progressbar": False,
}
# Settings of a decomposition that computes more than is kept, or of how it is computed.
INERT = ("svd_full_matrices", "svd_driver")


@hookimpl
def peft_combine(
    sources: Sequence[CombineSource], how: str, config: AdapterConfig | None, options: Mapping[str, Any]
) -> AdapterState | None:
    """Combine adapters of any method into a LoRA.

    Options: `svd_rank` (an int, or below 1 the share of Σ σ² to keep; default: the largest rank among the sources),
    `svd_clamp`, `density`, `majority_sign_method`, `seed`, `progressbar`.
    """
    how = how or "svd"
    if how not in (*EXACT, *DENSE, *FACTORS):
        return None
    if unknown := [name for name in options if name not in (*OPTIONS, *INERT)]:
        raise CombineError(f"add_weighted_adapter has no option {unknown[0]!r}; it has {', '.join(OPTIONS)}")
    given = {**OPTIONS, **options}
    arithmetic = Arithmetic(
        FACTORS.get(how, DENSE.get(how, "linear")),
        density=given["density"],
        sign=given["majority_sign_method"],
        seed=given["seed"],
    )
    rank = _rank(given["svd_rank"], config, sources)
    found = Combined(config)
    for place, adapters in _progress(_sites(sources), given["progressbar"]):
        if how in FACTORS:
            found.put(place, _by_factors(place, adapters, arithmetic))
        else:
            found.put(place, _by_deltas(adapters, arithmetic, None if how in EXACT else rank, given["svd_clamp"]))
    return found.state(sources)


Weighted = list[tuple[Adapter, float]]
Part = tuple[Matrix, Product, Tensor | None, float]
"""A matrix of a layer, its new delta, the change of its bias, and how far the delta is off."""


def _sites(sources: Sequence[CombineSource]) -> dict[str, Weighted]:
    """Who adapts each site, with weights. Raises `CombineError` for what has no delta of a layer's weights."""
    found: dict[str, Weighted] = {}
    for source in sources:
        for place, adapter in source.adapters.items():
            if adapter.layer.request.copied or adapter.layer.request.part:
                raise CombineError(
                    f"adapter {source.name!r} also trains {place} (a copy of a module, a bias, or rows of a table), "
                    "which cannot be combined; combine adapters without such parts"
                )
            found.setdefault(place, []).append((adapter, source.weight))
    return found


def _by_deltas(adapters: Weighted, arithmetic: Arithmetic, rank: int | float | None, clamp: float | None) -> list[Part]:
    parts: list[Part] = []
    known = [products(adapter) for adapter, _ in adapters]
    whole = [
        changes(adapter) if k is None or _has_bias(adapter) else {}
        for (adapter, _), k in zip(adapters, known, strict=True)
    ]
    weights = [weight for _, weight in adapters]
    for matrix in matrices(adapters[0][0]):
        deltas: list[Delta] = [
            product[matrix.weight] if product is not None else matrix.flat(_of(change, matrix.weight, adapter))
            for product, change, (adapter, _) in zip(known, whole, adapters, strict=True)
        ]
        delta: Delta
        if arithmetic.how == "linear" and all(isinstance(one, Product) for one in deltas):
            delta = stacked([one.scaled(w) for one, w in zip(deltas, weights, strict=True) if isinstance(one, Product)])
        else:
            delta = arithmetic([one.dense() if isinstance(one, Product) else one for one in deltas], weights)
        product, error = _product(delta, rank, clamp)
        biases = [
            (change[matrix.bias], weight)
            for change, weight in zip(whole, weights, strict=True)
            if matrix.bias in change
        ]
        bias: Tensor | None = sum(weight * bias for bias, weight in biases) if biases else None  # type: ignore[assignment]
        parts.append((matrix, product, bias, error))
    return parts


def _product(delta: Delta, rank: int | float | None, clamp: float | None) -> tuple[Product, float]:
    if rank is None and isinstance(delta, Product):
        return delta, 0.0
    # Cutting entries depends on the signs of singular vectors: those of the whole delta, as in HF PEFT.
    found = spectrum(delta.dense() if clamp is not None and isinstance(delta, Product) else delta)
    if rank is None:  # exact, of a delta that is no product
        rank = max(int((found.s > found.s[:1] * torch.finfo(found.s.dtype).eps * max(delta.shape)).sum()), 1)  # type: ignore[union-attr]
    elif isinstance(rank, float):
        rank = found.rank_for(rank)
    return found.product(rank, clamp)


def _by_factors(place: str, adapters: Weighted, arithmetic: Arithmetic) -> list[Part]:
    """As HF PEFT: A and B each by themselves, times √|weight|, the sign on A; products of different sources mix."""
    parts: list[Part] = []
    for matrix in matrices(adapters[0][0]):
        pairs = []
        for adapter, _ in adapters:
            found = products(adapter)
            if found is None:
                raise CombineError(f"{place}: {type(adapter).__name__} is no LoRA, so it has no factors to combine")
            pairs.append(found[matrix.weight])
        if len({pair.b.shape[1] for pair in pairs}) > 1:
            raise CombineError(f"{place}: the ranks differ, {[p.b.shape[1] for p in pairs]}; factors cannot be added")
        scalings = [float(getattr(adapter, "scaling", 1.0)) for adapter, _ in adapters]
        roots = [abs(weight * s) ** 0.5 for (_, weight), s in zip(adapters, scalings, strict=True)]
        signs = [-1.0 if weight < 0 else 1.0 for _, weight in adapters]
        a = arithmetic([p.a for p in pairs], [sign * root for sign, root in zip(signs, roots, strict=True)])
        b = arithmetic([p.b / s for p, s in zip(pairs, scalings, strict=True)], roots)
        parts.append((matrix, Product(b, a), None, 0.0))
    return parts


class Combined:
    """The new adapter as it grows: factors by site, ranks, and what to tell the user."""

    def __init__(self, config: AdapterConfig | None) -> None:
        if config is not None and not isinstance(config, LoraConfig):
            raise CombineError(f"what is combined here becomes a LoRA; config is a {type(config).__name__}")
        self.config = config
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.ranks: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.has_bias = False

    def put(self, place: str, parts: list[Part]) -> None:
        """Take the parts of one site; matrices of one layer get the rank of the largest."""
        rank = max(product.b.shape[1] for _, product, _, _ in parts)
        slots: dict[str, Tensor] = {}
        for matrix, product, bias, error in parts:
            more = rank - product.b.shape[1]
            a = torch.nn.functional.pad(product.a, (0, 0, 0, more))
            b = torch.nn.functional.pad(product.b, (0, more))
            names = ("lora_embedding_A", "lora_embedding_B") if matrix.embedding else ("lora_A", "lora_B")
            slots |= {matrix.prefix + names[0]: a, matrix.prefix + names[1]: b}
            if bias is not None:
                slots[matrix.prefix + "lora_bias"] = bias
                self.has_bias = True
            self.errors[place] = max(error, self.errors.get(place, 0.0))
        self.tensors[place], self.ranks[place] = slots, rank

    def state(self, sources: Sequence[CombineSource]) -> AdapterState:
        """The config and the tensors, with s = alpha / r = 1."""
        usual = max(self.ranks.values())
        exceptions = {place: rank for place, rank in self.ranks.items() if rank != usual}
        values: dict[str, Any] = {
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": exceptions,
            "alpha_pattern": exceptions,
            "target_modules": _targets(sources, self.tensors),
            "lora_bias": self.has_bias,
        }
        base = self.config or LoraConfig(**values)
        values["task_type"] = base.task_type or sources[0].config.task_type
        config = base.resolve(**values, init_lora_weights=True, use_rslora=False, use_dora=False, lora_dropout=0.0)
        return AdapterState(config, self._shaped(sources), report=self.errors)

    def _shaped(self, sources: Sequence[CombineSource]) -> dict[str, dict[str, Tensor]]:
        """Kernels in their own shape, and biases that some sources do not change as zeros."""
        layers = {place: adapter.layer for source in sources for place, adapter in source.adapters.items()}
        for place, slots in self.tensors.items():
            layer: Any = layers[place]
            if layer.kind == "conv":
                slots["lora_A"] = slots["lora_A"].view(-1, layer.in_features, *layer.kernel_size)
                slots["lora_B"] = slots["lora_B"].view(*slots["lora_B"].shape, *(1,) * len(layer.kernel_size))
            if self.has_bias:
                for name in [name for name in slots if name.endswith("lora_B")]:
                    bias = name.removesuffix("lora_B") + "lora_bias"
                    slots.setdefault(bias, slots[name].new_zeros(slots[name].shape[0]))
        return self.tensors


def _targets(sources: Sequence[CombineSource], places: Mapping[str, Any]) -> Any:
    """The sources' own targets where they agree, else the paths."""
    targets = [getattr(source.config, "target_modules", None) for source in sources]
    same = all(
        target == targets[0] and source.adapters.keys() == places.keys()
        for target, source in zip(targets, sources, strict=True)
    )
    return targets[0] if same and targets[0] is not None else tuple(places)


def _rank(wanted: Any, config: AdapterConfig | None, sources: Sequence[CombineSource]) -> int | float:
    if wanted is None:
        ranks = [
            max((p.b.shape[1] for a in s.adapters.values() for p in (products(a) or {}).values()), default=0)
            for s in sources
        ]
        wanted = config.r if isinstance(config, LoraConfig) else max(ranks)
        if not wanted:
            raise CombineError("svd_rank is needed: the sources have no rank that could be taken over")
    whole = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0
    if not whole and not (isinstance(wanted, float) and 0 < wanted <= 1):
        raise CombineError(f"svd_rank is a positive integer, or a share of Σ σ² above 0 and up to 1; not {wanted!r}")
    chosen: int | float = wanted
    return chosen


def _of(change: Mapping[str, Tensor], name: str, adapter: Adapter) -> Tensor:
    found = change.get(name)
    return torch.zeros_like(adapter.layer.params()[name], dtype=torch.float32) if found is None else found


def _has_bias(adapter: Adapter) -> bool:
    return any(name.endswith("lora_bias") for name, _ in adapter.named_parameters())


def _progress(sites: Mapping[str, Weighted], progressbar: bool) -> Iterator[tuple[str, Weighted]]:
    from tqdm.auto import tqdm

    yield from tqdm(sites.items(), desc="Combining", unit="layer", disable=not progressbar)
