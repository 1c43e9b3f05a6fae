"""The causal profile: what a change of one site's states brings along of the tuned model's answers.

At each site three changes of the base are held against each other: the tuned model's own state put
in (all that the site carries), v* added (one constant), and the mean displacement of exactly the
changed tokens added. All edits of a setting share one pass. States are float32 and on the CPU:
4 bytes × tokens × (sites + 1) × d for each model, so 128 answers of 400 tokens at the 33 sites of
a model of width 4096 take 29 GB a model; fewer pairs or sites take less in proportion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.sites import FINAL_NORM
from dsteer.behaviour.edited import Bench, Split, json_of, kl_of
from dsteer.behaviour.teacher_forced import Scores, own_likelihoods
from dsteer.geometry.intervals import Interval, bootstrap_mean
from dsteer.geometry.logits import NOTHING
from dsteer.models.load import Model
from dsteer.steering.edits import Edit, Tokens, adding, patched
from dsteer.store import Json

TIE = 1e-6
"""Shares of KL that are so close count as equal: the earlier site is named."""

BAND = (0.025, 0.5, 0.975)
"""Quantiles of the draws that make the random band."""


@dataclass(frozen=True)
class Effects:
    """What edits do to the pairs of a split, one row an edit.

    Attributes:
        keys: site and kind (patched, v, v_here) of each row.
        kl: KL(tuned‖edited base) on the chosen answers, of their first token where the last prompt
            token alone is changed.
        kl_base: KL(tuned‖base) on the same.
        answers: KL(tuned‖edited base) on all tokens of the chosen answers, whatever is changed.
        answers_base: KL(tuned‖base) on all of them.
        margin: β [Δ ln π(chosen) − Δ ln π(rejected)] against the base; None of chosen ones alone.
    """

    keys: tuple[tuple[str, str], ...]
    kl: Float[Tensor, "e m"]
    kl_base: Float[Tensor, " m"]
    answers: Float[Tensor, "e m"]
    answers_base: Float[Tensor, " m"]
    margin: Float[Tensor, "e m"] | None

    def row(self, site: str, kind: str) -> int | None:
        """The row of an edit; None where it was not made."""
        return self.keys.index((site, kind)) if (site, kind) in self.keys else None


def margins(split: Split, likelihoods: Float[Tensor, "*a n"], beta: float) -> Float[Tensor, "*a m"]:
    """β [Δ ln π(chosen) − Δ ln π(rejected)] of each pair, Δ against the base as it is."""
    return beta * split.answers.margins(likelihoods - split.plain.log_likelihood[0])


def tuned_margins(split: Split, beta: float) -> Float[Tensor, " m"]:
    """The reward margin of the tuned model itself, of each pair."""
    return margins(split, own_likelihoods(split.target, split.answers.texts), beta)


def measure(
    bench: Bench,
    model: Model,
    split: Split,
    tokens: Tokens,
    edits: Mapping[tuple[str, str], Edit],
    beta: float,
) -> Effects:
    """Score all edits in one pass.

    Args:
        bench: scores.
        model: the base.
        split: what is scored.
        tokens: which tokens are changed.
        edits: (site, kind) → change; at least one.
        beta: of the reward.
    """
    scores = bench.score(model, split, list(edits.values()), tokens, f"{split.name}, {tokens}")
    part = split.answers.chosen
    both = len(split.answers.texts) == 2 * split.answers.pairs
    return Effects(
        tuple(edits),
        kl_of(scores.of(part), tokens),
        kl_of(split.plain.of(part), tokens)[0],
        scores.of(part).kl,
        split.plain.of(part).kl[0],
        margins(split, scores.log_likelihood, beta) if both else None,
    )


def edits_of(
    sites: Iterable[str],
    vectors: Mapping[str, Float[Tensor, " d"]],
    here: Mapping[str, Float[Tensor, " d"]],
) -> dict[tuple[str, str], Edit]:
    """The edits of every site, by site and kind; what is not given is not made."""
    edits: dict[tuple[str, str], Edit] = {}
    for site in sites:
        edits[site, "patched"] = Edit(site, patched)
        for kind, found in (("v", vectors), ("v_here", here)):
            if site in found:
                edits[site, kind] = Edit(site, adding(found[site]))
    return edits


def metrics(bench: Bench, split: Split, effects: Effects, site: str, kind: str) -> Json:
    """KL recovered, also over whole answers, and reward margin; None where it was not made."""
    row = effects.row(site, kind)
    if row is None:
        return None
    margin = None if effects.margin is None else mean(bench, split, effects.margin[row])
    return {
        "kl_recovered": json_of(recovered(bench, split, effects, site, kind)),
        "kl_recovered_answers": json_of(recovered(bench, split, effects, site, kind, answers=True)),
        "reward_margin": json_of(margin),
    }


def mean(bench: Bench, split: Split, values: Float[Tensor, " m"]) -> Interval | None:
    """The mean over pairs, bootstrap over conversations."""
    return bootstrap_mean(
        values,
        split.answers.clusters,
        draws=bench.config.bootstrap,
        confidence=bench.config.confidence,
        seed=bench.seed,
    )


def recovered(
    bench: Bench, split: Split, effects: Effects, site: str, kind: str, *, answers: bool = False
) -> Interval | None:
    """R of an edit; None where it was not made, or nothing is to be recovered.

    With ``answers`` over all tokens of the answers, one denominator whatever tokens are changed, so
    that places can be compared.
    """
    row = effects.row(site, kind)
    if row is None:
        return None
    after, before = (
        (effects.answers, effects.answers_base) if answers else (effects.kl, effects.kl_base)
    )
    return bench.ratio(before - after[row], before, split)


def efficiency(
    bench: Bench, split: Split, effects: Effects, site: str, kind: str = "v"
) -> tuple[Interval | None, str | None]:
    """R(v*) / R(patched), or that of ``v_here``, with the interval of the ratio; or None, and why.

    Both are shares of one sum, so the ratio is Σ gain(v*) / Σ gain(patched) over the same drawn
    conversations.
    """
    v, whole = effects.row(site, kind), effects.row(site, "patched")
    if v is None or whole is None:
        return None, "the run's v* is zero or absent here"
    below = recovered(bench, split, effects, site, "patched")
    if below is None:
        return None, "the models predict the same: there is no KL to recover"
    if below.low is None or below.high is None:
        return None, "one conversation gives no interval of what patching recovers"
    if below.low <= TIE:
        return None, (
            f"what patching recovers, {below.value:.3g} [{below.low:.3g}, {below.high:.3g}], is "
            "not told from nothing"
        )
    gains = effects.kl_base - effects.kl
    return bench.ratio(gains[v], gains[whole], split), None


def readout_share(bench: Bench, model: Model, split: Split) -> Interval | None:
    """1 − R of patching at final_norm: what the tuned head does beyond the states it reads."""
    edits = {(FINAL_NORM, "patched"): Edit(FINAL_NORM, patched)}
    effects = measure(bench, model, split, "all", edits, 1.0)
    return bench.ratio(effects.kl[0], effects.kl_base, split)


def random_band(
    bench: Bench,
    model: Model,
    splits: Sequence[Split],
    site: str,
    tokens: Tokens,
    v: Float[Tensor, " d"],
    draws: int,
    beta: float,
    seed: int,
) -> Json:
    """What random directions of v*'s norm do at a site, and v* on the same pairs.

    Args:
        bench: scores.
        model: the base.
        splits: the chosen answers of some pairs, and the rejected ones.
        site: where they are added.
        tokens: to which tokens.
        v: the vector whose norm they have.
        draws: how many.
        beta: of the reward.
        seed: of the directions.

    Returns:
        2.5 %, 50 % and 97.5 % quantiles of the draws of each metric, and ``v``, that of v* itself
        (None: nothing to recover), with ``draws`` and ``pairs``.
    """
    chosen, rejected = splits
    rows = np.random.default_rng(seed).standard_normal((draws, chosen.acts.tuned[site].shape[1]))
    rows *= float(v.norm()) / np.linalg.norm(rows, axis=1, keepdims=True)
    edits = [Edit(site, adding(v)), *(Edit(site, adding(torch.from_numpy(row))) for row in rows)]
    label = f"random, {site}, {tokens}"
    scores, others = (bench.score(model, split, edits, tokens, label) for split in splits)
    gaps = _gain(chosen, scores) - _gain(rejected, others)
    return {
        "kl_recovered": _band(_shares(kl_of(scores, tokens), kl_of(chosen.plain, tokens)[0])),
        "kl_recovered_answers": _band(_shares(scores.kl, chosen.plain.kl[0])),
        "reward_margin": _band(beta * gaps.mean(dim=1)),
        "draws": draws,
        "pairs": chosen.answers.pairs,
    }


def _gain(split: Split, scores: Scores) -> Float[Tensor, "e m"]:
    return scores.log_likelihood - split.plain.log_likelihood[0]


def _shares(after: Float[Tensor, "e m"], before: Float[Tensor, " m"]) -> Tensor | None:
    total = float(before.sum())
    return 1 - after.sum(dim=1) / total if total > NOTHING * len(before) else None


def _band(values: Float[Tensor, " e"] | None) -> Json:
    """Of v*, which comes first, and the draws."""
    if values is None:
        return None
    found = np.quantile(values[1:].numpy(), BAND)
    band = dict(zip(("low", "median", "high"), map(float, found), strict=True))
    return {**band, "v": float(values[0])}


def first_largest(values: Sequence[tuple[Json, float | None]]) -> Json:
    """The first name of those with the largest value (up to :data:`TIE`); None without values."""
    known = [(name, value) for name, value in values if value is not None]
    if not known:
        return None
    most = max(value for _, value in known)
    return next(name for name, value in known if value >= most - TIE)
