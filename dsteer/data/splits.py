"""Splits that share no conversation: train, fit, tune and test."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dsteer.config import SplitName, SplitSizes
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError

ORDER: tuple[SplitName, ...] = ("test", "tune", "fit", "train")
"""The order in which splits take conversations: what is reported is served first."""

_Copies = list[tuple[PreferencePair, Collection[SplitName]]]
"""One pair as it stands in several places, each with the splits that its source may feed."""


@dataclass(frozen=True)
class Splits:
    """Disjoint splits, and what became of the other pairs.

    Attributes:
        pairs: the pairs of each split, in an order that the seed fixes.
        duplicates: pairs whose texts another pair has too; one of each is kept.
        left_out: distinct pairs in no split, by reason: ``conversation_cut`` (the last conversation
            of a split was larger than the room left), ``source_not_allowed`` (another source put
            the conversation into a split that this pair's source may not feed), ``not_needed``
            (the splits that it may feed are full).
    """

    pairs: dict[SplitName, list[PreferencePair]]
    duplicates: int
    left_out: dict[str, int]


def split_pairs(
    pairs_by_source: Sequence[tuple[Sequence[PreferencePair], Collection[SplitName]]],
    sizes: SplitSizes,
    seed: int,
) -> Splits:
    """Deal conversations to test, tune, fit and train, in this order, until each is full.

    Conversations are dealt in the order of a seeded hash of their key, whatever their size, so
    long ones are neither favoured nor avoided, the order of rows and files has no effect, and new
    rows hardly move old ones. A split has exactly as many pairs as asked: its last conversation is
    cut if it doesn't fit, and the remainder is in no split. ``sizes.train = None`` takes the rest.

    Of pairs with equal texts one is kept, from the first source that may feed the split.

    Args:
        pairs_by_source: of each source its pairs and the splits that it may feed.
        sizes: pairs a split.
        seed: of the hash.

    Raises:
        DataError: too few pairs for the sizes.
    """
    conversations: dict[str, dict[str, _Copies]] = defaultdict(dict)
    total = 0
    for pairs, use in pairs_by_source:
        for pair in pairs:
            total += 1
            members = conversations[pair.conversation]
            members.setdefault(_shuffled(seed, _texts(pair)), []).append((pair, use))
    distinct = sum(map(len, conversations.values()))

    waiting = sorted(conversations, key=lambda key: _shuffled(seed, key))
    dealt: dict[SplitName, dict[str, PreferencePair]] = {}
    left_out: Counter[str] = Counter()
    for split in ORDER:
        size = getattr(sizes, split)
        taken: dict[str, PreferencePair] = {}
        passed = []
        for key in waiting:
            members = conversations[key]
            room = len(members) if size is None else size - len(taken)
            usable = _usable(members, split) if room else []
            if not usable:
                passed.append(key)
                continue
            taken.update(usable[:room])
            left_out["conversation_cut"] += len(usable[room:])
            left_out["source_not_allowed"] += len(members) - len(usable)
        dealt[split] = taken
        waiting = passed
    left_out["not_needed"] = sum(len(conversations[key]) for key in waiting)

    short = {
        split: size
        for split in ORDER
        if (size := getattr(sizes, split)) is not None and len(dealt[split]) < size
    }
    if short:
        wanted = {split: getattr(sizes, split) for split in ORDER if getattr(sizes, split)}
        needs = ", ".join(f"{split} {size}" for split, size in wanted.items())
        lacks = ", ".join(
            f"{split} gets {len(dealt[split])} of {size}" for split, size in short.items()
        )
        raise DataError(
            f"too few pairs: the splits need {sum(wanted.values())} ({needs}) and there are "
            f"{distinct} distinct ones in {len(conversations)} conversations, so {lacks}; "
            "lower data.splits, or add a source that may feed them"
        )
    return Splits(
        pairs={split: [dealt[split][order] for order in sorted(dealt[split])] for split in dealt},
        duplicates=total - distinct,
        left_out={reason: count for reason, count in sorted(left_out.items()) if count},
    )


def _texts(pair: PreferencePair) -> str:
    return json.dumps([pair.prompt, pair.chosen, pair.rejected])


def _shuffled(seed: int, text: str) -> str:
    """A sort key that puts texts into an order which depends on the seed and on nothing else."""
    return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()


def _usable(members: dict[str, _Copies], split: SplitName) -> list[tuple[str, PreferencePair]]:
    """Of each pair the first copy whose source may feed a split, in shuffled order."""
    usable: list[tuple[str, PreferencePair]] = []
    for order, copies in sorted(members.items()):
        allowed = [pair for pair, use in copies if split in use]
        usable.extend((order, pair) for pair in allowed[:1])
    return usable
