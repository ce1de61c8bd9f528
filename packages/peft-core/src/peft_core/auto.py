"""`AutoPeftModel` and its kin: the base that an adapter's config names, and the adapter on it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from . import checkpoint
from .config import AdapterConfig
from .errors import CheckpointError, PeftError
from .model import PeftModel

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoPeftModel:
    """An adapted model by its adapter's directory alone, its class the one of the adapter's task, or the base's own."""

    task_type: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the base, with transformers and `kwargs`, then the adapter, which `revision` and `subfolder` concern.

        The input embedding grows where a tokenizer beside the adapter has more tokens.

        Raises as `PeftModel.from_pretrained`; `CheckpointError` too where the adapter names no base.
        """
        path = pretrained_model_name_or_path
        with checkpoint.read(path, subfolder=subfolder, revision=revision) as file:
            stored = config.to_dict() if config is not None else file.config
        name = stored.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise CheckpointError(
                f"{path}: the adapter's config names no base model; load the base yourself, then "
                "PeftModel.from_pretrained(base, directory)"
            )
        task = stored.get("task_type") or cls.task_type
        if cls.task_type not in (None, task):
            raise CheckpointError(
                f"{path}: the adapter's task is {task}, not {cls.task_type}; AutoPeftModel takes the class that fits"
            )
        transformers = _transformers()
        source = {"revision": stored.get("revision"), **kwargs}
        if source["revision"] is None:
            del source["revision"]
        if task in _AUTO_CLASSES:
            base_class = getattr(transformers, _AUTO_CLASSES[task])
        else:
            base_class = _own_class(transformers, name, source)
        model = base_class.from_pretrained(name, **source)
        folder = Path(path) / (subfolder or "")
        if (folder / "tokenizer_config.json").is_file():
            size = len(transformers.AutoTokenizer.from_pretrained(folder))
            if size > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(size)
        return PeftModel.from_pretrained(
            model, path, adapter_name, is_trainable=is_trainable, config=config, revision=revision, subfolder=subfolder
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    task_type = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task_type = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task_type = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task_type = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task_type = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task_type = "FEATURE_EXTRACTION"


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise PeftError(
            "AutoPeftModel loads the base with transformers: pip install transformers; or load it yourself, then "
            "PeftModel.from_pretrained(base, directory)"
        ) from error


def _own_class(transformers: Any, name: str, source: dict[str, Any]) -> Any:
    """The class that a model without a task says it is, if it is one of transformers'."""
    hub = {key: source[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in source}
    named = (getattr(transformers.AutoConfig.from_pretrained(name, **hub), "architectures", None) or [""])[0]
    found = getattr(transformers, named, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{name}: neither the adapter's task_type nor the base's config says which class to load; use one of "
            "AutoPeftModelForCausalLM and its kin"
        )
    return found
