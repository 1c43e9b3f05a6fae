"""Only checkpoints that are known to be whole are resumed from."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from dsteer.training.checkpoints import latest_checkpoint, mark_complete, own_random_state


def checkpoint(root: Path, step: int, *, whole: bool = True) -> Path:
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if whole:
        mark_complete(folder)
    return folder


def test_a_partial_checkpoint_is_deleted_and_the_one_before_it_used(tmp_path) -> None:
    whole = checkpoint(tmp_path, 90)
    checkpoint(tmp_path, 100, whole=False)
    assert latest_checkpoint(tmp_path) == whole
    assert list(tmp_path.iterdir()) == [whole]


def test_marking_deletes_the_older_ones(tmp_path) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    assert list(tmp_path.iterdir()) == [newest]
    assert latest_checkpoint(tmp_path) == newest


def test_no_checkpoint(tmp_path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    checkpoint(tmp_path, 5, whole=False)
    assert latest_checkpoint(tmp_path) is None


def test_random_states_are_seeded_inside_and_put_back() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    with own_random_state(5):
        first = draws()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with own_random_state(5):
        assert draws() == first
    with own_random_state(6):
        assert draws() != first
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
