"""X-LoRA: a small classifier mixes trained adapters, token by token and layer by layer.

Buehler and Buehler 2024, "X-LoRA: Mixture of Low-Rank Adapter Experts", https://arxiv.org/abs/2402.07148, section 2.
A first pass through the model without adapters gives the hidden states h of the last layer; the classifier makes of
them the scalings g = softmax(f(h) / τ), (batch, length, layers, experts); in a second pass each layer computes

    y = base(x) + Σ_k w g_k (expert_k(x) - base(x)).

Experts are adapters of the model, of any method; they stay as they are, and only the classifier is trained.

With a key/value cache the first pass has one of its own. Its layers lie behind those of the caller's cache, so that
whatever reorders, repeats or crops that one does the same to both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from peft_core import (
    Adapter,
    AdapterConfig,
    BaseLayer,
    Link,
    PeftError,
    PeftModel,
    RequestError,
    SiteRequest,
    TargetError,
    as_compute,
    backbone_sites,
    base_modules,
    get_layer_status,
    hookimpl,
)
from peft_core.backbones import bind, cache_argument
from peft_core.calls import parameter_names

CONTROLLER = "controller"
_CLEAN = "_peft_clean_cache"


class XLoraConfig(AdapterConfig):
    """A classifier over the adapters named in `adapters`.

    Args:
        adapters: names of adapters of the model, in the classifier's order. A mapping of names to paths, as in other
            writers' files, is read for its names; adapters are loaded by you, with `load_adapter(path, name)`.
        hidden_size: width of the last hidden states; None for the model's.
        enable_softmax: scalings are a softmax over the experts; else the classifier's outputs themselves.
        enable_softmax_topk: with `top_k_lora`, a softmax over the chosen scalings.
        layerwise_scalings: each layer has scalings of its own.
        xlora_depth: linear layers of the classifier, with ReLU and dropout between them.
        xlora_size: its width.
        xlora_dropout_p: its dropout.
        use_trainable_adapters: experts are trained along with the classifier.
        softmax_temperature: τ.
        top_k_lora: only the largest scalings of each token and layer count.
        scaling_pass_value: kept for files; the first pass has no adapters whatever it says.
        global_scaling_weight: w.
    """

    peft_type: ClassVar[str] = "XLORA"

    hidden_size: int | None = None
    adapters: tuple[str, ...] | dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def refers_to(self) -> Sequence[str]:
        return tuple(self.adapters or ())

    @property
    def trains_referred(self) -> bool:
        return self.use_trainable_adapters

    @field_validator("xlora_depth", "xlora_size", "hidden_size", "top_k_lora")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("a positive integer")
        return value

    @field_validator("xlora_dropout_p")
    @classmethod
    def _probability(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError("a probability, from 0 to below 1")
        return value

    @field_validator("softmax_temperature")
    @classmethod
    def _temperature(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("a temperature above 0")
        return value

    @model_validator(mode="after")
    def _rules(self) -> XLoraConfig:
        experts = self.refers_to()
        if not experts:
            raise ValueError("adapters: name the adapters of the model that are to be mixed")
        if self.top_k_lora is not None and self.top_k_lora > len(experts):
            raise ValueError(f"top_k_lora={self.top_k_lora}, but there are {len(experts)} adapters")
        if self.enable_softmax and self.enable_softmax_topk:
            raise ValueError("enable_softmax_topk softens the chosen scalings; set enable_softmax=False with it")
        return self


class Classifier(nn.Module):
    """Hidden states (batch, length, d) -> scalings (batch, length, layers, experts)."""

    def __init__(self, config: XLoraConfig, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        experts, depth = len(config.refers_to()), config.xlora_depth
        self.config = config
        self.shape = (layers if config.layerwise_scalings else 1, experts)
        self.count = layers
        assert config.hidden_size is not None
        sizes = [config.hidden_size, *[config.xlora_size] * (depth - 1), self.shape[0] * experts]
        modules: list[nn.Module] = []
        for at in range(depth):
            modules.append(nn.Linear(sizes[at], sizes[at + 1], device=device, dtype=dtype))
            if at < depth - 1:
                modules.append(nn.ReLU())
                if config.xlora_dropout_p > 0:  # as in HF PEFT: the numbers of what follows depend on it
                    modules.append(nn.Dropout(config.xlora_dropout_p))
        self.layers = nn.Sequential(*modules)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.layers(as_compute(hidden, self.layers[0].get_parameter("weight"))).unflatten(-1, self.shape)
        if self.config.enable_softmax:
            out = (out / self.config.softmax_temperature).softmax(-1)
        return out.expand(*out.shape[:-2], self.count, out.shape[-1])


class Controller(Adapter):
    """At the backbone: the first pass, the classifier, and the scalings for the second.

    Its methods change how scalings are used from the next call on, and keep a log of them.
    """

    uses_call: ClassVar[bool] = True

    def __init__(self, layer: BaseLayer, config: XLoraConfig) -> None:
        super().__init__(layer)
        self.starts_as_base = False
        self.top_k = config.top_k_lora
        self.softmax_top_k = config.enable_softmax_topk
        self.global_weight = config.global_scaling_weight
        self.latest: Tensor | None = None
        self.log: list[Tensor] | None = None
        self._names = parameter_names(type(layer.module).forward)
        self._cache = cache_argument(self._names)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return self._run([(self, None)], base, args, kwargs)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """Each pass once for all rows, so that they can share a cache; each classifier sees the rows that are its."""
        first: Controller = adapters[0]
        return first._run([(each, index == number) for number, each in enumerate(adapters)], base, args, kwargs)

    def _run(self, rows: Sequence[tuple[Controller, Tensor | None]], base: Link, args: Any, kwargs: Any) -> Any:
        """Both passes. `rows` has what mixes, each with a mask of the rows (batch,) that are its; None for all."""
        given = bind(self._names, args, kwargs)
        cache = given.get(self._cache) if self._cache else None
        clean = self._clean(cache)
        with base.adapters(), torch.no_grad():
            first = base(**{**given, self._cache: clean} if cache is not None else given)
        hidden = first[0] if isinstance(first, tuple) else first["last_hidden_state"]
        for each, own in rows:
            scalings = each.shared.internal_xlora_classifier(hidden if own is None else hidden[own])
            each._note(scalings)
            base.call.scratch[each.shared] = each._chosen(scalings)
        out = base(**given)
        self._join(cache, clean, first, out)
        return out

    def _clean(self, cache: Any) -> Any:
        """The first pass's own cache, for one that the caller gave."""
        if cache is None:
            return None
        found = cache.__dict__.get(_CLEAN)
        if found is None and bool(cache.get_seq_length() != 0):
            raise RequestError(
                f"{self.layer.path or 'the model'}: the cache was filled while X-LoRA was not active, so it lacks the "
                "keys and values of the first pass; start with an empty cache"
            )
        return copy.deepcopy(cache) if found is None else found

    def _join(self, cache: Any, clean: Any, first: Any, out: Any) -> None:
        """Put the first pass's cache behind the caller's, or behind the one that the second pass made."""
        if cache is None and self._cache and isinstance(out, Mapping) and isinstance(first, Mapping):
            cache, clean = out.get(self._cache), first.get(self._cache)
        if cache is not None and clean is not None and _CLEAN not in cache.__dict__:
            cache.layers.extend(clean.layers)
            cache.__dict__[_CLEAN] = clean

    def _chosen(self, scalings: Tensor) -> Tensor:
        """The scalings as they are used: the largest alone, softened, and times the global weight."""
        if self.top_k is not None:
            kept = torch.zeros_like(scalings, dtype=torch.bool).scatter(-1, scalings.topk(self.top_k, -1).indices, True)
            if self.softmax_top_k:
                scalings = scalings.masked_fill(~kept, -torch.inf).softmax(-1)
            else:
                scalings = scalings * kept
        return scalings if self.global_weight == 1 else scalings * self.global_weight

    def _note(self, scalings: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self.latest = scalings.detach()
            if self.log is not None:
                self.log.append(scalings.detach())

    # -- for users: the names of HF PEFT -------------------------------------------------------------------------

    def set_topk_lora(self, value: int | None) -> None:
        """Let only the `value` largest scalings of each token and layer count; None for all."""
        if value is not None and not 1 <= value <= self.shared.internal_xlora_classifier.shape[1]:
            raise PeftError(f"set_topk_lora: {value} of {self.shared.internal_xlora_classifier.shape[1]} adapters")
        self.top_k = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply all scalings by `weight`."""
        self.global_weight = float(weight)

    def get_latest_scalings(self) -> Tensor | None:
        """Scalings of the last call, (batch, length, layers, experts), before top-k and the global weight."""
        return self.latest

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of every call from now on."""
        self.log = [] if self.log is None else self.log

    def disable_scalings_logging(self) -> None:
        """Stop, and forget what was kept."""
        self.log = None

    def clear_scalings_log(self) -> None:
        """Forget what was kept, and go on."""
        if self.log is not None:
            self.log = []

    def get_scalings_log(self) -> list[Tensor]:
        """What was kept. Raises `PeftError` where logging is off."""
        if self.log is None:
            raise PeftError("scalings are not logged; call enable_scalings_logging() first")
        return list(self.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """What was kept, by length of the sequence: (numbers of the calls, their scalings)."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for number, scalings in enumerate(self.get_scalings_log()):
            numbers, tensors = found.setdefault(scalings.shape[1], ([], []))
            numbers.append(number)
            tensors.append(scalings)
        return found


class Mixture(Adapter):
    """At a layer: the experts' parts, each times its scaling."""

    uses_call: ClassVar[bool] = True

    def __init__(self, layer: BaseLayer, experts: Sequence[str], index: int) -> None:
        super().__init__(layer)
        self.starts_as_base = False
        self.experts = tuple(experts)
        self.index = index

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        out: Tensor = base(*args, **kwargs)
        scalings: Tensor | None = base.call.scratch.get(self.shared)
        if scalings is None:
            raise RequestError(f"{self.layer.path}: it was called before the backbone, which makes the scalings")
        if out.shape[:2] != scalings.shape[:2]:
            raise RequestError(
                f"{self.layer.path}: its output of shape {tuple(out.shape)} has no entry for each of the "
                f"{tuple(scalings.shape[:2])} tokens that there are scalings for; mix adapters without this layer"
            )
        own = as_compute(scalings[:, :, self.index], out)
        mixed = out
        for number, expert in enumerate(self.experts):
            part = base.delta(expert, *args, out=out, **kwargs)
            if part is not None:
                mixed = torch.addcmul(mixed, part, own[..., number].view(*out.shape[:2], *(1,) * (out.dim() - 2)))
        return mixed


def xlora_controls(model: Any, adapter_name: str | None = None) -> Controller:
    """What steers a model's X-LoRA: its scalings, their log, top-k. `adapter_name` may be left out if there is one.

    Raises `PeftError` where there is none of that name.
    """
    if not isinstance(model, PeftModel):
        raise PeftError("this model has no adapters; make one with get_peft_model(model, config)")
    found = {name: c for name, c in model.peft_config.items() if isinstance(c, XLoraConfig)}
    chosen = adapter_name or (next(iter(found)) if len(found) == 1 else None)
    if chosen not in found:
        raise PeftError(f"no X-LoRA adapter {chosen!r} on this model; it has {list(found) or 'none'}")
    return next(adapter for adapter in model.get_adapters(chosen).values() if isinstance(adapter, Controller))


# ---- hooks


@hookimpl
def peft_config() -> type[XLoraConfig]:
    return XLoraConfig


@hookimpl
def peft_resolve(config: XLoraConfig, model: nn.Module) -> XLoraConfig | None:
    """The width of the hidden states, where the config leaves it open."""
    if config.hidden_size is not None:
        return None
    own: Any = getattr(model, "config", None)
    text = own.get_text_config() if hasattr(own, "get_text_config") else own
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise TargetError("hidden_size: the model does not say how wide its hidden states are; give it in the config")
    return config.resolve(hidden_size=size)


@hookimpl
def peft_sites(config: XLoraConfig, model: nn.Module) -> list[SiteRequest]:
    """The backbone, and every module that one of the experts adapts, in the model's order."""
    backbones = backbone_sites(model)
    if len(backbones) > 1:
        raise TargetError("X-LoRA mixes adapters of models with one stack of layers, not of an encoder and a decoder")
    adapted = {
        status.name for status in get_layer_status(model) if set(config.refers_to()) & set(status.available_adapters)
    }
    places = [path for path in base_modules(model) if path in adapted]
    requests = [SiteRequest(backbones[0].path, part=CONTROLLER)]
    return requests + [SiteRequest(path, meta={"index": index}) for index, path in enumerate(places)]


@hookimpl
def peft_prepare(config: XLoraConfig, layers: Sequence[BaseLayer], shared: nn.Module) -> None:
    """The classifier, shared by all layers and saved once, under the name it has in HF PEFT's files."""
    dtype = torch.promote_types(layers[0].dtype, torch.float32)
    shared.internal_xlora_classifier = Classifier(config, len(layers) - 1, layers[0].device, dtype)


@hookimpl
def peft_build(config: XLoraConfig, layer: BaseLayer) -> Adapter:
    if layer.request.part == CONTROLLER:
        return Controller(layer, config)
    return Mixture(layer, config.refers_to(), layer.request.meta["index"])
