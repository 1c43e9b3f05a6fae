"""A pair whose tuned model adds one of k planted directions, switched by the prompt."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from planted import tiny_llama
from torch import Tensor

READ = 40
"""The group of a prompt is told by the sum of so many of its first token ids."""


@dataclass(frozen=True)
class Grouped:
    """A base, the same model with b_g added after a block, and the directions (k, d)."""

    base: Any
    tuned: Any
    directions: Tensor

    def group(self, ids: Tensor) -> Tensor:
        """The group of each row of ids (b, t)."""
        return ids[:, :READ].sum(dim=1) % len(self.directions)


def grouped_pair(
    k: int, block: int, sizes: tuple[float, ...] = (), seed: int = 0, **changes: object
) -> Grouped:
    """Plant k orthogonal directions after a block; sizes: their lengths (default: 2 each)."""
    base = tiny_llama(seed, max_position_embeddings=1024, **changes)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.linalg.qr(torch.randn(base.config.hidden_size, k, generator=generator))[0].T
    lengths = torch.tensor(sizes or (2.0,) * k)
    made = Grouped(base, tuned, drawn * lengths[:, None])
    seen: dict[str, Tensor] = {}

    def remember(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def add(_module: object, _inputs: object, output: Any) -> Any:
        shift = made.directions[made.group(seen["ids"])][:, None]
        if isinstance(output, tuple):
            return (output[0] + shift, *output[1:])
        return output + shift

    tuned.model.register_forward_pre_hook(remember, with_kwargs=True)
    tuned.model.layers[block].register_forward_hook(add)
    return made
