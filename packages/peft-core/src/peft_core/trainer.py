"""transformers' `Trainer`, unmodified: adapters in its resume and best-model steps, methods at its optimizer's steps,
loss terms in its loss.

`Trainer` saves through `model.save_pretrained`, so its checkpoints hold adapters alone; but it reads them
back only into models of another library. For our models these two steps load the adapters instead; for every
other model they are what they were.

`Trainer` may compute the loss past the model (label smoothing, a function of the user's); and a model that is told the
number of items in all accumulated batches gives losses that are summed, not averaged. So the terms of adapters are
added after its `compute_loss`, each batch having its share.

Set `PEFT_CORE_TRAINER=0` before the first adapter is made to leave `Trainer` alone.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .locating import WEIGHTS

_MARK = "_peft_core_dispatches"


def install() -> None:
    """Set up `Trainer` now, or as soon as it is imported. May be called any number of times."""
    if os.environ.get("PEFT_CORE_TRAINER", "1") == "0" or "transformers" not in sys.modules:
        return
    from wrapt import register_post_import_hook

    register_post_import_hook(_dispatch, "transformers.trainer")


def _dispatch(module: Any) -> None:
    trainer = module.Trainer
    if getattr(trainer, _MARK, False):
        return
    resume: Callable[..., None] = trainer._load_from_checkpoint
    best: Callable[..., None] = trainer._load_best_model

    @functools.wraps(resume)
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _load_adapters(self, resume_from_checkpoint, self.model if model is None else model):
            resume(self, resume_from_checkpoint, model)

    @functools.wraps(best)
    def load_best_model(self: Any) -> None:
        if not _load_adapters(self, self.state.best_model_checkpoint, self.model):
            best(self)

    make: Callable[..., Any] = trainer.create_optimizer

    @functools.wraps(make)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = make(self, *args, **kwargs)
        _drive(self)
        return optimizer

    compute: Callable[..., Any] = trainer.compute_loss

    @functools.wraps(compute)
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        def plainly() -> Any:
            return compute(self, model, inputs, return_outputs=return_outputs, **others)

        return _with_losses(self, model, others.get("num_items_in_batch"), return_outputs, plainly)

    schedule: Callable[..., Any] = trainer.create_scheduler

    @functools.wraps(schedule)
    def create_scheduler(self: Any, *args: Any, **kwargs: Any) -> Any:
        _drive(self)  # once more: a subclass may make its optimizer without asking `Trainer`
        return schedule(self, *args, **kwargs)

    trainer.create_scheduler = create_scheduler
    trainer.compute_loss = compute_loss
    trainer.create_optimizer = create_optimizer
    trainer._load_from_checkpoint = load_from_checkpoint
    trainer._load_best_model = load_best_model
    setattr(trainer, _MARK, True)


def _drive(trainer: Any) -> None:
    """Let the methods of one of our models act at the optimizer's steps, numbered as `Trainer` does."""
    import torch

    from .model import PeftModel
    from .training import drive

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if isinstance(model, PeftModel) and isinstance(trainer.optimizer, torch.optim.Optimizer):
        drive(model, trainer.optimizer, step=lambda: int(trainer.state.global_step))


def _with_losses(trainer: Any, model: Any, items: Any, with_outputs: bool, compute: Callable[[], Any]) -> Any:
    """The loss that `compute` gives, and the terms of a model's adapters: one batch's share of a step's."""
    from .model import PeftModel

    bare = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    if not isinstance(bare, PeftModel) or not model.training or trainer.args.n_gpu > 1:
        return compute()
    routing = bare._peft.routing
    routing.loss_terms, routing.defers_losses = {}, True
    try:
        result = compute()
    finally:
        routing.defers_losses = False
    if not routing.loss_terms:
        return result
    extra: Any = sum(routing.loss_terms.values())
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    if scaled:  # Trainer will not divide by the number of batches
        extra = extra / getattr(trainer, "current_gradient_accumulation_steps", 1)
    return (result[0] + extra, result[1]) if with_outputs else result + extra


def _load_adapters(trainer: Any, directory: str, model: Any) -> bool:
    """Load every adapter of one of our models from a checkpoint; False where this is not such a case."""
    from .model import PeftModel

    model = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    if not isinstance(model, PeftModel) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    folders = {n: Path(directory) if n == "default" else Path(directory) / n for n in model.peft_config}
    missing = [name for name, folder in folders.items() if not (folder / WEIGHTS).is_file()]
    if len(missing) == len(folders):
        return False
    if missing:
        raise CheckpointError(
            f"{directory}: the model has adapters {list(folders)}, but the checkpoint lacks {missing}. Resume "
            "with the adapters that were saved, and add others afterwards; load_adapter(folder, name, "
            "replace=True) takes a single one from a checkpoint"
        )
    for name, folder in folders.items():
        model.load_adapter(folder, name, replace=True, is_trainable=model._peft.adapters[name].trainable)
    return True
