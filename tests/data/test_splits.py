from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsteer.config import SPLITS, SplitName, SplitSizes
from dsteer.data.splits import Splits, split_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError


def pair(conversation: object, number: object = 0, source: str = "a") -> PreferencePair:
    return PreferencePair(
        prompt=f"{conversation}/{number}",
        chosen="yes",
        rejected="no",
        conversation=str(conversation),
        source=source,
    )


def flat(splits: Splits) -> list[PreferencePair]:
    return [pair for pairs in splits.pairs.values() for pair in pairs]


sizes_of_conversations = st.lists(st.integers(1, 5), min_size=20, max_size=60)


@given(sizes_of_conversations, st.integers(0, 3), st.none() | st.integers(1, 4), st.randoms())
def test_disjoint_exact_and_independent_of_order(
    members: list[int], seed: int, train: int | None, shuffler: random.Random
) -> None:
    pairs = [pair(key, number) for key, size in enumerate(members) for number in range(size)]
    sizes = SplitSizes(train=train, fit=5, tune=2, test=3)
    splits = split_pairs([(pairs, SPLITS)], sizes, seed)

    for split, size in {"fit": 5, "tune": 2, "test": 3}.items():
        assert len(splits.pairs[split]) == size  # type: ignore[index]
    if train is not None:
        assert len(splits.pairs["train"]) == train
    homes = {(item.conversation, split) for split in SPLITS for item in splits.pairs[split]}
    assert len({conversation for conversation, _ in homes}) == len(homes)
    assert len(flat(splits)) + sum(splits.left_out.values()) == len(pairs)
    assert ("not_needed" in splits.left_out) <= (train is not None)

    mixed = list(pairs)
    shuffler.shuffle(mixed)
    assert split_pairs([(mixed, SPLITS)], sizes, seed) == splits


def test_the_seed_decides() -> None:
    pairs = [pair(key) for key in range(100)]
    sizes = SplitSizes(fit=20, tune=10, test=20)
    drawn = [split_pairs([(pairs, SPLITS)], sizes, seed).pairs["test"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_remainder_of_a_cut_conversation_is_in_no_split() -> None:
    pairs = [pair(key, number) for key in range(4) for number in range(4)]
    splits = split_pairs([(pairs, SPLITS)], SplitSizes(fit=3, tune=2, test=1), 0)
    assert {split: len(found) for split, found in splits.pairs.items()} == {
        "test": 1,
        "tune": 2,
        "fit": 3,
        "train": 4,
    }
    assert splits.left_out == {"conversation_cut": 3 + 2 + 1}


def test_long_conversations_are_neither_favoured_nor_avoided() -> None:
    # One conversation in ten has 5 pairs, the others 1. Over 300 seeds of a test split of about 14
    # conversations each, the share of long ones is 0.1 with a standard error of
    # sqrt(.1 * .9 / 4200) = 0.005; four of these are allowed.
    pairs = [pair(key, n) for key in range(200) for n in range(5 if key % 10 == 0 else 1)]
    dealt: Counter[bool] = Counter()
    for seed in range(300):
        splits = split_pairs([(pairs, SPLITS)], SplitSizes(fit=1, tune=1, test=20), seed)
        dealt.update(
            int(key) % 10 == 0 for key in {item.conversation for item in splits.pairs["test"]}
        )
    assert dealt[True] / dealt.total() == pytest.approx(0.1, abs=0.02)


def test_duplicates_are_removed_and_counted() -> None:
    pairs = [pair(key) for key in range(6)]
    copies = [replace(item, row=9, source="b") for item in pairs[:4]]
    swapped = replace(pairs[0], chosen="no", rejected="yes")  # another label is another pair
    splits = split_pairs(
        [(pairs, SPLITS), ([*copies, swapped], SPLITS)], SplitSizes(fit=1, tune=1, test=1), 0
    )
    assert splits.duplicates == 4
    assert len(flat(splits)) + sum(splits.left_out.values()) == 7
    assert {item.source for item in flat(splits)} == {"a"}


def test_a_source_feeds_only_the_splits_it_may() -> None:
    sources: list[tuple[list[PreferencePair], Collection[SplitName]]] = [
        ([pair(key, source="train") for key in range(50)], ("train",)),
        ([pair(key, 1, source="eval") for key in range(40, 70)], ("fit", "tune", "test")),
    ]
    splits = split_pairs(sources, SplitSizes(fit=10, tune=5, test=15), 3)
    for split in SPLITS:
        assert {item.source for item in splits.pairs[split]} == {
            "train" if split == "train" else "eval"
        }
    # All of the second source is dealt, so the ten shared conversations are not trained on.
    assert len(splits.pairs["train"]) == 40
    assert splits.left_out == {"source_not_allowed": 10}


def test_a_conversation_in_two_sources_never_leaks() -> None:
    for seed in range(20):
        sources: list[tuple[list[PreferencePair], Collection[SplitName]]] = [
            ([pair(key, source="a") for key in range(30)], SPLITS),
            ([pair(key, 1, source="b") for key in range(30)], ("fit", "test")),
        ]
        splits = split_pairs(sources, SplitSizes(fit=10, tune=4, test=10), seed)
        homes = {(item.conversation, split) for split in SPLITS for item in splits.pairs[split]}
        assert len({conversation for conversation, _ in homes}) == len(homes)


def test_of_copies_the_one_that_may_feed_the_split_is_taken() -> None:
    sources: list[tuple[list[PreferencePair], Collection[SplitName]]] = [
        ([pair(key, source="train") for key in range(9)], ("train",)),
        ([pair(key, source="eval") for key in range(9)], ("fit", "tune", "test")),
    ]
    splits = split_pairs(sources, SplitSizes(fit=2, tune=1, test=3), 0)
    assert splits.duplicates == 9
    assert {item.source for item in splits.pairs["test"]} == {"eval"}
    assert {item.source for item in splits.pairs["train"]} == {"train"}
    assert len(splits.pairs["train"]) == 3


def test_without_a_source_for_it_train_is_empty() -> None:
    pairs = [pair(key) for key in range(9)]
    splits = split_pairs([(pairs, ("fit", "tune", "test"))], SplitSizes(fit=2, tune=1, test=3), 0)
    assert splits.pairs["train"] == []
    assert splits.left_out == {"not_needed": 3}


def test_too_few_pairs() -> None:
    pairs = [pair(key % 5, key) for key in range(10)]
    with pytest.raises(DataError) as caught:
        split_pairs([(pairs, SPLITS)], SplitSizes(train=4, fit=8, tune=1, test=1), 0)
    message = str(caught.value)
    assert "the splits need 14 (test 1, tune 1, fit 8, train 4)" in message
    assert "there are 10 distinct ones in 5 conversations" in message
    assert "fit gets 6 of 8, train gets 0 of 4; lower data.splits" in message
    with pytest.raises(DataError, match="tune gets 0 of 1"):
        split_pairs([(pairs, ("fit", "test"))], SplitSizes(fit=1, tune=1, test=1), 0)
