"""Read, check and split the preference pairs."""

from __future__ import annotations

from pathlib import Path

from dsteer.config import SPLITS, Source, SyntheticSource
from dsteer.data import SourceReading, read_source
from dsteer.data.jsonl import write_pairs
from dsteer.data.splits import Splits, split_pairs
from dsteer.errors import DataError
from dsteer.stages import StageContext
from dsteer.store import Json, hash_file


def run(context: StageContext) -> Json:
    """Write ``{train,fit,tune,test}.jsonl``; the result accounts for every row.

    Raises:
        DataError: a source can't be read or has a malformed row, or there are too few pairs.
    """
    config, report = context.config.data, context.reporter.line
    readings = []
    for source in config.sources:
        report(f"  reading {_label(source)} ({source.format})")
        reading = read_source(source)
        report(f"  {_sentence(source, reading)}")
        readings.append((source, reading))
    splits = split_pairs(
        [(reading.pairs, source.use) for source, reading in readings],
        config.splits,
        context.seed("splits"),
    )
    trains = context.config.base is not None or context.config.dpo is not None
    if trains and not splits.pairs["train"]:
        asked = config.splits.fit + config.splits.tune + config.splits.test
        raise DataError(
            f"no pair is left to train on: fit, tune and test take {asked}; lower data.splits, or "
            "add a source that may feed train"
        )
    described = {}
    for split in SPLITS:
        path, pairs = context.folder / f"{split}.jsonl", splits.pairs[split]
        write_pairs(path, pairs)
        described[split] = {
            "pairs": len(pairs),
            "conversations": len({pair.conversation for pair in pairs}),
            "sha256": hash_file(path),
        }
        report(
            f"  {split}: {len(pairs)} pairs of {described[split]['conversations']} conversations"
        )
    return {
        "sources": [
            {
                "path": _label(source),
                "format": source.format,
                "identity": reading.identity,
                "rows": reading.rows,
                "kept": len(reading.pairs),
                "dropped": reading.dropped,
                "messages_skipped": reading.messages_skipped,
            }
            for source, reading in readings
        ],
        "duplicates": splits.duplicates,
        "left_out": splits.left_out,
        "splits": described,
        "headline": {
            "rows": sum(reading.rows for _, reading in readings),
            "kept": sum(len(reading.pairs) for _, reading in readings),
            **{split: len(splits.pairs[split]) for split in SPLITS},
        },
        "notes": _notes(readings, splits),
    }


def _label(source: Source) -> str:
    """A source's hub id or file name: results hold no path of this machine."""
    if isinstance(source, SyntheticSource):
        return "synthetic"
    local = Path(source.path).expanduser()
    return local.resolve().name if local.exists() else source.path


def _sentence(source: Source, reading: SourceReading) -> str:
    text = f"{_label(source)}: {reading.rows} rows, {len(reading.pairs)} kept"
    if reading.dropped:
        text += f", dropped: {_counts(reading.dropped)}"
    if reading.messages_skipped:
        text += f"; messages skipped: {_counts(reading.messages_skipped)}"
    return text


def _notes(readings: list[tuple[Source, SourceReading]], splits: Splits) -> list[str]:
    notes = [
        _sentence(source, reading)
        for source, reading in readings
        if reading.dropped or reading.messages_skipped
    ]
    if splits.duplicates:
        notes.append(f"{splits.duplicates} pairs repeat another pair's texts and were removed")
    if splits.left_out:
        notes.append(f"pairs in no split: {_counts(splits.left_out)}")
    for split, pairs in splits.pairs.items():
        conversations = len({pair.conversation for pair in pairs})
        if 2 * conversations < len(pairs):
            notes.append(
                f"{split}: {len(pairs)} pairs come from only {conversations} conversations"
            )
    return notes


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in counts.items())
