"""How much of a displacement is the chat template, and how much the training: a four-way design.

The states of two models (base, tuned) on two forms of the same conversations (raw, templated) are
the four cells of a 2 × 2 design, h[model, form] ∈ R^{N×d} each. Its effects, prompt by prompt:

- training: T_raw = h[tuned, raw] − h[base, raw], T_templ = h[tuned, templ] − h[base, templ];
- template: B = h[base, templ] − h[base, raw], U = h[tuned, templ] − h[tuned, raw];
- interaction, the difference in differences: I = T_templ − T_raw = U − B.

What a user sees who goes from the base on raw text to the tuned model in its template is

    total = h[tuned, templ] − h[base, raw] = T_raw + B + I = ½(T_raw + T_templ) + ½(B + U).

The first sum names what either change does alone and what only both together do; the second divides
the interaction equally. Both are exact, row by row.

**Without the scatter.** The mean of N scattered rows is longer than the true mean vector, and two
parts' means hold errors in common (T_raw and T_templ both lack the base), so products of the means
themselves are biased: of an interaction that is exactly 0, with d ≫ N, by many of its standard
errors. Products are therefore taken between different conversations alone, whose errors are
independent,

    G_PQ = Σ_{c≠c'} ⟨Σ_{i∈c} Pᵢ, Σ_{j∈c'} Qⱼ⟩ / Σ_{c≠c'} n_c n_c',   E[G_PQ] = ⟨E P, E Q⟩.

Squared norms, shares and cosines are made of these. Like every unbiased estimate of what can't be
negative, G_PP may be: then the part is not told from zero, and its norm and cosines are undefined.

The two forms have other token ids, so B and U compare the positions from which the models answer,
not one token: all that the template changes there is in them, the last token itself included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix
from dsteer.geometry.intervals import (
    Clusters,
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    cluster_sums,
    held_out_cosine,
    jackknifed,
    share_intervals,
)
from dsteer.geometry.logits import Readout, kl_divergence

CELLS = ("base_raw", "base_templated", "tuned_raw", "tuned_templated")
"""The four cells, in the order of the weights below."""

PARTS: Mapping[str, tuple[float, float, float, float]] = {
    "training_raw": (-1, 0, 1, 0),
    "training_templated": (0, -1, 0, 1),
    "template_base": (-1, 1, 0, 0),
    "template_tuned": (0, 0, -1, 1),
    "interaction": (1, -1, -1, 1),
    "training_mean": (-0.5, -0.5, 0.5, 0.5),
    "template_mean": (-0.5, 0.5, -0.5, 0.5),
    "total": (-1, 0, 0, 1),
}
"""T_raw, T_templ, B, U, I, ½(T_raw + T_templ), ½(B + U) and the total as contrasts of the cells."""

COSINES: Mapping[str, tuple[str, str]] = {
    "training_forms": ("training_raw", "training_templated"),
    "template_models": ("template_base", "template_tuned"),
    "training_template": ("training_raw", "template_base"),
}
"""Which mean parts are compared: training in both forms, template in both models, one another."""

_CHUNK_ROWS = 32
"""Rows whose logits are in memory at once."""


@dataclass(frozen=True)
class Cells:
    """States of both models on both forms of the same prompts at one site, (N, d) each.

    Row i is prompt i.

    Raises:
        MeasurementError: malformed or non-finite states, or cells of different shapes.
    """

    base_raw: Float[Tensor, "_ _"]
    base_templated: Float[Tensor, "_ _"]
    tuned_raw: Float[Tensor, "_ _"]
    tuned_templated: Float[Tensor, "_ _"]

    def __post_init__(self) -> None:
        shapes = {name: as_matrix(getattr(self, name), name).shape for name in CELLS}
        if len(set(shapes.values())) > 1:
            raise MeasurementError(
                f"cells of shapes {', '.join(f'{n} {s}' for n, s in shapes.items())}: expected "
                "the states of both models on both forms of the same prompts, at one site"
            )

    @property
    def n(self) -> int:
        """Prompts."""
        return len(self.base_raw)

    def part(self, name: str) -> Float[Tensor, "n d"]:
        """One of :data:`PARTS`, row by row, in float64."""
        return sum(
            (
                weight * getattr(self, cell).double()
                for cell, weight in zip(CELLS, PARTS[name], strict=True)
                if weight
            ),
            start=torch.zeros((), dtype=torch.float64),
        )


# ---------------------------------------------------------------------------------- states


@dataclass(frozen=True)
class Part:
    """One part of the total displacement; what is undefined is None.

    Attributes:
        mean: P̄ = (1/N) Σ Pᵢ.
        squared: G_PP, the squared norm of the part's mean vector, free of the prompts' scatter; may
            be negative. None for a single conversation.
        norm: √G_PP, its interval that of ``squared`` through the root; None where G_PP is not
            positive and the part is not 0 in every prompt.
        share: G_P,total / G_total,total: the part's projection on the total's mean vector, in units
            of it. The shares of T_raw, B and I sum to 1, and so do those of the two averaged parts.
            A share can be negative or above 1: parts may pull against each other. None where
            G_total,total is not positive.
        energy: Σ‖Pᵢ‖² / Σ‖totalᵢ‖², scatter included. Parts that are not orthogonal do not sum
            to 1.
        shared: debiased shared share of Pᵢ, mean over i≠j of ⟨Pᵢ, Pⱼ⟩ / mean ‖Pᵢ‖²: 1 where the
            part is one vector for all prompts, 0 where it is scatter around no vector.
    """

    mean: Float[Tensor, " d"]
    squared: Interval | None
    norm: Interval | None
    share: Interval | None
    energy: Interval | None
    shared: Interval | None


@dataclass(frozen=True)
class FourWay:
    """The parts of the displacement at one site.

    Attributes:
        parts: each of :data:`PARTS`.
        cosines: each of :data:`COSINES`, G_PQ / √(G_PP G_QQ): the cosine of the mean vectors with
            the attenuation by scatter taken out, so an estimate may exceed 1; None where G_PP or
            G_QQ is not positive.
        base_norm: mean ‖h[base, raw]‖, the unit of relative norms.
        n: prompts.
    """

    parts: Mapping[str, Part]
    cosines: Mapping[str, Interval | None]
    base_norm: float
    n: int


def four_way(
    cells: Cells,
    clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FourWay:
    """Divide the displacement into training, template and interaction.

    Intervals: jackknife over conversations; of energies, percentiles of a bootstrap over them. The
    jackknife errs on the wide side where a part is nothing but scatter (Efron & Stein 1981). It
    gives no ends where a ratio is undefined without one of the conversations.

    Args:
        cells: the states.
        clusters: conversation key of each prompt.
        draws: bootstrap draws.
        confidence: coverage asked for.
        seed: of the draws.

    Raises:
        MeasurementError: not one cluster key a prompt.
    """
    n = cells.n
    rows = {name: cells.part(name) for name in PARTS}
    grams = _pair_grams(rows, clusters)
    positive = {name: np.where((g := grams[name, name]) > 0, g, np.nan) for name in PARTS}
    total_squares = rows["total"].square().sum(dim=1)

    def estimate(values: np.ndarray) -> Interval | None:
        return None if np.isnan(values[0]) else jackknifed(values[0], values[1:], n, confidence)

    parts: dict[str, Part] = {}
    for name, part in rows.items():
        squared = estimate(grams[name, name])
        parts[name] = Part(
            mean=part.mean(dim=0),
            squared=squared,
            norm=_root(squared) if bool(part.any()) else Interval(0.0, None, None, n),
            share=estimate(grams[name, "total"] / positive["total"]),
            energy=bootstrap_ratio(
                part.square().sum(dim=1),
                total_squares,
                clusters,
                draws=draws,
                confidence=confidence,
                seed=seed,
            ),
            shared=share_intervals(part, clusters, confidence=confidence).debiased,
        )
    cosines = {
        name: estimate(grams[a, b] / np.sqrt(positive[a] * positive[b]))
        for name, (a, b) in COSINES.items()
    }
    base_norm = float(cells.base_raw.double().norm(dim=1).mean())
    return FourWay(parts, cosines, base_norm, n)


def training_across_forms(
    fit: Cells,
    test: Cells,
    fit_clusters: Clusters = None,
    test_clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Interval | None]]:
    """Held-out cosines of the training effect with its own vector from either form.

    v is the mean of T_raw or T_templ on the fit prompts, and the cosine is the mean over test
    prompts of cos(T, v). Within one form it is the ceiling of what the other form's v can reach.

    Returns:
        form that v was fitted in → form that it was tested in → cosine; None where undefined.
    """
    forms = {"raw": "training_raw", "templated": "training_templated"}
    return {
        fitted: {
            tested: held_out_cosine(
                fit.part(ours),
                test.part(theirs),
                fit_clusters,
                test_clusters,
                draws=draws,
                confidence=confidence,
                seed=seed,
            )
            for tested, theirs in forms.items()
        }
        for fitted, ours in forms.items()
    }


def _pair_grams(
    parts: Mapping[str, Float[Tensor, "n d"]], clusters: Clusters
) -> dict[tuple[str, str], Float[np.ndarray, " grams"]]:
    """G of each two parts, from pairs of different conversations: of all, then without each.

    With S_c the sums of a conversation, A_c = S_c S_cᵀ and R_c = S_c Sᵀ, the sum over pairs is
    S Sᵀ − ΣA, and S Sᵀ − ΣA − R_c − R_cᵀ + 2A_c without conversation c. NaN where no two
    conversations are left.
    """
    sums = np.stack([cluster_sums(rows.numpy(), clusters) for rows in parts.values()], axis=1)
    total = sums.sum(axis=0)
    own = sums @ sums.transpose(0, 2, 1)
    cross = sums @ total.T
    whole = total @ total.T - own.sum(axis=0)
    grams = np.concatenate([whole[None], whole - cross - cross.transpose(0, 2, 1) + 2 * own])
    n = len(next(iter(parts.values())))
    sizes = cluster_sums(np.ones(n), clusters)
    pairs = n**2 - np.square(sizes).sum()
    pairs = np.concatenate([[pairs], pairs - 2 * n * sizes + 2 * sizes**2])
    grams /= np.where(pairs > 0, pairs, np.nan)[:, None, None]
    return {(a, b): grams[:, i, j] for i, a in enumerate(parts) for j, b in enumerate(parts)}


def _root(squared: Interval | None) -> Interval | None:
    """A norm from a squared norm; None where that is not positive."""
    if squared is None or squared.value <= 0:
        return None
    low, high = (
        None if end is None else math.sqrt(max(0.0, end)) for end in (squared.low, squared.high)
    )
    return Interval(math.sqrt(squared.value), low, high, squared.n)


# ---------------------------------------------------------------------------------- behaviour


@dataclass(frozen=True)
class Reached:
    """How near next-token distributions come to those of the tuned model in its template.

    Attributes:
        kl: mean KL(p_target‖p) in nats.
        recovered: R = 1 − Σ KL(p_target‖p) / Σ KL(p_target‖p_base,raw); None where the base's own
            mean KL on raw text is not above the floor: there is nothing to recover.
    """

    kl: Interval
    recovered: Interval | None


def reach(
    cells: Cells,
    vectors: Mapping[str, Float[Tensor, " d"]],
    base_readout: Readout,
    tuned_readout: Readout,
    clusters: Clusters = None,
    *,
    floor: float = 0.0,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Reached]:
    """KL from the tuned model in its template to each other cell, and to steered base raw states.

    p_target = softmax(tuned_readout(h[tuned, templ])); a vector v gives softmax(base_readout(
    h[base, raw] + v)). A vector of zeros is left out: it does nothing.

    Args:
        cells: final_norm states.
        vectors: name → vector, fitted on other prompts.
        base_readout: states → logits.
        tuned_readout: likewise.
        clusters: conversation key of each prompt.
        floor: mean KL, in nats, up to which rounding could be all that there is.
        draws: bootstrap draws; vectors are held fixed.
        confidence: coverage asked for.
        seed: of the draws.

    Returns:
        The three cells and the vectors, by name.
    """
    candidates = {
        "base_raw": (base_readout, cells.base_raw.double()),
        "base_templated": (base_readout, cells.base_templated.double()),
        "tuned_raw": (tuned_readout, cells.tuned_raw.double()),
    } | {
        name: (base_readout, cells.base_raw.double() + vector.double())
        for name, vector in vectors.items()
        if bool(vector.any())
    }
    kl = {
        name: _divergences(cells.tuned_templated, tuned_readout, states, readout)
        for name, (readout, states) in candidates.items()
    }
    settings: dict[str, Any] = {"draws": draws, "confidence": confidence, "seed": seed}
    before = kl["base_raw"]
    reached = {}
    for name, values in kl.items():
        mean = bootstrap_mean(values, clusters, **settings)
        assert mean is not None  # a KL is always defined
        recovered = (
            bootstrap_ratio(before - values, before, clusters, **settings)
            if float(before.mean()) > floor
            else None
        )
        reached[name] = Reached(mean, recovered)
    return reached


@torch.no_grad()
def _divergences(
    target: Tensor, target_readout: Readout, states: Tensor, readout: Readout
) -> Float[Tensor, " n"]:
    """KL(p_target‖p) of each row, float64."""
    chunks = zip(torch.split(target, _CHUNK_ROWS), torch.split(states, _CHUNK_ROWS), strict=True)
    return torch.cat(
        [
            kl_divergence(target_readout(goal.float()).cpu(), readout(start.float()).cpu())
            for goal, start in chunks
        ]
    )
