"""LLaMA-Adapter: a prompt at each of the upper attention modules, whose part in the output starts at zero.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
https://arxiv.org/abs/2303.16199, section 3.2. A layer's prompt P (K, d) goes through the layer's own projections of
keys and values, without positions; queries attend to it in a softmax of its own, scaled by a gate g that starts at 0:

    out + W_o (g · softmax(q (W_k P)ᵀ / √d_h) W_v P)

Here q, keys, values and W_o are computed by the attention module itself, which is run once on the prompt to see its
keys and values, and once on the input with these in place of the input's own. So rotary or other positions, norms of
queries, fused projections and grouped heads are as the module has them, and so are other adapters inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from peft_core.adapter import Adapter, as_compute
from peft_core.architectures import model_type_of, role_names, role_paths
from peft_core.backbones import bind, cache_argument, prefix_sites
from peft_core.calls import parameter_names
from peft_core.config import AdapterConfig
from peft_core.errors import RequestError, TargetError
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, SiteRequest
from peft_core.link import Link
from peft_core.masks import is_causal
from peft_core.prefixes import MASK_NAMES
from peft_core.suggest import did_you_mean

from .config import task_of

UNPROJECTED = frozenset({"gpt2"})
"""Model types for which Hugging Face's library leaves W_o out, and files are trained that way."""

SINE_FIRST = frozenset({"codegen", "gptj"})
"""Model types whose attention is given (sine, cosine) of the positions, not (cosine, sine)."""


class AdaptionPromptConfig(AdapterConfig):
    """The size of the prompts and how many layers have one.

    Fields:
        adapter_len: K, the length of a prompt.
        adapter_layers: how many attention modules have one, counted from the top.
        target_modules: the name of the attention modules; by default what the model type calls them.
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    target_modules: str | None = None
    adapter_len: int | None = Field(None, ge=1)
    adapter_layers: int | None = Field(None, ge=1)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def attention_paths(config: AdaptionPromptConfig, model: nn.Module) -> list[str]:
    """The attention modules of the config's name, in order, of a decoder. Raises `TargetError`."""
    found = [s.path for s in prefix_sites(model) if s.meta["role"] == "attention" and not s.meta["encoder"]]
    name = config.target_modules
    chosen = [path for path in found if name is None or path == name or path.endswith(f".{name}")]
    if name is not None and not chosen:
        known = {path.rpartition(".")[2] for path in found}
        raise TargetError(
            f"target_modules: {name!r} is the name of none of the attention modules; they are called "
            f"{', '.join(sorted(known)) or 'nothing that is known'}.{did_you_mean(name, known)}"
        )
    return chosen


@hookimpl
def peft_config() -> type[AdaptionPromptConfig]:
    return AdaptionPromptConfig


@hookimpl
def peft_resolve(config: AdaptionPromptConfig, model: nn.Module) -> AdaptionPromptConfig | None:
    """The name of the attention modules, where the model's type has one for all."""
    names = role_names(model_type_of(model), ("attention",))
    task = config.task_type or task_of(model)
    name = names[0] if isinstance(names, tuple) and len(names) == 1 else None
    return config.resolve(target_modules=config.target_modules or name, task_type=task)


@hookimpl
def peft_sites(config: AdaptionPromptConfig, model: nn.Module) -> Sequence[SiteRequest]:
    """The uppermost `adapter_layers` attention modules."""
    if config.adapter_len is None or config.adapter_layers is None:
        raise TargetError("give adapter_len, the length of a prompt, and adapter_layers, how many layers have one")
    paths = attention_paths(config, model)
    if config.adapter_layers > len(paths):
        raise TargetError(f"adapter_layers is {config.adapter_layers}; the model has {len(paths)} attention modules")
    outputs, norms = role_paths(model, "output"), role_paths(model, "attention_add_norm")
    kind = model_type_of(model)
    own: Any = model.config
    own = own.get_text_config() if hasattr(own, "get_text_config") else own
    found = []
    for path in paths[len(paths) - config.adapter_layers :]:
        last = next((output for output in outputs if output.startswith(f"{path}.")), None)
        if last is None:
            raise TargetError(
                f"{path}: which of its modules projects the attention's output (role output) is not known"
            )
        meta = {"output": last[len(path) + 1 :], "project": kind not in UNPROJECTED, "sine_first": kind in SINE_FIRST}
        meta |= {"width": own.hidden_size, "norm": any(norm.startswith(f"{path}.") for norm in norms)}
        found.append(SiteRequest(path, meta=meta))
    return found


@hookimpl
def peft_build(config: AdaptionPromptConfig, layer: BaseLayer) -> Adapter:
    return AdaptedAttention(layer, config)


class AdaptedAttention(Adapter):
    """`adaption_prompt` (1, K, d) and `adaption_gate` (1,), around one attention module."""

    def __init__(self, layer: BaseLayer, config: AdaptionPromptConfig) -> None:
        super().__init__(layer)
        module = layer.module
        names = parameter_names(type(module).forward)
        self._cache = cache_argument(names)
        self._mask = next((name for name in MASK_NAMES if name in names), "")
        if not is_causal(module):
            raise layer.refuse("its positions see those after them too, and this method is for decoders")
        if layer.request.meta["norm"]:
            raise layer.refuse("it ends in a sum with its input and a norm, behind which a prompt cannot be added")
        if "position_bias" in names:
            raise layer.refuse("it adds biases by position to the scores, and a prompt has no position")
        if not self._cache or not self._mask:
            raise layer.refuse(
                "keys and values of prompts are put where an attention module expects cached ones, with a mask of "
                f"their own; this one's forward takes {list(names)}"
            )
        self._names = names
        meta = layer.request.meta
        self._output, self._project, self._sine_first = meta["output"], meta["project"], meta["sine_first"]
        # A buffer that says which positions see which would be read as if the prompt's keys were the input's.
        self._by_position = any(b.dim() == 4 and b.dtype == torch.bool for b in module.buffers())
        self.adaption_prompt = layer.parameter(1, config.adapter_len or 1, meta["width"])
        self.adaption_gate = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.adaption_prompt)
        nn.init.zeros_(self.adaption_gate)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        given = bind(self._names, args, kwargs)
        # The same for all rows, unless other adapters inside the module are not.
        rows = 1 if base.request.rows is None else given[self._names[0]].shape[0]
        prompt = self.adaption_prompt.repeat(rows, 1, 1) if rows > 1 else self.adaption_prompt
        return self._added(out, prompt, None, self.adaption_gate, given)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """All rows at once, each with an adapter of its own, or with none, whose gate is then 0."""
        out = base(*args, **kwargs)
        first: AdaptedAttention = adapters[0]
        gates = torch.cat([torch.zeros_like(first.adaption_gate), *(adapter.adaption_gate for adapter in adapters)])
        lengths = torch.tensor([adapter.adaption_prompt.shape[1] for adapter in adapters], device=index.device)
        longest, owners = int(lengths.max()), index.clamp(min=0)
        padded = [
            nn.functional.pad(a.adaption_prompt, (0, 0, 0, longest - a.adaption_prompt.shape[1])) for a in adapters
        ]
        hidden = torch.arange(longest, device=index.device) >= lengths[owners, None]
        given = bind(first._names, args, kwargs)
        return first._added(out, torch.cat(padded)[owners], hidden, gates[index + 1], given)

    def _added(self, out: Any, prompt: Tensor, unseen: Tensor | None, gate: Tensor, given: dict[str, Any]) -> Any:
        """`out` and what prompts (rows or 1, K, d) add to it, `gate` (rows or 1,) times.

        `unseen` (rows, K) is true at positions that are no prompt of their row's.
        """
        keys, values = self._keys_of(as_compute(prompt, given[self._names[0]]), given)
        added = self._attended(keys, values, unseen, given)
        scale = as_compute(gate, added).view(-1, 1, 1)
        if isinstance(out, tuple):
            return (out[0] + scale * added, *out[1:])
        return out + scale * added

    def _run(self, given: dict[str, Any], hidden: Tensor, cache: _Cache, mask: Tensor | None, positions: Any) -> Tensor:
        """The module on `hidden`, without dropout of the prompt's own, and with `cache` in place of the real one."""
        own = {name: value for name, value in given.items() if name not in ("output_attentions", "use_cache")}
        own.update({self._names[0]: hidden, self._cache: cache, self._mask: mask})
        if "position_embeddings" in own:
            own["position_embeddings"] = positions
        if own.get("residual") is not None:
            own["residual"] = torch.zeros_like(hidden)
        if own.get("alibi") is not None:
            heads = own["alibi"].shape[0] // given[self._names[0]].shape[0]
            own["alibi"] = hidden.new_zeros(heads * hidden.shape[0], 1, cache.length(hidden))
        found = self.layer.module(**own)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    def _keys_of(self, prompt: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The module's keys and values of prompts (rows, K, d), without positions: (rows, key heads, K, head size)."""
        seen = _Cache()
        n = prompt.shape[1]
        mask = prompt.new_zeros(len(prompt), 1, n, n)
        self._run(given, prompt, seen, mask, self._at_zero(given.get("position_embeddings"), n))
        if seen.keys is None or seen.values is None:
            raise RequestError(f"{self.layer.path}: the attention did not show its keys and values to a cache")
        return seen.keys, seen.values

    def _at_zero(self, positions: Any, n: int) -> Any:
        """Rotations by nothing, in the form of `positions`."""
        if positions is None:
            return None
        if not isinstance(positions, tuple) or len(positions) != 2 or any(p.is_complex() for p in positions):
            raise RequestError(f"{self.layer.path}: positions of this form are not known, so no prompt can do without")
        first, second = (p[:1, :1].expand(1, n, *p.shape[2:]) for p in positions)
        if self._sine_first:
            return torch.zeros_like(first), torch.ones_like(second)
        return torch.ones_like(first), torch.zeros_like(second)

    def _attended(self, keys: Tensor, values: Tensor, unseen: Tensor | None, given: dict[str, Any]) -> Tensor:
        """W_o softmax(q kᵀ / √d_h) v for keys and values (rows or 1, key heads, K, head size)."""
        module, hidden = self.layer.module, given[self._names[0]]
        rows, length = hidden.shape[:2]
        if "flash" in (getattr(getattr(module, "config", None), "_attn_implementation", None) or ""):
            raise RequestError(
                f"{self.layer.path}: flash kernels make their masks from lengths, which are not those of prompts; load "
                "the model with attn_implementation='sdpa'"
            )
        keys, values = (t.expand(rows, -1, -1, -1) for t in (keys, values))
        mask = hidden.new_zeros(rows, 1, 1, keys.shape[2])
        if unseen is not None:
            mask = mask.masked_fill(unseen[:, None, None], torch.finfo(hidden.dtype).min)
        if not self._project:
            return self._before_projection(hidden, keys, values, mask)
        positions = given.get("position_embeddings")
        if self._by_position:  # each position is then a row of its own, which sees all that there is
            hidden = hidden.flatten(0, 1)[:, None]
            keys, values, mask = (t.repeat_interleave(length, 0) for t in (keys, values, mask))
            found = self._run(given, hidden, _Cache(keys, values), mask, positions).view(rows, length, -1)
        else:
            mask = mask.expand(-1, -1, length, -1)
            found = self._run(given, hidden, _Cache(keys, values), mask, positions)
        # The bias of W_o is in `out` already.
        last: Any = module.get_submodule(self._output)
        bias: Tensor = last(found.new_zeros(1, 1, getattr(last, "in_features", 0) or last.weight.shape[0]))
        return found - bias

    def _before_projection(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """softmax(q kᵀ / √d_h) v of a GPT-2, (rows, length, d)."""
        module: Any = self.layer.module
        query = module.c_attn(hidden)[..., : module.embed_dim].unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        scores = query @ keys.transpose(-1, -2) * module.scaling + mask
        seen: Tensor = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
        return seen.transpose(1, 2).flatten(2)


class _Cache:
    """What an attention sees as its cache: it notes keys and values, or gives others in their place."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys = keys
        self.values = values
        self.given = keys is not None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.given:
            self.keys, self.values = keys, values
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def length(self, hidden: Tensor) -> int:
        """How many keys the attention will see."""
        return hidden.shape[1] if self.keys is None else self.keys.shape[2]

    def get_seq_length(self, *args: Any) -> int:
        return 0
