"""What the stages share that change states token by token: texts, both models' states, and scores.

Every number compares KL(tuned‖edited base) with KL(tuned‖base) on given answers:
R = 1 − Σ KL(tuned‖edited) / Σ KL(tuned‖base), on all answer tokens, or on the first one where the
last prompt token alone is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.extract import PairedActivations, extract
from dsteer.activations.moments import open_streamed
from dsteer.activations.sites import ENCODER, FINAL_NORM, resolve_sites
from dsteer.behaviour.answers import Answers
from dsteer.behaviour.teacher_forced import Predictions, Scores, score_states
from dsteer.config import EditedConfig
from dsteer.data.jsonl import read_pairs
from dsteer.data.types import PreferencePair
from dsteer.geometry.intervals import Interval, bootstrap_ratio
from dsteer.geometry.logits import NOTHING
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair, Which
from dsteer.models.readout import Readout
from dsteer.progress import Reporter
from dsteer.steering.arms import Steering, steered_states
from dsteer.steering.edits import Edit, Tokens, edited_states
from dsteer.store import Json, read_json
from dsteer.training.examples import answered


@dataclass(frozen=True)
class Split:
    """Some pairs of a split, as both models see them.

    Attributes:
        name: the split.
        answers: the texts, chosen answers first.
        acts: both models' states of every token, at the sites that are edited and at final_norm.
        target: the tuned model's predictions.
        plain: scores of the base as it is (one arm).
    """

    name: str
    answers: Answers
    acts: PairedActivations
    target: Predictions
    plain: Scores

    def first_chosen(self, pairs: int) -> Split:
        """The chosen answers of the first so many pairs."""
        return self._first(pairs, 0)

    def first_rejected(self, pairs: int) -> Split:
        """The rejected answers of the first so many pairs, in place of the chosen ones."""
        return self._first(pairs, self.answers.pairs)

    def _first(self, pairs: int, start: int) -> Split:
        n = min(pairs, self.answers.pairs)
        texts = slice(start, start + n)
        answers = Answers(self.answers.texts[texts], n, self.answers.clusters[:n])
        target = Predictions(self.target.states[texts], self.target.readout)
        return Split(self.name, answers, self.acts.select(texts), target, self.plain.of(texts))


class Bench:
    """Reads splits and scores edits of the base. Both models are read once a split.

    Args:
        pair: the models.
        config: of the stage: how many pairs of each split, and how long.
        data: folder of the stage ``data``.
        template: how prompts are written, ``none`` or ``chat``.
        sites: the sites that are edited.
        seed: of bootstraps.
        reporter: shows progress.
    """

    def __init__(
        self,
        pair: ModelPair,
        config: EditedConfig,
        data: Path,
        template: str,
        sites: Sequence[str],
        seed: int,
        reporter: Reporter,
    ) -> None:
        self.pair, self.config, self.reporter, self.seed = pair, config, reporter, seed
        self._data, self._template = data, template
        named = resolve_sites([*sites, FINAL_NORM], pair.n_blocks, encoder=pair.encoder_decoder)
        self.sites = tuple(site for site in named if site != ENCODER)
        self.notes: list[str] = [*pair.notes]

    def split(
        self,
        name: str,
        pairs: int,
        *,
        chosen: bool = False,
        tokens: Tokens = "all",
        among: Callable[[PreferencePair], bool] | None = None,
    ) -> Split:
        """The first so many pairs of a split that have two answers.

        Args:
            name: fit, tune or test.
            pairs: how many at most.
            chosen: whether the chosen answers suffice.
            tokens: what will be changed: of ``prompt_last`` the first answer token is all that R
                needs, so with ``chosen`` no others are read.
            among: take these pairs alone.

        Raises:
            DataError: the split has no pair with two answers that fits.
        """
        tokenizer = self.pair.tokenizer_for(self._template)
        self.notes += [note for note in self.pair.notes if note not in self.notes]
        limits = (self.config.max_tokens + self.config.response_tokens, self.pair.max_positions)
        most = min(limit for limit in limits if limit is not None)
        given = [
            pair
            for pair in answered(read_pairs(self._data / f"{name}.jsonl"))
            if among is None or among(pair)
        ][:pairs]
        answers = Answers.read(
            given,
            tokenizer,
            max_tokens=most,
            response_tokens=1
            if chosen and tokens == "prompt_last"
            else self.config.response_tokens,
            encoder_decoder=self.pair.encoder_decoder,
            where=f"the {name} split",
        )
        if answers.left_out:
            self.notes.append(
                f"{answers.left_out} of {len(given)} {name} pairs were left out: their prompts "
                f"fill {most} tokens."
            )
        if chosen:
            answers = Answers(answers.texts[: answers.pairs], answers.pairs, answers.clusters)
        return self.read(name, answers)

    def splits(self, tokens: Tokens) -> dict[str, Split]:
        """The chosen answers of fit, tune and test, as many as the config says."""
        config = self.config
        sizes = {"fit": config.fit_pairs, "tune": config.tune_pairs, "test": config.pairs}
        return {
            name: self.split(name, size, chosen=True, tokens=tokens) for name, size in sizes.items()
        }

    def read(self, name: str, answers: Answers) -> Split:
        """Given answers, as both models see them.

        Args:
            name: what the split is called.
            answers: the texts.
        """
        acts = extract(
            self.pair, answers.texts, sites=self.sites, position="all", reporter=self.reporter
        )
        with self.pair.using("tuned") as model:
            target = predicted(acts, "tuned", Readout.of(model, vocabulary=self.pair.vocabulary))
        with self.pair.using("base") as model:
            width = acts.tuned[FINAL_NORM].shape[1]
            plain = score_states(
                steered_states(model, answers.texts, Steering.none(width)),
                1,
                answers.texts,
                Readout.of(model, vocabulary=self.pair.vocabulary),
                target,
            )
        return Split(name, answers, acts, target, plain)

    def score(
        self,
        model: Model,
        split: Split,
        edits: Sequence[Edit],
        tokens: Tokens,
        label: str = "edits",
    ) -> Scores:
        """Scores of the base under each edit.

        Args:
            model: the base.
            split: what is scored.
            edits: the changes.
            tokens: which tokens are changed.
            label: what progress is called.
        """
        return score_states(
            edited_states(model, split.acts, edits, tokens=tokens),
            len(edits),
            split.answers.texts,
            Readout.of(model, vocabulary=self.pair.vocabulary),
            split.target,
            reporter=self.reporter,
            label=label,
        )

    def recovered(self, split: Split, scores: Scores, tokens: Tokens) -> list[Interval | None]:
        """R of each edit on the chosen answers; None where there is nothing to recover."""
        kept, before = self.gains(split, scores, tokens)
        return [self.ratio(row, before, split) for row in kept]

    def gains(
        self, split: Split, scores: Scores, tokens: Tokens
    ) -> tuple[Float[Tensor, "e m"], Float[Tensor, " m"]]:
        """KL(tuned‖base) − KL(tuned‖edited) of each edit and pair, and KL(tuned‖base)."""
        part = split.answers.chosen
        after, before = kl_of(scores.of(part), tokens), kl_of(split.plain.of(part), tokens)[0]
        return before - after, before

    def ratio(
        self, above: Float[Tensor, " m"], below: Float[Tensor, " m"], split: Split
    ) -> Interval | None:
        """Σ above / Σ below over pairs, bootstrap over conversations; None of Σ below ≈ 0."""
        if float(below.abs().sum()) <= NOTHING * len(below):
            return None
        return bootstrap_ratio(
            above,
            below,
            split.answers.clusters,
            draws=self.config.bootstrap,
            confidence=self.config.confidence,
            seed=self.seed,
        )


def predicted(acts: PairedActivations, which: Which, readout: Readout) -> Predictions:
    """A model's predictions of the answers' tokens, from its stored states of every token."""
    states = acts.base if which == "base" else acts.tuned
    found = []
    for item, stop in zip(acts.encoded, acts.offsets[1:], strict=True):
        length = len(item.ids) - item.prompt_length
        found.append(states.rows(FINAL_NORM, stop - 1 - length, stop - 1))
    return Predictions(tuple(found), readout)


def kl_of(scores: Scores, tokens: Tokens) -> Float[Tensor, "a n"]:
    """KL(tuned‖·) of each answer: of its first token where one prompt token alone is changed."""
    return scores.kl_first if tokens == "prompt_last" else scores.kl


@dataclass(frozen=True)
class Place:
    """Where edits are made: a site, and the tokens."""

    site: str
    tokens: Tokens


def places(
    sites: Sequence[str],
    tokens: str,
    profile: Json,
    cosine: Json,
    last: str,
) -> list[Place]:
    """The places that a stage asks for; ``auto`` is what the profile chose on tune pairs.

    Args:
        sites: names, or ``auto``.
        tokens: which tokens, or ``auto``.
        profile: result of the stage ``profile``, or None.
        cosine: result of the stage ``cosine``, or None.
        last: the site that ``auto`` means where neither was run.
    """
    chosen: Mapping[str, str] = (profile or {}).get("chosen") or {}
    site = chosen.get("site") or (cosine or {}).get("chosen_site") or last
    kind = chosen.get("tokens", "prompt_last") if tokens == "auto" else tokens
    named = dict.fromkeys(site if name == "auto" else name for name in sites)
    return [Place(name, kind) for name in named]  # type: ignore[arg-type]


def json_of(interval: Interval | None) -> Json:
    """An interval as JSON; None where it is undefined."""
    return None if interval is None else interval.json()


def token_rows(
    split: Split, site: str, tokens: Tokens
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], list[str]]:
    """Base and tuned states of the tokens that are changed, up to those that predict an answer
    token, and the conversation of each row. float64."""
    base, tuned, keys = [], [], []
    for number, item in enumerate(split.answers.texts):
        start, stop = split.acts.offsets[number], split.acts.offsets[number + 1]
        last = stop - 1 - (len(item.ids) - item.prompt_length)  # token p - 1
        rows = {"prompt_last": (last, last + 1), "all": (start, stop - 1)}.get(
            tokens, (last, stop - 1)
        )
        base.append(split.acts.base.rows(site, *rows).double())
        tuned.append(split.acts.tuned.rows(site, *rows).double())
        keys += [split.answers.clusters[number % split.answers.pairs]] * (rows[1] - rows[0])
    return torch.cat(base), torch.cat(tuned), keys


def rows_of(
    stored: Path, split: Split, site: str, tokens: Tokens
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], list[str]]:
    """:func:`token_rows`; where the run has stored all of a split's states of just these tokens,
    those.

    Args:
        stored: folder of the stage ``activations``.
        split: pairs of the split.
        site: where.
        tokens: which tokens.
    """
    result = read_json(stored / "result.json")
    if (
        tokens != "prompt_last"
        or result["position"] != "prompt_last"
        or site not in result["sites"]
        or open_streamed(stored) is not None
    ):
        return token_rows(split, site, tokens)
    acts = PairedActivations.open(stored)
    start, stop = result["rows"][split.name]
    base, tuned = (states.rows(site, start, stop).double() for states in (acts.base, acts.tuned))
    return base, tuned, list(result["conversations"][split.name])
