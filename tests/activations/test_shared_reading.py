"""Several processes read into one file: the same bytes as one, killed or not.

The processes are threads, each with a model of its own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import planted_pair
from torch.distributed import HashStore

from dsteer.activations import accumulate as accumulate_module
from dsteer.activations import reading as reading_module
from dsteer.activations.accumulate import Accumulated, accumulate_splits
from dsteer.activations.reading import Reading
from dsteer.activations.storage import FileSink
from dsteer.data.tokens import encode
from dsteer.errors import MeasurementError, ModelError
from dsteer.models.pair import ModelPair
from dsteer.parallel import Ranks
from dsteer.progress import SILENT

PLANTED = planted_pair(1)
TEXTS = [f"\n\nHuman: {'why ' * (n % 7)}{n}?\n\nAssistant:" for n in range(40)]


class Killed(BaseException):
    pass


def together(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    store, found = HashStore(), [None] * world

    def one(rank: int) -> None:
        ranks = Ranks(rank, world, store)
        try:
            with ranks.one_fate():
                found[rank] = work(ranks)
        except (Exception, Killed) as error:  # noqa: BLE001
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a process waits for ever"
    return found


def reading() -> Reading:
    return Reading.of(PLANTED.pair, encode(PLANTED.tokenizer, TEXTS), batch_tokens=100)


def read(path: Path, world: int, models: list[Any] | None = None) -> list[Any]:
    models = models or [copy.deepcopy(PLANTED.tuned) for _ in range(world)]
    return together(
        world, lambda ranks: reading().run(models[ranks.rank], "tuned", path, SILENT, ranks)
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("alone") / "tuned.safetensors"
    reading().run(PLANTED.tuned, "tuned", path)
    return path.read_bytes()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(process, batch) of everything that is read."""
    done: list[tuple[int, int]] = []
    put = FileSink.put

    def noting(self: FileSink, batch: int, *rest: Any) -> None:
        put(self, batch, *rest)
        done.append((self._ranks.rank, batch))

    monkeypatch.setattr(FileSink, "put", noting)
    return done


@pytest.mark.parametrize("world", [2, 3])
def test_the_file_is_the_same_to_the_byte(tmp_path, alone, batches, world) -> None:
    path = tmp_path / "tuned.safetensors"
    found = read(path, world)
    assert path.read_bytes() == alone
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert all(torch.equal(found[0][site], states[site]) for states in found for site in states)
    numbers = sorted(batch for _, batch in batches)
    assert numbers == list(range(len(numbers))), "each batch is read once"
    shares = [sum(rank == one for one, _ in batches) for rank in range(world)]
    assert max(shares) - min(shares) <= 1
    assert min(shares) > 3
    # what is complete is not read again, whoever asks
    read(path, 2)
    assert len(batches) == len(numbers)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (3, 2), (1, 3), (2, 2)])
def test_killed_processes_leave_work_to_any_number_of_others(
    tmp_path, alone, batches, monkeypatch, first, then
) -> None:
    path = tmp_path / "tuned.safetensors"
    put = FileSink.put

    def dying(self: FileSink, batch: int, *rest: Any) -> None:
        if sum(rank == self._ranks.rank for rank, _ in batches) == 2 + self._ranks.rank:
            raise Killed
        put(self, batch, *rest)

    monkeypatch.setattr(FileSink, "put", dying)
    # nobody hears of a kill -9
    monkeypatch.setattr(Ranks, "fail", lambda *_: None)
    monkeypatch.setattr(reading_module, "workers_for", lambda *_: 1)
    assert {type(error) for error in read(path, first)} == {Killed}
    assert not path.exists()
    before = list(batches)
    assert len(before) == sum(2 + rank for rank in range(first))
    monkeypatch.undo()
    journals = sorted(item.name for item in tmp_path.glob("*.journal*"))
    assert len(journals) == first

    again: list[int] = []

    def noting(self: FileSink, batch: int, *rest: Any) -> None:
        put(self, batch, *rest)
        again.append(batch)

    monkeypatch.setattr(FileSink, "put", noting)
    read(path, then)
    assert path.read_bytes() == alone
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert not {batch for _, batch in before} & set(again), "what is done is not done again"


def test_journals_of_other_work_are_not_believed(tmp_path, alone) -> None:
    path = tmp_path / "tuned.safetensors"
    for name in ("tuned.safetensors.journal", "tuned.safetensors.journal.1"):
        (tmp_path / name).write_text("0\n1\n2\n3\n")
    (tmp_path / "tuned.safetensors.partial").write_bytes(b"another plan")
    read(path, 2)
    assert path.read_bytes() == alone
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_processes_with_different_models_are_refused(tmp_path) -> None:
    models = [PLANTED.tuned, PLANTED.base]
    for error in read(tmp_path / "tuned.safetensors", 2, models):
        assert isinstance(error, ModelError)
        assert "process 1 has another tuned model or other token ids" in str(error)
    assert list(tmp_path.iterdir()) == [], "nothing is half-written"


def test_states_that_one_process_finds_broken_stop_all(tmp_path, monkeypatch) -> None:
    check = reading_module._require_finite
    broken = [copy.deepcopy(PLANTED.tuned) for _ in range(2)]
    read_by = threading.local()
    run = Reading.run

    def noting(self: Reading, model: Any, which: Any, *rest: Any) -> Any:
        read_by.second = model is broken[1]
        return run(self, model, which, *rest)

    def one_sided(states: Any, which: Any, dtype: Any) -> None:
        if getattr(read_by, "second", False):
            states = {site: tensor * float("nan") for site, tensor in states.items()}
        check(states, which, dtype)

    monkeypatch.setattr(Reading, "run", noting)
    monkeypatch.setattr(reading_module, "_require_finite", one_sided)
    monkeypatch.setattr(reading_module, "workers_for", lambda *_: 1)
    first, second = read(tmp_path / "tuned.safetensors", 2, broken)
    assert isinstance(first, MeasurementError)
    assert isinstance(second, MeasurementError)
    assert str(first) == f"{second} (process 1)"
    assert not (tmp_path / "tuned.safetensors").exists()


# ---------------------------------------------------------------------------------- moments

SPLITS = {"fit": TEXTS[:28], "test": TEXTS[28:]}


def accumulated(folder: Path, world: int) -> list[Any]:
    pairs = [
        ModelPair.load(
            copy.deepcopy(PLANTED.base), copy.deepcopy(PLANTED.tuned), tokenizer=PLANTED.tokenizer
        )
        for _ in range(world)
    ]

    def work(ranks: Ranks) -> Accumulated:
        return accumulate_splits(
            pairs[ranks.rank], SPLITS, spectra=("fit",), nulls=SPLITS, keep=3, batch_tokens=100,
            folder=folder, rows=3, ranks=ranks,
        )  # fmt: skip

    return together(world, work)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def require_equal(found: Accumulated, expected: Accumulated) -> None:
    for split in SPLITS:
        for site, moments in expected.moments[split].items():
            other = found.moments[split][site]
            assert other.n == moments.n == len(SPLITS[split])
            # float64 sums of some 30 rows in another order; states are of size 1 to 10
            assert torch.allclose(other.sums.mean, moments.sums.mean, rtol=0, atol=1e-12)
            assert moments.sums.signed
            for name, total in moments.sums.tensors().items():
                assert abs(other.sums.tensors()[name] - total).max() <= 1e-12 * len(TEXTS), name
            for name, matrix in moments.matrices.items():
                difference = other.matrices[name].second_moment - matrix.second_moment
                assert abs(difference).max() <= 1e-12 * abs(matrix.second_moment).max()
    assert found.ids_sha256 == expected.ids_sha256
    assert found.kept is not None
    assert found.kept.base.n == 6


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Accumulated, Path]:
    folder = tmp_path_factory.mktemp("summed")
    return accumulated(folder, 1)[0], folder


@pytest.mark.parametrize("world", [2, 3])
def test_moments_are_those_of_one_process(tmp_path, summed, world) -> None:
    expected, folder = summed
    for found in accumulated(tmp_path, world):
        require_equal(found, expected)
    ours, theirs = files(tmp_path), files(folder)
    assert ours.keys() == theirs.keys()
    # kept states are the same bytes; moments may differ by the order of sums
    assert {name for name in ours if ours[name] != theirs[name]} <= {"moments.safetensors"}


@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 1), (3, 2), (1, 3)])
def test_killed_sums_are_gone_on_from(tmp_path, summed, monkeypatch, first, then) -> None:
    undisturbed = tmp_path / "undisturbed"
    accumulated(undisturbed, then)
    folder, work = tmp_path / "killed", accumulate_module._Work
    read, parts = work._read, []

    def dying(self: Any, pair: Any, number: int, *rest: Any) -> None:
        if sum(rank == self.ranks.rank for rank, _ in parts) == 1 + self.ranks.rank:
            raise Killed
        read(self, pair, number, *rest)
        parts.append((self.ranks.rank, number))

    monkeypatch.setattr(work, "_read", dying)
    monkeypatch.setattr(Ranks, "fail", lambda *_: None)  # nobody hears of a kill -9
    assert {type(error) for error in accumulated(folder, first)} == {Killed}
    monkeypatch.undo()

    again: list[int] = []

    def noting(self: Any, pair: Any, number: int, *rest: Any) -> None:
        read(self, pair, number, *rest)
        again.append(number)

    monkeypatch.setattr(work, "_read", noting)
    found = accumulated(folder, then)
    require_equal(found[0], summed[0])
    assert not {number for _, number in parts} & set(again), "what is done is not done again"
    assert files(folder).keys() == files(undisturbed).keys()
    if first == then:
        assert files(folder) == files(undisturbed)
    # killed after the merge, before the other files were removed
    (folder / "moments.safetensors.1").write_bytes((folder / "moments.safetensors").read_bytes())
    before = files(folder)
    accumulated(folder, then)
    assert before.pop("moments.safetensors.1")
    assert files(folder) == before
