"""Extension points E8, the stages of a site, E9, merging, and E10, state and its mapping; traps of a site's loop.

Each is proved by toy methods that use the public API alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_core import (
    Adapter,
    AdapterConfig,
    CheckpointMismatchError,
    DeltaAdapter,
    MergeError,
    PeftModel,
    RequestError,
    SiteRequest,
    TargetedConfig,
    WeightAdapter,
    get_peft_model,
    hookimpl,
    set_peft_model_state_dict,
)
from peft_core.testing import MethodContract
from tests.toy_plugins import net, plugin, randomise, registered

ALL = ["up", "down", "head"]
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums in another order


class ToyConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYSTAGE"
    r: int = 2


def toy(adapter_class: Any, config_class: Any = ToyConfig, **hooks: Any) -> Any:
    return registered(plugin(config_class, adapter_class, **hooks))


def base() -> Any:
    return net().double()


def adapters_of(model: Any, name: str = "default") -> dict[str, Any]:
    return {path: one for path, site in model._peft.sites.items() for one in site.of(name).values()}


def logits(model: Any, x: Tensor = X, **arguments: Any) -> Tensor:
    out = model(x, **arguments)
    return out if isinstance(out, Tensor) else out.logits


def merges_exactly(model: Any, **arguments: Any) -> None:
    expected = logits(model)
    before = {name: tensor.clone() for name, tensor in model.base_state_dict().items()}
    model.merge_adapter(**arguments)
    torch.testing.assert_close(logits(model), expected, **EXACT)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_state_dict().items())
    assert torch.equal(logits(model), expected)


# -- E8: four stages ---------------------------------------------------------------------------------------------------


class Rotation(Adapter):
    """Pre: turns the input by an orthogonal matrix, W (R x)."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.skew = layer.parameter(layer.in_features, layer.in_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.skew)

    def matrix(self) -> Tensor:
        return torch.matrix_exp(self.skew - self.skew.T)

    def forward(self, base: Any, x: Tensor) -> Any:
        return base(x @ self.matrix().T)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**params, "weight": params["weight"] @ self.matrix()}


class OutputRotation(Rotation):
    """Post, and not additive: turns the output, bias included, R (W x + b)."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer, config)
        self.skew = layer.parameter(layer.out_features, layer.out_features)

    def forward(self, base: Any, x: Tensor) -> Any:
        return base(x) @ self.matrix().T

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.matrix() @ value for name, value in params.items()}


class Scaled(WeightAdapter):
    """Weight: (1 + g) W, for whatever parameters there are."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * (1 + self.gain) for name, value in params.items()}


def test_e8_pre_the_input_is_turned() -> None:
    with toy(Rotation):
        model = randomise(get_peft_model(base(), ToyConfig(target_modules=["head"])))
        turn, plain = adapters_of(model)["head"].matrix(), base()
        torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64), **EXACT)
        hidden = plain.blocks[1](plain.blocks[0](X))
        torch.testing.assert_close(logits(model), plain.head((turn @ hidden.T).T), **EXACT)


def test_e8_weight_the_parameters_are_others() -> None:
    with toy(Scaled):
        model = randomise(get_peft_model(base(), ToyConfig(target_modules=["blocks.0"])))
        by_hand = base()
        with torch.no_grad():
            for parameter in by_hand.blocks[0].parameters():
                parameter.mul_(1 + adapters_of(model)["blocks.0"].gain)
        assert torch.equal(logits(model), logits(by_hand))


class Replaced(Adapter):
    """Around: a function of its own in place of the layer, which it never calls, or calls twice."""

    calls_base: ClassVar[bool] = False

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.weight = layer.parameter(6, 6)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)

    starts_as_base = False

    def forward(self, base: Any, x: Tensor) -> Any:
        if self.calls_base:
            return (base(x @ self.weight) + base(x)) / 2
        return torch.tanh(x @ self.weight)


@pytest.mark.parametrize("calls_base", [False, True])
def test_e8_around_the_call_is_replaced(calls_base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replaced, "calls_base", calls_base)
    with toy(Replaced):
        model = randomise(get_peft_model(base(), ToyConfig(target_modules=["blocks.0"])))
        weight, plain = adapters_of(model)["blocks.0"].weight, base()
        block = plain.blocks[0]
        out = (block(X @ weight) + block(X)) / 2 if calls_base else torch.tanh(X @ weight)
        assert torch.equal(logits(model), plain.head(plain.blocks[1](out)))
        logits(model).sum().backward()
        assert adapters_of(model)["blocks.0"].weight.grad.any()
        with pytest.raises(MergeError, match="blocks.0: Replaced cannot be expressed in the base layer's weights"):
            model.merge_adapter()


class Attention(nn.Module):
    """Gives a tuple, as attention does, and takes keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None, Tensor]:
        out = self.proj(x) * scale
        return out, None, out.softmax(-1)


class TupleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out, nothing, weights = layer(norm(x), scale=0.5)
            assert nothing is None and weights.shape == out.shape
            x = x + out
        return x


class ParallelConfig(AdapterConfig):
    """Adds to the attention's output what it makes of the residual stream, which the norm before it has seen."""

    peft_type: ClassVar[str] = "TOYPARALLEL"


class Parallel(Adapter):
    uses_call: ClassVar[bool] = True

    def __init__(self, layer: Any, config: ParallelConfig) -> None:
        super().__init__(layer)
        self.index = int(layer.path.rpartition(".")[2])
        self.reads = layer.path.startswith("norms")
        self.weight = None if self.reads else layer.parameter(6, 6)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        key = (self.shared, "stream", self.index)
        if self.reads:
            base.call.scratch[key] = args[0]
            return base(*args, **kwargs)
        out, *rest = base(*args, **kwargs)
        return (out + base.call.scratch[key] @ self.weight, *rest)


def test_e8_post_tuples_and_the_input_of_another_site(tmp_path: Path) -> None:
    def make() -> TupleNet:
        torch.manual_seed(0)
        return TupleNet().double()

    places = [f"{kind}.{index}" for index in (0, 1) for kind in ("norms", "layers")]
    with toy(Parallel, ParallelConfig, peft_sites=lambda: [SiteRequest(path) for path in places]):
        model = randomise(get_peft_model(make(), ParallelConfig()))
        plain, x = make(), X
        for index in (0, 1):
            out = plain.layers[index](plain.norms[index](x), scale=0.5)[0]
            x = x + (out + x @ adapters_of(model)[f"layers.{index}"].weight)
        assert torch.equal(model(X), x)
        model.add_adapter("other", ParallelConfig())
        randomise(model, "other", seed=2)
        model.set_adapter("other")
        alone = model(X)
        mixed = model(X, adapter_names=["default", "other", "__base__"])  # each row's stream in notes of its own
        torch.testing.assert_close(mixed, torch.stack([x[0], alone[1], make()(X)[2]]), **EXACT)
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(X), x)


# -- E9: merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_class", [Rotation, OutputRotation, Scaled])
def test_e9_exact_for_what_is_not_additive_and_for_biases(adapter_class: Any) -> None:
    with toy(adapter_class):
        model = randomise(get_peft_model(base(), ToyConfig(target_modules=ALL)))
        assert not any(one.additive for one in adapters_of(model).values())
        merges_exactly(model)
        model.add_adapter("second", ToyConfig(target_modules=["head"]))
        randomise(model, "second", seed=2)
        for order in (["default", "second"], ["second", "default"]):
            model.set_adapter(order)
            merges_exactly(model)  # rotations do not commute: in the order of the stack
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, **EXACT)


class Rounded(Adapter):
    """Merged, it forgets that it acts on activations that were cut off."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(layer.in_features)
        self.merge_is_approximate = "inputs above one are cut off, which weights cannot do"

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, x: Tensor) -> Any:
        return base(x.clamp(max=1) * self.gain)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**params, "weight": params["weight"] * self.gain}


def test_e9_approximate_says_so_and_why() -> None:
    with toy(Rounded):
        model = randomise(get_peft_model(base(), ToyConfig(target_modules=["head"])))
        expected = logits(model)
        with pytest.warns(UserWarning, match="head: merging Rounded is an approximation: inputs above one are cut off"):
            model.merge_adapter()
        assert not torch.equal(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)


class TaskConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYMERGETASK"
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)


class Tasked(Adapter):
    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(3, layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, x: Tensor) -> Any:
        return base(x) * self.gain[base.call.rows("task_ids", len(x))]


def merge_of_a_task(adapter: Tasked, params: dict[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    if "task_ids" not in arguments:
        raise MergeError(f"{adapter.layer.path}: give task_ids, the task to merge for")
    gain = adapter.gain[arguments["task_ids"]]
    return {name: value * (gain[:, None] if value.dim() == 2 else gain) for name, value in params.items()}


def test_e9_merged_for_one_case_of_a_request() -> None:
    with toy(Tasked, TaskConfig, peft_merge=merge_of_a_task):
        model = randomise(get_peft_model(base(), TaskConfig(target_modules=ALL)))
        expected = logits(model, task_ids=1)
        with pytest.raises(MergeError, match="give task_ids"):
            model.merge_adapter()
        with pytest.raises(RequestError, match="'task_id', which no adapter.*Did you mean 'task_ids'"):
            model.merge_adapter(task_id=1)
        assert torch.equal(logits(model, task_ids=1), expected)  # after the refusals
        model.merge_adapter(task_ids=1)
        for given in ({}, {"task_ids": 1}, {"task_ids": [1, 1, 1]}, {"task_ids": torch.tensor([1])}):
            torch.testing.assert_close(logits(model, **given), expected, **EXACT)
        for other in (2, [1, 2, 1]):
            with pytest.raises(RequestError, match="merged for.*another task_ids"):
                model(X, task_ids=other)
        model.unmerge_adapter()
        assert torch.equal(logits(model, task_ids=1), expected)
        assert not torch.equal(logits(model, task_ids=2), expected)
        model.merge_adapter(task_ids=2)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model.merge_and_unload(task_ids=1)), expected, **EXACT)


# -- E10: state --------------------------------------------------------------------------------------------------------


class StateConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYSTATE"
    r: int = 4


class Pruned(DeltaAdapter):
    """B A x whose rank training may cut; which of the first ones are left is an integer tensor."""

    def __init__(self, layer: Any, config: StateConfig, rank: int | None = None) -> None:
        super().__init__(layer)
        rank = config.r if rank is None else rank
        self.a = layer.parameter(rank, layer.in_features)
        self.b = layer.parameter(layer.out_features, rank)
        self.register_buffer("left", torch.arange(rank, device=layer.device))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.a)
        nn.init.zeros_(self.b)

    def keep(self, chosen: list[int]) -> None:
        self.a = nn.Parameter(self.a.detach()[chosen])
        self.b = nn.Parameter(self.b.detach()[:, chosen])
        self.left = self.left[chosen]

    def delta(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.T


def built_as_saved(config: StateConfig, layer: Any, tensors: Mapping[str, Tensor] | None) -> Pruned:
    return Pruned(layer, config, None if tensors is None else len(tensors["pruned_A.weight"]))  # keys as in the file


def their_key(key: str) -> str:
    return {"a": "pruned_A.weight", "b": "pruned_B.weight"}.get(key, key)


@pytest.fixture
def pruned() -> Iterator[Any]:
    method = plugin(StateConfig, Pruned, peft_state_key=their_key)
    method.peft_build = hookimpl(built_as_saved)
    with registered(method):
        model = randomise(get_peft_model(base(), StateConfig(target_modules=ALL)))
        for path, one in adapters_of(model).items():
            one.keep([0, 2, 3] if "up" in path else [3])
        yield model


def test_e10_shapes_that_only_the_file_knows(pruned: Any, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(pruned))
    left = {path: one.left.tolist() for path, one in adapters_of(again).items()}
    assert left["head"] == [3] and left["blocks.0.up"] == [0, 2, 3]
    assert all(one.left.dtype == torch.int64 and not one.a.is_meta for one in adapters_of(again).values())
    other = get_peft_model(base(), StateConfig(target_modules=ALL))  # of full ranks, replaced by the file's
    other.load_adapter(tmp_path, "default", replace=True)
    assert torch.equal(logits(other), logits(pruned))


def test_e10_keys_are_the_methods(pruned: Any, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path)
    keys = [key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")]
    at_head = {key.removeprefix("head.") for key in keys if key.startswith("head.")}
    assert at_head == {"pruned_A.weight", "pruned_B.weight", "left"}
    less = {key: t for key, t in pruned.get_adapter_state_dict().items() if "head.pruned_A" not in key}
    with pytest.raises(CheckpointMismatchError, match="head.pruned_A.weight"):
        set_peft_model_state_dict(pruned, less)


class PartsConfig(AdapterConfig):
    """Several adapters at one module, told apart by their parts."""

    peft_type: ClassVar[str] = "TOYPARTS"


class Part(DeltaAdapter):
    def __init__(self, layer: Any, config: PartsConfig) -> None:
        super().__init__(layer)
        self.sign = layer.request.meta["sign"]
        self.vector = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.vector)

    def delta(self, x: Tensor) -> Tensor:
        return self.sign * self.vector.expand(*x.shape[:-1], -1)


def part_sites() -> list[SiteRequest]:
    parts = (("plus", 1), ("minus", -1))
    return [SiteRequest("head", part=name, key_prefix=f"{name}.", meta={"sign": sign}) for name, sign in parts]


def test_e10_parts_of_one_adapter_at_one_module(tmp_path: Path) -> None:
    with toy(Part, PartsConfig, peft_sites=part_sites):
        model = randomise(get_peft_model(base(), PartsConfig()))
        parts = model.get_submodule("head").of("default")
        assert list(parts) == ["plus", "minus"]
        change = parts["plus"].vector - parts["minus"].vector
        torch.testing.assert_close(logits(model), logits(base()) + change, **EXACT)
        model.save_pretrained(tmp_path)
        keys = set(load_file(tmp_path / "adapter_model.safetensors"))
        assert keys == {"base_model.model.head.plus.vector", "base_model.model.head.minus.vector"}
        again = PeftModel.from_pretrained(base(), tmp_path)
        assert torch.equal(logits(again), logits(model))


class Joined(DeltaAdapter):
    """Two tensors here, one in files: the sum's halves side by side."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.first = layer.parameter(layer.out_features)
        self.second = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.first)
        nn.init.zeros_(self.second)

    @property
    def both(self) -> Tensor:
        return torch.cat([self.first, self.second])

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {"both": (self, "both")}

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for name, part in zip(("first", "second"), value.chunk(2), strict=True):
            yield self, name, part

    def delta(self, x: Tensor) -> Tensor:
        return (self.first + 2 * self.second).expand(*x.shape[:-1], -1)


def test_e10_a_file_holds_what_is_derived(tmp_path: Path) -> None:
    with toy(Joined):
        model = randomise(get_peft_model(base(), ToyConfig(target_modules=ALL)))
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert len(tensors) == 5 and tensors["base_model.model.head.both"].shape == (8,)
        again = PeftModel.from_pretrained(base(), tmp_path)
        assert torch.equal(logits(again), logits(model))
        one = adapters_of(again)["head"]
        assert isinstance(one.first, nn.Parameter) and "both" not in dict(one.named_parameters())
        fresh = get_peft_model(base(), ToyConfig(target_modules=ALL))
        fresh.load_adapter(tmp_path, "default", replace=True)
        assert torch.equal(logits(fresh), logits(model))


# -- traps of a site's loop --------------------------------------------------------------------------------------------


class LowRank(DeltaAdapter):
    """B A x; notes what it is given."""

    inputs: ClassVar[list[Tensor]] = []

    def __init__(self, layer: Any, config: ToyConfig) -> None:
        super().__init__(layer)
        if layer.kind != "linear":
            raise layer.refuse("linear layers only")
        self.a = layer.parameter(config.r, layer.in_features)
        self.b = layer.parameter(layer.out_features, config.r)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.a)
        nn.init.zeros_(self.b)

    def delta(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return x @ self.a.to(x.dtype).T @ self.b.to(x.dtype).T

    def weight_delta(self) -> Tensor:
        return self.b @ self.a


class StartsElsewhere(LowRank):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.a)
        nn.init.normal_(self.b)


class SaysSo(StartsElsewhere):
    starts_as_base = False


@pytest.mark.parametrize(("adapter_class", "kept"), [(LowRank, True), (StartsElsewhere, False), (SaysSo, True)])
def test_t4_identity_at_start_is_declared_and_a_false_claim_is_noticed(adapter_class: Any, kept: bool) -> None:
    suite = type("Suite", (MethodContract,), {"config": ToyConfig()})()
    with toy(adapter_class):
        if kept:
            suite.test_start_equals_base()
            return
        with pytest.raises(AssertionError, match="an adapter at its start leaves the base's output unchanged"):
            suite.test_start_equals_base()


def test_t7_active_adapters_get_the_same_input_whatever_their_ranks() -> None:
    with toy(LowRank):
        model = get_peft_model(base(), ToyConfig(target_modules=["head"], r=2), "two")
        model.add_adapter("five", ToyConfig(target_modules=["head"], r=5))
        model.add_adapter("one", ToyConfig(target_modules=["head"], r=1))
        names = ["five", "one", "two"]
        for seed, name in enumerate(names):
            randomise(model, name, seed=seed)
        model.set_adapter(names)
        LowRank.inputs.clear()
        out = logits(model)
        plain = base()
        hidden = plain.blocks[1](plain.blocks[0](X))
        assert len(LowRank.inputs) == 3 and all(torch.equal(x, hidden) for x in LowRank.inputs)
        changes = [hidden @ adapters_of(model, name)["head"].weight_delta().T for name in names]
        torch.testing.assert_close(out, plain.head(hidden) + sum(changes), **EXACT)


class Normed(LowRank):
    """Inherits from an additive method and is none: the sum's rows are brought to the base's norms."""

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(base, *args, **kwargs)
        return out * torch.linalg.vector_norm(self.layer.weight) / 2

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        factor = torch.linalg.vector_norm(self.layer.weight) / 2
        return {name: value * factor for name, value in super().merge(params).items()}


class NormedFurther(Normed):
    """Inherits what its parent computes, and overrides a part of the maths alone."""

    def delta(self, x: Tensor) -> Tensor:
        return 2 * super().delta(x)


@pytest.mark.parametrize("adapter_class", [Normed, NormedFurther])
def test_t13_additive_is_decided_by_the_method_in_force(adapter_class: Any) -> None:
    assert LowRank.additive and not adapter_class.additive
    with toy(adapter_class):
        model = randomise(get_peft_model(base(), ToyConfig(target_modules=["head"])))
        one, plain = adapters_of(model)["head"], base()
        hidden = plain.blocks[1](plain.blocks[0](X))
        times = 2 if adapter_class is NormedFurther else 1
        factor = torch.linalg.vector_norm(plain.head.weight) / 2
        expected = (plain.head(hidden) + times * hidden @ one.weight_delta().T) * factor
        torch.testing.assert_close(logits(model), expected, **EXACT)
        mixed = logits(model, adapter_names=["default", "__base__", "default"])
        torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], **EXACT)
        model.add_adapter("second", ToyConfig(target_modules=["head"]))
        model.set_adapter(["default", "second"])
        torch.testing.assert_close(logits(model), expected * factor, **EXACT)


class GainConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYOUTER"


def test_t14_a_weight_adapter_starts_from_the_parameters_so_far() -> None:
    """Additive, turning and weight-space adapters further in all reach it, in whatever order."""

    class RotationConfig(TargetedConfig):
        peft_type: ClassVar[str] = "TOYTURN"

    with toy(LowRank), toy(Scaled, GainConfig), toy(Rotation, RotationConfig):
        configs: Sequence[Any] = (ToyConfig, RotationConfig, GainConfig)
        model: Any = base()
        for index, config in enumerate(configs):
            name = config.peft_type
            one = config(target_modules=["head"])
            model.add_adapter(name, one) if index else get_peft_model(model, one, name)
            randomise(model, name, seed=index)
        delta = adapters_of(model, "TOYSTAGE")["head"].weight_delta()
        turn = adapters_of(model, "TOYTURN")["head"].matrix()
        gain = 1 + adapters_of(model, "TOYOUTER")["head"].gain
        plain = base()
        hidden, weight, bias = plain.blocks[1](plain.blocks[0](X)), plain.head.weight, plain.head.bias
        for order, expected in (
            (["TOYSTAGE", "TOYOUTER"], (weight + delta) * gain),
            (["TOYTURN", "TOYOUTER"], weight @ turn * gain),
            (["TOYSTAGE", "TOYTURN", "TOYOUTER"], (weight + delta) @ turn * gain),
            (["TOYTURN", "TOYSTAGE", "TOYOUTER"], (weight @ turn + delta) * gain),
        ):
            model.set_adapter(order)
            torch.testing.assert_close(logits(model), hidden @ expected.T + bias * gain, **EXACT)
            merges_exactly(model)
