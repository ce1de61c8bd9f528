"""Frozen tensors made from a seed: not saved, and yet known to be the same where they are made again."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .errors import CheckpointMismatchError

Make = Callable[[Sequence[int], torch.Generator], Tensor]


class Seeded(nn.Module):
    """A frozen tensor `value` of `shape`, drawn on the CPU from `seed`.

    Files hold its checksum alone. Random generators may change between versions of a library; a checkpoint whose
    tensor cannot be made again is refused, not loaded with other numbers.
    """

    value: Tensor
    checksum: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        seed: int,
        make: Make | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`make(shape, generator)` draws the tensor; by default from the standard normal distribution."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = make(shape, generator) if make else torch.randn(*shape, generator=generator)
        drawn = drawn.detach().to("cpu").contiguous()
        self.register_buffer("value", drawn.to(device=device, dtype=dtype), persistent=False)
        checksum = zlib.crc32(drawn.view(torch.uint8).numpy().tobytes())
        self.register_buffer("checksum", torch.tensor([checksum], device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Seeded:
        # A cast is one of the value: the checksum is that of the numbers as drawn.
        checksum = self.checksum
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.checksum = checksum.to(self.value.device)
        return self

    def check(self, checksum: Tensor, name: str) -> None:
        """Raise `CheckpointMismatchError` where a file was written beside other numbers."""
        if not self.checksum.is_meta and int(checksum) != int(self.checksum):
            raise CheckpointMismatchError(
                f"adapter {name!r}: a frozen tensor of shape {tuple(self.value.shape)}, drawn anew from its seed, "
                f"is not the one of the file (checksum {int(self.checksum)}, in the file {int(checksum)}). "
                "Random numbers changed between the versions of the writer's libraries and yours; load it where it was "
                "written, and save the tensor itself (or merge) there"
            )
