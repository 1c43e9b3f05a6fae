"""A source of preference pairs, whatever its format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

from dsteer.config import (
    HHSource,
    OasstSource,
    PreferenceSource,
    PromptSource,
    Source,
    SyntheticSource,
)
from dsteer.data.hh import read_hh
from dsteer.data.oasst import Pairing, read_oasst
from dsteer.data.preference import read_preferences
from dsteer.data.prompts import read_prompts
from dsteer.data.tables import Row, read_rows
from dsteer.data.transcript import conversation_key
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, did_you_mean
from dsteer.store import hash_json, identify

Format = Literal["hh-rlhf", "oasst", "preference", "prompts"]

HH_HUB_ID = "Anthropic/hh-rlhf"


@dataclass(frozen=True)
class SourceReading:
    """What a source gave. ``rows`` is the number of pairs plus that of all dropped rows.

    Attributes:
        pairs: in the order of the source.
        rows: rows read; of trees, prompts (see :func:`dsteer.data.oasst.read_oasst`).
        dropped: rows without a pair, by reason; the readers' docstrings define them.
        identity: what exactly was read, for the manifest; None where it can't be known.
        messages_skipped: messages of trees that were left out, by reason.
    """

    pairs: list[PreferencePair]
    rows: int
    dropped: dict[str, int]
    identity: str | None
    messages_skipped: dict[str, int] = field(default_factory=dict)


def load_preferences(
    path: str | Path,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    format: Format | None = None,  # noqa: A002  # the config's word
    limit: int | None = None,
) -> list[PreferencePair]:
    """Read preference pairs from a local file or folder, or from a hub dataset.

    Args:
        path: .jsonl[.gz], .csv[.gz], .txt[.gz], .parquet, a folder of these, or a hub id.
        subset: configuration of the hub dataset; for hh-rlhf its folder, such as harmless-base.
        split: split of the hub dataset or folder; a single local file is read whole.
        revision: hub revision.
        format: hh-rlhf, oasst (English, best against worst), preference or prompts; by default
            the first row tells.
        limit: read only the first rows.

    Returns:
        The pairs, in the order of the rows. What was dropped, and why, is told by
        :func:`read_source`.

    Raises:
        ConfigError: unknown format, or a limit below 1.
        DataError: nothing is there, a row is malformed, or no row makes a pair.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}: expected a number of rows, 1 or more")
    if format is not None and format not in get_args(Format):
        raise ConfigError(f"unknown format {format!r}{did_you_mean(format, get_args(Format))}")
    rows = read_rows(
        str(path),
        subset=subset,
        subset_is_folder=format == "hh-rlhf" or str(path) == HH_HUB_ID,
        split=split,
        revision=revision,
        limit=limit,
    )
    if format is None:
        first = next(rows)
        format, rows = _detect(first), chain([first], rows)  # noqa: A001
    return _read(str(path), format, rows).pairs


def detect_format(path: str) -> Format:
    """Tell the format of a local file or folder, or of a hub dataset, from its first row.

    Raises:
        DataError: nothing is there, or the row is of no known format.
    """
    return _detect(next(read_rows(path, subset_is_folder=path == HH_HUB_ID, limit=1)))


def read_source(source: Source) -> SourceReading:
    """Read a source of a pipeline, and account for each of its rows.

    Raises:
        DataError: nothing is there, a row is malformed, or no row makes a pair.
    """
    if isinstance(source, SyntheticSource):
        return _write_world(source)
    rows = read_rows(
        source.path,
        subset=source.subset if isinstance(source, HHSource | PreferenceSource) else None,
        subset_is_folder=isinstance(source, HHSource),
        split="train" if isinstance(source, PromptSource) else source.split,
        revision=source.revision,
        limit=source.limit,
    )
    if isinstance(source, OasstSource):
        reading = _read(source.path, source.format, rows, lang=source.lang, pairing=source.pairing)
    else:
        reading = _read(source.path, source.format, rows)
    identity = identify(source.path, revision=source.revision, kind="dataset")
    return replace(reading, identity=identity)


def _read(
    path: str,
    format: Format,  # noqa: A002
    rows: Iterator[Row],
    *,
    lang: str | None = "en",
    pairing: Pairing = "best_worst",
) -> SourceReading:
    skipped: Counter[str] = Counter()
    found: Iterator[PreferencePair | str]
    match format:
        case "hh-rlhf":
            found = read_hh(rows)
        case "oasst":
            found = read_oasst(rows, lang=lang, pairing=pairing, skipped=skipped)
        case "preference":
            found = read_preferences(rows)
        case "prompts":
            found = read_prompts(rows)
    pairs: list[PreferencePair] = []
    dropped: Counter[str] = Counter()
    for item in found:
        if isinstance(item, str):
            dropped[item] += 1
        else:
            pairs.append(item)
    if not pairs:
        reasons = ", ".join(f"{reason} {n}" for reason, n in (dropped + skipped).most_common())
        raise DataError(f"{path}: no row makes a pair ({reasons}); is its format {format}?")
    return SourceReading(
        pairs=pairs,
        rows=len(pairs) + dropped.total(),
        dropped=dict(sorted(dropped.items())),
        identity=None,
        messages_skipped=dict(sorted(skipped.items())),
    )


def _detect(row: Row) -> Format:
    """Tell the format of a table from its first row."""
    columns = row.columns
    if {"chosen", "rejected"} <= columns.keys():
        is_implicit = "prompt" not in columns and isinstance(columns["chosen"], str)
        return "hh-rlhf" if is_implicit else "preference"
    if "message_id" in columns or isinstance(columns.get("prompt"), dict):
        return "oasst"
    if "prompt" in columns:
        return "prompts"
    raise row.error(
        f"columns of no known format ({', '.join(map(repr, columns)) or 'none'}); expected chosen "
        "and rejected, with or without prompt, a tree of messages, or prompt alone"
    )


def _write_world(source: SyntheticSource) -> SourceReading:
    from dsteer.data.synthetic import World

    pairs = World(source.seed, source.styled).pairs(
        source.conversations,
        axes=source.axes,
        topics=source.topics,
        label_noise=source.label_noise,
        differ=source.differ,
        switch=source.switch,
    )
    settings = source.model_dump(exclude={"use"}, exclude_none=True, mode="json")
    return SourceReading(
        pairs=[replace(pair, conversation=conversation_key(pair.prompt)) for pair in pairs],
        rows=len(pairs),
        dropped={},
        identity=f"synthetic:{hash_json(settings)}",
    )
