"""Several processes: meeting, failing together, sharing a batch, and the pipeline's two roles.

The processes are threads here, which meet in one of torch.distributed's own stores; real ones are
in test_processes.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from dsteer import parallel, pipeline
from dsteer.config import read_pipeline
from dsteer.errors import ConfigError, DataError, MissingExtraError, StoreError
from dsteer.parallel import ALONE, Ranks, join, place, share_batch, started_alone
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.stages import StageContext
from dsteer.store import Json, Run, read_json


def together(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Do the work as each of several processes; returns what each returned or raised."""
    store, found = HashStore(), [None] * world

    def one(rank: int) -> None:
        try:
            found[rank] = work(Ranks(rank, world, store))
        except Exception as error:  # noqa: BLE001
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a process waits for ever"
    return found


# ---------------------------------------------------------------------------------- meeting


def test_one_process_needs_nobody() -> None:
    assert ALONE.main
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.exchange("x") == ["x"]
    assert ALONE.broadcast("x") == "x"
    ALONE.barrier()
    ALONE.check()
    ALONE.connect()
    ALONE.leave()
    assert not torch.distributed.is_initialized()
    assert ALONE.may_speak(DataError("x"))


@pytest.mark.parametrize("world", [2, 3])
def test_they_tell_one_another(world: int) -> None:
    store = HashStore()

    def work(ranks: Ranks) -> Any:
        told = [ranks.exchange({"of": ranks.rank, "turn": turn}) for turn in range(20)]
        return told, ranks.broadcast(ranks.rank + 7), ranks.share(range(10))

    found = together(world, work)
    for told, seven, _ in found:
        assert told == [[{"of": r, "turn": turn} for r in range(world)] for turn in range(20)]
        assert seven == 7
    assert sorted(item for *_, share in found for item in share) == list(range(10))
    assert {len(share) for *_, share in found} <= {10 // world, 10 // world + 1}
    # what was said and read is forgotten, however often they meet
    ranks = [Ranks(rank, 2, store) for rank in range(2)]
    for _ in range(50):
        both = [threading.Thread(target=one.barrier) for one in ranks]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert store.num_keys() <= 4


# ---------------------------------------------------------------------------------- failing


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (DataError("row 3 is empty"), DataError, "row 3 is empty (process {})"),
        (ZeroDivisionError("x"), RuntimeError, "ZeroDivisionError: x (process {})"),
        (MissingExtraError("mlx", "this"), ConfigError, "this needs an extra: .* (process {})"),
    ],
)
def test_who_waits_fails_with_the_others(culprit, raised, kind, message) -> None:
    def work(ranks: Ranks) -> None:
        with ranks.one_fate():
            if ranks.rank == culprit:
                raise raised
            ranks.barrier()

    found = together(3, work)
    assert found[culprit] is raised
    expected = message.format(culprit).replace("(", r"\(").replace(")", r"\)")
    for rank in {0, 1, 2} - {culprit}:
        assert type(found[rank]) is kind
        with pytest.raises(kind, match=f"^{expected}$"):
            raise found[rank]


def test_what_breaks_because_another_has_gone_is_not_the_cause() -> None:
    gone = threading.Event()

    def work(ranks: Ranks) -> None:
        with ranks.one_fate():
            if ranks.rank == 1:
                try:
                    with ranks.one_fate():
                        raise DataError("row 3 is empty")
                finally:
                    gone.set()
            gone.wait(60)
            raise RuntimeError("Connection closed by peer")

    first, second = together(2, work)
    assert isinstance(second, DataError)
    assert isinstance(first, DataError)
    assert str(first) == "row 3 is empty (process 1)"


def test_one_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(ranks: Ranks) -> bool:
        spoke = ranks.may_speak(ConfigError("x"))
        ranks.leave()
        return spoke

    assert together(3, mistake) == [True, False, False]
    # the first one is busy: whoever fails says so itself
    monkeypatch.setattr(parallel, "GRACE", 0.3)
    assert together(2, lambda ranks: None if ranks.main else mistake(ranks)) == [None, True]


# ---------------------------------------------------------------------------------- launching


@pytest.mark.parametrize(
    ("batch", "accumulation", "world", "expected"),
    [(16, 1, 1, (16, 1)), (16, 2, 4, (4, 2)), (1, 16, 4, (1, 4)), (2, 8, 4, (2, 2))],
)
def test_together_they_make_the_batch_of_one(batch, accumulation, world, expected) -> None:
    assert share_batch(batch, accumulation, world) == expected
    own, times = expected
    assert own * times * world == batch * accumulation


def test_a_batch_that_can_not_be_shared_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"dpo\.batch_size: 16 pairs \(dpo\.gradient_accumulation: 1\) can't be shared evenly "
        r"by 3 processes; set it to a multiple of 3, or start 2 or 4$",
    ):
        share_batch(16, 1, 3)


ENVIRONMENT = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
               "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP")  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_to(**values: str) -> None:
        for name in ENVIRONMENT:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        join.cache_clear()

    set_to()
    return set_to


def test_who_was_launched_alone_is_alone(launched) -> None:
    assert join() is ALONE
    assert not started_alone()
    launched(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    assert join() is ALONE
    launched(RANK="1", WORLD_SIZE="4")  # machines of a cluster
    assert join() is ALONE
    launched(MASTER_ADDR="127.0.0.1", ACCELERATE_MIXED_PRECISION="no")
    assert join() is ALONE
    assert started_alone()


def test_launches_that_can_not_work_are_refused(launched) -> None:
    launched(LOCAL_RANK="0", RANK="0", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE is 2, but .* start them with accelerate"):
        join()
    launched(LOCAL_RANK="0", RANK="0", WORLD_SIZE="2", ACCELERATE_USE_FSDP="true")
    with pytest.raises(ConfigError, match=r"^ACCELERATE_USE_FSDP is set, but each process holds"):
        join()


def test_each_process_has_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    several = Ranks(1, 4, HashStore())
    for device in ("auto", "cuda"):
        place(several, device)
    assert chosen == [1, 1]
    place(several, "cpu")
    place(ALONE, "cuda:1")
    assert chosen == [1, 1]
    for device, message in (("cuda:1", "each needs a card of its own"), ("mps", "one mps device")):
        with pytest.raises(ConfigError, match=message):
            place(several, device)
    with pytest.raises(ConfigError, match=r"models\.device_map: auto spreads one model over all"):
        place(several, "auto", "auto")
    place(ALONE, "auto", "auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes were started on a machine with 2 visible"):
        place(several, "auto")


# ---------------------------------------------------------------------------------- pipeline

YAML = (
    "name: demo\ndata: {sources: [{format: synthetic}]}\nmodels: {device: cpu}\n"
    "base:\ndpo:\nactivations:\nvector:\n"
)


class Stages:
    """Stand-ins for the stages, in all processes."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int, int]] = []
        self.before: dict[tuple[str, int], Callable[[StageContext], None]] = {}

    def __call__(self, context: StageContext) -> Json:
        ranks = context.ranks
        self.ran.append((context.name, ranks.rank, ranks.world))
        self.before.get((context.name, ranks.rank), lambda _context: None)(context)
        ranks.barrier()
        if not ranks.main:
            return None
        (context.folder / "out.txt").write_text(context.name)
        return {"headline": {}, "notes": []}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fake = Stages()
    monkeypatch.setattr(pipeline, "call", fake)
    return fake


def go(
    monkeypatch: pytest.MonkeyPatch, out: Path, *overrides: str, world: int = 2, **options: str
) -> list[Any]:
    config, here = read_pipeline(YAML, overrides), threading.local()
    monkeypatch.setattr(pipeline, "join", lambda: here.ranks)

    def work(ranks: Ranks) -> Json:
        here.ranks = ranks
        return run_pipeline(config, YAML, out, overrides=overrides, reporter=SILENT, **options)  # type: ignore[arg-type]

    return together(world, work)


def test_the_first_leads_and_the_others_help_where_they_can(monkeypatch, stages, tmp_path) -> None:
    batch = "dpo.batch_size=6"
    found = go(monkeypatch, tmp_path, batch, world=3, until="activations")
    assert found[0] == found[1] == found[2] == read_json(tmp_path / "summary.json")
    assert [name for name, rank, _ in stages.ran if rank == 0] == [
        "data", "base", "dpo", "activations",
    ]  # fmt: skip
    for rank in (1, 2):
        assert [name for name, other, _ in stages.ran if other == rank] == ["dpo", "activations"]
    assert {world for name, _, world in stages.ran if name in {"dpo", "activations"}} == {3}
    recorded = read_json(tmp_path / "manifest.json")["stages"]
    assert {name: record["processes"] for name, record in recorded.items()} == {
        "data": 1, "base": 1, "dpo": 3, "activations": 3,
    }  # fmt: skip
    # what is complete needs nobody, with any number of processes
    stages.ran.clear()
    go(monkeypatch, tmp_path, batch, world=2)
    assert stages.ran == [("vector", 0, 1)]
    stages.ran.clear()
    go(monkeypatch, tmp_path, batch, world=1)
    assert stages.ran == []


@pytest.mark.parametrize(
    ("stage", "rank"), [("data", 0), ("dpo", 0), ("dpo", 1), ("activations", 1)]
)
def test_an_error_of_one_ends_all(monkeypatch, stages, tmp_path, stage, rank) -> None:
    def fails(_context: StageContext) -> None:
        raise DataError("row 3 is empty")

    stages.before[stage, rank] = fails
    found = go(monkeypatch, tmp_path)
    assert [type(error) for error in found] == [DataError, DataError]
    assert str(found[rank]) == "row 3 is empty"
    assert str(found[1 - rank]) == f"row 3 is empty (process {rank})"
    # the lock is free, and the next run goes on
    del stages.before[stage, rank]
    stages.ran.clear()
    go(monkeypatch, tmp_path)
    assert stages.ran[0][0] == stage
    assert "activations" in read_json(tmp_path / "summary.json")["stages"]


def test_mistakes_of_a_plan_end_all(monkeypatch, stages, tmp_path) -> None:
    for overrides, options, kind, message in (
        ((), {"until": "nothing"}, ConfigError, "--until nothing: no such stage"),
        ((), {"only": "vector"}, StoreError, "--only vector: its inputs are missing"),
        (("dpo.batch_size=7",), {}, ConfigError, "dpo.batch_size: 7 pairs"),
        (("models.device=cuda:1",), {}, ConfigError, "models.device: cuda:1, but 2 processes"),
    ):
        found = go(monkeypatch, tmp_path / "run", *overrides, **options)
        assert [type(error) for error in found] == [kind, kind]
        assert str(found[0]).startswith(message)
    assert stages.ran == []
    assert not (tmp_path / "run").exists(), "nothing is half-written"
    with Run(tmp_path / "run").lock():
        found = go(monkeypatch, tmp_path / "run")
    assert [type(error) for error in found] == [StoreError, StoreError]
    assert "another dsteer is working" in str(found[0])


def test_a_batch_is_not_checked_for_a_training_that_is_done(monkeypatch, stages, tmp_path) -> None:
    go(monkeypatch, tmp_path, "dpo.batch_size=7", world=1, until="dpo")
    stages.ran.clear()
    found = go(monkeypatch, tmp_path, "dpo.batch_size=7", world=2)
    assert found[0] == found[1]
    assert set(stages.ran) == {("activations", 0, 2), ("activations", 1, 2), ("vector", 0, 1)}
