"""Strengths at which steering changes a model's predictions by a given amount.

The model continues each prompt greedily, unsteered. Over the first tokens of these continuations,
teacher-forced, KL(p‖p_λ) is how far steering at strength λ moves the distribution of the next token
from the model's own p, in nats. The strength at which a percentile of all these meets a budget
makes vectors, sites and methods comparable: equal divergence instead of equal λ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.data.tokens import Encoded, Tokenizer
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError, did_you_mean
from dsteer.geometry.intervals import Interval, draw_counts, percentiles
from dsteer.geometry.logits import float64
from dsteer.models.anatomy import Anatomy, model_name
from dsteer.models.load import Model, load_tokenizer
from dsteer.models.readout import Readout
from dsteer.progress import SILENT, Reporter
from dsteer.steering.arms import Arm, Steering, steered_states
from dsteer.steering.decode import Decoding, decode
from dsteer.steering.intervene import Number, Positions
from dsteer.steering.provenance import require_fit
from dsteer.steering.states import as_ids, states_of
from dsteer.steering.vector import SteeringVector

Units = Literal["v", "residual", "kl"]
"""What a strength is measured by: the vector, the mean norm of the states at its site, or nats."""

Prompts = Sequence[Prompt | PreferencePair] | Sequence[Encoded]

_LOGIT_BYTES = 2**26
_RANGE = tuple(2.0**k for k in range(-12, 10, 2))
"""Shifts that bracket the budget, in mean norms of the states."""
_BETWEEN = 8
"""Strengths tried inside a bracket, in one batch."""
_NARROW = 1e-4
"""A bracket whose ends differ by such a share is a strength."""
_DRAWS = 1000


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` returns.

    Attributes:
        site: where the vector acts.
        strength: λ, in units of the vector, with the sign that was asked for.
        shift: |λ| ‖v‖ / r, r being the mean norm of the prompts' states at the site.
        target_kl: the budget in nats.
        kl: the percentile of KL(p‖p_λ) at λ; its interval by a bootstrap over prompts, with λ as it
            is.
        mean_kl: the mean of the same divergences.
        percentile: which.
        n_prompts: prompts.
        n_tokens: next tokens, of all prompts.
    """

    site: str
    strength: float
    shift: float
    target_kl: float
    kl: Interval
    mean_kl: float
    percentile: float
    n_prompts: int
    n_tokens: int


def calibrate(
    vector: SteeringVector,
    model: Model,
    prompts: Prompts,
    *,
    target_kl: Number,
    tokenizer: Tokenizer | None = None,
    percentile: Number = 95,
    tokens: int = 16,
    sign: int = 1,
    positions: Positions = "all",
    template: str = "none",
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Calibration:
    """Find the smallest strength at which the divergence from the model itself meets a budget.

    Strengths a factor 4 apart, from 2⁻¹² to 2⁸ of the states' norm, bracket it, then brackets are
    divided, all strengths of a round in one batch. What a budget means to a text can't be seen from
    λ, so read some.

    Args:
        vector: the direction and its site; it is added.
        model: the language model.
        prompts: texts, message lists, pairs (their prompt) or ids.
        target_kl: the budget in nats, above 0.
        tokenizer: the model's; default: that of its folder or hub id.
        percentile: of the next tokens' divergences, which meets the budget.
        tokens: the first so many tokens of each continuation; fewer where one ends.
        sign: −1 calibrates steering against the vector.
        positions: which tokens are steered.
        template: ``chat`` puts texts through the chat template.
        seed: of the interval's draws.
        reporter: shows progress.

    Raises:
        MeasurementError: a budget, percentile or sign that is none, a zero vector, or a budget that
            no strength in reach meets.
        DataError: no prompts, or some that can't be encoded or don't fit the model.
        ModelError: a vector of another model; no tokenizer.
    """
    if not 0 < target_kl < np.inf:
        raise MeasurementError(f"target_kl {target_kl}: expected a finite number of nats above 0")
    if not 0 < percentile <= 100:
        raise MeasurementError(f"percentile {percentile}: expected one above 0, up to 100")
    if sign not in (1, -1):
        raise MeasurementError(f"sign {sign}: expected 1 or -1")
    if vector.undefined:
        raise MeasurementError(
            f"the vector at {vector.site} is zero, so no strength of it changes anything; give one "
            "that is defined"
        )
    require_fit(vector, model)
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    encoded = as_ids(model, tokenizer, prompts, tokens, template)
    unit = mean_norm(model, encoded, vector.site) / vector.norm
    texts = _continued(model, tokenizer, encoded, tokens, reporter)
    measure = _Divergence(model, texts, vector, positions)

    def found(strengths: Sequence[float]) -> Float[np.ndarray, " a"]:
        return np.asarray(np.percentile(measure(strengths), percentile, axis=1))

    strengths = [sign * unit * shift for shift in _RANGE]
    met = found(strengths)
    low, high = _bracket(vector.site, strengths, met, unit, float(target_kl), percentile)
    while abs(high[0] / low[0] - 1) > _NARROW:
        inner = [sign * x for x in np.geomspace(abs(low[0]), abs(high[0]), _BETWEEN + 2)][1:-1]
        points = [low, *zip(inner, found(inner).tolist(), strict=True), high]
        at = next(i for i, (_, kl) in enumerate(points) if not kl < target_kl)
        low, high = points[at - 1], points[at]
    share = (target_kl - low[1]) / (high[1] - low[1]) if high[1] > low[1] else 1.0
    strength = float(low[0] + (high[0] - low[0]) * share)
    values = measure([strength])[0]
    return Calibration(
        site=vector.site,
        strength=strength,
        shift=abs(strength) / unit,
        target_kl=float(target_kl),
        kl=percentile_interval(values, measure.lengths, float(percentile), seed),
        mean_kl=float(values.mean()),
        percentile=float(percentile),
        n_prompts=len(encoded),
        n_tokens=len(values),
    )


def strength_in(
    vector: SteeringVector,
    model: Model,
    prompts: Prompts,
    value: Number,
    units: str = "v",
    *,
    tokenizer: Tokenizer | None = None,
    positions: Positions = "all",
    template: str = "none",
) -> float:
    """The strength λ, in units of the vector, of a strength in other units.

    Args:
        vector: the direction and its site.
        model: the language model.
        prompts: texts, message lists, pairs or ids, by which states or divergences are measured;
            not read for ``v``.
        value: how much; below 0: against the vector.
        units: ``v``: λ itself; ``residual``: λ‖v‖ is so many times the mean norm of the prompts'
            states at the site; ``kl``: so many nats at the 95th percentile, see :func:`calibrate`.
        tokenizer: the model's; default: that of its folder or hub id.
        positions: which tokens are steered, of ``kl``.
        template: ``chat`` puts texts through the chat template.

    Raises:
        ConfigError: no such units.
        MeasurementError, DataError, ModelError: as :func:`calibrate`.
    """
    if units not in get_args(Units):
        raise ConfigError(f"units {units!r}: no such units{did_you_mean(units, get_args(Units))}")
    if not np.isfinite(value):
        raise MeasurementError(f"strength {value} in units of {units}: expected a finite number")
    if units == "v" or value == 0:
        return float(value)
    if units == "residual":
        if vector.undefined:
            raise MeasurementError(
                f"the vector at {vector.site} is zero, so no strength of it has a norm; give one "
                "that is defined"
            )
        require_fit(vector, model)
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        encoded = as_ids(model, tokenizer, prompts, 0, template)
        return float(value) * mean_norm(model, encoded, vector.site) / vector.norm
    found = calibrate(
        vector,
        model,
        prompts,
        target_kl=abs(value),
        tokenizer=tokenizer,
        sign=1 if value > 0 else -1,
        positions=positions,
        template=template,
    )
    return found.strength


def mean_norm(model: Model, encoded: Sequence[Encoded], site: str) -> float:
    """r, the mean of ‖h‖ over all tokens of some prompts at a site.

    Raises:
        DataError: no prompts.
    """
    if not encoded:
        raise DataError("there are no prompts to measure by; give at least one")
    prompts = [Encoded(item.ids, len(item.ids)) for item in encoded]
    with states_of(model, prompts, sites=[site], position="all") as (states, _):
        return float(torch.linalg.vector_norm(states[site].double(), dim=1).mean())


# ---------------------------------------------------------------------------------- divergence


class _Divergence:
    """KL(p‖p_λ) of the next tokens of some texts, under several strengths at once.

    Attributes:
        lengths: next tokens of each text.
    """

    def __init__(
        self,
        model: Model,
        texts: Sequence[Encoded],
        vector: SteeringVector,
        positions: Positions,
    ) -> None:
        self._model, self._texts, self._vector = model, texts, vector
        self._positions: Positions = positions
        self._readout = Readout.of(model)
        self.lengths = [len(item.ids) - item.prompt_length for item in texts]
        self._own = self._states(Steering.none(Anatomy.of(model).width))

    def __call__(self, strengths: Sequence[float]) -> Float[np.ndarray, "a n"]:
        arms = tuple(Arm(self._vector.tensor, float(strength)) for strength in strengths)
        steering = Steering(self._vector.site, arms, positions=self._positions)
        steered = self._states(steering)
        found = np.empty((len(strengths), sum(self.lengths)))
        step = max(1, _LOGIT_BYTES // (8 * len(strengths) * len(self._readout.weight)))
        for start in range(0, found.shape[1], step):
            part = slice(start, start + step)
            log_p = float64(self._readout(self._own[0, part])).log_softmax(-1)
            log_q = float64(self._readout(steered[:, part])).log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            found[:, part] = kl.clamp_min(0).cpu().numpy()
        return found

    def _states(self, steering: Steering) -> Float[Tensor, "a n d"]:
        """final_norm states that predict each next token, in the order of the texts."""
        found: dict[int, Tensor] = {}
        for numbers, states in steered_states(self._model, self._texts, steering):
            parts = torch.split(states.float(), [self.lengths[number] for number in numbers], dim=1)
            found |= dict(zip(numbers, parts, strict=True))
        return torch.cat([found[number] for number in range(len(self._texts))], dim=1)


def _continued(
    model: Model,
    tokenizer: Tokenizer,
    encoded: Sequence[Encoded],
    tokens: int,
    reporter: Reporter,
) -> list[Encoded]:
    """Prompts with the model's own greedy continuations, and one token for an end of text.

    The last token of a text is not read, only predicted, so that any id stands for the end.
    """
    own = decode(
        model,
        tokenizer,
        encoded,
        Steering.none(Anatomy.of(model).width),
        Decoding(tokens),
        reporter=reporter,
        label="continuations",
    )
    return [
        Encoded((*item.ids, *answer, *((0,) if finished else ())), len(item.ids))
        for item, answer, finished in zip(encoded, own.tokens[0], own.finished[0], strict=True)
    ]


def _bracket(
    site: str,
    strengths: Sequence[float],
    met: Float[np.ndarray, " a"],
    unit: float,
    target: float,
    percentile: Number,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The neighbours, with their divergences, between which the budget is met for the first time.

    Raises:
        MeasurementError: it is met nowhere, or below them all.
    """
    words = f"the {percentile:g}th percentile of KL at {site}"
    if not met[0] < target:
        raise MeasurementError(
            f"target_kl {target:g}: {words} is already {met[0]:.3g} nats at λ = "
            f"{strengths[0]:.3g}, a shift of {_RANGE[0]:.1e} of the states' norm; expected a "
            "larger budget"
        )
    for low, high in pairwise(zip(strengths, met.tolist(), strict=True)):
        if not np.isfinite(high[1]):
            break
        if high[1] >= target:
            return low, high
    known = np.where(np.isfinite(met), met, -np.inf)
    most = int(known.argmax())
    raise MeasurementError(
        f"target_kl {target:g}: {words} is at most {known[most]:.3g} nats, at λ = "
        f"{strengths[most]:.3g} (a shift of {abs(strengths[most]) / unit:g} of the states' norm), "
        "and no strength in reach meets the budget; expected a smaller one"
    )


def percentile_interval(
    values: Float[np.ndarray, " n"], lengths: Sequence[int], percentile: float, seed: int
) -> Interval:
    """A percentile of the values of all prompts, and its bootstrap over prompts."""
    value = float(np.percentile(values, percentile))
    if len(lengths) < 2:
        return Interval(value, None, None, len(lengths))
    order = np.argsort(values)
    rising, prompt = values[order], np.repeat(np.arange(len(lengths)), lengths)[order]
    drawn = []
    for counts in draw_counts(len(lengths), _DRAWS, np.random.default_rng(seed)):
        up_to = counts[prompt].cumsum()  # copies of the values up to each
        place = (up_to[-1] - 1) * percentile / 100
        ends = rising[np.searchsorted(up_to, [math.floor(place), math.ceil(place)], side="right")]
        drawn.append(ends[0] + (place - math.floor(place)) * (ends[1] - ends[0]))
    low, high = percentiles(np.array(drawn), 0.95, len(lengths))
    return Interval(value, low, high, len(lengths))


def _tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer that lies beside a model's weights.

    Raises:
        ModelError: the model was built in memory, or there is none.
    """
    path = str(getattr(model.config, "name_or_path", "") or "")
    if not path:
        raise ModelError(
            f"{model_name(model)} was made in memory and has no tokenizer of its own; give "
            "tokenizer"
        )
    return load_tokenizer(path)
