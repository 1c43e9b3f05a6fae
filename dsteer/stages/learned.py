"""Learn vectors under the DPO loss, the base frozen, and hold them against v* and the tuned model.

Site, steered tokens, the step at which learning stops and the strengths of v* are chosen on tune
pairs; every number that is reported is of test pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.sites import ENCODER, FINAL_NORM, block_of, resolve_sites
from dsteer.behaviour.answers import Answers
from dsteer.behaviour.dial import POSITIONS
from dsteer.behaviour.teacher_forced import (
    Predictions,
    Scores,
    own_likelihoods,
    predictions,
    preference_match,
    score,
)
from dsteer.config import LearnedConfig
from dsteer.data.jsonl import read_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import MeasurementError
from dsteer.geometry.intervals import Interval, bootstrap_ratio, wilson
from dsteer.geometry.logits import NOTHING
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.intervene import Positions
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json
from dsteer.training.examples import answered
from dsteer.training.steering_vector import learn_vector

METRICS = ("reward_margin", "preference_accuracy", "loss", "kl_recovered", "kl_recovered_first",
           "kl_to_base")  # fmt: skip
"""What is measured of every vector; see :func:`_quantities`."""

COSINES = 1000
"""Random directions that make the null of the cosine with v*."""

_TIE = 1e-9


def run(context: StageContext) -> Json:
    """Choose, learn and measure; write each learned vector to ``vectors/{site}-{arm}``."""
    config = context.config.learned or LearnedConfig()
    vectors = SteeringVectorSet.load(context.input("vector") / "vectors.safetensors")
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    study = _Study(context, config, pair, vectors)
    result = study.result()
    draw_result("learned", result, context.folder)
    return result


# ---------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class _Quantity:
    """A metric of arms: Σ above / Σ below over pairs."""

    above: Tensor
    below: Tensor


@dataclass(frozen=True)
class _Place:
    """Where a vector is learned: the site, the steered tokens, and what v* recovers there."""

    site: str
    positions: Positions
    recovered: Mapping[Positions, float | None]


class _Study:
    """One stage, from the choice of the site to the result."""

    def __init__(
        self,
        context: StageContext,
        config: LearnedConfig,
        pair: ModelPair,
        vectors: SteeringVectorSet,
    ) -> None:
        self.context, self.config, self.pair, self.vectors = context, config, pair, vectors
        self.beta = context.config.reward_beta
        self.notes: list[str] = [*pair.notes]
        template = context.config.activations.template if context.config.activations else "none"
        self.tokenizer = pair.tokenizer_for(template)
        self.notes += [note for note in pair.notes if note not in self.notes]
        self.given: dict[str, list[PreferencePair]] = {
            split: answered(read_pairs(context.input("data") / f"{split}.jsonl"))
            for split in (config.split, "tune", "test")
        }
        self.tune, self.test = (
            self._texts("tune", config.tune_pairs),
            self._texts("test", config.pairs),
        )

    def _texts(self, split: str, count: int) -> Answers:
        """The first pairs of a split, those that fit."""
        limits = (self.config.max_length, self.pair.max_positions)
        limit = min(n for n in limits if n is not None)
        pairs = self.given[split][:count]
        found = Answers.read(
            pairs,
            self.tokenizer,
            max_tokens=limit,
            encoder_decoder=self.pair.encoder_decoder,
            where=f"stage learned: the {split} split",
        )
        if found.left_out:
            self.notes.append(
                f"{found.left_out} of {len(pairs)} {split} pairs are left out: their prompts alone "
                f"fill {limit} tokens."
            )
        return found

    def result(self) -> Json:
        config = self.config
        with self.pair.using("tuned") as model:
            readout = Readout.of(model, vocabulary=self.pair.vocabulary)
            self.tune_aims = predictions(model, self.tune.texts, readout)
            self.test_aims = predictions(model, self.test.texts, readout)
            del model
        with self.pair.using("base") as model:
            self.readout = Readout.of(model, vocabulary=self.pair.vocabulary)
            self.own = predictions(model, self.test.texts[self.test.chosen], self.readout)
            places, candidates = self._places(model)
            sites = {place.site: _Site(self, place).measured(model) for place in places}
            del model
        self.pair.release()
        first = next(iter(sites))
        if config.random_pairs < self.test.pairs:
            self.notes.append(
                f"Random directions are measured on the first {config.random_pairs} of "
                f"{self.test.pairs} test pairs."
            )
        return {
            "beta": self.beta,
            "split": config.split,
            "n_fit": len(self.given[config.split]),
            "n_tune": self.tune.pairs,
            "n_test": self.test.pairs,
            "settings": {
                key: getattr(config, key)
                for key in ("steps", "batch_size", "learning_rate", "eval_every", "max_length")
            },
            "strengths": list(config.strengths),
            "candidates": candidates,
            "sites": sites,
            "headline": _headline(first, sites[first]),
            "notes": list(dict.fromkeys(self.notes)),
        }

    # ------------------------------------------------------------------ choices on tune

    def _places(self, model: Model) -> tuple[list[_Place], dict[str, Json]]:
        """The sites with the tokens that suit v* best, and what v* recovers at all candidates.

        Raises:
            MeasurementError: a named site without a v*, or v* is zero at each.
        """
        named = [site for site in self.config.sites if site != "auto"]
        if named:
            resolve_sites(named, self.pair.n_blocks, encoder=self.pair.encoder_decoder)
        for site in named:
            if site not in self.vectors:
                raise MeasurementError(
                    f"learned.sites: {site}: the run holds no v* there; name some of "
                    f"{', '.join(self.vectors)}"
                )
            if self.vectors[site].undefined:
                raise MeasurementError(
                    f"learned.sites: v* at {site} is zero: the models agree there, so there is "
                    "nothing to hold a learned vector against; name another site"
                )
        auto = len(named) < len(self.config.sites)
        asked = self.config.positions
        kinds: tuple[Positions, ...] = POSITIONS if asked == "auto" else (asked,)
        tried = [site for site in self.vectors if auto or site in named]
        found: dict[str, _Place] = {}
        with self.context.reporter.bar("sites", len(tried), unit="site") as advance:
            for site in tried:
                v = self.vectors[site]
                if not v.undefined:
                    row = {
                        kind: self._recovered(model, v, kind)
                        for kind in kinds
                        if (site, kind) != (ENCODER, "generated")  # the encoder generates nothing
                    }
                    best = max(row, key=lambda kind: (row[kind] or 0.0, -kinds.index(kind)))
                    found[site] = _Place(site, best, row)
                advance(1)
        if not found:
            raise MeasurementError(
                "stage learned: v* is zero at every site: the two models agree on the fit prompts; "
                "check that training changed the model"
            )
        most = max(place.recovered[place.positions] or 0.0 for place in found.values())
        best_place = next(
            place
            for place in found.values()
            if (place.recovered[place.positions] or 0.0) >= most - _TIE
        )
        wanted = [best_place.site if site == "auto" else site for site in self.config.sites]
        candidates = {
            site: {
                "norm": self.vectors[site].norm,
                "positions": place.positions,
                "kl_recovered": {str(kind): value for kind, value in place.recovered.items()},
            }
            for site, place in found.items()
        }
        return [found[site] for site in dict.fromkeys(wanted)], candidates

    def _recovered(self, model: Model, v: SteeringVector, kind: Positions) -> float | None:
        """KL that v* recovers at λ = 1 on the chosen answers of the tune pairs."""
        arms = [Arm(v.tensor, 1.0)]
        scores = self.score(model, v.site, kind, arms, self.tune, self.tune_aims, chosen=True)
        before, after = scores.kl.sum(dim=1).tolist()
        return 1 - after / before if before > NOTHING * float(scores.tokens.sum()) else None

    # ------------------------------------------------------------------ scores

    def score(
        self,
        model: Model,
        site: str,
        positions: Positions,
        arms: Sequence[Arm],
        texts: Answers,
        aims: Predictions,
        *,
        chosen: bool = False,
        count: int | None = None,
        label: str = "choice on tune",
    ) -> Scores:
        """Scores of the base as it is (arm 0) and of arms.

        Args:
            model: the base.
            site: where the arms act.
            positions: on which tokens.
            arms: vectors and strengths.
            texts: what is scored.
            aims: the target's predictions of them.
            chosen: the chosen answers alone.
            count: the first so many pairs alone.
            label: what progress is called.
        """
        index = texts.index(texts.pairs if count is None else count)
        index = index[: len(index) // 2] if chosen else index
        zero = Arm(torch.zeros(self.pair.width, dtype=torch.float64), 0.0)
        return score(
            model,
            [texts.texts[i] for i in index],
            Steering(site, (zero, *arms), positions=positions),
            self.readout,
            Predictions(tuple(aims.states[i] for i in index), aims.readout),
            reporter=self.context.reporter,
            label=label,
        )


class _Site:
    """What is learned and measured at one site."""

    def __init__(self, study: _Study, place: _Place) -> None:
        self.study, self.config, self.place = study, study.config, place
        self.site, self.positions = place.site, place.positions
        self.v = study.vectors[place.site]

    def measured(self, model: Model) -> Json:
        study, config = self.study, self.config
        arms, told = self._arms(model)
        texts, aims = study.test, study.test_aims
        scores = study.score(
            model, self.site, self.positions, list(arms.values()), texts, aims, label="test"
        )
        to_base = study.score(
            model, self.site, self.positions, list(arms.values()), texts, study.own,
            chosen=True, label="test, cost",
        )  # fmt: skip
        found = self._quantities(scores, to_base, texts.pairs)
        names = list(arms)
        rows = {
            name: {
                **told[name],
                "norm": float((arm.vector * arm.strength).norm()),
                "cosine": _cosine(arm.vector, self.v.tensor),
                "metrics": {
                    metric: self._interval(metric, quantity, names.index(name))
                    for metric, quantity in found.items()
                },
                "against": {
                    other: {
                        metric: self._difference(quantity, names.index(name), names.index(other))
                        for metric, quantity in found.items()
                    }
                    for other in ("vector", "vector_least_loss")
                    if "curve" in told[name]
                },
            }
            for name, arm in arms.items()
        }
        learned = next(name for name in names if "curve" in told[name])
        self._add_notes(rows)
        return {
            "positions": self.positions,
            "chosen_on": "tune" if "auto" in config.sites and self._is_auto() else "given",
            "vector_norm": self.v.norm,
            "learned": learned,
            "arms": rows,
            "tuned": self._tuned(scores, found),
            "random": {
                name: self._random(model, float((arms[name].vector * arms[name].strength).norm()))
                for name in ("vector", learned)
            },
            "cosine_null": self._cosine_null(),
        }

    def _is_auto(self) -> bool:
        named = [site for site in self.config.sites if site != "auto"]
        return self.site not in named

    # ------------------------------------------------------------------ arms

    def _arms(self, model: Model) -> tuple[dict[str, Arm], dict[str, dict[str, Json]]]:
        """v* at λ = 1 and at the strengths chosen on tune, then what is learned; and of each what
        is told of it."""
        arms: dict[str, Arm] = {"vector": Arm(self.v.tensor, 1.0)}
        told: dict[str, dict[str, Json]] = {"vector": {"label": "v*, λ = 1", "strength": 1.0}}
        for name, words, strength in self._strengths(model):
            arms[name] = Arm(self.v.tensor, strength)
            told[name] = {"label": f"v*, {words}", "strength": strength}
        for start in dict.fromkeys(self.config.starts):
            for bound in dict.fromkeys(self.config.max_norm):
                name = start if bound == "none" else f"{start}_bounded"
                name = f"learned_{name}"
                vector = self._learn(model, name, start, bound)
                arms[name] = Arm(vector[self.site].tensor, 1.0)
                told[name] = {
                    "label": f"learned from {'zero' if start == 'zero' else 'v*'}"
                    + ("" if bound == "none" else ", ‖v‖ ≤ ‖v*‖"),
                    "strength": 1.0,
                    "start": start,
                    "max_norm": None if bound == "none" else self.v.norm,
                    "chosen_step": vector.metadata["chosen_step"],
                    "curve": vector.metadata["curve"],
                }
        return arms, told

    def _strengths(self, model: Model) -> list[tuple[str, str, float]]:
        """The strengths of v* that do best on tune pairs: by the loss, and by the KL recovered."""
        study, grid = self.study, self.config.strengths
        arms = [Arm(self.v.tensor, strength) for strength in grid]
        scores = study.score(model, self.site, self.positions, arms, study.tune, study.tune_aims)
        rewards = study.beta * study.tune.margins(scores.log_likelihood)
        losses = -torch.nn.functional.logsigmoid(rewards[1:] - rewards[0]).mean(dim=1)
        kl = scores.kl[1:, study.tune.chosen].sum(dim=1)
        least = {"loss": int(losses.argmin()), "KL to the tuned model": int(kl.argmin())}
        if len(grid) - 1 in least.values():
            words = " and ".join(w for w, i in least.items() if i == len(grid) - 1)
            study.notes.append(
                f"At {self.site} the largest strength of v* that was tried, {grid[-1]:g}, has the "
                f"least {words}: a larger one may do better (learned.strengths)."
            )
        return [
            ("vector_least_loss", "λ of least loss", grid[least["loss"]]),
            ("vector_least_kl", "λ of least KL", grid[least["KL to the tuned model"]]),
        ]

    def _learn(self, model: Model, name: str, start: str, bound: str) -> SteeringVectorSet:
        study, config = self.study, self.config
        found = learn_vector(
            model,
            study.tokenizer,
            study.given[config.split],
            sites=self.site,
            heldout=study.given["tune"][: config.tune_pairs],
            start="zero"
            if start == "zero"
            else SteeringVectorSet([self.v], study.vectors.metadata),
            beta=study.beta,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            max_norm=None if bound == "none" else self.v.norm,
            positions=self.positions,
            eval_every=config.eval_every,
            max_length=config.max_length,
            seed=study.context.seed("pairs"),
            checkpoint=study.context.folder / "checkpoints" / f"{self.site}-{name}.safetensors",
            reporter=study.context.reporter,
            label=f"{self.site}, {name.replace('_', ' ')}",
        )
        found.save(study.context.folder / "vectors" / f"{self.site}-{name}.safetensors")
        return found

    # ------------------------------------------------------------------ numbers

    def _quantities(self, scores: Scores, to_base: Scores, pairs: int) -> dict[str, _Quantity]:
        """Every metric of the arms, one row an arm.

        - ``reward_margin``: β [Δ ln π(chosen) − Δ ln π(rejected)], Δ against the base.
        - ``preference_accuracy``: share of margins above 0, a tie ½.
        - ``loss``: −ln σ(margin), the DPO loss.
        - ``kl_recovered``: Σ (KL₀ − KL) / Σ KL₀ of KL(tuned‖·), on tokens of the chosen answers.
        - ``kl_recovered_first``: the same on their first tokens.
        - ``kl_to_base``: KL(steered‖base) in nats a token, on the tokens of the chosen answers.
        """
        change = scores.log_likelihood[1:] - scores.log_likelihood[0]
        rewards = self.study.beta * (change[:, :pairs] - change[:, pairs:])
        mine = scores.of(slice(0, pairs))
        one, tokens = torch.ones(pairs, dtype=torch.float64), mine.tokens.double()
        found = {
            "reward_margin": _Quantity(rewards, one),
            "preference_accuracy": _Quantity(preference_match(rewards), one),
            "loss": _Quantity(-torch.nn.functional.logsigmoid(rewards), one),
        }
        for name, kl, units in (
            ("kl_recovered", mine.kl, tokens), ("kl_recovered_first", mine.kl_first, one)
        ):  # fmt: skip
            before = kl[0]
            nothing = float(before.sum()) <= NOTHING * float(units.sum())
            below = torch.zeros_like(before) if nothing else before
            found[name] = _Quantity(before - kl[1:], below)
        found["kl_to_base"] = _Quantity(to_base.kl_reverse[1:], tokens)
        return found

    def _interval(self, metric: str, quantity: _Quantity, row: int) -> Json:
        """A metric of one arm with its interval."""
        if metric == "preference_accuracy":
            n, clusters = len(quantity.below), set(self.study.test.clusters)
            right = float(quantity.above[row].sum())
            return wilson(right, n, len(clusters), self.config.confidence).json()
        return _json(self._bootstrap(quantity.above[row], quantity.below))

    def _difference(self, quantity: _Quantity, row: int, other: int) -> Json:
        """What an arm has more of a metric than another, on the same pairs."""
        gap = quantity.above[row] - quantity.above[other]
        return _json(self._bootstrap(gap, quantity.below))

    def _bootstrap(self, above: Tensor, below: Tensor) -> Interval | None:
        return bootstrap_ratio(
            above,
            below,
            self.study.test.clusters,
            draws=self.config.bootstrap,
            confidence=self.config.confidence,
            seed=self.study.context.seed("bootstrap"),
        )

    def _tuned(self, scores: Scores, found: Mapping[str, _Quantity]) -> Json:
        """The tuned model itself, by the same metrics: the ceiling of KL recovered is 1."""
        texts = self.study.test
        own = own_likelihoods(self.study.test_aims, texts.texts)
        rewards = self.study.beta * texts.margins(own - scores.log_likelihood[0])
        mine = scores.of(texts.chosen)
        quantities = {
            "reward_margin": _Quantity(rewards[None], found["reward_margin"].below),
            "preference_accuracy": _Quantity(
                preference_match(rewards)[None], found["preference_accuracy"].below
            ),
            "loss": _Quantity(-torch.nn.functional.logsigmoid(rewards)[None], found["loss"].below),
            "kl_to_base": _Quantity(mine.kl[:1], found["kl_to_base"].below),
        }
        metrics = {name: self._interval(name, quantities[name], 0) for name in quantities}
        whole = {
            name: None if not bool(found[name].below.any()) else 1.0
            for name in ("kl_recovered", "kl_recovered_first")
        }
        return {name: {**metrics, **whole}[name] for name in METRICS}

    def _random(self, model: Model, norm: float) -> Json:
        """The range of every metric over random directions of a norm; None of norm 0."""
        if norm == 0:
            return None
        study, count = self.study, self.config.random_directions
        draws = self._directions(count, "random directions")
        arms = [Arm(torch.from_numpy(draw * norm), 1.0) for draw in draws]
        few = min(self.config.random_pairs, study.test.pairs)
        scores = study.score(
            model, self.site, self.positions, arms, study.test, study.test_aims,
            count=few, label="test, random",
        )  # fmt: skip
        to_base = study.score(
            model, self.site, self.positions, arms, study.test, study.own,
            chosen=True, count=few, label="test, random, cost",
        )  # fmt: skip
        bands: dict[str, Json] = {}
        for name, quantity in self._quantities(scores, to_base, few).items():
            total = float(quantity.below.sum())
            values = (quantity.above.sum(dim=1) / total).numpy() if total else None
            bands[name] = None if values is None else _band(values)
        return {"norm": norm, "draws": count, "pairs": few, "metrics": bands}

    def _directions(self, count: int, purpose: str) -> np.ndarray:
        """Random unit directions (count, d)."""
        rng = np.random.default_rng(self.study.context.seed(purpose, self.site))
        rows = rng.standard_normal((count, self.v.width))
        units: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return units

    def _cosine_null(self) -> Json:
        """Cosines of random directions with v*."""
        unit = self.v.tensor.numpy() / self.v.norm
        return {**_band(self._directions(COSINES, "cosines") @ unit), "draws": COSINES}

    # ------------------------------------------------------------------ words

    def _add_notes(self, rows: Mapping[str, Json]) -> None:
        notes = self.study.notes
        for row in rows.values():
            if "curve" not in row:
                continue
            step, last = row["chosen_step"], row["curve"][-1]["step"]
            what = f"At {self.site}, {row['label']}:"
            if step == 0:
                notes.append(
                    f"{what} no step has a lower loss on the tune pairs than the start, which is "
                    "what was measured; lower learned.learning_rate."
                )
            elif step == last:
                notes.append(
                    f"{what} the loss on the tune pairs is least at the last step, {last}: more "
                    "steps may lower it further (learned.steps)."
                )
        if self.site == FINAL_NORM:
            notes.append(
                "At final_norm any vector adds the same logit bias to every token: learning there "
                "finds the best static bias, nothing that depends on the prompt."
            )
        last_block = block_of(self.site) == self.study.pair.n_blocks - 1
        if self.positions == "prompt_last" and (last_block or self.site == FINAL_NORM):
            notes.append(
                f"At {self.site} the last prompt token alone is steered, and no block follows: "
                "vectors there act on the first token of an answer alone."
            )


# ---------------------------------------------------------------------------------- small parts


def _headline(site: str, found: Json) -> dict[str, Json]:
    learned = found["arms"][found["learned"]]
    gap = learned["against"]["vector_least_loss"]["loss"]
    low, high = (gap["low"], gap["high"]) if gap else (None, None)
    beats = None
    if low is not None and high is not None:
        beats = "yes" if high < 0 else "no" if low > 0 else "not told apart"
    return {
        "site": site,
        "positions": found["positions"],
        "reward_margin": _value(learned["metrics"]["reward_margin"]),
        "reward_margin_vector": _value(found["arms"]["vector"]["metrics"]["reward_margin"]),
        "reward_margin_vector_best": _value(
            found["arms"]["vector_least_loss"]["metrics"]["reward_margin"]
        ),
        "kl_recovered": _value(learned["metrics"]["kl_recovered"]),
        "kl_recovered_vector": _value(found["arms"]["vector"]["metrics"]["kl_recovered"]),
        "cosine": learned["cosine"],
        "beats_vector": beats,
    }


def _cosine(a: Tensor, b: Tensor) -> float | None:
    """None where either is zero."""
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else None


def _band(values: np.ndarray) -> dict[str, Json]:
    """Mean and middle 95 % of draws."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def _json(interval: Interval | None) -> Json:
    return interval.json() if interval else None


def _value(interval: Json) -> Json:
    return interval["value"] if interval else None
