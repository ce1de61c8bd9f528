"""What A and B of LoRA start from.

Random values (`settings.start`); the base's weight (`pissa`, `olora`, `mica`); or data (`eva`, `corda`, `lora_ga`).
`loftq` sets factors that are there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from peft_core.calibration import Batches
from peft_core.errors import ConfigError
from peft_core.layers import BaseLayer, ConvLayer, EmbeddingLayer
from peft_core.records import AdapterState
from peft_lora.config import FROM_DATA, NITER, LoraConfig
from peft_lora.settings import Patterns, Settings, start

from . import corda, eva, lora_ga, mica, olora, pissa
from .weight import matrix, shape

if TYPE_CHECKING:
    from peft_lora.lowrank import LowRank

# Kinds of layers by start; a start that is not here is for all of them.
_MATRICES = ("linear", "conv", "embedding")
KINDS: dict[str, tuple[str, ...]] = {
    "orthogonal": ("linear", "attention"),
    "pissa": _MATRICES,
    "olora": _MATRICES,
    "mica": _MATRICES,
    "eva": ("linear",),
    "corda": ("linear",),
    "lora_ga": ("linear",),
}
FROM_WEIGHT = ("pissa", "olora", "mica")


def family(init: str) -> str:
    """The start without its own parameters: "pissa" for "pissa_niter_4"."""
    return "pissa" if NITER.fullmatch(init) else init


def check(layer: BaseLayer, settings: Settings, *, parameter: bool, given: bool) -> None:
    """Whether this start is possible at this layer.

    `parameter`: it is for a single parameter and not for the layer; `given`: there are values from data.

    Raises `TargetError` for a layer of another kind or a rank that is too large, `ConfigError` for a start that needs
    what it was not given.
    """
    if isinstance(settings.init, bool):
        return
    name = family(settings.init)
    kinds = KINDS.get(name)
    if kinds is not None and (parameter or layer.kind not in kinds):
        what = "a single parameter" if parameter else "this one"
        raise layer.refuse(
            f"init_lora_weights={settings.init!r} is for layers of kind {' or '.join(kinds)}, not {what}"
        )
    if name == "orthogonal" and settings.r % 2:
        raise layer.refuse(f"init_lora_weights='orthogonal' needs an even rank, not {settings.r}")
    if name == "loftq":
        raise ConfigError(
            f"{layer.path}: init_lora_weights='loftq' would have to quantise the base, which is never written. Load "
            "the base quantised, adapt it with init_lora_weights=True, and give the full-precision weights to "
            "peft_lora.replace_lora_weights_loftq(model, weights)"
        )
    if name in FROM_DATA and not given and layer.device.type != "meta":  # a plan is made without data
        raise ConfigError(
            f"{layer.path}: init_lora_weights={settings.init!r} starts from data; give batches: "
            "get_peft_model(model, config, calibration=batches)"
        )
    if name in (*FROM_WEIGHT, *FROM_DATA):
        if isinstance(layer, ConvLayer) and layer.groups > 1:
            raise layer.refuse(
                f"init_lora_weights={settings.init!r} decomposes one kernel, and it has {layer.groups} groups"
            )
        rows, columns = shape(layer)
        if settings.r > min(rows, columns):
            raise layer.refuse(
                f"init_lora_weights={settings.init!r} has at most {min(rows, columns)} directions in a weight of "
                f"{rows} × {columns}, and the rank is {settings.r}; lower it (rank_pattern), or exclude the layer"
            )


def check_file(config: LoraConfig, layer: BaseLayer) -> None:
    """Whether a file without the starting factors can be read. Raises `ConfigError`.

    HF PEFT takes PiSSA's and OLoRA's starting factors out of the base again whenever such a file is loaded; they
    depend on the base alone. Those of the other starts cannot be found again.
    """
    if config.init_lora_weights not in ("pissa", "olora"):
        raise ConfigError(
            f"{layer.path}: the file was written by a training that changed the base's weights at its start "
            f"(init_lora_weights={config.init_lora_weights!r}), and its tensors count from there. What was changed is "
            "not in the file and cannot be computed from the base. Convert it to plain LoRA where it was trained: HF "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) writes one that loads anywhere."
        )


def begin(adapter: LowRank) -> None:
    """Fill A and B with starting values, and A0 and B0 with the same ones."""
    settings = adapter.settings
    if adapter.a.is_meta:  # a plan: nothing has values
        return
    if isinstance(settings.init, str) and family(settings.init) in FROM_WEIGHT:
        a, b = from_weight(adapter)
        adapter.a.copy_(a)
        adapter.b.copy_(b)
    else:
        # Where values from data come, the core puts them over these.
        init = True if settings.init in FROM_DATA else settings.init
        start(adapter.a, adapter.b, getattr(adapter, "lora_bias", None), init, settings.r)
    adapter.drop_anchor()


def taken_out(adapter: LowRank) -> tuple[Tensor, Tensor]:
    """A0 and B0 that HF PEFT took out of the base: none of an embedding, where it leaves such starts alone."""
    if isinstance(adapter.layer, EmbeddingLayer):
        table = adapter.layer.params()["weight"]
        return table.new_zeros(adapter.a.shape), table.new_zeros(adapter.b.shape)
    return from_weight(adapter)


def from_weight(adapter: LowRank) -> tuple[Tensor, Tensor]:
    """A (r, ...) and B (out, r, ...) from the layer's own weight, in float32 or wider.

    Raises `CheckpointError` where the weight has no values.
    """
    settings, layer = adapter.settings, adapter.layer
    assert isinstance(settings.init, str)
    weight = matrix(layer)
    name = family(settings.init)
    if name == "pissa":
        niter = int(settings.init.rpartition("_")[2]) if settings.init != name else None
        a, b = pissa.factors(weight, settings.r, settings.scaling, niter)
    elif name == "olora":
        a, b = olora.factors(weight, settings.r)
    else:
        a, b = mica.factors(weight, settings.r)
    return a.reshape(adapter.a.shape), b.reshape(adapter.b.shape)


def from_data(config: LoraConfig, layers: Sequence[BaseLayer], batches: Batches) -> AdapterState:
    """The start of each layer from the user's batches, and what they make of the config.

    Raises `TargetError` for layers that the start is not for, `ConfigError` for batches that do not serve.
    """
    patterns = Patterns(config, trusted=True)
    for layer in layers:
        check(layer, patterns.settings(layer.path), parameter=layer.kind == "module", given=True)
    if config.init_lora_weights == "eva":
        return eva.calibrate(config, layers, batches)
    if config.init_lora_weights == "corda":
        return corda.calibrate(config, layers, batches)
    return lora_ga.calibrate(config, layers, batches)
