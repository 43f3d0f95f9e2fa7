"""What a kind of view is: the contract between the data and whoever adds a kind.

A kind is a frozen dataclass below `View` in a file of its own. Its fields are the keys that a statement of it may have,
its `kind` is the name under which `registry` finds it. Of each sample it says what it reads, draws what it shows, and
makes its entries of the batch.

Not here: the kinds (`kinds`), plain data to views (`specs`), running them over samples (`maker`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipelines.decode import decode_array
from data_pipelines.errors import DataError, MissingFieldError, suggest
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import read_spec, require_name

__all__ = ["ARRAY_FIELDS", "ArrayReading", "Decoding", "Reading", "View"]

ARRAY_FIELDS = ("npy", "npz")


@dataclass(frozen=True)
class Decoding:
    """How pictures are decoded and scaled, see `ViewMaker`."""

    decoder: str = "pil"
    scaled: bool = False
    resampler: str = "pil"
    exif_rotation: bool = True


@dataclass(frozen=True)
class Reading(ABC):
    """A field of a sample, and as what it is decoded: once, for all views with an equal reading."""

    field: str

    @abstractmethod
    def decode(self, data: bytes, decoding: Decoding) -> Any:
        """The content of the field.

        Raises:
            DataError: the bytes are not what is read here.
        """


@dataclass(frozen=True)
class ArrayReading(Reading):
    """An npy, or one array of an npz, as stored."""

    array: str | None = None

    def decode(self, data: bytes, decoding: Decoding) -> Any:
        return decode_array(data, self.array)


@dataclass(frozen=True)
class View(ABC):
    """One kind of view, as an objective asks for it.

    Attributes:
        name: entry of the batch; further ones are called `<name>.<what>`.
        kind: which kind this is; of the class.
        relations: keys whose value names an earlier view of the same kind; of the class.
        led_keys: keys taken from the view that `same_crop_as` names; of the class.
    """

    kind: ClassVar[str]
    relations: ClassVar[tuple[str, ...]] = ()
    led_keys: ClassVar[tuple[str, ...]] = ()

    name: str

    def __post_init__(self) -> None:
        self._check(require_name(self.name))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The view that a mapping of its keys states.

        Raises:
            DataError: a key is unknown or missing, or a value is refused.
        """
        return read_spec(cls, spec, f"view {dict(spec)!r}")

    @property
    def times(self) -> int | None:
        """How often this is shown of one sample: its `count`; None where it states none.

        Entries of a view that states a count, also 1, have a first dimension of it; those of others have none.
        """
        return getattr(self, "count", None)

    @property
    def extent(self) -> str:
        """How large what it shows is, for people."""
        return self.kind

    @abstractmethod
    def reads(self, fields: frozenset[str]) -> Reading:
        """What this view is made of.

        Args:
            fields: names that every sample has.

        Raises:
            DataError: none of them suits.
        """

    def shapes(self, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        """Shape and type of each entry of one sample, as an objective gets it, without a first dimension of `count`.

        Args:
            channels: of the data, which a view may not know.

        Returns:
            None where the data decide, which is the default.
        """
        return None

    def draw(self, content: Any, rng: ViewRandom, led: Mapping[str, Any]) -> Any:
        """What is shown of a sample, such as rectangles: drawn for all views before the entries of any are made.

        Args:
            content: what `reads` gave.
            rng: of this view and sample.
            led: what the earlier views of the sample drew, by name.
        """
        return None

    @abstractmethod
    def entries(self, content: Any, rng: ViewRandom, drawn: Any) -> dict[str, Tensor]:
        """The entries of one sample, of the same names, shapes and types for all samples.

        Args:
            content: what `reads` gave; shared with other views, so it is not changed.
            rng: as in `draw`, from its first draw on; a kind that draws in both forks it here.
            drawn: what `draw` gave.
        """

    def require_leader(self, relation: str, leader: Self) -> None:
        """Refuse an earlier view that this one cannot follow.

        Raises:
            DataError: says why.
        """
        own, others = self.times or 1, leader.times or 1
        if own != others and (relation == "same_crop_as" or others != 1):
            raise DataError(f"view {self.name!r}: count={own} differs from {others} of {leader.name!r}")

    def stacked(self, values: npt.NDArray[Any] | Sequence[npt.NDArray[Any]]) -> Tensor:
        """One tensor of what is shown each time: (count, ...), or without the dimension if the view states no count."""
        whole = torch.from_numpy(values if isinstance(values, np.ndarray) else np.stack(values))
        return whole[0] if self.times is None else whole

    def chosen_field(self, own: str | None, candidates: Sequence[str], fields: frozenset[str]) -> str:
        """The field that the view names, else the first of the candidates that every sample has.

        Raises:
            MissingFieldError: not every sample has it; names what there is.
        """
        wanted = candidates if own is None else (own,)
        for name in wanted:
            if name in fields:
                return name
        raise MissingFieldError(
            f"view {self.name!r}: no field {' or '.join(wanted)} in every sample; every sample has "
            f"{', '.join(sorted(fields)) or 'none'}{suggest(wanted[0], fields)}",
            wanted,
        )

    def require_suffix(self, field: str, readable: Sequence[str]) -> str:
        """The end of a field's name.

        Raises:
            DataError: it is none of the readable ones.
        """
        suffix = field.rsplit(".", 1)[-1]
        if suffix not in readable:
            raise DataError(f"view {self.name!r}: field {field!r} does not end in {', '.join(readable)}")
        return suffix

    @abstractmethod
    def _check(self, where: str) -> None:
        """Refuse values that make no sense.

        Args:
            where: what messages call the view.

        Raises:
            DataError: names the key, its value and what is allowed.
        """
