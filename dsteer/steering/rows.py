"""Prompts under many arms in a model at once: shared keys and values, and a strength a row."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from dsteer.activations.batching import default_budget, pad_right, plan_batches
from dsteer.activations.sites import block_of
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import Model
from dsteer.steering.arms import Steering, expanding, spread
from dsteer.steering.attention import attending, causal, refuse_bias, softmax
from dsteer.steering.intervene import Hooks, Placement


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one block: the prompts' (shared by rows), then each row's own."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.reading_prompts = True
        self.length = 0
        self._read: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, width)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.reading_prompts:
            self._read = (key_states, value_states)
            return self._read
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        end = self.length + key_states.shape[2]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def lay(self, prompts: Int[Tensor, " q"], n_prompts: int, columns: int) -> None:
        """Put what was read of some prompts in its place among all prompts' keys and values."""
        sets = len(self._read[0]) // len(prompts)  # 1, or a prompt's rows
        if self.prefix is None:
            shapes = [(n_prompts * sets, x.shape[1], columns, x.shape[3]) for x in self._read]
            key, value = (x.new_zeros(shape) for x, shape in zip(self._read, shapes, strict=True))
            self.prefix = key, value
        for whole, part in zip(self.prefix, self._read, strict=True):
            target = whole.view(n_prompts, sets, *whole.shape[1:])
            target[prompts, :, :, : part.shape[2]] = part.view(len(prompts), sets, *part.shape[1:])
        self._read = ()

    def keep(self, prompts: Tensor, rows: Tensor, n_prompts: int) -> None:
        """Drop all but some prompts and rows."""
        if self.prefix is not None:
            shared = self.prefix[0].shape[0] == n_prompts
            index = prompts if shared else rows
            self.prefix = (self.prefix[0][index], self.prefix[1][index])
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        prefix = 0 if self.prefix is None else self.prefix[0].shape[2]
        return self.length + (0 if self.reading_prompts else prefix)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


@runtime_checkable
class Stepping(Protocol):
    """Rows that are decoded together: after each token of theirs, the logits of the next."""

    n_prompts: int
    last_ids: Int[Tensor, " r"]

    def __enter__(self) -> Stepping:
        """Read the prompts."""

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was."""

    def step(self, ids: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Logits after one more token of each row."""

    def keep(self, prompts: Int[Tensor, " q"], rows: Int[Tensor, " r"]) -> None:
        """Drop all but some prompts and rows."""


class Rows:
    """Some prompts under some arms in the model: keys, values, and how each row is steered.

    Row i belongs to prompt i // arms. All of a prompt but its last token is read on entry.

    Args:
        model: the language model.
        anatomy: its parts.
        steering: what may be done to rows.
        capacity: new tokens a row at most.
        prompts: ids.
        arms: which arms of the steering each prompt has.
    """

    def __init__(
        self,
        model: Model,
        anatomy: Anatomy,
        steering: Steering,
        capacity: int,
        prompts: Sequence[Sequence[int]],
        arms: Sequence[int],
    ) -> None:
        self._model, self._anatomy, self._steering = model, anatomy, steering
        device = self._anatomy.device
        self.n_prompts = len(prompts)
        self._prompts, self._arms = prompts, len(arms)
        self._owner = torch.tensor([arm for _ in prompts for arm in arms], device=device)
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        self.last_ids = torch.tensor([ids[-1] for ids in prompts for _ in arms], device=device)
        self._layers = [_Layer(capacity) for _ in range(anatomy.n_blocks)]
        self._cache = Cache(layers=self._layers)
        self._steps = 0
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Rows:
        with contextlib.ExitStack() as stack:
            stack.enter_context(attending(self._model, self._attend))
            self._read()
            for layer in self._layers:
                layer.reading_prompts = False
            self._hooks = stack.enter_context(Hooks(self._model, self._steering.interventions()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _read(self) -> None:
        """Read all prompts but for their last tokens, some at a time, then lay them together."""
        lengths = (self._lengths - 1).tolist()
        longest = max(lengths)
        if longest == 0:
            return
        budget = max(longest, default_budget(self._anatomy.device) // self._arms)
        for batch in plan_batches([max(1, length) for length in lengths], budget):
            self._read_some(batch.prompts)
            prompts = torch.tensor(batch.prompts, device=self._lengths.device)
            for layer in self._layers:
                layer.lay(prompts, self.n_prompts, longest)

    def _read_some(self, prompts: Sequence[int]) -> None:
        """Read prompts, right-padded, with their arms behind the block where they part.

        What follows the last block makes no keys and values, so steering there is left out.
        """
        texts = [self._prompts[prompt][:-1] or self._prompts[prompt] for prompt in prompts]
        width = max(map(len, texts))
        ids = pad_right(texts, width).to(self._anatomy.device)
        lengths = self._lengths[torch.tensor(prompts, device=ids.device)]
        column = torch.arange(width, device=ids.device)
        placement = Placement(torch.where(column < lengths[:, None] - 1, column, -1), lengths)
        block = block_of(self._steering.site)
        inner = block is not None and block < self._anatomy.n_blocks - 1
        reading = {
            "input_ids": ids,
            "position_ids": column[None],  # one row, which suits any number of rows behind a site
            "past_key_values": self._cache,
            "use_cache": True,
        }
        with contextlib.ExitStack() as stack:
            if inner and self._steers_prompts:
                stack.enter_context(expanding(self._anatomy, self._steering.site, self._arms))
                hooks = stack.enter_context(Hooks(self._model, self._steering.interventions()))
                hooks.placement = spread(placement, self._owner[: len(prompts) * self._arms])
                self._anatomy.decoder(**reading)
                hooks.require_ran()
            else:
                self._anatomy.decoder(**reading)

    @property
    def _steers_prompts(self) -> bool:
        """Whether any token before a prompt's last is steered."""
        column = torch.arange(int(self._lengths.max()), device=self._lengths.device)
        index = torch.where(column < self._lengths[:, None] - 1, column, -1)
        before = Placement(index, self._lengths)
        return any(bool(before.mask(one.positions).any()) for one in self._steering.interventions())

    def step(self, ids: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Logits after one more token of each row."""
        lengths = self._lengths.repeat_interleave(len(ids) // self.n_prompts)
        position = (lengths - 1 + self._steps)[:, None]
        self._masks.clear()
        self._hooks.placement = Placement(position, lengths, self._owner)
        output = self._model(
            input_ids=ids[:, None],
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._hooks.require_ran()
        self._steps += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def keep(self, prompts: Int[Tensor, " q"], rows: Int[Tensor, " r"]) -> None:
        """Drop all but some prompts and rows."""
        for layer in self._layers:
            layer.keep(prompts, rows, self.n_prompts)
        device = self._lengths.device
        self._lengths, self._owner = self._lengths[prompts.to(device)], self._owner[rows.to(device)]
        self.n_prompts = len(prompts)

    # ------------------------------------------------------------------ attention

    def _attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "r h q w"],
        key: Float[Tensor, "r k t w"],
        value: Float[Tensor, "r k t u"],
        mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "r q h u"], None]:
        """Attention of the prompts' tokens, or of one new token a row to all before it.

        The scores of the prompt, whose keys several rows share, and of the row's own tokens go
        through one softmax. A set is the rows that share keys: all of a prompt's, or one.
        """
        layer = self._layers[cast(int, module.layer_idx)]
        if layer.reading_prompts:
            settings = (scaling, sliding_window, softcap, s_aux, position_bias)
            return causal(module, query, key, value, mask, *settings, **kwargs)
        refuse_bias(position_bias)
        rows, heads, _, width = query.shape
        kv = key.shape[1]
        group = heads // kv
        scale = width**-0.5 if scaling is None else scaling
        shared_key, shared_value = layer.prefix or (key[:, :, :0], value[:, :, :0])
        sets, columns = shared_key.shape[0], shared_key.shape[2]
        of_set = rows // sets

        def gather(x: Tensor) -> Tensor:  # (rows, kv, group, ·) → (sets, kv, of_set · group, ·)
            x = x.view(sets, of_set, kv, group, -1).transpose(1, 2)
            return x.reshape(sets, kv, of_set * group, -1)

        def scatter(x: Tensor) -> Tensor:  # the way back
            x = x.view(sets, kv, of_set, group, -1).transpose(1, 2)
            return x.reshape(rows, kv, group, -1)

        q = query.view(rows, kv, group, width)
        own = gather(q @ key.transpose(-1, -2))
        scores = torch.cat([gather(q) @ shared_key.transpose(-1, -2), own], dim=-1) * scale
        sinks = None
        if s_aux is not None:
            sinks = s_aux.view(kv, 1, group).expand(kv, of_set, group).reshape(kv, -1)
        seen = self._mask(sets, sliding_window, columns, scores)
        weights = softmax(scores, softcap, seen, sinks)
        out = scatter(weights[..., :columns] @ shared_value)
        out = out + scatter(weights[..., columns:]) @ value
        return out.reshape(rows, 1, heads, -1), None

    def _mask(
        self, sets: int, window: int | None, columns: int, like: Tensor
    ) -> Float[Tensor, "s 1 1 t"]:
        """0 where a set's new tokens may look, else −∞: the prompt's columns, then their own."""
        key = (sets, window)
        if key not in self._masks:
            past = self._lengths.repeat_interleave(sets // self.n_prompts)[:, None] - 1
            column = torch.arange(like.shape[-1], device=past.device)
            is_own = column >= columns
            index = torch.where(is_own, past + column - columns, column)
            seen = is_own | (column < past)
            if window is not None:
                seen = seen & (past + self._steps - index < window)
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(~seen.to(like.device), -torch.inf)[:, None, None]
        return self._masks[key]
