"""A slot that a file holds as one tensor and the adapter as two: saved, loaded, filled again and set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import (
    Adapter,
    AdapterState,
    PeftModel,
    TargetedConfig,
    get_peft_model,
    get_peft_model_state_dict,
    hookimpl,
    set_peft_model_state_dict,
)
from peft_core.layers import BaseLayer
from peft_core.methods import register_method, unregister_method


class JoinedConfig(TargetedConfig):
    peft_type = "JOINED"


class Joined(Adapter):
    """A trained gain and a frozen one; a file has them as one tensor (2, n)."""

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(4)
        self.start = layer.parameter(4).requires_grad_(False)

    @property
    def both(self) -> Tensor:
        return torch.stack((self.gain, self.start)).detach()

    def reset_parameters(self) -> None:
        self.gain.fill_(1)
        self.start.fill_(1)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs) * (self.gain - self.start + 1)

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {"both": (self, "both")}

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        yield self, "gain", value[0].clone()
        yield self, "start", value[1].clone()


def calibrate(config: JoinedConfig, batches: Any) -> AdapterState:
    return AdapterState(config, {"0": {"both": next(iter(batches))}})


@pytest.fixture(autouse=True)
def _method() -> Iterator[None]:
    plugin = SimpleNamespace(
        peft_config=hookimpl(lambda: JoinedConfig, specname="peft_config"),
        peft_build=hookimpl(lambda layer: Joined(layer), specname="peft_build"),
        peft_calibrate=hookimpl(calibrate, specname="peft_calibrate"),
    )
    register_method(plugin)
    yield
    unregister_method("joined")


def model(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), JoinedConfig(target_modules=["0"]), **kwargs)


VALUES = torch.arange(8.0).view(2, 4)
KEY = "base_model.model.0.both"


def adapter(of: Any) -> Joined:
    found = of[0].adapters.default
    assert isinstance(found, Joined)
    return found


def holds(of: Any, values: Tensor) -> bool:
    one = adapter(of)
    return torch.equal(one.gain, values[0]) and torch.equal(one.start, values[1])


def test_values_from_data_reach_both_tensors() -> None:
    assert holds(model(calibration=[VALUES]), VALUES)


def test_a_file_has_one_tensor_and_loads_into_two(tmp_path: Path) -> None:
    saved = model(calibration=[VALUES])
    assert get_peft_model_state_dict(saved).keys() == {KEY}
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path, is_trainable=True)
    assert holds(loaded, VALUES)
    assert [p.requires_grad for p in (adapter(loaded).gain, adapter(loaded).start)] == [True, False]


def test_loading_again_keeps_the_tensors(tmp_path: Path) -> None:
    model(calibration=[VALUES]).save_pretrained(tmp_path)
    present = model()
    before = adapter(present).gain, adapter(present).start
    present.load_adapter(tmp_path, "default", replace=True, is_trainable=True)
    assert holds(present, VALUES)
    assert all(one is other for one, other in zip(before, (adapter(present).gain, adapter(present).start), strict=True))


def test_setting_a_state_dict_writes_both() -> None:
    present = model()
    set_peft_model_state_dict(present, {KEY: VALUES})
    assert holds(present, VALUES)
