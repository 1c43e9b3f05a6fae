"""How large a strength is for a model: by the norm of its residual stream, and by KL.

A vector has the units of the states that it was built from. A quantised model computes other
states than the one it was made of, so a strength that was chosen for the one is checked on the
other here: by measuring, not by rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

from dsteer.data.tokens import Encoded
from dsteer.data.types import Prompt
from dsteer.errors import MeasurementError
from dsteer.mlx.anatomy import Anatomy, Module
from dsteer.mlx.capture import read
from dsteer.mlx.load import Tokenizer, encode_prompts
from dsteer.mlx.steering import Steering, steer
from dsteer.progress import SILENT, Reporter

_CLOSE = 1e-3
"""How near, as a ratio, the strength of a calibration is told."""

_MOST = 2.0**20
"""The largest strength that a calibration tries, and one over the smallest."""


@dataclass(frozen=True)
class Scale:
    """The residual stream of one model beside that of another, at one site.

    Attributes:
        norm: mean ‖h‖ of the model.
        reference: mean ‖h‖ of the model that the vectors are of.
    """

    norm: float
    reference: float

    @property
    def ratio(self) -> float | None:
        """What a strength is multiplied by to shift this model by the same share of its norm."""
        return self.norm / self.reference if self.reference > 0 else None


def residual_norms(
    model: Module,
    prompts: Sequence[Prompt] | Sequence[Encoded],
    *,
    tokenizer: Tokenizer | None = None,
    sites: str | Sequence[str] = "all",
    position: str = "all",
    template: str = "none",
    reporter: Reporter = SILENT,
) -> dict[str, float]:
    """Mean ‖h‖ of a model's states, by site.

    Args:
        model: what :func:`dsteer.mlx.load` returns, quantised or not.
        prompts: texts, message lists or ids.
        tokenizer: not needed for ids.
        sites: ``all``, or names.
        position: which tokens; at the first one a model may have states of another size.
        template: ``chat`` puts texts through the chat template.
        reporter: shows progress.

    Raises:
        DsteerError: as :func:`dsteer.mlx.read`.
    """
    states = read(
        model,
        prompts,
        tokenizer=tokenizer,
        sites=sites,
        position=position,
        template=template,
        reporter=reporter,
    )
    return {site: float(rows.double().norm(dim=1).mean()) for site, rows in states.items()}


def natural_scale(
    model: Module,
    reference: Module | Mapping[str, float],
    prompts: Sequence[Prompt] | Sequence[Encoded],
    **settings: Any,
) -> dict[str, Scale]:
    """Measure the residual stream of a model beside that of the model that vectors were built on.

    Args:
        model: the model that is steered, quantised or not.
        reference: the other one, or what :func:`residual_norms` found of it on these prompts.
        prompts: texts, message lists or ids.
        settings: of :func:`residual_norms`, which is called with them.

    Raises:
        DsteerError: as :func:`dsteer.mlx.read`.
    """
    norms = residual_norms(model, prompts, **settings)
    if isinstance(reference, nn.Module):  # a dict too
        reference = residual_norms(reference, prompts, **settings)
    return {site: Scale(norm, reference[site]) for site, norm in norms.items() if site in reference}


@dataclass(frozen=True)
class Calibration:
    """The strength at which steering costs a given divergence.

    Attributes:
        strength: s > 0, to a thousandth of itself.
        kl: the percentile of KL(plain ‖ steered) there, in nats.
        target: what was asked for.
        n: next-token distributions that it was measured on.
    """

    strength: float
    kl: float
    target: float
    n: int


def calibrate(
    model: Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt] | Sequence[Encoded],
    what: Any,
    target_kl: float,
    *,
    percentile: float = 95.0,
    tokens: int = 16,
    template: str = "none",
    **steering: Any,
) -> Calibration:
    """Find the strength at which a percentile of next-token KL(plain ‖ steered) meets a budget.

    The KL is measured at the first tokens of the plain model's own greedy continuation of each
    prompt, whatever the weights are stored in. The strength is doubled or halved from 1 until the
    budget lies between two, and then bisected on a logarithmic scale.

    Args:
        model: what :func:`dsteer.mlx.load` returns.
        tokenizer: likewise.
        prompts: texts, message lists or ids.
        what: the vector, as of :func:`dsteer.mlx.steer`.
        target_kl: nats, above 0.
        percentile: 0 … 100.
        tokens: so many first tokens of each continuation.
        template: ``chat`` puts texts through the chat template.
        steering: ``positions``, ``operation``, ``site`` and ``relative`` of steering.

    Raises:
        MeasurementError: a target, percentile or number of tokens out of range, or a budget that no
            strength meets.
        DsteerError: as :func:`dsteer.mlx.steer`.
    """
    if not 0 < target_kl < math.inf:
        raise MeasurementError(f"target_kl {target_kl}: expected a finite number of nats above 0")
    if not 0 <= percentile <= 100 or tokens < 1:
        raise MeasurementError(
            f"percentile {percentile} over {tokens} tokens: expected 0 to 100, and at least 1 token"
        )
    anatomy = Anatomy.of(model)
    rows = [
        _continued(model, tokenizer, item, tokens)
        for item in encode_prompts(tokenizer, prompts, anatomy, template=template)
    ]
    plain = _log_probabilities(model, rows, None)
    with steer(model, what, 0.0, **steering) as acting:

        def kl(strength: float) -> float:
            acting.set_strength(strength)
            steered = _log_probabilities(model, rows, acting)
            found = [
                np.array((mx.exp(p) * (p - q)).sum(axis=-1))
                for p, q in zip(plain, steered, strict=True)
            ]
            return float(np.percentile(np.concatenate(found), percentile))

        strength, attained = _meet(kl, target_kl)
    return Calibration(strength, attained, target_kl, sum(len(one) for one in plain))


def _continued(model: Module, tokenizer: Tokenizer, prompt: Encoded, tokens: int) -> Encoded:
    """A prompt and its greedy continuation, without the last token, which predicts nothing here."""
    steps = mlx_lm.stream_generate(model, tokenizer, list(prompt.ids), max_tokens=tokens)
    new = [step.token for step in steps][: tokens - 1]
    return Encoded((*prompt.ids, *new), len(prompt.ids))


def _log_probabilities(
    model: Module, rows: Sequence[Encoded], acting: Steering | None
) -> list[mx.array]:
    """Of each row the next-token log-probabilities (t, V) from its last prompt token on."""
    found = []
    for row in rows:
        if acting is not None:
            acting.prompt_lengths = row.prompt_length
        logits = model(mx.array([row.ids]))[0, row.prompt_length - 1 :].astype(mx.float32)
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    mx.eval(found)
    return found


def _meet(kl: Any, target: float) -> tuple[float, float]:
    """A strength at which an increasing function of it meets a target, and its value there."""
    low = high = 1.0
    value = kl(1.0)
    grows = value < target
    while (value < target) == grows:
        low, high = (high, high * 2) if grows else (low / 2, low)
        edge = high if grows else low
        if not 1 / _MOST <= edge <= _MOST:
            raise MeasurementError(
                f"target_kl {target}: at strength {edge / 2 if grows else edge * 2:g} the KL is "
                f"still {value:.3g} nats; expected a budget that steering with this vector can meet"
            )
        value = kl(edge)
    while high / low > 1 + _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kl(middle) < target else (low, middle)
    return low, kl(low)
