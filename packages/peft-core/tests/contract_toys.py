"""Toy methods for the contract suite's own test: right ones, and ones that each break one promise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import Adapter, AdapterConfig, BaseLayer, DeltaAdapter, TargetedConfig, WeightAdapter, hookimpl
from peft_core.adapter import as_compute
from peft_core.layers import LinearLayer, Params, SiteRequest
from peft_core.link import Link


class ToyConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOY"

    r: int = 4


class TaskConfig(ToyConfig):
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)


class ForgetfulConfig(ToyConfig):
    """Wrong: a field that does not come back from a file."""

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "r": 4}


class WritingConfig(ToyConfig):
    """Wrong: a changed copy changes the original too."""

    def resolve(self, **updates: Any) -> Any:
        self.__dict__["task_type"] = "CAUSAL_LM"
        return super().resolve(**updates)


class OddConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TO-Y"

    r: int = 4


class WholeConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOY"


class LowRank(DeltaAdapter):
    """Right: y = base(x) + x A B, starting from B = 0."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer)
        if not isinstance(layer, LinearLayer):
            raise layer.refuse("the toy adapts linear layers")
        self.down = layer.parameter(layer.in_features, config.r)
        self.up = layer.parameter(config.r, layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up)

    def delta(self, x: Tensor) -> Tensor:
        return x @ as_compute(self.down, x) @ as_compute(self.up, x)

    def weight_delta(self) -> Tensor:
        return (self.down @ self.up).t()


class Gain(WeightAdapter):
    """Right: the rows of the weight and the bias, rescaled; with a forward of its own."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer)
        if not isinstance(layer, LinearLayer):
            raise layer.refuse("the toy adapts linear layers")
        self.gain = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def merge(self, params: Params) -> Params:
        merged = {**params, "weight": params["weight"] * as_compute(self.gain, params["weight"])[:, None]}
        if "bias" in params:
            merged["bias"] = params["bias"] * as_compute(self.gain, params["bias"])
        return merged


class Doubling(LowRank):
    """Right, and a trap: it has a delta, but its forward is more than base and delta."""

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(base, *args, **kwargs)

    def merge(self, params: Params) -> Params:
        return {name: 2 * tensor for name, tensor in super().merge(params).items()}

    starts_as_base = False


class Centred(LowRank):
    """Right, if it says `rowwise = False`: a row's output depends on the other rows."""

    rowwise = False

    # Not by `delta`: at linear layers that sees all rows and positions as one list.
    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        return base(x) + self.delta(x - x.mean(0, keepdim=True))

    def merge(self, params: Params) -> Params:
        return Adapter.merge(self, params)


class MergesRoughly(LowRank):
    """Right: it says that its merge is an approximation."""

    merge_is_approximate = "one part in a hundred is left out"

    def weight_delta(self) -> Tensor:
        return 0.99 * super().weight_delta()


class Biased(LowRank):
    """Right: it trains a bias, which not every layer has, and does not merge into layers that narrow."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer, config)
        if layer.bias is None:
            raise layer.refuse("the toy needs a bias")

    def merge(self, params: Params) -> Params:
        return Adapter.merge(self, params) if len(self.down) > self.up.shape[1] else super().merge(params)


class NormGain(WeightAdapter):
    """Right: gains of norms."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer)
        if "Norm" not in type(layer.module).__name__:
            raise layer.refuse("the toy adapts norms")
        self.gain = layer.parameter(*layer.shape)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def merge(self, params: Params) -> Params:
        return {**params, "weight": params["weight"] + as_compute(self.gain, params["weight"])}


class OnBlocks(Adapter):
    """Right: a bottleneck behind a block, of which the last block leaves out one part (`unused`)."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer)
        if not hasattr(layer.module, "up") and not hasattr(layer.module, "mlp"):
            raise layer.refuse("the toy adapts blocks")
        width = 16
        self.is_last = layer.path != "blocks.0"
        self.down, self.up = layer.parameter(width, config.r), layer.parameter(config.r, width)
        self.update = layer.parameter(width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.update)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return self.behind(base(*args, **kwargs))

    def behind(self, out: Tensor) -> Tensor:
        out = out + torch.tanh(out @ as_compute(self.down, out)) @ as_compute(self.up, out)
        return out if self.is_last else out + as_compute(self.update, out)

    # A block that keeps keys and values in a cache must run on the whole batch.
    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        for number, adapter in enumerate(adapters):
            rows = (index == number).nonzero()[:, 0]
            out = out.index_copy(0, rows, adapter.behind(out[rows]))
        return out


class PerTask(LowRank):
    """Right: a gain that each row chooses by its task."""

    additive = False

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer, config)
        self.gains = layer.parameter(3, config.r)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gains)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        gains = as_compute(self.gains, x)[base.call.rows("task_ids", len(x))]
        gains = gains.view(len(x), *(1,) * (x.dim() - 2), -1) if x.dim() > 1 else gains
        return base(x) + (x @ as_compute(self.down, x)) * gains @ as_compute(self.up, x)

    def merge(self, params: Params) -> Params:
        return Adapter.merge(self, params)

    def merge_for(self, params: Params, task: int) -> Params:
        return {**params, "weight": params["weight"] + ((self.down * self.gains[task]) @ self.up).t()}


class OnTheModel(Adapter):
    """Right: a gain on what the whole model gives; a model with a cache cannot be run on some rows."""

    rowwise = False

    def __init__(self, layer: BaseLayer, config: WholeConfig) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        if isinstance(out, Tensor):
            return out * (1 + as_compute(self.gain, out))
        out["logits"] = out["logits"] * (1 + as_compute(self.gain, out["logits"]))
        return out


class FrozenDown(LowRank):
    """Right: half of it is drawn at the start and stays."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer, config)
        self.down.requires_grad_(False)
        self.register_buffer("sizes", torch.empty(config.r, dtype=self.down.dtype, device=self.down.device))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.sizes.uniform_(0.5, 1.5)

    def delta(self, x: Tensor) -> Tensor:
        return x @ as_compute(self.down * self.sizes, x) @ as_compute(self.up, x)

    def weight_delta(self) -> Tensor:
        return ((self.down * self.sizes) @ self.up).t()


class Penalised(LowRank):
    """Right: it adds a term to the loss."""

    def losses(self) -> dict[str, Tensor]:
        return {"size": self.penalty()}

    def penalty(self) -> Tensor:
        return self.down.square().sum()


# -- each of these breaks one promise ----------------------------------------------------------------------------


class MergesInPlace(LowRank):
    def merge(self, params: Params) -> Params:
        params["weight"].add_(self.weight_delta())
        return params


class MergesWrongly(LowRank):
    def weight_delta(self) -> Tensor:
        return 1.01 * super().weight_delta()


class LosesInner(Gain):
    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return self.layer.call(self.merge(self.layer.params()), *args, **kwargs)


class ClaimsToBeAdditive(Doubling):
    pass


ClaimsToBeAdditive.additive = True


class CutsGradient(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        return x @ as_compute(self.down.detach(), x) @ as_compute(self.up, x)


class Remembers(LowRank):
    calls = 0

    def delta(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().delta(x) * self.calls


class MixesRows(Centred):
    rowwise = True


class ForgetsToSave(LowRank):
    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer, config)
        self.__dict__["mask"] = torch.rand(config.r, dtype=torch.float64)

    def delta(self, x: Tensor) -> Tensor:
        return (x @ as_compute(self.down * self.mask, x)) @ as_compute(self.up, x)

    def weight_delta(self) -> Tensor:
        return ((self.down * self.mask) @ self.up).t()


class WritesIntoTheBase(LowRank):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.layer.weight.mul_(1.01)


class CastsUp(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        return x.to(self.down.dtype) @ self.down @ self.up


class BranchesOnValues(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) if bool(x.sum() > 0) else super().delta(x) * 1


class StartsSomewhere(LowRank):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.normal_(self.up)


class StartsNowhere(LowRank):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)


class TakesAnyLayer(LowRank):
    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        Adapter.__init__(self, layer)
        self.down = layer.parameter(1, 1)
        self.up = layer.parameter(1, 1)


class DoesNothing(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * 0

    def weight_delta(self) -> Tensor:
        return super().weight_delta() * 0


class ThawsTheBase(LowRank):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.layer.module.weight.requires_grad_(True)

    def delta(self, x: Tensor) -> Tensor:
        self.layer.module.weight.requires_grad_(True)
        return super().delta(x)


class MergesIntoTheModule(LowRank):
    def merge(self, params: Params) -> Params:
        self.layer.module.weight.data.add_(1)
        return super().merge(params)


class FreezesLate(LowRank):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.down.requires_grad_(False)


class HoldsALock(LowRank):
    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer, config)
        self.lock = threading.Lock()


class WantsItsDtype(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        hidden = x @ as_compute(self.down, x)
        index = torch.arange(len(hidden))
        return hidden.index_add(0, index, torch.zeros_like(hidden, dtype=x.dtype)) @ as_compute(self.up, x)


class LooksAtValues(LowRank):
    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer, config)
        if float(layer.weight.sum()) > 1e9:
            raise layer.refuse("its weights are too large")


class ReturnsNothing(LowRank):
    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        super().forward(base, *args, **kwargs)


class PenaltyIsInfinite(Penalised):
    def penalty(self) -> Tensor:
        return (self.up * 0).sum().log()


class PenaltyHasNoGradient(Penalised):
    def penalty(self) -> Tensor:
        return super().penalty().detach()


class PenaltyIsATable(Penalised):
    def penalty(self) -> Tensor:
        return self.down.square()


class DependsOnTheBatch(LowRank):
    """A form for many adapters at once that is not what each computes."""

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return out + adapters[0].delta(args[0])


class Plugin:
    """A method made of one adapter class."""

    def __init__(
        self,
        adapter_class: type[Adapter],
        keys: Mapping[str, str] = {},
        config_class: type[AdapterConfig] = ToyConfig,
    ) -> None:
        self.adapter_class = adapter_class
        self.keys = keys
        self.config_class = config_class

    @hookimpl
    def peft_config(self) -> type[AdapterConfig]:
        return self.config_class

    @hookimpl
    def peft_build(self, config: AdapterConfig, layer: BaseLayer) -> Adapter:
        made: Any = self.adapter_class
        adapter: Adapter = made(layer, config)
        return adapter

    @hookimpl
    def peft_state_key(self, key: str) -> str:
        return self.keys.get(key, key)


class WholePlugin(Plugin):
    """A method that sits at the model as a whole."""

    @hookimpl
    def peft_sites(self) -> list[SiteRequest]:
        return [SiteRequest("")]


class TrainingPlugin(Plugin):
    """The right method, with groups, and with a step that does what it is told: by default, a right one."""

    def __init__(
        self, step: Callable[[LowRank], object] = lambda adapter: adapter.up.clamp_(-1, 1), lr: Any = 0.5
    ) -> None:
        super().__init__(LowRank)
        self.step, self.lr = step, lr

    @hookimpl
    def peft_step(self, adapters: Mapping[str, LowRank], event: str) -> None:
        if event == "after":
            with torch.no_grad():
                for adapter in adapters.values():
                    self.step(adapter)

    @hookimpl
    def peft_param_groups(self, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [parameter], "lr": self.lr} for parameter in parameters.values()]


class ForgetfulGroups(TrainingPlugin):
    @hookimpl
    def peft_param_groups(self, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        return super().peft_param_groups(parameters)[1:]


def new_parameter(adapter: LowRank) -> None:
    adapter.up = nn.Parameter(adapter.up.clone())


def write_into_the_base(adapter: LowRank) -> None:
    adapter.layer.module.weight.mul_(1.01)


class StepsBeside(LowRank):
    """Wrong, if steps change it: a factor that acts and is not saved."""

    factor = 1.0

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * self.factor

    def weight_delta(self) -> Tensor:
        return super().weight_delta() * self.factor


class StepsBesidePlugin(TrainingPlugin):
    @hookimpl
    def peft_build(self, config: ToyConfig, layer: BaseLayer) -> Adapter:
        return StepsBeside(layer, config)


class PerTaskPlugin(Plugin):
    """A method that merges for one task."""

    @hookimpl
    def peft_merge(self, adapter: PerTask, params: Params, arguments: Mapping[str, Any]) -> Params:
        return adapter.merge_for(params, arguments["task_ids"]) if arguments else adapter.merge(params)


def exploding(name: str, error: type[Exception] = RuntimeError) -> Plugin:
    """The right method, but that one of its hooks, or of its adapter's methods, raises."""

    def boom(self: Any) -> Any:
        raise error("boom")

    def adapters_boom(*args: Any, **kwargs: Any) -> Any:
        raise error("boom")

    hook = name.startswith("peft_")
    function: Any = boom if hook else adapters_boom
    function.__code__ = function.__code__.replace(co_name=name, co_qualname=f"Exploding.{name}")
    if hook:
        plugin: Plugin = type("ExplodingPlugin", (Plugin,), {name: hookimpl(function)})(LowRank)
        return plugin
    return Plugin(type("Exploding", (LowRank,), {name: classmethod(function) if name == "forward_rows" else function}))


PLUGINS = SimpleNamespace(
    colliding_keys=Plugin(LowRank, keys={"down": "factor", "up": "factor"}),
    forgetful_config=Plugin(LowRank, config_class=ForgetfulConfig),
    writing_config=Plugin(LowRank, config_class=WritingConfig),
    odd_name=Plugin(LowRank, config_class=OddConfig),
    per_task=PerTaskPlugin(PerTask, config_class=TaskConfig),
    trains=TrainingPlugin(),
    steps_replace=TrainingPlugin(new_parameter),
    steps_write=TrainingPlugin(write_into_the_base),
    steps_diverge=TrainingPlugin(lambda adapter: adapter.up.div_(0)),
    steps_beside=StepsBesidePlugin(lambda adapter: setattr(adapter, "factor", 2.0)),
    groups_forget=ForgetfulGroups(),
    negative_lr=TrainingPlugin(lr=-1.0),
    infinite_lr=TrainingPlugin(lr=float("inf")),
    whole=WholePlugin(OnTheModel, config_class=WholeConfig),
    **{
        name: Plugin(value)
        for name, value in list(globals().items())
        if isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == __name__
    },
)
