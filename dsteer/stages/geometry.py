"""Measure the geometry of preferences: e_w − e_l, gradients of the DPO loss, and clouds of states.

Pairs are those of the test split; the mean e_w − e_l that ``interpolation`` steers with is that of
the fit pairs. n is the final_norm state that predicts the first token in which a pair's answers
differ, so it is the same text for both answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.reading import Reading
from dsteer.activations.sites import FINAL_NORM, resid_post, resolve_sites
from dsteer.config import GeometryConfig
from dsteer.data.jsonl import read_pairs
from dsteer.geometry.alignment import cosine_to
from dsteer.geometry.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    held_out_cosine,
    proportion,
)
from dsteer.geometry.preference import (
    PrincipalAxes,
    loss_weights,
    margins,
    orthonormal,
    other_pairs,
    paired_cosines,
    pairwise_cosines,
    preference_gradients,
    preference_vectors,
    random_cosines,
    unit_rows,
)
from dsteer.models.pair import ModelPair, Which
from dsteer.models.readout import Readout
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, write_tensors
from dsteer.training.divergence import DivergentPairs
from dsteer.training.gradients import MarginGradients, margin_gradients

RANDOM_COSINES = 20_000
"""Cosines of independent random directions that the null of figure 1b shows."""

POLICIES: tuple[Which, ...] = ("base", "tuned")

_BIAS = (
    "A constant vector at final_norm changes each pair's margin by a number that depends on the "
    "pair's two tokens alone, never on the prompt: it is a bias of the logits. The margin change "
    "that v* alone gives, and the products with other pairs' e_w − e_l, say how much of the "
    "measured change is of that kind."
)
_SUMMED = (
    "A sequence gradient is summed over all tokens of the chosen and the rejected text: it is the "
    "gradient with respect to one vector added to the site's state at every token. Before the "
    "final norm gradients are multiplied by the norm's Jacobian (and by that of the blocks above), "
    "so they are no sums of unembedding rows. Only at the shared context's last token, at "
    "final_norm, is the gradient exactly −β σ(−β(m − m_ref)) (e_w − e_l)."
)
_TRANSLATED = (
    "A steered cloud is its model's own cloud moved by ±v*: its shape says nothing about steering, "
    "and h_base + v* is as far from h_tuned as h_tuned − v* is from h_base, prompt by prompt."
)

_AS_THEY_STAND = (
    "Prompts that are texts are read here as they stand, as DPO trains on them; the states that v* "
    "is the mean of were read through the chat template, so n is a state of another form."
)


def run(context: StageContext) -> Json:
    """Measure; write ``preference.safetensors`` (fit pairs) and ``geometry.safetensors``."""
    config = context.config.geometry or GeometryConfig()
    activations = PairedActivations.open(context.input("activations"))
    vectors = SteeringVectorSet.load(context.input("vector") / "vectors.safetensors")
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    inner = resid_post((pair.n_blocks - 1) // 2)
    wanted = (
        inner if config.inner_site == "auto" else config.inner_site,
        resid_post(pair.n_blocks - 1),
        FINAL_NORM,
    )
    sites = resolve_sites(wanted, pair.n_blocks)
    measure = _Measure(context, config, vectors, pair.width)

    limit = min(n for n in (config.max_tokens, pair.max_positions) if n is not None)
    template = context.result("activations")["template"]
    given = {
        split: read_pairs(context.input("data") / f"{split}.jsonl") for split in ("fit", "test")
    }
    fit, test = (
        DivergentPairs.of(
            pairs, pair.tokenizer_for(template), limit, encoder_decoder=pair.encoder_decoder
        )
        for pairs in given.values()
    )
    test = test.first(config.pairs)
    reading = _read(context, pair, test, sites, config) if test.examples or fit.examples else None
    tensors: dict[str, np.ndarray] = {}
    preference, gradients, notes = None, None, [*pair.notes]
    if template == "chat" and any(isinstance(item.prompt, str) for item in chain(*given.values())):
        notes.append(_AS_THEY_STAND)
    mean = None
    if reading is not None:
        mean = _mean_preference(context, fit, reading)
        if test.examples:
            preference = measure.preference(test, fit, reading, mean, tensors)
            gradients = measure.gradients(test, reading, mean, sites, tensors)
    clouds = measure.clouds(activations, context.result("activations"), sites, tensors)
    write_tensors(context.folder / "geometry.safetensors", tensors)
    result: dict[str, Json] = {
        "beta": measure.beta,
        "width": pair.width,
        "sites": list(sites),
        "pairs": {"fit": _counts(fit), "test": _counts(test)},
        "preference": preference,
        "gradients": gradients,
        "clouds": clouds,
        "headline": _headline(preference, gradients, clouds),
        "notes": notes + _notes(context, fit, test, preference, gradients, clouds, reading, mean),
    }
    draw_result("geometry", result, context.folder)
    return result


# ---------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class _Read:
    """What was read of both models."""

    states: dict[Which, Tensor]
    heads: dict[Which, Readout]
    gradients: dict[Which, MarginGradients]
    dtype: str

    def vectors(self, which: Which, pairs: DivergentPairs) -> Tensor:
        """e_w − e_l of each pair in a model's own head."""
        head = self.heads[which]
        return preference_vectors(head.weight, *pairs.tokens, head.scale)

    @property
    def same_heads(self) -> bool:
        base, tuned = self.heads["base"], self.heads["tuned"]
        return base.scale == tuned.scale and torch.equal(base.weight, tuned.weight)


def _read(
    context: StageContext,
    pair: ModelPair,
    test: DivergentPairs,
    sites: Sequence[str],
    config: GeometryConfig,
) -> _Read:
    """Both models, one after the other: head, states at the divergence, gradients."""
    states: dict[Which, Tensor] = {}
    heads: dict[Which, Readout] = {}
    gradients: dict[Which, MarginGradients] = {}
    for which in POLICIES:
        with pair.using(which) as model:
            heads[which] = Readout.of(model, vocabulary=pair.vocabulary)
            if test.examples:
                reading = Reading.of(pair, test.contexts, sites=FINAL_NORM, position="context_last")
                read = reading.run(model, which, reporter=context.reporter)
                states[which] = read[FINAL_NORM].double()
                gradients[which] = margin_gradients(
                    model,  # type: ignore[arg-type]  # a language model
                    test.examples[: config.gradient_pairs],
                    sites,
                    context.reporter,
                )
            del model
    pair.release()
    return _Read(states, heads, gradients, context.config.models.dtype)


def _mean_preference(
    context: StageContext, fit: DivergentPairs, read: _Read
) -> SteeringVector | None:
    """The mean e_w − e_l of the fit pairs, written; None without such pairs, or where it is 0."""
    if not fit.examples:
        return None
    mean = SteeringVector(read.vectors("base", fit).mean(dim=0), FINAL_NORM, n=len(fit.examples))
    if mean.undefined:
        return None
    SteeringVectorSet(
        [mean], {"run": context.config.name, "quantity": "mean e_w − e_l, in logits", "rows": "fit"}
    ).save(context.folder / "preference.safetensors")
    return mean


# ---------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class _Measure:
    """What every measure of this stage needs."""

    context: StageContext
    config: GeometryConfig
    steering: SteeringVectorSet
    width: int

    @property
    def beta(self) -> float:
        return self.context.config.reward_beta

    def mean(self, values: Tensor, keys: Sequence[str]) -> Json:
        interval = bootstrap_mean(
            values,
            keys,
            draws=self.config.bootstrap,
            confidence=self.config.confidence,
            seed=self.context.seed("bootstrap"),
        )
        return _json(interval)

    def v(self, site: str) -> Tensor | None:
        """v* of a site; None where it was not read or is zero."""
        if site not in self.steering or self.steering[site].undefined:
            return None
        return self.steering[site].tensor

    # ------------------------------------------------------------------ 1a

    def preference(
        self,
        test: DivergentPairs,
        fit: DivergentPairs,
        read: _Read,
        mean: SteeringVector | None,
        tensors: dict[str, np.ndarray],
    ) -> dict[str, Json]:
        """e_w − e_l, and the margins of both models at the first diverging token."""
        keys = test.keys
        e, own = read.vectors("base", test), read.vectors("tuned", test)
        base, tuned = read.states["base"], read.states["tuned"]
        delta = tuned - base
        before, after = margins(base, e), margins(tuned, e)
        change = after - before
        cosine = paired_cosines(delta, e)
        v = self.v(FINAL_NORM)
        pairwise = pairwise_cosines(
            e, keys, confidence=self.config.confidence, seed=self.context.seed("signs")
        )
        tensors |= {
            "margin/base": before.numpy(),
            "margin/tuned": after.numpy(),
            "margin/cosine": cosine.numpy(),
        }
        self._sketch(base, tuned, e, mean, v, tensors)
        fitted = read.vectors("base", fit) if fit.examples else None
        return {
            "n": len(test.examples),
            "norm": self.mean(e.norm(dim=1), keys),
            "pairwise_cosine": _json(pairwise.mean),
            "pairwise_sign_flip_q95": pairwise.sign_flip_q95,
            "mean": None
            if fitted is None
            else {
                "n": len(fit.examples),
                "norm": float(fitted.mean(dim=0).norm()),
                "relative_norm": _over(fitted.mean(dim=0).norm(), fitted.norm(dim=1).mean()),
                "held_out_cosine": _json(
                    held_out_cosine(
                        fitted,
                        e,
                        fit.keys,
                        keys,
                        draws=self.config.bootstrap,
                        confidence=self.config.confidence,
                        seed=self.context.seed("bootstrap"),
                    )
                ),
                "cosine_v": _cosine(None if mean is None else mean.tensor, v),
            },
            "margin_base": self.mean(before, keys),
            "margin_tuned": self.mean(after, keys),
            "margin_change": self.mean(change, keys),
            "margin_change_other_pairs": self._others(delta, e, keys),
            "margin_change_v": None if v is None else self.mean(e @ v, keys),
            "margin_change_own_heads": None
            if read.same_heads
            else self.mean(margins(tuned, own) - before, keys),
            "share_rising": _json(
                proportion((change > 0).double(), keys, confidence=self.config.confidence)
            ),
            "cosine": self.mean(cosine, keys),
            "cosine_other_pairs": self._others(unit_rows(delta), unit_rows(e), keys),
            "cosine_v": None if v is None else self.mean(cosine_to(e, v), keys),
            "random_sd": self.width**-0.5,
            "softcap": read.heads["base"].softcap,
        }

    def _others(self, rows: Tensor, partners: Tensor, keys: Sequence[str]) -> Json:
        return _json(other_pairs(rows, partners, keys, confidence=self.config.confidence))

    def _sketch(
        self,
        base: Tensor,
        tuned: Tensor,
        e: Tensor,
        mean: SteeringVector | None,
        v: Tensor | None,
        tensors: dict[str, np.ndarray],
    ) -> None:
        """Coordinates of figure 1a: along the mean e_w − e_l, along what v* adds, and along what
        the base's states spread most in beside these."""
        direction = e.mean(dim=0) if mean is None else mean.tensor
        spread = PrincipalAxes.fit(base, 3).axes
        named = [direction, *([] if v is None else [v]), *spread]
        axes, used = orthonormal([vector for vector in named if bool(vector.any())])
        axes, used = axes[:3], used[:3]
        places = base @ axes.T
        origin = places.median(dim=0).values  # some contexts lie far out: no mean
        tensors |= {
            "sketch/base": (places - origin).numpy(),
            "sketch/tuned": (tuned @ axes.T - origin).numpy(),
            "sketch/preference": (axes @ direction).numpy(),
            "sketch/used": np.array(used, dtype=np.int64),
        }
        if v is not None:
            tensors["sketch/v"] = (axes @ v).numpy()

    # ------------------------------------------------------------------ 1b

    def gradients(
        self,
        test: DivergentPairs,
        read: _Read,
        mean: SteeringVector | None,
        sites: Sequence[str],
        tensors: dict[str, np.ndarray],
    ) -> dict[str, Json]:
        """Directions of descent of the DPO loss at each site, for the base and the tuned model."""
        pairs = test.first(self.config.gradient_pairs)
        tensors["gradient/random"] = random_cosines(
            self.width, RANDOM_COSINES, self.context.seed("random")
        ).numpy()
        reference = read.gradients["base"].margins
        policies: dict[str, Json] = {}
        for which in POLICIES:
            found = read.gradients[which]
            push = loss_weights(found.margins, reference, self.beta)
            e = read.vectors(which, pairs)
            exact = -preference_gradients(e, found.margins, reference, self.beta)
            policies[which] = {
                "loss_weight": self.mean(push, pairs.keys),
                "formula_error": None
                if read.heads[which].softcap is not None
                else _error(push[:, None] * found.context[FINAL_NORM], exact),
                "sites": {
                    site: self._descent(
                        push[:, None] * found.sequence[site],
                        push[:, None] * found.context[site],
                        site,
                        which,
                        pairs.keys,
                        (e, mean) if site == FINAL_NORM else None,
                        tensors,
                    )
                    for site in sites
                },
            }
        return {"n": len(pairs.examples), "random_sd": self.width**-0.5, "policies": policies}

    def _descent(
        self,
        sequence: Tensor,
        at_context: Tensor,
        site: str,
        which: Which,
        keys: Sequence[str],
        preference: tuple[Tensor, SteeringVector | None] | None,
        tensors: dict[str, np.ndarray],
    ) -> dict[str, Json]:
        """One site's directions of descent, summed over each pair's texts, and at its context."""
        v = self.v(site)
        result: dict[str, Json] = {"undefined": not bool(sequence.any())}
        for name, rows in (("sequence", sequence), ("context", at_context)):
            cosines = pairwise_cosines(
                rows,
                keys,
                confidence=self.config.confidence,
                seed=self.context.seed("signs"),
            )
            to_v = None if v is None else cosine_to(rows, v)
            result[name] = {
                "pairwise_cosine": _json(cosines.mean),
                "pairwise_sign_flip_q95": cosines.sign_flip_q95,
                "cosine_v": None if to_v is None else self.mean(to_v, keys),
                "mean_cosine_v": _cosine(rows.mean(dim=0), v),
                "norm": self.mean(rows.norm(dim=1), keys),
            }
            if preference is not None:
                e, mean = preference
                result[name] |= {
                    "cosine_preference": self.mean(paired_cosines(rows, e), keys),
                    "cosine_mean_preference": None
                    if mean is None
                    else self.mean(cosine_to(rows, mean.tensor), keys),
                }
            if name == "sequence":
                tensors[f"gradient/{which}/{site}/pairwise"] = cosines.values.numpy()
                if to_v is not None:
                    tensors[f"gradient/{which}/{site}/cosine_v"] = to_v.numpy()
                tensors[f"gradient/{which}/{site}/plane"] = _plane(rows).numpy()
        return result

    # ------------------------------------------------------------------ 1c

    def clouds(
        self,
        activations: PairedActivations,
        measured: Json,
        sites: Sequence[str],
        tensors: dict[str, np.ndarray],
    ) -> dict[str, Json]:
        """h_base, h_base + v*, h_tuned, h_tuned − v* of test prompts in axes of the base's states.

        The axes are fitted on the base's states of the fit prompts.
        """
        fit, test = (slice(*measured["rows"][split]) for split in ("fit", "test"))
        keys = measured["conversations"]["test"]
        found: dict[str, Json] = {}
        for site in sites:
            if site not in activations.sites:
                continue
            states = activations.base[site].double()
            axes = PrincipalAxes.fit(states[fit])
            base, tuned = states[test], activations.tuned[site][test].double()
            v = self.v(site)
            clouds = {"base": base, "tuned": tuned}
            if v is not None:
                clouds |= {"base_plus": base + v, "tuned_minus": tuned - v}
            tensors |= {
                f"cloud/{site}/{name}": axes.project(rows).numpy() for name, rows in clouds.items()
            }
            delta = tuned - base
            apart = delta.norm(dim=1)
            steered = None if v is None else (delta - v).norm(dim=1)
            found[site] = {
                "n_fit": axes.n,
                "n": len(base),
                "explained": list(axes.explained),
                "v_in_plane": None if v is None else axes.share(v),
                "distance": self.mean(apart, keys),
                "distance_steered": None if steered is None else self.mean(steered, keys),
                "distance_ratio": None if steered is None else self._ratio(steered, apart, keys),
                "centre_distance": float(delta.mean(dim=0).norm()),
                "centre_distance_steered": None
                if v is None
                else float((delta.mean(dim=0) - v).norm()),
                "spread_base": _spread(base),
                "spread_tuned": _spread(tuned),
                "undefined": v is None,
            }
        return found

    def _ratio(self, above: Tensor, below: Tensor, keys: Sequence[str]) -> Json:
        return _json(
            bootstrap_ratio(
                above,
                below,
                keys,
                draws=self.config.bootstrap,
                confidence=self.config.confidence,
                seed=self.context.seed("bootstrap"),
            )
        )


def _counts(pairs: DivergentPairs) -> dict[str, Json]:
    used = len(pairs.examples)
    return {
        "with_answers": pairs.with_answers,
        "used": used,
        "no_divergence": pairs.no_divergence,
        "prompts_cut": pairs.prompts_cut,
        "answers_cut": pairs.answers_cut,
        "at_first_token": sum(k == 0 for k in pairs.at) / used if used else None,
        "median_position": float(np.median(pairs.at)) if used else None,
        "distinct_token_pairs": len(set(zip(*pairs.tokens, strict=True))),
    }


def _plane(rows: Tensor) -> Tensor:
    """Unit rows in the plane of their mean and of what they spread most in beside it (n, 2)."""
    unit = unit_rows(rows)
    mean = unit.mean(dim=0)
    norm = float(mean.norm())
    if norm == 0:
        return torch.zeros(len(unit), 2, dtype=torch.float64)
    along = unit @ (mean / norm)
    spread = PrincipalAxes.fit(unit - along[:, None] * (mean / norm), 1)
    across = unit @ spread.axes[0] if len(spread.axes) else torch.zeros_like(along)
    return torch.stack([along, across], dim=1)


def _agree(descent: Mapping[str, Json]) -> bool:
    """Whether the pairs' mean cosine, with its interval, lies above what random signs give."""
    mean = descent["pairwise_cosine"]
    if mean is None:
        return False
    low = mean["value"] if mean["low"] is None else mean["low"]
    return bool(low > descent["pairwise_sign_flip_q95"])


def _spread(rows: Tensor) -> float:
    """Root mean square distance from the mean."""
    return float((rows - rows.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def _cosine(a: Tensor | None, b: Tensor | None) -> float | None:
    if a is None or b is None:
        return None
    value = float(paired_cosines(a[None], b[None])[0])
    return None if np.isnan(value) else value


def _error(found: Tensor, exact: Tensor) -> float:
    """Largest ‖found − exact‖ / ‖exact‖ over the rows."""
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


def _over(above: Tensor, below: Tensor) -> float | None:
    return float(above / below) if float(below) else None


def _json(interval: Interval | None) -> Json:
    return interval.json() if interval else None


def _value(interval: Json) -> float | None:
    return interval["value"] if interval else None


# ---------------------------------------------------------------------------------- words


def _headline(
    preference: dict[str, Json] | None,
    gradients: dict[str, Json] | None,
    clouds: Mapping[str, Json],
) -> dict[str, Json]:
    start = gradients["policies"]["base"]["sites"][FINAL_NORM]["sequence"] if gradients else {}
    return {
        "margin_change": _value(preference["margin_change"]) if preference else None,
        "share_rising": _value(preference["share_rising"]) if preference else None,
        "cosine_v_preference": preference["mean"]["cosine_v"]
        if preference and preference["mean"]
        else None,
        "gradient_pairwise_cosine": _value(start.get("pairwise_cosine")),
        "gradient_cosine_v": _value(start.get("cosine_v")),
        "distance_ratio": _value(clouds[FINAL_NORM]["distance_ratio"])
        if FINAL_NORM in clouds
        else None,
    }


def _notes(
    context: StageContext,
    fit: DivergentPairs,
    test: DivergentPairs,
    preference: dict[str, Json] | None,
    gradients: dict[str, Json] | None,
    clouds: Mapping[str, Json],
    read: _Read | None,
    mean: SteeringVector | None,
) -> list[str]:
    notes = []
    if preference is None or read is None or gradients is None:
        notes.append(
            "Figures 1a and 1b were left out: "
            + (
                "no test prompt has two answers."
                if not test.with_answers
                else f"none of the {test.with_answers} test pairs has answers that diverge."
            )
        )
    else:
        notes += [_where(test), _BIAS, _SUMMED, *_about_heads(read, preference)]
        notes += _about_gradients(context, gradients, read)
    if not fit.examples:
        notes.append(
            "preference.safetensors was not written: no fit pair has answers that diverge."
        )
    elif mean is None:
        notes.append("preference.safetensors was not written: the mean e_w − e_l is exactly zero.")
    undefined = [site for site, cloud in clouds.items() if cloud["undefined"]]
    if undefined:
        notes.append(f"No steered clouds where v* is zero: {', '.join(undefined)}.")
    if any(not cloud["undefined"] for cloud in clouds.values()):
        notes.append(_TRANSLATED)
    position = context.result("activations")["position"]
    if position != "prompt_last":
        notes.append(
            f"v* was read at position {position}; n is the state that predicts the first diverging "
            "token, so v* and these pairs are from different positions."
        )
    return notes


def _where(test: DivergentPairs) -> str:
    counts = _counts(test)
    used = counts["used"]
    at_first = sum(k == 0 for k in test.at)
    text = (
        f"{used} test pairs: the answers of {at_first} differ in their first token, the median "
        f"pair at token {counts['median_position'] + 1:g}. {counts['distinct_token_pairs']} "
        "different pairs of first diverging tokens (w, l) stand behind e_w − e_l."
    )
    if test.no_divergence:
        text += (
            f" {test.no_divergence} of {test.with_answers} pairs were left out: within the length "
            "that was read their answers do not differ."
        )
    cut = [
        f"{count} {what}"
        for count, what in (
            (test.prompts_cut, "prompts lost their left"),
            (test.answers_cut, "pairs lost the end of an answer"),
        )
        if count
    ]
    if cut:
        diverging = test.with_answers - test.no_divergence
        text += f" To fit, {' and '.join(cut)} (of all {diverging} diverging pairs)."
    return text


def _about_heads(read: _Read, preference: Mapping[str, Json]) -> list[str]:
    notes = []
    base = read.heads["base"]
    if not read.same_heads:
        notes.append(
            "The unembeddings differ: margins are taken with the base's e_w − e_l for both models; "
            "margin_change_own_heads takes each model's own."
        )
    if base.scale != 1:
        notes.append(
            f"The model multiplies its logits by {base.scale:g}; e_w − e_l holds that factor."
        )
    if base.bias is not None:
        notes.append(
            "The head has a bias, which the margins leave out; it cancels in their change if the "
            "tuned model kept it."
        )
    if preference["softcap"] is not None:
        notes.append(
            f"The model soft-caps its logits at {base.softcap:g}: e_w − e_l and the margins are "
            "those before the cap, and the exact formula of the gradient does not hold."
        )
    return notes


def _about_gradients(
    context: StageContext, gradients: Mapping[str, Json], read: _Read
) -> list[str]:
    notes = [
        f"Gradients are of the sigmoid DPO loss with the base as reference, on {gradients['n']} "
        "pairs: with the base as policy (the start of a training, where every pair weighs β/2) and "
        "with the tuned model as policy (where the loss has mostly done what it asks for)."
    ]
    start = gradients["policies"]["base"]["sites"]
    lost = [site for site, found in start.items() if not _agree(found["sequence"])]
    if lost:
        notes.append(
            "The gradients of different pairs share no direction that can be told from chance at "
            f"{', '.join(lost)} (base as policy, all tokens): the interval of their mean cosine "
            "reaches down to the 95 % quantile under random signs."
        )
    if context.config.dpo is None:
        beta = context.config.reward_beta
        notes.append(f"The pipeline trains no model: gradients were taken with β = {beta:g}.")
    elif context.config.dpo.loss_type != "sigmoid":
        notes.append(
            f"The model was trained with the {context.config.dpo.loss_type} loss; the gradients "
            "are of the sigmoid loss."
        )
    if read.dtype != "float32":
        notes.append(f"The models were read in {read.dtype}: gradients carry its rounding.")
    return notes
