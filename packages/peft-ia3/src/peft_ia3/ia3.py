"""IA3: "infused adapter by inhibiting and amplifying inner activations".

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
https://arxiv.org/abs/2205.05638, section 3.3. One learned vector l per layer rescales activations element by
element. In the paper l sits on keys and values, softmax(Q (l_k ∘ Kᵀ) / √d) (l_v ∘ V), and inside the
feed-forward network, (l_ff ∘ γ(W₁ x)) W₂. In terms of linear layers, with h the layer's own output:

    key, value ...            y = l ∘ (W x + b)        l (out,)
    second feed-forward       y = W (l ∘ x) + b        l (in,)

Both are changes of the weight, so merging is exact: W' = diag(l) W, b' = l ∘ b, or W' = W diag(l).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeGuard

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from peft_core.adapter import Adapter, as_compute
from peft_core.architectures import model_type_of, role_names
from peft_core.combining import CombineSource
from peft_core.config import AdapterConfig, Names, TargetedConfig
from peft_core.errors import CombineError, TargetError
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, ConvLayer, LinearLayer, Params
from peft_core.link import Link
from peft_core.patterns import NameMatcher
from peft_core.records import AdapterState


class IA3Config(TargetedConfig):
    """Which layers are rescaled, and which of them at their input.

    `feedforward_modules` names the targets whose input is rescaled, in the forms of `target_modules`: a list
    of names, or a regular expression for the whole path. The others are rescaled at their output. Not given,
    it is those of the targets that are the model's down projections; an empty list means none.
    `init_ia3_weights=False` starts from N(0, 1) instead of ones. `fan_in_fan_out` is kept for files of other
    writers: how a layer stores its weight is seen from the layer.
    """

    peft_type: ClassVar[str] = "IA3"
    default_roles: ClassVar[tuple[str, ...]] = ("key", "value", "down")
    # What HF PEFT chose for these, kept so that a config without targets means the same to both.
    default_roles_for: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(
            ("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama4", "phi", "qwen2", "qwen3"),
            ("query", "value", "down"),
        ),
        "opt": ("query", "key", "down"),
        "mt5": ("key", "value", "up"),
    }
    # Fields that other readers of the file do not know.
    written_if_set: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: str | Names | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    @field_validator("feedforward_modules")
    @classmethod
    def _feedforward_names(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is not None and not (all(value) if isinstance(value, tuple) else value):
            raise ValueError("the empty string names nothing; give an empty list for no feed-forward layers")
        return tuple(dict.fromkeys(value)) if isinstance(value, tuple) else value

    @model_validator(mode="after")
    def _feedforward_within_targets(self) -> IA3Config:
        names, targets = self.feedforward_modules, self.target_modules
        if isinstance(names, tuple) and isinstance(targets, tuple):
            ends = tuple(f".{target}" for target in targets)
            extra = [name for name in names if name not in targets and not name.endswith(ends)]
            if extra:
                raise ValueError(
                    f"feedforward_modules names {extra}, which target_modules does not. Feed-forward layers are "
                    "targets that are rescaled at their input: name them in both"
                )
        return self


@hookimpl
def peft_config() -> type[IA3Config]:
    return IA3Config


@hookimpl
def peft_resolve(config: IA3Config, model: nn.Module, matched: Mapping[str, nn.Module]) -> IA3Config | None:
    """Without `feedforward_modules`: the down projections among the targets, in the targets' own words if
    possible."""
    if config.feedforward_modules is not None:
        return None
    roles = role_names(model_type_of(model), ("down",))
    if roles is None:
        raise TargetError(
            "feedforward_modules is not given, and what the feed-forward layers of this model are called is not "
            "known. Name the targets whose input is to be rescaled, or give feedforward_modules=[] to rescale "
            "outputs only"
        )
    down_names = NameMatcher(roles, what="roles", trusted=True)
    down = {path for path in matched if down_names.matches(path)}
    if isinstance(roles, str) or not isinstance(config.target_modules, tuple):
        return config.resolve(feedforward_modules=roles if down else ())
    chosen: list[str] = []
    for name in (*config.target_modules, *roles):
        names = NameMatcher((name,), what="target_modules", trusted=True)
        paths = {path for path in matched if names.matches(path)}
        if paths and paths <= down:
            chosen.append(name)
            down -= paths
    return config.resolve(feedforward_modules=chosen)


@hookimpl
def peft_prepare(config: IA3Config, layers: Sequence[BaseLayer], trusted: bool) -> None:
    """Refuse names of feed-forward layers that none of the targets answers to."""
    names = NameMatcher(config.feedforward_modules or (), what="feedforward_modules", trusted=trusted)
    names.matches(*(layer.path for layer in layers))
    if trusted and names.unmatched():
        raise TargetError(f"feedforward_modules: {names.unmatched()} match none of the targeted modules")


@hookimpl
def peft_combine(
    sources: Sequence[CombineSource], how: str, config: AdapterConfig | None, options: Mapping[str, Any]
) -> AdapterState | None:
    """Σ wᵢ lᵢ, as HF PEFT has it; or, by "linear", the vectors that add up the deltas: 1 + Σ wᵢ (lᵢ - 1)."""
    if how not in ("", "linear"):
        return None
    if options:
        raise CombineError(f"vectors of IA3 are combined without options, not with {sorted(options)}")
    if config is not None:
        raise CombineError(f"adapters of IA3 become one with the same settings; leave out the {type(config).__name__}")
    vectors: dict[str, dict[str, Tensor]] = {}
    inputs = set()
    for place in dict.fromkeys(place for source in sources for place in source.adapters):
        there = [source.adapters.get(place) for source in sources]
        sides = {adapter.feedforward if isinstance(adapter, IA3Adapter) else None for adapter in there if adapter}
        if len(sides) > 1 or None in sides:
            raise CombineError(f"{place}: the adapters are not all IA3's, or do not all rescale the same side of it")
        if sides == {True}:
            inputs.add(place)
        example = next(adapter.ia3_l for adapter in there if isinstance(adapter, IA3Adapter))
        ones = torch.ones_like(example)  # what an adapter that leaves this layer alone has
        rest = ones * (1 - sum(source.weight for source in sources)) if how else torch.zeros_like(example)
        for source, adapter in zip(sources, there, strict=True):
            rest = rest + source.weight * (adapter.ia3_l.detach() if isinstance(adapter, IA3Adapter) else ones)
        vectors[place] = {"ia3_l": rest}
    made = sources[0].config.resolve(target_modules=tuple(vectors), feedforward_modules=tuple(sorted(inputs)))
    return AdapterState(made, vectors)


@hookimpl
def peft_build(config: IA3Config, layer: BaseLayer, tensors: Mapping[str, Tensor] | None) -> IA3Adapter:
    names = NameMatcher(config.feedforward_modules or (), what="feedforward_modules", trusted=False)
    feedforward = names.matches(layer.path)
    if tensors and "ia3_l" in tensors and is_linear(layer):
        # HF PEFT takes "fc" for a name of "prefc" too: what a file of it means is seen from the tensor's
        # shape.
        output, input = ((layer.out_features, 1), (1, layer.in_features))
        if output != input and tuple(tensors["ia3_l"].shape) in (output, input):
            feedforward = tuple(tensors["ia3_l"].shape) == input
    return IA3Adapter(layer, feedforward, ones=config.init_ia3_weights)


def is_linear(layer: BaseLayer) -> TypeGuard[LinearLayer]:
    """Whether the layer is linear, whatever stores its weight: an extension's view is of its own class."""
    return layer.kind == "linear"


class IA3Adapter(Adapter):
    """One vector on one `nn.Linear`, `Conv1D` or convolution: at its input (`feedforward`) or at its output.

    `ia3_l` has the shape of HF PEFT's files: (1, in) or (out, 1) for linear layers, (1, channels, 1, ...) for
    convolutions. Raises `TargetError` for a layer of another kind.
    """

    def __init__(self, layer: BaseLayer, feedforward: bool, ones: bool = True) -> None:
        super().__init__(layer)
        if isinstance(layer, ConvLayer):
            spatial = (1,) * len(layer.kernel_size)
            self.size = layer.in_features if feedforward else layer.out_features
            shape = (1, self.size, *spatial)
            # Without the batch axis, so that unbatched inputs keep their rank.
            self.broadcast = (self.size, *spatial)
        elif is_linear(layer):
            self.size = layer.in_features if feedforward else layer.out_features
            shape = (1, self.size) if feedforward else (self.size, 1)
            self.broadcast = (self.size,)
        else:
            raise layer.refuse("IA3 rescales the input or output of linear and convolution layers, not of this one")
        self.feedforward = feedforward
        self.starts_as_base = ones
        self.ia3_l = layer.parameter(*shape)

    def reset_parameters(self) -> None:
        if self.starts_as_base:
            nn.init.ones_(self.ia3_l)
        else:
            nn.init.normal_(self.ia3_l)

    def values_like(self, other: Adapter | None) -> Mapping[str, Tensor]:
        if other is None:
            return {"ia3_l": torch.ones_like(self.ia3_l)}
        if isinstance(other, IA3Adapter) and other.feedforward is self.feedforward:
            return other.state()
        return super().values_like(other)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        if self.feedforward:
            x, *rest = args
            return base(x * self._scale(x), *rest, **kwargs)
        out = base(*args, **kwargs)
        return out * self._scale(out)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """One product with the vectors of all rows."""
        first: IA3Adapter = adapters[0]
        if not args or any(adapter.feedforward is not first.feedforward for adapter in adapters):
            return NotImplemented
        x, *rest = args

        def scaled(tensor: Tensor) -> Tensor:
            def make() -> Tensor:
                own = [as_compute(adapter.ia3_l, tensor).flatten() for adapter in adapters]
                return torch.stack([*own, torch.ones_like(own[0])])[index]

            key = base.request.rows, len(index), tensor.dtype
            scale = base.remembered("ia3 rows", key, [adapter.ia3_l for adapter in adapters], make)
            axes = tensor.dim() - 1 - len(first.broadcast)
            return tensor * scale.view(len(index), *(1,) * axes, *first.broadcast)

        return base(scaled(x), *rest, **kwargs) if first.feedforward else scaled(base(x, *rest, **kwargs))

    def merge(self, params: Params) -> Params:
        weight = params["weight"]
        scale = as_compute(self.ia3_l, weight).flatten()
        if not self.feedforward:
            merged = {**params, "weight": weight * scale.view(-1, *(1,) * (weight.dim() - 1))}
            if "bias" in params:
                merged["bias"] = params["bias"] * as_compute(scale, params["bias"])
            return merged
        # (out, in / groups, *kernel): the rows of group g read the g-th slice of the input channels.
        groups = self.layer.groups if isinstance(self.layer, ConvLayer) else 1
        rows = weight.reshape(groups, -1, *weight.shape[1:])
        columns = scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
        return {**params, "weight": (rows * columns).flatten(0, 1)}

    def _scale(self, like: Tensor) -> Tensor:
        """l in the dtype of the activations, shaped to broadcast over their last or channel axis."""
        return as_compute(self.ia3_l.view(self.broadcast), like)
