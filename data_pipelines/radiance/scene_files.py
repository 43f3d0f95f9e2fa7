"""The files of one scene, in a folder or in a tar: read by name, named in messages.

Not here: what they say (`transforms`, `colmap`).
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.hidden import is_hidden

__all__ = ["PICTURES", "SceneFiles"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG", ".JPEG")


class SceneFiles:
    """Files below a folder, or in a tar below the folder that holds one of `markers`.

    Raises:
        DataError: The tar is damaged.
    """

    def __init__(self, path: Path, markers: Sequence[str]) -> None:
        self.path = path
        self._members: dict[str, tarfile.TarInfo] | None = None
        if not path.is_dir():
            self._members = self._listed(markers)

    def has(self, name: str) -> bool:
        if self._members is not None:
            return posixpath.normpath(name) in self._members
        return (self.path / name).is_file()

    def holds_folder(self, name: str) -> bool:
        if self._members is not None:
            return any(member.startswith(f"{name}/") for member in self._members)
        return (self.path / name).is_dir()

    def read(self, name: str) -> bytes:
        """
        Raises:
            DataError: There is no such file, or it cannot be read.
        """
        try:
            if self._members is None:
                return (self.path / name).read_bytes()
            with tarfile.open(self.path, "r:") as tar:
                file = tar.extractfile(self._members[posixpath.normpath(name)])
                return file.read() if file else b""
        except KeyError:
            raise DataError(f"{self.where(name)}: no such file in the tar; add it") from None
        except (OSError, tarfile.TarError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.where(name)}: cannot be read: {reason}; copy the scene again") from None

    def where(self, name: str) -> str:
        """A file as messages name it."""
        return f"{self.path}/{name}" if self._members is None else f"{self.path}:{name}"

    def picture(self, name: str, where: str) -> str:
        """The name of the file of a picture that may be named without its suffix.

        Raises:
            DataError: There is none, or it lies outside of the scene.
        """
        plain = posixpath.normpath(name.replace("\\", "/"))
        if plain.startswith(("/", "..")):
            raise DataError(
                f"{where}: {name!r} lies outside of the scene; put the pictures below {self.path} and "
                "name them from there"
            )
        found = next((plain + suffix for suffix in ("", *PICTURES) if self.has(plain + suffix)), None)
        if found is None:
            raise DataError(
                f"{where}: there is no picture {self.where(plain)} (nor with {' '.join(PICTURES[:4])}); add it or "
                "remove the frame"
            )
        return found

    def _listed(self, markers: Sequence[str]) -> dict[str, tarfile.TarInfo]:
        try:
            with tarfile.open(self.path, "r:") as tar:
                infos = {posixpath.normpath(info.name): info for info in tar if info.isfile()}
        except (OSError, tarfile.TarError, EOFError) as error:
            raise DataError(
                f"{self.path}: cannot be read as a tar ({error}); copy it again, unpack it if it is compressed"
            ) from None
        names = {name for name in infos if not is_hidden(name)}
        roots = [name.removesuffix(marker) for name in names for marker in markers if f"/{name}".endswith(f"/{marker}")]
        root = min(roots, key=lambda folder: (folder.count("/"), folder), default="")
        return {name.removeprefix(root): infos[name] for name in names if name.startswith(root)}
