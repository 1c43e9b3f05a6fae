"""Checkpoints that a kill can't spoil.

A trainer writes a checkpoint file by file, so a folder alone proves nothing. A marker is written
into it after the last file is on disk; only a marked folder is ever resumed from, and all else is
deleted.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dsteer.store import write_json

_MARKER = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Vouch for a checkpoint whose files are all written, and delete every other one beside it."""
    for item in checkpoint.rglob("*"):
        if item.is_file():
            with item.open("rb") as file:
                os.fsync(file.fileno())
    write_json(checkpoint / _MARKER, {"step": _step(checkpoint)})
    _keep_only(checkpoint.parent, checkpoint)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete ``checkpoint-<step>`` below a folder; all others are deleted."""
    marked = [item for item in root.glob("checkpoint-*") if (item / _MARKER).is_file()]
    newest = max(marked, key=_step, default=None)
    _keep_only(root, newest)
    return newest


def _keep_only(root: Path, kept: Path | None) -> None:
    for item in root.glob("checkpoint-*"):
        if item != kept:
            shutil.rmtree(item)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch inside the block, and put their states back afterwards."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
