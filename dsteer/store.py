"""Artifacts on disk: atomic JSON and safetensors, content hashes, and the run folder.

A run folder holds one folder a stage. While a stage works, its folder has ``partial.json`` with
the fingerprint of the work; when it is complete, ``stage.json`` with the fingerprint and the hash
of each output replaces it. Work under another fingerprint is thrown away before a stage starts
again, so nothing stale is ever reused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsteer.errors import StoreError

Json = Any
"""Whatever JSON can hold."""

State = Literal["complete", "partial", "stale", "absent"]


# ---------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it takes the place of ``path`` when the block succeeds."""
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def to_json(value: Json) -> str:
    """Readable JSON, keys in the order given.

    Numbers that JSON lacks (NaN, infinities) become null: a quantity that is undefined is absent.
    """
    return json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n"


def _plain(value: Json) -> Json:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, value: Json) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def read_json(path: Path) -> Json:
    """Read JSON.

    Raises:
        StoreError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; run the stage that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"{path}: not JSON ({error}); delete it and run again") from None


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Json] | None = None
) -> None:
    """Write named arrays as safetensors, atomically; metadata values are JSON-encoded.

    The same arrays and metadata give the same bytes.
    """
    packed = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    text = {key: json.dumps(_plain(item)) for key, item in (metadata or {}).items()}
    with atomic_path(path) as temporary:
        save_file(packed, temporary, metadata=text or None)
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order, in place: the library writes it in any order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(text) <= size
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file.

    Raises:
        StoreError: the file is missing or malformed.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; run the stage that writes it") from None
    except SafetensorError as error:
        raise StoreError(f"{path}: not a safetensors file ({error})") from None


def read_metadata(path: Path) -> dict[str, Json]:
    """Read the metadata that :func:`write_tensors` wrote."""
    try:
        with safe_open(path, framework="np") as file:
            raw = file.metadata() or {}
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise StoreError(f"{path}: not a safetensors file ({error})") from None
    decoded: dict[str, Json] = {}
    for key, text in raw.items():
        try:
            decoded[key] = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            decoded[key] = text  # written by another program
    return decoded


# ---------------------------------------------------------------------------------- hashes


def hash_json(value: Json) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder.

    A process reads a file's content once, unless its size or its time of change is another.
    """
    files = sorted(item for item in path.rglob("*") if item.is_file())
    hashes = {}
    for item in files:
        status = item.stat()
        hashes[str(item.relative_to(path))] = _hash_as_it_is(
            item.resolve(), status.st_size, status.st_mtime_ns, status.st_ino
        )
    return hash_json(hashes)


@functools.lru_cache(maxsize=65_536)
def _hash_as_it_is(path: Path, _size: int, _changed: int, _inode: int) -> str:
    return hash_file(path)


def identify(path: str, *, revision: str | None = None, kind: str = "model") -> str | None:
    """Say exactly what a path or hub id stands for now.

    Returns:
        ``sha256:…`` of a local file or folder, ``hub:id@commit`` of a hub id whose commit is known
        (online, or from the local cache), None where it can't be known.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return f"sha256:{hash_folder(local)}"
    if local.is_file():
        return f"sha256:{hash_file(local)}"
    if not looks_like_hub_id(path):
        return None
    commit = _hub_commit(path, revision or "main", kind)
    return f"hub:{path}@{commit}" if commit else None


def looks_like_hub_id(path: str) -> bool:
    """Whether a string could be ``owner/name`` or ``name`` on the hub rather than a local path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not path.startswith((".", "/", "~"))


def _hub_commit(repo: str, revision: str, kind: str) -> str | None:
    from huggingface_hub import HfApi, constants

    # Offline, unreachable, gated, no such repository: each HTTP client has its own exceptions for
    # these, and here they all mean the same: ask the cache.
    with contextlib.suppress(Exception):
        info = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=10)
        if info.sha:
            return str(info.sha)
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    reference = folder / "refs" / revision
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    return revision if (folder / "snapshots" / revision).is_dir() else None


# ---------------------------------------------------------------------------------- run folder


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder in a run."""

    path: Path

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def _done(self) -> Path:
        return self.path / "stage.json"

    @property
    def _partial(self) -> Path:
        return self.path / "partial.json"

    def record(self) -> dict[str, Json] | None:
        """What ``stage.json`` says of the completed stage; None if it is not complete."""
        if not self._done.is_file():
            return None
        try:
            record = read_json(self._done)
        except StoreError:
            return None
        return record if isinstance(record, dict) else None

    def state(self, fingerprint: str) -> State:
        """How this folder stands to the work that a fingerprint names."""
        record = self.record()
        if record is not None:
            if record.get("fingerprint") != fingerprint:
                return "stale"
            missing = any(not (self.path / name).is_file() for name in record.get("outputs", {}))
            return "stale" if missing else "complete"
        if self._partial.is_file():
            with contextlib.suppress(StoreError):
                if read_json(self._partial).get("fingerprint") == fingerprint:
                    return "partial"
            return "stale"
        return "stale" if self.path.is_dir() and any(self.path.iterdir()) else "absent"

    def begin(self, fingerprint: str, *, why: str = "cut off before it was complete") -> None:
        """Make the folder ready: keep partial work of this fingerprint, clear all else.

        ``why`` tells a person why there is partial work, should the stage not get further.
        """
        if self.state(fingerprint) != "partial":
            self.clear()
        for leftover in self.path.rglob("*.tmp"):  # of a writer that was killed
            leftover.unlink()
        write_json(self._partial, {"fingerprint": fingerprint, "why": why})

    def why_partial(self) -> str:
        """Why there is partial work."""
        return str(read_json(self._partial).get("why", ""))

    def clear(self) -> None:
        """Remove the folder. The completion mark goes first, so a kill leaves no false claim."""
        self._done.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)
        if self.path.is_dir():
            shutil.rmtree(self.path)

    def invalidate(self) -> None:
        """Take the completion mark away: an input is about to be written again."""
        self._done.unlink(missing_ok=True)

    def finish(self, fingerprint: str, result: Json, record: Mapping[str, Json]) -> None:
        """Write the result and the completion mark, in this order; then drop ``checkpoints/``."""
        write_json(self.result_path, result)
        outputs = {
            str(item.relative_to(self.path)): hash_file(item)
            for item in sorted(self.path.rglob("*"))
            if item.is_file() and _is_output(item.relative_to(self.path))
        }
        write_json(self._done, {**record, "fingerprint": fingerprint, "outputs": outputs})
        self._partial.unlink(missing_ok=True)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def _is_output(relative: Path) -> bool:
    """Figures can be redrawn, checkpoints are scaffolding, seconds are of one machine and moment:
    none is part of the result."""
    scaffolding = {"figures", "checkpoints"}
    return not (scaffolding & set(relative.parts)) and relative.name not in {
        "stage.json",
        "partial.json",
        "timing.json",
    }


@dataclass(frozen=True)
class Run:
    """A run folder: ``results/<run>/``."""

    path: Path

    def stage(self, name: str) -> StageFolder:
        """The folder of one stage."""
        return StageFolder(self.path / name)

    def manifest(self) -> dict[str, Json] | None:
        """The manifest, or None where none was written yet."""
        path = self.path / "manifest.json"
        return dict(read_json(path)) if path.is_file() else None

    def check(self, name: str) -> None:
        """See that this folder is free, or holds the run of this pipeline already.

        Raises:
            StoreError: the folder belongs to another pipeline, or holds files that are no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path}: a file, not a folder; choose another --out")
        if not self.path.is_dir():
            return
        manifest = self.manifest()
        if manifest is not None and manifest.get("name") != name:
            raise StoreError(
                f"{self.path} holds the run {manifest.get('name')!r}, not {name!r}; "
                "choose another --out"
            )
        strangers = sorted(
            item.name
            for item in self.path.iterdir()
            if item.name != ".lock" and item.suffix != ".tmp"  # of a claim that was killed
        )
        if manifest is None and strangers:
            raise StoreError(
                f"{self.path} is not empty and holds no run (found {strangers[0]!r}); "
                "choose another --out"
            )

    def claim(self, name: str, yaml_text: str) -> None:
        """Make this folder the run of a pipeline and put the YAML into it.

        Raises:
            StoreError: as :meth:`check`.
        """
        self.check(name)
        if self.manifest() is None:
            write_json(self.path / "manifest.json", {"name": name})
        with atomic_path(self.path / "pipeline.yaml") as temporary:
            temporary.write_text(yaml_text, encoding="utf-8")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the system frees it if the process dies.

        Raises:
            StoreError: another process works on this folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise StoreError(
                f"{self.path}: another dsteer is working on this run; wait for it, or choose "
                "another --out"
            ) from None
        try:
            yield
        finally:
            lock.release()
