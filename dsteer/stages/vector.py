"""Average v* a site; measure its size, direction, convergence, and its reach at `final_norm`.

v* is the mean displacement of the fit rows. The strength of least KL is chosen on the tune rows;
what is reported of it, and of every other strength, is measured on the test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.moments import SiteMoments, open_streamed
from dsteer.activations.sites import ENCODER, FINAL_NORM
from dsteer.config import VectorConfig
from dsteer.geometry.displacement import radial, strengths_along
from dsteer.geometry.intervals import Interval, SplitHalf, bootstrap_mean, convergence
from dsteer.geometry.logits import KLRecovery, kl_recovery, noise_kl
from dsteer.geometry.sums import (
    BUCKETS,
    ClusterSums,
    convergence_from_sums,
    strength_from_sums,
)
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.names import telling_parts
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.build import mean_difference
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, looks_like_hub_id, read_json, read_tensors

ABOVE_NOISE = 5.0
"""A norm, or a KL, counts as measured when it is more than so many times its noise floor."""

CONSTANT_BIAS = (
    "At final_norm λv* adds the same logit bias λ·W_U·v* to every token of every prompt (before a "
    "soft cap and in units of the model's logit scale, where it has these): it can do nothing that "
    "depends on the prompt."
)

BUCKETED = (
    f"store: moments: conversations were summed in {BUCKETS} buckets by the hash of their key. "
    "Intervals of strengths resample buckets, and samples of the convergence curve are whole "
    "buckets."
)


def run(context: StageContext) -> Json:
    """Fit and measure v* at every site; write ``vectors.safetensors``."""
    config = context.config.vector or VectorConfig()
    measured = context.result("activations")
    rows = {split: slice(*measured["rows"][split]) for split in ("fit", "tune", "test")}
    keys = measured["conversations"]
    folder = context.input("activations")
    activations = PairedActivations.open(folder)
    streamed = open_streamed(folder)
    if streamed is None:
        ends = (activations.offsets.index(row) for row in measured["rows"]["fit"])
        fitted = mean_difference(activations, rows=slice(*ends))  # of prompts, not of rows
    else:
        fitted = mean_difference(streamed["fit"])
    vectors = SteeringVectorSet(fitted.values(), _metadata(context, measured))
    vectors.save(context.folder / "vectors.safetensors")

    sites: dict[str, Json] = {}
    curves: dict[str, Json] = {}
    with context.reporter.bar("vectors", len(activations.sites), unit="site") as advance:
        for site in activations.sites:
            seeds = context.seed(site), context.seed(site, "halves")
            if streamed is None:
                base = activations.base[site].double()
                found = _from_states(
                    base[rows["fit"]],
                    activations.tuned[site].double() - base,
                    rows,
                    vectors[site].tensor,
                    keys,
                    config,
                    seeds,
                )
            else:
                found = _from_moments(
                    streamed["fit"][site],
                    streamed["test"][site].sums,
                    vectors[site].tensor,
                    config,
                    seeds,
                )
            sites[site] = _size(
                vectors[site],
                found,
                measured["noise_floor"][site],
                bool(measured.get("post_norm")),
            )
            sites[site]["strength_least_squares"] = found.strength
            curves[site] = [half.json() for half in found.halves]
            advance(1)

    notes = _notes(sites)
    if streamed is not None:
        notes.append(BUCKETED)
    recovery: dict[str, Json] = {"first_token": None, "response": None}
    if FINAL_NORM in vectors:
        recovery = _recovery(context, config, measured, activations, vectors[FINAL_NORM].tensor)
        notes += [CONSTANT_BIAS, *_recovery_notes(recovery, measured)]
    else:
        notes.append("KL recovered was not measured: final_norm is not among the sites read.")
    result = {
        "n": fitted[activations.sites[0]].metadata["n"],
        "sites": sites,
        "convergence": curves,
        "kl_recovery": recovery,
        "headline": _headline(sites, recovery),
        "notes": notes,
    }
    draw_result("vector", result, context.folder)
    return result


def _metadata(context: StageContext, measured: Json) -> dict[str, Json]:
    """What a reader of the vectors' file must know of them (the set adds its own)."""
    models = context.config.models
    return {
        "run": context.config.name,
        "base": _name(models.base),
        "base_revision": models.base_revision,
        "tuned": _name(models.tuned),
        "tuned_revision": models.tuned_revision,
        "position": measured["position"],
        "template": measured["template"],
        "ids_sha256": measured["ids_sha256"],
    }


def _name(model: str | None) -> str:
    if model is None:
        return "trained by this run"
    return model if looks_like_hub_id(model) else "/".join(telling_parts(model)[-2:])


# ---------------------------------------------------------------------------------- a site


@dataclass(frozen=True)
class _Found:
    """What a site's displacements and base states say.

    Attributes:
        mean_base: the mean base state of the fit rows.
        mean_norm: the mean of ‖h_base‖ over them.
        strength: the least-squares strength of v* on the test rows.
        halves: convergence of v* on the fit rows.
    """

    mean_base: Tensor
    mean_norm: float
    strength: Json
    halves: list[SplitHalf]


def _from_states(
    base: Tensor,
    delta: Tensor,
    rows: Mapping[str, slice],
    v: Tensor,
    keys: Mapping[str, Sequence[str]],
    config: VectorConfig,
    seeds: tuple[int, int],
) -> _Found:
    return _Found(
        base.mean(dim=0),
        float(base.norm(dim=1).mean()),
        _strength(delta[rows["test"]], v, keys["test"], config, seeds[0]),
        convergence(
            delta[rows["fit"]],
            clusters=keys["fit"],
            draws=config.convergence_draws,
            confidence=config.confidence,
            seed=seeds[1],
        ),
    )


def _from_moments(
    fit: SiteMoments, test: ClusterSums, v: Tensor, config: VectorConfig, seeds: tuple[int, int]
) -> _Found:
    strength = strength_from_sums(
        test, v, draws=config.bootstrap, confidence=config.confidence, seed=seeds[0]
    )
    return _Found(
        torch.from_numpy(fit.matrices["base"].mean),
        fit.base_norms / fit.n,
        _json(strength),
        convergence_from_sums(
            fit.sums,
            draws=config.convergence_draws,
            confidence=config.confidence,
            seed=seeds[1],
        ),
    )


def _size(
    vector: SteeringVector, found: _Found, noise: Mapping[str, float], post_norm: bool
) -> dict[str, Json]:
    """Norm and direction of v*, beside the noise floor and the base's states."""
    result: dict[str, Json] = {
        "norm": vector.norm,
        "noise_rms": noise["rms"],
        "noise_mean_norm": noise["mean_norm"],
        "undefined": vector.undefined,
    }
    if vector.undefined:
        ratios = ("relative_norm", "radial_cosine", "radial_norm", "tangential_norm", "inert")
        return result | dict.fromkeys(ratios) | {"within_rounding": None}
    parts = radial(vector.tensor, found.mean_base)
    return result | {
        "relative_norm": vector.norm / found.mean_norm,
        "within_rounding": vector.norm <= ABOVE_NOISE * noise["mean_norm"],
        "radial_cosine": parts.cosine,
        "radial_norm": parts.radial_norm,
        "tangential_norm": parts.tangential_norm,
        # no norm follows there
        "inert": None if post_norm or vector.site in {FINAL_NORM, ENCODER} else parts.inert,
    }


def _strength(
    delta: Tensor, v: Tensor, keys: Sequence[str], config: VectorConfig, seed: int
) -> Json:
    """The least-squares strength of v in displacements, with its interval."""
    strengths = strengths_along(delta, v)
    if strengths is None:
        return None
    return _json(
        bootstrap_mean(
            strengths, keys, draws=config.bootstrap, confidence=config.confidence, seed=seed
        )
    )


def _notes(sites: Mapping[str, Json]) -> list[str]:
    def where(key: str) -> str:
        return ", ".join(site for site, result in sites.items() if result[key])

    notes = []
    if undefined := where("undefined"):
        notes.append(
            "v* is zero and its ratios are undefined where base and tuned agree exactly on every "
            f"fit prompt: {undefined}."
        )
    if rounding := where("within_rounding"):
        notes.append(
            f"v* is within rounding at {rounding}: its norm is not above {ABOVE_NOISE:g} times the "
            "noise floor, so its direction there means nothing."
        )
    if inert := where("inert"):
        notes.append(
            f"v* is behaviourally inert at {inert}: it lies along the base's mean state, and the "
            "next norm undoes a change of length. Cosines there look like steering and are not."
        )
    return notes


# ---------------------------------------------------------------------------------- KL recovered


@dataclass(frozen=True)
class _Reach:
    """Measures KL recovered by v* at `final_norm` on any rows."""

    v: Tensor
    base_head: Readout
    tuned_head: Readout
    noise_rms: float
    config: VectorConfig
    seed: int

    def measure(
        self, base: Tensor, tuned: Tensor, keys: Sequence[str], strengths: Sequence[float]
    ) -> KLRecovery:
        return kl_recovery(
            base,
            tuned,
            self.v,
            self.base_head,
            self.tuned_head,
            strengths,
            keys,
            linear=self.base_head.linear,
            draws=self.config.bootstrap,
            confidence=self.config.confidence,
            seed=self.seed,
        )

    def floor(self, base: Tensor) -> float:
        """Mean KL, in nats, that random shifts as long as the noise make in (256 of) the rows."""
        return noise_kl(base, self.base_head, self.noise_rms, self.seed)

    def panel(
        self,
        base: Tensor,
        tuned: Tensor,
        keys: Sequence[str],
        chosen: float | None,
        tuning: KLRecovery | None = None,
    ) -> dict[str, Json]:
        """The curve on test rows, and R at the strength that was chosen on tune rows.

        The strength of least KL is that of ``tuning``, the curve on tune rows; where there is none
        it is read off the curve itself, which describes these rows and chooses nothing.
        """
        strengths = self.config.strengths
        asked = sorted({*strengths, *([] if chosen is None else [chosen])})
        curve, floor = self.measure(base, tuned, keys, asked), self.floor(base)
        optimum = curve if tuning is None else tuning
        shown = [asked.index(strength) for strength in strengths]
        at_chosen = None if chosen is None else curve.recovered[asked.index(chosen)]
        panel = {
            "strengths": list(strengths),
            "recovered": [_json(curve.recovered[i]) for i in shown],
            "kl": [curve.kl[i] for i in shown],
            "agreement": [curve.agreement[i] for i in shown],
            "optimal_strength": _json(optimum.optimal_strength),
            "optimal_on": "test" if tuning is None else "tune",
            "chosen_strength": chosen,
            "chosen_on": "tune",
            "recovered_at_chosen": _json(at_chosen),
            "least_squares_strength": _strength(
                tuned.double() - base.double(), self.v, keys, self.config, self.seed
            ),
            "kl_tuned_base": curve.kl_tuned_base,
            "kl_noise_floor": floor,
            "n": curve.n,
            "undefined": optimum.undefined,
        }
        if curve.kl_tuned_base <= ABOVE_NOISE * floor:
            panel |= {
                "recovered": [None] * len(strengths),
                "optimal_strength": None,
                "chosen_strength": None,
                "recovered_at_chosen": None,
                "undefined": f"KL(tuned‖base) is {curve.kl_tuned_base:.3g} nats, not above "
                f"{ABOVE_NOISE:g} times its noise floor ({floor:.3g}): there is nothing to recover",
            }
        return panel


def _recovery(
    context: StageContext,
    config: VectorConfig,
    measured: Json,
    activations: PairedActivations,
    v: Tensor,
) -> dict[str, Json]:
    """KL recovered for the first token of the answer, and for all its tokens (teacher-forced)."""
    heads = _heads(context)
    noise = float(measured["noise_floor"][FINAL_NORM]["rms"])
    reach = _Reach(v, *heads, noise, config, context.seed("kl"))
    recovery: dict[str, Json] = {"first_token": None, "response": None}
    chosen: float | None = None
    keys = measured["conversations"]
    tune, test = (slice(*measured["rows"][split]) for split in ("tune", "test"))
    if measured["position"] == "prompt_last":
        base, tuned = activations.base[FINAL_NORM], activations.tuned[FINAL_NORM]
        tuning = reach.measure(base[tune], tuned[tune], keys["tune"], config.strengths)
        above_noise = tuning.kl_tuned_base > ABOVE_NOISE * reach.floor(base[tune])
        if tuning.optimal_strength is not None and above_noise:
            chosen = tuning.optimal_strength.value
        recovery["first_token"] = reach.panel(base[test], tuned[test], keys["test"], chosen, tuning)
    if measured["response"] is not None:
        folder = context.input("activations")
        base, tuned = (
            torch.from_numpy(read_tensors(folder / f"response_{which}.safetensors")[FINAL_NORM])
            for which in ("base", "tuned")
        )
        first_rows = [row - test.start for row in activations.offsets[:-1] if row >= test.start]
        ends = pairwise(read_json(folder / "response.json")["offsets"])
        of_token = [
            keys["test"][row]
            for row, (start, stop) in zip(first_rows, ends, strict=True)
            for _ in range(start, stop)
        ]
        recovery["response"] = reach.panel(base, tuned, of_token, chosen)
    return recovery


def _recovery_notes(recovery: Mapping[str, Json], measured: Json) -> list[str]:
    notes = []
    for name, words in (("first_token", "first token"), ("response", "response")):
        panel = recovery[name]
        if panel is not None and panel["undefined"] is not None:
            notes.append(f"KL recovered, {words}: {panel['undefined']}.")
    if recovery["first_token"] is None:
        notes.append(
            "KL recovered at the first token was not measured, and no strength chosen: it needs "
            f"states of position prompt_last, and {measured['position']} was read."
        )
    if recovery["response"] is None:
        notes.append(
            "KL recovered on response tokens was not measured: no states of answers were read."
        )
    else:
        notes.append(
            "On response tokens the strength of least KL is read off the test prompts themselves: "
            "it describes them; R at the chosen strength is the number without a choice in it."
        )
    return notes


def _headline(sites: Mapping[str, Json], recovery: Mapping[str, Json]) -> dict[str, Json]:
    shown = FINAL_NORM if FINAL_NORM in sites else list(sites)[-1]
    first, response = recovery["first_token"] or {}, recovery["response"] or {}
    return {
        "site": shown,
        "norm": sites[shown]["norm"],
        "relative_norm": sites[shown]["relative_norm"],
        "chosen_strength": first.get("chosen_strength"),
        "kl_recovered": _value(first.get("recovered_at_chosen")),
        "kl_recovered_response": _value(response.get("recovered_at_chosen")),
    }


def _heads(context: StageContext) -> tuple[Readout, Readout]:
    """The heads of base and tuned, copied from one model at a time; one where they are equal."""
    models = context.config.models
    pair = ModelPair.configured(models, context.base_path, context.tuned_path)
    with pair.using("base") as model:
        base = Readout.of(model, vocabulary=pair.vocabulary)
        del model
    with pair.using("tuned") as model:
        tuned = Readout.of(model, vocabulary=pair.vocabulary)
        del model
    pair.release()
    return base, base if _equal(base, tuned) else tuned


def _equal(a: Readout, b: Readout) -> bool:
    if (a.scale, a.softcap, a.bias is None) != (b.scale, b.softcap, b.bias is None):
        return False
    same_bias = a.bias is None or b.bias is None or torch.equal(a.bias, b.bias)
    return same_bias and torch.equal(a.weight, b.weight)


def _json(interval: Interval | None) -> Json:
    return interval.json() if interval else None


def _value(interval: Json) -> float | None:
    return interval["value"] if interval else None
