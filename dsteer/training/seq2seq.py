"""DPO of encoder-decoder models, which TRL's trainer does not take: its losses, on two stacks.

Everything around the loss (order, optimiser, checkpoints, logs) is transformers' trainer, as under
TRL. Texts of a pair share their prompt, which the encoder reads; the answers are the decoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer

from dsteer.activations.inputs import Inputs
from dsteer.data.tokens import Encoded
from dsteer.errors import ConfigError, ModelError
from dsteer.models.seq2seq import start_ids
from dsteer.training.evaluate import PairLikelihoods
from dsteer.training.examples import Example

LOSSES = ("sigmoid", "hinge", "ipo")

_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


def check_loss(loss_type: str) -> None:
    """Refuse a loss that is not ours.

    Raises:
        ConfigError: with those that are.
    """
    if loss_type not in LOSSES:
        raise ConfigError(
            f"dpo.loss_type: {loss_type} is not available for encoder-decoder models, which TRL "
            f"does not train; choose {', '.join(LOSSES)}"
        )


def preference_loss(
    ratios: Float[Tensor, "2 n"], lengths: Int[Tensor, "2 n"], beta: float, loss_type: str
) -> Float[Tensor, " n"]:
    """The loss of each pair.

    With r = ln π(y|x) − ln π_ref(y|x): ``sigmoid`` is −ln σ(β(r_w − r_l)), ``hinge`` is
    max(0, 1 − β(r_w − r_l)), ``ipo`` is (r_w/|y_w| − r_l/|y_l| − 1/2β)².

    Args:
        ratios: r of the chosen answers, then of the rejected ones.
        lengths: their tokens.
        beta: β.
        loss_type: one of :data:`LOSSES`.
    """
    margin = ratios[0] - ratios[1]
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        means = ratios / lengths
        return (means[0] - means[1] - 1 / (2 * beta)) ** 2
    return -functional.logsigmoid(beta * margin)


def switch_dropout_off(model: nn.Module) -> None:
    """As TRL does, and where a model keeps its rates as numbers too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


class Seq2SeqDpoTrainer(Trainer):  # type: ignore[misc]
    """transformers' trainer with the DPO loss of an encoder-decoder model.

    Args:
        model: the policy; with an adapter, its reference is the model without.
        ref_model: a live reference; None with an adapter, or where ``reference`` is set before
            training.
        args: TRL's, of which beta and the loss are read too.
        examples: the pairs, cut to the length.
        processing_class: the tokenizer.
        callbacks: as the trainer's.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        args: Any,
        examples: Sequence[Example],
        processing_class: Any,
        callbacks: list[Any],
    ) -> None:
        start = start_ids(model)
        if start is None:
            raise ModelError(f"{type(model).__name__} is decoder-only; TRL trains it")
        self._start = start
        args.remove_unused_columns = False
        switch_dropout_off(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(enumerate(examples)),
            data_collator=self._collate,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the pairs of a batch
        self.reference: PairLikelihoods | None = None
        self._ref_model = None
        if ref_model is not None:
            self._ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self._sums: dict[str, list[float]] = {"rewards/accuracies": [], "rewards/margins": []}

    def _collate(self, items: Sequence[tuple[int, Example]]) -> dict[str, Tensor]:
        """Chosen answers, then rejected ones, each behind its prompt."""
        answers = [(e.prompt, e.chosen) for _, e in items] + [
            (e.prompt, e.rejected) for _, e in items
        ]
        rows = [Encoded((*prompt, *answer), len(prompt)) for prompt, answer in answers]
        inputs = Inputs.of(rows, self._start).arguments(torch.device("cpu"))
        width = max(len(answer) for _, answer in answers)
        labels = torch.full((len(rows), width), -100)
        for row, (_, answer) in enumerate(answers):
            labels[row, : len(answer)] = torch.tensor(answer)
        return {**inputs, "labels": labels, "pairs": torch.tensor([number for number, _ in items])}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002
    ) -> Tensor | tuple[Tensor, None]:
        """The mean loss of the pairs; rewards are kept for the next log."""
        inputs = dict(inputs)
        labels, pairs = inputs.pop("labels"), inputs.pop("pairs")
        own = self._log_likelihoods(model, inputs, labels)
        reference = self._reference_likelihoods(inputs, labels, pairs).to(own)
        ratios = (own - reference).view(2, -1)
        beta = self.args.beta
        lengths = (labels >= 0).sum(1).view(2, -1)
        loss = preference_loss(ratios, lengths, beta, self.args.loss_type[0]).mean()
        margins = beta * (ratios[0] - ratios[1]).detach()
        for name, values in (
            ("rewards/accuracies", (margins > 0).float()),
            ("rewards/margins", margins),
        ):
            self._sums[name].append(float(self.accelerator.gather_for_metrics(values).mean()))
        return (loss, None) if return_outputs else loss

    def _log_likelihoods(
        self, model: nn.Module, inputs: dict[str, Tensor], labels: Int[Tensor, "b t"]
    ) -> Float[Tensor, " b"]:
        logits = model(**inputs, use_cache=False).logits[:, len(self._start) - 1 :]
        targets = labels.clamp_min(0)
        log_p = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        total: Tensor = (log_p * (labels >= 0)).sum(1)
        return total

    def _reference_likelihoods(
        self, inputs: dict[str, Tensor], labels: Tensor, pairs: Tensor
    ) -> Float[Tensor, " b"]:
        if self.reference is not None:
            numbers = pairs.cpu()
            return torch.cat([self.reference.chosen[numbers], self.reference.rejected[numbers]])
        policy = self.accelerator.unwrap_model(self.model)
        without = policy.disable_adapter() if self._ref_model is None else nullcontext()
        with torch.no_grad(), without:
            return self._log_likelihoods(self._ref_model or policy, inputs, labels)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the rewards since the last log to a log of the loss."""
        if "loss" in logs:
            for name, values in self._sums.items():
                logs[name] = sum(values) / len(values)
                values.clear()
        super().log(logs, start_time)
