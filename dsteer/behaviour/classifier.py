"""A sequence classifier: its load, and its logits of many texts in batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from dsteer.data.tokens import Tokenizer
from dsteer.errors import ModelError
from dsteer.models.load import is_adapter, load_config, load_tokenizer, quiet, resolve_device

BATCH_TOKENS = 2**13
"""Tokens, padding included, that are read at once."""


@dataclass(frozen=True)
class Classifier:
    """A model with a classification head, its tokenizer, and what it can read.

    Attributes:
        name: hub id or folder.
        labels: the head's labels, in the order of its logits.
        multi_label: whether its config says that the labels are independent.
        max_tokens: the longest text, special tokens included; None where there is no limit.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    multi_label: bool
    max_tokens: int | None

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Classifier:
        """Load a classifier, in evaluation mode and in the dtype of its weights.

        Raises:
            ModelError: there is none, or it lacks weights (a language model has no head).
        """
        target = resolve_device(device)
        if is_adapter(path):
            raise ModelError(f"{path}: an adapter; merge it into its base and name that model")
        config = load_config(path)
        with quiet():
            try:
                model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                    str(path), config=config, dtype="auto", output_loading_info=True
                )
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelError(
                    f"{path}: no text classifier can be loaded there ({first.rstrip('.')}); name "
                    "one with a sequence-classification head"
                ) from None
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"{path}: {len(missing)} weights are missing (such as {missing[0]}), so they would "
                "be random; name a model with a trained sequence-classification head"
            )
        tokenizer = load_tokenizer(path)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        names = model.config.id2label
        return cls(
            name=str(path),
            model=model.to(target).eval(),
            tokenizer=tokenizer,
            labels=tuple(names[index] for index in sorted(names)),
            multi_label=model.config.problem_type == "multi_label_classification",
            max_tokens=_max_tokens(model.config, tokenizer),
        )

    def fit(self, ids: list[int], *, keep: str) -> list[int]:
        """Cut ids that are too long, at the end (``keep="start"``) or else at the start.

        A special token at the very start or end (BOS, CLS, SEP) stays.
        """
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return ids
        special = set(self.tokenizer.all_special_ids)
        head = ids[:1] if ids[0] in special else []
        tail = ids[-1:] if ids[-1] in special else []
        body = ids[len(head) : len(ids) - len(tail)]
        room = self.max_tokens - len(head) - len(tail)
        return head + (body[:room] if keep == "start" else body[len(body) - room :]) + tail

    @torch.inference_mode()
    def logits(self, texts: Sequence[list[int]]) -> Float[Tensor, "n labels"]:
        """Logits (n, labels) of texts of at least one token each, float64 on the CPU."""
        result = torch.empty(len(texts), len(self.labels), dtype=torch.float64)
        pad = self.tokenizer.pad_token_id
        for batch in self._batches(texts):
            width = max(len(texts[index]) for index in batch)
            ids = torch.full((len(batch), width), pad or 0)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, : len(texts[index])] = torch.tensor(texts[index])
                mask[row, : len(texts[index])] = 1
            device = self.model.device
            output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            result[batch] = output.logits.cpu().double()
        return result

    def _batches(self, texts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Indices of one batch after the other, longest first."""
        order = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
        start = 0
        while start < len(order):
            size = max(1, BATCH_TOKENS // len(texts[order[start]]))
            if self.tokenizer.pad_token_id is None:
                size = 1  # nothing to fill a batch with
            yield order[start : start + size]
            start += size


def _max_tokens(config: Any, tokenizer: Tokenizer) -> int | None:
    """The lesser of the tokenizer's limit and the model's number of positions."""
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa counts its positions from the padding token's id on.
        from_pad = any(name in config.model_type for name in ("roberta", "camembert"))
        limits.append(positions - (config.pad_token_id + 1 if from_pad else 0))
    if tokenizer.model_max_length < 10**9:  # transformers says "no limit" with 1e30
        limits.append(tokenizer.model_max_length)
    return min(limits) if limits else None
