"""Turn the strength of v* and measure everything: the core of interpolation and inversion.

One model, the *start*, is steered; the other, the *target*, is where it should arrive. Choices (the
site, the range of strengths) are made on tune pairs, and all metrics are of test pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.sites import ENCODER, FINAL_NORM, block_of, resolve_sites
from dsteer.behaviour.curves import Ledger, exponential, means
from dsteer.behaviour.diagnoses import diagnose
from dsteer.behaviour.metrics import (
    Generated,
    numbers,
    text_metrics,
)
from dsteer.behaviour.outside import Outside
from dsteer.behaviour.perplexity import surprises
from dsteer.behaviour.refusal import MEASURED_LIMITS
from dsteer.behaviour.samples import sample_prompts, shown
from dsteer.behaviour.strengths import LiveRange, grid, live_range
from dsteer.behaviour.teacher_forced import (
    Predictions,
    Scores,
    own_likelihoods,
    predictions,
    preference_match,
    score,
)
from dsteer.behaviour.truthfulqa import multiple_choice, read_questions
from dsteer.behaviour.validity import screen
from dsteer.config import BehaviourConfig, PipelineConfig, SweepConfig, SyntheticSource
from dsteer.data.jsonl import read_pairs
from dsteer.data.tokens import Encoded, encode
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError
from dsteer.geometry.alignment import cosine_to
from dsteer.geometry.logits import NOTHING
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair, Which
from dsteer.models.readout import Readout
from dsteer.progress import Reporter
from dsteer.steering.arms import Arm, Steering, same_without_hooks
from dsteer.steering.decode import Decoded, Decoding, decode
from dsteer.steering.intervene import Operation, Positions
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, atomic_path, read_json, write_json
from dsteer.training.evaluate import Continuation

SITE_PAIRS = 32
"""Tune pairs on which the site is chosen."""

RANDOM_PAIRS = 32
"""Test pairs on which random directions are measured by teacher forcing."""

SHAM_TEXTS = 8
"""Texts that are decoded without any hook, for the sham arm."""

POSITIONS: tuple[Positions, ...] = ("all", "prompt_last", "generated")
"""The positions among which ``auto`` chooses, with the site."""


@dataclass(frozen=True)
class Study:
    """What is turned, and on which data.

    Attributes:
        pair: both models.
        start: the model that is steered.
        config: of the sweep.
        behaviour: metrics from outside.
        vectors: v* a site.
        preference: the mean e_w − e_l, at final_norm, if it is to be an arm of its own.
        held_out_cosine: a site's mean cosine of test displacements with its v*.
        relative_norms: site → ‖v*‖ / mean ‖h_base‖ over the fit prompts, where v* is not zero.
        tune: pairs on which choices are made.
        test: pairs on which numbers are reported.
        synthetic: whether all of them are of the synthetic world.
        template: how prompts are written, ``none`` or ``chat``.
        beta: of the implicit reward.
        device: where classifiers run.
        seed: a seed for each purpose.
        folder: where texts are written.
        reporter: shows progress.
    """

    pair: ModelPair
    start: Which
    config: SweepConfig
    behaviour: BehaviourConfig
    vectors: SteeringVectorSet
    preference: SteeringVector | None
    held_out_cosine: Callable[[str], float | None]
    relative_norms: Mapping[str, float]
    tune: Sequence[PreferencePair]
    test: Sequence[PreferencePair]
    synthetic: bool
    template: str
    beta: float
    device: str
    seed: Callable[..., int]
    folder: Path
    reporter: Reporter

    @property
    def target(self) -> Which:
        """The other model."""
        return "tuned" if self.start == "base" else "base"

    @property
    def name(self) -> str:
        """The stage."""
        return "interpolation" if self.start == "base" else "inversion"

    @property
    def sign(self) -> int:
        """1 where v is added, −1 where it is taken away."""
        return 1 if self.start == "base" else -1

    @classmethod
    def of(
        cls,
        config: PipelineConfig,
        sweep: SweepConfig,
        start: Which,
        inputs: Mapping[str, Path],
        paths: tuple[str, str],
        folder: Path,
        seed: Callable[..., int],
        reporter: Reporter,
    ) -> Study:
        """The study of a pipeline.

        Args:
            config: the pipeline.
            sweep: its section for this sweep.
            start: the model that is steered.
            inputs: folders of the stages that it reads; ``geometry`` may be missing.
            paths: of base and tuned.
            folder: where texts are written.
            seed: a seed for each purpose.
            reporter: shows progress.
        """
        vectors = SteeringVectorSet.load(inputs["vector"] / "vectors.safetensors")
        activations = PairedActivations.open(inputs["activations"])
        rows = slice(*read_json(inputs["activations"] / "result.json")["rows"]["test"])
        preference = None
        direction = inputs["geometry"] / "preference.safetensors" if "geometry" in inputs else None
        if direction is not None and direction.exists():
            preference = SteeringVectorSet.load(direction)[FINAL_NORM]

        def held_out(site: str) -> float | None:
            if vectors[site].undefined:
                return None
            delta = activations.displacement(site)[rows]
            mean = float(cosine_to(delta, vectors[site].tensor).nanmean())
            return mean if math.isfinite(mean) else None

        return cls(
            pair=ModelPair.configured(config.models, *paths),
            start=start,
            config=sweep,
            behaviour=config.behaviour,
            vectors=vectors,
            preference=preference,
            held_out_cosine=held_out,
            relative_norms={
                site: found["relative_norm"]
                for site, found in read_json(inputs["vector"] / "result.json")["sites"].items()
                if not found["undefined"]
            },
            tune=read_pairs(inputs["data"] / "tune.jsonl"),
            test=read_pairs(inputs["data"] / "test.jsonl"),
            synthetic=all(isinstance(s, SyntheticSource) for s in config.data.sources),
            template=config.activations.template if config.activations else "none",
            beta=config.reward_beta,
            device=config.models.device,
            seed=seed,
            folder=folder,
            reporter=reporter,
        )

    def run(self) -> Json:
        """Measure everything; returns the result, and writes the texts beside it."""
        return _Run(self).result()


@dataclass(frozen=True)
class _Named:
    """An arm with its name, and the tokens that it acts on.

    Attributes:
        label: how reports call it.
        vector: its direction; of ``scale`` only the site counts.
        positions: the tokens.
        operation: what is done, see :mod:`dsteer.steering.intervene`.
        unit: the operation's strength at λ = 1.
        seed: of ``noise``.
    """

    label: str
    vector: SteeringVector
    positions: Positions
    operation: Operation = "add"
    unit: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class _Answers:
    """Pairs as ids, for teacher forcing: the chosen answers, then the rejected ones.

    Attributes:
        texts: prompts with answers, cut.
        pairs: how many pairs; without rejected answers there are as many texts.
        clusters: conversation of each pair.
    """

    texts: list[Encoded]
    pairs: int
    clusters: list[str]

    @property
    def both(self) -> bool:
        """Whether there are rejected answers too."""
        return len(self.texts) == 2 * self.pairs

    def first(self, count: int) -> _Answers:
        """The first pairs alone."""
        n = min(count, self.pairs)
        rejected = self.texts[self.pairs : self.pairs + n] if self.both else []
        return _Answers([*self.texts[:n], *rejected], n, self.clusters[:n])


class _Run:
    """One sweep, from the choice of the site to the result."""

    def __init__(self, study: Study) -> None:
        self.study, self.config = study, study.config
        self.pair, self.reporter = study.pair, study.reporter
        self.tokenizer = study.pair.tokenizer_for(study.template)
        self.decoding = Decoding(
            study.config.max_new_tokens,
            study.config.temperature,
            seed=study.seed("draws"),
            stop=study.config.stop,
        )
        self.readouts: dict[Which, Readout] = {}
        self.absent: list[tuple[str, str]] = []
        self.notes: list[str] = [*study.pair.notes]
        self.prompts = list(study.test[: study.config.prompts])
        self.prompt_clusters = [pair.conversation for pair in self.prompts]
        self.encoded = self._encode(self.prompts)
        behaviour = study.behaviour
        prompts = [pair.prompt for pair in self.prompts]
        self.outside = Outside(behaviour, prompts, study.device, self.reporter)
        asked = behaviour.truthfulqa
        self.questions = read_questions(asked.path, limit=asked.limit) if asked else []
        kind = study.config.samples
        if kind == "auto":
            kind = "test" if study.synthetic else "benign"
        self.shows = kind != "none"
        own = kind in {"test", "none"}
        self.samples = None if own else sample_prompts(kind, study.config.sample_prompts)
        self.decoder_note: str | None = None
        self.fast = True

    # ------------------------------------------------------------------ data

    def _encode(self, pairs: Sequence[PreferencePair], answer: str | None = None) -> list[Encoded]:
        new = self.config.response_tokens if answer else self.config.max_new_tokens
        limits, reach = [self.config.max_tokens], self.pair.max_positions
        if reach is not None:
            if new >= reach:
                name = "response_tokens" if answer else "max_new_tokens"
                raise DataError(
                    f"{self.study.name}.{name}: {new} tokens leave no room for a prompt in the "
                    f"{reach} that the models were made for; lower it"
                )
            limits.append(reach - (0 if answer else new))
        asked = [replace(pair, chosen=getattr(pair, answer)) for pair in pairs] if answer else pairs
        encoded = encode(
            self.tokenizer,
            list(asked),
            template=self.study.template,
            max_tokens=min(limits),
            response="chosen" if answer else None,
            response_tokens=new if answer else None,
            encoder_decoder=self.pair.encoder_decoder,
        )
        cut = sum(item.truncated for item in encoded)
        if cut:
            what = f"the {answer} answers' prompts" if answer else "prompts to answer"
            self.notes.append(
                f"{cut} of {len(encoded)} {what} lost their left: with what follows they are "
                f"longer than {min(limits)} tokens."
            )
        return encoded

    def _answers(self, pairs: Sequence[PreferencePair], count: int) -> _Answers:
        """Pairs with answers; of prompts alone, the target's own texts are the answers."""
        complete = [pair for pair in pairs if pair.chosen and pair.rejected][:count]
        if complete:
            texts = self._encode(complete, "chosen") + self._encode(complete, "rejected")
            return _Answers(texts, len(complete), [pair.conversation for pair in complete])
        chosen = list(pairs[:count])
        encoded = self._encode(chosen)
        made = self._decode(self.study.target, encoded, None, "target").tokens[0]
        kept = [i for i, tokens in enumerate(made) if tokens]
        if not kept:
            raise DataError(
                "the pairs have no answers, and the target model writes none to the prompts; give "
                "pairs with answers"
            )
        texts = [
            Encoded(
                encoded[i].ids + made[i][: self.config.response_tokens], encoded[i].prompt_length
            )
            for i in kept
        ]
        return _Answers(texts, len(kept), [chosen[i].conversation for i in kept])

    def _readout(self, which: Which, model: Model) -> Readout:
        if which not in self.readouts:
            self.readouts[which] = Readout.of(model, vocabulary=self.pair.vocabulary)
        return self.readouts[which]

    def _decode(
        self,
        which: Which,
        prompts: Sequence[Encoded],
        steering: Steering | None,
        label: str,
        journal: str | None = None,
    ) -> Decoded:
        with self.pair.using(which) as model:
            made = decode(
                model,
                self.tokenizer,
                prompts,
                steering or Steering.none(self.pair.width),
                self.decoding,
                memory=self.config.memory_mb * 2**20,
                path=self.study.folder / "checkpoints" / f"{journal}.jsonl" if journal else None,
                reporter=self.reporter,
                label=label,
            )
        if made.note is not None:
            self.fast, self.decoder_note = False, made.note
        return made

    # ------------------------------------------------------------------ result

    def result(self) -> Json:
        study, config = self.study, self.config
        start, target = study.start, study.target
        tune = self._answers(study.tune, SITE_PAIRS)
        test = self._answers(study.test, config.pairs)
        with self.pair.using(target) as model:
            readout = self._readout(target, model)
            aims_tune = predictions(model, tune.texts, readout)
            aims = predictions(model, test.texts, readout)
            del model
        site, self.positions, sites = self._place(tune, aims_tune)
        v = study.vectors[site]
        if v.undefined:
            raise MeasurementError(
                f"v* at {site} is zero: the models agree there, so nothing can be added; name "
                f"another site ({study.name}.site)"
            )
        live, strengths = self._strengths(v)
        self.strengths = strengths
        self.ledger = Ledger(
            strengths, config.bootstrap, config.confidence, study.seed("bootstrap")
        )
        arms = self._arms(site)
        draws = self._random_directions(v)
        self._teacher_forced(test, aims, arms, draws)
        sham = self._sham(test, v)
        written = self._generate(arms, draws)
        self._texts(written)
        self._perplexity(written)
        self._outside(written)
        self._truthfulqa(arms)
        metrics = self.ledger.described()
        for name in [name for name, metric in metrics.items() if _empty(metric)]:
            del metrics[name]
            self.absent.append((name, "no text of any arm has a value"))
        texts = self._text_counts(written)
        diagnoses = diagnose(
            start,
            site,
            strengths,
            metrics,
            texts["degenerate"],
            study.held_out_cosine(site),
            {name: arms[name].label for name in config.baselines},
        )
        self._save(written)
        explorer = study.folder / "explorer.json"
        if self.shows:
            write_json(explorer, self._explorer(written, v))
        else:
            explorer.unlink(missing_ok=True)
        self.notes.append(
            "Degenerate outputs are a lower bound: the screen finds empty texts, loops and leaked "
            "role headers, not words without sense. Read it beside the perplexity."
        )
        if not test.both:
            self.notes.append(
                "The test pairs have no answers: teacher-forced metrics read the target's own."
            )
        return {
            "direction": study.name,
            "start": start,
            "target": target,
            "sign": study.sign,
            "site": site,
            "site_chosen_on": "tune" if sites else "given",
            "sites": sites,
            "positions": self.positions,
            "strengths": list(strengths),
            "grid": self._grid(live),
            "arms": {
                name: {
                    "label": arm.label,
                    "site": arm.vector.site,
                    "norm": arm.vector.norm,
                    "positions": arm.positions,
                    "operation": arm.operation,
                    "unit": arm.unit,
                    "generated": True,
                }
                for name, arm in arms.items()
            },
            "random": {
                "draws": len(draws),
                "generated": min(config.random_generations, len(draws)),
                "pairs": min(RANDOM_PAIRS, test.pairs),
                "matched": "norm",
            },
            "sham": sham,
            "metrics": metrics,
            "texts": texts,
            "absent": [{"metric": metric, "reason": why} for metric, why in self.absent],
            "refusal_limits": {
                "precision": MEASURED_LIMITS.precision.json(),
                "recall": MEASURED_LIMITS.recall.json(),
                "texts": MEASURED_LIMITS.texts,
                "source": MEASURED_LIMITS.source,
            },
            "diagnoses": diagnoses,
            "headline": self._headline(site, metrics),
            "notes": list(dict.fromkeys(self.notes)),
        }

    # ------------------------------------------------------------------ choices on tune

    def _place(self, tune: _Answers, aims: Predictions) -> tuple[str, Positions, dict[str, Json]]:
        """Site and positions where v* recovers most KL at λ = 1 on the tune pairs.

        Of equals the earliest site is taken. What the config names is taken as it is.
        """
        study, config = self.study, self.config
        sites = list(study.vectors)
        if config.site != "auto":
            encoder = self.pair.encoder_decoder
            sites = [resolve_sites((config.site,), self.pair.n_blocks, encoder=encoder)[0]]
            if sites[0] not in study.vectors:
                raise MeasurementError(
                    f"site {sites[0]}: the run holds no v* there; name one of "
                    f"{', '.join(study.vectors)}"
                )
        kinds = POSITIONS if config.positions == "auto" else (config.positions,)
        if len(sites) == len(kinds) == 1:
            return sites[0], kinds[0], {}
        found: dict[str, Json] = {}
        best: tuple[float, str, Positions] | None = None
        with (
            self.pair.using(study.start) as model,
            self.reporter.bar("sites", len(sites), unit="site") as advance,
        ):
            for site in sites:
                v = study.vectors[site]
                # the encoder generates nothing
                has = [k for k in kinds if (site, k) != (ENCODER, "generated")]
                row = dict.fromkeys(kinds, None)
                if not v.undefined:
                    row |= {kind: self._recovered(model, v, kind, tune, aims) for kind in has}
                found[site] = {"norm": v.norm, "kl_recovered": row}
                for kind, value in row.items():
                    if value is not None and (best is None or value > best[0] + 1e-9):
                        best = value, site, kind
                advance(1)
            del model
        if best is None:
            raise MeasurementError(
                "the two models predict the same on the tune pairs (or v* is zero at every site): "
                "there is nothing to recover; check that training changed the model"
            )
        return best[1], best[2], found

    def _recovered(
        self,
        model: Model,
        v: SteeringVector,
        positions: Positions,
        tune: _Answers,
        aims: Predictions,
    ) -> float | None:
        """KL recovered at λ = 1 on the chosen answers of the tune pairs."""
        arms = (Arm(v.tensor, 0.0), Arm(v.tensor, float(self.study.sign)))
        chosen = slice(0, tune.pairs)
        scores = score(
            model,
            tune.texts[chosen],
            Steering(v.site, arms, positions=positions),
            self._readout(self.study.start, model),
            Predictions(aims.states[chosen], aims.readout),
        )
        before, after = scores.kl.sum(dim=1).tolist()
        return 1 - after / before if before > NOTHING * float(scores.tokens.sum()) else None

    def _strengths(self, v: SteeringVector) -> tuple[LiveRange | None, tuple[float, ...]]:
        config = self.config
        if config.strengths != "auto":
            return None, tuple(config.strengths)
        prompts = self._encode(self.study.tune[: config.range_prompts])
        calls = iter(range(100))

        def degenerate(strengths: Sequence[float]) -> list[float]:
            if not strengths:
                return []
            made = self._decode(
                self.study.start,
                prompts,
                self._steering(v, strengths),
                "live range",
                f"range-{next(calls)}",
            )
            return [
                sum(screen(text) is not None for text in texts) / len(texts) for texts in made.texts
            ]

        live = live_range(degenerate, config.max_strength)
        at_zero = dict(live.probes)[0.0]
        if at_zero == 1:
            self.notes.append(
                "Every output of the start model is degenerate before it is steered, so nothing is "
                "left to collapse: read the texts before any metric of them."
            )
        for side, end in (("above", live.high), ("below", live.low)):
            if end is None and at_zero < 1:
                self.notes.append(
                    f"No collapse {side} λ = 0 up to |λ| = {config.max_strength:g}: the grid ends "
                    "there."
                )
        return live, grid(live, config.points, config.max_strength)

    def _steering(
        self, v: SteeringVector, strengths: Sequence[float], positions: Positions | None = None
    ) -> Steering:
        arms = tuple(Arm(v.tensor, self.study.sign * strength) for strength in strengths)
        return Steering(v.site, arms, positions=positions or self.positions)

    def _steered(self, arm: _Named) -> Steering:
        """An arm at every strength of the grid."""
        steering = self._steering(
            arm.vector, [arm.unit * strength for strength in self.strengths], arm.positions
        )
        return replace(steering, operation=arm.operation, seed=arm.seed)

    # ------------------------------------------------------------------ arms

    def _arms(self, site: str) -> dict[str, _Named]:
        vectors = self.study.vectors
        arms = {"v": _Named("v*", vectors[site], self.positions)}
        papers = FINAL_NORM in vectors and not vectors[FINAL_NORM].undefined
        if papers and (site, self.positions) != (FINAL_NORM, "all"):
            arms["final_norm"] = _Named("v* at final_norm", vectors[FINAL_NORM], "all")
        preference = self.study.preference
        if preference is not None and not preference.undefined:
            size = vectors[FINAL_NORM].norm if FINAL_NORM in vectors else vectors[site].norm
            scaled = preference.tensor * (size / preference.norm)
            arms["preference"] = _Named(
                "mean e_w − e_l", SteeringVector(scaled, preference.site), "all"
            )
            self.notes.append(
                "The mean e_w − e_l acts at final_norm, scaled to the norm of v* there: its λ "
                "counts in that norm."
            )
        if self.config.random_directions < 20 or self.config.random_generations < 3:
            self.notes.append(
                f"The random band is thin: {self.config.random_directions} directions, of which "
                f"{self.config.random_generations} generate; 20 and 3 are the least for a claim."
            )
        if self.positions != "all" and len(arms) > 1:
            self.notes.append(
                f"v* acts on the tokens {self.positions!r}; the arms at final_norm act on all "
                "tokens, as in the paper."
            )
        arms |= self._baselines(vectors[site])
        block = block_of(site)
        last = site == FINAL_NORM or block == self.pair.n_blocks - 1
        if "amplify" in arms and block == self.pair.n_blocks - 1:
            self.notes.append(
                f"At {site} no block follows: the last norm, where there is one, takes an "
                "amplification away again, so the layer amplified does nothing until its factor "
                "falls below 0."
            )
        if self.positions == "prompt_last" and last:
            self.notes.append(
                f"At {site} the last prompt token alone is steered, and no block follows: only the "
                "first token of an answer is chosen otherwise, and curves level off."
            )
        return arms

    def _baselines(self, v: SteeringVector) -> dict[str, _Named]:
        """The arms without a direction; at equal λ they shift a state about as far as v*.

        ``noise`` shifts each state by ±λ‖v*‖ exactly. ``amplify`` multiplies it by 1 ± λr with
        r = ‖v*‖ / mean ‖h_base‖, so that the mean shift of the base's states at the fit prompts is
        λ‖v*‖; the shift of one state is in proportion to its norm.
        """
        every = {
            "amplify": _Named(
                "layer amplified", v, self.positions, "scale", self.study.relative_norms[v.site]
            ),
            "noise": _Named(
                "seeded noise", v, self.positions, "noise", seed=self.study.seed("noise")
            ),
        }
        return {name: every[name] for name in self.config.baselines}

    def _random_directions(self, v: SteeringVector) -> list[SteeringVector]:
        rng = np.random.default_rng(self.study.seed("random directions"))
        found = []
        for _ in range(self.config.random_directions):
            draw = rng.standard_normal(v.width)
            found.append(SteeringVector(draw * (v.norm / np.linalg.norm(draw)), v.site))
        return found

    # ------------------------------------------------------------------ teacher forcing

    def _teacher_forced(
        self,
        test: _Answers,
        aims: Predictions,
        arms: Mapping[str, _Named],
        draws: Sequence[SteeringVector],
    ) -> None:
        study, strengths = self.study, self.strengths
        few = test.first(RANDOM_PAIRS)
        index = [
            *range(few.pairs),
            *(range(test.pairs, test.pairs + few.pairs) if few.both else ()),
        ]
        few_aims = Predictions(tuple(aims.states[i] for i in index), aims.readout)
        found: dict[str, Scores] = {}
        with self.pair.using(study.start) as model:
            readout = self._readout(study.start, model)
            for name, arm in arms.items():
                found[name] = score(
                    model, test.texts, self._steered(arm), readout, aims,
                    reporter=self.reporter, label=f"teacher-forced, {arm.label}",
                )  # fmt: skip
            many = [
                Arm(draw.tensor, study.sign * strength) for draw in draws for strength in strengths
            ]
            steering = Steering(draws[0].site, tuple(many), positions=self.positions)
            random = score(
                model, few.texts, steering, readout, few_aims,
                reporter=self.reporter, label="teacher-forced, random",
            )  # fmt: skip
            del model
        own = own_likelihoods(aims, test.texts)
        for name, scores in found.items():
            for key, (values, below) in self._measured(scores, test, own).items():
                entry = self.ledger.entry(key, "teacher_forced", test.clusters)
                entry.values[name] = values
                if below is not None:
                    entry.below[name] = below
        if test.both:
            reference = self._reference(found["v"], own)
            for name, target in _rewards(own[None], reference, test, study.beta).items():
                self.ledger.entries[name].target = target[0]
        else:
            for name in ("reward_margin", "preference_match"):
                self.absent.append((name, "the test pairs have no rejected answers"))
        levels = {
            "kl_recovered": 1,
            "kl_recovered_reverse": 1,
            "kl_first_token": 0,
            "top1_agreement": 1,
        }
        for name, level in levels.items():
            self.ledger.entries[name].level = float(level)
        n = len(strengths)
        for start in range(0, len(many), n):
            drawn = random.under(slice(start, start + n))
            for key, (values, below) in self._measured(drawn, few, own[index]).items():
                self.ledger.entries[key].random.append(means(values, below).numpy())
        for entry in self.ledger.entries.values():
            entry.random_n = few.pairs

    def _measured(
        self, scores: Scores, answers: _Answers, target: Tensor
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Every teacher-forced metric at each strength of one direction.

        Args:
            scores: at each strength.
            answers: what was scored.
            target: the target's own log-likelihoods of them.

        Returns:
            Values (strengths, pairs), and what their sum is divided by where that is no count.
        """
        mine, zero = scores.of(slice(0, answers.pairs)), self.strengths.index(0.0)
        tokens = mine.tokens.double()
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for key, after in (("kl_recovered", mine.kl), ("kl_recovered_reverse", mine.kl_reverse)):
            before = after[zero]
            nothing = float(before.sum()) <= NOTHING * float(tokens.sum())
            below = torch.zeros_like(before) if nothing else before
            found[key] = before - after, below.expand_as(after)
        found["kl_first_token"] = mine.kl_first, None
        found["top1_agreement"] = mine.agreement, tokens.expand_as(mine.agreement)
        if answers.both:
            reference = self._reference(scores, target)
            rewards = _rewards(scores.log_likelihood, reference, answers, self.study.beta)
            found |= {key: (values, None) for key, values in rewards.items()}
        return found

    def _reference(self, scores: Scores, target: Tensor) -> Tensor:
        """The base's own log-likelihoods: the start's at λ = 0, or the target's."""
        at_zero = scores.log_likelihood[self.strengths.index(0.0)]
        return at_zero if self.study.start == "base" else target

    # ------------------------------------------------------------------ sham

    def _sham(self, test: _Answers, v: SteeringVector) -> Json:
        """Hooks with λ = 0 against no hooks: the states bit by bit, and texts."""
        with self.pair.using(self.study.start) as model:
            logits = same_without_hooks(model, test.texts[:SHAM_TEXTS], self._steering(v, [0.0]))
            del model
        prompts = self.encoded[:SHAM_TEXTS]
        hooked = self._decode(self.study.start, prompts, self._steering(v, [0.0]), "sham")
        plain = self._decode(self.study.start, prompts, None, "sham, without hooks")
        return {
            "logits_identical": logits,
            "texts_identical": hooked.tokens == plain.tokens,
            "texts": len(prompts),
        }

    # ------------------------------------------------------------------ texts

    def _generate(
        self, arms: Mapping[str, _Named], draws: Sequence[SteeringVector]
    ) -> dict[str, list[Generated]]:
        """Texts of each arm at each strength, of the random directions, and of the target."""
        study, strengths = self.study, self.strengths
        written: dict[str, list[Generated]] = {}
        for name, arm in arms.items():
            made = self._decode(
                study.start,
                self.encoded,
                self._steered(arm),
                f"texts, {arm.label}",
                f"texts-{name}",
            )
            written[name] = _generated(made)
        few = draws[: self.config.random_generations]
        if few:
            many = tuple(
                Arm(draw.tensor, study.sign * strength) for draw in few for strength in strengths
            )
            steering = Steering(few[0].site, many, positions=self.positions)
            made = self._decode(
                study.start, self.encoded, steering, "texts, random", "texts-random"
            )
            for number in range(len(few)):
                part = _generated(made)[number * len(strengths) : (number + 1) * len(strengths)]
                written[f"random-{number}"] = part
        made = self._decode(study.target, self.encoded, None, "texts, target", "texts-target")
        written["target"] = _generated(made)
        return written

    def _texts(self, written: Mapping[str, list[Generated]]) -> None:
        """The metrics that need the texts alone."""
        self.collapsed = {
            name: torch.tensor(
                [[screen(text) is not None for text in item.texts] for item in series]
            )
            for name, series in written.items()
        }
        target = written["target"][0]
        references = [None if pair.chosen is None else pair.chosen.strip() for pair in self.prompts]
        for name, series in written.items():
            rows = [
                text_metrics(item, references, target, synthetic=self.study.synthetic)
                for item in series
            ]
            for key in rows[0]:
                self._put_texts(key, name, torch.stack([row[key] for row in rows]))
        if all(reference is None for reference in references):
            for key in ("bleu_reference", "rouge_l_reference"):
                self.absent.append((key, "the test prompts have no reference answers"))
        for key in ("bleu_target", "rouge_l_target"):
            self.ledger.entries[key].target = None  # a text against itself says nothing
        if not self.study.synthetic:
            self.absent.append(("oracles", "the prompts are not of the synthetic world"))

    def _put_texts(self, key: str, name: str, values: Tensor, below: Tensor | None = None) -> None:
        """Values (strengths, prompts) of an arm, a random direction or the target.

        Degenerate outputs are left out, but where they are what is counted: a refusal may loop.
        """
        entry = self.ledger.entry(key, "generated", self.prompt_clusters)
        kept = values
        if key not in ("degenerate", "length", "refusal", "refusal_loops"):
            kept = values.masked_fill(self.collapsed[name], float("nan"))
        weights = torch.ones_like(kept) if below is None else below
        weights = torch.where(kept.isnan(), 0.0, weights)
        if name == "target":
            entry.target, entry.target_below = kept[0], weights[0]
        elif name.startswith("random-"):
            found = means(kept, weights).tolist()
            entry.random.append(np.array([entry.transform(mean) for mean in found]))
            entry.random_n = values.shape[1]
        else:
            entry.values[name], entry.below[name] = kept, weights
            if entry.metric.worst is not None:
                entry.worst[name] = values.masked_fill(self.collapsed[name], entry.metric.worst)

    def _perplexity(self, written: Mapping[str, list[Generated]]) -> None:
        """Of the texts under the base, over all tokens."""
        self.ledger.entry("perplexity", "generated", self.prompt_clusters).transform = exponential
        with self.pair.using("base") as model:
            readout = self._readout("base", model)
            with self.reporter.bar("perplexity", len(written), unit="arms") as advance:
                for name, series in written.items():
                    items = [
                        Continuation(prompt.ids, tuple(ids))
                        for item in series
                        for prompt, ids in zip(self.encoded, item.tokens, strict=True)
                    ]
                    costs = surprises(model, items, readout)
                    shape = (len(series), len(self.encoded))
                    nll = numbers([None if c is None else c.nll for c in costs]).view(shape)
                    tokens = numbers([None if c is None else c.tokens for c in costs]).view(shape)
                    self._put_texts("perplexity", name, nll, tokens)
                    advance(1)
            del model

    # ------------------------------------------------------------------ from outside

    def _outside(self, written: Mapping[str, list[Generated]]) -> None:
        """Reward model, toxicity and judge, where they are configured."""
        self.absent += self.outside.absent
        for key, values in self.outside.scores.items():
            with self.reporter.bar(key, len(written), unit="arms") as advance:
                for name, series in written.items():
                    rows = [numbers(values(item.texts)) for item in series]
                    self._put_texts(key, name, torch.stack(rows))
                    advance(1)
        if self.outside.prefers is not None:
            aim = written["target"][0].texts
            for name, series in written.items():
                if name != "target":
                    rows = [numbers(self.outside.prefers(item.texts, aim)) for item in series]
                    self._put_texts("judge_prefers", name, torch.stack(rows))
        self.notes += [f"{what}: {count}." for what, count in self.outside.remarks.items()]

    def _truthfulqa(self, arms: Mapping[str, _Named]) -> None:
        questions = self.questions
        if not questions:
            for key in ("truthfulqa_mc1", "truthfulqa_mc2"):
                self.absent.append((key, "behaviour.truthfulqa is not configured"))
            return
        clusters = [question.text for question in questions]
        v = arms["v"].vector

        def measure(which: Which, steering: Steering) -> tuple[Tensor, Tensor]:
            with self.pair.using(which) as model:
                readout = self._readout(which, model)
                scored: list[Tensor] = []

                def likelihoods(items: list[Continuation]) -> Tensor:
                    if not scored:
                        texts = [Encoded(i.context + i.tokens, len(i.context)) for i in items]
                        own = predictions(model, texts, readout)
                        scored.append(
                            score(
                                model, texts, steering, readout, own,
                                reporter=self.reporter, label="TruthfulQA",
                            ).log_likelihood
                        )  # fmt: skip
                    return scored[0][len(found)]

                found: list[tuple[Tensor, Tensor]] = []
                for _ in steering.arms:
                    choice = multiple_choice(
                        questions,
                        self.tokenizer,
                        likelihoods,
                        encoder_decoder=self.pair.encoder_decoder,
                    )
                    found.append((choice.mc1, choice.mc2))
                return torch.stack([a for a, _ in found]), torch.stack([b for _, b in found])

        steered = measure(self.study.start, self._steering(v, self.strengths))
        own = measure(self.study.target, Steering.none(self.pair.width))
        for key, values, level in zip(
            ("truthfulqa_mc1", "truthfulqa_mc2"), steered, own, strict=True
        ):
            curve = self.ledger.entry(key, "teacher_forced", clusters)
            curve.values["v"], curve.target = values, level[0]

    # ------------------------------------------------------------------ description

    def _text_counts(self, written: Mapping[str, list[Generated]]) -> Json:
        kinds = {kind: [] for kind in ("empty", "loop", "role_header")}  # type: dict[str, list[int]]
        for item in written["v"]:
            found = [screen(text) for text in item.texts]
            for kind, row in kinds.items():
                row.append(found.count(kind))  # type: ignore[arg-type]
        n = len(self.prompts)
        return {
            "n": n,
            "degenerate": [
                sum(row[i] for row in kinds.values()) / n for i in range(len(self.strengths))
            ],
            "kinds": kinds,
            "greedy": self.config.temperature == 0,
            "max_new_tokens": self.config.max_new_tokens,
            "fast_path": self.fast,
            "decoder_note": self.decoder_note,
        }

    def _grid(self, live: LiveRange | None) -> Json:
        if live is None:
            return {"chosen_on": "given", "collapse": None, "collapse_negative": None, "probes": []}
        return {
            "chosen_on": "tune",
            "collapse": live.high,
            "collapse_negative": live.low,
            "threshold": live.threshold,
            "probes": [{"strength": s, "degenerate": share} for s, share in live.probes],
        }

    def _headline(self, site: str, metrics: Mapping[str, Json]) -> dict[str, Json]:
        recovered = metrics["kl_recovered"]["curves"]["v"]
        known = [
            (point["value"], s)
            for point, s in zip(recovered, self.strengths, strict=True)
            if point is not None
        ]
        at_one = recovered[self.strengths.index(1.0)] if 1.0 in self.strengths else None
        return {
            "site": site,
            "kl_recovered": _value(at_one),
            "kl_recovered_best": max(known)[0] if known else None,
            "best_strength": max(known)[1] if known else None,
            "strengths": len(self.strengths),
        }

    # ------------------------------------------------------------------ files

    def _save(self, written: Mapping[str, list[Generated]]) -> None:
        rows: list[Json] = []
        for name, series in written.items():
            levels = [None] if name == "target" else self.strengths
            for strength, item in zip(levels, series, strict=True):
                rows += [
                    {"arm": name, "strength": strength, "prompt": number, "text": text}
                    for number, text in enumerate(item.texts)
                ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with atomic_path(self.study.folder / "generations.jsonl") as path:
            path.write_text(lines, encoding="utf-8")

    def _explorer(self, written: Mapping[str, list[Generated]], v: SteeringVector) -> Json:
        study, config = self.study, self.config
        count = config.sample_prompts
        if self.samples is None:
            pairs, source = self.prompts[:count], "test prompts"
            steered = [item.texts[:count] for item in written["v"]]
            aim = written["target"][0].texts[:count]
        else:
            pairs, source = self.samples
            encoded, label = self._encode(pairs), "texts, samples"
            steering = self._steering(v, self.strengths)
            made = self._decode(study.start, encoded, steering, label, "samples")
            steered = list(made.texts)
            aim = self._decode(study.target, encoded, None, label, "samples-target").texts[0]
        ends: dict[str, Sequence[str]] = {
            study.start: steered[self.strengths.index(0.0)],
            study.target: aim,
        }
        return {
            "start": study.start,
            "target": study.target,
            "sign": study.sign,
            "arm": "v",
            "site": v.site,
            "strengths": list(self.strengths),
            "source": source,
            "prompts": shown(pairs, steered, ends),
        }


# ---------------------------------------------------------------------------------- small parts


def _generated(decoded: Decoded) -> list[Generated]:
    return [
        Generated(texts, tokens)
        for texts, tokens in zip(decoded.texts, decoded.tokens, strict=True)
    ]


def _rewards(
    likelihoods: Tensor, reference: Tensor, answers: _Answers, beta: float
) -> dict[str, Tensor]:
    """Margins of the implicit reward (arms, pairs), and whether they are above 0 (a tie: ½)."""
    rewards = beta * (likelihoods - reference)
    margins = rewards[:, : answers.pairs] - rewards[:, answers.pairs :]
    match = preference_match(margins)
    return {"reward_margin": margins, "preference_match": match}


def _empty(metric: Json) -> bool:
    points = [point for curve in metric["curves"].values() for point in curve]
    return metric["target"] is None and all(point is None for point in points)


def _value(point: Json) -> float | None:
    return None if point is None else point["value"]
