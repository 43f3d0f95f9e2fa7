"""From samples to stacked views of them.

Everything random comes from `ViewRandom`s keyed by (seed, epoch, sample id, view), so views do not depend on ranks or
workers. What is drawn for one purpose has a key of its own: asking for colors does not change the crops.

Not here: what views there are (`kinds`), how they are stated (`specs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data_pipelines.decode import chosen_decoder
from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.order import key
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import require_choice
from data_pipelines.views.base import Decoding, Reading, View
from data_pipelines.views.specs import require_distinct

__all__ = ["ViewMaker"]

RESAMPLERS = ("pil", "torch")


class ViewMaker:
    """Makes the views of samples; picklable, holds no state of its own.

    Args:
        views: see `views_from`.
        fields: names that every sample has.
        decoder: of JPEGs: `pil`, `simplejpeg`, or `auto` for simplejpeg where it is installed. The same pixels, see
            `decode`.
        scaled: decode a JPEG at half the size (or a quarter, an eighth) when every crop of it is still shrunk after
            that: faster on large photos, changes the pixels.
        resampler: of photos: `pil`, or `torch`, three times as fast; other pixels, see `crops`.
        exif_rotation: turn pictures and masks as their EXIF orientation says; False: as stored.

    Attributes:
        views: as given.
        reads: fields that the views are made of.
        decoder: the decoder in use.

    Raises:
        DataError: a field is missing or does not suit its view; names the fields there are.
    """

    def __init__(
        self,
        views: Sequence[View],
        fields: frozenset[str],
        *,
        decoder: str = "auto",
        scaled: bool = False,
        resampler: str = "pil",
        exif_rotation: bool = True,
    ) -> None:
        require_distinct(views)
        require_choice("data", "resampler", resampler, RESAMPLERS)
        self.decoder = chosen_decoder(decoder)
        self.views = tuple(views)
        self._decoding = Decoding(self.decoder, scaled, resampler, exif_rotation)
        self._plan = [(view, view.reads(fields)) for view in views]
        self.reads = frozenset(reading.field for _, reading in self._plan)
        self._stack_dim = {view.name: 0 if view.times is None else 1 for view in views}

    def field_of(self, view: View) -> str:
        """The field that one of `views` is made of."""
        return next(reading.field for planned, reading in self._plan if planned is view)

    def __call__(self, sample: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
        """The views of one sample.

        Args:
            sample: bytes by field.
            seed: 64-bit key of the sample, see `sample_seed`; view i draws from keys made of it and i.

        Returns:
            Per view its entries, each with a first dimension `count` if the view states one.

        Raises:
            CorruptSampleError: a field does not decode, or is not what a view can use; begins with the field.
        """
        contents: dict[Reading, Any] = {}
        drawn: dict[str, Any] = {}
        for number, (view, reading) in enumerate(self._plan):
            with _naming(reading.field):
                if reading not in contents:
                    contents[reading] = _decoded(reading, sample[reading.field], self._decoding)
                drawn[view.name] = view.draw(contents[reading], ViewRandom(key(number, base=seed)), drawn)
        entries: dict[str, Tensor] = {}
        for number, (view, reading) in enumerate(self._plan):
            with _naming(reading.field):
                rng = ViewRandom(key(number, base=seed))
                entries |= view.entries(contents[reading], rng, drawn[view.name])
        return entries

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack what `__call__` made of several samples: (b, ...), or (count, b, ...) for views that state a count.

        Raises:
            DataError: an entry has not the same shape and type in all samples.
        """
        batch = {}
        for name in samples[0]:
            parts = [sample[name] for sample in samples]
            if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
                kinds = sorted({f"{tuple(part.shape)} {part.dtype}" for part in parts})
                raise DataError(
                    f"view {name!r} cannot be stacked: the samples have {' and '.join(kinds)}; all data of a stream "
                    "must agree in type, channels, and the shape of plain arrays"
                )
            batch[name] = torch.stack(parts, self._stack_dim[name.split(".")[0]])
        return batch


def _decoded(reading: Reading, data: bytes, decoding: Decoding) -> Any:
    """The content of a field.

    Raises:
        DataError: the bytes do not decode, whatever the decoder (it may be a plug-in's) raised.
    """
    try:
        return reading.decode(data, decoding)
    except DataError:
        raise
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{type(reading).__name__} cannot decode {len(data)} bytes: {type(error).__name__}: {said}"
        ) from error


@contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise CorruptSampleError(f"field {field}: {error}") from None
