"""Batches of prompts of similar length, right-padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

# Tokens a batch. On a CPU a few hundred already give the matrix products their full speed, and
# more would leave the cache; a GPU wants many more.
CPU_TOKENS = 512
GPU_TOKENS = 16_384


@dataclass(frozen=True)
class Batch:
    """Prompts that are read together.

    Attributes:
        prompts: their numbers, the longest first.
        length: tokens of the longest, to which the others are padded.
    """

    prompts: tuple[int, ...]
    length: int


def default_budget(device: torch.device) -> int:
    """Tokens a batch, padding included, that suit a device."""
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


def plan_batches(
    lengths: Sequence[int], budget: int, *, pad: bool = True, fixed: float | None = None
) -> list[Batch]:
    """Cut prompts, sorted by length, into the batches that cost least.

    A batch of r prompts, the longest of n tokens, costs r·n + fixed: the second term stands for
    what each pass costs beside its tokens. The cuts of least total cost are found exactly, by
    dynamic programming over the sorted lengths, under r·n ≤ budget or r = 1. The longest come
    first, so that the first batch shows whether memory suffices.

    Args:
        lengths: tokens of each prompt.
        budget: the most tokens of a batch, padding included; a longer prompt is read alone.
        pad: whether prompts of different lengths may share a batch.
        fixed: what a batch costs beside its tokens, in tokens; default: budget/32.
    """
    fixed = budget / 32 if fixed is None else fixed
    order = sorted(range(len(lengths)), key=lambda prompt: (-lengths[prompt], prompt))
    size = np.array([lengths[prompt] for prompt in order], dtype=np.int64)
    n = len(order)
    cost = np.zeros(n + 1)  # of the best batches for the first i prompts in order
    cut = np.zeros(n + 1, dtype=np.int64)  # where the last of them begins
    first = 0
    for end in range(1, n + 1):
        while first < end - 1 and (
            size[first] * (end - first) > budget or (not pad and size[first] != size[end - 1])
        ):
            first += 1
        starts = np.arange(first, end)
        costs = cost[first:end] + size[first:end] * (end - starts) + fixed
        best = int(costs.argmin())
        cost[end], cut[end] = costs[best], first + best
    batches = []
    end = n
    while end > 0:
        start = int(cut[end])
        batches.append(Batch(tuple(order[start:end]), int(size[start])))
        end = start
    return batches[::-1]


def pad_right(rows: Sequence[Sequence[int]], length: int) -> Int[Tensor, "b t"]:
    """Token ids (B, T): each row, then its own first id up to ``length``.

    In a causal model no real token sees what stands to its right, so any id of the vocabulary will
    do, and no mask is needed.
    """
    padded = [[*row, *[row[0]] * (length - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long)
