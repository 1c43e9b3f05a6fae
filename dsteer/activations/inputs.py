"""What one pass through a model reads: right-padded ids, and for an encoder its own with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dsteer.activations.batching import Batch, pad_right, plan_batches
from dsteer.data.tokens import Encoded
from dsteer.models.anatomy import Anatomy


@dataclass(frozen=True)
class Inputs:
    """Token ids of a batch.

    A decoder-only model reads prompt and answer in one. Of an encoder-decoder model the encoder
    reads the prompt, with a mask, for it looks both ways; the decoder reads its start tokens and
    the answer. Neither a causal model nor a decoder needs a mask for padding on the right.

    Attributes:
        ids: what the decoder reads.
        encoder_ids: what the encoder reads; None of a decoder-only model.
        encoder_mask: 1 on its real tokens, 0 on padding.
    """

    ids: Int[Tensor, "b t"]
    encoder_ids: Int[Tensor, "e s"] | None = None
    encoder_mask: Int[Tensor, "e s"] | None = None

    @classmethod
    def of(cls, rows: Sequence[Encoded], start: tuple[int, ...] | None) -> Inputs:
        """Pad rows to the longest.

        Args:
            rows: ids; any answer behind the prompt.
            start: the tokens that the decoder begins with; None of a decoder-only model.
        """
        if start is None:
            return cls(_padded([row.ids for row in rows]))
        prompts = [row.ids[: row.prompt_length] for row in rows]
        encoder_ids = _padded(prompts)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        mask = (torch.arange(encoder_ids.shape[1]) < lengths).long()
        decoder = [(*start, *row.ids[row.prompt_length :]) for row in rows]
        return cls(_padded(decoder), encoder_ids, mask)

    def repeat(self, times: int) -> Inputs:
        """Each of the decoder's rows so many times; the encoder's stay as they are."""
        return Inputs(self.ids.repeat_interleave(times, 0), self.encoder_ids, self.encoder_mask)

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        """The same as arguments of a whole model."""
        if self.encoder_ids is None or self.encoder_mask is None:
            return {"input_ids": self.ids.to(device)}
        return {
            "input_ids": self.encoder_ids.to(device),
            "attention_mask": self.encoder_mask.to(device),
            "decoder_input_ids": self.ids.to(device),
        }

    def run(self, anatomy: Anatomy) -> Any:
        """What the decoder returns, its final_norm states first; the head is not run.

        Where hooks repeat the rows of the encoder's states, its mask is repeated likewise.
        """
        ids = self.ids.to(anatomy.device)
        if self.encoder_ids is None or self.encoder_mask is None or anatomy.encoder is None:
            return anatomy.decoder(input_ids=ids, use_cache=False)
        mask = self.encoder_mask.to(anatomy.device)
        encoded = Anatomy.read(
            anatomy.encoder(input_ids=self.encoder_ids.to(anatomy.device), attention_mask=mask)
        )
        return anatomy.decoder(
            input_ids=ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask.repeat_interleave(len(encoded) // len(mask), 0),
            use_cache=False,
        )


def decoder_shift(row: Encoded, start: tuple[int, ...] | None) -> int:
    """What is added to the place of a token among a row's ids to get its column in the decoder.

    The last token of the prompt, p − 1, stands for the last start token of an encoder-decoder
    model: from both the first answer token is predicted.
    """
    return 0 if start is None else len(start) - row.prompt_length


def plan_rows(rows: Sequence[Encoded], budget: int, *, pad: bool = True) -> list[Batch]:
    """Batches of rows for an encoder-decoder model, of similar length, prompt and answer together.

    Args:
        rows: what is read.
        budget: the most tokens of a batch, about: prompts and answers are padded each to its own
            longest.
        pad: False: one row a batch, for rows are of one length seldom in both stacks.
    """
    return plan_batches([len(row.ids) for row in rows], budget if pad else 1, pad=pad)


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "b t"]:
    return pad_right(rows, max(map(len, rows)))
