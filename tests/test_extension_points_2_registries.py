"""Extension points R1, R2, R3: storage, roles of a model type, foreign files; proved by small extensions of our own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_core import (
    BaseLayer,
    CheckpointError,
    CheckpointMismatchError,
    PeftModel,
    TargetError,
    get_peft_model,
    hookimpl,
    load_method,
)
from peft_core.architectures import role_paths
from peft_core.extensions import extensions
from tests.toy_algebra import PLUGINS, DenseConfig, GainConfig, RankConfig, X
from tests.toy_plugins import net, randomise, registered


@contextmanager
def extension(**hooks: Any) -> Iterator[None]:
    extensions.register(SimpleNamespace(**{name: hookimpl(hook) for name, hook in hooks.items()}), "toy extension")
    try:
        yield
    finally:
        extensions.unregister("toy extension")


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(*PLUGINS):
        yield


# -- R1: eight bits per weight, a scale per row ------------------------------------------------------------------------


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return (weight / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """Not an `nn.Linear`, and without a parameter."""

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        codes, scale = quantised(layer.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.codes * self.scale, self.bias)


class Int8Layer(BaseLayer):
    kind = "linear"
    write_is_approximate = "weights are kept in 8 bits"
    names = ("weight", "bias")
    module: Int8Linear

    @property
    def in_features(self) -> int:
        return self.module.codes.shape[1]

    @property
    def out_features(self) -> int:
        return self.module.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.build_device or self.module.scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.build_dtype or self.module.scale.dtype

    def params(self) -> dict[str, Tensor]:
        return {"weight": self.module.codes * self.module.scale, "bias": self.module.bias}

    def write(self, params: Mapping[str, Tensor]) -> None:
        if "weight" in params:
            self.module.codes, self.module.scale = quantised(params["weight"])
        if "bias" in params:
            self.module.bias = params["bias"]

    def snapshot(self, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        return dict(self.module.named_buffers())

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        for name, tensor in snapshot.items():
            setattr(self.module, name, tensor)

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return linear(args[0], params["weight"], params["bias"])


def peft_layer(path: str, module: nn.Module) -> BaseLayer | None:
    return Int8Layer(module, path) if isinstance(module, Int8Linear) else None


def int8() -> tuple[nn.Module, nn.Module]:
    """A model in 8 bits, and the dense model that computes the same."""
    model, dense = net(), net()
    for block, other in zip(model.blocks, dense.blocks, strict=True):
        block.up = Int8Linear(block.up)  # type: ignore[assignment]
        other.up.weight.data = block.up.codes * block.up.scale
    return model, dense


def settings() -> dict[str, Any]:
    up = {"target_modules": ["up"]}
    lora = load_method("lora")
    return {
        "delta": RankConfig(**up),
        "gain": GainConfig(**up),
        "weight": DenseConfig(**up),
        "lora": lora(r=2, **up),
        "dora": lora(r=2, use_dora=True, **up),
        "ia3": load_method("ia3")(feedforward_modules=[], **up),
        "oft": load_method("oft")(oft_block_size=3, use_cayley_neumann=False, **up),
        "boft": load_method("boft")(boft_block_size=3, **up),
        "loha": load_method("loha")(r=2, **up),
        "lokr": load_method("lokr")(r=2, **up),
        "pissa": lora(r=2, init_lora_weights="pissa", **up),
    }


OURS = ("lora", "dora", "ia3", "oft", "boft", "loha", "lokr", "pissa")


@pytest.mark.parametrize("name", ["delta", "gain", "weight", *OURS])
def test_every_method_works_on_a_storage_of_an_extension(name: str, tmp_path: Path) -> None:
    config = settings()[name]
    with extension(peft_layer=peft_layer):
        model, dense = int8()
        expected = dense(X).logits
        torch.testing.assert_close(model(X).logits, expected, rtol=1e-6, atol=1e-6)
        for each in (model, dense):
            torch.manual_seed(0)
            get_peft_model(each, config)
        torch.testing.assert_close(model(X).logits, expected, rtol=1e-5, atol=1e-5)
        randomise(model)
        randomise(dense)
        adapted = model(X).logits.detach()
        torch.testing.assert_close(adapted, dense(X).logits, rtol=1e-5, atol=1e-5)
        assert (adapted - expected).abs().max() > 0.01
        model(X).logits.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(int8()[0], tmp_path)
        assert torch.equal(again(X).logits, adapted)
        if name == "gain":  # it has no merged form
            return

        module = model.blocks[0].up.base_layer
        before = dict(module.named_buffers())
        with pytest.warns(UserWarning, match=r"blocks.\d.up: merging into a Int8Linear is an approximation") as caught:
            model.merge_adapter()
        assert len(caught) == 2, "once for each layer"
        dense.merge_adapter()
        codes, scale = quantised(dense.blocks[0].up.weight)
        assert (module.codes - codes).abs().max() <= 1 and module.codes.dtype == torch.int8  # a tie of rounding
        torch.testing.assert_close(module.scale, scale, rtol=1e-6, atol=0)
        error = (model(X).logits - adapted).abs().max()
        assert 0 < error < 0.1
        model.unmerge_adapter()
        assert all(module._buffers[key] is value for key, value in before.items())
        assert torch.equal(model(X).logits, adapted)
        with pytest.warns(UserWarning, match="approximation"):
            plain = model.merge_and_unload()
        assert type(plain) is type(net()) and type(plain.blocks[0].up) is Int8Linear
        assert (plain(X).logits - adapted).abs().max() == error


def test_without_the_extension_such_a_layer_is_refused() -> None:
    model, _ = int8()
    with pytest.raises(TargetError, match="blocks.0.up.*Int8Linear"):
        get_peft_model(model, load_method("lora")(target_modules=["up"]))


def test_a_dense_layer_beside_it_merges_without_a_warning() -> None:
    with extension(peft_layer=peft_layer), warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = int8()
        get_peft_model(model, RankConfig(target_modules=["down"]))
        model.merge_adapter()


# -- R2: a model type that nobody knows --------------------------------------------------------------------------------


ROLES = {"query": ["up"], "value": ["down"], "key": ["up"], "down": ["down"], "up": ["up"], "blocks": ["blocks"]}


class DefaultsConfig(RankConfig):
    peft_type: ClassVar[str] = "TOYDEFAULTS"
    default_roles: ClassVar[tuple[str, ...]] = ("down",)


def peft_architectures() -> Mapping[str, Any]:
    return {"toyformer": ROLES}


def stranger() -> Any:
    model = net()
    model.config = SimpleNamespace(model_type="toyformer")
    return model


def test_roles_of_a_new_model_type_give_all_methods_their_defaults() -> None:
    from tests.toy_algebra import Low
    from tests.toy_plugins import plugin

    with registered(plugin(DefaultsConfig, Low)):
        with pytest.raises(TargetError, match="toyformer"):
            get_peft_model(stranger(), DefaultsConfig())
        with pytest.raises(TargetError, match="toyformer"):
            role_paths(stranger(), "down")
        with extension(peft_architectures=peft_architectures):
            model = get_peft_model(stranger(), DefaultsConfig())
            assert list(model._peft.sites) == ["blocks.0.down", "blocks.1.down"]
            assert role_paths(model, "down") == ("blocks.0.down", "blocks.1.down")
            assert role_paths(model, "up") == ("blocks.0.up", "blocks.1.up")
            lora = get_peft_model(stranger(), load_method("lora")())
            assert set(lora._peft.sites) == {f"blocks.{i}.{n}" for i in range(2) for n in ("up", "down")}
        with pytest.raises(TargetError, match="toyformer"):
            get_peft_model(stranger(), DefaultsConfig())


# -- R3: files in which a dot is an underscore, so that only the model can tell the paths ------------------------------


FILE = "toy_kohya.safetensors"


def flat_names(model: Any) -> dict[str, str]:
    """Flat name -> path, for the layers of the base, whatever adapters it has."""
    tensors = model.base_state_dict() if isinstance(model, PeftModel) else model.state_dict()
    paths = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    return {"lora_net_" + path.replace(".", "_"): path for path in paths}


def peft_checkpoint(path: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    file = path / FILE if path.is_dir() else path
    if file.name != FILE or not file.exists():
        return None
    known, found, stored = flat_names(model), {}, load_file(file)
    ranks, paths = set(), []
    for name in sorted({key.partition(".")[0] for key in stored}):
        down, up, alpha = (stored[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        place = known.get(name, name)
        found[f"base_model.model.{place}.a"] = down
        found[f"base_model.model.{place}.b"] = up * (alpha / len(down))
        ranks.add(len(down))
        paths.append(place)
    (rank,) = ranks
    return {"peft_type": "TOYLOW", "r": rank, "target_modules": paths}, found


def peft_export(
    save_format: str, path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> bool | None:
    if save_format != "toy-kohya" or config["peft_type"] != "TOYLOW":
        return None
    names = {path: flat for flat, path in flat_names(model).items()}
    found = {}
    for key, tensor in tensors.items():
        place, _, slot = key.removeprefix("base_model.model.").rpartition(".")
        part = {"a": "lora_down.weight", "b": "lora_up.weight"}[slot]
        found[f"{names[place]}.{part}"] = tensor
        found[f"{names[place]}.alpha"] = torch.tensor(float(config["r"]))
    path.mkdir(parents=True, exist_ok=True)
    save_file(found, path / FILE)
    return True


def test_a_foreign_file_goes_out_and_comes_back(tmp_path: Path) -> None:
    config = RankConfig(target_modules=["blocks.0.up", "down"], r=3)
    with extension(peft_checkpoint=peft_checkpoint, peft_export=peft_export):
        model = randomise(get_peft_model(net(), config))
        model.save_pretrained(tmp_path / "out", save_format="toy-kohya")
        assert [file.name for file in (tmp_path / "out").iterdir()] == [FILE]
        names = {key.partition(".")[0] for key in load_file(tmp_path / "out" / FILE)}
        assert names == {"lora_net_blocks_0_up", "lora_net_blocks_0_down", "lora_net_blocks_1_down"}
        for place in (tmp_path / "out", tmp_path / "out" / FILE):
            again = PeftModel.from_pretrained(net(), place)
            assert again.peft_config["default"].r == 3
            assert torch.equal(again(X).logits, model(X).logits)
        beside = get_peft_model(net(), GainConfig(target_modules=["up"]), "gain")
        beside.load_adapter(tmp_path / "out", "foreign")
        beside.set_adapter("foreign")
        assert torch.equal(beside(X).logits, model(X).logits)
        model.save_pretrained(tmp_path / "own")  # the library's own files
        assert json.loads((tmp_path / "own/adapter_config.json").read_text())["peft_type"] == "TOYLOW"


def test_an_alpha_of_others_is_kept(tmp_path: Path) -> None:
    down, up = torch.randn(2, 6), torch.randn(12, 2)
    name = "lora_net_blocks_1_up"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(0.5)},
        tmp_path / FILE,
    )
    with extension(peft_checkpoint=peft_checkpoint):
        model = PeftModel.from_pretrained(net(), tmp_path)
    plain = net()
    plain.blocks[1].up.weight.data += 0.25 * up @ down
    torch.testing.assert_close(model(X).logits, plain(X).logits, rtol=1e-5, atol=1e-5)


def test_foreign_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with extension(peft_checkpoint=peft_checkpoint, peft_export=peft_export):
        model = randomise(get_peft_model(net(), RankConfig(target_modules=["up"])))
        before = model(X).logits
        with pytest.raises(CheckpointError, match="no installed extension writes the format 'toy-kohia'"):
            model.save_pretrained(tmp_path / "out", save_format="toy-kohia")
        assert not (tmp_path / "out").exists()
        model.save_pretrained(tmp_path / "out", save_format="toy-kohya")
        with pytest.raises(CheckpointMismatchError, match=r"blocks.\d.up"):
            PeftModel.from_pretrained(net(width=5), tmp_path / "out")
        other = get_peft_model(net(blocks=3), RankConfig(target_modules=["up"]))
        other.save_pretrained(tmp_path / "three", save_format="toy-kohya")
        with pytest.raises(CheckpointMismatchError, match="lora_net_blocks_2_up"):
            model.load_adapter(tmp_path / "three", "three")
        assert list(model.peft_config) == ["default"] and torch.equal(model(X).logits, before)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        PeftModel.from_pretrained(net(), tmp_path / "out")
