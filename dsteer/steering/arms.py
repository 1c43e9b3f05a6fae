"""Many ways to steer in one pass: arms that share a site, and states under all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsteer.activations.batching import default_budget, plan_batches
from dsteer.activations.capture import site_module
from dsteer.activations.inputs import Inputs, decoder_shift, plan_rows
from dsteer.activations.reading import padding_is_unseen, rows_read_alike
from dsteer.activations.sites import ENCODER, FINAL_NORM, block_of, component_of
from dsteer.data.tokens import Encoded
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy, evaluating
from dsteer.models.load import Model
from dsteer.steering.attention import attending, causal
from dsteer.steering.intervene import Hooks, Intervention, Operation, Placement, Positions, Schedule

FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)
"""What a model of another build may raise when its attention is replaced."""

SAME = {torch.float32: 1e-4, torch.float64: 1e-8}
SAME_HALF = 5e-2
"""Relative error of states up to which two ways of computing them are one."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to steer: ``strength`` times ``vector`` (d,) at the site of the sweep."""

    vector: Float[Tensor, " d"]
    strength: float


@dataclass(frozen=True, eq=False)
class Steering:
    """Arms and what they have in common.

    Attributes:
        site: where the vectors act.
        arms: directions and strengths.
        operation: what is done with them, see :mod:`dsteer.steering.intervene`.
        positions: which tokens are steered.
        schedule: how the strengths change over the generated tokens.
        seed: of the operation ``noise``; all rows share their noise, token by token.
        hooked: False: no hooks at all, and the arms do nothing.
    """

    site: str
    arms: tuple[Arm, ...]
    operation: Operation = "add"
    positions: Positions = "all"
    schedule: Schedule | None = None
    seed: int = 0
    hooked: bool = True

    @classmethod
    def none(cls, width: int) -> Steering:
        """One arm that does nothing, without hooks: the model as it is."""
        return cls(FINAL_NORM, (Arm(torch.zeros(width), 0.0),), hooked=False)

    def split(self, count: int) -> list[Steering]:
        """The same with at most so many arms each."""
        return [
            replace(self, arms=self.arms[first : first + count])
            for first in range(0, len(self.arms), count)
        ]

    def interventions(self, rows: Sequence[int] | None = None) -> list[Intervention]:
        """What is done, one value an arm; or one a row, row i being steered by arm ``rows[i]``."""
        if not self.hooked:
            return []
        arms = self.arms if rows is None else [self.arms[row] for row in rows]
        needs_vector = self.operation != "scale"
        only = Intervention(
            site=self.site,
            vector=torch.stack([arm.vector for arm in arms]) if needs_vector else None,
            strength=torch.tensor([arm.strength for arm in arms], dtype=torch.float64),
            operation=self.operation,
            positions=self.positions,
            schedule=self.schedule,
            seed=[self.seed] * len(arms),
        )
        return [only]


@contextlib.contextmanager
def expanding(anatomy: Anatomy, site: str, arms: int) -> Iterator[None]:
    """Repeat each row's state at a site for its arms while the block runs: rows × arms.

    Hooks on the site that are registered later see, and change, the repeated state.
    """

    def expand(_module: nn.Module, _inputs: object, output: Any) -> Any:
        return Anatomy.write(output, Anatomy.read(output).repeat_interleave(arms, 0))

    handle = site_module(anatomy, site).register_forward_hook(expand)
    try:
        yield
    finally:
        handle.remove()


def spread(placement: Placement, owners: Int[Tensor, " r"]) -> Placement:
    """The placement of rows × arms, of which row r is steered by arm ``owners[r]``."""
    arms = len(owners) // len(placement.index)
    lengths = placement.prompt_lengths
    return Placement(
        placement.index.repeat_interleave(arms, 0),
        None if lengths is None else lengths.repeat_interleave(arms),
        owners,
    )


def steered_states(
    model: Model,
    texts: Sequence[Encoded],
    steering: Steering,
    *,
    batch_tokens: int | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "a n d"]]]:
    """final_norm states that predict each answer token, under every arm, teacher-forced.

    Blocks up to the site are run once a text, those behind it once a text and arm, where the
    model's attention can be replaced (tried on the first texts, and compared). The encoder of an
    encoder-decoder model is run once a text.

    Args:
        model: a language model, not compiled.
        texts: prompts with answers; the states are those at tokens p − 1 … n − 2.
        steering: the arms.
        batch_tokens: tokens × arms a batch; default: some times what extraction takes.

    Yields:
        The numbers of some texts, and their states (arms, tokens of these texts in order, d), in
        the model's dtype, on its device.
    """
    anatomy = Anatomy.of(model)
    block = block_of(steering.site)
    # Where no block follows the site, an arm costs next to nothing.
    behind = anatomy.encoder is not None or (block is not None and block < anatomy.n_blocks - 1)
    budget = batch_tokens or (4 if behind else 32) * default_budget(anatomy.device)
    needed = [item.ids[:-1] for item in texts]
    lengths = [len(ids) for ids in needed]
    once = max(max(lengths), min(budget, default_budget(anatomy.device)))
    with evaluating(model):
        shares = anatomy.encoder is None and _shares(model, anatomy, texts, steering)
        if anatomy.encoder is None:
            pad = shares or padding_is_unseen(model, anatomy, needed)
            batches = plan_batches(lengths, once, pad=pad)
        else:
            batches = plan_rows(texts, once, pad=rows_read_alike(anatomy, texts))
    for batch in batches:
        chosen = [texts[number] for number in batch.prompts]
        chunk = max(1, budget // (len(chosen) * batch.length))
        with evaluating(model):  # not across the yield: the caller runs in its own mode
            states = torch.cat(
                [_states(model, anatomy, chosen, some, shares) for some in steering.split(chunk)]
            )
        yield list(batch.prompts), states


def _shares(model: Model, anatomy: Anatomy, texts: Sequence[Encoded], steering: Steering) -> bool:
    """Whether rows may part at the site: on two texts, the states are as those of whole passes."""
    if component_of(steering.site) is not None:  # the stream around it has a row a text
        return False
    by_length = sorted(texts, key=lambda item: len(item.ids))
    few = steering.split(2)[0]
    try:
        both = _states(model, anatomy, [by_length[-1], by_length[0]], few, True)
    except (ModelError, *FAILURES):
        return False
    alone = [_states(model, anatomy, [item], few, False) for item in (by_length[-1], by_length[0])]
    plain = torch.cat(alone, dim=1)
    if both.shape != plain.shape:
        return False
    error = float((both - plain).norm() / plain.norm())
    return error <= SAME.get(anatomy.dtype, SAME_HALF)


def _states(
    model: Model,
    anatomy: Anatomy,
    texts: Sequence[Encoded],
    steering: Steering,
    share: bool,
) -> Float[Tensor, "a n d"]:
    """The states of some texts under all arms, in one pass."""
    device, arms = anatomy.device, len(steering.arms)
    needed = [Encoded(item.ids[:-1], item.prompt_length) for item in texts]
    shifts = [decoder_shift(item, anatomy.start) for item in needed]
    inputs = Inputs.of(needed, anatomy.start)
    width = inputs.ids.shape[1]
    last = torch.tensor(
        [len(item.ids) + shift for item, shift in zip(needed, shifts, strict=True)], device=device
    )
    column = torch.arange(width, device=device)
    prompt_lengths = torch.tensor(
        [item.prompt_length + shift for item, shift in zip(needed, shifts, strict=True)],
        device=device,
    )
    placement = Placement(torch.where(column < last[:, None], column, -1), prompt_lengths)
    owners = torch.arange(arms, device=device).repeat(len(texts))
    with contextlib.ExitStack() as stack:
        if share:
            stack.enter_context(attending(model, causal))
            stack.enter_context(expanding(anatomy, steering.site, arms))
        else:
            inputs = inputs.repeat(arms)
        if inputs.encoder_mask is not None:
            stack.enter_context(expanding(anatomy, ENCODER, arms))
        hooks = stack.enter_context(Hooks(model, steering.interventions()))
        hooks.placement = spread(placement, owners)
        if inputs.encoder_mask is not None:
            prompts = Placement.of_mask(inputs.encoder_mask.to(device))
            lengths = prompts.index.amax(dim=1) + 1
            hooks.encoder_placement = spread(replace(prompts, prompt_lengths=lengths), owners)
        output = inputs.run(anatomy)
        hooks.require_ran()
    states = Anatomy.read(output[0]).view(len(texts), arms, width, -1)
    return torch.cat(
        [
            states[row, :, item.prompt_length - 1 + shift : len(item.ids) + shift]
            for row, (item, shift) in enumerate(zip(needed, shifts, strict=True))
        ],
        dim=1,
    )


def same_without_hooks(model: Model, texts: Sequence[Encoded], steering: Steering) -> bool:
    """Whether arms of strength 0 leave the states of some texts as they are, bit for bit."""
    hooked, bare = (
        [states for _, states in steered_states(model, texts, kind)]
        for kind in (steering, replace(steering, hooked=False))
    )
    return all(torch.equal(a, b) for a, b in zip(hooked, bare, strict=True))
