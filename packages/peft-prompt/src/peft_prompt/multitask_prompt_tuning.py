"""Multitask prompt tuning: one prompt for many tasks, and a low-rank factor for each.

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning",
https://arxiv.org/abs/2303.02861, section 3.1: the prompt of task k is P_k = P* ∘ W_k with W_k = u_k v_kᵀ, here of rank
`num_ranks`. Trained on the source tasks first; a target task then starts from the shared P* and the mean of their
factors, or one task's (section 3.2).

Each row of a batch names its task: `model(..., task_ids=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.adapter_file import AdapterFile
from peft_core.backbones import backbone_sites
from peft_core.errors import CheckpointMismatchError, ConfigError, RequestError
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, SiteRequest
from peft_core.link import Link
from peft_core.prompts import EncoderMask, PromptAdapter

from .config import KEYS, is_encoder_decoder, pools_first, saved_heads, sizes, width_of_embeddings
from .starts import StartConfig, table

SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


class MultitaskPromptTuningConfig(StartConfig):
    """A shared table and `num_tasks` factors of rank `num_ranks`; see `StartConfig` for the table's start.

    `prompt_tuning_init` may also start from source tasks: "AVERAGE_SOURCE_TASKS" (the mean of their factors),
    "EXACT_SOURCE_TASK" (the factor of task `prompt_tuning_init_task`), both for a single target task, or
    "ONLY_SOURCE_SHARED" (fresh factors). `prompt_tuning_init_state_dict_path` is then the source's file or directory:
    safetensors, never a pickle.

    An adapter's file does not say where it started from: it says "RANDOM", and no reader looks for the source.
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = Field(0, ge=0)
    num_ranks: int = Field(1, ge=1)
    num_tasks: int = Field(1, ge=1)

    @classmethod
    def starts(cls) -> tuple[str, ...]:
        return (*super().starts(), *SOURCES)

    @model_validator(mode="after")
    def _a_source_where_one_is_needed(self) -> MultitaskPromptTuningConfig:
        if self.prompt_tuning_init in SOURCES:
            if not self.prompt_tuning_init_state_dict_path:
                raise ValueError(f"{self.prompt_tuning_init} starts from prompt_tuning_init_state_dict_path, not given")
            if self.num_tasks != 1 and self.prompt_tuning_init != "ONLY_SOURCE_SHARED":
                raise ValueError(f"{self.prompt_tuning_init} is for one target task; num_tasks is {self.num_tasks}")
        return self

    def beside_tensors(self, *, inference_mode: bool | None = None) -> dict[str, Any]:
        """The config in an adapter's file, without the way to the file that it started from."""
        data = super().beside_tensors(inference_mode=inference_mode)
        if self.prompt_tuning_init in SOURCES:
            data.update(prompt_tuning_init="RANDOM", prompt_tuning_init_state_dict_path=None, prompt_tuning_init_task=0)
        return data


@hookimpl
def peft_config() -> type[MultitaskPromptTuningConfig]:
    return MultitaskPromptTuningConfig


@hookimpl
def peft_resolve(config: MultitaskPromptTuningConfig, model: nn.Module) -> MultitaskPromptTuningConfig:
    """The sizes that were left open. Encoder and decoder both have rows of the table."""
    parts = 2 if is_encoder_decoder(model) else 1
    width = width_of_embeddings(config, model)
    return config.resolve(**sizes(config, model, token_dim=width, num_transformer_submodules=parts))


@hookimpl
def peft_sites(config: MultitaskPromptTuningConfig, model: nn.Module) -> Sequence[SiteRequest]:
    """The backbone; or the encoder, and twice the decoder, which sees the encoder's prompt and may have its own."""
    sites = []
    for site in backbone_sites(model):
        if site.meta["role"] == "decoder":
            sites.append(SiteRequest(site.path, part="mask", meta={"role": "mask"}))
        if site.meta["role"] != "decoder" or config.num_transformer_submodules == 2:
            keys = "" if site.meta["role"] == "decoder" else KEYS
            sites.append(SiteRequest(site.path, key_prefix=keys, meta=site.meta))
    return [*sites, *saved_heads(config, model)]


@hookimpl
def peft_prepare(shared: nn.Module, trusted: bool) -> None:
    """Keep in mind whose word the config is."""
    shared.__dict__["trusted"] = trusted


@hookimpl
def peft_build(config: MultitaskPromptTuningConfig, layer: BaseLayer, shared: nn.Module, model: nn.Module) -> Adapter:
    role = layer.request.meta["role"]
    if role == "mask":
        return EncoderMask(layer, config.n)
    if role == "decoder":
        return DecoderPrompt(layer, config, shared.__dict__.get("prompts"))  # none where it was refused
    found = TaskPrompts(layer, config, pools_first(model))
    shared.__dict__["prompts"] = found
    return found


class TaskPrompts(PromptAdapter):
    """`prompt_embeddings` (rows, d), `prefix_task_cols` (tasks, rows, ranks), `prefix_task_rows` (tasks, ranks, d).

    Rows are n · submodules; the first n are this backbone's.
    """

    def __init__(self, layer: BaseLayer, config: MultitaskPromptTuningConfig, pooled: bool = False) -> None:
        super().__init__(layer)
        self.config = config
        self.num_virtual_tokens = config.n
        self.keep_positions = pooled or layer.request.meta["role"] == "encoder"
        rows, width = config.n * (config.num_transformer_submodules or 1), config.token_dim or 0
        self.prompt_embeddings = layer.parameter(rows, width)
        self.prefix_task_cols = layer.parameter(config.num_tasks, rows, config.num_ranks)
        self.prefix_task_rows = layer.parameter(config.num_tasks, config.num_ranks, width)

    def reset_parameters(self) -> None:
        """The table as the config says; factors from N(0, 0.02²), or from a source."""
        config, trusted = self.config, self.shared.__dict__["trusted"]
        with torch.no_grad():
            nn.init.normal_(self.prefix_task_cols, std=0.02)
            nn.init.normal_(self.prefix_task_rows, std=0.02)
            if config.prompt_tuning_init not in SOURCES or not trusted:
                self.prompt_embeddings.copy_(table(config, self, tuple(self.prompt_embeddings.shape), trusted))
                return
            for name, value in source(config).items():
                own: Tensor = getattr(self, name)
                if own.shape != value.shape:
                    raise CheckpointMismatchError(
                        f"{config.prompt_tuning_init_state_dict_path}: {name} of the source has the shape "
                        f"{tuple(value.shape)}, this adapter's {tuple(own.shape)}"
                    )
                own.copy_(value)

    def virtual_tokens(self, batch: int, base: Link) -> Tensor:
        return self.of_tasks(slice(0, self.num_virtual_tokens), batch, base)

    def of_tasks(self, rows: slice, batch: int, base: Link) -> Tensor:
        """P_k = P* ∘ (cols_k rows_k) of each row's task, (batch, n, d).

        Raises `RequestError` where the tasks are not given, or there is no such task.
        """
        tasks, number = self.config.num_tasks, base.call.arguments.get("task_ids")
        ids = (
            torch.zeros(batch, dtype=torch.long) if number is None and tasks == 1 else base.call.rows("task_ids", batch)
        )
        ids = ids.to(self.prompt_embeddings.device)
        if not torch.compiler.is_compiling() and bool(((ids < 0) | (ids >= tasks)).any()):
            raise RequestError(f"task_ids: {ids.tolist()}; the adapter has the tasks 0 to {tasks - 1}")
        factors = self.prefix_task_cols[ids, rows] @ self.prefix_task_rows[ids]
        return self.prompt_embeddings[rows] * factors


class DecoderPrompt(PromptAdapter):
    """The second half of the rows, in front of a decoder's input. The encoder's adapter keeps the tensors."""

    def __init__(self, layer: BaseLayer, config: MultitaskPromptTuningConfig, prompts: TaskPrompts | None) -> None:
        super().__init__(layer)
        self.num_virtual_tokens = config.n
        self.__dict__["prompts"] = prompts  # by reference: it is registered at its own site

    def virtual_tokens(self, batch: int, base: Link) -> Tensor:
        prompts: TaskPrompts = self.__dict__["prompts"]
        n = self.num_virtual_tokens
        return prompts.of_tasks(slice(n, 2 * n), batch, base)


def source(config: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """What a target task takes over from the file of the source tasks, by slot.

    Raises `CheckpointError` for what is not a whole safetensors file, `CheckpointMismatchError` for one without these
    tensors, and `ConfigError` for a pickle or a task that the source does not have.
    """
    path = Path(config.prompt_tuning_init_state_dict_path or "")
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path: {path} is no .safetensors file, and no other is opened (a pickle "
            "runs whatever code it holds); load it where you trust it and save it with safetensors"
        )
    names = ["prompt_embeddings", "prefix_task_cols", "prefix_task_rows"]
    with AdapterFile(path) as file:
        found = file.load(names[:1] if config.prompt_tuning_init == "ONLY_SOURCE_SHARED" else names)
    for name in names[1:]:
        if (factors := found.get(name)) is None:
            continue
        if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            found[name] = factors.mean(0, keepdim=True)
        elif config.prompt_tuning_init_task < len(factors):
            found[name] = factors[config.prompt_tuning_init_task][None]
        else:
            raise ConfigError(
                f"prompt_tuning_init_task is {config.prompt_tuning_init_task}; {path} has {len(factors)} tasks"
            )
    return found
