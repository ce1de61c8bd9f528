"""The config, the formulas of the papers, and where adapters sit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bottleneck_toys import INNER, WIDTH, Toy, fill, inputs, toy, toy_roles
from torch import Tensor, nn

import peft_bottleneck
import peft_core
from peft_bottleneck import BottleneckConfig
from peft_core import ConfigError, MergeError, RequestError, TargetError, get_peft_model, load_method, plan

STYLES = ("houlsby", "pfeiffer", "parallel", "scaled_parallel")

# Float64 rounds at 1e-16; the toys have some hundred operations, in another order than the formulas.
NEAR = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def roles() -> Iterator[None]:
    with toy_roles():
        yield


def test_only_the_public_api_is_used() -> None:
    """A family of methods needs nothing of peft_core but its public names."""
    sources = list(Path(peft_bottleneck.__file__).parent.glob("*.py"))
    assert len(sources) >= 6
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not [name for name in node.names if name.name.startswith("peft_core")], source
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_core"):
                assert node.module == "peft_core" and not node.level, source
                names = [name.name for name in node.names]
                assert set(names) <= set(peft_core.__all__), (source, names)
            elif isinstance(node, ast.Attribute):  # nor attributes that are somebody's own
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert own or not node.attr.startswith("_") or node.attr.startswith("__"), (source, node.attr)


def test_it_is_found_by_its_name() -> None:
    assert load_method("bottleneck").config_class is BottleneckConfig
    assert load_method("bottleneck").source.distribution == "peft-bottleneck"
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = peft_bottleneck.Nothing
    assert dir(peft_bottleneck) == peft_bottleneck.__all__


class TestConfig:
    def test_what_the_styles_mean(self) -> None:
        """AdapterHub's values of the three, and the factor of He et al., section 4.6."""
        names = ("reduction_factor", "non_linearity", "scaling", "init_weights", "mh_adapter", "output_adapter")
        found = {}
        for style in STYLES:
            config = getattr(BottleneckConfig, style)()
            assert config.style == style and config.reduction_factor is None
            found[style] = tuple(getattr(config.complete(), name) for name in names)
        assert found == {
            "houlsby": (16, "swish", 1.0, "bert", True, True),
            "pfeiffer": (16, "relu", 1.0, "bert", False, True),
            "parallel": (2, "relu", 1.0, "mam_adapter", False, True),
            "scaled_parallel": (2, "relu", 4.0, "mam_adapter", False, True),
        }

    def test_what_is_given_holds(self) -> None:
        config = BottleneckConfig.pfeiffer(reduction_factor=4.5, non_linearity="SiLU", mh_adapter=True, scaling=2)
        full = config.complete()
        assert (full.reduction_factor, full.non_linearity, full.scaling) == (4.5, "swish", 2)
        assert full.mh_adapter and full.complete() is full

    def test_round_trip(self) -> None:
        config = BottleneckConfig(
            reduction_factor={"0": 2, "default": 8}, leave_out=[1, 1], scaling="learned", dropout=0.1
        )
        assert BottleneckConfig.from_dict(config.to_dict()) == config
        assert config.reduction_factor == {"0": 2, "default": 8} and config.leave_out == (1,)
        assert (config.factor(0), config.factor(5)) == (2, 8)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"style": "lauscher"}, "style"),
            ({"reduction_factor": 0}, "reduction_factor: the width of the layer is divided by it"),
            ({"reduction_factor": -2.0}, "finite number greater than 0"),
            ({"reduction_factor": True}, "reduction_factor: give a number"),
            ({"reduction_factor": "16"}, "reduction_factor: give a number"),
            ({"reduction_factor": {"first": 2}}, "or \"default\", not 'first'"),
            ({"reduction_factor": {"0": 0}}, "greater than 0"),
            ({"non_linearity": "mish"}, "unknown activation function; the known ones are relu, gelu"),
            ({"scaling": "trained"}, "scaling"),
            ({"scaling": float("inf")}, "scaling"),
            ({"init_weights": "zero"}, "init_weights"),
            ({"leave_out": [-1]}, "layers are counted from 0"),
            ({"dropout": 1.0}, "dropout"),
            ({"mh_adapter": False, "output_adapter": False}, "are all off"),
            ({"exclude_modules": ["up"]}, "exclude_modules: these limit target_modules"),
            ({"layers_to_transform": [0]}, "to leave out layers, give leave_out"),
            ({"style": "pfeiffer", "target_modules": ["down"]}, "which target_modules does not tell"),
            (
                {"target_modules": ["down"], "mh_adapter": True, "leave_out": [0]},
                "mh_adapter, leave_out: these choose among the sub-layers",
            ),
            ({"target_modules": ["down"], "reduction_factor": {"0": 2}}, "reduction_factor as a mapping"),
        ],
    )
    def test_refusals(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            BottleneckConfig(**fields)


# ---- the formulas


FUNCTIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_new": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "leaky_relu": lambda x: torch.where(x < 0, 0.01 * x, x),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def delta(u: Tensor, tensors: dict[str, Tensor], config: BottleneckConfig) -> Tensor:
    """s·Δ(u): W_up f(W_down u + b_down) + b_up, between the norms that the config asks for."""
    if config.ln_before:
        u = norm(u, tensors["norm_before.weight"], tensors["norm_before.bias"])
    inner = FUNCTIONS[str(config.non_linearity)](u @ tensors["down.weight"].T + tensors["down.bias"])
    out = inner @ tensors["up.weight"].T + tensors["up.bias"]
    out = out * (tensors["scaling"] if config.scaling == "learned" else config.scaling)
    return norm(out, tensors["norm_after.weight"], tensors["norm_after.bias"]) if config.ln_after else out


def by_formula(model: Any, base: Toy, x: Tensor, name: str = "default") -> Tensor:
    """z = h + x + s·Δ(u) for every sub-layer, u as the paper of the style has it."""
    record = model._peft.adapters[name]
    found = {request.path: adapter.state() for request, adapter in zip(record.requests, record.adapters, strict=True)}
    config: Any = record.config
    for index, block in enumerate(base.blocks):
        for part, ln, names in (
            (block.attend, block.norm1, ("output", "norm1")),
            (block.feed, block.norm2, ("down", "norm2")),
        ):
            post = block.post
            h = part(x) if post else part(ln(x))
            z = h + x
            paths = [f"blocks.{index}.{each}" for each in names]
            tensors = next((found[path] for path in paths if found.get(path)), None)
            if tensors:
                if config.style == "houlsby":
                    u = h
                elif config.style == "pfeiffer":
                    u = norm(z, ln.weight, ln.bias) if post else z
                else:
                    u = x
                z = z + delta(u, tensors, config)
            x = norm(z, ln.weight, ln.bias) if post else z
    return x


@pytest.mark.parametrize("both", [False, True], ids=["feed-forward", "both"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model_type", ["toy_pre", "toy_post"])
@torch.no_grad()
def test_forward_is_the_papers_formula(model_type: str, style: str, both: bool) -> None:
    config: Any = BottleneckConfig(style=style, reduction_factor=2, mh_adapter=both)
    model = fill(get_peft_model(toy(model_type), config))
    x = inputs()
    out, base = model(x), toy(model_type)
    torch.testing.assert_close(out, by_formula(model, base, x), **NEAR)
    assert (out - base(x)).abs().max() > 0.1
    with_parameters = [adapter for adapter in model._peft.adapters["default"].adapters if adapter.state()]
    assert len(with_parameters) == (4 if both else 2)


@pytest.mark.parametrize(
    "fields",
    [
        *({"non_linearity": name} for name in FUNCTIONS),
        {"ln_before": True},
        {"ln_after": True},
        {"scaling": "learned", "ln_before": True, "ln_after": True},
        {"scaling": 0.5, "reduction_factor": 3},
        {"reduction_factor": {"0": 2, "1": 8}},
        {"reduction_factor": 0.5},
        {"leave_out": [0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_every_field_has_its_meaning(style: str, fields: dict[str, Any]) -> None:
    config = BottleneckConfig(**{"style": style, "reduction_factor": 2, **fields})  # type: ignore[arg-type]
    model = fill(get_peft_model(toy("toy_post"), config))
    x = inputs()
    torch.testing.assert_close(model(x), by_formula(model, toy("toy_post"), x), **NEAR)


def test_the_width_of_the_bottleneck() -> None:
    """d over the factor, rounded down, at least 1."""
    sizes = {}
    for factor in (1, 2, 3, 0.5, 100):
        found = plan(toy("toy_pre"), BottleneckConfig.parallel(reduction_factor=factor))
        found.check()
        # r·d + r and d·r + d, in two layers
        sizes[factor] = (found.trainable // 2 - WIDTH) // (2 * WIDTH + 1)
    assert sizes == {1: 8, 2: 4, 3: 2, 0.5: 16, 100: 1}


def test_dropout_acts_in_training_only() -> None:
    config = BottleneckConfig(dropout=0.5, reduction_factor=2)
    model = fill(get_peft_model(toy("toy_pre"), config))
    x = inputs()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), by_formula(model, toy("toy_pre"), x), **NEAR)


class TestStart:
    def tensors(self, init: str) -> dict[str, Tensor]:
        """Those of one adapter of width 512, so that the deviations can be told."""
        model: Any = nn.Sequential(nn.Linear(4, 512))
        torch.manual_seed(0)
        config: Any = BottleneckConfig(target_modules=["0"], reduction_factor=2, init_weights=init, scaling="learned")  # type: ignore[arg-type]
        adapter = get_peft_model(model, config)._peft.adapters["default"].adapters[0]
        assert adapter.starts_as_base == (init == "mam_adapter")
        found = {slot: tensor.detach() for slot, tensor in adapter.state().items()}
        assert not found["down.bias"].any() and not found["up.bias"].any() and found["scaling"] == 1
        return found

    def test_bert(self) -> None:
        found = self.tensors("bert")
        for name in ("down.weight", "up.weight"):  # 131072 values: the deviation is known to 0.2 %
            assert abs(float(found[name].std()) / 0.02 - 1) < 0.01 and found[name].abs().max() > 0.06

    def test_houlsby(self) -> None:
        """A normal distribution of deviation 0.01, cut off at 0.02, has a deviation of 0.00880."""
        found = self.tensors("houlsby")
        for name in ("down.weight", "up.weight"):
            assert abs(float(found[name].std()) / 0.0088 - 1) < 0.01 and found[name].abs().max() <= 0.02

    def test_mam_adapter(self) -> None:
        found = self.tensors("mam_adapter")
        assert not found["up.weight"].any()
        down, bound = found["down.weight"], 512**-0.5  # uniform up to 1 / sqrt(inputs), as nn.Linear has it
        assert 0.99 * bound < down.abs().max() <= bound and abs(float(down.std()) / (bound / 3**0.5) - 1) < 0.01


# ---- where adapters sit, and what is refused


def paths(model: Any, config: BottleneckConfig) -> list[tuple[str, str]]:
    found = plan(model, config)
    found.check()
    return [(site.path, site.adapter) for site in found.sites]


class TestPlaces:
    def test_norms_before(self) -> None:
        config = BottleneckConfig.pfeiffer(mh_adapter=True, leave_out=[1])
        assert paths(toy("toy_pre"), config) == [
            ("blocks.0.norm1", "ResidualRecorder"),
            ("blocks.0.output", "ResidualAdapter"),
            ("blocks.0.norm2", "ResidualRecorder"),
            ("blocks.0.down", "ResidualAdapter"),
        ]

    def test_norms_behind(self) -> None:
        assert paths(toy("toy_post"), BottleneckConfig.pfeiffer(leave_out=[0])) == [("blocks.1.norm2", "SumAdapter")]
        assert paths(toy("toy_post"), BottleneckConfig.parallel(mh_adapter=True, leave_out=[0])) == [
            ("blocks.1.query", "ResidualRecorder"),
            ("blocks.1.output", "ResidualAdapter"),
            ("blocks.1.up", "ResidualRecorder"),
            ("blocks.1.down", "ResidualAdapter"),
        ]

    def test_layers_named_by_hand(self) -> None:
        model: Any = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        assert paths(model, BottleneckConfig(target_modules=["1"])) == [("1", "OutputAdapter")]

    @pytest.mark.parametrize(
        ("model_type", "fields", "message"),
        [
            (
                "toy_no_norms",
                {"style": "parallel"},
                r"blocks\.0: where the residual stream enters.*'feed_forward_norm'",
            ),
            ("toy_no_norms", {"style": "pfeiffer"}, "where the residual stream enters"),
            ("toy_twins", {}, r"several modules have the role 'down' \(blocks\.0\.up, blocks\.0\.down\)"),
            ("toy_no_blocks", {}, "no module in the role 'blocks'"),
            ("toy_pre", {"cross_adapter": True}, "cross_adapter: no block of the model.*'cross_output'"),
            ("toy_tiny_net", {}, "mh_adapter: no block.*Switch it off"),
            ("toy_pre", {"leave_out": [0, 1]}, "it leaves out every layer"),
            ("toy_pre", {"leave_out": [2]}, r"leave_out: the model has no layer \[2\]; it has 2"),
            ("toy_pre", {"reduction_factor": {"7": 2}}, r"reduction_factor: the model has no layer \['7'\]"),
            ("toy_pre", {"reduction_factor": {"0": 2}}, r'nothing is given for layers \[1\]; add "default"'),
            ("nobody", {}, "what the modules of the model type 'nobody' are called is not known"),
        ],
    )
    def test_refusals(self, model_type: str, fields: dict[str, Any], message: str) -> None:
        model = toy(model_type)
        before = dict(model.named_modules())
        with pytest.raises((TargetError, ConfigError), match=message):
            get_peft_model(model, BottleneckConfig(**fields))
        assert type(model) is Toy and dict(model.named_modules()) == before

    def test_other_kinds_of_layers_are_refused(self) -> None:
        model: Any = nn.Sequential(nn.Conv1d(4, 4, 1), nn.LayerNorm(4))
        with pytest.raises(TargetError, match=r"0 \(Conv1d\)[\s\S]*1 \(LayerNorm\): a bottleneck adapter sits behind"):
            get_peft_model(model, BottleneckConfig(target_modules=["0", "1"]))


# ---- several adapters, and other methods


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model_type", ["toy_pre", "toy_post"])
@torch.no_grad()
def test_stacked_the_first_acts_first(model_type: str, style: str) -> None:
    """The second adapter's input is what the first has made of it; x, where that is the input, is the same."""
    config: Any = BottleneckConfig(style=style, reduction_factor=2).complete()
    x, base = inputs(), toy(model_type)
    model = fill(get_peft_model(toy(model_type), config, "a"), "a", 1)
    model.add_adapter("b", config)
    fill(model, "b", 2)
    model.set_adapter(["a", "b"])
    out = model(x)
    tensors = {
        name: [adapter.state() for adapter in model._peft.adapters[name].adapters if adapter.state()] for name in "ab"
    }
    for index, block in enumerate(base.blocks):
        post = block.post
        sub_layers = [(block.attend, block.norm1), (block.feed, block.norm2)]
        for position, (part, ln) in enumerate(sub_layers):
            h = part(x) if post else part(ln(x))
            sites = (0, 1) if style == "houlsby" else (1,)
            for name in "ab" if position in sites else "":
                here = tensors[name][index * len(sites) + sites.index(position)]
                z = h + x
                u = {"houlsby": h, "pfeiffer": ln(z) if post else z}.get(style, x)
                h = h + delta(u, here, config)
            x = ln(h + x) if post else h + x
    torch.testing.assert_close(out, x, **NEAR)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model_type", ["toy_pre", "toy_post"])
def test_rows_with_different_adapters(model_type: str, style: str) -> None:
    config: Any = BottleneckConfig(style=style, reduction_factor=2)
    model = fill(get_peft_model(toy(model_type), config, "a"), "a", 1)
    model.add_adapter("b", config)
    fill(model, "b", 2)
    x = inputs(4)
    mixed = model(x, adapter_names=["b", "a", "__base__", "b"])
    for name, rows in (("a", [1]), ("b", [0, 3])):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[rows], model(x)[rows], **NEAR)
    torch.testing.assert_close(mixed[[2]], toy(model_type)(x)[[2]], **NEAR)


@torch.no_grad()
def test_other_methods_at_the_norm_and_below() -> None:
    """Rescaling the norm's output further in: both uses of the norm see it."""
    model = toy("toy_post")
    rescaling = load_method("ia3")(target_modules=["up"], feedforward_modules=[])
    get_peft_model(model, rescaling, "scale")
    fill(model, "scale", 3)
    model.add_adapter("b", BottleneckConfig.pfeiffer(reduction_factor=2))
    fill(model, "b", 4)
    model.set_adapter(["scale", "b"])
    x, base = inputs(), toy("toy_post")
    for block, site in zip(base.blocks, model._peft.adapters["scale"].adapters, strict=True):
        scale = site.state()["ia3_l"].flatten()
        block.up.weight.mul_(scale[:, None])
        block.up.bias.mul_(scale)
    torch.testing.assert_close(model(x), by_formula(model, base, x, "b"), **NEAR)


@pytest.mark.parametrize("style", STYLES)
def test_merging_is_refused(style: str) -> None:
    config: Any = BottleneckConfig(style=style, reduction_factor=2)
    model = fill(get_peft_model(toy("toy_pre"), config))
    out = model(inputs())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="an activation function between its projections"):
            merge()
    assert torch.equal(model(inputs()), out)


def test_a_part_of_the_model_called_alone() -> None:
    """The stream that a sub-layer's adapter needs is known where the model itself is called."""
    model = get_peft_model(toy("toy_pre"), BottleneckConfig.parallel())
    with pytest.raises(RequestError, match="call the model itself"):
        model.blocks[0](inputs())


def test_a_layer_called_past_its_norm() -> None:
    class Odd(Toy):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.blocks[0].down(F.pad(x, (0, INNER - WIDTH)))
            return out

    model = get_peft_model(Odd().double(), BottleneckConfig.parallel())
    with pytest.raises(RequestError, match=r"blocks\.0\.down: the input of blocks\.0\.norm2.*was not seen"):
        model(inputs())
