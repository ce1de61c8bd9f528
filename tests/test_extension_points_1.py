"""Extension points for what an adapter is: E1 config, E2 site selection, E3 plan, E4 bank, E5 state of a site.

Each is proved by toy methods that use the public API alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_core import (
    Adapter,
    AdapterConfig,
    CheckpointMismatchError,
    ConfigError,
    DeltaAdapter,
    PeftModel,
    Seeded,
    SiteRequest,
    TargetedConfig,
    TargetError,
    WeightAdapter,
    get_peft_model,
    plan,
    role_paths,
    set_peft_model_state_dict,
)
from tests.tiny_transformers import batch, make, scores
from tests.toy_plugins import Net, net, plugin, randomise, registered

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
ALL = ["up", "down", "head"]


class Vector(DeltaAdapter):
    """Adds a vector to the output: as little as an adapter can be."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.vector = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.vector)

    def delta(self, x: Tensor) -> Tensor:
        return self.vector.expand(*x.shape[:-1], -1)


def adapters_of(model: Any, name: str = "default") -> dict[str, Adapter]:
    return {path: one for path, site in model._peft.sites.items() for one in site.of(name).values()}


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter's file."""
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def comes_back(model: Any, fresh: Any, folder: Path, *args: Any) -> Any:
    """Save, load onto a fresh base: the same bits come out. Returns the loaded model."""
    saved(model, folder)
    again = PeftModel.from_pretrained(fresh, folder)
    out, expected = (m.eval()(*args) for m in (again, model))
    out, expected = (getattr(o, "logits", o) for o in (out, expected))
    assert torch.equal(out, expected)
    state = model.get_adapter_state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.get_adapter_state_dict().items())
    assert again.get_adapter_state_dict().keys() == state.keys()
    return again


# -- E1: config --------------------------------------------------------------------------------------------------------


class E1Config(TargetedConfig):
    peft_type: ClassVar[str] = "TOYE1"
    size: int = Field(4, ge=1)
    share: float | None = None
    seed: int = 0
    blocks: int | None = None
    offload: bool = Field(False, exclude=True)

    @model_validator(mode="after")
    def _one_of_two(self) -> E1Config:
        if self.share is not None and self.size != 4:
            raise ValueError("give size or share, not both")
        return self


def e1_resolve(config: E1Config, model: nn.Module, matched: Sequence[str]) -> E1Config:
    return config if config.blocks is not None else config.resolve(blocks=len(model.blocks))  # type: ignore[arg-type]


def e1_prepare(model: Any, name: str, config: E1Config) -> None:
    for other, theirs in getattr(model, "peft_config", {}).items():
        if other != name and isinstance(theirs, E1Config) and theirs.seed != config.seed:
            raise TargetError(f"adapters of one model use one seed: {other!r} has {theirs.seed}, not {config.seed}")


@pytest.fixture
def e1() -> Iterator[None]:
    with registered(plugin(E1Config, Vector, peft_resolve=e1_resolve, peft_prepare=e1_prepare)):
        yield


def test_e1_own_fields_and_rules_across_them(e1: None) -> None:
    with pytest.raises(ConfigError, match="size.*greater than or equal to 1"):
        E1Config(size=0)
    with pytest.raises(ConfigError, match="give size or share, not both"):
        E1Config(size=2, share=0.5)
    with pytest.raises(ConfigError, match="no such field.*Did you mean 'share'"):
        E1Config(shar=0.5)


def test_e1_defaults_from_the_model_are_written_back(e1: None, tmp_path: Path) -> None:
    config = E1Config(target_modules=ALL)
    model = get_peft_model(net(blocks=3), config)
    assert config.blocks is None and model.peft_config["default"].blocks == 3
    model.save_pretrained(tmp_path)
    assert AdapterConfig.from_pretrained(tmp_path).blocks == 3  # type: ignore[attr-defined]


def test_e1_config_rules_across_adapters(e1: None, tmp_path: Path) -> None:
    model = get_peft_model(net(), E1Config(target_modules=ALL, seed=1), "one")
    expected = model(X).logits
    with pytest.raises(TargetError, match="'one' has 1, not 2"):
        model.add_adapter("two", E1Config(target_modules=ALL, seed=2))
    assert list(model.peft_config) == ["one"] and torch.equal(model(X).logits, expected)
    model.add_adapter("two", E1Config(target_modules=ALL, seed=1))
    other = get_peft_model(net(), E1Config(target_modules=ALL, seed=2))
    other.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="has 1, not 2"):  # nor does a file bring one in
        model.load_adapter(tmp_path, "three")
    assert list(model.peft_config) == ["one", "two"]


def test_e1_a_field_that_is_not_written(e1: None, tmp_path: Path) -> None:
    model = get_peft_model(net(), E1Config(target_modules=ALL, offload=True))
    assert model.peft_config["default"].offload is True  # the run sees it, resolved copies included
    model.save_pretrained(tmp_path)
    assert "offload" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert again.peft_config["default"].offload is False


# -- E2: sites ---------------------------------------------------------------------------------------------------------


class E2Config(AdapterConfig):
    peft_type: ClassVar[str] = "TOYE2"
    places: tuple[tuple[str, str], ...] = ()
    rank: int = 0


class Added(WeightAdapter):
    """Adds a tensor of its own (or a product of two, for each expert) to each of its parameters."""

    def __init__(self, layer: Any, config: E2Config) -> None:
        super().__init__(layer)
        self.own = nn.ParameterDict()
        for name, value in layer.params().items():
            key, shape = name.replace(".", "/"), tuple(value.shape)
            if config.rank and value.dim() == 3:
                self.own[f"{key}/a"] = layer.parameter(shape[0], shape[1], config.rank)
                self.own[f"{key}/b"] = layer.parameter(shape[0], config.rank, shape[2])
            else:
                self.own[key] = layer.parameter(*shape)

    def reset_parameters(self) -> None:
        for name, value in self.own.items():
            (nn.init.normal_ if name.endswith("/a") else nn.init.zeros_)(value)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = dict(params)
        for name in self.layer.names:
            key = name.replace(".", "/")
            change = self.own[key] if key in self.own else self.own[f"{key}/a"] @ self.own[f"{key}/b"]
            merged[name] = params[name] + change.to(params[name].dtype)
        return merged


def e2_sites(config: E2Config) -> list[SiteRequest]:
    found: dict[str, tuple[str, ...]] = {}
    for path, name in config.places:
        found[path] = (*found.get(path, ()), *([name] if name else []))
    return [SiteRequest(path, names=names) for path, names in found.items()]


class Gate(nn.Module):
    """A class nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Experts(nn.Module):
    """Three experts in one 3-D parameter, of which each row uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_of_all = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.unsqueeze(1), self.weight_of_all[torch.arange(len(x)) % 3]).squeeze(1)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(6))
        self.gate = Gate()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.gate(x + self.start))


def odd() -> Odd:
    torch.manual_seed(0)
    return Odd().double()


@pytest.fixture
def e2() -> Iterator[None]:
    with registered(plugin(E2Config, Added, peft_sites=e2_sites)):
        yield


@pytest.mark.parametrize(
    "places",
    [
        [("gate", "")],
        [("gate", "scale")],
        [("experts", "weight_of_all")],
        [("", "start")],
        [("", "gate.shift"), ("gate", "scale")],
    ],
    ids=["module-of-any-class", "one-parameter", "experts", "parameter-of-the-model", "both"],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_e2_parameters_of_modules_of_any_class(e2: None, places: Any, rank: int, tmp_path: Path) -> None:
    x = X.double()
    expected = odd()
    model = randomise(get_peft_model(odd(), E2Config(places=places, rank=rank)))
    assert torch.equal(get_peft_model(odd(), E2Config(places=places, rank=rank))(x), expected(x))
    with torch.no_grad():  # by hand: the same sums in the same order
        for path, one in adapters_of(model).items():
            for key, value in one.own.items():
                name, _, half = key.rpartition("/") if key[-2:] in ("/a", "/b") else (key, "", "")
                owner = expected.get_submodule(path)
                if half != "b":
                    owner.get_parameter(name.replace("/", ".")).add_(value @ one.own[f"{name}/b"] if half else value)
    assert torch.equal(model(x), expected(x))
    assert not torch.equal(model(x), odd()(x))
    comes_back(model, odd(), tmp_path, x)
    mixed = model(x, adapter_names=["default", "__base__", "default"])
    if {path for path, _ in places} == {"gate"}:  # further out the experts would see other rows
        torch.testing.assert_close(mixed, torch.stack([expected(x)[0], odd()(x)[1], expected(x)[2]]))
    if "" not in dict(places):
        model.merge_adapter()
        assert torch.equal(model(x), expected(x))
        model.unmerge_adapter()
    assert torch.equal(model.unload()(x), odd()(x))


@pytest.mark.parametrize("places", [[("", "gate.scale")], [("outer", "")]], ids=["of-the-model", "of-a-block"])
def test_e2_a_place_that_holds_other_places(e2: None, places: Any) -> None:
    """What sits inside, before or after, neither hides parameters from an adapter further out nor takes part in it."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.outer = nn.Sequential()
        model.outer.gate = Gate()
        model.gate = Gate()
        return model.double()

    x, inner = X.double(), E2Config(places=[("outer.gate", "scale"), ("gate", "")])
    alone = randomise(get_peft_model(fresh(), E2Config(places=places), "outer"), "outer")
    expected, weights = alone(x), {k: v.clone() for k, v in alone.base_state_dict().items()}
    for order in ((), ("outer", "inner"), ("inner", "outer")):
        model = fresh()
        for name in order or ("outer",):
            config = E2Config(places=places) if name == "outer" else inner
            get_peft_model(model, config, name) if name == (order or ("outer",))[0] else model.add_adapter(name, config)
        model.set_adapter("outer")
        randomise(model, "outer")
        assert torch.equal(model(x), expected)
        if order:
            randomise(model, "inner", seed=2)
            model.set_adapter(["outer", "inner"])
        both = model(x)
        assert torch.equal(both, expected) is (not order)
        if places[0][0]:
            model.merge_adapter()
            torch.testing.assert_close(model(x), both, rtol=0, atol=1e-12)
            model.unmerge_adapter()
            assert torch.equal(model(x), both)
            assert all(torch.equal(v, weights[k]) for k, v in model.base_state_dict().items())


def test_e2_a_missing_place_is_refused(e2: None) -> None:
    for places, match in (([("gates", "")], "no such module"), ([("gate", "bias")], "no parameter 'bias'")):
        with pytest.raises(TargetError, match=match):
            get_peft_model(odd(), E2Config(places=places))


class RowsConfig(AdapterConfig):
    """Rows of the input embedding, and of the head that is tied to it."""

    peft_type: ClassVar[str] = "TOYROWS"
    tokens: tuple[int, ...]


class Rows(WeightAdapter):
    def __init__(self, layer: Any, config: RowsConfig) -> None:
        super().__init__(layer)
        self.tokens = torch.tensor(config.tokens)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = params["weight"]
        rows = self.shared.rows.to(weight.dtype)
        return {**params, "weight": weight.index_add(0, self.tokens.to(weight.device), rows)}


def rows_prepare(config: RowsConfig, layers: Sequence[Any], shared: nn.Module) -> None:
    width = layers[0].embedding_dim
    shared.rows = nn.Parameter(torch.zeros(len(config.tokens), width, device=layers[0].device))


def rows_sites(config: RowsConfig, model: Any) -> list[SiteRequest]:
    paths = {id(module): path for path, module in model.named_modules()}
    sites = [SiteRequest(paths[id(model.get_input_embeddings())])]
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        sites.append(SiteRequest(paths[id(model.get_output_embeddings())]))
    return sites


@pytest.mark.parametrize("tied", [True, False])
def test_e2_embedding_rows_and_the_tied_head(tied: bool, tmp_path: Path) -> None:
    given = batch("llama")
    with registered(plugin(RowsConfig, Rows, peft_prepare=rows_prepare, peft_sites=rows_sites)):
        model = get_peft_model(make("llama", tie_word_embeddings=tied), RowsConfig(tokens=[5, 9]))
        randomise(model)
        by_hand = make("llama", tie_word_embeddings=tied)
        with torch.no_grad():
            rows = model._peft.record("default").shared.rows
            by_hand.get_input_embeddings().weight[[5, 9]] += rows
        assert torch.equal(scores(model, given), scores(by_hand, given))
        assert list(adapters_of(model)) == ["model.embed_tokens"] + ["lm_head"] * tied
        (tensor,) = saved(model, tmp_path).values()  # once, for both
        assert tensor.shape == (2, 16)
        again = PeftModel.from_pretrained(make("llama", tie_word_embeddings=tied), tmp_path).eval()
        assert torch.equal(scores(again, given), scores(model, given))
        merged = model.merge_and_unload()
        assert torch.equal(scores(merged, given), scores(by_hand, given))
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied


class WholeConfig(AdapterConfig):
    """A gain around a block, or around the whole model."""

    peft_type: ClassVar[str] = "TOYWHOLE"
    at: tuple[str, ...]


class Whole(Adapter):
    def __init__(self, layer: Any, config: WholeConfig) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        if isinstance(out, Tensor):
            return out * self.gain
        out.logits = out.logits * self.gain
        return out


@pytest.fixture
def whole() -> Iterator[None]:
    with registered(plugin(WholeConfig, Whole, peft_sites=lambda config: [SiteRequest(path) for path in config.at])):
        yield


@pytest.mark.parametrize("at", [("blocks.0",), ("",), ("blocks.0", "blocks.1", "")])
def test_e2_blocks_and_the_model_itself(whole: None, at: tuple[str, ...], tmp_path: Path) -> None:
    model = randomise(get_peft_model(net(), WholeConfig(at=at)))
    gains = {path: one.gain.detach() for path, one in adapters_of(model).items()}
    base, x = net(), X
    for index, block in enumerate(base.blocks):
        x = block(x) * gains.get(f"blocks.{index}", 1)
    expected = base.head(x) * gains.get("", 1)
    assert list(gains) == list(at) and torch.equal(model(X).logits, expected)
    comes_back(model, net(), tmp_path, X)


@pytest.mark.parametrize(("kind", "count"), [("llama", 2), ("gpt2", 2), ("t5", 4), ("bert", 2)])
def test_e2_sites_by_role(kind: str, count: int) -> None:
    def sites(config: AdapterConfig, model: nn.Module) -> list[SiteRequest]:
        return [SiteRequest(path) for path in role_paths(model, "down")]

    with registered(plugin(E2Config, Vector, peft_sites=sites)):
        model = randomise(get_peft_model(make(kind), E2Config()))
        assert len(adapters_of(model)) == count
        assert not torch.equal(scores(model, batch(kind)), scores(make(kind), batch(kind)))


class ChosenConfig(AdapterConfig):
    """The `count` best conditioned linear layers."""

    peft_type: ClassVar[str] = "TOYCHOSEN"
    count: int = 1
    chosen: tuple[str, ...] | None = None


def chosen_resolve(config: ChosenConfig, model: nn.Module) -> ChosenConfig:
    if config.chosen is not None:  # by a file
        return config
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    numbers = {path: float(torch.linalg.cond(module.weight.detach())) for path, module in linear.items()}
    return config.resolve(chosen=sorted(numbers, key=numbers.__getitem__)[: config.count])


def test_e2_a_method_that_looks_at_the_weights(tmp_path: Path) -> None:
    base = net()
    with torch.no_grad():
        base.head.weight.copy_(torch.eye(4, 6))
        base.blocks[1].up.weight.copy_(torch.eye(12, 6))
    hooks = {"peft_resolve": chosen_resolve, "peft_sites": lambda config: [SiteRequest(p) for p in config.chosen]}
    with registered(plugin(ChosenConfig, Vector, **hooks)):
        model = randomise(get_peft_model(base, ChosenConfig(count=2)))
        assert set(adapters_of(model)) == {"head", "blocks.1.up"}
        saved(model, tmp_path)
        again = PeftModel.from_pretrained(net(), tmp_path)  # whose weights are conditioned otherwise
        assert set(adapters_of(again)) == {"head", "blocks.1.up"}


class BankConfig(AdapterConfig):
    """Nothing at any layer: one bank, used around the model."""

    peft_type: ClassVar[str] = "TOYBANKONLY"


class FromBank(Adapter):
    def forward(self, base: Any, x: Tensor, **kwargs: Any) -> Any:
        return base(x + self.shared.offset, **kwargs)


def test_e2_no_layer_at_all_but_a_bank(tmp_path: Path) -> None:
    def prepare(shared: nn.Module, layers: Sequence[Any]) -> None:
        shared.offset = nn.Parameter(torch.zeros(6, device=layers[0].device))

    hooks = {"peft_prepare": prepare, "peft_sites": lambda: [SiteRequest("")]}
    with registered(plugin(BankConfig, lambda layer, config: FromBank(layer), **hooks)):
        model = randomise(get_peft_model(net(), BankConfig()))
        offset = model._peft.record("default").shared.offset
        assert torch.equal(model(X).logits, net()(X + offset).logits)
        assert model.get_nb_trainable_parameters()[0] == 6
        assert len(saved(model, tmp_path)) == 1
        comes_back(model, net(), tmp_path, X)


# -- E3: a plan over all sites -----------------------------------------------------------------------------------------


class BudgetConfig(TargetedConfig):
    """`budget` numbers in all, each layer its share by size, at weights chosen by a generator."""

    peft_type: ClassVar[str] = "TOYBUDGET"
    budget: int = 60


class Sparse(WeightAdapter):
    def __init__(self, layer: Any, config: BudgetConfig, count: int) -> None:
        super().__init__(layer)
        numel = layer.in_features * layer.out_features
        self.values = layer.parameter(count)
        self.register_buffer("indices", torch.arange(count, device=layer.device) * (numel // count))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.values)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = params["weight"]
        return {**params, "weight": weight.flatten().index_add(0, self.indices, self.values).view_as(weight)}


def budget_prepare(config: BudgetConfig, layers: Sequence[Any], shared: nn.Module) -> None:
    sizes = {layer.path: layer.in_features * layer.out_features for layer in layers}
    shared.counts = {path: config.budget * size // sum(sizes.values()) for path, size in sizes.items()}  # type: ignore[assignment]


def test_e3_a_budget_split_by_the_shapes_of_all_sites(tmp_path: Path) -> None:
    method = plugin(BudgetConfig, None, peft_prepare=budget_prepare)
    method.peft_build = _hook_build_sparse()
    with registered(method):
        config = BudgetConfig(target_modules=ALL)
        model = randomise(get_peft_model(net(), config))
        counts = {path: one.values.numel() for path, one in adapters_of(model).items()}
        # up and down have 72 weights each, twice, and the head 24: of 312.
        assert counts == {**{f"blocks.{i}.{n}": 13 for i in (0, 1) for n in ("up", "down")}, "head": 4}
        assert plan(net().to("meta"), config).trainable == 56  # seen beforehand, without weights
        comes_back(model, net(), tmp_path, X)
        smaller = get_peft_model(net(), config.resolve(target_modules=["head"]))
        assert adapters_of(smaller)["head"].values.numel() == 24  # all it has


def _hook_build_sparse() -> Any:
    from peft_core import hookimpl

    @hookimpl
    def peft_build(config: BudgetConfig, layer: Any, shared: Any) -> Sparse:
        return Sparse(layer, config, min(shared.counts[layer.path], layer.in_features * layer.out_features))

    return peft_build


class GroupsConfig(TargetedConfig):
    """Every `size` sites in a row use one vector."""

    peft_type: ClassVar[str] = "TOYGROUPS"
    size: int = 2


class Grouped(Adapter):
    def forward(self, base: Any, x: Tensor) -> Any:
        return base(x) * self.shared.gains[self.shared.group[self.layer.path]]


def groups_prepare(config: GroupsConfig, layers: Sequence[Any], shared: nn.Module) -> None:
    order = [layer.path for layer in layers]
    shared.group = {path: index // config.size for index, path in enumerate(order)}  # type: ignore[assignment]
    shared.gains = nn.Parameter(torch.ones(-(-len(order) // config.size)))


def test_e3_groups_tied_by_the_order_of_sites(tmp_path: Path) -> None:
    with registered(plugin(GroupsConfig, lambda layer, config: Grouped(layer), peft_prepare=groups_prepare)):
        model = randomise(get_peft_model(net(), GroupsConfig(target_modules=ALL)))
        gains, base = model._peft.record("default").shared.gains, net()
        assert gains.shape == (3,) and list(adapters_of(model))[:2] == ["blocks.0.up", "blocks.0.down"]
        x = X
        for block, gain in zip(base.blocks, gains, strict=False):
            x = x + gain * block.down(torch.tanh(gain * block.up(x)))
        torch.testing.assert_close(model(X).logits, gains[2] * base.head(x))
        comes_back(model, net(), tmp_path, X)


# -- E4: banks ---------------------------------------------------------------------------------------------------------


class E4Config(TargetedConfig):
    peft_type: ClassVar[str] = "TOYE4"
    kind: str = "trained"
    seed: int = 3
    rank: int = 2


class Banked(DeltaAdapter):
    """d ∘ (B A x), with A and B of a bank and d of its own."""

    def __init__(self, layer: Any, config: E4Config) -> None:
        super().__init__(layer)
        self.d = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.d)

    def delta(self, x: Tensor) -> Tensor:
        bank = self.shared.bank
        pair = (bank.value if isinstance(bank, Seeded) else bank).to(x.dtype)
        return (x @ pair[0, : x.shape[-1]] @ pair[1, : len(self.d)].T) * self.d.to(x.dtype)


def e4_prepare(config: E4Config, layers: Sequence[Any], shared: nn.Module) -> None:
    width = max(max(layer.in_features, layer.out_features) for layer in layers)
    place = {"device": layers[0].device, "dtype": layers[0].dtype}
    if config.kind == "seeded":
        shared.bank = Seeded((2, width, config.rank), config.seed, **place)
    else:
        values = torch.randn(2, width, config.rank, generator=torch.Generator().manual_seed(config.seed)).to(**place)
        shared.bank = nn.Parameter(values, requires_grad=config.kind == "trained")


@pytest.fixture
def e4() -> Iterator[None]:
    with registered(plugin(E4Config, Banked, peft_prepare=e4_prepare)):
        yield


OWN = 12 + 6 + 12 + 6 + 4  # the vectors d
BANK = 2 * 12 * 2


@pytest.mark.parametrize(("kind", "numbers"), [("trained", OWN + BANK), ("frozen", OWN + BANK), ("seeded", OWN + 1)])
def test_t6_a_bank_is_written_once_or_not_at_all(e4: None, kind: str, numbers: int, tmp_path: Path) -> None:
    """Not once for each of the five sites; of a seeded bank the file has a checksum alone."""
    model = randomise(get_peft_model(net(), E4Config(target_modules=ALL, kind=kind)))
    assert sum(tensor.numel() for tensor in saved(model, tmp_path).values()) == numbers
    trained = OWN + BANK if kind == "trained" else OWN
    assert model.get_nb_trainable_parameters()[0] == trained
    comes_back(model, net(), tmp_path, X)


@pytest.mark.parametrize("kind", ["trained", "frozen", "seeded"])
def test_e4_banks_train_as_they_say_move_and_are_cast_with_the_model(e4: None, kind: str) -> None:
    model = randomise(get_peft_model(net(), E4Config(target_modules=ALL, kind=kind)))
    model(X).logits.square().sum().backward()
    bank = model._peft.record("default").shared.bank
    if kind != "seeded":
        assert (bank.grad is not None) is (kind == "trained")
    expected = model.double()(X.double()).logits
    tensor = bank.value if kind == "seeded" else model._peft.record("default").shared.bank
    assert tensor.dtype == torch.float64 and torch.isfinite(expected).all()
    assert copy.deepcopy(model)(X.double()).logits.equal(expected)
    model.to("meta")
    assert all(t.is_meta for t in model._peft.record("default").tensors())


@pytest.mark.parametrize("kind", ["trained", "frozen", "seeded"])
def test_e4_each_adapter_has_a_bank_of_its_own(e4: None, kind: str) -> None:
    model = randomise(get_peft_model(net(), E4Config(target_modules=ALL, kind=kind), "one"), "one")
    expected = model(X).logits
    model.add_adapter("two", E4Config(target_modules=["head"], kind=kind, seed=4, rank=3))
    randomise(model, "two")
    assert torch.equal(model(X).logits, expected)
    model.set_adapter("two")
    assert not torch.equal(model(X).logits, expected)
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(model(X).logits, expected)


def test_t10_a_bank_made_from_other_numbers_is_refused(e4: None, tmp_path: Path) -> None:
    """A generator that changed, a file that was tampered with: refused by name, never loaded with other numbers."""
    model = randomise(get_peft_model(net(), E4Config(target_modules=ALL, kind="seeded")))
    tensors = saved(model, tmp_path)
    (key,) = (k for k, t in tensors.items() if t.dtype == torch.int64)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({**tensors, key: tensors[key] + 1}, file, metadata)
    plain = net()
    with pytest.raises(CheckpointMismatchError, match="adapter 'default'.*not the one of the file"):
        PeftModel.from_pretrained(plain, tmp_path)
    assert type(plain) is Net
    # Nor by way of an adapter that is there already, whose tensors a load would replace.
    expected = model(X).logits
    for load in (
        lambda: model.load_adapter(tmp_path, "default", replace=True),
        lambda: set_peft_model_state_dict(model, {**tensors, key: tensors[key] + 1}),
    ):
        with pytest.raises(CheckpointMismatchError, match="not the one of the file"):
            load()
        assert torch.equal(model(X).logits, expected)
        assert all(torch.equal(tensor, tensors[k]) for k, tensor in model.get_adapter_state_dict().items())


class SeededConfig(TargetedConfig):
    """A frozen matrix of its own at each layer, drawn from the layer's name."""

    peft_type: ClassVar[str] = "TOYSEEDED"
    seed: int = 0


class OwnSeeded(DeltaAdapter):
    def __init__(self, layer: Any, config: SeededConfig) -> None:
        super().__init__(layer)
        shape = (layer.in_features, layer.out_features)
        self.a = Seeded(shape, config.seed + len(layer.path), device=layer.device, dtype=layer.dtype)
        self.d = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.d)

    def delta(self, x: Tensor) -> Tensor:
        return x @ self.a.value * self.d


def test_t10_a_seeded_tensor_of_a_site_is_made_again_and_checked(tmp_path: Path) -> None:
    with registered(plugin(SeededConfig, OwnSeeded)):
        model = randomise(get_peft_model(net(), SeededConfig(target_modules=ALL)))
        assert sum(tensor.numel() for tensor in saved(model, tmp_path).values()) == OWN + 5
        comes_back(model, net(), tmp_path, X)
        plain = net()
        with pytest.raises(CheckpointMismatchError, match="not the one of the file"):
            PeftModel.from_pretrained(plain, tmp_path, config=SeededConfig(target_modules=ALL, seed=1))
        assert type(plain) is Net and torch.equal(plain(X).logits, net()(X).logits)


# -- E5: the state of a site -------------------------------------------------------------------------------------------


class E5Config(TargetedConfig):
    peft_type: ClassVar[str] = "TOYE5"


class Rich(DeltaAdapter):
    """One of each: a parameter that trains, one that does not, buffers, integers, a module, a parametrisation."""

    def __init__(self, layer: Any, config: E5Config) -> None:
        super().__init__(layer)
        place = {"device": layer.device, "dtype": layer.dtype}
        self.a = layer.parameter(3, layer.in_features)
        self.frozen = layer.parameter(3, 3).requires_grad_(False)
        self.register_buffer("order", torch.empty(3, dtype=torch.int64, device=layer.device))
        self.register_buffer("mean", torch.empty(3, **place))
        self.register_buffer("unsaved", torch.ones(3, **place), persistent=False)
        self.inner = nn.Sequential(nn.Linear(3, 3, **place), nn.Tanh())
        self.turn = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False, **place))
        self.b = layer.parameter(layer.out_features, 3)

    def reset_parameters(self) -> None:
        for tensor in (self.a, self.frozen):
            nn.init.normal_(tensor)
        nn.init.zeros_(self.b)
        self.order.copy_(torch.randperm(3))
        self.mean.normal_()

    def delta(self, x: Tensor) -> Tensor:
        hidden = (x @ self.a.T)[..., self.order] @ self.frozen - self.mean * self.unsaved
        return self.turn(self.inner(hidden)) @ self.b.T


@pytest.fixture
def e5() -> Iterator[None]:
    with registered(plugin(E5Config, Rich)):
        yield


def flags(model: Any, name: str = "default") -> dict[str, bool]:
    one = adapters_of(model, name)["head"]
    return {key: parameter.requires_grad for key, parameter in one.named_parameters()}


def test_e5_frozen_parts_stay_frozen_whatever_is_switched(e5: None, tmp_path: Path) -> None:
    model = randomise(get_peft_model(net(), E5Config(target_modules=ALL)))
    model.add_adapter("other", E5Config(target_modules=ALL))
    fresh = {key: key != "frozen" for key in flags(model)}
    off = dict.fromkeys(fresh, False)
    assert flags(model) == fresh and flags(model, "other") == off and sum(fresh.values()) == 6
    model.set_adapter("other")
    assert flags(model) == off and flags(model, "other") == fresh
    model.set_adapter("default")
    assert flags(model) == fresh
    with model.disable_adapter():
        pass
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert flags(model) == fresh
    model.set_requires_grad("default", False)
    assert flags(model) == off
    model.set_requires_grad("default", True)
    assert flags(model) == fresh
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert flags(again) == fresh
    model.load_adapter(tmp_path, "default", replace=True)
    assert flags(model) == fresh
    assert flags(copy.deepcopy(model)) == fresh
    model(X).logits.sum().backward()
    assert adapters_of(model)["head"].frozen.grad is None


def test_e5_every_kind_of_tensor_comes_back(e5: None, tmp_path: Path) -> None:
    model = randomise(get_peft_model(net(), E5Config(target_modules=ALL)))
    again = comes_back(model, net(), tmp_path, X)
    mine, theirs = adapters_of(model)["head"], adapters_of(again)["head"]
    assert theirs.order.dtype == torch.int64 and torch.equal(theirs.order, mine.order)
    slots = {key.removeprefix("base_model.model.head.") for key in saved(model, tmp_path) if ".head." in key}
    assert slots == {
        "a", "b", "frozen", "order", "mean", "inner.0.weight", "inner.0.bias",
        "turn.parametrizations.weight.original0", "turn.parametrizations.weight.original1",
    }  # fmt: skip
    assert isinstance(theirs.state(), Mapping) and "unsaved" not in theirs.state()
