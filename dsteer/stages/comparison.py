"""Compare the variants of a study, from their runs' artifacts alone.

Each variant is an ordinary run. What is read off one run (its table row) needs no other; what is
taken between two (cosines, angles) needs the same prompts, position and width in both, and is null
with the reason in words where that fails. A variant that failed is named, and stops no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.moments import PairedMoments, open_streamed
from dsteer.activations.sites import FINAL_NORM
from dsteer.config import ComparisonConfig
from dsteer.errors import ConfigError, StoreError, did_you_mean
from dsteer.geometry.alignment import cosine_to
from dsteer.geometry.comparison import (
    Agreement,
    Halves,
    Reliability,
    all_but_one,
    cosine_matrix,
    direction_set,
    noise_floor,
    principal_angles,
    random_angles,
    random_cosine,
    random_shared,
    shared_subspace,
    top_directions,
)
from dsteer.geometry.intervals import Interval
from dsteer.progress import Reporter
from dsteer.report.comparison_causal import causal_values
from dsteer.report.comparison_figures import draw_comparison
from dsteer.report.sweep_values import nearest
from dsteer.report.tables import recovered_at
from dsteer.report.values import block, site_order
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, read_json, write_tensors

ABOVE_NOISE = 5.0
"""A singular value counts when it is more than so many times the largest one of the noise."""

ROUNDING = 2.0**-23
"""Relative rounding of the float32 states."""

NULL_QUANTILE = 0.95
"""The quantile of a null that a value must be above to be told from chance."""

BASE_ROWS = 256
"""Fit rows on which the base states of two variants are compared."""

SAME_BASE = 1 - 1e-4
"""A mean cosine of base states below this tells of two bases; kernels alone differ by far less."""

CENTRINGS = ("uncentred", "centred")

Seed = Callable[..., int]


def compare_runs(
    runs: Mapping[str, Path],
    folder: Path,
    config: ComparisonConfig,
    seed: Seed,
    reporter: Reporter,
    failed: Mapping[str, str] | None = None,
    complete: Mapping[str, Collection[str]] | None = None,
) -> Json:
    """Compare finished runs; write ``comparison.safetensors`` and the figures into a folder.

    Args:
        runs: variant → its run folder, in the order of the study.
        folder: the comparison's own folder.
        config: what to measure.
        seed: a seed for one purpose, from its names.
        reporter: shows progress.
        failed: variant → why its run failed, where the caller knows.
        complete: variant → the stages whose results are up to date; default: those that are there.

    Returns:
        The result, in the form of a stage's: with ``headline`` and ``notes``.

    Raises:
        ConfigError: ``sites`` names one that no variant read.
        StoreError: not one variant can be read, or an artifact is malformed.
    """
    variants: dict[str, _Variant] = {}
    lost = dict(failed or {})
    for name, path in runs.items():
        if name not in lost:
            missing = _missing(path)
            if missing is None:
                variants[name] = _Variant(name, path, (complete or {}).get(name))
            else:
                lost[name] = missing
    if not variants:
        reasons = "; ".join(f"{name}: {why}" for name, why in lost.items()) or "no variants given"
        raise StoreError(f"no variant of the study can be compared ({reasons}); run them first")
    _check_sites(config, variants)

    groups = _groups(variants)
    tensors: dict[str, np.ndarray] = {}
    agreed: dict[tuple[str, str], Json] = {}
    sets = []
    total = sum(len(_common(group)) for group in groups)
    with reporter.bar("comparison", total, unit="site") as advance:
        for number, group in enumerate(groups):
            between = _Group(group, config, seed, number)
            for site in _common(group):
                between.measure(site)
                advance(1)
            agreed |= between.pairs
            tensors |= between.tensors
            if len(group) > 1:
                sets.append(between.set_json())
    pairs = [
        _pair(a, b, agreed.get((a.name, b.name))) for a, b in combinations(variants.values(), 2)
    ]
    names = list(variants)
    write_tensors(
        folder / "comparison.safetensors",
        _matrices(names, pairs) | tensors,
        {"variants": names, "sets": [each["members"] for each in sets]},
    )
    result = {
        "variants": {
            name: variants[name].json() if name in variants else {"failed": lost[name]}
            for name in [*runs, *(name for name in lost if name not in runs)]
        },
        "pairs": pairs,
        "sets": sets,
        "subspace": config.subspace,
        "draws": config.draws,
        "null_draws": config.null_draws,
        "confidence": config.confidence,
        "headline": _headline(variants, lost, pairs, sets),
        "notes": _notes(variants, lost, pairs, sets),
    }
    draw_comparison(result, folder)
    return result


# ---------------------------------------------------------------------------------- a variant


def _missing(run: Path) -> str | None:
    """Why a run can't be compared, without a path of this machine; None if it can."""
    if not run.is_dir():
        return "its run folder is missing"
    for name in ("activations/result.json", "vector/result.json", "vector/vectors.safetensors"):
        if not (run / name).is_file():
            return f"{name} is missing: it was not run to its end"
    return None


@dataclass
class _Variant:
    """One variant's artifacts, and what is measured of it alone."""

    name: str
    run: Path
    complete: Collection[str] | None = None
    reliability: dict[str, Json] = field(default_factory=dict)

    def result(self, stage: str) -> dict[str, Json]:
        """A stage's result; empty where the variant has none."""
        path = self.run / stage / "result.json"
        if self.complete is not None and stage not in self.complete:
            return {}
        return dict(read_json(path)) if path.is_file() else {}

    @cached_property
    def measured(self) -> dict[str, Json]:
        return self.result("activations")

    @cached_property
    def vectors(self) -> SteeringVectorSet:
        return SteeringVectorSet.load(self.run / "vector" / "vectors.safetensors")

    @cached_property
    def chosen_site(self) -> str | None:
        site: str | None = self.result("cosine").get("chosen_site")
        return site

    @cached_property
    def rows_missing(self) -> str | None:
        """Why quantities of single prompts can't be measured here; None if they can."""
        folder = self.run / "activations"
        names = ["base.safetensors", "tuned.safetensors", "ids.safetensors"]
        if self.streams:
            names.append("moments.safetensors")
        if not all((folder / name).is_file() for name in names):
            return "the states are no longer in the run's folder"
        return None

    @property
    def streams(self) -> bool:
        """Whether sums were kept instead of the states."""
        return bool(self.measured.get("store", "states") == "moments")

    @cached_property
    def streamed(self) -> PairedMoments | None:
        """The sums over the fit rows; None where the states themselves were kept."""
        found = open_streamed(self.run / "activations") if self.streams else None
        return None if found is None else found["fit"]

    @cached_property
    def activations(self) -> PairedActivations:
        return PairedActivations.open(self.run / "activations")

    @property
    def design(self) -> tuple[Json, ...]:
        """What two variants must have in common to be compared, most telling first."""
        measured = self.measured
        return (
            measured["width"],
            measured["position"],
            measured["ids_sha256"],
            measured.get("store", "states"),
            tuple(measured["rows"]["fit"]),
        )

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows of each split that the variant's own numbers rest on."""
        rows = {split: stop - start for split, (start, stop) in self.measured["rows"].items()}
        return {**rows, **self.measured.get("counts", {})}

    def base(self, site: str) -> Tensor:
        """Base states of the fit rows, float64; of streamed ones, of those that were kept."""
        start, stop = self.measured["rows"]["fit"]
        return self.activations.base.rows(site, start, stop).double()

    def displacement(self, site: str) -> Tensor:
        """Δ of the fit rows, float64; of streamed ones, few rows with the same right vectors."""
        if self.streamed is not None:
            mean, rest = self.streamed[site].matrices["delta"].condensed()
            return torch.from_numpy(mean + rest)
        start, stop = self.measured["rows"]["fit"]
        return self.activations.tuned.rows(site, start, stop).double() - self.base(site)

    def halves(self, site: str, delta: Tensor, draws: int, seed: int) -> Halves:
        """Random halves of the conversations; of streamed rows, of the buckets that hold them."""
        if self.streamed is not None:
            sums = self.streamed[site].sums
            return Halves.of_sums(sums.total[sums.rows > 0], sums.n, draws=draws, seed=seed)
        return Halves.of(delta, self.measured["conversations"]["fit"], draws=draws, seed=seed)

    def json(self) -> Json:
        """Where this variant comes from, and its row of the table."""
        measured, metadata = self.measured, self.vectors.metadata
        manifest = self.run / "manifest.json"
        return {
            "failed": None,
            "description": dict(read_json(manifest)).get("description", "")
            if manifest.is_file()
            else "",
            **{
                key: metadata.get(key)
                for key in ("base", "base_revision", "tuned", "tuned_revision")
            },
            "n_fit": self.counts["fit"],
            "n_test": self.counts["test"],
            "width": measured["width"],
            "blocks": measured["blocks"],
            "position": measured["position"],
            "template": measured["template"],
            "ids_sha256": measured["ids_sha256"],
            "rows_missing": self.rows_missing,
            "chosen_site": self.chosen_site,
            "at": {
                "chosen": self._at(self.chosen_site),
                "final_norm": self._at(FINAL_NORM if FINAL_NORM in self.vectors else None),
            },
            "kl": {key: self._kl(key) for key in ("first_token", "response")},
            "interpolation": self._interpolation(),
            "groups": self._groups(),
            "causal": causal_values(self.result),
            "reliability": self.reliability,
            "claims": self.result("claims").get("headline"),
        }

    def _at(self, site: str | None) -> Json:
        """What the stages found at one site."""
        if site is None:
            return None
        size, spectrum, cosine = (
            (self.result(stage).get("sites") or {}).get(site) or {}
            for stage in ("vector", "spectrum", "cosine")
        )
        delta, centred = (
            (spectrum.get("delta") or {}).get(centring) or {} for centring in CENTRINGS
        )
        return {
            "site": site,
            "undefined": bool(size.get("undefined")),
            "norm": size.get("norm"),
            "relative_norm": size.get("relative_norm"),
            "within_rounding": size.get("within_rounding"),
            "inert": size.get("inert"),
            "held_out": (cosine.get("held_out") or {}).get("mean"),
            "null_q95": (cosine.get("null") or {}).get("q95"),
            "sigma_ratio": delta.get("sigma_ratio"),
            "effective_rank": delta.get("effective_rank"),
            "participation_ratio": delta.get("participation_ratio"),
            "effective_rank_centred": centred.get("effective_rank"),
            "shared_share": spectrum.get("shared_share"),
            "shared_share_debiased": spectrum.get("shared_share_debiased"),
            "reliability": (self.reliability.get(site) or {}).get("full"),
        }

    def _groups(self) -> Json:
        """Ranks that the groups' preferences imply, and those found; None without the stage."""
        found = self.result("groups")
        if not found:
            return None
        site = found["headline"]["site"]
        row = found["sites"][site]
        ranked = (self.result("rank").get("sites") or {}).get(site) or {}
        return {
            "site": site,
            "groups": len(found["groups"]),
            "expected": found["expected"],
            "displacements": row["displacements"],
            "means": row["means"],
            "k90": (ranked.get("k90") or {}).get("oracle"),
            "own": row["removal"]["own"],
            "others": row["removal"]["others"],
        }

    def _kl(self, tokens: str) -> Json:
        """KL recovered at `final_norm` on some tokens; None where it was not measured."""
        panel = (self.result("vector").get("kl_recovery") or {}).get(tokens)
        if panel is None:
            return None
        return {
            "kl_tuned_base": panel["kl_tuned_base"],
            "recovered_at_one": recovered_at(panel, 1.0),
            "chosen_strength": panel["chosen_strength"],
            "recovered_at_chosen": panel["recovered_at_chosen"],
            "undefined": panel["undefined"],
        }

    def _interpolation(self) -> Json:
        """The sweep's arm v at the strength nearest 1; None where there was no sweep."""
        sweep = self.result("interpolation")
        place = nearest(sweep, 1.0)
        if place is None:
            return None
        metrics = sweep.get("metrics") or {}

        def told(name: str) -> Json:
            metric = metrics.get(name) or {}
            curve = (metric.get("curves") or {}).get("v") or []
            return {
                "steered": curve[place] if place < len(curve) else None,
                "start": metric.get("start"),
                "target": metric.get("target"),
            }

        return {
            "site": sweep["site"],
            "positions": sweep.get("positions"),
            "strength": sweep["strengths"][place],
            **{name: told(name) for name in ("kl_recovered", "preference_match", "reward_margin")},
        }


def _check_sites(config: ComparisonConfig, variants: Mapping[str, _Variant]) -> None:
    if config.sites == "auto":
        return
    known = site_order({site for variant in variants.values() for site in variant.vectors})
    for site in config.sites:
        if site not in known:
            raise ConfigError(
                f"comparison.sites: {site}: no variant read this site{did_you_mean(site, known)}"
            )


# ---------------------------------------------------------------------------------- a group


def _groups(variants: Mapping[str, _Variant]) -> list[list[_Variant]]:
    """Variants that can be compared with each other."""
    groups: dict[tuple[Json, ...], list[_Variant]] = {}
    for variant in variants.values():
        groups.setdefault(variant.design, []).append(variant)
    return list(groups.values())


def _common(group: Sequence[_Variant]) -> list[str]:
    """The sites that all of a group have, by depth."""
    shared = set.intersection(*(set(variant.vectors) for variant in group))
    return site_order(shared)


class _Group:
    """Measures variants of one design against each other, site by site.

    Args:
        group: the variants.
        config: what to measure.
        seed: for one purpose, from its names; the same halves serve every variant and site.
        number: of the group, which names its tensors.
    """

    def __init__(
        self, group: Sequence[_Variant], config: ComparisonConfig, seed: Seed, number: int
    ) -> None:
        self._group, self._config, self._seed, self._number = group, config, seed, number
        self._width = int(group[0].measured["width"])
        common = _common(group)
        chosen = {variant.chosen_site for variant in group}
        self.sites = (
            [site for site in common if site in chosen or site == FINAL_NORM]
            if config.sites == "auto"
            else [site for site in common if site in config.sites]
        )
        self.block_site = _block_site(group, common)
        self.pairs: dict[tuple[str, str], Json] = {
            (a.name, b.name): {"base_cosine": _base_cosine(a, b), "sites": {}, "angles": {}}
            for a, b in combinations(group, 2)
        }
        self.tensors: dict[str, np.ndarray] = {}
        self._by_site: dict[str, Json] = {}
        self._nulls: dict[tuple[object, ...], Tensor] = {}

    def measure(self, site: str) -> None:
        """Reliability and cosines at a site; subspaces too, where they are asked for."""
        cosines = cosine_matrix([variant.vectors[site].tensor for variant in self._group])
        halves: dict[str, Halves] = {}
        bases: dict[str, dict[str, Tensor | None]] = {}
        for variant in self._group:
            if variant.rows_missing is not None:
                variant.reliability[site] = _reliability(None, variant.rows_missing)
                continue
            delta = variant.displacement(site)
            found = variant.halves(site, delta, self._config.draws, self._seed("halves"))
            halves[variant.name] = found
            reliability = found.reliability(self._config.confidence)
            variant.reliability[site] = _reliability(reliability, None)
            if site in self.sites:
                bases[variant.name] = self._subspaces(variant, site, delta)
        for (i, a), (j, b) in combinations(enumerate(self._group), 2):
            into = self.pairs[a.name, b.name]
            if a.name in halves and b.name in halves:
                agreement = halves[a.name].agreement(halves[b.name], self._config.confidence)
                into["sites"][site] = _agreement(agreement)
            else:
                into["sites"][site] = self._from_vectors(float(cosines[i, j]), a, b)
            if site in self.sites:
                into["angles"][site] = {
                    centring: self._angles(
                        bases.get(a.name, {}).get(centring), bases.get(b.name, {}).get(centring)
                    )
                    for centring in CENTRINGS
                }
        if site in self.sites and len(self._group) > 1:
            self._by_site[site] = self._set(site, bases)

    def _from_vectors(self, cosine: float, a: _Variant, b: _Variant) -> Json:
        """The cosine of two v*s whose rows are gone: the value alone."""
        n = a.counts["fit"]
        return {
            "cosine": Interval(cosine, None, None, n).json() if np.isfinite(cosine) else None,
            "cross": None,
            "disattenuated": None,
            "undefined": "; ".join(
                f"{variant.name}: {variant.rows_missing}"
                for variant in (a, b)
                if variant.rows_missing is not None
            ),
        }

    def _subspaces(self, variant: _Variant, site: str, delta: Tensor) -> dict[str, Tensor | None]:
        """The top right singular vectors of ΔH above the noise, uncentred and centred."""
        n, d = variant.counts["fit"], delta.shape[1]
        rms = float(variant.base(site).square().sum(dim=1).mean().sqrt())
        noise = max(float(variant.measured["noise_floor"][site]["rms"]), ROUNDING * rms)
        floor = noise_floor(ABOVE_NOISE * noise, n, d)
        return {
            centring: top_directions(
                delta, self._config.subspace, centred=centring == "centred", floor=floor
            )
            for centring in CENTRINGS
        }

    def _angles(self, first: Tensor | None, second: Tensor | None) -> Json:
        """Principal angles in degrees with their null; None where a subspace has no dimension."""
        if first is None or second is None:
            return None
        low, high = (1 - self._config.confidence) / 2, (1 + self._config.confidence) / 2
        null = self._null("angles", len(first), len(second))
        return {
            "dimensions": [len(first), len(second)],
            "angles": principal_angles(first, second).tolist(),
            "null_mean": null.mean(dim=0).tolist(),
            "null_low": null.quantile(low, dim=0).tolist(),
            "null_high": null.quantile(high, dim=0).tolist(),
        }

    def _null(self, kind: str, *sizes: int) -> Tensor:
        key = (kind, *sizes)
        if key not in self._nulls:
            options = {"draws": self._config.null_draws, "seed": self._seed(kind, *map(str, sizes))}
            self._nulls[key] = (
                random_angles(self._width, *sizes, **options)
                if kind == "angles"
                else random_shared(self._width, sizes, **options)
            )
        return self._nulls[key]

    def _set(self, site: str, bases: Mapping[str, Mapping[str, Tensor | None]]) -> Json:
        """All of the group at one site: how rank-one their v*s are, and the subspace they share."""
        vectors = direction_set([variant.vectors[site].tensor for variant in self._group])
        zero = sum(variant.vectors[site].undefined for variant in self._group)
        directions: Json = None
        if vectors is not None:
            m = len(self._group) - zero
            null = self._null("shared", *(1,) * m)[:, 0]
            directions = {
                "m": m,
                "singular_values": vectors.singular_values.tolist(),
                "share": vectors.share,
                "share_null_q95": float(null.quantile(NULL_QUANTILE)),
                "sigma_ratio": vectors.sigma_ratio,
            }
            self._keep(site, "direction", vectors.direction)
        return {
            "directions": directions,
            "subspace": {
                centring: self._shared(site, centring, [
                    bases.get(variant.name, {}).get(centring) for variant in self._group
                ])
                for centring in CENTRINGS
            },
        }  # fmt: skip

    def _shared(self, site: str, centring: str, found: Sequence[Tensor | None]) -> Json:
        """The average projector's eigenvalues with their null; None where a subspace is empty."""
        bases = [basis for basis in found if basis is not None]
        if len(bases) < len(found):
            return None
        shared = shared_subspace(bases)
        # Shared by all is more than what all but one share and the last one meets by chance.
        largest = sorted(map(len, bases))[-2:]
        null = all_but_one(len(bases), self._null("angles", *largest)[:, 0])
        bound = float(null.quantile(NULL_QUANTILE))
        count = int((shared.eigenvalues > bound).sum())
        if count:
            self._keep(site, f"shared/{centring}", shared.directions[:count])
        return {
            "dimensions": [len(basis) for basis in bases],
            "eigenvalues": shared.eigenvalues.tolist(),
            "null_q95": bound,
            "count": count,
        }

    def _keep(self, site: str, what: str, tensor: Tensor) -> None:
        self.tensors[f"set.{self._number}/{site}/{what}"] = tensor.numpy().astype(np.float32)

    def set_json(self) -> Json:
        """What was measured of the group as a whole."""
        return {
            "members": [variant.name for variant in self._group],
            "width": self._width,
            "n": self._group[0].counts["fit"],
            "random_cosine": random_cosine(self._width, NULL_QUANTILE) if self._width > 1 else None,
            "sites": self.sites,
            "block_site": self.block_site,
            "by_site": self._by_site,
        }


def _block_site(group: Sequence[_Variant], common: Sequence[str]) -> str | None:
    """The block that most variants chose, on tune; of equals the earliest; else the middle one."""
    blocks = [site for site in common if block(site) is not None]
    votes = Counter(variant.chosen_site for variant in group)
    best = max((votes[site] for site in blocks), default=0)
    if best == 0:
        return blocks[len(blocks) // 2] if blocks else None
    return next(site for site in blocks if votes[site] == best)


def _base_cosine(a: _Variant, b: _Variant) -> float | None:
    """Mean cosine of the base states of two variants at their last site: 1 for one base."""
    if a.rows_missing is not None or b.rows_missing is not None:
        return None
    site = _common([a, b])[-1]
    cosines = [
        cosine_to(one[None], other)
        for one, other in zip(a.base(site)[:BASE_ROWS], b.base(site)[:BASE_ROWS], strict=True)
    ]
    mean = torch.cat(cosines).nanmean()
    return float(mean) if torch.isfinite(mean) else None


# ---------------------------------------------------------------------------------- results


def _reliability(found: Reliability | None, missing: str | None) -> Json:
    if found is None or found.half is None:
        why = missing or "v* is zero, or one conversation can't be halved"
        return {"half": None, "full": None, "spread": None, "undefined": why}
    return {
        "half": found.half.json(),
        "full": _json(found.full),
        "spread": found.spread,
        "undefined": None
        if found.full
        else "halves do not agree: their mean cosine is not above 0",
    }


def _agreement(found: Agreement) -> Json:
    return {
        "cosine": _json(found.cosine),
        "cross": _json(found.cross),
        "disattenuated": _json(found.disattenuated),
        "undefined": found.undefined,
    }


def _pair(a: _Variant, b: _Variant, found: Json) -> Json:
    """Two variants: what was measured between them, or why nothing could be."""
    ends = {"a": a.name, "b": b.name}
    if found is not None:
        return ends | {"why": None} | found
    return ends | {"why": _why(a, b), "base_cosine": None, "sites": {}, "angles": {}}


def _why(a: _Variant, b: _Variant) -> str:
    """Why two variants can't be compared."""
    mine, theirs = a.measured, b.measured
    if mine["width"] != theirs["width"]:
        return f"widths differ ({mine['width']} and {theirs['width']})"
    if mine["position"] != theirs["position"]:
        return f"positions differ ({mine['position']} and {theirs['position']})"
    if mine["ids_sha256"] != theirs["ids_sha256"]:
        return "prompts differ (other token ids)"
    if mine.get("store", "states") != theirs.get("store", "states"):
        return "one kept states, the other moments"
    return "the prompts are split differently"


def _matrices(names: Sequence[str], pairs: Sequence[Json]) -> dict[str, np.ndarray]:
    """Cosines at each site, as fitted and disattenuated, in the order of the variants."""
    place = {name: i for i, name in enumerate(names)}
    found: dict[str, np.ndarray] = {}
    for pair in pairs:
        i, j = place[pair["a"]], place[pair["b"]]
        for site, measured in pair["sites"].items():
            for kind in ("cosine", "disattenuated"):
                key = f"{kind}/{site}"
                matrix = found.setdefault(key, np.full((len(names), len(names)), np.nan))
                if measured[kind] is not None:
                    matrix[i, j] = matrix[j, i] = measured[kind]["value"]
    return found


def _headline(
    variants: Mapping[str, _Variant],
    lost: Mapping[str, str],
    pairs: Sequence[Json],
    sets: Sequence[Json],
) -> Json:
    def values(kind: str) -> list[float]:
        measured = (pair["sites"].get(FINAL_NORM) for pair in pairs)
        return [m[kind]["value"] for m in measured if m is not None and m[kind] is not None]

    raw, corrected = values("cosine"), values("disattenuated")
    largest = max(sets, key=lambda each: len(each["members"]), default=None)
    at_end = (largest or {}).get("by_site", {}).get(FINAL_NORM) or {}
    return {
        "variants": len(variants),
        "failed": len(lost),
        "pairs": len(pairs),
        "pairs_compared": sum(pair["why"] is None for pair in pairs),
        "site": FINAL_NORM,
        "cosine_least": min(raw, default=None),
        "cosine_most": max(raw, default=None),
        "disattenuated_least": min(corrected, default=None),
        "disattenuated_most": max(corrected, default=None),
        "one_direction_share": (at_end.get("directions") or {}).get("share"),
        "shared_directions": ((at_end.get("subspace") or {}).get("uncentred") or {}).get("count"),
    }


def _notes(
    variants: Mapping[str, _Variant],
    lost: Mapping[str, str],
    pairs: Sequence[Json],
    sets: Sequence[Json],
) -> list[str]:
    notes = [f"{name} is not compared: {why}." for name, why in lost.items()]
    reasons: dict[str, list[str]] = {}
    for pair in pairs:
        if pair["why"] is not None:
            reasons.setdefault(pair["why"], []).append(f"{pair['a']} and {pair['b']}")
    notes += [
        f"No cosine or angle is defined between "
        f"{'; '.join(who) if len(who) < len(pairs) or len(who) < 4 else 'any two variants'}: {why}."
        for why, who in reasons.items()
    ]
    for name, variant in variants.items():
        if variant.rows_missing is not None:
            notes.append(
                f"{name}: {variant.rows_missing}, so its split-half reliability, disattenuated "
                "cosines and principal angles are undefined."
            )
    for key, words in (
        ("within_rounding", "within rounding, so its direction there means nothing"),
        ("inert", "along the state itself and inert after the norm"),
    ):
        where = [
            f"{name} at {site}"
            for name, variant in variants.items()
            for site, size in variant.result("vector").get("sites", {}).items()
            if size.get(key)
        ]
        if where:
            notes.append(f"v* is {words}: {', '.join(where)}.")
    other = [
        f"{pair['a']} and {pair['b']} ({pair['base_cosine']:.3f})"
        for pair in pairs
        if pair["base_cosine"] is not None and pair["base_cosine"] < SAME_BASE
    ]
    if other:
        notes.append(
            "Not the same base: the mean cosine of the base states of "
            f"{'; '.join(other)} at the last site is below 1. Where it is near 0 the two models "
            "share no axes, and no cosine or angle between their v*s means anything."
        )
    if sets:
        notes.append(
            "v*s that are fitted on the same prompts have errors in common, which shift their "
            "cosine; the disattenuated cosine takes each v* from another half of the "
            "conversations, and divides by the root of both reliabilities. It may exceed 1."
        )
        notes.append(
            "The null of principal angles and of the shared subspace is random directions, alike "
            "in all d dimensions. States of a model spread in few of them, so two subspaces can "
            "lie nearer than this null for that reason alone."
        )
    if len({variant.counts["fit"] for variant in variants.values()}) > 1:
        notes.append("The variants' numbers of fit prompts differ: ranks depend on N.")
    return notes


def _json(interval: Interval | None) -> Json:
    return interval.json() if interval else None
