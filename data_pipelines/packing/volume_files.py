"""Volumes as other programs store them, to one array: `.npy .npz .nii .nii.gz` -> (D, H, W) with spacing and labels.

Values and number format stay as stored where training can use them; 64-bit ones become smaller. NIfTI files are read
with nibabel (an optional package); their axes x, y, z come out as z, y, x, slices first.

Not here: resampling, intensity windows, what training does with a volume (`volumes`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import decode_arrays
from data_pipelines.errors import DataError

__all__ = ["VolumeFile", "read_volume"]

_MAX_BYTES = 2 << 30  # unpacked
_KEPT = ("uint8", "int8", "uint16", "int16", "float16", "float32")


@dataclass(frozen=True)
class VolumeFile:
    """A volume and what its file says about it."""

    values: npt.NDArray[Any]  # (D, H, W), or (C, D, H, W)
    labels: npt.NDArray[Any] | None = None  # shape of `values`, when the file has them
    spacing: tuple[float, ...] | None = None  # millimetres along D, H, W


def read_volume(data: bytes, suffix: str) -> VolumeFile:
    """Read a volume.

    Args:
        suffix: of the file, lower case with the dot; decides the format.

    Raises:
        DataError: damaged, too large, not of three or four dimensions, not finite; or nibabel is needed and missing.
    """
    if suffix in (".nii", ".nii.gz"):
        return _from_nifti(data)
    arrays = decode_arrays(data)
    values = next((arrays[name] for name in ("volume", "image", "") if name in arrays), None)
    if values is None and len(arrays) == 1:
        values = next(iter(arrays.values()))
    if values is None:
        raise DataError(f"npz holds {', '.join(sorted(arrays)) or 'nothing'}; name the volume 'volume' or 'image'")
    labels = next((arrays[name] for name in ("label", "labels", "seg") if name in arrays), None)
    if labels is not None and labels.shape != values.shape[-3:]:
        raise DataError(f"labels of shape {labels.shape} do not fit the volume of shape {values.shape}")
    spacing = arrays.get("spacing")
    return VolumeFile(
        _compact(values),
        None if labels is None else _compact(labels),
        None if spacing is None else tuple(float(step) for step in spacing.ravel()),
    )


def _from_nifti(data: bytes) -> VolumeFile:
    try:
        import nibabel
    except ImportError:
        raise DataError("NIfTI volumes need the package nibabel: pip install nibabel") from None
    try:
        image = nibabel.Nifti1Image.from_bytes(_gunzip(data))
        size = int(np.prod(image.shape, dtype=np.int64)) * 8
        if size > _MAX_BYTES:
            raise DataError(f"volume of shape {image.shape} exceeds {_MAX_BYTES} bytes as float64")
        values = np.asanyarray(image.dataobj)  # scaled to floats only where the header asks for it
        steps = image.header.get_zooms()
    except DataError:
        raise
    except Exception as error:  # nibabel documents no base class for what damaged headers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read NIfTI of {len(data)} bytes: {reason}") from None
    spatial = tuple(float(step) for step in steps[:3])
    return VolumeFile(_compact(values.T), spacing=spatial[::-1])  # (x, y, z) -> (z, y, x)


def _gunzip(data: bytes) -> bytes:
    """Unpack gzip bytes, not beyond the limit; other bytes come back as they are."""
    if data[:2] != b"\x1f\x8b":
        return data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(data, _MAX_BYTES)
    except zlib.error as error:
        raise DataError(f"cannot unpack gzip of {len(data)} bytes: {error}") from None
    if not unpacker.eof:
        raise DataError(f"gzip of {len(data)} bytes is cut, or unpacks to more than {_MAX_BYTES} bytes")
    return content


def _compact(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Little endian and at most 32 bits wide; integers stay integers when they fit into 16 bits."""
    if values.ndim not in (3, 4) or values.size == 0 or values.dtype.kind not in "fiub":
        raise DataError(f"array of shape {values.shape} and type {values.dtype} is no volume; it must be (D, H, W)")
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    elif values.dtype.newbyteorder("=").name not in _KEPT:
        fits = values.dtype.kind in "iu" and values.min() >= -(1 << 15) and values.max() < 1 << 15
        values = values.astype(np.int16 if fits else np.float32)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} of {values.size} voxels are not finite")
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
