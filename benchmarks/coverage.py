"""Do the intervals cover, and do the tests keep their level? Simulated, every one of them.

Run by hand, one thread is enough:

    OMP_NUM_THREADS=1 python benchmarks/coverage.py [--simulations 2000] [--only mean cosine]
        [--out results/coverage]

With ``--only`` the rows of these families take the place of the written ones; the others stay.

Each row draws data of a known kind so many times, with 1 to 3 rows a conversation, and counts how
often the 95 % interval holds the true value. Where the package's number is one *at this N* (a
cosine with a v fitted on N rows, an entropy of N rows) the true value is its mean over all
simulations; elsewhere it is the population's. Tests are drawn under their null, at level 0.05.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsteer.behaviour.curves import Curves
from dsteer.geometry.comparison import Halves
from dsteer.geometry.inference import (
    fieller,
    holm,
    least_count,
    paired_difference,
    paired_sign_flip,
    permutation_test,
    ratio_effect,
    sign_test,
    split_half_reliability,
)
from dsteer.geometry.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    held_out_cosine,
    mean_cosine,
    proportion,
    share_intervals,
    sign_flip_null,
    spectral_intervals,
    wilson,
)
from dsteer.geometry.logits import kl_recovery
from dsteer.geometry.preference import other_pairs, pairwise_cosines
from dsteer.geometry.sums import (
    ClusterSums,
    bucket_of,
    held_out_from_sums,
    in_sample_from_sums,
    shares_from_sums,
    strength_from_sums,
)
from dsteer.geometry.template import Cells, four_way
from dsteer.steering.calibrate import percentile_interval

LEVEL = 0.05
WIDTH = 16
SIZES = (10, 20, 40, 128)
"""Conversations: few, some, and as many as the tune pairs of the shipped pipelines."""

Found = dict[str, Interval | None]


@dataclass(frozen=True)
class Coverage:
    """Intervals of one kind of data.

    Attributes:
        name: of the family.
        data: what is drawn, in words.
        conversations: how many.
        measure: draws data and returns intervals by name; the number is a seed for the bootstrap.
        truth: true values; of names that are not there, the estimate's mean over the simulations.
    """

    name: str
    data: str
    conversations: int
    measure: Callable[[np.random.Generator, int], Found]
    truth: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """Tests of one kind of data under their null; ``reject`` says which reject at 0.05."""

    name: str
    data: str
    conversations: int
    reject: Callable[[np.random.Generator, int], dict[str, bool]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kind: ``interval`` or ``test``.
        what: the number, or the test.
        data: what was drawn.
        conversations: how many.
        simulations: how often.
        undefined: in how many of them there was no interval; they are left out of the rate.
        rate: share of intervals that hold the true value, or of tests that reject.
        error: its standard error.
    """

    kind: str
    what: str
    data: str
    conversations: int
    simulations: int
    undefined: int
    rate: float
    error: float


def simulate(case: Coverage | Size, simulations: int, seed: int = 0) -> list[Row]:
    """Draw data so often, and count."""
    name = f"{case.name} {case.data} {case.conversations}"
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    rows = []
    if isinstance(case, Size):
        rejected = [case.reject(rng, i) for i in range(simulations)]
        for what in rejected[0]:
            hits = [one[what] for one in rejected]
            rows.append(_row("test", what, case, hits, simulations))
        return rows
    found = [case.measure(rng, i) for i in range(simulations)]
    for what in found[0]:
        known = [one[what] for one in found]
        ends = [x for x in known if x is not None and x.low is not None and x.high is not None]
        truth = case.truth.get(what, float(np.mean([x.value for x in ends])))
        slack = 1e-9 * (1 + abs(truth))  # what is exact up to rounding is covered
        hits = [(x.low or 0) - slack <= truth <= (x.high or 0) + slack for x in ends]
        rows.append(_row("interval", what, case, hits, simulations))
    return rows


def _row(
    kind: str, what: str, case: Coverage | Size, hits: Sequence[bool], simulations: int
) -> Row:
    rate, n = float(np.mean(hits)), len(hits)
    return Row(
        kind,
        what,
        case.data,
        case.conversations,
        simulations,
        simulations - n,
        rate,
        math.sqrt(rate * (1 - rate) / n),
    )


# ---------------------------------------------------------------------------------- data


def conversations(rng: np.random.Generator, count: int) -> np.ndarray:
    """The conversation of each row: ``count`` of them, 1 to 3 rows each."""
    return np.repeat(np.arange(count), rng.integers(1, 4, size=count))


NUMBERS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "log-normal (σ 0.8)": lambda rng, n: rng.lognormal(0, 0.8, n) - math.exp(0.32),
}
"""Kinds of numbers, each of mean 0."""


def numbers(rng: np.random.Generator, keys: np.ndarray, kind: str) -> np.ndarray:
    """Half of the variance lies between conversations, half within them; mean 0."""
    draw = NUMBERS[kind]
    between = draw(rng, int(keys[-1]) + 1)[keys]
    return np.asarray(math.sqrt(0.5) * (between + draw(rng, len(keys))))


def shifted(
    rng: np.random.Generator, keys: np.ndarray, shift: float = 1.0, turn: float = 0.0
) -> np.ndarray:
    """Displacements in 16 dimensions: a shared shift of norm 2.4·shift in uneven noise of norm 4.

    ``turn`` turns the shift by that angle in a plane of its own.
    """
    first, second = np.linspace(-1, 1, WIDTH), np.ones(WIDTH)
    second *= np.linalg.norm(first) / np.linalg.norm(second)  # orthogonal to the first
    noise = rng.standard_normal((int(keys[-1]) + 1, WIDTH))[keys]
    noise = 0.7 * (noise + rng.standard_normal((len(keys), WIDTH)))
    direction = math.cos(turn) * first + math.sin(turn) * second
    return np.asarray(shift * direction + noise * np.linspace(0.3, 1.7, WIDTH))


# ---------------------------------------------------------------------------------- intervals


def shares(count: int) -> Iterator[Coverage]:
    """Wilson's interval."""
    for p in (0.5, 0.9):

        def measure(rng: np.random.Generator, _: int, p: float = p) -> Found:
            return {"share (wilson)": wilson(int(rng.binomial(count, p)), count, count)}

        yield Coverage(
            "share", f"one row a conversation, p = {p}", count, measure, {"share (wilson)": p}
        )


def answers(count: int) -> Iterator[Coverage]:
    """Shares of yes and no of conversations that answer alike, of one size and of many."""
    for name, most in (("1 to 3", 3), ("1 to 16, few of them long,", 16)):

        def measure(rng: np.random.Generator, _: int, most: int = most) -> Found:
            if most == 3:
                keys = conversations(rng, count)
            else:
                sizes = np.minimum(rng.geometric(0.25, size=count), most)
                keys = np.repeat(np.arange(count), sizes)
            own = rng.random(count)[keys]
            said = np.where(rng.random(len(keys)) < 0.5, own, rng.random(len(keys))) < 0.8
            return {"share (proportion)": proportion(said.astype(float), keys.tolist())}

        yield Coverage(
            "answers", f"{name} rows a conversation, half of them alike, p = 0.8", count, measure,
            {"share (proportion)": 0.8},
        )  # fmt: skip


def means(count: int) -> Iterator[Coverage]:
    """Means, ratios of sums, paired differences, suppressed ratios, Fieller."""
    truth = {
        "mean (bootstrap_mean)": 1.0,
        "ratio of sums (bootstrap_ratio)": 0.3,
        "paired difference (paired_difference)": 0.5,
        "ratio effect (ratio_effect)": 0.3,
        "ratio (fieller)": 0.3,
    }
    for kind in NUMBERS:

        def measure(rng: np.random.Generator, seed: int, kind: str = kind) -> Found:
            keys = conversations(rng, count)
            x, y = numbers(rng, keys, kind), numbers(rng, keys, kind)
            below = 1 + 0.5 * y
            above = below * (0.3 + 0.3 * x)
            labels = keys.tolist()
            return {
                "mean (bootstrap_mean)": bootstrap_mean(1 + x, labels, seed=seed),
                "ratio of sums (bootstrap_ratio)": bootstrap_ratio(above, below, labels, seed=seed),
                "paired difference (paired_difference)": paired_difference(
                    0.5 + x + 0.5 * y, 0.5 * y, labels, seed=seed
                ),
                "ratio effect (ratio_effect)": ratio_effect(
                    above, below, labels, seed=seed
                ).interval,
                "ratio (fieller)": fieller(above, below, labels).interval,
            }

        yield Coverage("mean", kind, count, measure, truth)


def cosines(count: int) -> Iterator[Coverage]:
    """Cosines with v refitted, and mean products and cosines of different rows."""
    for shift in (1.0, 0.4):

        def measure(rng: np.random.Generator, seed: int, shift: float = shift) -> Found:
            keys, others = conversations(rng, count), conversations(rng, count)
            fit, test = shifted(rng, keys, shift), shifted(rng, others, shift)
            labels, test_labels = keys.tolist(), others.tolist()
            return {
                "held-out cosine (held_out_cosine)": held_out_cosine(
                    fit, test, labels, test_labels, seed=seed
                ),
                "in-sample cosine (mean_cosine)": mean_cosine(fit, "in_sample", labels, seed=seed),
                "leave-one-out cosine (mean_cosine)": mean_cosine(
                    fit, "leave_one_out", labels, seed=seed
                ),
                "products of different rows (other_pairs)": other_pairs(fit, 2 * fit, labels),
                "pairwise cosine (pairwise_cosines)": pairwise_cosines(fit, labels, draws=1).mean,
            }

        yield Coverage("cosine", f"shift {shift} in noise, d = 16", count, measure)


def sums(count: int) -> Iterator[Coverage]:
    """What ``store: moments`` measures: sums of at most 64 buckets in place of rows."""
    vector = np.linspace(-1, 1, WIDTH)

    def summed(rng: np.random.Generator) -> ClusterSums:
        keys = conversations(rng, count)
        names = rng.integers(2**62, size=count)  # so that buckets differ between simulations
        buckets = [bucket_of(str(names[key])) for key in keys]
        found = ClusterSums(WIDTH)
        found.update(shifted(rng, keys), buckets)
        return found

    def measure(rng: np.random.Generator, seed: int) -> Found:
        fit, test = summed(rng), summed(rng)
        share = shares_from_sums(fit)
        return {
            "least-squares λ of sums (strength_from_sums)": strength_from_sums(
                test, vector, seed=seed
            ),
            "held-out cosine of sums (held_out_from_sums)": held_out_from_sums(
                fit, test, seed=seed
            ),
            "in-sample cosine of sums (in_sample_from_sums)": in_sample_from_sums(fit, seed=seed),
            "shared share m of sums (shares_from_sums)": share.plain,
            "shared share of sums, debiased (shares_from_sums)": share.debiased,
        }

    truth = {"least-squares λ of sums (strength_from_sums)": 1.0}
    yield Coverage("sums", "shift 1.0 in noise, d = 16, in buckets", count, measure, truth)


def least_counts(count: int) -> Iterator[Coverage]:
    """The least number of directions that recovers a share: k₅₀ and k₉₀ of the stage ``rank``."""
    grid = (1, 2, 3, 4, 6, 8, 12, 16)
    left = 0.7 ** np.array(grid)  # of the gain: 0.7, 0.49 (just reached), 0.34 … 0.12, 0.06

    def measure(rng: np.random.Generator, seed: int) -> Found:
        keys = conversations(rng, count)
        whole = np.exp(0.5 * numbers(rng, keys, "normal"))
        spread = np.stack([numbers(rng, keys, "normal") for _ in grid])
        gains = whole * (1 - left[:, None] * (1 + 0.5 * spread))
        found = {}
        for name, share in (("k₅₀", 0.5), ("k₉₀", 0.9)):
            least = least_count(gains, whole, grid, share, keys.tolist(), seed=seed)
            ends = () if least is None else (least.value, least.low, least.high)
            found[f"{name} (least_count)"] = Interval(
                *(math.inf if end is None else float(end) for end in ends), len(keys)
            )
        return dict(found)

    truth = {"k₅₀ (least_count)": 2.0, "k₉₀ (least_count)": 8.0}
    yield Coverage("count", "gains of a grid of counts, unevenly shared", count, measure, truth)


def spectra(count: int) -> Iterator[Coverage]:
    """Entropies, ranks and shared shares."""

    def measure(rng: np.random.Generator, _: int) -> Found:
        keys = conversations(rng, count)
        rows, labels = shifted(rng, keys), keys.tolist()
        both, share = spectral_intervals(rows, labels), share_intervals(rows, labels)
        names = (
            "entropy",
            "entropy_p1",
            "effective_rank",
            "participation_ratio",
            "stable_rank",
            "sigma_ratio",
        )
        return {
            **{
                f"{name}, {which} (spectral_intervals)": getattr(part, name)
                for which, part in zip(("uncentred", "centred"), both, strict=True)
                for name in names
            },
            "shared share m (share_intervals)": share.plain,
            "shared share, debiased (share_intervals)": share.debiased,
        }

    yield Coverage("spectrum", "shift 1.0 in noise, d = 16", count, measure)


def flat_spectra(count: int) -> Iterator[Coverage]:
    """The first two directions where more are nearly equal than resamples look among."""

    def measure(rng: np.random.Generator, _: int) -> Found:
        keys = conversations(rng, count)
        noise = rng.standard_normal((count, 96))[keys] + rng.standard_normal((len(keys), 96))
        both = spectral_intervals(0.3 + math.sqrt(0.5) * noise, keys.tolist())
        return {
            f"{name}, {which} (spectral_intervals)": getattr(part, name)
            for which, part in zip(("uncentred", "centred"), both, strict=True)
            for name in ("stable_rank", "sigma_ratio")
        }

    yield Coverage("flat", "a shift in flat noise, d = 96", count, measure)


def agreements(count: int) -> Iterator[Coverage]:
    """Split halves and disattenuated cosines of two vectors 60° apart."""
    turn = math.pi / 3

    def measure(rng: np.random.Generator, seed: int) -> Found:
        keys = conversations(rng, count)
        labels = keys.tolist()
        one, two = shifted(rng, keys), shifted(rng, keys, turn=turn)
        reliability = split_half_reliability(one, labels, seed=seed)
        agreement = Halves.of(one, labels, seed=seed).agreement(Halves.of(two, labels, seed=seed))
        return {
            "halves' cosine (split_half_reliability)": reliability.half,
            "reliability of v (split_half_reliability)": reliability.full,
            "cosine of two v's (Halves.agreement)": agreement.cosine,
            "cosine across halves (Halves.agreement)": agreement.cross,
            "disattenuated cosine (Halves.agreement)": agreement.disattenuated,
        }

    yield Coverage(
        "agreement",
        "shifts 60° apart in noise, d = 16",
        count,
        measure,
        {"disattenuated cosine (Halves.agreement)": math.cos(turn)},
    )


def templates(count: int) -> Iterator[Coverage]:
    """The parts of the four-way analysis."""
    base = np.zeros(WIDTH)
    base[0] = 5.0

    def measure(rng: np.random.Generator, seed: int) -> Found:
        keys = conversations(rng, count)
        quiet = base + 0.3 * shifted(rng, keys, 0.0)
        template, training = shifted(rng, keys, turn=math.pi / 2), shifted(rng, keys)
        cells = (
            quiet,
            quiet + template,
            quiet + training,
            quiet + template + training + shifted(rng, keys, 0.5),
        )
        found = four_way(Cells(*map(torch.from_numpy, cells)), keys.tolist(), seed=seed)
        part = found.parts["training_raw"]
        return {
            "squared norm of a part (four_way)": part.squared,
            "norm of a part (four_way)": part.norm,
            "share of a part (four_way)": part.share,
            "energy of a part (four_way)": part.energy,
            "sharedness of a part (four_way)": part.shared,
            **{f"cosine {name} (four_way)": value for name, value in found.cosines.items()},
        }

    yield Coverage("template", "four cells, shifts in noise, d = 16", count, measure)


def recovery(count: int) -> Iterator[Coverage]:
    """KL recovered by λv at final_norm, and the λ of least KL."""
    head = torch.from_numpy(np.random.default_rng(1).standard_normal((32, 8))).float()
    vector = np.linspace(-0.6, 0.6, 8)
    strengths = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0)

    def draw(rng: np.random.Generator, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        base = rng.standard_normal((len(keys), 8))
        noise = rng.standard_normal((int(keys[-1]) + 1, 8))[keys]
        return base, base + 0.9 * vector + 0.15 * (noise + rng.standard_normal((len(keys), 8)))

    def measure(rng: np.random.Generator, seed: int, count: int = count) -> Found:
        keys = conversations(rng, count)
        base, tuned = draw(rng, keys)
        found = kl_recovery(
            base,
            tuned,
            vector,
            lambda states: states @ head.T,
            lambda states: states @ head.T,
            strengths,
            keys.tolist(),
            linear=True,
            draws=1000 if seed >= 0 else 2,
            seed=abs(seed),
        )
        return {
            "KL recovered at λ = 1 (kl_recovery)": found.recovered[strengths.index(1.0)],
            "λ of least KL (kl_recovery)": found.optimal_strength,
        }

    large = measure(np.random.default_rng(2), -1, 50_000)
    truth = {name: value.value for name, value in large.items() if value is not None}
    yield Coverage("recovery", "8 dimensions, 32 tokens; v and its noise", count, measure, truth)


def crossings(count: int) -> Iterator[Coverage]:
    """Where a metric over λ reaches the target's level."""
    grid = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0])

    def measure(rng: np.random.Generator, seed: int) -> Found:
        keys = conversations(rng, count)
        own = numbers(rng, keys, "normal")
        curve = np.stack([x + own + 0.3 * numbers(rng, keys, "normal") for x in grid])
        level = 1.6 + own + 0.3 * numbers(rng, keys, "normal")
        curves = Curves([str(key) for key in keys], draws=1000, confidence=0.95, seed=seed)
        return {
            "λ at which a curve crosses (Curves.crossing)": curves.crossing(
                grid.tolist(), torch.from_numpy(curve), torch.from_numpy(level)
            )[0]
        }

    truth = {"λ at which a curve crosses (Curves.crossing)": 1.6}
    yield Coverage("crossing", "a line in noise, paired with its level", count, measure, truth)


def budgets(count: int) -> Iterator[Coverage]:
    """The percentile of all tokens' divergences that a calibrated strength meets."""

    def draw(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, list[int]]:
        lengths = rng.integers(8, 25, size=prompts)
        own = np.repeat(rng.gamma(4.0, 0.25, size=prompts), lengths)
        return own * rng.exponential(size=len(own)), lengths.tolist()

    def measure(rng: np.random.Generator, seed: int) -> Found:
        return {
            "95th percentile of tokens (calibrate)": percentile_interval(
                *draw(rng, count), 95, seed
            )
        }

    truth = float(np.percentile(draw(np.random.default_rng(3), 200_000)[0], 95))
    yield Coverage(
        "budget",
        "divergences of 8 to 24 tokens a prompt",
        count,
        measure,
        {"95th percentile of tokens (calibrate)": truth},
    )


# ---------------------------------------------------------------------------------- tests


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's, of p-values that are all defined."""
    return [p for p in holm(p_values) if p is not None]


def sizes_of_tests(count: int) -> Iterator[Size]:
    """Permutation, sign flips, signs, each alone, and Holm over six of them.

    The null of sign flips and of signs is that differences are as likely with the other sign: it
    holds of the mirrored numbers; of the others only the mean is 0.
    """
    for kind in ("normal", "exponential"):

        def reject(rng: np.random.Generator, seed: int, kind: str = kind) -> dict[str, bool]:
            keys, others = conversations(rng, count), conversations(rng, count // 2)
            a, b = numbers(rng, keys, kind), numbers(rng, others, kind)
            mirrored = a * (2.0 * rng.integers(0, 2, int(keys[-1]) + 1) - 1.0)[keys]
            labels, names = keys.tolist(), [f"b{key}" for key in others]
            signs = sign_test(mirrored, labels)
            sites = [mirrored + column for column in rng.standard_normal((6, len(keys)))]
            true = [paired_sign_flip(x, labels, draws=999, seed=seed).p for x in sites]
            real = [paired_sign_flip(x + 1, labels, draws=999, seed=seed).p for x in sites[:2]]
            return {
                "permutation test (permutation_test)": permutation_test(
                    a, b, labels, names, draws=999, seed=seed
                ).p
                <= LEVEL,
                "sign flips of pairs (paired_sign_flip)": paired_sign_flip(
                    mirrored, labels, draws=999, seed=seed
                ).p
                <= LEVEL,
                "the same, not mirrored (paired_sign_flip)": paired_sign_flip(
                    a, labels, draws=999, seed=seed
                ).p
                <= LEVEL,
                "sign test (sign_test)": signs is not None and signs.p <= LEVEL,
                "any of six sites (holm)": any(p <= LEVEL for p in adjusted(true)),
                "any of four sites beside two effects (holm)": any(
                    p <= LEVEL for p in adjusted([*real, *true[2:]])[2:]
                ),
            }

        yield Size("test", kind, count, reject)


def sizes_of_nulls(count: int) -> Iterator[Size]:
    """Cosines against random signs: a mean cosine above its null's 95 % quantile."""

    def reject(rng: np.random.Generator, seed: int) -> dict[str, bool]:
        keys, others = conversations(rng, count), conversations(rng, count)
        fit, test = shifted(rng, keys, 0.0), shifted(rng, others, 0.0)
        labels, test_labels = keys.tolist(), others.tolist()
        held = held_out_cosine(fit, test, draws=2)
        null = sign_flip_null(fit, test, "held_out", labels, test_labels, seed=seed)
        pairs = pairwise_cosines(fit, labels, seed=seed)
        assert held is not None
        assert pairs.mean is not None
        assert pairs.sign_flip_q95 is not None
        return {
            "held-out cosine above its null (sign_flip_null)": held.value
            > float(null.nanmean(dim=1).quantile(0.95)),
            "pairwise cosine above its null (pairwise_cosines)": pairs.mean.value
            > pairs.sign_flip_q95,
        }

    yield Size("null", "noise without a shift, d = 16", count, reject)


FAMILIES: dict[str, tuple[Callable[[int], Iterator[Coverage | Size]], tuple[int, ...]]] = {
    "share": (shares, SIZES),
    "answers": (answers, SIZES),
    "mean": (means, SIZES),
    "cosine": (cosines, SIZES[1:]),
    "sums": (sums, SIZES[1:]),
    "spectrum": (spectra, SIZES[1:]),
    "flat": (flat_spectra, SIZES[3:]),
    "agreement": (agreements, SIZES[1:]),
    "template": (templates, SIZES[1:]),
    "recovery": (recovery, SIZES[1:3]),
    "count": (least_counts, SIZES[1:]),
    "crossing": (crossings, SIZES[1:]),
    "budget": (budgets, SIZES[1:]),
    "test": (sizes_of_tests, SIZES[1:]),
    "null": (sizes_of_nulls, SIZES[1:]),
}
"""Families of rows, with the numbers of conversations that they are simulated at."""

# ---------------------------------------------------------------------------------- the page

ASKED = {"interval": (0.93, 0.97), "test": (0.0, 0.06)}

PAGE = """# Do the intervals cover?

Written by `python benchmarks/coverage.py` ({simulations} simulations a number, seed {seed};
numbers in `coverage.json`). Each cell is a share of the simulations: of 95 % intervals that held
the true value, or of tests at level 0.05 that rejected a true null. Its own standard error is
{error} near 0.95. Conversations hold 1 to 3 rows, half of the variance between them; *n* counts
conversations. **Bold** is outside of what is asked for: 0.93 to 0.97 for intervals (below, too
narrow; above, wider than need be), at most 0.06 for tests.

Where the number is one at this N (a cosine whose v is fitted on N rows, an entropy of N rows),
the true value is its mean over the simulations; elsewhere it is the population's. A share of few
conversations takes few values, so its coverage jumps with p and n. Bootstrap intervals are
percentiles, which keep to a number's range and are short of 95 % where few rows are skewed. Wide
by nature: k₅₀ and k₉₀, whose ends are counts of the grid; σ₂/σ₁ and stable rank of nearly flat
noise, where the first directions are neither the data's nor each other's and σ₂/σ₁ lies at its
bound of 1; cosines near 1, where slopes are nothing and what is left is curvature.

## Intervals

{intervals}

## Tests

The null of sign flips and of the sign test is that differences are as likely with the other sign:
the mirrored numbers have it; of those that are not, only the mean is 0.

{tests}

## Outside

{outside}
"""


def table(rows: Sequence[Row]) -> str:
    """One line a number and kind of data, one column a number of conversations."""
    sizes = sorted({row.conversations for row in rows})
    lines = [
        "| number | data | " + " | ".join(f"n = {size}" for size in sizes) + " |",
        "|" + "---|" * (2 + len(sizes)),
    ]
    for what, data in dict.fromkeys((row.what, row.data) for row in rows):
        cells = {row.conversations: row for row in rows if (row.what, row.data) == (what, data)}
        told = [cell(cells[size]) if size in cells else "–" for size in sizes]
        lines.append(f"| {what} | {data} | {' | '.join(told)} |")
    return "\n".join(lines)


def inside(row: Row) -> bool:
    """Whether a rate is what is asked for."""
    low, high = ASKED[row.kind]
    return low <= row.rate <= high


def cell(row: Row) -> str:
    """A rate, bold where it is not what is asked for, with how often there was none."""
    rate = f"{row.rate:.3f}" if inside(row) else f"**{row.rate:.3f}**"
    return f"{rate} ({row.undefined} undefined)" if row.undefined else rate


def outside(rows: Sequence[Row]) -> str:
    """From how many conversations on each number is what is asked for, where that is not all."""
    lines = []
    for what, data in dict.fromkeys((row.what, row.data) for row in rows):
        own = [row for row in rows if (row.what, row.data) == (what, data)]
        if all(inside(row) for row in own):
            continue
        far = max(row.conversations for row in own if not inside(row))
        good = [row.conversations for row in own if row.conversations > far]
        rates = [row.rate for row in own if not inside(row)]
        low = ASKED[own[0].kind][0]
        way = "too narrow" if max(rates) < low else "wide" if min(rates) > low else "off"
        if own[0].kind == "test":
            way = "rejecting too often"
        end = f"as asked from n = {min(good)}" if good else f"still so at n = {far}"
        told = " to ".join(dict.fromkeys((f"{min(rates):.3f}", f"{max(rates):.3f}")))
        lines.append(f"- {what}, {data}: {way} ({told}), {end}.")
    return "\n".join(lines) or "Nothing."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), help="these; others stay")
    parser.add_argument("--out", type=Path, default=Path("results/coverage"))
    asked = parser.parse_args()
    rows: list[Row] = []
    for name in asked.only or FAMILIES:
        family, sizes = FAMILIES[name]
        for size in sizes:
            for case in family(size):
                found = simulate(case, asked.simulations, asked.seed)
                for row in found:
                    print(f"{row.what:55} {row.data:40} n = {size:4} {cell(row)}", flush=True)
                rows += found
    written = asked.out / "coverage.json"
    if asked.only and written.is_file():
        rows = merged(json.loads(written.read_text("utf-8")), rows, asked.simulations, asked.seed)
    write(rows, asked.simulations, asked.seed, asked.out)


def merged(before: dict[str, Any], new: Sequence[Row], simulations: int, seed: int) -> list[Row]:
    """The rows that were written, with new ones in the place of those of the same name."""
    if (before["simulations"], before["seed"]) != (simulations, seed):
        raise SystemExit(
            f"written with {before['simulations']} simulations of seed {before['seed']}: give the "
            "same, or leave --only out"
        )
    found = {_key(row): row for row in (Row(**each) for each in before["rows"])}
    return list((found | {_key(row): row for row in new}).values())


def _key(row: Row) -> tuple[str, str, str, int]:
    return row.kind, row.what, row.data, row.conversations


def write(rows: Sequence[Row], simulations: int, seed: int, folder: Path) -> None:
    """The numbers and the page."""
    parts = {kind: [row for row in rows if row.kind == kind] for kind in ASKED}
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "simulations": simulations,
        "seed": seed,
        "confidence": 1 - LEVEL,
        "asked": ASKED,
        "rows": [asdict(row) for row in rows],
    }
    numbers = json.dumps(result, indent=1, ensure_ascii=False)
    (folder / "coverage.json").write_text(numbers + "\n", "utf-8")
    page = PAGE.format(
        simulations=simulations,
        seed=seed,
        error=f"{math.sqrt(0.95 * 0.05 / simulations):.3f}",
        intervals=table(parts["interval"]),
        tests=table(parts["test"]),
        outside=outside(rows),
    )
    (folder / "README.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
