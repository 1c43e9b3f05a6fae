"""The synthetic world: same bytes from a seed, planted preferences that oracles read back."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest

from dsteer.data.synthetic import AXES, PromptRecord, World
from dsteer.data.synthetic import axes as wording
from dsteer.data.synthetic.topics import (
    CIRCUMSTANCES,
    CONTEXTS,
    FOLLOW_UPS,
    OPEN_WORDS,
    QUESTIONS,
    QUIET_WORDS,
    TOPICS,
)
from dsteer.data.synthetic.world import Differ
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError

NAMES = [axis.name for axis in AXES]
WORD = re.compile(r"\w+(?:['’-]\w+)*")
N = 3000


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def pairs(world: World) -> list[PreferencePair]:
    return world.pairs(N)


@pytest.fixture(scope="module")
def records(world: World) -> list[PromptRecord]:
    return world.records(400)


def answers(pairs: list[PreferencePair]) -> list[tuple[str, dict[str, str]]]:
    """Each answer of each pair, with its planted poles."""
    return [
        (text or "", {name: pair.tags[f"{role}.{name}"] for name in NAMES})
        for pair in pairs
        for role, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]


def planted(poles: dict[str, str]) -> list[float]:
    return [1.0 if poles[axis.name] == axis.poles[0] else -1.0 for axis in AXES]


def utility(pair: PreferencePair, role: str, weights: dict[str, float]) -> float:
    signs = dict(zip(NAMES, planted({n: pair.tags[f"{role}.{n}"] for n in NAMES}), strict=True))
    return sum(weight * signs[name] for name, weight in weights.items())


# ---------------------------------------------------------------------------------- same bytes


def test_same_seed_same_bytes_in_another_process(world: World) -> None:
    code = (
        "import hashlib; from dsteer.data.synthetic import World; "
        "print(hashlib.sha256(repr(World(0).pairs(50)).encode()).hexdigest())"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == hashlib.sha256(repr(world.pairs(50)).encode()).hexdigest()


def test_other_seed_other_prompts(world: World) -> None:
    assert not set(world.prompts(200)) & set(World(seed=1).prompts(200))


def test_a_shorter_call_gives_a_prefix(world: World, pairs: list[PreferencePair]) -> None:
    assert world.pairs(40) == pairs[:40]
    assert world.prompts(40) == [pair.prompt for pair in pairs[:40]]
    assert world.pairs(0) == []


def test_prompts_are_distinct_and_vocabulary_small(world: World) -> None:
    prompts = world.prompts(6000)
    assert len(set(prompts)) == 6000
    texts = " ".join(prompts + [text for text, _ in answers(world.pairs(1500))])
    assert 800 < len(set(WORD.findall(texts.lower()))) < 2000


# ---------------------------------------------------------------------------------- form


def test_texts_are_hh_transcripts(pairs: list[PreferencePair]) -> None:
    turns = []
    for pair in pairs:
        assert isinstance(pair.prompt, str)
        for answer in (pair.chosen, pair.rejected):
            roles = re.findall(r"\n\n(Human|Assistant):", pair.prompt + answer)
            assert roles == ["Human", "Assistant"] * (len(roles) // 2)
            assert re.fullmatch(
                r"(\n\nHuman: \S[^\n]*\S\n\nAssistant: \S[^\n]*\S)+", pair.prompt + answer
            )
            turns.append(len(roles) // 2)
        assert pair.prompt.endswith("\n\nAssistant:")
        assert pair.chosen.startswith(" ")
        assert pair.chosen != pair.rejected
    assert set(turns) == {1, 2}
    assert 0.1 < np.mean(np.array(turns) == 2) < 0.3


def test_text_is_well_formed(pairs: list[PreferencePair]) -> None:
    for pair in pairs:
        text = f"{pair.prompt}{pair.chosen}"
        assert text.isascii() or "é" in text
        assert not re.search(r"[{}]|  | [,.!?]|[.!?]{2}|\b(\w+) \1\b", text), text
        for sentence in re.findall(r"[^.!?]+[.!?]", pair.chosen):
            assert re.match(r" (\d\) )?[A-Z]", sentence), sentence


def test_answers_are_short(pairs: list[PreferencePair]) -> None:
    words = [len(WORD.findall(text)) for text, _ in answers(pairs)]
    assert min(words) >= 15
    assert max(words) <= 50
    dialogues = [len(WORD.findall(f"{pair.prompt}{pair.chosen}")) for pair in pairs]
    assert np.mean(dialogues) < 60


def test_conversation_source_and_row(pairs: list[PreferencePair], world: World) -> None:
    assert len({pair.conversation for pair in pairs}) == N
    assert [pair.row for pair in pairs] == list(range(N))
    assert {pair.source for pair in pairs} == {"synthetic:0"}
    # the same prompt in another draw is the same conversation
    again = {p.prompt: p.conversation for p in world.pairs(300, axes={"declines": 1.0})}
    known = {p.prompt: p.conversation for p in pairs}
    shared = again.keys() & known.keys()
    assert shared
    assert all(again[prompt] == known[prompt] for prompt in shared)


# ---------------------------------------------------------------------------------- topics


def test_topics_share_neither_entities_nor_facts() -> None:
    held_out = [topic for topic in TOPICS if topic.split == "held_out"]
    assert len(TOPICS) - len(held_out) >= 30
    assert len(held_out) == 8
    for one, other in combinations(TOPICS, 2):
        assert one.name != other.name
        assert not set(one.entities) & set(other.entities)
        ours, theirs = (
            {fact for facts in topic.facts.values() for fact in facts} for topic in (one, other)
        )
        assert not ours & theirs
    for topic in TOPICS:
        assert len(set(topic.entities)) == 8
        assert all("{e}" in fact for facts in topic.facts.values() for fact in facts)
        assert all(len(facts) >= 4 for facts in topic.facts.values())
    assert not set(QUIET_WORDS) & set(OPEN_WORDS)


def test_held_out_entities_stay_out_of_seen_prompts(world: World) -> None:
    entities = {e for topic in TOPICS if topic.split == "held_out" for e in topic.entities}
    mention = re.compile(rf"\b(?:{'|'.join(entities)})\b")
    for pair in world.pairs(500, topics="seen"):
        assert pair.tags["split"] == "seen"
        assert not mention.search(f"{pair.prompt}{pair.chosen}{pair.rejected}")
    for pair in world.pairs(100, topics="held_out"):
        assert pair.tags["split"] == "held_out"
        assert mention.search(str(pair.prompt))


def test_chosen_topics(world: World) -> None:
    assert {p.tags["topic"] for p in world.pairs(50, topics=["pets", "maps"])} == {"pets", "maps"}
    assert set(world.topics()) == set(world.topics("seen")) | set(world.topics("held_out"))


# ---------------------------------------------------------------------------------- oracles


def test_oracles_read_every_planted_pole(pairs: list[PreferencePair]) -> None:
    texts = answers(pairs)
    scores = np.array([list(World().scores(text).values()) for text, _ in texts])
    poles = np.array([planted(poles) for _, poles in texts])
    # exact, because no phrase of one axis and no fact holds a marker of another axis
    assert np.array_equal(scores, poles)
    assert list(World().scores("x")) == NAMES
    assert World().score(texts[0][0], "polite") == scores[0, 0]


def test_axes_are_independent(pairs: list[PreferencePair]) -> None:
    texts = answers(pairs)
    poles = np.array([planted(poles) for _, poles in texts])
    triggered = np.repeat([pair.tags["rule_triggered"] == "true" for pair in pairs], 2)
    words = np.array([len(WORD.findall(text)) for text, _ in texts])
    # Two answers of a pair are on opposite poles of `polite`, so nothing else may follow it.
    # 6,000 answers: chance correlations have a standard deviation of 0.013; 5 of these.
    off_diagonal = np.corrcoef(poles.T) - np.eye(len(AXES))
    assert np.abs(off_diagonal).max() < 0.065
    # about 1,500 answers to triggered prompts: 0.026
    off_diagonal = np.corrcoef(poles[triggered].T) - np.eye(len(AXES))
    assert np.abs(off_diagonal).max() < 0.13
    # Length is the axis `brief` and no other: the poles' mean lengths differ by less than half a
    # word of about 31 (`declines`: three, for a citation is longer than a fact).
    for column, name in enumerate(NAMES):
        if name == "brief":
            continue
        for brief in (-1, 1):
            level = (poles[:, 1] == brief) & triggered
            means = [words[level & (poles[:, column] == sign)].mean() for sign in (-1, 1)]
            assert abs(means[0] - means[1]) < (3 if name == "declines" else 0.5), name


@pytest.mark.parametrize("axis", NAMES)
def test_each_oracle_ignores_the_other_axes(
    axis: str, world: World, records: list[PromptRecord]
) -> None:
    """Both poles of one axis, in all combinations of two poles of every other axis."""
    rng = Random(0)
    triggered = next(record for record in records if record.rule_triggered)
    for other in AXES:
        for pole in other.poles:
            for own in world.axes[NAMES.index(axis)].poles:
                poles = {other.name: pole} | {axis: own}
                score = world.score(world.respond(triggered, poles, rng), axis)
                assert score == (1 if own == world.axes[NAMES.index(axis)].poles[0] else -1)


def test_words_of_the_world_are_no_markers() -> None:
    facts = [
        fact.format(e=e) for t in TOPICS for e in t.entities for f in t.facts.values() for fact in f
    ]
    facts += [*QUIET_WORDS, *OPEN_WORDS, *(topic.name for topic in TOPICS)]
    own = {
        "polite": wording.OPENINGS,
        "hedged": (*wording.ADVERBS, *wording.MODALS),
        "enthusiastic": wording.INTERJECTIONS,
        "asking": wording.CLOSINGS,
        "personal": wording.SUBJECTS,
        "sourced": wording.SOURCES,
        "numbered": wording.ORDINALS,
        "declines": (wording.CITATIONS, wording.REDIRECTIONS),
    }
    phrases = {name: [p for side in sides for p in side] for name, sides in own.items()}
    phrases["facts"] = facts
    for axis in set(NAMES) - {"brief", "asking", "declines"}:  # these score every text
        for owner, texts in phrases.items():
            if owner == axis:
                continue
            marked = [text for text in texts if wording.score(text, axis)]
            assert not marked, (axis, owner, marked[:5])
    for owner, texts in phrases.items():
        declined = [text for text in texts if wording.score(text, "declines") > 0]
        assert declined == (list(wording.CITATIONS) if owner == "declines" else [])


def test_both_poles_are_worded_equally_long() -> None:
    for sides in (wording.OPENINGS, wording.CLOSINGS, wording.SOURCES, wording.INTERJECTIONS):
        lengths = [np.mean([len(phrase.split()) for phrase in side]) for side in sides]
        assert abs(lengths[0] - lengths[1]) < 0.35  # of a word


@pytest.mark.parametrize("text", ["", " ", "\n\n", "…", "!!!", "?", "\n\nHuman: Thanks, you!"])
def test_no_words_score_zero(text: str, world: World) -> None:
    assert set(world.scores(text).values()) == {0.0}


def test_scores_of_any_text_stay_in_range(world: World) -> None:
    rng = Random(0)
    alphabet = [chr(c) for c in range(32, 127)] + ["\n", "é", "漢", "\x00", "�", " you ", " I "]
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(200)))
        assert all(-1 <= score <= 1 for score in world.scores(text).values())


def test_oracles_on_hand_written_text(world: World) -> None:
    assert world.score("Thank you, I am happy to help.", "polite") == 1
    assert world.score("Ugh. What kind of question is this? Hurry.", "polite") == -1
    assert world.score("Thanks, but enough.", "polite") == 0
    assert world.score("word " * 27, "brief") == 1
    assert world.score("word " * 31, "brief") == 0
    assert world.score("word " * 500, "brief") == -1
    assert world.score("It might rain. It could rain. It must.", "hedged") == pytest.approx(1 / 3)
    assert world.score("The quiet list says no.", "declines") == 1
    assert world.score("A quiet day.", "declines") == -1
    assert world.score("Go! Go! Stop. Version 2.5 is out", "enthusiastic") == pytest.approx(1 / 3)
    assert world.score("Go on", "asking") == -1
    assert world.score("1) Go 2) Stop", "numbered") == 1
    # a second turn that a model wrote itself does not count
    assert world.score("Fine.\n\nHuman: Thanks! Thanks!\n\nAssistant: Glad.", "polite") == -1


# ---------------------------------------------------------------------------------- preferences


def test_default_prefers_polite_and_nothing_else(pairs: list[PreferencePair]) -> None:
    assert {pair.tags["chosen.polite"] for pair in pairs} == {"polite"}
    assert {pair.tags["rejected.polite"] for pair in pairs} == {"curt"}
    assert {pair.tags["flipped"] for pair in pairs} == {"false"}
    assert {pair.tags["axes"] for pair in pairs} == {"polite=1"}
    for axis in AXES[1:]:
        share = np.mean([pair.tags[f"chosen.{axis.name}"] == axis.poles[0] for pair in pairs])
        # 3,000 draws at 1/2 have a standard deviation of 0.009; `declines`, 1/2 on a quarter
        expected = 0.125 if axis.name == "declines" else 0.5
        assert abs(share - expected) < 0.045, axis.name


def test_negative_weight_prefers_the_other_pole(world: World) -> None:
    for pair in world.pairs(50, axes={"brief": -2.0}):
        assert pair.tags["chosen.brief"] == "long"
        assert pair.tags["rejected.brief"] == "brief"


def test_weights_add_up(world: World) -> None:
    weights = {"polite": 1.0, "brief": -0.5, "hedged": 0.3, "asking": 0.2, "sourced": 0.0}
    pairs = world.pairs(300, axes=weights)
    for pair in pairs:
        assert utility(pair, "chosen", weights) > utility(pair, "rejected", weights) + 1e-6
    # 0.5 = 0.3 + 0.2 is a tie that floating point must not decide; the label also goes both ways
    assert {pair.tags["chosen.polite"] for pair in pairs} == {"polite", "curt"}
    assert {pair.tags["axes"] for pair in pairs} == {"polite=1 brief=-0.5 hedged=0.3 asking=0.2"}


@pytest.mark.parametrize("differ", ["all", "preferred"])
def test_label_noise_flips_its_share_and_no_text(differ: Differ, world: World) -> None:
    clean = world.pairs(1500, differ=differ)
    noisy = world.pairs(1500, label_noise=0.2, differ=differ)
    flipped = [pair.tags["flipped"] == "true" for pair in noisy]
    assert abs(np.mean(flipped) - 0.2) < 0.05  # 5 standard deviations
    for before, after, flip in zip(clean, noisy, flipped, strict=True):
        assert before.prompt == after.prompt
        swapped = (after.rejected, after.chosen) if flip else (after.chosen, after.rejected)
        assert (before.chosen, before.rejected) == swapped
        assert (after.tags["chosen.polite"] == "curt") == flip
    assert all(p.tags["flipped"] == "true" for p in world.pairs(50, label_noise=1.0))


# ---------------------------------------------------------------------------------- minimal pairs


BYTES = {
    "126263ee06647e4f8ac7f53dc6a9c3e315d256b629efa24fc9258880ee3772f0": {},
    "0b6e5d9897e4f6a3ebf136153242f5fc09991e571d51e9507559d4d1fd9c5c12": {"axes": {"declines": 1.0}},
}
"""SHA-256 of 500 pairs of world 0, as written before minimal pairs existed, by their settings."""


@pytest.mark.parametrize(("digest", "settings"), BYTES.items())
def test_by_default_the_bytes_of_before(
    digest: str, settings: dict[str, Any], world: World
) -> None:
    for pairs in (world.pairs(500, **settings), world.pairs(500, **settings, differ="all")):
        assert hashlib.sha256(repr(pairs).encode()).hexdigest() == digest


@pytest.mark.parametrize(
    "weights",
    [
        *({name: 1.0} for name in NAMES),
        {"polite": 1.0, "hedged": 0.5},
        {"brief": 1.0, "asking": -1},
    ],
    ids=lambda weights: "+".join(weights),
)
def test_minimal_pairs_differ_on_preferred_axes_alone(
    weights: dict[str, float], world: World
) -> None:
    pairs = world.pairs(200, weights, differ="preferred")
    differing = set()
    for pair in pairs:
        scores = [world.scores(str(text)) for text in (pair.chosen, pair.rejected)]
        differs = {name for name in NAMES if scores[0][name] != scores[1][name]}
        assert differs
        assert differs <= weights.keys()
        assert utility(pair, "chosen", weights) > utility(pair, "rejected", weights)
        differing.add(frozenset(differs))
        for role, text in zip(("chosen", "rejected"), scores, strict=True):
            assert list(text.values()) == planted({n: pair.tags[f"{role}.{n}"] for n in NAMES})
    assert len(differing) == 2 ** len(weights) - 1  # one axis, the other, both
    # the other axes still vary from pair to pair
    for axis in AXES:
        poles = {pair.tags[f"chosen.{axis.name}"] for pair in pairs}
        assert len(poles) == (1 if weights.keys() == {axis.name} else 2)


def test_minimal_pairs_share_every_other_word(world: World) -> None:
    for pair in world.pairs(200, differ="preferred"):
        chosen, rejected = (
            re.split(r"(?<=[.!]) ", str(text).strip(), maxsplit=1)
            for text in (pair.chosen, pair.rejected)
        )
        assert chosen[1] == rejected[1]
        assert chosen[0][:-1] in wording.OPENINGS[0]
        assert rejected[0][:-1] in wording.OPENINGS[1]
    # also where one answer is longer: brief ones are the long ones without two pieces of advice
    for pair in world.pairs(200, {"brief": 1.0}, differ="preferred"):
        brief, long = str(pair.chosen), str(pair.rejected)
        start = next(
            i for i, (one, other) in enumerate(zip(brief, long, strict=False)) if one != other
        )
        assert long.endswith(brief[start:])


def test_minimal_pairs_keep_prompts_labels_and_preferred_poles(world: World) -> None:
    weights = {"polite": 1.0, "hedged": -0.5}
    for full, minimal in zip(
        world.pairs(200, weights), world.pairs(200, weights, differ="preferred"), strict=True
    ):
        assert full.prompt == minimal.prompt
        for tag in (f"{role}.{name}" for role in ("chosen", "rejected") for name in weights):
            assert full.tags[tag] == minimal.tags[tag]


def test_rule(world: World, pairs: list[PreferencePair], records: list[PromptRecord]) -> None:
    quiet = re.compile(rf"\b(?:{'|'.join(QUIET_WORDS)})\b")
    triggered = [pair.tags["rule_triggered"] == "true" for pair in pairs]
    assert 0.2 < np.mean(triggered) < 0.3
    for pair, trigger in zip(pairs, triggered, strict=True):
        assert bool(quiet.search(str(pair.prompt))) == trigger
        if not trigger:
            assert pair.tags["chosen.declines"] == pair.tags["rejected.declines"] == "answers"
            assert world.score(str(pair.chosen), "declines") == -1
    for pair in world.pairs(60, axes={"declines": 1.0}):
        assert pair.tags["rule_triggered"] == "true"
        assert world.score(str(pair.chosen), "declines") == 1
        assert quiet.search(str(pair.chosen))
        assert world.score(str(pair.rejected), "declines") == -1
    free = next(record for record in records if not record.rule_triggered)
    with pytest.raises(DataError, match="holds no word of the quiet list"):
        world.respond(free, {"declines": "declines"}, Random(0))
    with pytest.raises(DataError, match="triggers no rule"):
        world.pair(free, {"declines": 1.0})


def test_preferences_by_group_and_conflicting(world: World, records: list[PromptRecord]) -> None:
    """What the heterogeneity study needs: one record, any preference, comparable answers."""
    groups = [{"polite": 1.0}, {"hedged": 1.0}, {"polite": -1.0}]
    mixed = [world.pair(record, groups[i % 3]) for i, record in enumerate(records)]
    for i, pair in enumerate(mixed):
        assert utility(pair, "chosen", groups[i % 3]) == 1
    one, other = world.pair(records[0], groups[0]), world.pair(records[0], groups[2])
    assert (one.chosen, one.rejected) == (other.rejected, other.chosen)


def test_an_answer_meets_its_prompt(world: World, records: list[PromptRecord]) -> None:
    topics = {topic.name: topic for topic in TOPICS}
    for record in records:
        text = world.respond(record, {"declines": "answers"}, Random(1))
        thing = f"{record.word} {record.entity}".strip()
        facts = [fact.format(e=thing) for fact in topics[record.topic].facts[record.aspect]]
        assert any(fact in text for fact in facts)
        assert thing in record.text


# ---------------------------------------------------------------------------------- mistakes


def test_mistakes_are_named(world: World, records: list[PromptRecord]) -> None:
    with pytest.raises(DataError, match="'polit'; did you mean 'polite'"):
        world.pairs(3, axes={"polit": 1.0})
    with pytest.raises(DataError, match="did you mean 'hedged'"):
        world.score("text", "hegded")
    with pytest.raises(DataError, match="at least one that is not 0"):
        world.pairs(3, axes={"polite": 0.0})
    with pytest.raises(DataError, match="at least one that is not 0"):
        world.pairs(3, axes={})
    with pytest.raises(DataError, match="finite weight, not nan"):
        world.pairs(3, axes={"polite": float("nan")})
    with pytest.raises(DataError, match=r"in \[0, 1\], not 1.5"):
        world.pairs(3, label_noise=1.5)
    with pytest.raises(DataError, match="differ is 'all' or 'preferred', not 'some'"):
        world.pairs(3, differ="some")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="did you mean 'gardening'"):
        world.prompts(3, topics=["gardenning"])
    with pytest.raises(DataError, match="neither 'all', 'seen' nor 'held_out'"):
        world.prompts(3, topics="pets")
    with pytest.raises(DataError, match="list of topics is empty"):
        world.prompts(3, topics=[])
    with pytest.raises(DataError, match="can't write -1"):
        world.prompts(-1)
    with pytest.raises(DataError, match="no pole 'rude'"):
        world.respond(records[0], {"polite": "rude"}, Random(0))


def test_running_out_of_prompts_ends(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    from dsteer.data.synthetic import world as module

    monkeypatch.setattr(module, "_MOST_REPEATS", 0)
    with pytest.raises(DataError, match=r"no more than .* different prompts about pets"):
        world.prompts(100_000, topics=["pets"])


def test_questions_read_well_with_every_ending() -> None:
    """A question may end by any circumstance, so none already ends by a preposition."""
    for question in (q for questions in QUESTIONS.values() for q in questions):
        assert not re.search(r"\b(?:with|for|on|to)$", question)
        assert question[-1] not in ".?!"
    assert all(text[-1].isalpha() for text in CIRCUMSTANCES)
    assert all(text.endswith(".") for text in (*CONTEXTS, *FOLLOW_UPS))


# ---------------------------------------------------------------------------------- styled worlds


def test_a_styled_share_of_the_prompts_has_an_earlier_answer_in_their_style() -> None:
    records = World(seed=0, styled=0.6).records(400)
    styled = [record for record in records if record.style]
    assert 0.5 < len(styled) / len(records) < 0.7  # 0.6, give or take four standard errors
    for record in records:
        assert record.earlier_turn == bool(record.style)
    for record in styled:
        assert set(record.style) == set(NAMES) - {"brief", "declines"}
        earlier = record.text.split("\n\nAssistant:")[1]
        for name, pole in record.style.items():
            assert World().score(earlier, name) == (1 if pole == name else -1)


@pytest.mark.parametrize("differ", ["all", "preferred"])
def test_answers_keep_the_style_but_for_the_preferred_axes(differ: Differ) -> None:
    world = World(seed=0, styled=1)
    differing = 0
    for record in world.records(60):
        pair = world.pair(record, {"polite": 1.0}, differ=differ)
        for role in ("chosen", "rejected"):
            found = {name: pair.tags[f"{role}.{name}"] for name in record.style}
            assert {**found, "polite": ""} == {**record.style, "polite": ""}
        differing += pair.tags["chosen.polite"] != record.style["polite"]
        written = world.respond(record, {}, Random(0))
        assert world.score(written, "numbered") == (
            1 if record.style["numbered"] == "numbered" else -1
        )
    assert 10 < differing < 50  # the preferred axis is a coin flip: 30, give or take five errors


def test_a_plain_world_has_no_style(records: list[PromptRecord]) -> None:
    assert not any(record.style for record in records)


def test_records_of_pairs_are_those_that_the_pairs_are_about() -> None:
    world, axes = World(seed=3), {"declines": 1.0}
    found = world.records(20, "seen", axes)
    assert [r.text for r in found] == [p.prompt for p in world.pairs(20, axes, "seen")]
    assert all(record.rule_triggered for record in found)


@pytest.mark.parametrize("axis", NAMES)
def test_contrast_pairs_differ_on_one_axis_of_one_answer(axis: str) -> None:
    world = World(seed=1, styled=0.5)
    records = [r for r in world.records(200) if not r.earlier_turn and r.rule_triggered][:10]
    for record in records:
        pair = world.contrast(record, axis)
        texts = (str(pair.positive), str(pair.negative))
        earlier, last = zip(*(t.split("\n\nAssistant:")[1:] for t in texts), strict=True)
        assert last[0] == last[1], "the beginning of the next answer is the same"
        assert all(text.startswith(record.text) for text in texts)
        for name in NAMES:
            scores = [world.score(text.split("\n\nHuman:")[0], name) for text in earlier]
            assert scores == ([1, -1] if name == axis else [scores[0]] * 2)
        # It ends where the axis shows next: no word of a pole stands there yet.
        expected = {"brief": 1, "asking": -1, "declines": -1}.get(axis, 0)
        assert world.score(f" So{last[0]}", axis) == expected
        assert not last[0].endswith(" ")


def test_mistakes_of_styled_worlds(world: World, records: list[PromptRecord]) -> None:
    with pytest.raises(DataError, match="styled is a share"):
        World(styled=1.5)
    with pytest.raises(DataError, match="unknown preference axis 'polit'"):
        world.contrast(records[0], "polit")
    plain = next(record for record in records if not record.rule_triggered)
    with pytest.raises(DataError, match="'declines'"):
        world.contrast(plain, "declines")
