"""Preference losses beside DPO, through TRL's own trainers: SimPO, CPO, ORPO and KTO.

SimPO, CPO and ORPO know no reference model. KTO has one, and reads answers one by one: each pair
becomes a desirable and an undesirable row.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import KTOConfig, KTOTrainer

from dsteer.config import DpoConfig
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError
from dsteer.parallel import Ranks
from dsteer.training.examples import Example, encode_pairs, fitting, to_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL says that these may change; its version is pinned
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def check_model(config: DpoConfig, encoder_decoder: bool, ranks: Ranks) -> None:
    """Refuse models and launches that only DPO has.

    Raises:
        ConfigError: an encoder-decoder model, or several processes, with another method.
    """
    if config.method == "dpo":
        return
    if encoder_decoder:
        raise ConfigError(
            f"dpo.method: {config.method} trains decoder-only models, and the base is an "
            "encoder-decoder; use method: dpo"
        )
    if ranks.world > 1:
        raise ConfigError(
            f"dpo.method: {config.method} trains in one process, not {ranks.world}; launch one, or "
            "use method: dpo"
        )


def first_loss(config: DpoConfig) -> tuple[float, str] | None:
    """What the loss is while the policy is still the reference, in number and words.

    None where it depends on the model: without a reference, or for DPO losses that are not listed.
    """
    if config.method == "kto":
        return 0.5, "1/2"
    if config.method != "dpo":
        return None
    if config.loss_type in {"sigmoid", "robust"}:
        return 0.6931471805599453, "ln 2"
    if config.loss_type == "hinge":
        return 1.0, "1"
    if config.loss_type == "ipo":
        return 1 / (4 * config.beta**2), "1/(4β²)"
    return None


# ---------------------------------------------------------------------------------- trainers


class _Silent:
    """No model cards, no telemetry."""

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        pass


class _OurTokens(_Silent):
    """Takes the token ids as they come: TRL would write a BOS that the tokenizer does not."""

    def tokenize_row(self, feature: dict[str, Any], _model: object = None) -> dict[str, list[int]]:
        prompt = feature["ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for answer in ("chosen", "rejected"):
            ids = feature[f"{answer}_ids"]
            row[f"{answer}_input_ids"] = prompt + ids
            row[f"{answer}_attention_mask"] = [1] * (len(prompt) + len(ids))
            row[f"{answer}_labels"] = [-100] * len(prompt) + ids
        return row


class _Cpo(_OurTokens, CPOTrainer):  # type: ignore[misc]
    pass


class _Orpo(_OurTokens, ORPOTrainer):  # type: ignore[misc]
    pass


class _Kto(_Silent, KTOTrainer):  # type: ignore[misc]
    pass


def method_arguments(config: DpoConfig, common: dict[str, Any]) -> TrainingArguments:
    """The method's arguments, with those that all methods have."""
    common = {**common, "beta": config.beta, "max_length": config.max_length}
    if config.method == "orpo":
        return ORPOConfig(**common)
    if config.method == "kto":
        # as many answers a step as in the other methods
        common["per_device_train_batch_size"] *= 2
        return KTOConfig(precompute_ref_log_probs=config.reference == "precomputed", **common)
    simpo = config.method == "simpo"
    return CPOConfig(
        loss_type="simpo" if simpo else "sigmoid",
        simpo_gamma=config.simpo_gamma,
        cpo_alpha=0.0 if simpo else config.cpo_alpha,
        label_smoothing=config.label_smoothing,
        **common,
    )


def method_trainer(
    config: DpoConfig,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    args: TrainingArguments,
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftLoraConfig | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of simpo, cpo, orpo or kto."""
    encoded = encode_pairs(pairs, tokenizer)
    if config.method == "kto":
        kept = [
            pair
            for pair, example in zip(pairs, encoded, strict=True)
            if len(example.prompt) < config.max_length
        ]
        return _Kto(
            model=model, ref_model=reference, args=args,
            train_dataset=Dataset.from_list(unpaired(kept, tokenizer, args.seed)),
            processing_class=tokenizer, peft_config=peft_config, callbacks=callbacks,
        )  # fmt: skip
    trainer = _Orpo if config.method == "orpo" else _Cpo
    rows = [_row(example) for example in fitting(encoded, config.max_length)]
    return trainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=peft_config, callbacks=callbacks,
    )  # fmt: skip


def _row(example: Example) -> dict[str, Any]:
    return {
        "prompt": "",
        "chosen": "",
        "rejected": "",
        "ids": list(example.prompt),
        "chosen_ids": list(example.chosen),
        "rejected_ids": list(example.rejected),
    }


def unpaired(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[dict[str, Any]]:
    """KTO's rows: desirable and undesirable ones in turn, each kind in an order of its own.

    KTO reads its rows in order and takes a neighbour's answer as a row's unrelated one, so the two
    answers of a pair must not stand side by side.
    """
    drawn, rows = random.Random(seed), to_rows(pairs, tokenizer)
    wanted, other = drawn.sample(rows, len(rows)), drawn.sample(rows, len(rows))
    found = []
    for good, bad in zip(wanted, other, strict=True):
        found += [
            {"prompt": good["prompt"], "completion": good["chosen"], "label": True},
            {"prompt": bad["prompt"], "completion": bad["rejected"], "label": False},
        ]
    return found
