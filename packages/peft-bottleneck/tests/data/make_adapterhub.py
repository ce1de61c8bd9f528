"""Write the files of tests/data with AdapterHub's own library: the models, the adapters, and what both compute.

It needs an environment of its own (`adapters` 1.3.0 wants transformers 4.57, this repository has 5):

    pip install "torch==2.13.0" "adapters==1.3.0"
    python make_adapterhub.py DIRECTORY

For every model KIND: KIND/base.json (its config's fields), KIND/base.safetensors (its weights), and KIND/CASE, the
folder that `save_adapter` writes. expected.safetensors holds the inputs and "KIND/CASE" -> logits, all in float32;
"KIND/CASE+CASE" are those of two adapters, the first one innermost.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig, Stack
from safetensors.torch import save_file

W = 8
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": W, "intermediate_size": 12}
ENCODER = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 16, "num_labels": 3}
SIDES = ("layers", "attention_heads")
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification, ENCODER),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification, ENCODER),
    "gpt2": (
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        {"vocab_size": 20, "n_embd": W, "n_layer": 2, "n_head": 2, "n_positions": 16, "n_inner": 12},
    ),
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {**LAYERS, "vocab_size": 20, "max_position_embeddings": 16},
    ),
    "t5": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        {"vocab_size": 20, "d_model": W, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2},
    ),
    "bart": (
        transformers.BartConfig,
        transformers.BartForConditionalGeneration,
        {"vocab_size": 20, "d_model": W, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16}
        | {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in SIDES},
    ),
    "vit": (
        transformers.ViTConfig,
        transformers.ViTForImageClassification,
        {**LAYERS, "image_size": 4, "patch_size": 2, "num_labels": 3},
    ),
}
COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CASES: dict[str, Any] = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=2),
    "pfeiffer": SeqBnConfig(reduction_factor=2),
    "parallel": ParBnConfig(),
    # Everything else that a file may say, on top of each of the three.
    "houlsby_extras": DoubleSeqBnConfig(
        reduction_factor={"0": 2, "default": 4}, non_linearity="gelu", scaling="learned", ln_after=True, leave_out=[1]
    ),
    "pfeiffer_extras": SeqBnConfig(reduction_factor=3, mh_adapter=True, non_linearity="leakyrelu", scaling=0.5),
    "parallel_extras": ParBnConfig(reduction_factor=4, mh_adapter=True, non_linearity="gelu_new", scaling="learned"),
    "cross": BnConfig(
        mh_adapter=True, output_adapter=True, reduction_factor=2, non_linearity="tanh", cross_adapter=True
    ),
}
STACKS = ("houlsby+pfeiffer", "pfeiffer+pfeiffer_extras", "pfeiffer_extras+pfeiffer")


def randomise(parameters: Any, scale: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape) * scale)


def norm_before(model: Any, given: Any, place: Path) -> torch.Tensor:
    """A file that AdapterHub can only write as a pickle, since it has a norm twice: converted afterwards."""
    torch.manual_seed(1)
    model.add_adapter("norm_before", config=SeqBnConfig(reduction_factor=2, ln_before=True))
    randomise((p for name, p in model.named_parameters() if ".norm_before." in name), 0.4)
    model.set_active_adapters("norm_before")
    model.eval().save_adapter(str(place), "norm_before", use_safetensors=False, with_head=False)
    pickle = place / "pytorch_adapter.bin"
    tensors = torch.load(pickle, map_location="cpu", weights_only=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, place / "adapter.safetensors")
    pickle.unlink()
    with torch.no_grad():
        return model(**given).logits


def with_head(model: Any, given: Any, place: Path) -> torch.Tensor:
    """An adapter that was trained together with the model's own classifier."""
    torch.manual_seed(1)
    randomise(model.classifier.parameters(), 1.0)
    model.set_active_adapters("houlsby")
    model.save_adapter(str(place), "houlsby", use_safetensors=True, with_head=True)
    with torch.no_grad():
        return model(**given).logits


def main(target: Path) -> None:
    ids = torch.randint(3, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    pixels = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    for kind, (config_class, model_class, fields) in MODELS.items():
        given = {"pixel_values": pixels} if kind == "vit" else {"input_ids": ids, "attention_mask": mask}
        if kind in ("t5", "bart"):
            given["decoder_input_ids"] = ids.flip(1)
        fields = {**(COMMON if kind != "vit" else {}), **fields}
        torch.manual_seed(0)
        model = model_class(config_class(**fields)).eval()
        randomise(model.parameters(), 0.3)
        place = target / kind
        place.mkdir(parents=True, exist_ok=True)
        (place / "base.json").write_text(json.dumps(fields, indent=1) + "\n")
        model.tie_weights()
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        seen: set[int] = set()
        weights = {n: t for n, t in weights.items() if not (t.data_ptr() in seen or seen.add(t.data_ptr()))}
        save_file(weights, place / "base.safetensors")
        with torch.no_grad():
            expected[kind] = model(**given).logits
        adapters.init(model)
        for case, config in CASES.items():
            if case == "cross" and kind not in ("t5", "bart"):
                continue
            torch.manual_seed(1)
            model.add_adapter(case, config=config)
            randomise((p for name, p in model.named_parameters() if f".{case}." in name), 0.4)
            model.set_active_adapters(case)
            model.eval()
            with torch.no_grad():
                logits = model(**given).logits
            assert (logits - expected[kind]).abs().max() > 0.05, (kind, case)
            expected[f"{kind}/{case}"] = logits
            model.save_adapter(str(place / case), case, use_safetensors=True, with_head=False)
        for case in STACKS:
            model.set_active_adapters(Stack(*case.split("+")))
            with torch.no_grad():
                expected[f"{kind}/{case}"] = model(**given).logits
        if kind == "bert":
            expected["bert/norm_before"] = norm_before(model, given, place / "norm_before")
            expected["bert/with_head"] = with_head(model, given, place / "with_head")
    save_file(expected, target / "expected.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
