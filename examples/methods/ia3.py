"""(IA)³, Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3: activations, rescaled by a learned vector l.

At feed-forward layers the input is rescaled, y = W (l ∘ x) + b; at all others the output, y = l ∘ (W x + b).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import model_validator
from torch import Tensor, nn

from peft_core import Adapter, BaseLayer, LinearLayer, Link, TargetedConfig, as_compute, hookimpl, role_paths


class IA3Config(TargetedConfig):
    """`feedforward_modules` are the targets that are rescaled at their input; not given, the down projections."""

    peft_type: ClassVar[str] = "IA3"
    # Fields that the class of HF PEFT lacks.
    written_if_set: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})
    default_roles: ClassVar[tuple[str, ...]] = ("key", "value", "down")

    feedforward_modules: tuple[str, ...] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    @model_validator(mode="after")
    def _feedforward_are_targets(self) -> "IA3Config":
        targets, feedforward = self.target_modules, self.feedforward_modules or ()
        if isinstance(targets, tuple) and not all(_named(name, targets) for name in feedforward):
            raise ValueError("feed-forward layers are targets too: name them in target_modules as well")
        return self


def _named(path: str, names: Sequence[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


class IA3Adapter(Adapter):
    """One vector, (1, in) at feed-forward layers and (out, 1) at others: it broadcasts over the weight."""

    def __init__(self, layer: LinearLayer, config: IA3Config) -> None:
        super().__init__(layer)
        self.feedforward = _named(layer.path, config.feedforward_modules or ())
        self.starts_as_base = config.init_ia3_weights
        shape = (1, layer.in_features) if self.feedforward else (layer.out_features, 1)
        self.ia3_l = layer.parameter(*shape)

    def reset_parameters(self) -> None:
        (nn.init.ones_ if self.starts_as_base else nn.init.normal_)(self.ia3_l)

    def forward(self, base: Link, x: Tensor) -> Any:
        if self.feedforward:
            return base(x * as_compute(self.ia3_l, x).flatten())
        y = base(x)
        return y * as_compute(self.ia3_l, y).flatten()

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = {**params, "weight": params["weight"] * self.ia3_l}
        if "bias" in params and not self.feedforward:
            merged["bias"] = params["bias"] * self.ia3_l.flatten()
        return merged


@hookimpl
def peft_config() -> type[IA3Config]:
    return IA3Config


@hookimpl
def peft_resolve(config: IA3Config, model: nn.Module, matched: Sequence[str]) -> IA3Config | None:
    if config.feedforward_modules is not None:
        return None
    names, down = config.target_modules, role_paths(model, "down")
    names = names if isinstance(names, tuple) else matched
    others = [path for path in matched if path not in down]
    return config.resolve(feedforward_modules=[n for n in names if not any(_named(path, [n]) for path in others)])


@hookimpl
def peft_build(config: IA3Config, layer: BaseLayer) -> IA3Adapter:
    if not isinstance(layer, LinearLayer):
        raise layer.refuse("this version of (IA)³ rescales linear layers")
    return IA3Adapter(layer, config)
