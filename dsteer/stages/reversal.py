"""Undo the tuning: by taking λv* off, by DPO on swapped labels, by SFT on rejected answers.

Every way is read on the same test texts and against the same two models. What a way reached is its
implicit reward against the base, and the share of the tuned model's that is gone; how near the base
came back is R = 1 − Σ KL(base‖undone) / Σ KL(base‖tuned).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.behaviour.answers import Answers
from dsteer.behaviour.edited import json_of
from dsteer.behaviour.teacher_forced import Scores, predictions, preference_match, score
from dsteer.config import DpoConfig, ReversalConfig
from dsteer.data.jsonl import read_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError
from dsteer.geometry.inference import ratio_effect
from dsteer.geometry.intervals import bootstrap_mean, bootstrap_ratio, proportion
from dsteer.geometry.logits import NOTHING
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import Model, is_adapter, load_model
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, read_json, write_json
from dsteer.training.dpo import DpoRun, train_dpo
from dsteer.training.examples import answered

LOSSES: Mapping[str, Mapping[str, object]] = {
    "dpo_swapped": {},
    "sft_rejected": {"method": "dpo", "loss_type": "sft", "label_smoothing": 0.0},
}
"""Ways that train, on pairs whose answers are swapped, and what they change of ``dpo``'s loss."""

TIMING = "timing.json"
"""Seconds of each way, beside the result: they differ from run to run."""

STRENGTHS = tuple(0.25 * k for k in range(17))
"""λ from which inversion takes the one of least KL on tune."""


def run(context: StageContext) -> Json:
    """Undo the tuned model in each way and measure all of them; write ``timing.json`` beside.

    Raises:
        ConfigError: a way trains, and the tuned model is an adapter, or was trained on other labels
            than the data give.
        StoreError: inversion is asked for, and the pipeline has no such stage.
    """
    config = context.config.reversal or ReversalConfig()
    trained, seconds = {}, {}
    for way in config.ways:
        if way in LOSSES:
            trained[way], seconds[way] = _timed(context, config, way)
    if not context.ranks.main:
        return None
    bench = _Bench(context, config)
    ways: dict[str, Json] = {"tuned": bench.told(bench.tuned)}
    for way in config.ways:
        begun = time.monotonic()
        ways[way] = bench.trained(way, trained[way]) if way in trained else bench.inverted()
        seconds[way] = round(seconds.get(way, 0) + time.monotonic() - begun, 2)
    for way in trained:
        shutil.rmtree(context.folder / way / "checkpoints", ignore_errors=True)
    write_json(context.folder / TIMING, {"seconds": seconds})
    result = {
        "n_test": bench.test.pairs,
        "beta": bench.beta,
        "confidence": config.confidence,
        "ways": ways,
        "headline": {
            f"{way}_{key}": (ways[way][key] or {}).get("value")
            for way in config.ways
            for key in ("way_back", "recovered")
        },
        "notes": [*bench.notes, *(f"{w}: {note}" for w, r in trained.items() for note in r.notes)],
    }
    draw_result("reversal", result, context.folder)
    return result


def _timed(context: StageContext, config: ReversalConfig, way: str) -> tuple[DpoRun, float]:
    """A way's training and its seconds, those of an earlier start that finished it included."""
    path = context.folder / way / "checkpoints" / TIMING
    begun = time.monotonic()
    run = _train(context, config, way)
    if not path.is_file() and context.ranks.main:
        write_json(path, {"seconds": round(time.monotonic() - begun, 2)})
    return run, float(read_json(path)["seconds"]) if context.ranks.main else 0.0


def _train(context: StageContext, config: ReversalConfig, way: str) -> DpoRun:
    """Train the tuned model on the rejected answers, in a folder of the way's own."""
    models, tuned = context.config.models, context.tuned_path
    revision = None if "dpo" in context.inputs else models.tuned_revision
    if is_adapter(tuned, revision=revision):
        raise ConfigError(
            f"reversal.ways: {way} trains all weights, and the tuned model is an adapter, expected "
            "a whole model; take this way out, or merge the adapter first"
        )
    own = context.config.dpo or DpoConfig()
    if own.labels != "given":
        raise ConfigError(
            f"reversal.ways: {way} undoes a training on the labels that the data give, and "
            f"dpo.labels is {own.labels}; take this way out, or set dpo.labels to given"
        )
    settings = own.model_copy(
        update={
            "max_steps": config.steps or _steps_taken(context) or own.max_steps,
            "learning_rate": config.learning_rate or own.learning_rate,
            "stop_at_kl": None,  # it is measured to where training begins: here, the tuned model
            "lora": None,
            **LOSSES[way],
        }
    )
    pair = ModelPair.configured(models, context.base_path, tuned)
    data = context.input("data")
    train, tune = (answered(read_pairs(data / f"{name}.jsonl")) for name in ("train", "tune"))
    return train_dpo(
        lambda: load_model(
            tuned,
            dtype=models.dtype,
            device=models.device,
            revision=revision,
            trust_remote_code=models.trust_remote_code,
        ),
        pair.tokenizer,
        swapped(train),
        swapped(tune[: settings.eval_pairs]),
        settings,
        folder=context.folder / way,
        base_path=tuned,
        device=models.device,
        dtype=models.dtype,
        seed=context.seed(way),
        reporter=context.reporter,
        ranks=context.ranks,
    )


def _steps_taken(context: StageContext) -> int | None:
    """How many steps the training took that is to be undone; None if it was not of this run."""
    if "dpo" not in context.inputs:
        return None
    return int(context.result("dpo")["curve"]["train"][-1]["step"])


def swapped(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The same pairs, their answers changed over."""
    return [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]


# ---------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Read:
    """A model's scores against the base and against the tuned model."""

    to_base: Scores
    to_tuned: Scores


class _Bench:
    """Reads base and tuned model once, and anything else against both on the test pairs."""

    def __init__(self, context: StageContext, config: ReversalConfig) -> None:
        self._context, self._config = context, config
        self._models = context.config.models
        self.pair = ModelPair.configured(self._models, context.base_path, context.tuned_path)
        self.beta = context.config.reward_beta
        self.notes: list[str] = [*self.pair.notes]
        self.test = self._answers("test", config.pairs)
        with self.pair.using("base") as model:
            self._width = Anatomy.of(model).width
            self._base = predictions(model, self.test.texts, self._readout(model))
        with self.pair.using("tuned") as model:
            self._tuned = predictions(model, self.test.texts, self._readout(model))
            self.tuned = self._read(model, Steering.none(self._width))
        with self.pair.using("base") as model:
            self._plain = self._read(model, Steering.none(self._width))

    def _answers(self, split: str, pairs: int) -> Answers:
        context = self._context
        measured = context.config.activations
        given = answered(read_pairs(context.input("data") / f"{split}.jsonl"))[:pairs]
        limits = ((context.config.dpo or DpoConfig()).max_length, self.pair.max_positions)
        found = Answers.read(
            given,
            self.pair.tokenizer_for(measured.template if measured is not None else "none"),
            max_tokens=min(limit for limit in limits if limit is not None),
            response_tokens=self._config.response_tokens,
            encoder_decoder=self.pair.encoder_decoder,
            where=f"the {split} split",
        )
        if found.left_out:
            self.notes.append(
                f"{found.left_out} of {len(given)} {split} pairs were left out: their prompts fill "
                "the limit."
            )
        return found

    def _readout(self, model: Model) -> Readout:
        return Readout.of(model, vocabulary=self.pair.vocabulary)

    def _read(self, model: Model, steering: Steering) -> _Read:
        readout = self._readout(model)
        return _Read(*(
            score(model, self.test.texts, steering, readout, target,
                  reporter=self._context.reporter)
            for target in (self._base, self._tuned)
        ))  # fmt: skip

    def told(self, read: _Read) -> dict[str, Json]:
        """What a model does on the test pairs, with intervals."""
        options: dict[str, Any] = {
            "draws": self._config.bootstrap,
            "confidence": self._config.confidence,
            "seed": self._context.seed("bootstrap"),
        }
        answers, clusters = self.test, self.test.clusters

        def margins(scores: Scores) -> Float[Tensor, " m"]:
            moved = scores.log_likelihood[0] - self._plain.to_base.log_likelihood[0]
            return self.beta * answers.margins(moved)

        def share(above: Tensor, below: Tensor) -> Json:
            if float(below.abs().sum()) <= NOTHING * len(below):
                return None
            return json_of(bootstrap_ratio(above, below, clusters, **options))

        own, whole = margins(read.to_base), margins(self.tuned.to_base)
        back = ratio_effect(whole - own, whole, clusters, **options)
        chosen, rejected = answers.chosen, slice(answers.pairs, None)
        found: dict[str, Json] = {
            "reward_margin": json_of(bootstrap_mean(own, clusters, **options)),
            "accuracy": json_of(
                proportion(preference_match(own), clusters, confidence=self._config.confidence)
            ),
            "way_back": json_of(back.interval),
        }
        if back.interval is None:
            found["way_back_why"] = (
                f"the tuned model's margin is told from 0 by nothing: {back.why}"
            )
        for name, scores in (("base", read.to_base), ("tuned", read.to_tuned)):
            found[f"kl_to_{name}"] = share(scores.kl[0, chosen], scores.tokens[chosen].double())
        before = self.tuned.to_base.kl[0]
        for name, part in (("recovered", chosen), ("recovered_rejected", rejected)):
            found[name] = share((before - read.to_base.kl[0])[part], before[part])
        return found

    # ------------------------------------------------------------------ ways

    def inverted(self) -> dict[str, Json]:
        """tuned − λv*, where the inversion chose on tune; λ of least KL to the base on tune."""
        context = self._context
        sweep = context.result("inversion")
        site, positions = sweep["site"], sweep["positions"]
        vector = SteeringVectorSet.load(context.input("vector") / "vectors.safetensors")[site]
        v = vector.tensor.float()

        def off(*strengths: float) -> Steering:
            arms = tuple(Arm(v, -strength) for strength in strengths)
            return Steering(site, arms, positions=positions)

        tune = self._answers("tune", self._config.pairs)
        with self.pair.using("base") as model:
            aim = predictions(model, tune.texts, self._readout(model))
        with self.pair.using("tuned") as model:
            scores = score(model, tune.texts, off(*STRENGTHS), self._readout(model), aim)
            kl = scores.kl[:, tune.chosen].sum(1)
            chosen = STRENGTHS[int(kl.argmin())]
            read = self._read(model, off(chosen))
        return {
            **self.told(read),
            "site": site,
            "positions": positions,
            "strength": chosen,
            "strength_on": "tune",
            "curve": {
                "strengths": list(STRENGTHS),
                "kl_recovered": (1 - kl / kl[0]).tolist() if float(kl[0]) > NOTHING else None,
            },
            "tunable": True,
            "optimiser_steps": 0,
            "undoing": {"rounding": self._rounding(site, chosen * v)},
        }

    def _rounding(self, site: str, shift: Tensor) -> float | None:
        """Largest |(h − λv) + λv − h| over the largest |h|, on the stored tuned states."""
        folder = self._context.input("activations")
        if not (folder / "tuned.safetensors").is_file():
            return None
        acts = PairedActivations.open(folder)
        h = acts.tuned.rows(site, 0, len(acts.offsets) - 1).float()
        return float((((h - shift) + shift) - h).abs().max() / h.abs().max())

    def trained(self, way: str, run: DpoRun) -> dict[str, Json]:
        """A model that was trained back."""
        path = self._context.folder / way / "model"
        undone = ModelPair.configured(self._models, self._context.base_path, str(path))
        with undone.using("tuned") as model:
            read = self._read(model, Steering.none(self._width))
            weights = {name: value.detach().cpu() for name, value in model.named_parameters()}
        undone.release()
        with self.pair.using("tuned") as model:
            tuned = {name: value.detach().cpu() for name, value in model.named_parameters()}
        with self.pair.using("base") as model:
            base = {name: value.detach().cpu() for name, value in model.named_parameters()}
        away = _distance(tuned, base)
        return {
            **self.told(read),
            "tunable": False,
            "optimiser_steps": run.train_curve[-1]["step"],
            "undoing": {
                "changed_share": run.parameters["changed_share"],
                "distance_to_base": _distance(weights, base) / away if away else None,
                "distance_to_tuned": _distance(weights, tuned) / away if away else None,
            },
        }


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """‖a − b‖ over all weights that both have, float64."""
    squares = [(a[name].double() - b[name].double()).square().sum() for name in a if name in b]
    return float(torch.stack(squares).sum().sqrt())
