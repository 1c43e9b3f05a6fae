"""What DPO did, on held-out pairs: implicit rewards and KL, teacher-forced, with intervals.

Texts are sorted by length and padded on the right; a causal model needs no mask for that, and an
encoder has one.
Log-softmax and all sums are in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dsteer.activations.inputs import Inputs, decoder_shift
from dsteer.data.tokens import Encoded
from dsteer.geometry.intervals import Interval, bootstrap_mean, bootstrap_ratio, wilson
from dsteer.geometry.logits import float64, kl_divergence
from dsteer.models.placement import execution_device
from dsteer.models.seq2seq import start_ids
from dsteer.progress import SILENT, Reporter
from dsteer.training.examples import Example

LOGIT_VALUES = 2**25
"""Logits held at once (128 MiB in float32)."""

NOISE_PAIRS = 32
"""Pairs on which the noise floor of the KL is measured."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """A context and the tokens whose probability is asked for.

    The context is what the encoder of an encoder-decoder model reads.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.tokens)


def batches(items: Sequence[Continuation], vocab_size: int) -> Iterator[list[int]]:
    """Indices of one batch after the other, longest first, within the memory for logits."""
    order = sorted(range(len(items)), key=lambda index: (-len(items[index]), index))
    start = 0
    while start < len(order):
        size = max(1, LOGIT_VALUES // (vocab_size * len(items[order[start]])))
        yield order[start : start + size]
        start += size


@torch.no_grad()
def continuation_logits(
    model: PreTrainedModel, items: Sequence[Continuation]
) -> list[Float[Tensor, "t vocab"]]:
    """Logits from which the model would choose each token of each continuation, in one batch."""
    rows = [Encoded(item.context + item.tokens, len(item.context)) for item in items]
    start = start_ids(model)
    device = execution_device(model.get_input_embeddings())
    logits = model(**Inputs.of(rows, start).arguments(device), use_cache=False).logits
    found = []
    for row, item in enumerate(rows):
        shift = decoder_shift(item, start) - 1
        found.append(logits[row, item.prompt_length + shift : len(item.ids) + shift])
    return found


def log_likelihoods(model: PreTrainedModel, items: Sequence[Continuation]) -> Float[Tensor, " n"]:
    """ln π(tokens | context) of each continuation: the sum over its tokens, in nats, float64."""
    result = torch.empty(len(items), dtype=torch.float64)
    for batch in batches(items, _vocab_size(model)):
        chosen = [items[index] for index in batch]
        for index, item, logits in zip(
            batch, chosen, continuation_logits(model, chosen), strict=True
        ):
            log_p = float64(logits).log_softmax(1)
            targets = torch.tensor(item.tokens, device=log_p.device)
            result[index] = log_p.gather(1, targets[:, None]).sum()
    return result


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class PairLikelihoods:
    """ln π(y|x) of both answers of n pairs under one model, float64."""

    chosen: Float[Tensor, " n"]
    rejected: Float[Tensor, " n"]


def pair_likelihoods(model: PreTrainedModel, examples: Sequence[Example]) -> PairLikelihoods:
    """Log-likelihood of both answers of each pair."""
    items = [Continuation(example.prompt, example.chosen) for example in examples]
    items += [Continuation(example.prompt, example.rejected) for example in examples]
    both = log_likelihoods(model, items)
    return PairLikelihoods(both[: len(examples)], both[len(examples) :])


def reward_margins(
    tuned: PairLikelihoods, reference: PairLikelihoods, beta: float
) -> Float[Tensor, " n"]:
    """r(chosen) − r(rejected) with the implicit reward r = β [ln π(y|x) − ln π_ref(y|x)]."""
    chosen = tuned.chosen - reference.chosen
    rejected = tuned.rejected - reference.rejected
    return beta * (chosen - rejected)


@dataclass(frozen=True)
class Curve:
    """A held-out point of the learning curve: sigmoid DPO loss, reward accuracy, reward margin."""

    loss: float
    accuracy: float
    margin: float


def curve_point(margins: Float[Tensor, " n"]) -> Curve:
    """Mean of −ln σ(margin), share of margins above 0, mean margin."""
    return Curve(
        loss=float(-torch.nn.functional.logsigmoid(margins).mean()),
        accuracy=float((margins > 0).double().mean()),
        margin=float(margins.mean()),
    )


@dataclass(frozen=True)
class Evaluation:
    """A tuned model against its base on held-out pairs.

    Attributes:
        reward_accuracy: P(r_chosen > r_rejected), a tie counts as wrong; Wilson interval with one
            trial a conversation.
        reward_margin: mean r_chosen − r_rejected; bootstrap over conversations.
        kl_to_base: KL(tuned‖base) in nats a token over the whole vocabulary, on the tokens of the
            chosen answers; ratio of sums, bootstrap over conversations.
        kl_noise_floor: the same of the base against itself, one text at a time: what rounding alone
            gives.
    """

    reward_accuracy: Interval
    reward_margin: Interval
    kl_to_base: Interval
    kl_noise_floor: float

    @property
    def learned(self) -> bool:
        """The accuracy interval lies above chance, and that of the KL above the noise floor."""
        accuracy, kl = self.reward_accuracy.low, self.kl_to_base.low
        above_chance = accuracy is not None and accuracy > 0.5
        return above_chance and kl is not None and kl > self.kl_noise_floor


def evaluate(
    tuned: PreTrainedModel,
    base: PreTrainedModel,
    examples: Sequence[Example],
    *,
    beta: float,
    seed: int,
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Compare a tuned model with its base on held-out pairs.

    Args:
        tuned: in evaluation mode.
        base: the reference π_ref, in evaluation mode.
        examples: at least one pair, cut to the length that training used.
        beta: of the reward.
        seed: of the bootstrap.
        reporter: shows progress.
    """
    margins = reward_margins(
        pair_likelihoods(tuned, examples), pair_likelihoods(base, examples), beta
    )
    clusters = [example.conversation or str(row) for row, example in enumerate(examples)]
    chosen = [Continuation(example.prompt, example.chosen) for example in examples]
    kl, tokens = answer_kl(tuned, base, chosen, reporter)
    margin = bootstrap_mean(margins, clusters, seed=seed)
    kl_to_base = bootstrap_ratio(kl, tokens, clusters, seed=seed)
    assert margin is not None
    assert kl_to_base is not None
    return Evaluation(
        reward_accuracy=wilson(int((margins > 0).sum()), len(examples), len(set(clusters))),
        reward_margin=margin,
        kl_to_base=kl_to_base,
        kl_noise_floor=noise_floor(base, chosen[:NOISE_PAIRS]),
    )


def answer_kl(
    tuned: PreTrainedModel,
    base: PreTrainedModel,
    items: Sequence[Continuation],
    reporter: Reporter = SILENT,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """KL(tuned‖base) of each text, summed over its tokens in nats, and how many tokens it has."""
    kl = torch.empty(len(items), dtype=torch.float64)
    with reporter.bar("KL to base", len(items), unit="pairs") as advance:
        for batch in batches(items, _vocab_size(base)):
            texts = [items[index] for index in batch]
            by_tuned, by_base = (continuation_logits(model, texts) for model in (tuned, base))
            kl[batch] = _kl_sums(by_tuned, by_base)
            advance(len(batch))
    return kl, torch.tensor([len(item.tokens) for item in items], dtype=torch.float64)


def noise_floor(base: PreTrainedModel, items: Sequence[Continuation]) -> float:
    """KL in nats a token of a model in batches against itself one text at a time.

    A text that has a batch to itself is read twice in one batch: another batch size in any case.
    """
    total = 0.0
    for batch in batches(items, _vocab_size(base)):
        texts = [items[index] for index in batch]
        alone = [continuation_logits(base, [text])[0] for text in texts]
        together = continuation_logits(base, texts if len(texts) > 1 else texts * 2)
        total += float(_kl_sums(together[: len(texts)], alone).sum())
    return total / sum(len(item.tokens) for item in items)


def _kl_sums(
    p: Sequence[Float[Tensor, "t vocab"]], q: Sequence[Float[Tensor, "t vocab"]]
) -> Float[Tensor, " n"]:
    """Σ over tokens of KL(p‖q), one a text, in nats."""
    return torch.stack(
        [kl_divergence(float64(a), float64(b)).sum().cpu() for a, b in zip(p, q, strict=True)]
    )
