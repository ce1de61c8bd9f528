"""LoftQ on a base that is quantised already: B A becomes the best rank-r form of what the quantisation lost.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", https://arxiv.org/abs/2310.08659,
equation 6 with one iteration: for the full-precision weight W and its quantised form Q, s B A is the rank-r truncation
of the singular value decomposition of W - Q. Further iterations would quantise W - s B A anew, which is to write the
base.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_core.errors import ConfigError, PeftError
from peft_core.layers import BaseLayer, EmbeddingLayer
from peft_core.lifecycle import require_unmerged
from peft_core.patterns import ends
from peft_core.records import AdapterRecord, state_of
from peft_lora.lowrank import LowRank

from .pissa import factors
from .weight import matrix

Weights = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: Weights | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> tuple[str, ...]:
    """Let a LoRA make up for what its base lost by being quantised; returns the paths of the layers that changed.

    Args:
        peft_model: a model with a LoRA on layers whose storage can be read (`peft_layer`).
        model_path: the weights before quantisation: a safetensors file, a directory with such files, a mapping of
            names to tensors, or a model; left out, the directory that the model was loaded from. Files are read one
            weight at a time.
        adapter_name: which adapter.
        callback: called with the model and a layer's path after each change; False takes the change back.

    Raises `ConfigError` where a weight is missing or has another shape, or where nothing could be changed; the adapter
    is then as it was.
    """
    record = _record(peft_model, adapter_name)
    adapters = {
        request.path: adapter
        for request, adapter in zip(record.requests, record.adapters, strict=True)
        if isinstance(adapter, LowRank) and adapter.anchor is None
    }
    if not adapters:
        raise ConfigError(
            f"adapter {adapter_name!r} has no plain LoRA on linear layers, convolutions or embeddings; LoftQ sets A "
            "and B of such (init_lora_weights=True, without use_dora)"
        )
    changed = []
    with _opened(peft_model, model_path) as full, torch.no_grad():
        lost = {path: _start(adapter, full) for path, adapter in adapters.items()} if callback is None else {}
        for path, adapter in adapters.items():
            found = lost[path] if callback is None else _start(adapter, full)
            if found is None:
                continue
            before = adapter.a.clone(), adapter.b.clone()
            _set(adapter, *found)
            if callback is not None and not callback(peft_model, path):
                _set(adapter, *before)
                continue
            changed.append(path)
    if not changed and callback is None:
        raise ConfigError("the base has exactly these weights, so there is nothing to make up for; is it quantised?")
    return tuple(changed)


def _start(adapter: LowRank, full: Callable[[str], Tensor]) -> tuple[Tensor, Tensor] | None:
    """A and B for one layer; None where the base has the full weight."""
    lost = _residual(adapter.layer, full)
    return factors(lost, adapter.settings.r, adapter.scaling) if lost.any() else None


def _set(adapter: LowRank, a: Tensor, b: Tensor) -> None:
    adapter.a.copy_(a.reshape(adapter.a.shape))
    adapter.b.copy_(b.reshape(adapter.b.shape))


@contextmanager
def _opened(model: nn.Module, source: Weights | None) -> Iterator[Callable[[str], Tensor]]:
    """The weights by name, read when they are asked for. Raises `ConfigError`, then also for a name that is missing."""
    if source is None:
        source = str(getattr(model, "name_or_path", "") or "")
        if not (source and Path(source).is_dir()):
            raise ConfigError(
                "the weights before quantisation are needed, and the model was not loaded from a directory; give "
                "model_path: a safetensors file, a directory of such, a mapping of names to tensors, or a model"
            )
    with ExitStack() as stack:
        readers: Mapping[str, Callable[[], Tensor]]
        if isinstance(source, (nn.Module, Mapping)):
            tensors = source.state_dict() if isinstance(source, nn.Module) else source
            readers = {name: partial(tensors.__getitem__, name) for name in tensors}
            where = "model_path"
        else:
            readers = _readers(Path(source), stack)
            where = os.fspath(source)

        def read(name: str) -> Tensor:
            # Some files lack the first parts of a name, those of the model around.
            for end in ends(name):
                if end in readers and "." in end:
                    return readers[end]()
            raise ConfigError(f"{where} has no weight {name!r}, nor one whose name is an end of it at a dot")

        yield read


def _readers(path: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: there is no .safetensors file; pickles are not read")
    found: dict[str, Callable[[], Tensor]] = {}
    try:
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            found.update({name: partial(handle.get_tensor, name) for name in handle.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return found


def _residual(layer: BaseLayer, full: Callable[[str], Tensor]) -> Tensor:
    """What the stored weight lacks of the full one, (out, in). Raises `ConfigError` for a weight of another shape."""
    kept = matrix(layer)
    weight = full(f"{layer.path}.weight").detach()
    # Files have it as the module would store it, were it not quantised.
    if getattr(layer, "transposed", False) or isinstance(layer, EmbeddingLayer):
        weight = weight.t()
    weight = weight.flatten(1)
    if weight.shape != kept.shape:
        raise ConfigError(
            f"{layer.path}: the weight before quantisation is {tuple(weight.shape)}, and the base's "
            f"{tuple(kept.shape)}; give the weights of this model"
        )
    return weight.to(kept) - kept


def _record(model: nn.Module, name: str) -> AdapterRecord:
    state = state_of(model)
    if state is None:
        raise PeftError("the model has no adapters; add a LoRA with get_peft_model first")
    require_unmerged(state, "replace_lora_weights_loftq")
    return state.record(name)
