"""Dense read, write and call views of one module's storage.

A method works on a view and never on a module class, so it runs on every storage: the view says what the weight
is (always in the orientation of `nn.Linear`, output rows first, whatever the module stores), and computes the
module's function with other weights. Storage backends add views through the `peft_layer` hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import bare, offload
from . import rows as batch
from .errors import MergeError, TargetError
from .stand_in import shadowed

Params = dict[str, Tensor]


@dataclass(frozen=True)
class SiteRequest:
    """One place an adapter is wanted at.

    `part` tells apart several adapters of one name at one module. `names` are the parameters meant, empty for the
    module as a whole. `key_prefix` stands between module path and slot in a file. `meta` is the method's own.
    `copied` asks for a trainable copy of the whole module, which the core builds itself (`modules_to_save`); `tied_to`
    is then the path of a module copied before, whose `weight` this copy shares.
    """

    path: str
    part: str = ""
    names: tuple[str, ...] = ()
    key_prefix: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    copied: bool = False
    tied_to: str = ""

    @property
    def key(self) -> str:
        """How a place is named among those of one adapter: its path, or `path:part`."""
        return f"{self.path}:{self.part}" if self.part else self.path


class BaseLayer:
    """View of any module: its parameters by name, as they are stored.

    `kind` tells methods what the module computes: "linear" (..., in) -> (..., out), "conv", "embedding",
    "attention" (`nn.MultiheadAttention`), or "module" (anything else).
    """

    kind: ClassVar[str] = "module"
    batch_dim: int = 0

    write_is_approximate: str = ""
    """Why `write` keeps not quite what it is given (a quantised storage); empty where it does. Merging then warns."""

    def __init__(self, module: nn.Module, path: str, request: SiteRequest | None = None) -> None:
        self.module = module
        self.path = path
        self.request = request or SiteRequest(path)
        self.build_device: torch.device | None = None
        self.build_dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {type(self.module).__name__})"

    @property
    def positionwise(self) -> bool:
        """Whether the module's call is that of its kind and nothing more, so that a linear layer may see flat rows."""
        return False

    # -- reading and writing -------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters this view covers."""
        return self.request.names or tuple(bare.base_parameter_names(self.module))

    def params(self) -> Params:
        """The weights as dense tensors, without a copy where the storage is dense and at hand."""
        return {name: self._value(name) for name in self.names}

    def write(self, params: Mapping[str, Tensor]) -> None:
        """Put new weights (or buffers) in place, rounding once to the stored dtype. The old ones are left untouched.

        Raises `MergeError` where the stored weights are kept elsewhere.
        """
        for name, value in params.items():
            owner, attribute = self._owner(name)
            if offload.execution_device(owner) is not None:
                raise MergeError(
                    f"{self.path}.{name}: the weight is offloaded, and would be read again from where it is kept at "
                    "the next call; load the model without offloading to merge"
                )
            old = self._stored(name)
            stored = self._to_storage(name, value).detach().to(old.dtype).contiguous()
            if attribute in owner._buffers:
                owner._buffers[attribute] = stored
            else:
                owner._parameters[attribute] = nn.Parameter(stored, requires_grad=old.requires_grad)

    def snapshot(self, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """The parameters (or buffers) themselves, so that `restore` is exact and ties between modules come back."""
        return {name: self._stored(name) for name in (self.names if names is None else names)}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the tensors of a snapshot back."""
        for name, tensor in snapshot.items():
            owner, attribute = self._owner(name)
            tensors: dict[str, Any] = owner._buffers if attribute in owner._buffers else owner._parameters
            tensors[attribute] = tensor

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's function with `params` in place of its own weights; the module itself is not touched."""
        stored = {n: self._to_storage(n, p) for n, p in params.items()}
        if torch.compiler.is_compiling():
            # The compiler follows this for every module, and a shadow for some only; nothing runs meanwhile.
            stored = {bare.name_inside(self.module, n): p for n, p in stored.items()}
            return torch.func.functional_call(self.module, stored, args, kwargs)
        return shadowed(self.module, stored)(*args, **kwargs)

    # -- rows of a batch -----------------------------------------------------------------------------------------

    def take_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, for some rows of its batch of `size`."""
        return batch.pick(args, size, self.batch_dim, rows), batch.pick(kwargs, size, self.batch_dim, rows)

    def join_rows(self, pieces: list[Any], sizes: list[int], order: Tensor) -> Any:
        """The outputs of several groups of rows, put together in the order of the batch. Raises `RequestError`."""
        return batch.join(pieces, sizes, order, self.batch_dim)

    # -- building an adapter -------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The `weight` parameter, output rows first."""
        return self.params()["weight"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first parameter, as it is stored."""
        return tuple(self._first().shape)

    @property
    def device(self) -> torch.device:
        """Where an adapter of this layer is built: where the layer computes."""
        if self.build_device is not None:
            return self.build_device
        first = self._first()
        return (self._runs_on() if first.is_meta else None) or first.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of an adapter's parameters: float32 for half-precision bases unless asked otherwise."""
        return self.build_dtype or self._first().dtype

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised trainable parameter on this layer's device, in the adapter's dtype."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))

    def buffer(self, *shape: int) -> Tensor:
        """An uninitialised tensor that does not train, likewise, for `register_buffer`."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def refuse(self, reason: str) -> TargetError:
        """The error that says this layer cannot be adapted, and why."""
        return TargetError(f"{self.path or 'the model itself'} ({type(self.module).__name__}): {reason}")

    # -- storage -------------------------------------------------------------------------------------------------

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        return bare.owner_of(self.module, name)

    def _stored(self, name: str) -> Tensor:
        owner, attribute = self._owner(name)
        parameter = owner._parameters.get(attribute, owner._buffers.get(attribute))
        if parameter is None:
            raise self.refuse(f"it has no parameter {name!r}; it has {[n for n, _ in self.module.named_parameters()]}")
        return parameter

    def _value(self, name: str) -> Tensor:
        owner, attribute = self._owner(name)
        return offload.value_of(owner, attribute, self._stored(name))

    def _runs_on(self) -> torch.device | None:
        return offload.execution_device(self._owner(self.names[0])[0])

    def _first(self) -> Tensor:
        for name in self.names:
            return self._stored(name)
        return torch.empty(0)

    def _to_storage(self, name: str, value: Tensor) -> Tensor:
        return value


class _WeightBias(BaseLayer):
    """A layer whose parameters are `weight` and perhaps `bias`."""

    def __init__(self, module: nn.Module, path: str, request: SiteRequest | None = None) -> None:
        super().__init__(module, path, request)
        for name in ("weight", "bias"):
            if name not in module._parameters and getattr(module, name, None) is not None:
                raise self.refuse(
                    f"its {name} is computed from other tensors at each call (a parametrization, a norm, pruning), so "
                    "that no adapter can read, replace or merge it; make it a plain parameter first "
                    "(remove_parametrizations, remove_weight_norm, prune.remove), or exclude the module"
                )
        weight = self._stored("weight")
        if is_lazy(weight):
            raise self.refuse("its shape is not known before its first call; call the model once, then adapt it")
        if not (weight.is_floating_point() or weight.is_complex()):
            raise self._unreadable(weight)

    def _unreadable(self, weight: Tensor) -> TargetError:
        return self.refuse(
            f"its weight is stored as {weight.dtype} of shape {tuple(weight.shape)}, which no installed storage "
            "backend can read; install the extension for this kind of quantised layer, or exclude the module"
        )

    @property
    def names(self) -> tuple[str, ...]:
        if self.request.names:
            return self.request.names
        return ("weight",) if self.module._parameters.get("bias") is None else ("weight", "bias")

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.module._parameters.get("bias")


class LinearLayer(_WeightBias):
    """`nn.Linear`, and transformers' `Conv1D` (which stores its weight the other way round)."""

    kind = "linear"

    def __init__(self, module: nn.Module, path: str, request: SiteRequest | None = None) -> None:
        super().__init__(module, path, request)
        self.transposed = is_conv1d(module)
        self._own_forward = type(module).forward is not nn.Linear.forward and not is_conv1d(module)
        weight = self._stored("weight")
        if not weight.is_floating_point() or weight.dim() != 2:
            raise self._unreadable(weight)
        rows, columns = weight.shape
        self.in_features, self.out_features = (rows, columns) if self.transposed else (columns, rows)

    @property
    def positionwise(self) -> bool:
        module = self.module
        return not (self._own_forward or module._forward_hooks or module._forward_pre_hooks)

    def params(self) -> Params:
        params = super().params()
        if self.transposed:
            params["weight"] = params["weight"].t()
        return params

    def _to_storage(self, name: str, value: Tensor) -> Tensor:
        return value.t() if self.transposed and name == "weight" else value

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if self.positionwise and not self.transposed and len(args) == 1 and not kwargs:
            return F.linear(args[0], params["weight"], params.get("bias"))
        return super().call(params, *args, **kwargs)


class ConvLayer(_WeightBias):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`; the weight is (out, in / groups, *kernel)."""

    kind = "conv"
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def in_features(self) -> int:
        return self.module.in_channels

    @property
    def out_features(self) -> int:
        return self.module.out_channels

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(self.module.kernel_size)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int | None = None) -> Tensor:
        """The module's convolution (stride, padding and its mode, dilation) with another kernel.

        `weight` is (any, in / groups, *kernel); `groups` defaults to the module's.
        """
        module = self.module
        padding: Any = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        run: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        result: Tensor = run(
            x, weight, bias, module.stride, padding, module.dilation, module.groups if groups is None else groups
        )
        return result

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if type(self.module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and len(args) == 1 and not kwargs:
            return self.convolve(args[0], params["weight"], params.get("bias"))
        return super().call(params, *args, **kwargs)


class EmbeddingLayer(_WeightBias):
    """`nn.Embedding`; the weight is the table (vocabulary, dimension)."""

    kind = "embedding"
    module: nn.Embedding

    @property
    def num_embeddings(self) -> int:
        return self._stored("weight").shape[0]

    @property
    def embedding_dim(self) -> int:
        return self._stored("weight").shape[1]

    @property
    def scale(self) -> Tensor | float | None:
        """Factor the module puts on its output (`embed_scale`), None where there is none."""
        scale = getattr(self.module, "embed_scale", None)
        return scale if isinstance(scale, (Tensor, float, int)) else None

    def lookup(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of another table (vocabulary, any), with this module's padding index; unscaled."""
        return F.embedding(ids, table, padding_idx=self.module.padding_idx)


class AttentionLayer(BaseLayer):
    """`nn.MultiheadAttention`, whose kernel reads the projections' weights past any wrapper inside it."""

    kind = "attention"
    module: nn.MultiheadAttention

    def __init__(self, module: nn.Module, path: str, request: SiteRequest | None = None) -> None:
        super().__init__(module, path, request)
        self.batch_dim = 0 if self.module.batch_first else 1

    @property
    def embed_dim(self) -> int:
        return int(self.module.embed_dim)

    def take_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = inspect.signature(nn.MultiheadAttention.forward).bind(self.module, *args, **kwargs).arguments
        inputs = tuple(given.pop(name).index_select(self.batch_dim, rows) for name in ("query", "key", "value"))
        del given["self"]
        # The masks have the batch in front wherever the inputs have it, or are the same for every row.
        if given.get("key_padding_mask") is not None:
            given["key_padding_mask"] = given["key_padding_mask"].index_select(0, rows)
        mask = given.get("attn_mask")
        if mask is not None and mask.dim() == 3:
            given["attn_mask"] = mask.unflatten(0, (size, -1)).index_select(0, rows).flatten(0, 1)
        return inputs, given

    def join_rows(self, pieces: list[Any], sizes: list[int], order: Tensor) -> Any:
        outputs, weights = zip(*pieces, strict=True)
        return batch.join(list(outputs), sizes, order, self.batch_dim), batch.join(list(weights), sizes, order, 0)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D` (told by name: transformers may not be installed)."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def layer_of(module: nn.Module, request: SiteRequest) -> BaseLayer:
    """The view of a module that no extension claims."""
    path = request.path
    if not {"weight", "bias"}.issuperset(request.names):
        return BaseLayer(module, path, request)
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return LinearLayer(module, path, request)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvLayer(module, path, request)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(module, path, request)
    if isinstance(module, nn.MultiheadAttention):
        return AttentionLayer(module, path, request)
    return BaseLayer(module, path, request)
