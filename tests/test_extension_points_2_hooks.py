"""Hooks seen from outside: their trace, errors from inside of plugins, and that none runs per forward or per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core import (
    Adapter,
    AdapterState,
    SiteRequest,
    TargetedConfig,
    drive,
    get_peft_model,
    hookimpl,
    load_method,
)
from peft_core.extensions import extensions
from peft_core.plugin_manager import EXTENSION_HOOKS, METHOD_HOOKS
from tests.tiny_transformers import make
from tests.toy_plugins import net, plugin, randomise, registered

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])
IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4], [6, 6, 9, 10]])


class EveryConfig(TargetedConfig):
    """A method that implements every hook."""

    peft_type: ClassVar[str] = "TOYEVERY"
    request_arguments: ClassVar[tuple[str, ...]] = ("strength",)
    default_roles: ClassVar[tuple[str, ...]] = ("up",)


class Every(Adapter):
    uses_call = True
    fails: ClassVar[str] = ""

    def __init__(self, layer: Any, config: EveryConfig) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        self.fail("reset_parameters")
        nn.init.ones_(self.gain)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        self.fail("forward")
        out = base(*args, **kwargs)
        base.call.add_loss("spread", out.square().mean())
        strength = base.call.rows("strength", len(out)).view(-1, *[1] * (out.dim() - 1))
        return out * (1 + strength * (self.gain - 1))

    @classmethod
    def forward_rows(cls, adapters: Any, index: Tensor, base: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.fails == "forward_rows":
            raise ZeroDivisionError("boom")
        return NotImplemented

    def losses(self) -> Mapping[str, Tensor]:
        self.fail("losses")
        return {"size": self.gain.square().sum()}

    def merge(self, params: Any) -> Any:
        return {"weight": params["weight"] * self.gain[:, None], "bias": params["bias"] * self.gain}

    def fail(self, where: str) -> None:
        if self.fails == where:
            raise ZeroDivisionError("boom")


def peft_combine(sources: Any, model: Any) -> AdapterState:
    return AdapterState(sources[0].config, {path: dict(one.state()) for path, one in sources[0].adapters.items()})


HOOKS: dict[str, Callable[..., Any]] = {
    "peft_match": lambda path: None,
    "peft_resolve": lambda config: config,
    "peft_structure": lambda config: None,
    "peft_sites": lambda model: [],
    "peft_prepare": lambda shared: None,
    "peft_merge": lambda adapter, params: adapter.merge(params),
    "peft_state_key": lambda key: key,
    "peft_calibrate": lambda batches: None,
    "peft_combine": peft_combine,
    "peft_step": lambda event: None,
    "peft_param_groups": lambda parameters, lr: [{"params": list(parameters.values()), "lr": 2 * lr}],
}
EXTENSION: dict[str, Callable[..., Any]] = {
    "peft_layer": lambda path: None,
    "peft_architectures": lambda: {"toyarch": {"up": ["up"]}},
    "peft_checkpoint": lambda path: None,
    "peft_export": lambda save_format: save_format == "nothing" or None,
}


def failing(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same arguments, since hooks are called by them."""
    import inspect

    names = ", ".join(inspect.signature(hook).parameters)
    found: Callable[..., Any] = eval(f"lambda {names}: 1 // 0")
    return found


@contextmanager
def everything(fails: str = "") -> Iterator[Any]:
    """The method that implements all hooks, and such an extension; one of the hooks raises."""
    Every.fails = fails
    hooks, others = (
        {name: failing(hook) if name == fails else hook for name, hook in given.items()} for given in (HOOKS, EXTENSION)
    )
    one = plugin(EveryConfig, Every, **hooks)
    if fails == "peft_build":
        one.peft_build = hookimpl(failing(lambda config, layer: None))
    extension = SimpleNamespace(**{name: hookimpl(hook) for name, hook in others.items()})
    with registered(one):
        extensions.register(extension, "toy extension")
        try:
            yield one
        finally:
            extensions.unregister("toy extension")
            Every.fails = ""


def use_everything(folder: Path) -> Any:
    """A life in which every hook is called."""
    model = net()
    model.config = SimpleNamespace(model_type="toyarch")
    get_peft_model(model, EveryConfig(), calibration=[(X,)])
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1), lr=0.1)
    drive(model, optimizer)
    model(X, labels=LABELS, strength=1.0).loss.backward()
    optimizer.step()
    model.add_weighted_adapter(["default"], [1.0], "copy", "any")
    model(X, labels=LABELS, strength=1.0, adapter_names=["default", "copy", "__base__", "copy"])
    model.save_pretrained(folder / "own", selected_adapters=["default"])
    model.save_pretrained(folder / "foreign", save_format="nothing")
    (folder / "empty").mkdir()
    with pytest.raises(Exception, match="holds no adapter|boom|by zero"):
        model.load_adapter(folder / "empty", "other")
    model.merge_adapter()
    return model


def test_the_trace_covers_every_hook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PEFT_TRACE_HOOKS", "1")
    with everything():
        use_everything(tmp_path)
    trace = capsys.readouterr().err
    lines = [line for line in trace.splitlines() if line.startswith("peft-core: ")]
    for hook in (*METHOD_HOOKS, *EXTENSION_HOOKS):
        asked = [line for line in lines if f": {hook}(" in line]
        assert asked, f"{hook} is not in the trace"
        assert all("toy extension" in line or "SimpleNamespace" in line for line in asked if "asks nobody" not in line)
    assert any("peft_step(" in line and "event='before'" in line and "step=0" in line for line in lines)


@pytest.mark.parametrize("hook", [*HOOKS, "peft_build"])
def test_an_error_inside_a_methods_hook_says_whose_and_where(hook: str, tmp_path: Path) -> None:
    with everything(fails=hook), pytest.raises(ZeroDivisionError) as found:
        use_everything(tmp_path)
    notes = "\n".join(found.value.__notes__)
    assert f"Raised in {hook}" in notes and "method 'toyevery'" in notes
    if hook in ("peft_build", "peft_merge", "peft_match"):
        place = (
            "the model itself" if hook == "peft_match" else "blocks.0.up"
        )  # the model is the first to be asked about
        assert f"Raised in {hook} at {place}" in notes


@pytest.mark.parametrize("hook", ["peft_layer", "peft_architectures", "peft_export"])
def test_an_error_inside_an_extensions_hook_says_whose_and_where(hook: str, tmp_path: Path) -> None:
    with everything(fails=hook), pytest.raises(ZeroDivisionError) as found:
        use_everything(tmp_path)
    notes = "\n".join(found.value.__notes__)
    assert f"Raised in {hook}" in notes and "toy extension" in notes
    if hook != "peft_architectures":
        assert f"{hook} at {'blocks' if hook == 'peft_layer' else tmp_path}" in notes


def test_an_error_inside_a_reader_of_files_names_the_file(tmp_path: Path) -> None:
    with everything(fails="peft_checkpoint"), pytest.raises(ZeroDivisionError) as found:
        get_peft_model(net(), EveryConfig(target_modules=["up"])).load_adapter(tmp_path, "x")
    assert f"Raised in peft_checkpoint at {tmp_path}, asked of the extensions" in found.value.__notes__[0]


@pytest.mark.parametrize(
    ("where", "note"),
    [
        ("forward", "Raised in the adapted layer blocks.0.up, which has 'default' (Every)."),
        ("forward_rows", "Raised in the adapted layer blocks.0.up, which has 'default' (Every), 'copy' (Every)."),
        ("losses", "Raised in losses() of adapter 'default' (Every) at blocks.0.up."),
        ("reset_parameters", "Raised in Every.reset_parameters at blocks.0.up, of the method 'toyevery'"),
    ],
)
def test_an_error_inside_an_adapter_says_whose_and_where(where: str, note: str, tmp_path: Path) -> None:
    with everything(fails=where), pytest.raises(ZeroDivisionError) as found:
        use_everything(tmp_path)
    assert any(text.startswith(note) for text in found.value.__notes__), found.value.__notes__


class StrategyConfig(EveryConfig):
    peft_type: ClassVar[str] = "TOYSTRATEGY"
    allow_no_targets: ClassVar[bool] = True


class Strategy(Adapter):
    uses_call = True

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), base.adapters("other"):
            base.call.scratch["hidden"] = base(
                *args, **{k: v for k, v in kwargs.items() if k not in ("cache", "labels")}
            )
        return base(*args, **kwargs)


def test_no_hook_runs_per_forward_or_token() -> None:
    calls: list[str] = []

    def count(hook: str, impls: Any, kwargs: Any) -> None:
        calls.append(hook)

    def done(outcome: Any, hook: str, impls: Any, kwargs: Any) -> None:
        pass

    strategy = plugin(StrategyConfig, Strategy, peft_sites=lambda: [SiteRequest("")])
    with everything(), registered(strategy):
        managers = [load_method(name).manager for name in ("toyevery", "toystrategy")] + [extensions._manager]
        undo = [manager.add_hookcall_monitoring(count, done) for manager in managers]
        up = {"target_modules": ["up_proj", "q_proj"]}
        model = get_peft_model(make("llama").train(), EveryConfig(**up))
        for seed, name in enumerate(("other", "third")):
            model.add_adapter(name, EveryConfig(**up))
            randomise(model, name, seed=seed)
        model.add_adapter("strategy", StrategyConfig(target_modules=[]))
        assert {"peft_build", "peft_prepare", "peft_layer"} <= set(calls), "the counter counts"
        for active in ("default", ["default", "strategy"]):
            model.set_adapter(active)
            optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1), lr=0.1)
            drive(model, optimizer)
            calls.clear()
            model(IDS, labels=IDS, strength=[0.1, 0.5, 1.0]).loss.backward()
            with torch.no_grad():
                model.generate(IDS, strength=[0.1, 0.5, 1.0], max_new_tokens=3, num_beams=2, do_sample=False)
                model(IDS, strength=1.0, adapter_names=["other", "third", "__base__"])
            assert calls == []
            optimizer.step()
            assert calls == ["peft_step"] * 2, "the strategy has none"
        for one in undo:
            one()
