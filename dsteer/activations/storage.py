"""States in memory or on disk: written row by row, read site by site."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsteer.activations.sites import site_order
from dsteer.errors import StoreError
from dsteer.parallel import ALONE, Ranks
from dsteer.store import Json, atomic_path, read_metadata


class States(Mapping[str, Tensor]):
    """Site → float32 states (N, d). Stored ones are read from disk when asked for, and not kept.

    Args:
        sites: the sites, in order.
        start: first row shown.
        stop: row after the last one shown.
        read: gives rows a … b − 1 of a site.
    """

    def __init__(
        self,
        sites: Sequence[str],
        start: int,
        stop: int,
        read: Callable[[str, int, int], Tensor],
    ) -> None:
        self._sites = tuple(sites)
        self._start, self._stop = start, stop
        self._read = read

    @classmethod
    def hold(cls, tensors: Mapping[str, Float[Tensor, "n d"]]) -> States:
        """States that are in memory."""
        rows = len(next(iter(tensors.values())))
        return cls(tuple(tensors), 0, rows, lambda site, a, b: tensors[site][a:b])

    @classmethod
    def open(cls, path: Path) -> States:
        """States of a safetensors file.

        Raises:
            StoreError: the file is missing or malformed.
        """

        def read(site: str, start: int, stop: int) -> Tensor:
            if _stamp(path) != stamp:
                raise StoreError(f"{path}: was replaced since it was opened; open it again")
            with safe_open(path, framework="pt") as file:
                rows: Tensor = file.get_slice(site)[start:stop]
                return rows

        stamp = _stamp(path)
        try:
            with safe_open(path, framework="pt") as file:
                sites = sorted(file.keys(), key=site_order)
                rows = file.get_slice(sites[0]).get_shape()[0]
        except FileNotFoundError:
            raise StoreError(f"{path}: no such file; run the stage that writes it") from None
        except SafetensorError as error:
            raise StoreError(f"{path}: not a safetensors file ({error})") from None
        return cls(sites, 0, rows, read)

    def rows(self, site: str, start: int, stop: int) -> Float[Tensor, "n d"]:
        """Rows start … stop − 1 of a site."""
        if site not in self._sites:
            raise KeyError(site)
        first = self._start + start
        return self._read(site, first, max(first, min(self._start + stop, self._stop)))

    def window(self, start: int, stop: int) -> States:
        """The same states, but only these rows."""
        return States(self._sites, self._start + start, self._start + stop, self._read)

    @property
    def n(self) -> int:
        """Rows of every site."""
        return self._stop - self._start

    def __getitem__(self, site: str) -> Float[Tensor, "n d"]:
        return self.rows(site, 0, self.n)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells one file from another that took its name; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


class MemorySink:
    """Keeps states in memory."""

    def __init__(self, sites: Sequence[str], rows: int, width: int) -> None:
        self.done: set[int] = set()
        self.tensors = {site: torch.empty(rows, width) for site in sites}

    def put(self, batch: int, spans: Sequence[range], states: Mapping[str, Tensor]) -> None:
        """Keep the states of one batch: for each of its prompts a span of rows, end to end."""
        rows = torch.tensor([row for span in spans for row in span])
        for site, tensor in self.tensors.items():
            tensor[rows] = states[site]
        self.done.add(batch)


class FileSink:
    """Writes states into a safetensors file of known size; a kill loses at most one batch.

    The file is laid out in full under the name ``X.partial`` and filled row by row. Behind each
    batch, once its rows are on the disk, its number goes into ``X.journal``. :meth:`finish` gives
    the file its name. The plan stands in the file's metadata: work of another plan is redone.

    Several processes fill one file, each with a journal of its own (``X.journal.1``, …): the first
    one lays it out and names it, and goes on from all journals, however many wrote them.

    Args:
        path: the final name.
        sites: keys, in order.
        rows: N.
        width: d.
        metadata: what the file says of itself; ``plan`` in it names the work exactly.
        resume: whether work of the same plan may be continued.
        ranks: the processes that fill the file together.

    Raises:
        StoreError: the disk is full or can't be written.
    """

    def __init__(
        self,
        path: Path,
        sites: Sequence[str],
        rows: int,
        width: int,
        metadata: Mapping[str, Json],
        *,
        resume: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._journal = path.with_name(path.name + ".journal")
        self._ranks = ranks
        self._bytes = width * 4
        self.complete = False
        self.done: set[int] = set()
        header, self._start = _lay_out(sites, rows, width, metadata)
        if ranks.main:
            self.complete = resume and _plan_of(path) == metadata["plan"]
            if self.complete:
                self._drop_journals()  # a kill may have left them behind
            else:
                size = len(header) + len(sites) * rows * self._bytes
                self._begin(header, size, resume)
        self.complete, done = ranks.broadcast((self.complete, sorted(self.done)))
        if self.complete:
            return
        self.done = set(done)
        own = self._journal if ranks.main else Path(f"{self._journal}.{ranks.rank}")
        try:
            self._file = self._partial.open("r+b")
            self._lines = own.open("a", encoding="ascii")
        except OSError as error:
            raise _unwritable(self._partial, error) from None

    def _begin(self, header: bytes, size: int, resume: bool) -> None:
        """Lay the file out, or find what of it is done and note it in one journal."""
        if resume and self._begins_with(header):
            self.done = self._read_journals()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            if not self.done:
                self._drop_journals()
                with self._partial.open("wb") as file:
                    file.write(header)
                    _reserve(file.fileno(), size)
            with atomic_path(self._journal) as temporary:
                temporary.write_text("".join(f"{batch}\n" for batch in sorted(self.done)))
            self._drop_journals(of_others=True)
        except OSError as error:
            raise _unwritable(self._partial, error) from None

    def put(self, batch: int, spans: Sequence[range], states: Mapping[str, Tensor]) -> None:
        """Write the states of one batch: for each of its prompts a span of rows, end to end."""
        try:
            for site, tensor in states.items():
                block = memoryview(tensor.contiguous().numpy().tobytes())
                taken = 0
                for span in spans:
                    length = len(span) * self._bytes
                    at = self._start[site] + span.start * self._bytes
                    _write_all(self._file.fileno(), block[taken : taken + length], at)
                    taken += length
            os.fsync(self._file.fileno())
            self._lines.write(f"{batch}\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise _unwritable(self._partial, error) from None
        self.done.add(batch)

    def finish(self) -> None:
        """Give the complete file its name."""
        if self.complete:
            return
        self._close()
        self._ranks.barrier()  # all rows are in the file
        if self._ranks.main:
            self._partial.replace(self._path)
            self._drop_journals()
        self._ranks.barrier()  # it has its name
        self.complete = True

    def __enter__(self) -> FileSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.complete:
            self._close()

    def _close(self) -> None:
        self._file.close()
        self._lines.close()

    def _begins_with(self, header: bytes) -> bool:
        try:
            with self._partial.open("rb") as file:
                return file.read(len(header)) == header
        except FileNotFoundError:
            return False

    def _journals(self) -> list[Path]:
        others = self._journal.parent.glob(f"{self._journal.name}.[0-9]*")
        return [self._journal, *(path for path in others if path.suffix[1:].isdigit())]

    def _read_journals(self) -> set[int]:
        """Numbers of finished batches; a last line that the kill cut off does not count."""
        found: set[int] = set()
        for path in self._journals():
            with suppress(FileNotFoundError):
                lines = path.read_text(encoding="ascii").splitlines(keepends=True)
                found |= {int(line) for line in lines if line.endswith("\n")}
        return found

    def _drop_journals(self, *, of_others: bool = False) -> None:
        for path in self._journals()[of_others:]:
            path.unlink(missing_ok=True)


def _plan_of(path: Path) -> Json:
    """The plan of a file; None where there is none that can be read."""
    try:
        return read_metadata(path).get("plan")
    except StoreError:
        return None


def _lay_out(
    sites: Sequence[str], rows: int, width: int, metadata: Mapping[str, Json]
) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, and the offset in the file at which each site begins."""
    size = rows * width * 4
    entries: dict[str, Json] = {
        "__metadata__": {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    }
    for number, site in enumerate(sites):
        offsets = [number * size, (number + 1) * size]
        entries[site] = {"dtype": "F32", "shape": [rows, width], "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {site: len(header) + number * size for number, site in enumerate(sites)}


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk shows before the work and not after it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, block: memoryview, offset: int) -> None:
    while block:
        written = os.pwrite(descriptor, block, offset)
        block, offset = block[written:], offset + written


def _unwritable(path: Path, error: OSError) -> StoreError:
    reason = error.strerror or type(error).__name__
    return StoreError(f"{path}: can't be written ({reason}); free space, or choose another folder")
