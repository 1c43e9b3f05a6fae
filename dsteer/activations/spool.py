"""Token ids of many prompts, on disk instead of in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

from dsteer.data.tokens import Encoded
from dsteer.errors import StoreError


class IdSpool(Sequence[Encoded]):
    """A file that encoded prompts are appended to and read from; in memory 13 bytes a prompt.

    It is scaffolding: an existing file is overwritten.

    Raises:
        StoreError: the disk is full or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        self._ends = array("q", [0])
        self._prompt_lengths = array("i")
        self._truncated = bytearray()

    def append(self, item: Encoded) -> None:
        """Put one prompt behind the others."""
        try:
            self._file.seek(self._ends[-1] * 4)
            array("i", item.ids).tofile(self._file)
        except OSError as error:
            raise self._unwritable(error) from None
        self._ends.append(self._ends[-1] + len(item.ids))
        self._prompt_lengths.append(item.prompt_length)
        self._truncated.append(item.truncated)

    @property
    def tokens(self) -> int:
        """Ids of all prompts."""
        return self._ends[-1]

    @property
    def truncated(self) -> int:
        """How many prompts lost their left part."""
        return sum(self._truncated)

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = array("i")
        self._file.seek(self._ends[index] * 4)
        ids.fromfile(self._file, self._ends[index + 1] - self._ends[index])
        return Encoded(tuple(ids), self._prompt_lengths[index], bool(self._truncated[index]))

    def __enter__(self) -> IdSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> StoreError:
        reason = error.strerror or type(error).__name__
        return StoreError(
            f"{self._path}: can't be written ({reason}); free space, or choose another folder"
        )
