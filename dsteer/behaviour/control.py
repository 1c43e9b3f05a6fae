"""Dial one planted axis of the synthetic world by a contrast vector, and see what the others do.

An axis's vector is the mean difference of states of contrast pairs, which the world writes from fit
prompts. Where it is read, where it acts, on which tokens and how strongly is chosen on tune
prompts. On test prompts, every oracle is read at λ = 0 and ±λ:

    move of oracle j = mean over prompts of (score_j(+λ) − score_j(−λ)) / 2,

beside random directions of the same norm. Two axes at once are dialled on a grid of (a, b), each of
−λ, 0, +λ, by adding both vectors at one site, which is what two interventions there do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from dsteer.activations.sites import FINAL_NORM, resolve_sites
from dsteer.behaviour.oracles import oracle_scores
from dsteer.behaviour.validity import degenerate
from dsteer.config import ControlConfig
from dsteer.data.synthetic import AXES, PromptRecord, World
from dsteer.data.tokens import Encoded, Tokenizer, encode
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError, did_you_mean
from dsteer.geometry.intervals import bootstrap_mean
from dsteer.models.anatomy import Anatomy, max_positions
from dsteer.models.load import Model
from dsteer.progress import Reporter
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.build import contrast
from dsteer.steering.decode import Decoding, decode
from dsteer.steering.intervene import Positions
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json

NAMES = tuple(axis.name for axis in AXES)
"""The axes, each with an oracle."""

POSITIONS: tuple[Positions, ...] = ("all", "generated")
"""Steered tokens that ``auto`` chooses from."""


@dataclass(frozen=True)
class Setting:
    """A contrast vector, where and how it acts, and what it did on the tune prompts.

    Attributes:
        vector: at its site, as it was built.
        read: the token position that it was read at.
        positions: the tokens that it steers.
        strength: its size in units of the mean norm of the states that it was read from.
        moves: of each oracle, by axis.
        degenerate: share of degenerate texts, the larger one of +λ and −λ.
    """

    vector: SteeringVector
    read: str
    positions: Positions
    strength: float
    moves: Mapping[str, float]
    degenerate: float

    @property
    def shift(self) -> Float[torch.Tensor, " d"]:
        """What +λ adds to a state."""
        return self.vector.tensor * self.factor

    @property
    def factor(self) -> float:
        """λ in units of the vector."""
        return self.strength * float(self.vector.metadata["mean_state_norm"]) / self.vector.norm

    def selective(self, axis: str) -> float:
        """The move of the axis's own oracle less the largest move of another one."""
        others = (abs(move) for name, move in self.moves.items() if name != axis)
        return self.moves[axis] - max(others)

    def json(self, axis: str) -> dict[str, Json]:
        """Where and how it acts, and why it was taken."""
        return {
            "site": self.vector.site,
            "read": self.read,
            "positions": self.positions,
            "strength": self.strength,
            "strength_in_vectors": self.factor,
            "tune_move": self.moves[axis],
            "tune_selective": self.selective(axis),
            "tune_degenerate": self.degenerate,
        }


@dataclass(frozen=True)
class Prompts:
    """Prompts that are answered, with their conversations."""

    encoded: list[Encoded]
    conversations: list[str]


@dataclass(frozen=True)
class Read:
    """Oracle scores of the answers under some arms.

    Attributes:
        scores: (arms, prompts) by axis.
        degenerate: (arms,) share of degenerate answers.
    """

    scores: Mapping[str, Float[np.ndarray, "a n"]]
    degenerate: Float[np.ndarray, " a"]

    def moves(self, axis: str, up: int, down: int) -> Float[np.ndarray, " n"]:
        """(score at one arm − score at another) / 2, a prompt."""
        rows = self.scores[axis]
        return np.asarray((rows[up] - rows[down]) / 2)


@dataclass(frozen=True)
class Control:
    """One measurement.

    Attributes:
        config: of the stage.
        model: the model that is steered.
        tokenizer: its tokenizer.
        records: what the world knows of the prompts of the fit split, by their text.
        fit: pairs of that split.
        tune: pairs on whose prompts choices are made.
        test: pairs on whose prompts the oracles are read.
        seed: a seed for each purpose.
        folder: where vectors and unfinished work are kept.
        reporter: shows progress.
    """

    config: ControlConfig
    model: Model
    tokenizer: Tokenizer
    records: Mapping[str, tuple[World, PromptRecord]]
    fit: Sequence[PreferencePair]
    tune: Sequence[PreferencePair]
    test: Sequence[PreferencePair]
    seed: Callable[..., int]
    folder: Path
    reporter: Reporter

    def run(self) -> Json:
        """Measure everything; returns the result, and writes ``{axis}-{read}.safetensors`` beside
        it.

        Raises:
            MeasurementError: an unknown axis, or no setting of an axis within the limit of
                degenerate texts.
            DataError: no prompt to build an axis's pairs from.
        """
        config = self.config
        for axis in config.axes:
            if axis not in NAMES:
                raise MeasurementError(
                    f"control.axes: unknown axis {axis!r}{did_you_mean(axis, NAMES)}"
                )
        tune = self._prompts(self.tune, config.tune_prompts)
        test = self._prompts(self.test, config.prompts)
        sets = {axis: self._vectors(axis) for axis in config.axes}
        tried = {axis: self._tried(axis, vectors, tune) for axis, vectors in sets.items()}
        chosen = {axis: self._best(axis, settings) for axis, settings in tried.items()}
        rest = self._read("control: unsteered", "base", test, Steering.none(self._width))
        measured = {axis: self._axis(axis, chosen[axis], test, rest) for axis in config.axes}
        grid = self._grid(config.axes[0], config.axes[1], tried, test) if config.axes[1:] else None
        result: dict[str, Any] = {
            "axes": list(config.axes),
            "oracles": list(NAMES),
            "descriptions": {axis.name: axis.description for axis in AXES},
            "pairs": {axis: sets[axis][config.read[0]].metadata["pairs"] for axis in sets},
            "prompts": {"tune": len(tune.encoded), "test": len(test.encoded)},
            "tried": {axis: len(settings) for axis, settings in tried.items()},
            "strengths": list(config.strengths),
            "chosen_on": "tune",
            "base": {
                "scores": {name: self._mean(rest.scores[name][0], test) for name in NAMES},
                "degenerate": float(rest.degenerate[0]),
            },
            "measured": measured,
            "grid": grid,
        }
        return result | {"headline": _headline(result), "notes": self._notes(result)}

    # ------------------------------------------------------------------ vectors

    @property
    def _width(self) -> int:
        return Anatomy.of(self.model).width

    def _prompts(self, pairs: Sequence[PreferencePair], count: int) -> Prompts:
        config, reach = self.config, max_positions(self.model.config)
        limits = [config.max_tokens]
        if reach is not None:
            if config.max_new_tokens >= reach:
                raise DataError(
                    f"control.max_new_tokens: {config.max_new_tokens} tokens leave no room for a "
                    f"prompt in the {reach} that the model was made for; lower it"
                )
            limits.append(reach - config.max_new_tokens)
        taken = list(pairs[:count])
        return Prompts(
            encode(self.tokenizer, taken, max_tokens=min(limits)),
            [pair.conversation for pair in taken],
        )

    def _vectors(self, axis: str) -> dict[str, SteeringVectorSet]:
        """The axis's contrast vectors at every site, by the position that they were read at."""
        config = self.config
        pairs = []
        for pair in self.fit:
            world, record = self.records.get(str(pair.prompt), (None, None))
            if world is None or record is None or record.earlier_turn:
                continue
            if axis != "declines" or record.rule_triggered:
                pairs.append(world.contrast(record, axis))
        if not pairs:
            raise DataError(
                f"control: none of the {len(self.fit)} fit prompts has one turn alone and can vary "
                f"on axis {axis!r}; raise data.splits.fit, or lower `styled` of the source"
            )
        blocks = [site for site in self._sites() if site != FINAL_NORM]
        found: dict[str, SteeringVectorSet] = {
            read: contrast(
                self.model,
                self.tokenizer,
                pairs[: config.pairs],
                position=read,
                sites=blocks,
                seed=self.seed("folds"),
                reporter=self.reporter,
            )
            for read in config.read
        }
        for read, vectors in found.items():
            described = {**vectors.metadata, "axis": axis}
            SteeringVectorSet(vectors.values(), described).save(
                self.folder / f"{axis}-{read}.safetensors"
            )
        return found

    def _sites(self) -> tuple[str, ...]:
        asked = self.config.sites
        return resolve_sites("all" if asked == "auto" else asked, Anatomy.of(self.model).n_blocks)

    # ------------------------------------------------------------------ answers

    def _read(self, label: str, journal: str, prompts: Prompts, steering: Steering) -> Read:
        """Let the model answer under every arm, and score the answers."""
        config = self.config
        made = decode(
            self.model,
            self.tokenizer,
            prompts.encoded,
            steering,
            Decoding(
                config.max_new_tokens,
                config.temperature,
                seed=self.seed("draws"),
                stop=config.stop,
            ),
            memory=config.memory_mb * 2**20,
            path=self.folder / "checkpoints" / f"{journal}.jsonl",
            reporter=self.reporter,
            label=label,
        )
        by_arm = [oracle_scores(texts) for texts in made.texts]
        return Read(
            {name: np.array([scores[name] for scores in by_arm]) for name in NAMES},
            np.array([np.mean([degenerate(text) for text in texts]) for texts in made.texts]),
        )

    def _tried(
        self, axis: str, sets: Mapping[str, SteeringVectorSet], prompts: Prompts
    ) -> list[Setting]:
        """Every setting of an axis, with its moves on tune prompts."""
        config, found = self.config, []
        kinds = POSITIONS if config.positions == "auto" else (config.positions,)
        for site, kind in product(next(iter(sets.values())), kinds):
            settings = [
                Setting(vectors[site], read, kind, strength, {}, 0.0)
                for (read, vectors), strength in product(sets.items(), config.strengths)
                if not vectors[site].undefined
            ]
            if not settings:
                continue
            shifts = [sign * setting.shift for setting in settings for sign in (1, -1)]
            arms = tuple(Arm(shift, 1.0) for shift in shifts)
            read = self._read(
                f"control: {axis} at {site}, {kind}",
                f"tune-{axis}-{site}-{kind}",
                prompts,
                Steering(site, arms, positions=kind),
            )
            for i, one in enumerate(settings):
                moves = {name: float(read.moves(name, 2 * i, 2 * i + 1).mean()) for name in NAMES}
                share = float(read.degenerate[2 * i : 2 * i + 2].max())
                found.append(
                    Setting(one.vector, one.read, one.positions, one.strength, moves, share)
                )
        return found

    def _best(self, axis: str, settings: Sequence[Setting]) -> Setting:
        """The most selective setting within the limit of degenerate texts."""
        limit = self.config.most_degenerate
        within = [setting for setting in settings if setting.degenerate <= limit]
        if not within:
            raise MeasurementError(
                f"control: of {len(settings)} settings of axis {axis!r} none leaves at most "
                f"{limit:g} of the tune answers degenerate; lower control.strengths, or raise "
                "control.most_degenerate"
            )
        return max(within, key=lambda setting: setting.selective(axis))

    # ------------------------------------------------------------------ one axis

    def _axis(self, axis: str, setting: Setting, prompts: Prompts, rest: Read) -> Json:
        """What one axis's vector does to every oracle on test prompts, beside random directions."""
        shifts = [setting.shift, -setting.shift]
        for unit in self._random(axis):
            shifts += [unit * setting.shift.norm(), -unit * setting.shift.norm()]
        read = self._read(
            f"control: {axis} on test prompts",
            f"test-{axis}",
            prompts,
            Steering(
                setting.vector.site,
                tuple(Arm(shift, 1.0) for shift in shifts),
                positions=setting.positions,
            ),
        )
        oracles: dict[str, Any] = {}
        for name in NAMES:
            drawn = [
                float(read.moves(name, 2 * i, 2 * i + 1).mean())
                for i in range(1, 1 + self.config.nulls)
            ]
            low, high = min(drawn), max(drawn)
            move = self._mean(read.moves(name, 0, 1), prompts)
            before = rest.scores[name][0]
            oracles[name] = {
                "move": move,
                "up": self._mean(read.scores[name][0] - before, prompts),
                "down": self._mean(read.scores[name][1] - before, prompts),
                "at": {
                    sign: self._mean(read.scores[name][arm], prompts)
                    for sign, arm in (("+", 0), ("-", 1))
                },
                "random": {"low": low, "high": high, "draws": len(drawn)},
                "stands_out": _stands_out(move, low, high),
            }
        others = [name for name in NAMES if name != axis]
        worst = max(others, key=lambda name: abs(oracles[name]["move"]["value"]))
        return {
            "setting": setting.json(axis),
            "separation": {
                key: setting.vector.metadata.get(key) for key in ("accuracy", "cohens_d", "n")
            },
            "oracles": oracles,
            "own": oracles[axis]["move"],
            "worst_other": worst,
            **leakage(oracles[axis]["move"], oracles[worst]["move"]["value"]),
            "others_stand_out": [name for name in others if oracles[name]["stands_out"]],
            "degenerate": {"+": float(read.degenerate[0]), "-": float(read.degenerate[1])},
        }

    def _random(self, axis: str) -> list[Float[torch.Tensor, " d"]]:
        rng = np.random.default_rng(self.seed("random", axis))
        drawn = rng.standard_normal((self.config.nulls, self._width))
        return [torch.from_numpy(row / np.linalg.norm(row)) for row in drawn]

    def _mean(self, values: Float[np.ndarray, " n"], prompts: Prompts) -> dict[str, Any]:
        found = bootstrap_mean(
            values,
            prompts.conversations,
            draws=self.config.bootstrap,
            confidence=self.config.confidence,
            seed=self.seed("bootstrap"),
        )
        assert found is not None  # scores are always defined
        return found.json()

    # ------------------------------------------------------------------ two axes

    def _grid(
        self, a: str, b: str, tried: Mapping[str, Sequence[Setting]], prompts: Prompts
    ) -> Json:
        """Both axes at once: the oracles of each on a grid of −λ, 0, +λ of both vectors."""
        pair = self._both(a, b, tried)
        if pair is None:
            return {
                "axes": [a, b],
                "undefined": "no site and tokens at which both axes have a setting within the "
                "limit of degenerate texts",
            }
        one, two = pair
        signs = (-1, 0, 1)
        cells = list(product(signs, signs))
        arms = tuple(Arm(i * one.shift + j * two.shift, 1.0) for i, j in cells)
        read = self._read(
            f"control: {a} and {b} at once",
            "grid",
            prompts,
            Steering(one.vector.site, arms, positions=one.positions),
        )
        shape = (len(signs), len(signs), -1)
        found: dict[str, Any] = {
            "axes": [a, b],
            "levels": list(signs),
            "settings": {a: one.json(a), b: two.json(b)},
            "cosine": float(torch.cosine_similarity(one.shift, two.shift, dim=0)),
            "degenerate": read.degenerate.reshape(shape[:2]).tolist(),
            "oracles": {},
            "others": {},
        }
        for name in (a, b):
            scores = read.scores[name].reshape(shape)
            # The first index is the level of the oracle's own axis.
            found["oracles"][name] = dialled(
                scores if name == a else scores.transpose(1, 0, 2),
                lambda values: self._mean(values, prompts),
            )
        for name in NAMES:
            if name not in (a, b):
                means = read.scores[name].mean(axis=1)
                found["others"][name] = {"low": float(means.min()), "high": float(means.max())}
        return found

    def _both(
        self, a: str, b: str, tried: Mapping[str, Sequence[Setting]]
    ) -> tuple[Setting, Setting] | None:
        """The settings of two axes that share a site and tokens, the worse of both at its best."""
        limit = self.config.most_degenerate
        best: dict[tuple[str, str, Positions], Setting] = {}
        for axis in (a, b):
            for one in tried[axis]:
                key = axis, one.vector.site, one.positions
                if one.degenerate <= limit and (
                    key not in best or one.selective(axis) > best[key].selective(axis)
                ):
                    best[key] = one
        shared = [
            (one, best[b, site, kind])
            for (axis, site, kind), one in best.items()
            if axis == a and (b, site, kind) in best
        ]
        if not shared:
            return None
        return max(shared, key=lambda both: min(both[0].selective(a), both[1].selective(b)))

    # ------------------------------------------------------------------ words

    def _notes(self, result: Mapping[str, Any]) -> list[str]:
        notes = []
        for axis, found in result["measured"].items():
            setting = found["setting"]
            others, oracles = found["others_stand_out"], found["oracles"]
            away = [
                f"{name} {oracles[name]['move']['value']:.2f}".replace("-", "−")
                for name in NAMES
                if name not in (axis, *others) and _excludes_zero(oracles[name]["move"])
            ]
            moved = (
                f"it also moves {', '.join(others)} more than random directions do"
                if others
                else "no other oracle moves clearly more than random directions of that norm move "
                "it"
            )
            if away:
                moved += f" (away from 0, but not clearly beyond these: {', '.join(away)})"
            if not found["oracles"][axis]["stands_out"]:
                notes.append(
                    f"The vector of {axis} doesn't move its own oracle clearly more than random "
                    "directions of its norm do."
                )
            notes.append(
                f"{axis}: read at the {_READ[setting['read']]}, added at {setting['site']} on "
                f"{setting['positions']} tokens, chosen on tune prompts; on test prompts {moved}."
            )
        grid = result["grid"]
        if grid is not None and "undefined" in grid:
            notes.append(f"{' and '.join(grid['axes'])} at once: undefined, {grid['undefined']}.")
        return notes


_READ = {"last": "last token", "mean": "mean over tokens"}


def dialled(
    scores: Float[np.ndarray, "3 3 n"], mean: Callable[[Float[np.ndarray, " n"]], dict[str, Any]]
) -> dict[str, Json]:
    """One oracle on the grid of two vectors' levels −, 0, +.

    With y the means of the cells over prompts: ``own`` is the mean over the other's levels of
    (y(+, ·) − y(−, ·)) / 2, ``own_at`` the same at each level, ``cross`` the mean over its own
    levels of (y(·, +) − y(·, −)) / 2, ``interaction``
    (y(+, +) − y(+, −) − y(−, +) + y(−, −)) / 4, ``dependence`` the largest difference of two
    cells of one own level, and ``additive_r2`` the share of Σ (y − ȳ)² that an additive model of
    rows and columns explains; None where that sum is 0.

    Args:
        scores: by the level of the oracle's own axis, the level of the other axis, and prompt.
        mean: the mean over prompts, with its interval.
    """
    y = scores.mean(axis=2)
    rows, columns = y.mean(axis=1, keepdims=True), y.mean(axis=0, keepdims=True)
    rest = y - rows - columns + y.mean()
    total = float(((y - y.mean()) ** 2).sum())
    corners = scores[2, 2] - scores[2, 0] - scores[0, 2] + scores[0, 0]
    own = (scores[2] - scores[0]) / 2
    return {
        "cells": [[mean(scores[i, j]) for j in range(3)] for i in range(3)],
        "own": mean(own.mean(axis=0)),
        "own_at": [mean(own[j]) for j in range(3)],
        "cross": mean(((scores[:, 2] - scores[:, 0]) / 2).mean(axis=0)),
        "interaction": mean(corners / 4),
        "dependence": float((y.max(axis=1) - y.min(axis=1)).max()),
        "additive_r2": 1 - float((rest**2).sum()) / total if total > 0 else None,
        "additive_undefined": None if total > 0 else "the oracle is the same in all cells",
    }


def leakage(own: Mapping[str, Any], other: float) -> dict[str, Json]:
    """|move of another oracle| / move of the own one.

    Undefined where the own move's interval doesn't lie above 0: a ratio to noise is noise.
    """
    if own["low"] is None or own["low"] <= 0:
        why = "the vector doesn't clearly raise its own oracle"
        return {"leakage": None, "leakage_undefined": why}
    return {"leakage": abs(other) / own["value"], "leakage_undefined": None}


def _stands_out(move: Mapping[str, Any], low: float, high: float) -> bool:
    """Whether a move's interval lies beyond 0 and beyond all random directions."""
    widest = max(high, -low, 0.0)
    return _excludes_zero(move) and bool(move["low"] > widest or move["high"] < -widest)


def _excludes_zero(move: Mapping[str, Any]) -> bool:
    low, high = move["low"], move["high"]
    return low is not None and high is not None and bool(low > 0 or high < 0)


def _headline(result: Mapping[str, Any]) -> dict[str, Json]:
    grid = result["grid"]
    dialled = {} if grid is None or "undefined" in grid else grid["oracles"]
    return {
        **{f"move_{axis}": found["own"]["value"] for axis, found in result["measured"].items()},
        **{f"leakage_{axis}": found["leakage"] for axis, found in result["measured"].items()},
        **{f"grid_own_{axis}": found["own"]["value"] for axis, found in dialled.items()},
        **{f"grid_cross_{axis}": found["cross"]["value"] for axis, found in dialled.items()},
    }
