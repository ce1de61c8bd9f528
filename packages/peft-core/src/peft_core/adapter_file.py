"""Reading one safetensors file of unknown origin.

The file is opened once, and everything is read from that descriptor: the header and the tensors belong
together even when a writer puts another file in its place meanwhile. Nothing is mapped into memory, so a file
that is cut short while it is read gives an error and not a dead process.

Format: 8 bytes little-endian header length n, n bytes JSON
`{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`, then the data.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import stat
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .errors import CheckpointError, CheckpointMismatchError
from .plain_data import parse_json
from .suggest import shown

# The limit of the format's reference implementation.
MAX_HEADER = 100_000_000
MAX_DIMS = 32

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's dtypes that an adapter's tensors may have."""

CONFIG_KEY = "peft_core.config"
WROTE_BY_KEY = "peft_core.wrote_by"
LAYOUT_KEY = "peft_core.layout"
LAYOUT = 1


class AdapterFile:
    """A checkpoint that was opened and checked, its tensors not yet read.

    Attributes:
        config: content of the config file.
        method: name of the method, from the config's `peft_type`.
        wrote_by: distribution that wrote the file, such as "acme-method 1.2", where it says so.
        source: the path, for messages.
        shapes: key -> (shape, the format's name of the dtype), from the header.
        metadata: what the header's `__metadata__` holds.
    """

    config: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path` and check its header against the file's size. Raises `CheckpointError`."""
        self.source = os.fspath(path)
        self.config = {}
        try:
            # Before opening: to open a pipe would wait for its writer.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError(f"{self.source}: not a regular file. Give the file an adapter was saved in.")
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{self.source}: cannot be opened: {error}") from error
        # Not a file object: one that is forgotten would warn.
        self._close = weakref.finalize(self, os.close, descriptor)
        self._raw = io.FileIO(descriptor, closefd=False)
        self._lock = threading.Lock()
        try:
            self._read_header(os.fstat(descriptor).st_size)
        except BaseException:
            self.close()
            raise

    # -- the header ------------------------------------------------------------------------------------------

    def _read_header(self, size: int) -> None:
        length = int.from_bytes(self._bytes(0, 8), "little") if size >= 8 else 0
        if size < 8 or length > size - 8:
            raise self._damaged(f"its header should have {length} bytes, and the file has {size}")
        if length > MAX_HEADER:
            raise self._damaged(f"its header of {length} bytes is larger than {MAX_HEADER}")
        header = self._parse(bytes(self._bytes(8, length)))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("its __metadata__ is not a mapping of strings")
        self.metadata: Mapping[str, str] = metadata
        self._offset = 8 + length
        self._spans: dict[str, tuple[int, int]] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for key, entry in header.items():
            self._add(key, entry)
        end = 0
        # Without gaps and overlaps: no hidden data, and no more to read than the file has.
        for key, (start, stop) in sorted(self._spans.items(), key=lambda item: item[1]):
            if start != end:
                raise self._damaged(f"the data of {named(key)} does not start where the one before it ends")
            end = stop
        if end != size - self._offset:
            raise self._damaged(f"its tensors take {end} bytes, and the file has {size - self._offset} for them")

    def _parse(self, content: bytes) -> dict[str, Any]:
        def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(items)
            if len(found) < len(items):
                twice = Counter(key for key, _ in items).most_common(1)[0][0]
                raise self._damaged(f"its header has {named(twice)} twice, and readers disagree which one counts")
            return found

        def refuse(text: str) -> Any:
            raise self._damaged(f"its header holds {text}")

        try:
            header = json.loads(content.decode("utf-8"), object_pairs_hook=pairs, parse_constant=refuse)
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not valid JSON: {named(str(error))}") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        return header

    def _add(self, key: str, entry: object) -> None:
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(span) or len(span) != 2:
            raise self._damaged(f"the header's entry of {named(key)} is not a dtype, a shape and a span of data")
        start, stop = span
        if len(shape) > MAX_DIMS or start > stop:
            raise self._damaged(f"the header's entry of {named(key)} has an impossible shape or span of data")
        # Dtypes unknown here are refused where they would be used, by name, together with all else that is wrong.
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
            raise self._damaged(
                f"{named(key)} of shape {shape} and dtype {dtype} does not fit its {stop - start} bytes"
            )
        self.shapes[key] = (tuple(shape), dtype)
        self._spans[key] = (start, stop)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: not a whole safetensors file: {what}. It was cut short, damaged, or made by something "
            "else; get it again from where it came from."
        )

    # -- what it says ----------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """Name of the method. Raises `CheckpointError` where the config names none."""
        peft_type = self.config.get("peft_type")
        if not isinstance(peft_type, str) or not peft_type:
            raise CheckpointError(
                f"{self.source}: the config's peft_type is {named(peft_type)}; it should name the adapter's method, "
                'as in "peft_type": "NAME". This is not the config of an adapter, or it was edited.'
            )
        return peft_type.lower()

    @property
    def wrote_by(self) -> str | None:
        """Distribution that wrote the file; a file's word, cut to a length for messages."""
        wrote_by = self.metadata.get(WROTE_BY_KEY)
        return wrote_by[:200] if wrote_by else None

    def embedded_config(self) -> dict[str, Any] | None:
        """The config that was saved together with the tensors, None in files of other writers.

        Raises `CheckpointError` where a newer layout is declared, `ConfigError` where the JSON is malformed.
        """
        layout = self.metadata.get(LAYOUT_KEY, str(LAYOUT))
        if layout != str(LAYOUT):
            raise CheckpointError(
                f"{self.source}: written in layout {named(layout)}, and this version of peft-core reads layout "
                f"{LAYOUT}. Upgrade it: pip install -U peft-core"
            )
        text = self.metadata.get(CONFIG_KEY)
        return None if text is None else parse_json(text.encode(), source=f"{self.source} (config in its metadata)")

    # -- tensors ---------------------------------------------------------------------------------------------

    def load(self, keys: Iterable[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Read tensors, in the file's dtype, onto `device`.

        Raises:
            CheckpointMismatchError: a tensor is missing, of an unsupported dtype, or holds NaN or infinity.
            CheckpointError: the file was cut short meanwhile.
        """
        return {key: self._tensor(key).to(device) for key in keys}

    def _tensor(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise CheckpointMismatchError(f"{self.source}: there is no tensor {named(key)}")
        shape, name = self.shapes[key]
        if name not in DTYPES:
            raise CheckpointMismatchError(f"{self.source}: {named(key)} has the dtype {named(name)}; {SUPPORTED}")
        start, stop = self._spans[key]
        dtype = DTYPES[name]
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        # Memory of torch's own: its alignment decides which kernels run, and so the last bit of a result.
        data = torch.empty(stop - start, dtype=torch.uint8)
        memory = memoryview((ctypes.c_char * len(data)).from_address(data.data_ptr())).cast("B")
        self._fill(memory, self._offset + start)
        if dtype == torch.bool:  # Any other byte than 0 and 1 in a bool tensor is undefined behaviour.
            return data.ne(0).view(shape)
        return self._finite(key, data.view(dtype).view(shape))

    def _finite(self, key: str, tensor: Tensor) -> Tensor:
        if not all_finite(tensor):
            raise CheckpointMismatchError(
                f"{self.source}: {named(key)} holds numbers that are not finite (NaN or infinity). The training that "
                "wrote it diverged, or the file is damaged; use an earlier checkpoint."
            )
        return tensor

    def _bytes(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data), offset)
        return data

    def _fill(self, rest: memoryview, offset: int) -> None:
        """Fill memory with the file's bytes from `offset` on."""
        try:
            with self._lock:
                self._raw.seek(offset)
                while rest:
                    count = self._raw.readinto(rest)
                    if not count:
                        raise CheckpointError(
                            f"{self.source}: ended {len(rest)} bytes early: it was cut short while it was read. Load "
                            "it again when nobody writes to it."
                        )
                    rest = rest[count:]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.source}: cannot be read: {error}") from error

    def close(self) -> None:
        """Give the file back; done as well when the object is forgotten."""
        self._raw.close()
        self._close()

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self.shapes)} tensors)"


SUPPORTED = f"supported are {', '.join(DTYPES)}"


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # torch has no such operation for 8-bit floats
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def named(key: object) -> str:
    """A name out of a file, for a message: escaped, and never long."""
    return shown(key, 300)


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


class TensorsFile(AdapterFile):
    """Tensors in memory as a checkpoint: what a reader of a foreign format returned."""

    def __init__(self, config: dict[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
        self.source = source
        self.config = config
        self.metadata = {}
        names = {dtype: name for name, dtype in DTYPES.items()}
        self._tensors = dict(tensors)
        self.shapes = {k: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for k, t in self._tensors.items()}

    def _tensor(self, key: str) -> Tensor:
        tensor = self._tensors.get(key)
        if tensor is None:
            raise CheckpointMismatchError(f"{self.source}: there is no tensor {named(key)}")
        return self._finite(key, tensor.detach())

    def close(self) -> None:
        """Nothing to give back."""
