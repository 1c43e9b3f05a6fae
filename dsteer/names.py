"""What a model's name stands for: a hub id or a path, a revision, a GGUF file.

- ``owner/name`` or a folder;
- ``owner/name@revision``;
- ``path/to/model.gguf``, ``owner/name:file.gguf`` or ``owner/name/file.gguf``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

_REVISION = re.compile(r"([\w.-]+(?:/[\w.-]+)?(?:[:/][\w./-]+\.gguf)?)@(.+)", re.ASCII)
_GGUF = re.compile(r"([\w.-]+/[\w.-]+)[:/]([\w./-]+\.gguf)", re.ASCII)


def is_local(name: str) -> bool:
    """Whether a name is a path: it exists, or it is written as only a path can be."""
    return name.startswith((".", "/", "~")) or Path(name).expanduser().exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """``id@revision`` as id and revision; a path, and an id alone, have no revision."""
    found = None if is_local(name) else _REVISION.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def split_gguf(name: str) -> tuple[str, str | None]:
    """The folder or hub id that holds a GGUF file, and the file; None where a name is no such."""
    if name.endswith(".gguf"):
        if is_local(name):
            path = Path(name).expanduser()
            return str(path.parent), path.name
        found = _GGUF.fullmatch(name)
        if found:
            return found[1], found[2]
    return name, None


def labels(models: Sequence[str]) -> list[str]:
    """A short name for each model, all different: the last telling part of its id or path."""
    parts = [telling_parts(model) for model in models]
    found = [part[-1] for part in parts]
    depth = 1
    while len(set(found)) < len(found) and depth < max(map(len, parts)):
        depth += 1
        repeated = Counter(found)
        found = [
            "-".join(part[-depth:]) if repeated[name] > 1 else name
            for part, name in zip(parts, found, strict=True)
        ]
    taken: set[str] = set()
    for index, name in enumerate(found):
        copy, unused = 1, name
        while unused.casefold() in taken:  # one model twice: two variants all the same
            copy += 1
            unused = f"{name}-{copy}"
        taken.add(unused.casefold())
        found[index] = unused
    return found


def telling_parts(model: str) -> list[str]:
    """The parts of an id or path that can tell a model, as names of folders may be."""
    parts = [
        part for part in PurePath(model.replace(":", "/")).parts if part not in {"/", ".", ".."}
    ]
    if len(parts) > 1 and parts[-1] == "model":  # a run's models lie in …/dpo/model
        parts.pop()
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") for part in parts]
    return [name for name in names if name] or ["model"]
