"""Toy methods with request arguments, for tests."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import Adapter, AdapterConfig, SiteRequest, TargetedConfig, get_peft_model
from tests.tiny_transformers import TARGETS, make
from tests.toy_plugins import plugin, randomise


class TaskConfig(TargetedConfig):
    """A rank-one update with a vector for each task."""

    peft_type: ClassVar[str] = "TOYTASK"
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)
    tasks: int = 3


class TaskAdapter(Adapter):
    seen: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, layer: Any, config: TaskConfig) -> None:
        super().__init__(layer)
        self.read = layer.parameter(layer.in_features)
        self.write = layer.parameter(config.tasks, layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.read)
        nn.init.zeros_(self.write)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0]
        if not torch.compiler.is_compiling():
            self.seen.append((self.layer.path, len(x)))
        write = self.write[base.call.rows("task_ids", len(x))]
        return base(*args, **kwargs) + (x @ self.read)[..., None] * write.view(len(x), *[1] * (x.dim() - 2), -1)


class SuffixConfig(TargetedConfig):
    """Acts from an invocation token of the prompt on, wherever a row has it."""

    peft_type: ClassVar[str] = "TOYSUFFIX"
    request_arguments: ClassVar[tuple[str, ...]] = ("invocation",)


class SuffixAdapter(Adapter):
    def __init__(self, layer: Any, config: SuffixConfig) -> None:
        super().__init__(layer)
        self.shift = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call, out = base.call, base(*args, **kwargs)
        key = (self.shared, "start")
        if key not in call.carried:
            ids = call.inputs["input_ids"]
            wanted = call.rows("invocation", len(ids)).unsqueeze(1)
            found = ids == wanted
            nowhere = torch.full_like(wanted[:, 0], 10**6)
            call.carried[key] = torch.where(found.any(1), found.int().argmax(1), nowhere)
        at = call.past_length + torch.arange(out.shape[1])
        return out + (at >= call.carried[key][:, None])[..., None] * self.shift


class PromptEditConfig(AdapterConfig):
    """Edits what a block gives for the first positions of a prompt, and nothing that is decoded."""

    peft_type: ClassVar[str] = "TOYEDIT"
    positions: int = 2


class PromptEdit(Adapter):
    uses_call = True
    phases: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, layer: Any, config: PromptEditConfig) -> None:
        super().__init__(layer)
        self.positions = config.positions
        self.shift = layer.parameter(layer.request.meta["width"])

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out, call = base(*args, **kwargs), base.call
        self.phases.append((call.phase, call.past_length))
        if call.phase == "decode":
            return out
        return torch.cat([out[:, : self.positions] + self.shift, out[:, self.positions :]], 1)


def _first_block(model: Any) -> list[SiteRequest]:
    return [SiteRequest("model.layers.0", meta={"width": model.config.hidden_size})]


PLUGINS = (
    plugin(TaskConfig, TaskAdapter),
    plugin(SuffixConfig, SuffixAdapter),
    plugin(PromptEditConfig, PromptEdit, peft_sites=_first_block),
)

IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4], [6, 6, 9, 10]])
TASKS = [2, 0, 1]
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def tasked(kind: str = "llama", **fields: Any) -> Any:
    model = get_peft_model(make(kind, **fields), TaskConfig(target_modules=TARGETS[kind]))
    return randomise(model, std=1.0)


# Products of one row and of several are summed in another order.
def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
