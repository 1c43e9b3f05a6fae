"""What a steered model thinks of given answers: likelihoods and divergences, many arms at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsteer.data.tokens import Encoded
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import Model
from dsteer.models.readout import Readout
from dsteer.progress import SILENT, Reporter
from dsteer.steering.arms import Steering, steered_states

LOGIT_BYTES = 2**26
"""Memory that one chunk of float32 logits may take."""

TIE = 1e-6
"""Margins that are no larger are rounding: a tie."""


def preference_match(margins: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 where a margin prefers the chosen answer, 0 where the rejected one, ½ at a tie; float64."""
    return torch.where(margins.abs() < TIE, 0.5, (margins > 0).double())


@dataclass(frozen=True)
class Predictions:
    """A model's own predictions of the tokens of some answers.

    Attributes:
        states: its final_norm states, one tensor (tokens, d) an answer, float32, on the CPU.
        readout: its head.
    """

    states: tuple[Float[Tensor, "_t d"], ...]
    readout: Readout


@dataclass(frozen=True)
class Scores:
    """Answers under arms; sums over the tokens of each answer, in nats, float64.

    p is the target's distribution of the next token, q the steered model's.

    Attributes:
        log_likelihood: Σ ln q(token).
        kl: Σ KL(p‖q) = Σ (q − p + p (ln p − ln q)), whose terms are not negative; that of equal
            predictions is below 1e-12 a token in spite of rounding.
        kl_reverse: Σ KL(q‖p).
        kl_first: KL(p‖q) of the first token alone.
        agreement: how many tokens have the same most likely one under p and q.
        tokens: tokens of each answer.
    """

    log_likelihood: Float[Tensor, "a n"]
    kl: Float[Tensor, "a n"]
    kl_reverse: Float[Tensor, "a n"]
    kl_first: Float[Tensor, "a n"]
    agreement: Float[Tensor, "a n"]
    tokens: Int[Tensor, " n"]

    def under(self, arms: slice) -> Scores:
        """The scores under some of the arms."""
        values = {name: value[arms] for name, value in vars(self).items() if name != "tokens"}
        return Scores(**values, tokens=self.tokens)

    def of(self, texts: slice) -> Scores:
        """The scores of some of the answers."""
        values = {name: value[..., texts] for name, value in vars(self).items()}
        return Scores(**values)


def predictions(model: Model, texts: Sequence[Encoded], readout: Readout) -> Predictions:
    """Read a model's predictions of the answers' tokens.

    Args:
        model: a causal language model.
        texts: prompts with answers.
        readout: its head, cut to the vocabulary that is compared.
    """
    found: dict[int, Tensor] = {}
    for numbers, states in steered_states(model, texts, Steering.none(Anatomy.of(model).width)):
        lengths = [_answer(texts[number]) for number in numbers]
        parts = torch.split(states[0].float().cpu(), lengths)
        found |= dict(zip(numbers, parts, strict=True))
    return Predictions(tuple(found[number] for number in range(len(texts))), readout)


def score(
    model: Model,
    texts: Sequence[Encoded],
    steering: Steering,
    readout: Readout,
    target: Predictions,
    *,
    reporter: Reporter = SILENT,
    label: str = "teacher-forced",
) -> Scores:
    """Score every answer under every arm against the target's predictions.

    Args:
        model: the model that is steered.
        texts: prompts with answers.
        steering: the arms.
        readout: the model's head, with the target's vocabulary.
        target: what the other model predicts of the same texts.
        reporter: shows progress.
        label: what progress is called.
    """
    return score_states(
        steered_states(model, texts, steering),
        len(steering.arms),
        texts,
        readout,
        target,
        reporter=reporter,
        label=label,
    )


def score_states(
    batches: Iterable[tuple[list[int], Float[Tensor, "a n d"]]],
    arms: int,
    texts: Sequence[Encoded],
    readout: Readout,
    target: Predictions,
    *,
    reporter: Reporter = SILENT,
    label: str = "teacher-forced",
) -> Scores:
    """Score every answer under every arm from the states that predict its tokens.

    Args:
        batches: numbers of some texts and their states (arms, their answers' tokens in order, d),
            as :func:`dsteer.steering.arms.steered_states` and
            :func:`dsteer.steering.edits.edited_states` give them.
        arms: how many.
        texts: prompts with answers.
        readout: the head that reads the states, with the target's vocabulary.
        target: what the other model predicts of the same texts.
        reporter: shows progress.
        label: what progress is called.
    """
    names = ("log_likelihood", "kl", "kl_reverse", "kl_first", "agreement")
    sums = {name: torch.zeros(arms, len(texts), dtype=torch.float64) for name in names}
    step = max(1, LOGIT_BYTES // (4 * len(readout.weight)))
    with reporter.bar(label, len(texts), unit="answers") as advance:
        for numbers, states in batches:
            lengths = [_answer(texts[number]) for number in numbers]
            aims = torch.cat([target.states[number] for number in numbers])
            tokens = [token for n in numbers for token in texts[n].ids[texts[n].prompt_length :]]
            ids = torch.tensor(tokens, device=readout.weight.device)
            rows = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)])
            values = torch.zeros(len(names), arms, len(tokens), dtype=torch.float64)
            columns = max(1, step // arms)
            for start in range(0, len(tokens), columns):
                stop = min(start + columns, len(tokens))
                part = _compare(readout(states[:, start:stop]), target.readout(aims[start:stop]))
                taken = part.log_q.gather(-1, ids[start:stop].expand(arms, -1)[..., None])[..., 0]
                stacked = torch.stack([taken, part.kl, part.kl_reverse, part.kl, part.same])
                values[:, :, start:stop] = stacked.double().cpu()
            place = torch.tensor(numbers)
            for name, value in zip(names, values, strict=True):
                if name == "kl_first":
                    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
                    sums[name][:, place] = value[:, firsts]
                else:
                    total = torch.zeros(arms, len(numbers), dtype=torch.float64)
                    sums[name][:, place] = total.index_add_(1, rows, value)
            advance(len(numbers))
    return Scores(**sums, tokens=torch.tensor([_answer(item) for item in texts]))


def own_likelihoods(aims: Predictions, texts: Sequence[Encoded]) -> Tensor:
    """Σ ln p(token) of each answer under the model that made the predictions, float64."""
    found = []
    for item, states in zip(texts, aims.states, strict=True):
        log_p = aims.readout(states).log_softmax(-1)
        tokens = torch.tensor(item.ids[item.prompt_length :], device=log_p.device)
        found.append(log_p.gather(1, tokens[:, None]).double().sum().cpu())
    return torch.stack(found)


@dataclass(frozen=True)
class _Compared:
    log_q: Float[Tensor, "a t v"]
    kl: Float[Tensor, "a t"]
    kl_reverse: Float[Tensor, "a t"]
    same: Float[Tensor, "a t"]


def _compare(steered: Float[Tensor, "a t v"], aim: Float[Tensor, "t v"]) -> _Compared:
    log_p, log_q = aim.log_softmax(-1), steered.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q
    return _Compared(
        log_q,
        _divergence(p, q, gap),
        _divergence(q, p, -gap),
        (steered.argmax(-1) == aim.argmax(-1)).float(),
    )


def _divergence(
    p: Float[Tensor, "... v"], q: Float[Tensor, "... v"], gap: Float[Tensor, "a t v"]
) -> Float[Tensor, "a t"]:
    """Σ (q − p + p gap) with gap = ln p − ln q; q − p = p (e^−gap − 1) where they are close."""
    excess = torch.where(gap.abs() < 1, p * torch.expm1(-gap), q - p)
    return (excess + p * gap).sum(-1).clamp_min(0)


def _answer(item: Encoded) -> int:
    return len(item.ids) - item.prompt_length
