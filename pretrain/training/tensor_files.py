"""Safetensors files that are written a piece at a time, with their SHA-256 taken on the way.

`safetensors.torch.save_file` wants all tensors at once, and the digest another pass over the file. Here the bytes of a
file may wait in a buffer in host memory, laid out as in the file, while their tensors go on changing: that is what lets
training go on while a checkpoint is written.

Layout of the file: 8 bytes of length, a header in JSON, then the tensors one after another, those of wide types first,
so that each begins at a multiple of its width.

Not here: reading, which is safetensors' own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HostBuffer", "TensorFile"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # bytes; no type is wider
_CHUNK = 16 << 20  # bytes that are written and digested at a time


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file is to hold.

    Attributes:
        tensors: By name; on any device.
        metadata: Texts of the header.
        copied: The bytes of all tensors, where they were copied; None: they are read from `tensors`.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    copied: Tensor | None = None

    @cached_property
    def _ordered(self) -> Sequence[tuple[str, Tensor]]:
        return sorted(self.tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))

    @cached_property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(_size(tensor) for tensor in self.tensors.values())

    def header(self) -> bytes:
        """Everything before the tensors."""
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        start = 0
        for name, tensor in self._ordered:
            stop = start + _size(tensor)
            entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def copy_into(self, buffer: Tensor) -> TensorFile:
        """The same file with its bytes in `buffer`, of `num_bytes`; on a GPU the copies may still be under way."""
        start = 0
        for _, tensor in self._ordered:
            stop = start + _size(tensor)
            target = buffer[start:stop].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor.detach(), non_blocking=True)
            start = stop
        shells = {name: tensor.detach().to("meta") for name, tensor in self.tensors.items()}
        return TensorFile(shells, self.metadata, buffer)

    def write(self, path: Path) -> str:
        """Write the file; returns its SHA-256 in hexadecimal digits."""
        digest = hashlib.sha256()
        with path.open("xb") as file:
            for block in self._blocks():
                file.write(block)
                digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[memoryview | bytes]:
        yield self.header()
        for tensor in [self.copied] if self.copied is not None else [tensor for _, tensor in self._ordered]:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), _CHUNK):
                yield content[start : start + _CHUNK]


class HostBuffer:
    """Memory of this process that tensors are copied into; it stays allocated, since fresh pages cost more than copies.

    Args:
        device: Where the tensors come from. For a GPU the memory is page-locked, so that it copies by itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def missing(self, files: Mapping[str, TensorFile]) -> int:
        """Bytes that would have to be allocated for the tensors of these files."""
        wanted = _room(files)
        return wanted if wanted > self._memory.numel() else 0

    def copy(self, files: Mapping[str, TensorFile]) -> dict[str, TensorFile]:
        """The same files, whose tensors may change from now on; the files of the call before are overwritten."""
        if self.missing(files):
            self._memory = torch.empty(0, dtype=torch.uint8)  # first, so that never both are there
            self._memory = torch.empty(_room(files), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        copies, start = {}, 0
        for name, file in files.items():
            copies[name] = file.copy_into(self._memory[start : start + file.num_bytes])
            start += _aligned(file.num_bytes)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _room(files: Mapping[str, TensorFile]) -> int:
    return sum(_aligned(file.num_bytes) for file in files.values())
