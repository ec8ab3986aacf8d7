"""A checkpoint's files in memory: private maps, made when they are first asked for. No torch."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from quire.core.errors import CheckpointError, TruncatedFile
from quire.core.json_file import open_regular, shorten
from quire.models.checkpoint import TensorInfo


class MappedFiles:
    """A view may be written to: a written page becomes the process's own and the file stays as it is.

    A file's map lives as long as this object or any view of the file does; it is never closed by hand, since a view
    left over would then point nowhere.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def file_of(self, info: TensorInfo) -> mmap.mmap:
        """The file that a tensor lies in. Raises CheckpointError."""
        found = self._maps.get(info.file)
        if found is None:
            found = _map(info.file)
            self._maps[info.file] = found
        if info.offset + info.nbytes > len(found):  # the file shrank since its header was read
            raise TruncatedFile(
                f"{info.file}: tensor '{shorten(info.name)}' is cut off: expected {info.nbytes} bytes, "
                f"found {max(0, len(found) - info.offset)}.",
                param="model",
            )
        return found

    def address(self, info: TensorInfo) -> int:
        """Where a tensor's bytes are, for as long as this object lives. Raises CheckpointError."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.file_of(info), info.offset))

    def drop(self, info: TensorInfo) -> None:
        """Lets the kernel take back the memory of a tensor that is not needed any more, because it was converted.

        Pages that the tensor shares with its neighbours stay. Reading a dropped tensor again reads the file again;
        what was written to the view is lost.
        """
        file_map = self._maps.get(info.file)
        if file_map is None or info.nbytes == 0:
            return
        begin = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            file_map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _map(path: Path) -> mmap.mmap:
    with open_regular(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be mapped into memory: {error}.", param="model") from error
