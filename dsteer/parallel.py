"""Several processes on one run: who each is, and how they wait for, tell and warn one another.

A launcher (``accelerate launch``, ``torchrun``) starts the processes and says in the environment
which is which. They talk through torch.distributed's key-value store, in which waiting costs
nothing however long another process works. States and moments go through the run folder, which all
see; gradients through a process group (gloo between CPUs, NCCL between cards), made when training
needs it. For one process all of this does nothing and imports nothing.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dsteer import errors
from dsteer.errors import ConfigError, DsteerError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Value = TypeVar("Value")

MEETING = timedelta(minutes=5)
"""How long a process waits for the others to start."""

WAITING = timedelta(hours=2)
"""How long a step waits for another process's; in between lie a checkpoint, an evaluation."""

GRACE = 15.0
"""Seconds for which a process that failed leaves the word to the first one."""

PARTING = 5.0
"""Seconds for which the first process lets the others end before it."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1e-3, 0.25  # seconds between two looks into the store


class Ranks:
    """The processes of a run, as one of them sees them.

    Methods that wait are called by all, in the same order. While one waits it also hears whether
    another has failed, and then fails with it.

    Args:
        rank: this process's number; 0 leads: it plans, writes and speaks.
        world: how many there are.
        store: where they meet; None for a process alone.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Store | None = None) -> None:
        self.rank = rank
        self.world = world
        self._store = store
        self._meetings = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that plans, writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """What of the work is this process's: every ``world``-th item."""
        return items[self.rank :: self.world]

    # ------------------------------------------------------------------------------ meeting

    def exchange(self, value: Value) -> list[Value]:
        """What each process has, in their order; JSON values."""
        if self._store is None:
            return [value]
        self._meetings += 1
        self._store.set(f"{self._meetings}/{self.rank}", json.dumps(value))
        found = [json.loads(self._wait(f"{self._meetings}/{rank}")) for rank in range(self.world)]
        # Who is here has read what was said at the meeting before.
        self._store.delete_key(f"{self._meetings - 1}/{self.rank}")
        return found

    def broadcast(self, value: Value) -> Value:
        """What the first process has."""
        return self.exchange(value)[0]

    def barrier(self) -> None:
        """Wait until all are here."""
        self.exchange(None)

    def connect(self) -> None:
        """Make the process group, unless it is there: gloo for CPUs, NCCL for cards."""
        if self._store is None:
            return
        from torch import cuda, distributed
        from torch.distributed.distributed_c10d import PrefixStore

        if distributed.is_initialized():
            return
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo",
            store=PrefixStore("gradients", self._store),
            rank=self.rank,
            world_size=self.world,
            timeout=WAITING,
        )

    def _wait(self, key: str) -> bytes:
        assert self._store is not None
        pause = _FIRST_PAUSE
        while not self._store.check([key]):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._store.get(key)

    # ------------------------------------------------------------------------------ failing

    def check(self) -> None:
        """Raise if another process has failed: a user's mistake as what it is there.

        Raises:
            DsteerError: what the other process raised.
            RuntimeError: the other process met a bug; it shows the traceback.
        """
        failed = self._failed()
        if failed is not None and failed["rank"] != self.rank:
            raise _error(failed)

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error; only the first one of all is kept."""
        if self._store is not None:
            told = {"rank": self.rank, "kind": type(error).__name__, "text": str(error)}
            with suppress(RuntimeError):  # who kept the store has ended
                self._store.compare_set("failed", "", json.dumps(told))

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """An error inside the block ends all processes, not only this one."""
        try:
            yield
        except BaseException as error:
            failed = self._failed()
            if failed is not None and failed["rank"] != self.rank:
                # What breaks here because another has gone is not the cause.
                if not isinstance(error, DsteerError):
                    raise _error(failed) from None
            else:
                self.fail(error)
            raise

    def may_speak(self, error: BaseException) -> bool:
        """Whether this process has to tell of an error: the first one does, the others leave it to
        it, and speak only if it is busy or gone and says nothing for a while."""
        self.fail(error)
        if self.main or self._store is None:
            return True
        end = time.monotonic() + GRACE
        with suppress(RuntimeError):
            while time.monotonic() < end:
                if self._store.check(["left/0"]):
                    return False
                time.sleep(_LONGEST_PAUSE)
            return True
        return False  # the first process kept the store and has ended

    def leave(self) -> None:
        """Say that this process ends; the first one, which may keep the store, is the last to."""
        if self._store is None:
            return
        from torch import distributed

        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            everyone = [f"left/{rank}" for rank in range(self.world)]
            end = time.monotonic() + PARTING
            while self.main and not self._store.check(everyone) and time.monotonic() < end:
                time.sleep(_FIRST_PAUSE)
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def _failed(self) -> dict[str, Any] | None:
        if self._store is None:
            return None
        with suppress(RuntimeError):
            if self._store.check(["failed"]):
                found: dict[str, Any] = json.loads(self._store.get("failed"))
                return found
        return None


ALONE = Ranks()


def _error(failed: Mapping[str, Any]) -> Exception:
    kind = getattr(errors, failed["kind"], None)
    text = f"{failed['text']} (process {failed['rank']})"
    if isinstance(kind, type) and issubclass(kind, DsteerError):
        return ConfigError(text) if kind is errors.MissingExtraError else kind(text)
    return RuntimeError(f"{failed['kind']}: {text}")


# ---------------------------------------------------------------------------------- launching


@functools.cache
def join() -> Ranks:
    """Meet the other processes that the launcher started; alone if there are none.

    Raises:
        ConfigError: they don't come, or were started for another way of sharing.
    """
    # Some clusters set RANK and WORLD_SIZE for machines; LOCAL_RANK comes from a launcher alone.
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(flag, "false").lower() in {"true", "1"}:
            raise ConfigError(
                f"{flag} is set, but each process holds the whole model (DDP); launch with plain "
                "--multi_gpu, or with torchrun"
            )
    # DDP warns, from C++ and once a process, that it looked for unused parameters and found none.
    # It has to look: of a mixture of experts or a multimodal model some are unused.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=MEETING)))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes can't meet ({reason}); "
            "start them with accelerate launch or torchrun"
        ) from None
    ranks = Ranks(rank, world, PrefixStore("dsteer", store))
    atexit.register(ranks.leave)
    return ranks


def started_alone() -> bool:
    """Whether accelerate was asked for several processes and started one.

    Without several cards it does so unless ``--multi_gpu`` is given; what tells is the address to
    meet at, without a number for this process.
    """
    of_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return of_accelerate and "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ


def place(ranks: Ranks, device: str, device_map: str | None = None) -> None:
    """Give each process of a machine its own card, which ``auto`` and ``cuda`` then mean.

    Raises:
        ConfigError: one card is named for all, a model is to take all cards, or there are fewer
            cards than processes.
    """
    if ranks.world == 1:
        return
    if device_map is not None:
        raise ConfigError(
            f"models.device_map: {device_map} spreads one model over all cards, but each of "
            f"{ranks.world} processes holds the whole of it; drop it, or start one process"
        )
    if device == "cpu":
        return
    from torch import backends, cuda

    if device == "mps" or (device == "auto" and backends.mps.is_available()):
        raise ConfigError(
            f"models.device: {device}, but {ranks.world} processes can't share one mps device; "
            "start one, or set it to cpu"
        )
    if device not in {"auto", "cuda"}:
        raise ConfigError(
            f"models.device: {device}, but {ranks.world} processes were started and each needs a "
            "card of its own; set it to auto, and choose cards with CUDA_VISIBLE_DEVICES"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if not cuda.is_available():
        return
    if here > cuda.device_count():
        raise ConfigError(
            f"{here} processes were started on a machine with {cuda.device_count()} visible cards; "
            f"start at most {cuda.device_count()} a machine, or set models.device: cpu"
        )
    cuda.set_device(int(os.environ["LOCAL_RANK"]))


def share_batch(batch: int, accumulation: int, world: int) -> tuple[int, int]:
    """A process's own batch size and accumulation, so that all together make the same steps.

    Raises:
        ConfigError: neither can be divided.
    """
    if batch % world == 0:
        return batch // world, accumulation
    if accumulation % world == 0:
        return batch, accumulation // world
    fit = [n for n in range(1, max(batch, accumulation) + 1)
           if batch % n == 0 or accumulation % n == 0]  # fmt: skip
    fewer, more = [n for n in fit if n < world], [n for n in fit if n > world]
    raise ConfigError(
        f"dpo.batch_size: {batch} pairs (dpo.gradient_accumulation: {accumulation}) can't be "
        f"shared evenly by {world} processes; set it to a multiple of {world}, or start "
        f"{' or '.join(map(str, fewer[-1:] + more[:1]))}"
    )
