"""The hooks of LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.biases import is_bias, own_bias
from peft_core.calibration import Batches
from peft_core.errors import ConfigError, TargetError
from peft_core.hookspecs import hookimpl
from peft_core.layers import (
    AttentionLayer,
    BaseLayer,
    ConvLayer,
    EmbeddingLayer,
    LinearLayer,
    SiteRequest,
    is_conv1d,
)
from peft_core.records import AdapterState, Structure

from . import starts
from .alora import ActivatedLora
from .attention import LoraAttention
from .combining.combination import peft_combine
from .config import FROM_DATA, LoraConfig, is_anchored
from .conv import LoraConv
from .dora import Dora
from .embedding import LoraEmbedding, TiedEmbedding, TiedLinear
from .linear import LoraLinear
from .lowrank import LowRank
from .parameters import LoraParameter
from .qalora import QaLora
from .replication import replicated
from .selection import FORM, PARAMETER, ROWS, TIED_ROWS, extra_sites
from .settings import Patterns, Settings, check_file
from .tokens import own_rows, tied_rows

__all__ = ["LoraConfig", "peft_combine"]


class Prepared:
    """What is known before the adapters are built, and the adapters that others refer to."""

    def __init__(self, patterns: Patterns) -> None:
        self.patterns = patterns
        self.adapters: dict[str, Adapter] = {}
        self.tied: dict[str, str] = {}


@hookimpl
def peft_config() -> type[LoraConfig]:
    return LoraConfig


@hookimpl
def peft_resolve(config: LoraConfig, matched: Mapping[str, nn.Module]) -> LoraConfig | None:
    """Other readers go by `fan_in_fan_out`: say there how the matched layers store their weights."""
    transposed = any(is_conv1d(module) for module in matched.values())
    linear = [(path, module) for path, module in matched.items() if isinstance(module, nn.Linear)]
    if config.fan_in_fan_out and linear and not transposed:
        path, module = linear[0]
        warnings.warn(
            f"fan_in_fan_out=True, but {path} ({type(module).__name__}) stores its weight as (out, in). How "
            "a layer stores its weight is seen from the layer; the setting is taken as False.",
            stacklevel=2,
        )
    elif config.fan_in_fan_out == transposed or not (transposed or linear):
        return None
    return config.resolve(fan_in_fan_out=transposed)


@hookimpl
def peft_structure(config: LoraConfig, model: nn.Module) -> Structure | None:
    return None if config.layer_replication is None else replicated(model, config.layer_replication)


@hookimpl
def peft_sites(config: LoraConfig, model: nn.Module, matched: Mapping[str, nn.Module]) -> list[SiteRequest]:
    return extra_sites(config, model, tuple(matched))


@hookimpl
def peft_calibrate(config: LoraConfig, layers: Sequence[BaseLayer], batches: Batches) -> AdapterState | None:
    """Where the config asks for a start from data, that start."""
    if config.init_lora_weights not in FROM_DATA:
        raise ConfigError(
            f"calibration batches were given, but init_lora_weights={config.init_lora_weights!r} does not start from "
            f"data; leave them out, or choose one of {', '.join(FROM_DATA)}"
        )
    return starts.from_data(config, whole(layers), batches)


@hookimpl
def peft_prepare(config: LoraConfig, layers: Sequence[BaseLayer], shared: nn.Module, trusted: bool) -> None:
    prepared = Prepared(Patterns(config, trusted))
    shared.__dict__["prepared"] = prepared
    for layer in layers:
        prepared.patterns.settings(_pattern_path(layer))
    if trusted and (unmatched := prepared.patterns.unmatched()):
        raise TargetError("; ".join(unmatched))
    if config.ensure_weight_tying:
        owners: dict[int, str] = {}
        for layer in whole(layers):
            if isinstance(layer, EmbeddingLayer):
                owner = owners.setdefault(id(layer.module.weight), layer.path)
                if owner != layer.path:
                    prepared.tied[layer.path] = owner
        for layer in whole(layers):
            if isinstance(layer, LinearLayer) and id(layer.module._parameters["weight"]) in owners:
                prepared.tied[layer.path] = owners[id(layer.module._parameters["weight"])]
        if prepared.tied and config.use_dora:
            raise TargetError("ensure_weight_tying: two tied layers cannot have norms in common; leave out use_dora")
        if prepared.tied and is_anchored(config.init_lora_weights):
            raise TargetError(
                f"ensure_weight_tying: init_lora_weights={config.init_lora_weights!r} is not there for tied layers; "
                "use True, or adapt one of them only"
            )


@hookimpl
def peft_build(
    config: LoraConfig, layer: BaseLayer, shared: nn.Module, tensors: Mapping[str, Tensor] | None
) -> Adapter:
    prepared: Prepared = shared.__dict__["prepared"]
    meta = layer.request.meta
    form = meta.get(FORM)
    if is_bias(layer):
        return own_bias(layer)
    if form == TIED_ROWS:
        return tied_rows(layer, meta["indices"], prepared.adapters, meta["of"])
    if form == ROWS:
        adapter = prepared.adapters[layer.path] = own_rows(layer, meta["indices"])
        return adapter
    if layer.path in prepared.tied:
        tied = TiedLinear if isinstance(layer, LinearLayer) else TiedEmbedding
        return tied(layer, prepared.adapters, prepared.tied[layer.path])
    settings = prepared.patterns.settings(_pattern_path(layer))
    name = "lora_embedding_A" if layer.kind == "embedding" else "lora_A"
    from_data = tensors is not None and name in tensors and config.init_lora_weights in FROM_DATA
    if tensors is None or from_data or settings.anchored:
        starts.check(layer, settings, parameter=form == PARAMETER, given=tensors is not None)
    if form == PARAMETER:
        stored = layer.module.get_parameter(layer.request.names[0])
        check_file(layer, tensors, "lora_A.weight", settings.r * (stored.shape[0] if stored.dim() == 3 else 1))
        return LoraParameter(layer, settings)
    key = name if layer.kind == "embedding" else f"{name}.weight"
    unanchored = False
    if settings.init == "loftq" and tensors is not None:
        starts.check_file(config, layer)
    if settings.anchored and tensors is not None and not from_data:
        unanchored = key in tensors and tensors[key].dim() > 0 and tensors[key].shape[0] == settings.r
        if unanchored:
            starts.check_file(config, layer)
        else:
            check_file(layer, tensors, key, 2 * settings.r)
    else:
        check_file(layer, tensors, key, settings.r)
    adapter = _build(config, layer, settings, loading=tensors is not None)
    low_rank = adapter.lora if isinstance(adapter, (Dora, ActivatedLora)) else adapter
    if isinstance(low_rank, LowRank):
        low_rank.unanchored = unanchored
    if settings.init == "mica":
        _freeze_b(adapter)
    if layer.kind == "embedding":
        prepared.adapters[layer.path] = adapter
    return adapter


@hookimpl
def peft_state_key(key: str) -> str:
    """Files have "lora_A.weight" for a slot "lora_A", and nest what belongs to an inner output projection."""
    outer, _, last = key.rpartition(".")
    prefix = f"base_layer.{outer}." if outer else ""
    return prefix + _KEYS.get(last, last)


_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}


def _build(config: LoraConfig, layer: BaseLayer, settings: Settings, loading: bool) -> Adapter:
    if layer.kind != "linear" and (config.use_qalora or config.alora_invocation_tokens):
        name = "use_qalora" if config.use_qalora else "alora_invocation_tokens"
        raise layer.refuse(f"{name} is for linear layers; exclude it")
    if isinstance(layer, AttentionLayer):
        if config.use_dora:
            raise layer.refuse("use_dora is for linear layers, convolutions and embeddings; exclude it")
        if settings.dropout and not loading:
            raise layer.refuse(
                "its weights are read by one kernel, so lora_dropout cannot be put before them; set lora_dropout=0 or "
                "exclude it"
            )
        return LoraAttention(layer, settings)
    lora: LoraLinear | LoraConv | LoraEmbedding
    if isinstance(layer, EmbeddingLayer):
        if config.lora_bias:
            raise layer.refuse("lora_bias is for linear layers and convolutions; exclude it")
        lora = LoraEmbedding(layer, settings)
    elif isinstance(layer, ConvLayer):
        lora = LoraConv(layer, settings)
    elif config.use_qalora:
        return QaLora(layer, settings, config.qalora_group_size)
    elif layer.kind == "linear":
        lora = LoraLinear(layer, settings)
        if config.alora_invocation_tokens:
            return ActivatedLora(layer, lora, config.alora_invocation_tokens)
    else:
        raise layer.refuse(
            "LoRA adapts linear layers, convolutions, embeddings and nn.MultiheadAttention; name single parameters of "
            "other modules in target_parameters"
        )
    return Dora(layer, lora) if config.use_dora else lora


def _freeze_b(adapter: Adapter) -> None:
    """MiCA trains A alone: B holds directions of the base's weight."""
    for name, parameter in adapter.named_parameters():
        if name.rpartition(".")[2] in ("lora_B", "lora_embedding_B"):
            parameter.requires_grad_(False)


def whole(layers: Sequence[BaseLayer]) -> list[BaseLayer]:
    """The layers that get factors of their own, and not one of their parameters or some rows."""
    return [layer for layer in layers if FORM not in layer.request.meta and not is_bias(layer)]


def _pattern_path(layer: BaseLayer) -> str:
    if layer.request.meta.get(FORM) == PARAMETER:
        return f"{layer.path}.{layer.request.names[0]}"
    return layer.path
