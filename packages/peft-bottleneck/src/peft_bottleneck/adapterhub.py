"""Adapters that AdapterHub's library `adapters` saved (Poth et al. 2023, arXiv 2311.11077), read as this package's.

A folder holds `adapter_config.json` (the config's fields under "config", the adapter's "name", the "model_type") and
`adapter.safetensors`, whose keys are made of a module that AdapterHub puts into the model, the adapter's name, and a
tensor's name:

    bert.encoder.layer.0.attention.output.adapters.NAME.adapter_down.0.weight
    transformer.h.0.output_adapters.adapters.NAME.adapter_up.bias

Which of this model's modules that is follows from the stack, the block's number and the sub-layer, so it does not
matter what the release of transformers called them when the file was written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_core import CheckpointError, CheckpointMismatchError, PeftModel, hookimpl

from .config import BottleneckConfig
from .places import Place, places

WEIGHTS, HEAD = "adapter.safetensors", "model_head.safetensors"
PICKLES = {WEIGHTS: "pytorch_adapter.bin", HEAD: "pytorch_model_head.bin"}
FUSION = "adapter_fusion_config.json"

# Fields with the meaning they have here.
_SAME = (
    *("reduction_factor", "non_linearity", "scaling", "init_weights", "mh_adapter", "output_adapter"),
    *("cross_adapter", "leave_out", "ln_before", "ln_after", "dropout"),
)
# Fields that decide the style.
_ORDER = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
# Fields that say nothing about what an adapter computes: how it starts, or settings of what is switched off.
_INERT = (
    *("architecture", "init_weights_seed", "inv_adapter_reduction_factor", "adapter_residual_before_ln"),
    *("phm_dim", "phm_bias", "phm_rank", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity"),
    *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule"),
)
# What an adapter must not have, and what it is.
_REFUSED = {
    "inv_adapter": "an invertible adapter at the embedding",
    "phm_layer": "hypercomplex projections (Compacter)",
    "use_gating": "a trained gate",
    "stochastic_depth": "stochastic depth",
}
_SLOTS = {
    "adapter_up": "up",
    "adapter_norm_before": "norm_before",
    "adapter_norm_after": "norm_after",
}


@hookimpl
def peft_checkpoint(path: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Config and tensors of a folder of AdapterHub's, for this model; None for any other place.

    A prediction head saved beside the adapter is taken along where it is the model's own (`modules_to_save`), and
    left out with a warning where it is one of AdapterHub's.

    Raises:
        CheckpointError: the adapter has parts that bottleneck adapters do not have here, or is a pickle.
        CheckpointMismatchError: it was made for a model of another shape.
        TargetError: what the modules of this model's type are called is not known.
    """
    meta = _read_meta(path)
    if meta is None:
        return None
    name = str(meta.get("name"))
    fields = _fields(path, meta)
    file = path / WEIGHTS
    _no_pickle(path, WEIGHTS)
    if not file.is_file():
        raise CheckpointError(f"{path}: {WEIGHTS} is missing; it holds an adapter's config alone")
    config = BottleneckConfig.from_dict(fields, source=str(path / "adapter_config.json")).complete()
    tensors = dict(_named(_load(file), name, places(config, model), file))
    head = dict(_head(path, model))
    if head:
        config = config.resolve(modules_to_save=list(dict.fromkeys(key.rpartition(".")[0] for key in head)))
    both = {**tensors, **head}
    return config.to_dict(), {f"base_model.model.{key}": tensor for key, tensor in both.items()}


# ---- the config


def _read_meta(path: Path) -> dict[str, Any] | None:
    if not path.is_dir():
        return None
    if (path / FUSION).is_file():
        raise CheckpointError(
            f"{path}: a fusion of adapters (AdapterFusion), which cannot be read. Load the adapters it is made of, "
            "each from its own folder, and stack them with set_adapter([...])"
        )
    try:
        meta = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # not there, or not JSON: whoever reads files of this name says so
    if not isinstance(meta, dict) or "peft_type" in meta or not {"config", "model_type", "name"} <= meta.keys():
        return None
    return meta


def _fields(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `BottleneckConfig`. Raises `CheckpointError` with all that cannot be expressed."""
    theirs = meta["config"]
    if not isinstance(theirs, dict):
        raise CheckpointError(
            f"{path}: its config is {str(theirs)[:80]!r}, a name or nothing, as before version 3 of "
            "adapter-transformers; load and save it once with a newer version of AdapterHub's library"
        )
    if theirs.get("architecture"):
        raise CheckpointError(
            f"{path}: an adapter of AdapterHub's architecture {str(theirs['architecture'])[:80]!r}, and only "
            "bottleneck adapters are read from its files"
        )
    problems = [f"{key}={theirs[key]!r}: {what}" for key, what in _REFUSED.items() if theirs.get(key)]
    style = _style(theirs)
    if style is None:
        problems.append(
            ", ".join(f"{flag}={theirs.get(flag)!r}" for flag in _ORDER)
            + ": another order of norms and sums than that of Houlsby, Pfeiffer or parallel adapters"
        )
    if theirs.get("adapter_residual_before_ln") and theirs.get("ln_after"):
        problems.append("adapter_residual_before_ln=True: the adapter's own norm behind the sum")
    known = {*_SAME, *_ORDER, *_INERT, *_REFUSED}
    problems += [f"{key}={value!r}: unknown here" for key, value in theirs.items() if key not in known and value]
    if problems:
        raise CheckpointError(
            f"{path}: this adapter has what bottleneck adapters do not have here:\n"
            + "\n".join(f"- {problem}" for problem in problems)
        )
    return {"peft_type": "BOTTLENECK", "style": style} | {
        key: theirs[key] for key in _SAME if theirs.get(key) is not None
    }


def _style(config: Mapping[str, Any]) -> str | None:
    if not config.get("original_ln_after", True):
        return None
    if config.get("is_parallel"):
        return None if config.get("original_ln_before") else "parallel"
    if config.get("residual_before_ln", True) is not True:
        return None
    return "pfeiffer" if config.get("original_ln_before") else "houlsby"


# ---- the tensors


def _no_pickle(path: Path, name: str) -> None:
    pickle = path / PICKLES[name]
    if pickle.is_file() and not (path / name).is_file():
        raise CheckpointError(
            f"{pickle}: a pickle, which can run any code when it is opened, so it is not read. If you trust where it "
            f'came from, convert it once, in its directory: python -c "import torch, safetensors.torch as s; '
            f"t = torch.load({pickle.name!r}, map_location='cpu', weights_only=True); "
            f's.save_file({{k: v.clone().contiguous() for k, v in t.items()}}, {name!r})"'
        )


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}. Get it again from where it came from") from error


def _named(tensors: Mapping[str, Tensor], name: str, found: list[Place], file: Path) -> Iterator[tuple[str, Tensor]]:
    """Path and slot -> tensor. Raises `CheckpointMismatchError` for keys of no place, with all of them."""
    several = len({place.stack for place in found}) > 1
    by_place = {(_side(place.stack) if several else "", place.index, place.kind): place for place in found}
    lost: list[str] = []
    for key, tensor in tensors.items():
        module, _, rest = key.partition(f".adapters.{name}.")
        where = _where(module, several) if rest else None
        place = by_place.get(where) if where else None
        slot = _slot(rest, f"{module}.adapters.{name}.", tensors) if rest else None
        if place is None or slot is None:
            lost.append(key)
        elif slot:
            yield f"{place.path}.{slot}", tensor
    if lost:
        raise CheckpointMismatchError(
            f"{file}: {len(lost)} of its tensors belong to no sub-layer that this model has and the config names, for "
            f"instance {sorted(lost)[0]!r}. It was made for another model, or edited"
        )


def _where(module: str, several: bool) -> tuple[str, int, str] | None:
    """Side, block and sub-layer of a module that AdapterHub puts adapters into."""
    parts = module.split(".")
    numbers = [(at, int(part)) for at, part in enumerate(parts) if part.isascii() and part.isdigit()]
    if not numbers:
        return None
    at, block = numbers[0]
    side = _side(".".join(parts[:at])) if several else ""
    inner = parts[at + 1 :]
    if inner[:1] == ["layer"] and len(numbers) > 1:  # T5: self attention, cross attention in decoders, feed-forward
        kinds = ["attention", "cross", "feed_forward"] if "decoder" in parts[:at] else ["attention", "feed_forward"]
        number = numbers[1][1]
        return (side, block, kinds[number]) if number < len(kinds) else None
    text = ".".join(inner)
    for sign, kind in (("cross", "cross"), ("attention", "attention"), ("output", "feed_forward")):
        if sign in text:
            return side, block, kind
    return None


def _side(path: str) -> str:
    return next((part for part in path.split(".") if part in ("encoder", "decoder")), "")


def _slot(rest: str, start: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Our name of one of an adapter's tensors; empty for what the file has twice, None for what is unknown."""
    owner, _, kind = rest.rpartition(".")
    if rest == "scaling":
        return rest
    if kind not in ("weight", "bias"):
        return None
    if owner.startswith("adapter_down."):
        # The norm before, where there is one, is also the first element of this sequence.
        norm = f"{start}adapter_norm_before.weight" in tensors
        position = owner.partition(".")[2]
        return "" if norm and position == "0" else f"down.{kind}" if position == str(int(norm)) else None
    slot = _SLOTS.get(owner)
    return None if slot is None else f"{slot}.{kind}"


# ---- the prediction head beside the adapter


def _head(path: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The head's tensors that this model has and that differ from its own, by name."""
    _no_pickle(path, HEAD)
    if not (path / HEAD).is_file():
        return
    own = model.base_state_dict() if isinstance(model, PeftModel) else model.state_dict()
    tensors = _load(path / HEAD)
    modules: dict[str, list[str]] = {}
    for key in tensors:
        modules.setdefault(key.rpartition(".")[0], []).append(key)
    strange = [key for key in tensors if key not in own or own[key].shape != tensors[key].shape]
    for module, keys in modules.items():
        if any(key in strange for key in keys):
            continue
        if any(not own[key].cpu().equal(tensors[key].to(own[key].dtype)) for key in keys):
            if not module:
                strange += keys
                continue
            yield from ((key, tensors[key]) for key in keys)
    if strange:
        warnings.warn(
            f"{path / HEAD}: the prediction head {strange} was not read: this model has none of that name and shape. "
            "The adapter is complete, and what the model's own head makes of it may not be what it was trained for",
            stacklevel=2,
        )
