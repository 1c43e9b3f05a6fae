"""Count the directions that the change needs: KL recovered against k.

Directions are the right singular vectors of the fit tokens' displacements, in singular order and in
greedy causal order (chosen one by one for the KL that they recover on tune pairs). The ridge
penalty is chosen on tune tokens. Everything that is reported is of test pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.sites import FINAL_NORM
from dsteer.behaviour.edited import Bench, Place, Split, json_of, places, rows_of
from dsteer.config import RankConfig
from dsteer.geometry.inference import finite_count, least_count, least_steps
from dsteer.geometry.subspaces import (
    PENALTIES,
    Coefficients,
    fit_coefficients,
    leading,
    random_directions,
)
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.edits import Change, Edit, patched
from dsteer.store import Json

SHARES = {"k50": 0.5, "k90": 0.9}
"""Shares of what patching recovers, and what the least k that reaches them is called."""

GREEDY = 16
"""The greedy order is searched no further than so many directions."""

ENOUGH = 0.99
"""… nor beyond this share of what patching recovers on tune pairs."""


def run(context: StageContext) -> Json:
    """Measure every place; the result holds a curve for each order and each kind of subspace."""
    config = context.config.rank or RankConfig()
    chosen = {
        name: context.result(name) if name in context.inputs else None
        for name in ("profile", "cosine")
    }
    wanted = places(config.sites, config.tokens, chosen["profile"], chosen["cosine"], FINAL_NORM)
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    bench = Bench(
        pair,
        config,
        context.input("data"),
        context.template,
        [place.site for place in wanted],
        context.seed("bootstrap"),
        context.reporter,
    )
    splits = bench.splits(wanted[0].tokens)
    sites: dict[str, Json] = {}
    notes: list[str] = []
    with pair.using("base") as model:
        for place in wanted:
            measured = _Rank(context, config, bench, splits, place)
            sites[place.site] = measured.result(model)
            notes += measured.notes
        del model
    pair.release()
    result = {
        "n_test": splits["test"].answers.pairs,
        "n_tune": splits["tune"].answers.pairs,
        "sites": sites,
        "headline": _headline(sites),
        "notes": list(dict.fromkeys([*bench.notes, *notes])),
    }
    draw_result("rank", result, context.folder)
    return result


def _headline(sites: dict[str, Json]) -> dict[str, Json]:
    site, found = next(iter(sites.items()))
    return {
        "site": site,
        "tokens": found["tokens"],
        **{name: ((found[name] or {}).get("oracle") or {}).get("value") for name in SHARES},
        "k90_random": ((found["k90"] or {}).get("random") or {}).get("value"),
        "patched": (found["patched"] or {}).get("value"),
    }


def _grid(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …, most."""
    steps = [1, 2, 3] + [size * 2**i for i in range(2, most.bit_length() + 1) for size in (1, 1.5)]
    return sorted({int(k) for k in steps if k < most} | {most})


def projecting(directions: Float[Tensor, "k d"]) -> Change:
    """The change h + P (h' − h), P the projection on the directions' span."""

    def change(base: Tensor, tuned: Tensor) -> Tensor:
        axes = directions.to(base)
        return base + (tuned - base) @ axes.T @ axes

    return change


def deploying(coefficients: Coefficients, k: int) -> Change:
    """The change h + μ + Σ_{j ≤ k} ĉ_j(h) u_j, which needs no tuned state."""

    def change(base: Tensor, _tuned: Tensor) -> Tensor:
        return base + coefficients.displace(base, k)

    return change


class _Rank:
    """One place."""

    def __init__(
        self,
        context: StageContext,
        config: RankConfig,
        bench: Bench,
        splits: dict[str, Split],
        place: Place,
    ) -> None:
        self.context, self.config, self.bench = context, config, bench
        self.splits, self.place = splits, place
        self.notes: list[str] = []
        self.random_pairs = 0

    def result(self, model: Model) -> Json:
        """The curves of this place, and the k that reach half and nine tenths."""
        site, tokens, config = self.place.site, self.place.tokens, self.config
        stored = self.context.input("activations")
        base, tuned, _ = rows_of(stored, self.splits["fit"], site, tokens)
        tune_base, tune_tuned, _ = rows_of(stored, self.splits["tune"], site, tokens)
        width = base.shape[1]
        if torch.equal(base, tuned):
            self.notes.append(f"At {site} the models agree on every fit token: nothing to count.")
            return {"tokens": tokens, "width": width, "undefined": True, "k": [], "oracle": None,
                    "deployable": None, "random": None, "patched": None, "k50": None,
                    "k90": None}  # fmt: skip
        directions = leading(tuned - base, config.most)
        found = fit_coefficients(
            base, tuned - base, directions, PENALTIES, tune_base, tune_tuned - tune_base
        )
        ks = _grid(len(directions))
        order = self._greedy(model, directions)
        edits = [Edit(site, patched)]
        edits += [Edit(site, projecting(directions[:k])) for k in ks]
        edits += [Edit(site, projecting(directions[order[:k]])) for k in ks if k <= len(order)]
        edits += [Edit(site, deploying(found, k)) for k in (0, *ks)]
        gains, before = self._gains(model, self.splits["test"], edits, "rank")
        whole, rest = gains[:1], gains[1:]
        counts = {"oracle": len(ks), "greedy": sum(k <= len(order) for k in ks),
                  "deployable": len(ks) + 1}  # fmt: skip
        parts = dict(zip(counts, torch.split(rest, list(counts.values())), strict=True))
        random = self._random(model, ks, width)
        intervals = {
            name: [json_of(self.bench.ratio(row, before, self.splits["test"])) for row in part]
            for name, part in parts.items()
        }
        self._tell(len(base), width, found)
        reached = {
            "oracle": self._reached(parts["oracle"], whole[0], ks),
            "greedy": self._reached(parts["greedy"], whole[0], ks[: counts["greedy"]]),
            "deployable": self._reached(parts["deployable"], whole[0], [0, *ks]),
        }
        return {
            "tokens": tokens,
            "width": width,
            "n_fit": len(base),
            "k": ks,
            "patched": json_of(self.bench.ratio(whole[0], before, self.splits["test"])),
            "oracle": {"singular": intervals["oracle"], "greedy": intervals["greedy"]},
            "greedy_order": [number + 1 for number in order],
            "deployable": intervals["deployable"][1:],
            "constant": intervals["deployable"][0],
            "deployable_r2_tune": found.r2,
            "penalty": found.penalty,
            "random": random["curve"],
            "random_draws": config.random_subspaces,
            "random_pairs": random["pairs"],
            **{
                name: {
                    **{kind: values[name] for kind, values in reached.items()},
                    "random": random[name],
                }
                for name in SHARES
            },
        }

    # ------------------------------------------------------------------ edits

    def _gains(
        self, model: Model, split: Split, edits: Sequence[Edit], label: str
    ) -> tuple[Float[Tensor, "e m"], Float[Tensor, " m"]]:
        scores = self.bench.score(model, split, edits, self.place.tokens, label)
        return self.bench.gains(split, scores, self.place.tokens)

    def _greedy(self, model: Model, directions: Float[Tensor, "k d"]) -> list[int]:
        """Directions by the KL that each adds on tune pairs to those before it."""
        site, tune = self.place.site, self.splits["tune"]
        whole = float(self._gains(model, tune, [Edit(site, patched)], "patched")[0].sum())
        order: list[int] = []
        left = list(range(len(directions)))
        while left and len(order) < GREEDY:
            edits = [Edit(site, projecting(directions[[*order, number]])) for number in left]
            gains = self._gains(model, tune, edits, f"greedy {len(order) + 1}")[0].sum(dim=1)
            best = int(gains.argmax())
            order.append(left.pop(best))
            if float(gains[best]) >= ENOUGH * whole:
                break
        return order

    def _random(self, model: Model, ks: Sequence[int], width: int) -> dict[str, Json]:
        """R of projections on random subspaces, nested in k, on some of the test pairs."""
        config, part = self.config, self.splits["test"].first_chosen(self.config.random_pairs)
        site = self.place.site
        self.random_pairs = part.answers.pairs
        drawn = []
        for number in range(config.random_subspaces):
            axes = random_directions(width, ks[-1], self.context.seed(site, "random", str(number)))
            edits = [Edit(site, projecting(axes[:k])) for k in ks]
            if number == 0:
                edits.append(Edit(site, patched))
            gains, before = self._gains(model, part, edits, f"random {number + 1}")
            if number == 0:
                whole = float(gains[-1].sum())
                gains = gains[:-1]
            drawn.append(gains.sum(dim=1).numpy())
        kl = float(before.sum())
        totals = np.stack(drawn)  # draws × k
        shares = totals / kl if kl > 0 else np.full_like(totals, np.nan)
        quantiles = np.quantile(shares, [0.025, 0.5, 0.975], axis=0)
        curve = [
            {"low": float(low), "median": float(middle), "high": float(high)}
            if np.isfinite(middle)
            else None
            for low, middle, high in quantiles.T
        ]
        reached: dict[str, Json] = {"curve": curve, "pairs": part.answers.pairs}
        for name, share in SHARES.items():
            if whole <= 0:
                reached[name] = None
                continue
            rows = np.vstack([np.median(totals, axis=0), totals])
            rows = np.column_stack([np.full(len(rows), whole), rows])
            first, *drawn = least_steps(rows, share, np.asarray(ks, float)).tolist()
            reached[name] = {
                "value": finite_count(first),
                "low": finite_count(min(drawn)),
                "high": finite_count(max(drawn)),
                "resampled": True,
            }
        return reached

    def _reached(
        self, gains: Float[Tensor, "k m"], whole: Float[Tensor, " m"], ks: Sequence[int]
    ) -> dict[str, Json]:
        """The least k that recovers a share of what patching does."""
        clusters = self.splits["test"].answers.clusters
        options = {"draws": self.config.bootstrap, "seed": self.bench.seed}
        found = {
            name: least_count(
                gains, whole, ks, share, clusters, confidence=self.config.confidence, **options
            )
            for name, share in SHARES.items()
        }
        return {name: None if count is None else count.json() for name, count in found.items()}

    def _tell(self, n: int, width: int, found: Coefficients) -> None:
        site, tokens = self.place.site, self.place.tokens
        self.notes.append(
            f"At {site} directions are singular vectors of N = {n} displacements of width {width} "
            f"({tokens.replace('_', ' ')} tokens of fit prompts), uncentred: the first is close to "
            "v*. Thresholds are shares of what patching the whole displacement recovers; k₅₀ and "
            "k₉₀ are the least k of the grid that was measured, so the true ones may be smaller."
        )
        self.notes.append(
            f"The greedy order is searched up to {GREEDY} directions or {ENOUGH:.0%} of what "
            f"patching recovers on tune pairs. Random subspaces ({self.config.random_subspaces} "
            f"draws; bounds of their k are the extremes) are measured on {self.random_pairs} "
            f"of {self.splits['test'].answers.pairs} test pairs."
        )
        if n < 2 * width:
            self.notes.append(
                f"N = {n} is less than twice the width {width}: later directions and predicted "
                f"coefficients at {site} are noisy."
            )
        if found.r2 is not None and found.r2 < 0:
            self.notes.append(
                f"At {site} coefficients predicted from the base's state do worse on tune tokens "
                "than their mean: there is nothing to deploy beyond a constant."
            )
