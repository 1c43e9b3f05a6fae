"""Prompts, answers and preference pairs of the synthetic world, all drawn from a seed."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from random import Random
from types import MappingProxyType
from typing import Final, Literal, TypeVar

from dsteer.data.contrast import ContrastPair
from dsteer.data.synthetic import axes as wording
from dsteer.data.synthetic.axes import AXES, Axis
from dsteer.data.synthetic.topics import (
    CIRCUMSTANCES,
    CONTEXTS,
    FOLLOW_UPS,
    OPEN_WORDS,
    PLURALS_WITHOUT_S,
    QUESTIONS,
    QUIET_WORDS,
    TOPICS,
    Aspect,
    Topic,
    TopicSplit,
)
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, did_you_mean

T = TypeVar("T")

TopicChoice = Literal["all", "seen", "held_out"] | Sequence[str]
Differ = Literal["all", "preferred"]
Draws = Callable[[str], Random]
"""The generator of one slot of an answer, by the name of the slot (axis, pole and place)."""

POLITE: Final[Mapping[str, float]] = MappingProxyType({"polite": 1.0})

_AXES: Final = {axis.name: axis for axis in AXES}
_TOPICS: Final = {topic.name: topic for topic in TOPICS}
_ASPECTS: Final[tuple[Aspect, ...]] = ("tools", "times", "places", "steps")
_QUIET_SHARE, _OPEN_SHARE = 0.25, 0.25
_TWO_TURN_SHARE = 0.2
_STYLE: Final = frozenset(_AXES) - {"brief", "declines"}
_CONTEXT_SHARE = _CIRCUMSTANCE_SHARE = 0.5
_MOST_REPEATS = 1000


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt and what the grammar knows of it.

    Attributes:
        text: hh-style dialogue that ends in a newline pair and ``Assistant:``.
        topic: name of the topic; split says whether it is a held-out one.
        aspect: what the last question asks for.
        entity: what it asks about, without the made-up word.
        word: the made-up word before the entity, or "".
        style: of a styled dialogue, the poles of its earlier answer that later answers keep.
        key: the same for equal texts, whatever the world; different for different texts.
    """

    text: str
    topic: str
    split: TopicSplit
    aspect: Aspect
    entity: str
    word: str
    style: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def rule_triggered(self) -> bool:
        """Whether the made-up word is on the quiet list, so that an answer may decline."""
        return self.word in QUIET_WORDS

    @property
    def earlier_turn(self) -> bool:
        """Whether the dialogue holds a turn before the last question."""
        return self.text.count("\n\nHuman:") > 1

    @property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


class World:
    """A seeded source of preference pairs whose preferences are known.

    An answer has a pole on each axis. A pair's two answers get random poles on all axes; the one of
    higher utility Σ weight · score is chosen, score being +1 at an axis's first pole and -1 at its
    second. Axes of weight 0 therefore vary independently of the label. In minimal pairs (``differ``
    is "preferred") the two answers share the poles of these axes and all wording of the others.

    The axis `declines` lives only on prompts that hold a word of the quiet list. Elsewhere all
    answers are at its pole "answers" and score -1; a generated text that declines there scores +1,
    as a needless refusal.

    In a styled world a share of the prompts hold an earlier turn, always a brief answer, whose
    poles on all axes but `brief` and `declines` are the style of that dialogue: later answers keep
    them, but for the preferred axes. So a model of the world's texts has to read the style from
    the dialogue. Without it (the default) an earlier turn says nothing about the answers.

    Every draw depends on the seed and its place alone: the same seed gives the same bytes, and the
    first k of n records or pairs are the k that a shorter call gives.

    Args:
        seed: of all draws.
        styled: share of styled dialogues among the prompts; 0: a plain world.

    Raises:
        DataError: a share outside [0, 1].
    """

    def __init__(self, seed: int = 0, styled: float = 0.0) -> None:
        if not 0 <= styled <= 1:
            raise DataError(f"styled is a share in [0, 1], not {styled}")
        self.seed = seed
        self.styled = styled

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The planted axes."""
        return AXES

    def topics(self, choice: TopicChoice = "all") -> tuple[str, ...]:
        """Names of topics: of one split, or those listed.

        Raises:
            DataError: for an unknown topic, or none.
        """
        return tuple(topic.name for topic in _choose(choice))

    def records(
        self, n: int, topics: TopicChoice = "all", axes: Mapping[str, float] | None = None
    ) -> list[PromptRecord]:
        """n prompts, all different; with ``axes`` those that n pairs of these weights are about.

        Raises:
            DataError: for an unknown topic, none, or n < 0; as `pair` for the axes.
        """
        weights = None if axes is None else _weights(axes)
        records = self._records(_choose(topics))
        usable = (r for r in records if weights is None or _varies(r, weights))
        return list(islice(usable, _size(n)))

    def prompts(self, n: int, topics: TopicChoice = "all") -> list[str]:
        """Texts of n prompts, all different, each ending where the answer begins.

        Raises:
            DataError: for an unknown topic, none, or n < 0.
        """
        return [record.text for record in self.records(n, topics)]

    def respond(self, record: PromptRecord, poles: Mapping[str, str], rng: Random) -> str:
        """Write an answer, beginning with a space, to a prompt.

        Args:
            poles: pole name by axis name; axes left out get a random pole, or that of
                the dialogue's style.
            rng: chooses wording, facts and the poles left out.

        Raises:
            DataError: for an unknown axis or pole, or for declining where no rule is triggered.
        """
        for name, pole in poles.items():
            axis = _axis(name)
            if pole not in axis.poles:
                raise DataError(
                    f"axis {name!r} has no pole {pole!r}{did_you_mean(pole, axis.poles)}"
                )
        if poles.get("declines") == "declines" and not record.rule_triggered:
            raise DataError(
                f"the prompt about {record.word} {record.entity}".replace("  ", " ")
                + " can't be declined: it holds no word of the quiet list; leave 'declines' out"
            )
        return _write_response(record, {**_draw_poles(record, rng), **poles}, lambda _: rng)

    def pair(
        self,
        record: PromptRecord,
        axes: Mapping[str, float] = POLITE,
        label_noise: float = 0.0,
        differ: Differ = "all",
    ) -> PreferencePair:
        """A preference pair on one prompt.

        The label noise doesn't touch the texts: at any level the two answers are the same ones.
        ``differ`` touches neither the label nor the poles of the preferred axes.

        Args:
            axes: preference weight by axis name; a negative one prefers the axis's second pole.
            label_noise: probability that chosen and rejected swap places.
            differ: "all" draws poles and wording anew for each answer; "preferred" gives minimal
                pairs, whose answers differ only in the words of axes with a weight.

        Raises:
            DataError: for an unknown axis, weights that are all zero or not finite, a label noise
                outside [0, 1], an unknown `differ`, or a prompt on which no preferred axis can
                vary.
        """
        weights = _weights(axes)
        _check_noise(label_noise)
        if differ not in ("all", "preferred"):
            raise DataError(f"differ is 'all' or 'preferred', not {differ!r}")
        if not _varies(record, weights):
            raise DataError(
                "only 'declines' has a weight, but the prompt triggers no rule; weigh another axis "
                "too, or use a record whose rule_triggered is true"
            )
        rng = Random(f"{self.seed}/pair/{record.key}")
        tie = 1e-9 * sum(abs(weight) for weight in weights.values())
        while True:
            poles = [_draw_poles(record, rng, free=weights) for _ in range(2)]
            utilities = [_utility(drawn, weights) for drawn in poles]
            if abs(utilities[0] - utilities[1]) > tie:
                break
        if differ == "preferred":
            poles[1] = {**poles[0], **{name: poles[1][name] for name in weights}}
            texts = [_write_response(record, drawn, self._slots(record)) for drawn in poles]
        else:
            texts = [_write_response(record, drawn, lambda _: rng) for drawn in poles]
        flipped = Random(f"{self.seed}/noise/{record.key}").random() < label_noise
        first_wins = (utilities[0] > utilities[1]) != flipped
        chosen, rejected = (0, 1) if first_wins else (1, 0)
        return PreferencePair(
            prompt=record.text,
            chosen=texts[chosen],
            rejected=texts[rejected],
            conversation=record.key,
            source=f"synthetic:{self.seed}",
            tags={
                "topic": record.topic,
                "split": record.split,
                "rule_triggered": str(record.rule_triggered).lower(),
                "axes": " ".join(f"{name}={weight:g}" for name, weight in weights.items()),
                "flipped": str(flipped).lower(),
                **{f"chosen.{name}": pole for name, pole in poles[chosen].items()},
                **{f"rejected.{name}": pole for name, pole in poles[rejected].items()},
            },
        )

    def pairs(
        self,
        n: int,
        axes: Mapping[str, float] = POLITE,
        topics: TopicChoice = "all",
        label_noise: float = 0.0,
        differ: Differ = "all",
        switch: Sequence[Mapping[str, float]] | None = None,
    ) -> list[PreferencePair]:
        """n preference pairs on different prompts; see `pair`.

        With ``switch`` each group of prompts has weights of its own, and ``axes`` say nothing: the
        k groups take the world's topics in turn, so that a prompt alone tells its group. The tag
        ``axes`` names it.

        Prompts on which no preferred axis can vary are passed over. Tags (all strings): topic,
        split, rule_triggered, axes, flipped, and ``chosen.<axis>`` and ``rejected.<axis>``, the
        poles of the two answers.

        Raises:
            DataError: as `pair` and `records`; fewer than two groups, two that prefer the same, or
                a group without a topic.
        """
        _check_noise(label_noise)
        if switch is None:
            weights = _weights(axes)
            found = [(record, weights) for record in self.records(n, topics, weights)]
        else:
            by_topic = _switched(switch, self.topics(topics))
            drawn = ((r, by_topic[r.topic]) for r in self._records(_choose(topics)))
            usable = ((record, weights) for record, weights in drawn if _varies(record, weights))
            found = list(islice(usable, _size(n)))
        return [
            replace(self.pair(record, weights, label_noise, differ), row=row)
            for row, (record, weights) in enumerate(found)
        ]

    def contrast(self, record: PromptRecord, axis: str) -> ContrastPair:
        """Two dialogues that differ in one answer, on one axis alone, and end where it shows next.

        Each holds the prompt, an answer at the axis's first (positive) or second pole with the same
        words otherwise, a follow-up question on the same topic, and the beginning of an answer in
        the same style, up to the first word that tells the poles apart. So the last state of both
        is the one from which a model of a styled world decides on the pole.

        Raises:
            DataError: for an unknown axis, or for `declines` where no rule is triggered.
        """
        weights = {_axis(axis).name: 1.0}
        pair = self.pair(record, weights, differ="preferred")
        rng, topic = Random(f"{self.seed}/contrast/{record.key}"), _TOPICS[record.topic]
        other = _pick([entity for entity in topic.entities if entity != record.entity], rng)
        after = replace(
            record,
            aspect=_pick(_ASPECTS, rng),
            entity=other,
            word=record.word if axis == "declines" else "",
            style={name: pair.tags[f"chosen.{name}"] for name in _STYLE},
        )
        asked = f"{_pick(FOLLOW_UPS, rng)} {_write_question(topic, after, rng)}"
        after = replace(after, text=f"\n\nHuman: {asked}\n\nAssistant:")
        answers = self.pair(after, weights, differ="preferred")
        ending = after.text + _common_words(str(answers.chosen), str(answers.rejected))
        return ContrastPair(
            f"{record.text}{pair.chosen}{ending}",
            f"{record.text}{pair.rejected}{ending}",
            {"axis": axis, "conversation": record.key, "topic": record.topic},
        )

    def score(self, text: str, axis: str) -> float:
        """Score the first turn of any answer on one axis, in [-1, 1]; see `axes.score`.

        Raises:
            DataError: for an unknown axis.
        """
        return wording.score(text, _axis(axis).name)

    def scores(self, text: str) -> dict[str, float]:
        """Score the first turn of any answer on every axis."""
        return {axis.name: wording.score(text, axis.name) for axis in AXES}

    def _slots(self, record: PromptRecord) -> Draws:
        """Seed each slot by itself, so that a longer answer shifts no draw of another slot."""
        return lambda slot: Random(f"{self.seed}/slot/{record.key}/{slot}")

    def _records(self, topics: tuple[Topic, ...]) -> Iterator[PromptRecord]:
        """Yield prompts without end, each once."""
        names = ",".join(topic.name for topic in topics)
        seen: set[str] = set()
        repeats = 0
        for index in count():
            rng = Random(f"{self.seed}/prompt/{names}/{index}")
            record = _write_prompt(topics, rng, self.styled)
            if record.text in seen:
                repeats += 1
                if repeats > _MOST_REPEATS:
                    raise DataError(
                        f"the synthetic world has no more than {len(seen)} different prompts about "
                        f"{names}; ask for fewer or allow more topics"
                    )
                continue
            repeats = 0
            seen.add(record.text)
            yield record


# ---------------------------------------------------------------------------------- arguments


def _axis(name: str) -> Axis:
    if name not in _AXES:
        raise DataError(f"unknown preference axis {name!r}{did_you_mean(name, _AXES)}")
    return _AXES[name]


def _weights(axes: Mapping[str, float]) -> dict[str, float]:
    """The axes with a weight other than 0."""
    for name, weight in axes.items():
        _axis(name)
        if not math.isfinite(weight):
            raise DataError(f"preference axis {name!r} needs a finite weight, not {weight}")
    weights = {name: float(weight) for name, weight in axes.items() if weight}
    if not weights:
        raise DataError(
            f"no preference axis has a weight in {dict(axes)}: give at least one that is not 0, "
            "such as {'polite': 1.0}"
        )
    return weights


def _switched(
    switch: Sequence[Mapping[str, float]], topics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The weights of each topic: group g of k has every k-th topic from the g-th on."""
    groups = [_weights(axes) for axes in switch]
    if len(groups) < 2:
        raise DataError(
            f"switch has {len(groups)} group of prompts: give two or more, or axes, which hold on "
            "every prompt"
        )
    for number, group in enumerate(groups):
        if group in groups[:number]:
            raise DataError(
                f"two groups of switch prefer the same, {group}: the group of a pair is known by "
                "its weights; join them, or change one"
            )
    chosen = {name: number % len(groups) for number, name in enumerate(_TOPICS) if name in topics}
    missing = set(range(len(groups))) - set(chosen.values())
    if missing:
        raise DataError(
            f"switch has {len(groups)} groups, but {len(chosen)} topics leave group "
            f"{min(missing)} without a prompt; give fewer groups or more topics"
        )
    return {name: groups[number] for name, number in chosen.items()}


def _check_noise(label_noise: float) -> None:
    if not 0 <= label_noise <= 1:
        raise DataError(f"label_noise is a probability in [0, 1], not {label_noise}")


def _size(n: int) -> int:
    if n < 0:
        raise DataError(f"can't write {n} synthetic prompts; ask for 0 or more")
    return n


def _choose(choice: TopicChoice) -> tuple[Topic, ...]:
    if isinstance(choice, str):
        if choice not in ("all", "seen", "held_out"):
            raise DataError(
                f"topics {choice!r} is neither 'all', 'seen' nor 'held_out'; list single topics as "
                f"[{choice!r}]"
            )
        return tuple(topic for topic in TOPICS if choice in ("all", topic.split))
    for name in choice:
        if name not in _TOPICS:
            raise DataError(f"unknown topic {name!r}{did_you_mean(name, _TOPICS)}")
    if not choice:
        raise DataError("the list of topics is empty; name at least one, or 'all'")
    return tuple(_TOPICS[name] for name in dict.fromkeys(choice))


# ---------------------------------------------------------------------------------- preference


def _varies(record: PromptRecord, weights: Mapping[str, float]) -> bool:
    """Whether two answers can differ in utility."""
    return record.rule_triggered or any(name != "declines" for name in weights)


def _common_words(a: str, b: str) -> str:
    """What both texts begin with, up to the end of a word."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    cut_inside = a[same : same + 1].isalnum() or b[same : same + 1].isalnum()
    return (re.sub(r"\w+$", "", a[:same]) if cut_inside else a[:same]).rstrip()


def _draw_poles(record: PromptRecord, rng: Random, free: Container[str] = ()) -> dict[str, str]:
    """Random poles, but for those of the dialogue's style; axes that are ``free`` of it vary."""
    poles = {axis.name: axis.poles[rng.random() < 0.5] for axis in AXES}
    poles |= {name: pole for name, pole in record.style.items() if name not in free}
    if not record.rule_triggered:
        poles["declines"] = "answers"
    return poles


def _utility(poles: Mapping[str, str], weights: Mapping[str, float]) -> float:
    """Σ weight · score of an answer with these poles."""
    return sum(w if poles[name] == _AXES[name].poles[0] else -w for name, w in weights.items())


# ---------------------------------------------------------------------------------- grammar


def _pick(options: Sequence[T], rng: Random) -> T:
    """One option. `random()` alone has a sequence that Python guarantees across versions."""
    return options[int(rng.random() * len(options))]


def _take(options: Sequence[T], k: int, rng: Random) -> list[T]:
    """k different options."""
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(k)]


def _write_prompt(topics: tuple[Topic, ...], rng: Random, styled: float) -> PromptRecord:
    topic = _pick(topics, rng)
    earlier, entity = _take(topic.entities, 2, rng)
    draw = rng.random()
    word = ""
    if draw < _QUIET_SHARE:
        word = _pick(QUIET_WORDS, rng)
    elif draw < _QUIET_SHARE + _OPEN_SHARE:
        word = _pick(OPEN_WORDS, rng)
    aspect = _pick(_ASPECTS, rng)
    history = context = ""
    style: Mapping[str, str] = {}
    if rng.random() < (styled or _TWO_TURN_SHARE):
        asked = _pick(_ASPECTS, rng)
        before = PromptRecord("", topic.name, topic.split, asked, earlier, "")
        poles = {**_draw_poles(before, rng), "brief": "brief"}
        if styled:
            style = {name: pole for name, pole in poles.items() if name in _STYLE}
        answer = _write_response(before, poles, lambda _: rng)
        question = _write_question(topic, before, rng)
        history = f"\n\nHuman: {question}\n\nAssistant:{answer}"
        context = _pick(FOLLOW_UPS, rng) + " "
    elif rng.random() < _CONTEXT_SHARE:
        context = _pick(CONTEXTS, rng).format(topic=topic.name) + " "
    draft = PromptRecord("", topic.name, topic.split, aspect, entity, word, style)
    question = _write_question(topic, draft, rng)
    return replace(draft, text=f"{history}\n\nHuman: {context}{question}\n\nAssistant:")


def _write_question(topic: Topic, record: PromptRecord, rng: Random) -> str:
    question = _pick(QUESTIONS[record.aspect], rng)
    circumstance = ""
    if rng.random() < _CIRCUMSTANCE_SHARE:
        circumstance = f" {_pick(CIRCUMSTANCES, rng)}"
    end = "." if question.startswith("Tell") else "?"
    verb = topic.verbs.get(record.aspect, "")
    return question.format(verb=verb, e=_thing(record)) + circumstance + end


def _thing(record: PromptRecord) -> str:
    return f"{record.word} {record.entity}".strip()


def _write_response(record: PromptRecord, poles: Mapping[str, str], draws: Draws) -> str:
    """Opening, advice and closing, each worded by the poles."""

    def word(axis: str, wordings: Sequence[tuple[str, ...]], place: str = "") -> str:
        side = _AXES[axis].poles.index(poles[axis])
        return _pick(wordings[side], draws(f"{axis}/{poles[axis]}/{place}"))

    end = ".!"[poles["enthusiastic"] == "enthusiastic"]
    declines = poles["declines"] == "declines"
    advice = _write_advice(record, declines=declines, rng=draws("advice"))
    if poles["brief"] == "brief":
        advice = advice[:1]
    ordinals = wording.ORDINALS[poles["numbered"] != "numbered"]
    subject = word("personal", wording.SUBJECTS)
    sentences = [word("polite", wording.OPENINGS) + end]
    for number, phrase in enumerate(advice):
        clause = f"{subject} {word('hedged', wording.MODALS, f'modal {number}')} {phrase}"
        if number == 0:
            clause = f"{word('hedged', wording.ADVERBS, 'adverb')} {clause}"
            clause += f", {word('sourced', wording.SOURCES)}"
        if poles["numbered"] == "numbered":
            clause = clause[0].upper() + clause[1:]
        sentences.append(f"{ordinals[number]} {clause}{end}")
    interjection = word("enthusiastic", wording.INTERJECTIONS)
    closing = word("asking", wording.CLOSINGS)
    sentences.append(f"{interjection}, {closing}{'?' if poles['asking'] == 'asking' else end}")
    return " " + " ".join(sentences)


def _write_advice(record: PromptRecord, *, declines: bool, rng: Random) -> list[str]:
    """Three verb phrases, the first of which meets the question."""
    if declines:
        citation = _pick(wording.CITATIONS, rng).format(w=record.word)
        others = _take(wording.REDIRECTIONS, 2, rng)
        return [citation, *(o.format(topic=record.topic, e=record.entity) for o in others)]
    facts = _TOPICS[record.topic].facts
    asked = _pick(facts[record.aspect], rng)
    aspects = _take([aspect for aspect in _ASPECTS if aspect != record.aspect], 2, rng)
    others = [_pick(facts[aspect], rng) for aspect in aspects]
    later = [o.format(e=record.entity if " of {e}" in o else _pronoun(record)) for o in others]
    return [asked.format(e=_thing(record)), *later]


def _pronoun(record: PromptRecord) -> str:
    plural = record.entity.endswith("s") or record.entity in PLURALS_WITHOUT_S
    return "them" if plural else "it"
