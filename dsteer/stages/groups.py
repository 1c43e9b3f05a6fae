"""One vector a group of prompts: how the vectors lie to each other, and what removing one leaves.

v_g is the mean displacement of the fit rows of group g. Removing it takes from each token of the
tuned model the part of its own displacement that lies along v_g: h' − P_g(h' − h), with P_g the
projection onto v_g. Reward margin and KL to the base then say, on test pairs of every group, how
much of what the tuning did there was taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.sites import FINAL_NORM
from dsteer.behaviour.edited import Bench, Place, Split, json_of, kl_of, places, predicted
from dsteer.behaviour.teacher_forced import Scores
from dsteer.config import GroupsConfig
from dsteer.data.jsonl import read_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError
from dsteer.geometry.comparison import Halves
from dsteer.geometry.groups import expected_ranks, rank_intervals
from dsteer.geometry.intervals import (
    Interval,
    bootstrap_ratio,
    share_intervals,
    spectral_intervals,
)
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.edits import Change, Edit, Tokens
from dsteer.store import Json, write_tensors

Taken = Mapping[str, tuple[Tensor, Tensor, list[str]]]
"""Quantity → (what an arm takes, what there is to take, conversation) of each pair."""

LEAST = 8
"""Fit prompts that a group needs."""


def run(context: StageContext) -> Json:
    """Measure; write ``vectors.safetensors``: ``{site}/{number of the group}``, v_g, float64.

    Raises:
        DataError: the pairs don't tell their group, or no group is large enough.
    """
    config = context.config.groups or GroupsConfig()
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    result, tensors = _Study(context, config, pair).result()
    write_tensors(context.folder / "vectors.safetensors", tensors)
    draw_result("groups", result, context.folder)
    return result


@dataclass(frozen=True)
class _Group:
    """A group: its name, and its fit rows of the activations with their conversations."""

    name: str
    rows: list[int]
    keys: list[str]
    weights: Mapping[str, float] | None


class _Study:
    """One stage, from the groups to the result."""

    def __init__(self, context: StageContext, config: GroupsConfig, pair: ModelPair) -> None:
        self.context, self.config, self.pair = context, config, pair
        self.notes: list[str] = []
        self.beta = context.config.reward_beta
        self.acts = PairedActivations.open(context.input("activations"))
        self.groups = self._groups()
        found = [
            context.result(name) if name in context.inputs else None
            for name in ("profile", "cosine")
        ]
        self.places = [
            place
            for place in places(config.sites, config.tokens, found[0], found[1], FINAL_NORM)
            if place.site in self.acts.sites
        ]
        if not self.places:
            raise DataError(
                f"groups.sites {', '.join(config.sites)}: the activations hold "
                f"{', '.join(self.acts.sites)}; name one of them"
            )
        self.bench = Bench(
            pair,
            config,
            context.input("data"),
            context.template,
            [place.site for place in self.places],
            context.seed("bootstrap"),
            context.reporter,
        )

    # ------------------------------------------------------------------------------ groups

    def _label(self, pair: PreferencePair) -> str | None:
        by = self.config.by
        return pair.source if by == "source" else pair.tags.get(by)

    def _groups(self) -> list[_Group]:
        """Groups of the fit pairs, in order of their names, those that are large enough."""
        measured = self.context.result("activations")
        start, stop = measured["rows"]["fit"]
        pairs = read_pairs(self.context.input("data") / "fit.jsonl")
        rows: dict[str, list[int]] = {}
        keys: dict[str, list[str]] = {}
        prompts: dict[str, int] = {}
        offsets = self.acts.offsets
        for pair, first, last in zip(pairs, offsets, offsets[1:], strict=False):
            label = self._label(pair)
            if first >= stop or label is None:
                continue
            rows.setdefault(label, []).extend(range(max(first, start), last))
            keys.setdefault(label, []).extend([pair.conversation] * (last - first))
            prompts[label] = prompts.get(label, 0) + 1
        if not rows:
            tags = dict.fromkeys(tag for pair in pairs for tag in pair.tags)
            raise DataError(
                f"groups.by: no fit pair has a tag {self.config.by!r}; expected source"
                + "".join(f", {tag}" for tag in tags)
            )
        small = [f"{name} ({count})" for name, count in prompts.items() if count < LEAST]
        if len(small) == len(rows):
            raise DataError(
                f"groups.by {self.config.by}: no group has {LEAST} fit prompts, but "
                f"{', '.join(small)}; raise data.splits.fit, or group by another tag"
            )
        if small:
            self.notes.append(
                f"Groups of fewer than {LEAST} fit prompts are left out: {', '.join(small)}."
            )
        weights = _weights_of if self.config.by == "axes" else _no_weights
        return [
            _Group(name, rows[name], keys[name], weights(name))
            for name in sorted(rows)
            if prompts[name] >= LEAST
        ]

    # ------------------------------------------------------------------------------ result

    def result(self) -> tuple[Json, dict[str, np.ndarray]]:
        names = [group.name for group in self.groups]
        tests = self._tests()
        sites: dict[str, Json] = {}
        tensors: dict[str, np.ndarray] = {}
        for place in self.places:
            vectors = [self._delta(place.site, group).mean(axis=0) for group in self.groups]
            tensors |= {f"{place.site}/{number}": v for number, v in enumerate(vectors)}
            sites[place.site] = {"tokens": place.tokens, **self._geometry(place.site)}
        with self.pair.using("tuned") as model:
            for place in self.places:
                vectors = [tensors[f"{place.site}/{n}"] for n in range(len(names))]
                sites[place.site]["removal"] = self._removal(model, place, vectors, tests)
            del model
        self.pair.release()
        if len(names) == 1:
            self.notes.append(
                f"One group, {names[0]}: no cosine between groups, and no other group to spare."
            )
        shown = self.places[0].site
        expected = self._expected()
        result = {
            "by": self.config.by,
            "groups": [
                {"name": group.name, "n_fit": len(group.rows),
                 "n_test": tests[group.name].answers.pairs if group.name in tests else 0}
                for group in self.groups
            ],
            "beta": self.beta,
            "expected": expected,
            "random_directions": self.config.random_directions,
            "sites": sites,
        }  # fmt: skip
        result["headline"] = _headline(result, shown)
        result["notes"] = list(dict.fromkeys([*self.notes, *self.bench.notes]))
        return result, tensors

    def _expected(self) -> Json:
        """The ranks that planted preferences imply; None where the pairs don't tell them."""
        weights = [group.weights for group in self.groups]
        known = [group for group in weights if group is not None]
        if len(known) < len(weights):
            return None
        return asdict(expected_ranks(known, [len(group.rows) for group in self.groups]))

    def _delta(self, site: str, group: _Group) -> np.ndarray:
        return self.acts.displacement(site)[group.rows].numpy()

    def _geometry(self, site: str) -> dict[str, Json]:
        """Cosines of the v_g, ranks of the displacements and of the v_g, and each group's share."""
        level, seed = self.config.confidence, self.context.seed("halves", site)
        deltas = [self._delta(site, group) for group in self.groups]
        rows = np.concatenate(deltas)
        keys = [key for group in self.groups for key in group.keys]
        owner = np.repeat(np.arange(len(deltas)), [len(delta) for delta in deltas])
        halves = [
            Halves.of(rows * (owner == number)[:, None], keys, seed=seed)
            for number in range(len(deltas))
        ]
        cosines = []
        for a in range(len(deltas)):
            for b in range(a + 1, len(deltas)):
                found = halves[a].agreement(halves[b], level)
                cosines.append(
                    {
                        "groups": [self.groups[a].name, self.groups[b].name],
                        "cosine": json_of(found.cosine),
                        "disattenuated": json_of(found.disattenuated),
                        "undefined": found.undefined,
                    }
                )
        plain, centred = spectral_intervals(rows, keys, confidence=level)
        of_means = rank_intervals(deltas, [group.keys for group in self.groups], level)
        return {
            "n": len(rows),
            "norms": [float(np.linalg.norm(delta.mean(axis=0))) for delta in deltas],
            "within": {
                group.name: json_of(share_intervals(delta, group.keys, confidence=level).debiased)
                for group, delta in zip(self.groups, deltas, strict=True)
            },
            "cosines": cosines,
            "displacements": {
                "participation": json_of(plain.participation_ratio),
                "centred_participation": json_of(centred.participation_ratio),
            },
            "means": {
                "participation": json_of(of_means[0]),
                "centred_participation": json_of(of_means[1]),
            },
        }

    # ------------------------------------------------------------------------------ removal

    def _tests(self) -> dict[str, Split]:
        """The test pairs of each group: the tuned model is run, the base is the aim."""
        found = {}
        for group in self.groups:
            name = group.name

            def own(pair: PreferencePair, name: str = name) -> bool:
                return self._label(pair) == name

            if not any(
                own(pair) and pair.chosen and pair.rejected
                for pair in read_pairs(self.context.input("data") / "test.jsonl")
            ):
                self.notes.append(f"Group {name} has no test pair: nothing is removed there.")
                continue
            split = self.bench.split("test", self.config.pairs, among=own)
            with self.pair.using("base") as model:
                readout = Readout.of(model, vocabulary=self.pair.vocabulary)
            found[name] = self._reversed(split, readout)
        return found

    def _reversed(self, split: Split, readout: Readout) -> Split:
        """The same texts, the other model's predictions the target, and the states swapped."""
        target = predicted(split.acts, "base", readout)
        acts = replace(split.acts, base=split.acts.tuned, tuned=split.acts.base)
        return replace(split, acts=acts, target=target)

    def _removal(
        self,
        model: Model,
        place: Place,
        vectors: Sequence[np.ndarray],
        tests: Mapping[str, Split],
    ) -> Json:
        """What each removal takes of each group; the last arms are random directions."""
        units = [_unit(vector) for vector in vectors]
        count = len(self.groups)
        arms: list[tuple[str, int, Change]] = []
        for number, unit in enumerate(units):
            if unit is not None:
                arms.append(("removed", number, _without(unit[None])))
            others = [u for n, u in enumerate(units) if n != number and u is not None]
            if others:
                arms.append(("others_removed", number, _without(_basis(others))))
        taken: dict[str, dict[int, dict[str, Taken]]] = {
            "removed": {n: {} for n in range(count)},
            "others_removed": {n: {} for n in range(count)},
        }
        random: dict[str, Json] = {}
        for number, group in enumerate(self.groups):
            split = tests.get(group.name)
            if split is None:
                continue
            draws = self._random(units[number], place.site, number)
            changes = [_same, *(change for _, _, change in arms), *draws]
            scores = self.bench.score(
                model,
                split,
                [Edit(place.site, change) for change in changes],
                place.tokens,
                label=f"groups: {group.name}, {place.site}",
            )
            effects = self._effects(split, scores, place.tokens)
            for row, (kind, which, _) in enumerate(arms):
                taken[kind][which][group.name] = effects[1 + row]
            random[group.name] = [
                self._share(effects[row], split) for row in range(1 + len(arms), len(changes))
            ]
        names = [group.name for group in self.groups]
        result: dict[str, Json] = {
            kind: {
                names[which]: {name: self._interval(found) for name, found in row.items()}
                for which, row in rows.items()
            }
            for kind, rows in taken.items()
        }
        result["random"] = {
            name: {
                key: _band([draw[key] for draw in drawn]) for key in ("margin_taken", "kl_taken")
            }
            for name, drawn in random.items()
        }
        result["own"] = self._pooled(
            [found for which, row in taken["removed"].items() for name, found in row.items()
             if name == names[which]]
        )  # fmt: skip
        result["others"] = self._pooled(
            [found for which, row in taken["removed"].items() for name, found in row.items()
             if name != names[which]]
        )  # fmt: skip
        return result

    def _random(self, unit: Tensor | None, site: str, number: int) -> list[Change]:
        """Random directions; each token moves as far along them as the removal of v_g moves it."""
        if unit is None:
            return []
        generator = torch.Generator().manual_seed(self.context.seed("random", site, str(number)))
        drawn = torch.randn(
            self.config.random_directions, len(unit), generator=generator, dtype=torch.float64
        )
        return [_as_far(unit, row / row.norm()) for row in drawn]

    def _effects(self, split: Split, scores: Scores, tokens: Tokens) -> list[Taken]:
        """Of each arm: (what it takes, what there is, conversation) of each pair; arm 0 is none."""
        base = split.answers.margins(split.plain.log_likelihood)[0]
        margins = self.beta * (split.answers.margins(scores.log_likelihood) - base)
        kl = kl_of(scores.of(split.answers.chosen), tokens)
        keys = split.answers.clusters
        return [
            {
                "margin_taken": (margins[0] - margins[arm], margins[0], keys),
                "kl_taken": (kl[0] - kl[arm], kl[0], keys),
            }
            for arm in range(len(margins))
        ]

    def _share(self, effect: Taken, split: Split) -> dict[str, float | None]:
        return {
            key: float(above.sum() / below.sum()) if self._told(below, split) else None
            for key, (above, below, _) in effect.items()
        }

    def _ratio(self, above: Tensor, below: Tensor, keys: Sequence[str]) -> Interval | None:
        return bootstrap_ratio(
            above,
            below,
            keys,
            draws=self.config.bootstrap,
            confidence=self.config.confidence,
            seed=self.bench.seed,
        )

    def _mean(self, values: Tensor, keys: Sequence[str]) -> Interval | None:
        return self._ratio(values, torch.ones_like(values), keys)

    def _told(self, below: Tensor, split: Split) -> bool:
        """Whether there is something to take: Σ below is told from zero."""
        found = self._mean(below, split.answers.clusters)
        return found is not None and found.low is not None and found.low > 0

    def _interval(self, effect: Taken) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for key, (above, below, keys) in effect.items():
            there = self._mean(below, keys)
            if there is None or there.low is None or there.low <= 0:
                found[key] = None
                found[f"{key}_why"] = "what there is to take is not told from zero"
            else:
                found[key] = json_of(self._ratio(above, below, keys))
        return found

    def _pooled(self, effects: Sequence[Taken]) -> Json:
        """One share over the pairs of all (removal, group) cells; None without a cell."""
        if not effects:
            return None
        joined = {
            key: (
                torch.cat([effect[key][0] for effect in effects]),
                torch.cat([effect[key][1] for effect in effects]),
                [name for effect in effects for name in effect[key][2]],
            )
            for key in effects[0]
        }
        return self._interval(joined)


# ---------------------------------------------------------------------------------- small parts


def _weights_of(tag: str) -> dict[str, float] | None:
    """The axes of a planted preference, from ``polite=1 asking=-1``."""
    found = {}
    for part in tag.split():
        name, _, weight = part.partition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            return None
    return found or None


def _no_weights(_tag: str) -> None:
    return None


def _unit(vector: np.ndarray) -> Tensor | None:
    length = float(np.linalg.norm(vector))
    return torch.from_numpy(vector / length) if length > 0 else None


def _basis(units: Sequence[Tensor]) -> Tensor:
    """Orthonormal rows that span the units; directions that are only rounding are left out."""
    _, sigma, right = torch.linalg.svd(torch.stack(list(units)), full_matrices=False)
    basis: Tensor = right[sigma > 1e-8 * sigma[0]]
    return basis


def _same(own: Tensor, _other: Tensor) -> Tensor:
    return own


def _without(basis: Tensor) -> Change:
    """h' − BᵀB(h' − h) with orthonormal rows B (k, d)."""

    def change(own: Tensor, other: Tensor) -> Tensor:
        rows = basis.to(own)
        return own - (own - other.to(own)) @ rows.T @ rows

    return change


def _as_far(unit: Tensor, direction: Tensor) -> Change:
    """h' + |⟨h' − h, v̂⟩| u."""

    def change(own: Tensor, other: Tensor) -> Tensor:
        length = ((own - other.to(own)) @ unit.to(own)).abs()
        return own + length[..., None] * direction.to(own)

    return change


def _band(values: Sequence[float | None]) -> Json:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {
        "low": min(known),
        "median": float(np.median(known)),
        "high": max(known),
        "draws": len(known),
    }


def _headline(result: Mapping[str, Json], site: str) -> dict[str, Json]:
    row, expected = result["sites"][site], result["expected"] or {}
    values = [item["cosine"]["value"] for item in row["cosines"] if item["cosine"]]

    def value(found: Json, key: str) -> Json:
        return found[key]["value"] if found and found.get(key) else None

    return {
        "site": site,
        "groups": len(result["groups"]),
        "largest_cosine": max(values, key=abs) if values else None,
        "expected_participation": expected.get("participation"),
        "participation": value(row["displacements"], "participation"),
        "expected_centred_participation": expected.get("centred_participation"),
        "centred_participation": value(row["displacements"], "centred_participation"),
        "own_margin_taken": value(row["removal"]["own"], "margin_taken"),
        "others_margin_taken": value(row["removal"]["others"], "margin_taken"),
    }
