"""Files written a piece at a time are those that safetensors writes, and copies of tensors outlive changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.training.tensor_files import HostBuffer, TensorFile


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 5, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "steps": torch.tensor(3.0),
        "is_done": torch.tensor(True),
        "order": torch.arange(7),
        "nothing": torch.zeros(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def test_write__is_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = _tensors()
    digest = TensorFile(tensors, {"of": "a test"}).write(tmp_path / "ours")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"of": "a test"})
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes() and digest == hashlib.sha256(content).hexdigest()
    TensorFile({}).write(tmp_path / "empty")
    assert load_file(tmp_path / "empty") == {}


def test_copy__keeps_what_the_tensors_were_in_memory_that_is_allocated_once(tmp_path: Path) -> None:
    buffer, tensors = HostBuffer(torch.device("cpu")), _tensors()
    files = {"odd": TensorFile({"three": torch.ones(3, dtype=torch.uint8)}), "all": TensorFile(tensors)}
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    assert buffer.missing(files) >= sum(file.num_bytes for file in files.values())
    copies = buffer.copy(files)
    for tensor in tensors.values():
        tensor.zero_()
    copies["all"].write(tmp_path / "all")
    found = load_file(tmp_path / "all")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)

    copied = copies["all"].copied
    assert buffer.missing(files) == 0 and copied is not None
    again = buffer.copy(files)["all"].copied
    assert again is not None and again.data_ptr() == copied.data_ptr()
