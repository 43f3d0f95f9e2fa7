"""Backbone files: safetensors with the architecture in the header, checked by digest, never unpickled; heads beside
them; weights of one encoder as the start of another; and weight files of others.

NOT here: training state, publication of checkpoints (`pretrain.checkpoints.store`).
torch is imported where tensors are made, so that a digest can be taken without it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor

    from backbones.encoder import Encoder

__all__ = [
    "BACKBONE_FILE",
    "HEADS_FILE",
    "STATE_DICT_SUFFIXES",
    "Initialized",
    "backbone_metadata",
    "heads_digest",
    "heads_metadata",
    "heads_spec",
    "initialize_from",
    "load_backbone",
    "load_heads",
    "open_weights",
    "read_shapes",
    "save_backbone",
    "save_heads",
    "weights_digest",
]

BACKBONE_FILE = "backbone.safetensors"
HEADS_FILE = "heads.safetensors"  # what the objective has on top of it, where it exports that
STATE_DICT_SUFFIXES = (".pth", ".pt", ".bin")  # of files that `torch.save` wrote
_METADATA_KEY = "pretrain.backbone"
_HEADS_KEY = "pretrain.heads"
_STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # where timm looks for it, in its order


def save_backbone(path: Path, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    """Writes weights and architecture to one file.

    Args:
        path: the file, conventionally `.../backbone.safetensors`; an existing one is replaced.
        tensors: names -> weights, as from `Encoder.weights()`.
        spec: `Encoder.spec`.
    """
    _save(path, tensors, backbone_metadata(spec))


def save_heads(path: Path, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    """Writes the weights of heads, and what they can be built from again, to one file.

    Args:
        path: the file, conventionally `.../heads.safetensors` beside the backbone; an existing one is replaced.
        tensors, spec: as `objectives.base.Heads` has them.
    """
    _save(path, tensors, heads_metadata(spec))


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata=metadata)


def backbone_metadata(spec: Mapping[str, Any]) -> dict[str, str]:
    """What the header of a backbone file says of its architecture; `spec` is that of the `Encoder`."""
    return {_METADATA_KEY: _canonical(spec)}


def heads_metadata(spec: Mapping[str, Any]) -> dict[str, str]:
    """What the header of a file of heads says of them; `spec` is that of `objectives.base.Heads`."""
    return {_HEADS_KEY: _canonical(spec)}


def load_backbone(path: Path | str) -> Encoder:
    """A backbone with its weights, in evaluation mode.

    Args:
        path: a `.safetensors` file, or a checkpoint directory that holds `backbone.safetensors`. When
            `checkpoint.json` lies beside the file, the file must have the sha256 recorded there.

    Raises:
        BackboneError: no such file, not a backbone file, digest mismatch, or tensors that do not fit the architecture.
    """
    from safetensors.torch import load

    from backbones.registry import from_spec

    file = _file(path)
    data = file.read_bytes()  # read once: what is hashed is what is loaded
    _verify(file, data)
    header, _ = _header(file, data)
    backbone = from_spec(_spec(file, header))
    weights, expected = load(data), backbone.network.state_dict()
    wrong = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{name} is not part of the model" for name in weights.keys() - expected.keys()]
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise BackboneError(f"{file}: does not fit {backbone.spec['name']!r}: {_some(wrong)}")
    backbone.network.load_state_dict(weights)
    return backbone.eval()


def heads_spec(path: Path | str) -> dict[str, Any] | None:
    """What heads beside a backbone can be built from; None where there are none, or their file does not say.

    Args:
        path: as for `load_backbone`.
    """
    file = _file(path).with_name(HEADS_FILE)
    if not file.is_file():
        return None
    header, _ = _header(file, file.read_bytes())
    return None if _HEADS_KEY not in header.get("__metadata__", {}) else _spec(file, header, _HEADS_KEY)


def load_heads(path: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What heads beside a backbone can be built from, and their weights by name.

    Args:
        path: as for `load_backbone`; digests are compared as there.

    Raises:
        BackboneError: there are none, or they are damaged.
    """
    from safetensors.torch import load

    file, data = _heads(path)
    _verify(file, data)
    return _spec(file, _header(file, data)[0], _HEADS_KEY), load(data)


def open_weights(file: Path) -> Mapping[str, Tensor]:
    """Tensors by name: a safetensors file, or a state dict that `torch.save` wrote; its name says which.

    Of a safetensors file each tensor is read when it is asked for. Of the latter torch builds tensors, numbers and
    texts, all at once, and runs no code. One that lies within a training checkpoint, as timm writes them, is found.

    Raises:
        BackboneError: it holds neither, or anything else than tensors.
        OSError: the file cannot be read.
    """
    return _state_dict(file, file.read_bytes()) if file.suffix in STATE_DICT_SUFFIXES else _OnDemand(file)


class _OnDemand(Mapping[str, "Tensor"]):
    """Tensors of a safetensors file by name, which are in memory for as long as somebody has them."""

    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise BackboneError(f"{file}: not a safetensors file ({error})") from error
        self._names = set(self._opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `open_weights` would give; of a safetensors file by its header alone, without torch.

    Raises:
        BackboneError: as `open_weights`, or the file cannot be read.
    """
    try:
        if file.suffix in STATE_DICT_SUFFIXES:
            return {name: tuple(tensor.shape) for name, tensor in _state_dict(file, file.read_bytes()).items()}
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = opened.read(8)
            data = length + opened.read(min(int.from_bytes(length, "little"), size))
    except OSError as error:
        raise BackboneError(f"{file}: {error.strerror or error}") from error
    header, _ = _header(file, data, size)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _state_dict(file: Path, data: bytes) -> dict[str, Tensor]:
    """Tensors of what `torch.save` wrote."""
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own have the command's arguments in them
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(f"{file}: holds something else than tensors, which could run code; refused") from error
    except Exception as error:  # of a damaged file the unpickler raises whatever comes
        raise BackboneError(f"{file}: not a file that torch.save wrote, or damaged") from error
    for key in _STATE_DICT_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise BackboneError(f"{file}: no state dict, which holds tensors by name and nothing else")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


@dataclass(frozen=True)
class Initialized:
    """What `initialize_from` did with the weights that it was given; all names are sorted.

    Attributes:
        loaded: taken over as they are.
        resampled: brought to the shape of the encoder, such as positions of another grid.
        missing: of the encoder, and not among the weights; they stay as they were.
        unexpected: among the weights, and not of the encoder; they were not used.
    """

    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def initialize_from(
    encoder: Encoder, weights: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]] | None = None
) -> Initialized:
    """Copies weights of another encoder into this one, each in the type and on the device that it has here.

    Nothing is copied when it raises. Call it before an engine shards the parameters, and after the objective is built,
    whose constructor may initialize them anew.

    Args:
        encoder: receives the weights by the names of `Encoder.weights()`.
        weights: names -> tensors, each asked for once, in the encoder's order, and none kept but what is fitted. Where
            a shape differs, `Encoder.fitted` decides: a plain ViT resamples its absolute positions to its own grid.
        shapes: of the weights; None: they are asked for their shapes first.

    Raises:
        BackboneError: a tensor has another shape and cannot be fitted, or no name is the encoder's.
    """
    import torch

    shapes = {name: tensor.shape for name, tensor in weights.items()} if shapes is None else shapes
    own = encoder.weights()
    taken = [name for name in own if name in weights]
    unlike = [name for name in taken if tuple(shapes[name]) != tuple(own[name].shape)]
    fitted = {name: encoder.fitted(name, weights[name]) for name in unlike}
    wrong = [
        f"{name} has shape {tuple(shapes[name])}, not {tuple(own[name].shape)}"
        for name, tensor in fitted.items()
        if tensor is None
    ]
    if wrong:
        raise BackboneError(f"the weights do not fit backbone {encoder.spec['name']!r}: {_some(wrong)}")
    if not taken:
        raise BackboneError(
            f"the weights do not fit backbone {encoder.spec['name']!r}: none of their {len(weights)} names is one of "
            f"its, such as {next(iter(own))}"
        )
    with torch.no_grad():
        for name in taken:
            tensor = fitted[name] if name in fitted else weights[name]
            assert tensor is not None  # refused above
            own[name].copy_(tensor)
    return Initialized(
        loaded=tuple(sorted(set(taken) - fitted.keys())),
        resampled=tuple(sorted(fitted)),
        missing=tuple(sorted(own.keys() - weights.keys())),
        unexpected=tuple(sorted(weights.keys() - own.keys())),
    )


def _some(mistakes: list[str]) -> str:
    """The first three of several mistakes, and how many more there are."""
    more = f" and {len(mistakes) - 3} more" if len(mistakes) > 3 else ""
    return f"{'; '.join(sorted(mistakes)[:3])}{more}"


def weights_digest(path: Path | str) -> str:
    """Identity of what a backbone computes: sha256 over its weights and architecture, not over the file's layout.

    Hashes, in sorted name order, (name, dtype, shape, little-endian bytes) of every tensor, then the canonical JSON of
    the architecture. Re-saved copies of the same weights have the same digest.

    Args:
        path: as for `load_backbone`.

    Raises:
        BackboneError: no such file, or not a backbone file.
    """
    file = _file(path)
    return _digest(file, file.read_bytes(), _METADATA_KEY)


def heads_digest(path: Path | str) -> str:
    """The same of the heads beside a backbone.

    Raises:
        BackboneError: there are none, or they are damaged.
    """
    return _digest(*_heads(path), _HEADS_KEY)


def _digest(file: Path, data: bytes, key: str) -> str:
    header, start = _header(file, data)
    digest = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        begin, end = entry["data_offsets"]
        digest.update(_canonical([name, entry["dtype"], entry["shape"]]).encode())
        digest.update(memoryview(data)[start + begin : start + end])
    digest.update(_canonical(_spec(file, header, key)).encode())
    return digest.hexdigest()


def _file(path: Path | str) -> Path:
    path = Path(path)
    file = path / BACKBONE_FILE if path.is_dir() else path
    if not file.is_file():
        raise BackboneError(f"{file}: no such file; give a checkpoint directory or its {BACKBONE_FILE}")
    return file


def _heads(path: Path | str) -> tuple[Path, bytes]:
    """The file of the heads beside a backbone, and what it holds."""
    file = _file(path).with_name(HEADS_FILE)
    if not file.is_file():
        raise BackboneError(f"{file}: no such file; the checkpoint has no heads beside its backbone")
    return file, file.read_bytes()


def _header(file: Path, data: bytes, size: int | None = None) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file (8 bytes length, then JSON) and the offset where tensor bytes begin.

    Args:
        file: is named in messages.
        data: its bytes, to the end of the header at least.
        size: how many it has; None: those of `data`.
    """
    size = len(data) if size is None else size
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise BackboneError(f"{file}: not a safetensors file (unreadable header)") from error
    if start + max(ends, default=0) != size:
        raise BackboneError(f"{file}: {size} bytes long, its header says {start + max(ends, default=0)}; damaged")
    return header, start


def _spec(file: Path, header: Mapping[str, Any], key: str = _METADATA_KEY) -> dict[str, Any]:
    try:
        return json.loads(header["__metadata__"][key])
    except (KeyError, ValueError, RecursionError) as error:
        raise BackboneError(f"{file}: no {key!r} in its header, so the architecture is unknown") from error


def _verify(file: Path, data: bytes) -> None:
    record = file.parent / "checkpoint.json"
    if not record.is_file():
        return
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))["files"][file.name]["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BackboneError(f"{record}: no sha256 for {file.name}, so it cannot be trusted") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != recorded:
        raise BackboneError(f"{file}: digest mismatch: sha256 {actual[:12]}.. but {record.name} says {recorded[:12]}..")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
