"""What the benchmarks count and time.

Operations and bytes are exact and repeat from run to run. Times are medians of interleaved runs: only ratios within
one table mean anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], object]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(run: Run) -> int:
    """Tensor operations that reach the dispatcher, views included."""
    counter = _Counter()
    with counter:
        run()
    return counter.count


def kept_for_backward(run: Run, model: torch.nn.Module) -> int:
    """Bytes of distinct storages, the model's parameters apart, that autograd keeps between forward and backward."""
    kept: dict[int, int] = {}
    given = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def times(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each run, all of them once in every round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}  # the first round warms up


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Plain text, columns aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [title]
    for row in [header, *rows]:
        lines.append(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        )
    return "\n".join(lines)
