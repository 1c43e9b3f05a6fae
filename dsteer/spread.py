"""Spread the variants of a study over processes: first what several share, then each by itself.

What fails here is told and left: the study's ordinary pass, which follows, finds what is complete,
tries the rest again, and keeps the records. So a study ends with the same bytes however many
processes it had, and one that was killed goes on with the same command.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import TextIO

from dsteer.config import as_yaml, read_pipeline
from dsteer.errors import DsteerError
from dsteer.nulls import run_with_nulls
from dsteer.pipeline import identify_stages, run_pipeline
from dsteer.progress import Reporter
from dsteer.sharing import Variant, prepare
from dsteer.store import hash_json


def spread(variants: Sequence[Variant], jobs: int, until: str | None, reporter: Reporter) -> None:
    """Run variants in so many processes at a time, as far as they come.

    Args:
        variants: of a study; the caller holds the study's lock.
        jobs: processes, 2 or more; each has its share of the threads.
        until: run so far.
        reporter: tells what happens.
    """
    texts = [
        (variant.name, as_yaml(variant.config), str(variant.run.path))
        for variant in _share_first(variants, until, reporter)
    ]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin,
                             initargs=(threads,)) as pool:  # fmt: skip
        started: list[tuple[str, Future[None]]] = [
            (name, pool.submit(_run, name, text, path, until, reporter.mode))
            for name, text, path in texts
        ]
        for name, future in started:
            error = future.exception()
            reporter.line(
                f"variant {name}: done" if error is None else f"variant {name} stopped: {error}"
            )


def _share_first(
    variants: Sequence[Variant], until: str | None, reporter: Reporter
) -> list[Variant]:
    """Run the stages that several variants have in common, each once, and hand them on.

    What a shared stage reads is shared too, as its fingerprint holds theirs: such stages can be run
    alone, in order, whatever of the variant lies between them.

    Returns:
        the variants whose folders are theirs to write.
    """
    prints = {
        variant.name: {
            name: hash_json(identity)
            for name, identity in identify_stages(variant.config, variant.run).items()
        }
        for variant in variants
    }
    counts = Counter(print_ for own in prints.values() for print_ in own.values())
    done: list[Variant] = []
    for variant in variants:
        try:
            text = prepare(variant, done)
        except DsteerError as error:  # the ordinary pass tells it
            reporter.line(f"variant {variant.name} stopped: {error}")
            continue
        for name, print_ in prints[variant.name].items():
            if counts[print_] > 1 and variant.run.stage(name).state(print_) != "complete":
                reporter.line(f"variant {variant.name}: {name}, which others share")
                try:
                    run_pipeline(
                        variant.config, text, variant.run.path, only=name, reporter=reporter
                    )
                except Exception as error:  # noqa: BLE001  # the ordinary pass tells it
                    reporter.line(f"variant {variant.name} stopped: {error}")
                    break
            if name == until:
                break
        done.append(variant)
    return done


def _begin(threads: int) -> None:
    """A worker has its share of the threads, and ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C in silence
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _end_with(sentinel: int) -> None:
    """Leave at once when the parent is gone: the same command, given again, must find no writer."""
    wait([sentinel])
    os._exit(1)


class _Named:
    """A stream that puts the variant's name before each line."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self._name, self._stream = name, stream

    def write(self, text: str) -> int:
        return self._stream.write(f"{self._name}: {text}" if text.strip() else text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def _run(name: str, text: str, path: str, until: str | None, mode: str) -> None:
    """One variant, in a process of its own."""
    quiet = mode == "quiet"
    reporter = Reporter("quiet" if quiet else "lines", stream=_Named(name, sys.stderr))  # type: ignore[arg-type]
    config = read_pipeline(text, origin=name)
    run_with_nulls(config, text, Path(path), until=until, reporter=reporter)
