"""States on disk: a safetensors file that is filled row by row and survives a kill."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from dsteer.activations.storage import FileSink, MemorySink, States
from dsteer.errors import StoreError
from dsteer.store import read_metadata

SITES = ("resid_post.0", "resid_post.1", "final_norm")
META = {"plan": "p1", "position": "prompt_last"}
BATCHES = {0: [3, 1], 1: [0, 4], 2: [2]}  # batch → prompts


def states_of(batch: int) -> dict[str, torch.Tensor]:
    return {
        site: torch.stack([torch.full((4,), 100.0 * k + row) for row in BATCHES[batch]])
        for k, site in enumerate(SITES)
    }


def spans_of(batch: int) -> list[range]:
    return [range(row, row + 1) for row in BATCHES[batch]]


def sink(path, metadata=META, **options) -> FileSink:
    return FileSink(path, SITES, 5, 4, metadata, **options)


def write_all(path) -> bytes:
    with sink(path) as file:
        for batch in BATCHES:
            file.put(batch, spans_of(batch), states_of(batch))
        file.finish()
    return path.read_bytes()


def test_file_is_safetensors_in_prompt_order(tmp_path) -> None:
    path = tmp_path / "base.safetensors"
    write_all(path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    tensors = load_file(path)
    for k, site in enumerate(SITES):
        expected = 100.0 * k + torch.arange(5.0)[:, None].expand(5, 4)
        assert torch.equal(tensors[site], expected)
    assert read_metadata(path) == META


def test_memory_and_disk_agree(tmp_path) -> None:
    memory = MemorySink(SITES, 5, 4)
    for batch in BATCHES:
        memory.put(batch, spans_of(batch), states_of(batch))
    write_all(tmp_path / "a.safetensors")
    stored, held = States.open(tmp_path / "a.safetensors"), States.hold(memory.tensors)
    assert tuple(stored) == tuple(held) == SITES
    assert all(torch.equal(stored[site], held[site]) for site in SITES)
    assert stored.n == held.n == 5


def test_states_slice_and_window(tmp_path) -> None:
    write_all(tmp_path / "a.safetensors")
    states = States.open(tmp_path / "a.safetensors")
    part = states.window(1, 4)
    assert part["final_norm"][:, 0].tolist() == [201, 202, 203]
    assert part.rows("final_norm", 1, 9)[:, 0].tolist() == [202, 203]
    assert part.window(1, 2)["resid_post.0"].tolist() == [[2.0] * 4]
    assert len(part.rows("final_norm", 7, 9)) == 0
    with pytest.raises(KeyError):
        states["resid_post.7"]


def test_kill_between_batches_resumes_with_the_same_bytes(tmp_path) -> None:
    expected = write_all(tmp_path / "whole.safetensors")
    path = tmp_path / "cut.safetensors"
    with sink(path) as file:
        file.put(0, spans_of(0), states_of(0))
    assert not path.exists()
    with (tmp_path / "cut.safetensors.journal").open("a") as journal:
        journal.write("2")  # a line that the kill cut off: batch 2 (or 23) is not done
    with sink(path) as file:
        assert file.done == {0}
    with sink(path) as file:
        assert file.done == {0}
        for batch in (1, 2):
            file.put(batch, spans_of(batch), states_of(batch))
        file.finish()
    assert path.read_bytes() == expected
    with sink(path) as file:
        assert file.complete
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name, "whole.safetensors"]


@pytest.mark.parametrize("finished", [True, False])
def test_work_of_another_plan_is_not_reused(tmp_path, finished) -> None:
    path = tmp_path / "a.safetensors"
    with sink(path) as file:
        for batch in BATCHES:
            file.put(batch, spans_of(batch), states_of(batch))
        if finished:
            file.finish()
    with sink(path, {**META, "plan": "p2"}) as file:
        assert not file.complete
        assert file.done == set()


def test_resume_can_be_forbidden(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    write_all(path)
    with sink(path, resume=False) as file:
        assert not file.complete
        assert file.done == set()


def test_full_disk_is_one_clear_line(tmp_path, monkeypatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(
        StoreError, match=r"can't be written \(No space left on device\); free space"
    ):
        sink(tmp_path / "a.safetensors")


def test_disk_that_fills_up_in_the_middle(tmp_path, monkeypatch) -> None:
    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with sink(tmp_path / "a.safetensors") as file:
        file.put(0, spans_of(0), states_of(0))
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match="No space left"):
            file.put(1, spans_of(1), states_of(1))
    with sink(tmp_path / "a.safetensors") as file:
        assert file.done == {0}


def test_missing_and_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        States.open(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(StoreError, match="not a safetensors file"):
        States.open(tmp_path / "bad.safetensors")
