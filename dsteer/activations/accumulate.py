"""Read a pair's states over any number of prompts and keep moments instead of states.

Prompts are tokenised chunk by chunk into a file; the batches are planned over all of them, as
:func:`dsteer.activations.extract.extract` does, so that the states are bit for bit those that it
would store. Batches are then read in parts of a few thousand rows: first by the base, then by the
tuned model; the part is added to the moments and forgotten. Memory holds one part, the moments,
and some 550 bytes a prompt (lengths, batches and signs; measured in ``benchmarks/moments.py``).

After each part the moments are written to ``moments.safetensors``, so that a reading that is
killed loses one part, and ends with the same bytes. Several processes share the parts, each with a
file of its own (``moments.safetensors.1``, …), which the first one merges in the end; an earlier
reading's files are gone on from, however many processes wrote them.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from dsteer import __version__
from dsteer.activations.batching import Batch
from dsteer.activations.extract import PairedActivations, encode_for, write_ids
from dsteer.activations.moments import (
    MATRICES,
    PairedMoments,
    SiteMoments,
    open_moments,
    write_moments,
)
from dsteer.activations.reading import (
    Reading,
    has_foreign_hooks,
    plan_reading,
    require_agreement,
    row_offsets,
    sample_weights,
)
from dsteer.activations.sites import token_ranges
from dsteer.activations.spool import IdSpool
from dsteer.activations.storage import FileSink, States
from dsteer.data.tokens import Encoded, hash_ids
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import DataError, ModelError, StoreError
from dsteer.geometry.sums import bucket_of, signs_of
from dsteer.models.anatomy import Anatomy, evaluating
from dsteer.models.load import quiet
from dsteer.models.pair import ModelPair, Which
from dsteer.parallel import ALONE, Ranks
from dsteer.progress import SILENT, Advance, Reporter
from dsteer.store import Json, hash_json, read_metadata

_TOKENISED = 1024
"""Prompts that are tokenised at a time."""

_WHICH: tuple[Which, ...] = ("base", "tuned")


def part_rows(width: int) -> int:
    """Rows that are read before moments are written: max(1024, 2d).

    From 2d rows on, writing d×d moments after each part costs the disk no more than half as much
    again as storing the states would, and a part takes less memory than the moments do.
    """
    return max(1024, 2 * width)


@dataclass(frozen=True)
class Accumulated:
    """What is known of a pair's states over some splits of prompts.

    Attributes:
        moments: split → site → moments.
        kept: states of the first prompts of each split; None where none were to be kept.
        kept_keys: conversation of each kept prompt of a split, as it was given.
        prompts: prompts of each split.
        sites: in the model's order.
        ids_sha256: hash of the ids of all prompts.
        tokens: of all prompts.
        truncated: prompts that lost their left part.
    """

    moments: Mapping[str, PairedMoments]
    kept: PairedActivations | None
    kept_keys: Mapping[str, Sequence[str]]
    prompts: Mapping[str, int]
    sites: tuple[str, ...]
    ids_sha256: str
    tokens: int
    truncated: int


def accumulate(
    pair: ModelPair,
    prompts: Iterable[Prompt | PreferencePair | Encoded],
    *,
    sites: str | Sequence[str] = "all",
    position: str = "prompt_last",
    template: str = "none",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    folder: Path | None = None,
    rows: int | None = None,
    reporter: Reporter = SILENT,
) -> PairedMoments:
    """Read both models' states on identical token ids and keep their moments.

    Args:
        pair: the models; both stay in memory if they fit, else each part loads them in turn.
        prompts: as for :func:`dsteer.activations.extract.extract`; any iterable, read once.
        sites: likewise.
        position: likewise.
        template: likewise.
        batch_tokens: likewise.
        max_tokens: likewise.
        folder: keep the moments there, in ``moments.safetensors``. A reading that was killed goes
            on where it stopped, if ids, sites, position, batches and weights are the same.
        rows: rows a part, see :func:`part_rows`.
        reporter: shows progress.

    Raises:
        ConfigError, DataError, ModelError, MeasurementError, StoreError: as ``extract``.
    """
    if isinstance(prompts, str):
        raise DataError("prompts is one text; expected a list of prompts")
    return accumulate_splits(
        pair,
        {"all": prompts},
        spectra=("all",),
        nulls=("all",),
        sites=sites,
        position=position,
        template=template,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        folder=folder,
        rows=rows,
        reporter=reporter,
    ).moments["all"]


def accumulate_splits(
    pair: ModelPair,
    splits: Mapping[str, Iterable[Prompt | PreferencePair | Encoded]],
    *,
    spectra: Collection[str],
    nulls: Collection[str],
    keep: int = 0,
    sites: str | Sequence[str] = "all",
    position: str = "prompt_last",
    template: str = "none",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    folder: Path | None = None,
    rows: int | None = None,
    reporter: Reporter = SILENT,
    ranks: Ranks = ALONE,
) -> Accumulated:
    """Read several splits in one go; see :func:`accumulate`.

    Args:
        pair: the models.
        splits: name → prompts.
        spectra: the splits that get the d×d moments that spectra need; the others get sums alone.
        nulls: the splits that get sums with random signs, which the null of cosines needs.
        keep: states of so many first prompts of each split are kept too, in ``base.safetensors``
            and ``tuned.safetensors``, where :meth:`PairedActivations.open` finds them.
        sites: as for :func:`accumulate`; likewise all that follow.
        ranks: the processes that read together, all into one folder.

    Raises:
        ConfigError, DataError, ModelError, MeasurementError, StoreError: as ``extract``.
    """
    if keep and folder is None:
        raise ValueError("keep needs a folder")
    if pair.encoder_decoder:
        raise ModelError(
            f"{pair.name('base')} is an encoder-decoder model, whose states are not summed as "
            "they stream; set activations.store: states"
        )
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spool = stack.enter_context(IdSpool(_of_rank(place / "ids.spool", ranks)))
        prompts = _Prompts(spool, tuple(splits), keep)
        reading = prompts.fill(
            splits,
            lambda items: encode_for(
                pair, items, position=position, template=template, max_tokens=max_tokens
            ),
            lambda encoded: Reading.of(
                pair, encoded, sites=sites, position=position, batch_tokens=batch_tokens
            ),
        )
        work = _Work.of(
            pair, prompts, reading, spectra, nulls, rows or part_rows(pair.width), ranks
        )
        moments = work.run(pair, folder, reporter)
        kept = None
        if keep and folder is not None:
            if ranks.main:
                write_ids(folder / "ids.safetensors", prompts.kept)
            ranks.barrier()
            kept = PairedActivations.open(folder)
        counts = np.bincount(np.asarray(prompts.of_split), minlength=len(splits))
        return Accumulated(
            moments=moments,
            kept=kept,
            kept_keys=prompts.keys,
            prompts={split: int(count) for split, count in zip(splits, counts, strict=True)},
            sites=reading.sites,
            ids_sha256=work.ids_sha256,
            tokens=spool.tokens,
            truncated=spool.truncated,
        )


# ---------------------------------------------------------------------------------- prompts


class _Prompts:
    """All prompts of a reading: their ids on disk, and a few numbers of each in memory.

    Attributes:
        ids: the ids.
        of_split: number of each prompt's split.
        bucket: bucket of each prompt's conversation.
        signs: its random signs, a row of bytes each.
        needed: ids of each that have to be run.
        rows: rows of each.
        kept: the prompts whose states are kept, and ``slot`` their number among these, or −1.
    """

    def __init__(self, ids: IdSpool, splits: tuple[str, ...], keep: int) -> None:
        self.ids, self.splits, self._keep = ids, splits, keep
        self.of_split, self.bucket, self._signs = array("b"), array("B"), bytearray()
        self.needed, self.rows, self.slot = array("i"), array("i"), array("i")
        self.kept: list[Encoded] = []
        self.keys: dict[str, list[str]] = {split: [] for split in splits}

    def fill(
        self,
        splits: Mapping[str, Iterable[Prompt | PreferencePair | Encoded]],
        encode: Callable[[Sequence[Prompt | PreferencePair]], list[Encoded]],
        check: Callable[[Sequence[Encoded]], Reading],
    ) -> Reading:
        """Tokenise and check all prompts; returns a reading of some of them, for what it knows."""
        reading = None
        for number, (split, items) in enumerate(splits.items()):
            stream, start = iter(items), 0
            while chunk := list(islice(stream, _TOKENISED)):
                try:
                    reading = check(encode(chunk))  # type: ignore[arg-type]
                except (DataError, ModelError) as error:
                    if start == 0 and number == 0:
                        raise
                    where = f"{split}, counted from its prompt {start}"
                    raise type(error)(f"{where}: {error}") from None
                counts = np.diff(reading.offsets)
                for at, item in enumerate(chunk):
                    key = getattr(item, "conversation", "") or f"prompt {start + at}"
                    self._add(number, key, reading.encoded[at])
                    self.needed.append(reading.ranges[at].stop)
                    self.rows.append(int(counts[at]))
                start += len(chunk)
            if start == 0:
                raise DataError(f"there are no prompts to read ({split}); give at least one")
        assert reading is not None
        return reading

    def _add(self, split: int, key: str, encoded: Encoded) -> None:
        self.ids.append(encoded)
        self.of_split.append(split)
        self.bucket.append(bucket_of(key))
        self._signs += signs_of(key)
        keys = self.keys[self.splits[split]]
        if len(keys) < self._keep:
            keys.append(key)
            self.slot.append(len(self.kept))
            self.kept.append(encoded)
        else:
            self.slot.append(-1)

    @property
    def signs(self) -> np.ndarray:
        """The signs of all prompts, uint8 (prompts, bytes)."""
        return np.frombuffer(self._signs, np.uint8).reshape(len(self.of_split), -1)

    def longest(self) -> tuple[int, ...]:
        """The ids to run of the longest prompt."""
        number = max(range(len(self.needed)), key=self.needed.__getitem__)
        return self.ids[number].ids[: self.needed[number]]

    def fingerprint(self) -> str:
        """Hash of what is kept of each prompt beside its ids."""
        digest = hashlib.sha256()
        for numbers in (self.of_split, self.bucket, self.needed, self.rows, self.slot):
            digest.update(numbers.tobytes())
        digest.update(self._signs)
        return digest.hexdigest()


# ---------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class _Work:
    """A reading that is cut into parts.

    Attributes:
        prompts: what is read.
        like: a reading of some of them: sites, position, width.
        batches: of all prompts, in the order in which they are read.
        parts: the same, cut.
        spectra: the splits that get d×d moments.
        nulls: the splits that get sums with random signs.
        ids_sha256: hash of the ids of all prompts.
        metadata: what the files of each model's states say of themselves.
        resume: whether an earlier reading may be continued.
        ranks: the processes that share the parts.
    """

    prompts: _Prompts
    like: Reading
    batches: Sequence[Batch]
    parts: Sequence[Sequence[Batch]]
    spectra: Collection[str]
    nulls: Collection[str]
    ids_sha256: str
    metadata: Mapping[Which, dict[str, Json]]
    resume: bool
    ranks: Ranks

    @classmethod
    def of(
        cls,
        pair: ModelPair,
        prompts: _Prompts,
        like: Reading,
        spectra: Collection[str],
        nulls: Collection[str],
        rows: int,
        ranks: Ranks,
    ) -> _Work:
        """Plan the batches of both models, and name the work exactly."""
        plans: list[list[Batch]] = []
        metadata: dict[Which, dict[str, Json]] = {}
        foreign, ids_sha256 = False, hash_ids(prompts.ids)
        for which in _WHICH:
            with pair.using(which) as model, evaluating(model), quiet():
                anatomy = Anatomy.of(model)
                plans.append(
                    plan_reading(
                        model, anatomy, prompts.needed, prompts.longest(), like.batch_tokens, ranks
                    )
                )
                metadata[which] = {
                    "dsteer": __version__,
                    "dtype": str(anatomy.dtype).removeprefix("torch."),
                    "ids_sha256": ids_sha256,
                    "position": like.position,
                    "weights_sample": sample_weights(model),
                }
                # Somebody's hooks may change the states, and the files do not tell by how much.
                foreign = foreign or has_foreign_hooks(model)
                del model, anatomy
        # They differ where one of the models may not see padding: then neither is shown any.
        batches = max(plans, key=len)
        parts = list(_cut(batches, prompts.rows, rows))
        plan = hash_json(
            [
                *metadata.values(),
                prompts.fingerprint(),
                like.sites,
                like.width,
                [name for name in prompts.splits if name in spectra],
                [name for name in prompts.splits if name in nulls],
                hashlib.sha256(
                    array("q", (p for batch in batches for p in (-1, *batch.prompts))).tobytes()
                ).hexdigest(),
                [len(part) for part in parts],
            ]
        )
        require_agreement(plan, "pair of models", ranks)
        for which in _WHICH:
            metadata[which]["plan"] = plan
        return cls(
            prompts, like, batches, parts, spectra, nulls, ids_sha256, metadata, not foreign, ranks
        )

    def run(
        self, pair: ModelPair, folder: Path | None, reporter: Reporter
    ) -> Mapping[str, PairedMoments]:
        """Read the parts that are left, each process its share."""
        path = None if folder is None else folder / "moments.safetensors"
        assert path is not None or self.ranks.world == 1, "only a file can be shared"
        with ExitStack() as stack:
            sinks = {}
            if folder is not None and self.prompts.kept:
                sinks = {which: stack.enter_context(self._sink(folder, which)) for which in _WHICH}
            found = {} if path is None else self._found(path, sinks)
            file = None if path is None else _of_rank(path, self.ranks)
            done, moments = self._begin(file, found)
            known = {number for numbers in found.values() for number in numbers}
            own = [n for n in self.ranks.share(range(len(self.parts))) if n not in known]
            with self._bar(reporter, known, own) as advance:
                for number in own:
                    self._read(pair, number, moments, sinks, advance)
                    done = [*done, number]
                    if file is not None:
                        self._write(file, moments, done)
            self.ranks.barrier()  # all files are written
            if path is not None and self.ranks.main:
                self._merge(path, moments)
            for sink in sinks.values():
                sink.finish()
            self.ranks.barrier()  # one is left
        if path is not None:
            return open_moments(path)
        return {
            split: PairedMoments.hold(sites, self.like.position, self.ids_sha256)
            for split, sites in moments.items()
        }

    def _sink(self, folder: Path, which: Which) -> FileSink:
        rows = row_offsets(self.prompts.kept, self.like.position)[-1]
        return FileSink(
            folder / f"{which}.safetensors",
            self.like.sites,
            rows,
            self.like.width,
            self.metadata[which],
            resume=self.resume,
            ranks=self.ranks,
        )

    def _bar(
        self, reporter: Reporter, known: Collection[int], own: Sequence[int]
    ) -> AbstractContextManager[Advance]:
        done, left = (
            2 * sum(len(batch.prompts) for number in numbers for batch in self.parts[number])
            for numbers in (known, own)
        )
        label = "states of base and tuned"
        if self.ranks.world > 1:
            label += f", this process's share of {self.ranks.world}"
        return reporter.bar(label, done + left, unit="prompts", done=done)

    def _found(self, path: Path, sinks: Mapping[Which, FileSink]) -> dict[str, list[int]]:
        """File → parts of this work in it, as an earlier reading left them."""
        found: dict[str, list[int]] = {}
        if self.ranks.main:
            for file in (path, *_of_others(path)):
                parts = self._parts_in(file)
                kept = all(sink.complete or set(parts) <= sink.done for sink in sinks.values())
                merged = any(set(parts) & set(others) for others in found.values())
                if parts and kept and not merged:
                    found[file.name] = parts
                else:
                    file.unlink(missing_ok=True)
        return self.ranks.broadcast(found)

    def _parts_in(self, path: Path) -> list[int]:
        if not self.resume or not path.is_file():
            return []
        known = read_metadata(path)
        if known.get("plan") != self.metadata["base"]["plan"]:
            return []
        done, total = known["parts"]
        return list(range(total)) if done == total else list(known["done"])

    def _begin(
        self, path: Path | None, found: Mapping[str, list[int]]
    ) -> tuple[list[int], dict[str, dict[str, SiteMoments]]]:
        """What an earlier reading left in a file: parts done, and their moments."""
        if path is not None and path.name in found:
            stored = open_moments(path, unfinished=True)
            return found[path.name], {split: dict(sites) for split, sites in stored.items()}
        return [], {
            split: {
                site: SiteMoments(
                    self.like.width,
                    MATRICES if split in self.spectra else (),
                    signed=split in self.nulls,
                )
                for site in self.like.sites
            }
            for split in self.prompts.splits
        }

    def _merge(self, path: Path, moments: Mapping[str, Mapping[str, SiteMoments]]) -> None:
        """Add the other processes' moments, in their order, and keep one file."""
        others = _of_others(path)
        if others:
            for other in others:
                for split, sites in open_moments(other, unfinished=True).items():
                    for site, found in sites.items():
                        moments[split][site].merge(found)
            self._write(path, moments, range(len(self.parts)))
        for leftover in (*others, *_of_others(path.with_name("ids.spool"))):
            leftover.unlink(missing_ok=True)

    def _write(
        self, path: Path, moments: Mapping[str, Mapping[str, SiteMoments]], done: Sequence[int]
    ) -> None:
        known = self.metadata["base"]
        metadata = {
            "dsteer": known["dsteer"],
            "ids_sha256": self.ids_sha256,
            "parts": [len(done), len(self.parts)],
            "plan": known["plan"],
            "position": self.like.position,
        }
        if len(done) < len(self.parts):
            metadata["done"] = list(done)
        try:
            write_moments(path, moments, metadata)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise StoreError(
                f"{path}: can't be written ({reason}); free space, or choose another folder"
            ) from None

    def _read(
        self,
        pair: ModelPair,
        number: int,
        moments: Mapping[str, Mapping[str, SiteMoments]],
        sinks: Mapping[Which, FileSink],
        advance: Advance,
    ) -> None:
        """Read one part and add it."""
        part, prompts, like = self.parts[number], self.prompts, self.like
        chosen = [prompt for batch in part for prompt in batch.prompts]
        encoded = [prompts.ids[prompt] for prompt in chosen]
        ranges = token_ranges(encoded, like.position)
        reading = Reading(encoded, ranges, like.sites, like.position, like.width, like.batch_tokens)
        batches, start = [], 0
        for batch in part:
            batches.append(Batch(tuple(range(start, start + len(batch.prompts))), batch.length))
            start += len(batch.prompts)
        states: dict[Which, States] = {}
        for which in _WHICH:
            with pair.using(which) as model:
                states[which] = reading.read(
                    model, which, batches, advance, ranks=self.ranks, of=len(self.batches)
                )
                del model
        offsets = reading.offsets
        self._keep(number, chosen, offsets, states, sinks)
        counts = np.diff(offsets)
        of_split = np.repeat(np.array([prompts.of_split[prompt] for prompt in chosen]), counts)
        bucket = np.repeat(np.array([prompts.bucket[prompt] for prompt in chosen]), counts)
        signs = np.repeat(prompts.signs[chosen], counts, axis=0)
        for index, split in enumerate(prompts.splits):
            rows = np.flatnonzero(of_split == index)
            if not len(rows):
                continue
            where = torch.from_numpy(rows)
            for site, accumulated in moments[split].items():
                accumulated.update(
                    states["base"][site][where],
                    states["tuned"][site][where],
                    bucket[rows],
                    signs[rows],
                )

    def _keep(
        self,
        number: int,
        chosen: Sequence[int],
        offsets: Sequence[int],
        states: Mapping[Which, States],
        sinks: Mapping[Which, FileSink],
    ) -> None:
        """Write the states of those prompts of a part that are kept."""
        if not sinks:
            return
        slots = [self.prompts.slot[prompt] for prompt in chosen]
        places = row_offsets(self.prompts.kept, self.like.position)
        spans = [range(*places[slot : slot + 2]) for slot in slots if slot >= 0]
        rows = torch.tensor(
            [
                row
                for at, slot in enumerate(slots)
                if slot >= 0
                for row in range(offsets[at], offsets[at + 1])
            ],
            dtype=torch.long,
        )
        for which, sink in sinks.items():
            if not sink.complete:
                sink.put(number, spans, {s: states[which][s][rows] for s in self.like.sites})


def _of_rank(path: Path, ranks: Ranks) -> Path:
    """The file of a process: ``path`` itself for the first one."""
    return path if ranks.main else path.with_name(f"{path.name}.{ranks.rank}")


def _of_others(path: Path) -> list[Path]:
    """The files that are there of all processes but the first, in their order."""
    found = [file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdigit()]
    return sorted(found, key=lambda file: int(file.suffix[1:]))


def _cut(batches: Sequence[Batch], rows: Sequence[int], least: int) -> Iterator[list[Batch]]:
    """Consecutive batches of together at least so many rows."""
    part: list[Batch] = []
    count = 0
    for batch in batches:
        part.append(batch)
        count += sum(rows[prompt] for prompt in batch.prompts)
        if count >= least:
            yield part
            part, count = [], 0
    if part:
        yield part
