"""Conditions for steering: whether a prompt's state lies far enough along a vector.

h (d,) is the state that a prompt is judged by, c the condition's vector, ĉ = c/‖c‖, θ a threshold:

    a row is steered where h·ĉ ≥ θ
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsteer.data.tokens import Encoded, Tokenizer
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import ConfigError, DataError, MeasurementError, did_you_mean
from dsteer.geometry.intervals import Interval, wilson
from dsteer.geometry.logits import float64
from dsteer.models.load import Model
from dsteer.progress import SILENT, Reporter
from dsteer.steering.provenance import of_model
from dsteer.steering.states import as_ids, states_of
from dsteer.steering.vector import SteeringVector

JudgedBy = Literal["prompt_last", "prompt_mean"]
"""The state of a prompt's last token, or the mean of the states of its tokens."""

Prompts = Sequence[Prompt | PreferencePair] | Sequence[Encoded]


@dataclass(frozen=True)
class Detection:
    """How well a condition tells prompts that it was not fitted on, Wilson's 95% intervals.

    Attributes:
        precision: share of the prompts it fires on that should fire; None where it fires on none.
        recall: share of the prompts that should fire on which it does.
        n_positive: prompts that should fire.
        n_negative: prompts that should not.
        folds: parts, each of which was judged by a condition fitted on the others.
        accuracy: of the condition itself on the prompts that it was fitted on: the mean of the
            shares of both kinds that it tells. It flatters.
    """

    precision: Interval | None
    recall: Interval
    n_positive: int
    n_negative: int
    folds: int
    accuracy: float


@dataclass(frozen=True, eq=False)
class Condition:
    """Steer a row only where its prompt's state projects far enough on a vector.

    Attributes:
        vector: c and the site where states are read; its length does not matter.
        threshold: θ, in units of the states.
        position: ``prompt_last`` or ``prompt_mean``.
        detection: what :func:`fit_condition` measured; None of one made by hand.

    Raises:
        ConfigError: no such position.
        MeasurementError: a zero vector, or a threshold that is not finite.
    """

    vector: SteeringVector
    threshold: float | int
    position: str = "prompt_last"
    detection: Detection | None = None

    def __post_init__(self) -> None:
        if self.position not in get_args(JudgedBy):
            raise ConfigError(
                f"position {self.position!r} of a condition: no such position"
                f"{did_you_mean(self.position, get_args(JudgedBy))}"
            )
        if self.vector.undefined:
            raise MeasurementError(
                f"the condition's vector at {self.vector.site} is zero, so nothing projects on it; "
                "give one that is defined"
            )
        if not math.isfinite(self.threshold):
            raise MeasurementError(f"threshold {self.threshold}: expected a finite number")

    @property
    def site(self) -> str:
        """Where states are read."""
        return self.vector.site

    def fires(
        self,
        state: Float[Tensor, "b t d"],
        index: Int[Tensor, "b t"],
        lengths: Int[Tensor, " b"],
    ) -> Bool[Tensor, " b"]:
        """Judge the rows of a pass that holds their whole prompts.

        Args:
            state: the states (B, T, d).
            index: the place of each column among its row's real tokens; −1 on padding.
            lengths: p, the prompts' lengths.
        """
        if self.position == "prompt_last":
            read = (index == lengths[:, None] - 1).float()
        else:
            read = ((index >= 0) & (index < lengths[:, None])).float()
        h = float64(state)
        read = float64(read).to(h.device)
        read = read / read.sum(1, keepdim=True)
        clean = torch.where(read[..., None] != 0, h, 0.0)  # padding may be anything
        mean = torch.einsum("bt,btd->bd", read, clean)
        unit = self.vector.tensor / self.vector.norm
        return mean @ unit.to(mean.device) >= self.threshold


def fit_condition(
    model: Model,
    tokenizer: Tokenizer,
    positive: Prompts,
    negative: Prompts,
    *,
    site: str,
    position: str = "prompt_last",
    folds: int = 5,
    template: str = "none",
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Condition:
    """Fit a condition on prompts that should be steered and prompts that should not.

    The vector is the mean state of the first less that of the second; the threshold halves the
    interval of those with the largest mean of both kinds' shares that are told, the widest if there
    are several. Precision and recall are of prompts that were left out: each of some folds is
    judged by a condition fitted on the others. A prompt that stands in a list twice is in one fold.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        positive: texts, message lists, pairs (their prompt) or ids that should be steered.
        negative: others, likewise.
        site: where states are read: at or before the site that will be steered.
        position: ``prompt_last`` or ``prompt_mean``.
        folds: how many; at most as many as there are different prompts of either kind.
        template: ``chat`` puts texts through the chat template.
        seed: of the folds.
        reporter: shows progress.

    Raises:
        DataError: fewer than two different prompts of a kind, or one that is of both.
        ConfigError: a site that the model lacks, no such position, or fewer than two folds.
        MeasurementError: both kinds have the same mean.
    """
    if position not in get_args(JudgedBy):
        raise ConfigError(
            f"position {position!r} of a condition: no such position"
            f"{did_you_mean(position, get_args(JudgedBy))}"
        )
    if folds < 2:
        raise ConfigError(f"folds {folds}: expected at least 2")
    both = [as_ids(model, tokenizer, prompts, 0, template) for prompts in (positive, negative)]
    parts = [_folds(items, folds, seed) for items in both]
    for name, part in zip(("positive", "negative"), parts, strict=True):
        if part is None:
            raise DataError(
                f"{name} holds fewer than two different prompts; expected at least two, so that "
                "one can be left out"
            )
    shared = {item.ids for item in both[0]} & {item.ids for item in both[1]}
    if shared:
        number = next(i for i, item in enumerate(both[0]) if item.ids in shared)
        raise DataError(
            f"prompt {number} of positive is among negative too; expected each prompt in one list"
        )
    read = {"prompt_last": "last", "prompt_mean": "mean"}[position]
    with states_of(model, [*both[0], *both[1]], sites=[site], position=read, reporter=reporter) as (
        states,
        _,
    ):
        rows = states[site].double().numpy()
    h = rows[: len(both[0])], rows[len(both[0]) :]
    n_folds = min(int(part.max()) + 1 for part in parts if part is not None)
    fired = [np.zeros(len(items), dtype=bool) for items in both]
    for fold in range(n_folds):
        left_out = [part % n_folds == fold for part in parts if part is not None]
        unit, threshold = _fit(site, *(x[~out] for x, out in zip(h, left_out, strict=True)))
        for x, out, found in zip(h, left_out, fired, strict=True):
            found[out] = x[out] @ unit >= threshold
    hits, alarms = int(fired[0].sum()), int(fired[1].sum())
    unit, threshold = _fit(site, *h)
    shares = [float((x @ unit >= threshold).mean()) for x in h]
    vector = SteeringVector(
        unit,
        site,
        **of_model(model),
        method="condition: difference of mean states",
        position=position,
        n_positive=len(both[0]),
        n_negative=len(both[1]),
    )
    return Condition(
        vector,
        threshold,
        position,
        Detection(
            precision=None if hits + alarms == 0 else wilson(hits, hits + alarms, hits + alarms),
            recall=wilson(hits, len(both[0]), len(both[0])),
            n_positive=len(both[0]),
            n_negative=len(both[1]),
            folds=n_folds,
            accuracy=(shares[0] + 1 - shares[1]) / 2,
        ),
    )


def _fit(
    site: str, positive: Float[np.ndarray, "p d"], negative: Float[np.ndarray, "n d"]
) -> tuple[Float[np.ndarray, " d"], float]:
    """The unit vector and the threshold that tell two sets of states."""
    difference = positive.mean(0) - negative.mean(0)
    norm = float(np.linalg.norm(difference))
    same = (positive == positive[0]).all() and (negative == positive[0]).all()
    if norm == 0 or same:  # means of different numbers of equal states differ by rounding
        raise MeasurementError(
            f"{site}: positive and negative prompts have the same mean state, so no vector tells "
            "them; give prompts that differ, or a later site"
        )
    unit = difference / norm
    high, low = np.sort(positive @ unit), np.sort(negative @ unit)
    edges = np.unique(np.concatenate([high, low]))
    # Between two neighbours, all thresholds tell the same prompts: those at or above fire.
    told = 1 - np.searchsorted(high, edges[1:]) / len(high)
    spared = np.searchsorted(low, edges[1:]) / len(low)
    gaps = np.diff(edges)
    best = max(range(len(gaps)), key=lambda i: (round(float(told[i] + spared[i]), 12), gaps[i]))
    return unit, float(edges[best] + gaps[best] / 2)


def _folds(items: Sequence[Encoded], folds: int, seed: int) -> Int[np.ndarray, " n"] | None:
    """The fold of each prompt, equal ones in one; None where there are fewer than two."""
    different = sorted({item.ids for item in items})
    if len(different) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(different))
    fold = {ids: int(place) % folds for ids, place in zip(different, order, strict=True)}
    return np.array([fold[item.ids] for item in items])
