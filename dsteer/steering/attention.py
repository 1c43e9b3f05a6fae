"""Attention of our own, put in the place of a model's: prompts shared by rows, and plain causal.

It follows transformers' attention interface, with a sliding window, a soft cap and sinks where a
model has them. A model that does not call the interface keeps its own attention; whoever replaces
it compares results first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from dsteer.errors import ModelError
from dsteer.models.anatomy import text_config
from dsteer.models.load import Model

Attend = Callable[..., tuple[Tensor, None]]

_NAME = "dsteer"


@contextlib.contextmanager
def attending(model: Model, attend: Attend) -> Iterator[None]:
    """Let a function compute a model's attention, without masks, while the block runs."""
    config = text_config(model.config)
    before, name = config._attn_implementation, _NAME
    while name in AttentionInterface._global_mapping:  # that of another model
        name += "+"
    AttentionInterface.register(name, attend)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(name, None)


def causal(
    _module: nn.Module,
    query: Float[Tensor, "r h t w"],
    key: Float[Tensor, "r k t w"],
    value: Float[Tensor, "r k t u"],
    _mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Float[Tensor, "r t h u"], None]:
    """Each token attends to those before it and itself.

    Args:
        scaling: of the scores; default: 1/√w.
        sliding_window: attend to so many tokens at most.
        softcap: c of c · tanh(score / c).
        s_aux: one more score a head (h,), a sink whose weight goes nowhere.

    Raises:
        ModelError: the model has a position bias.
    """
    refuse_bias(position_bias)
    rows, heads, tokens, width = query.shape
    kv = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    if sliding_window is None and softcap is None and s_aux is None:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scale, is_causal=True, enable_gqa=heads > kv
        )
        return out.transpose(1, 2), None
    index = torch.arange(tokens, device=query.device)
    hidden = index > index[:, None]
    if sliding_window is not None:
        hidden |= index[:, None] - index >= sliding_window
    mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
    grouped = query.reshape(rows, kv, heads // kv * tokens, width)
    scores = (grouped @ key.transpose(-1, -2)).view(rows, heads, tokens, tokens) * scale
    sinks = None if s_aux is None else s_aux.view(heads, 1)
    weights = softmax(scores, softcap, mask, sinks).view(rows, kv, -1, tokens)
    out = (weights @ value).view(rows, heads, tokens, -1)
    return out.transpose(1, 2), None


def refuse_bias(position_bias: Tensor | None) -> None:
    """Raise a ModelError where there is a position bias."""
    if position_bias is not None:
        raise ModelError("its attention has a position bias")


def softmax(
    scores: Float[Tensor, "*rows t"],
    softcap: float | None,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> Float[Tensor, "*rows t"]:
    """Attention weights over the last axis, in float32 at least.

    Args:
        scores: scaled.
        softcap: c of c · tanh(score / c).
        mask: 0 or −∞, broadcast to the scores.
        sinks: one more score, broadcast to all axes of the scores but the last.
    """
    wide = scores if scores.dtype.itemsize >= 4 else scores.float()
    if softcap is not None:
        wide = torch.tanh(wide / softcap) * softcap
    if mask is not None:
        wide = wide + mask
    if sinks is not None:
        column = sinks.to(wide).expand(wide.shape[:-1])[..., None]
        return torch.cat([wide, column], dim=-1).softmax(-1)[..., :-1].to(scores.dtype)
    return wide.softmax(-1).to(scores.dtype)
