"""Change the states of one or several sites token by token, many ways in one pass.

A *change* maps a token's base state h, and the tuned model's state h' of the same token at the same
site, to a new one: h + v (a constant), h' (patching), h + P(h' − h) (a part of the displacement), a
fitted map of h. The rest of the pass is the base's, so what comes out says how much of the tuned
model's behaviour that change of that site brings along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsteer.activations.batching import default_budget, plan_batches
from dsteer.activations.capture import site_module
from dsteer.activations.extract import PairedActivations
from dsteer.activations.inputs import Inputs, decoder_shift, plan_rows
from dsteer.activations.reading import padding_is_unseen, rows_read_alike
from dsteer.activations.sites import ENCODER, component_of, site_order
from dsteer.data.tokens import Encoded
from dsteer.errors import MeasurementError, ModelError
from dsteer.models.anatomy import Anatomy, evaluating
from dsteer.models.load import Model
from dsteer.steering.arms import FAILURES, SAME, SAME_HALF, expanding
from dsteer.steering.attention import attending, causal

Tokens = Literal["all", "prompt_last", "generated"]
"""The tokens that are changed, with p of the prompt: all; p − 1; p − 1 and the answer's."""

Change = Callable[[Float[Tensor, "*t d"], Float[Tensor, "*t d"]], Float[Tensor, "*t d"]]
"""(base states, tuned states) → new states, float32, each token's from its own two alone."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of the states of one site."""

    site: str
    change: Change


def patched(_base: Tensor, tuned: Tensor) -> Tensor:
    """The change that puts the tuned model's state in."""
    return tuned


def adding(vector: Float[Tensor, " d"], strength: float = 1.0) -> Change:
    """The change h + s v."""

    def change(base: Tensor, _tuned: Tensor) -> Tensor:
        return base + strength * vector.to(base)

    return change


def edited_states(
    model: Model,
    acts: PairedActivations,
    edits: Sequence[Edit],
    *,
    tokens: Tokens = "all",
    batch_tokens: int | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "e n d"]]]:
    """final_norm states that predict each answer token, under every edit, teacher-forced.

    All sites share one pass: blocks up to a site are run once a text, and an edit costs the blocks
    behind its site, where the model's attention can be replaced (tried on the first texts, and
    compared). Else each edit is a pass of its own.

    Args:
        model: the base: a language model, not compiled.
        acts: both models' states of every token of prompts with answers (position ``all``), at
            the sites of the edits.
        edits: the changes, at any sites of the (decoder's) residual stream or ``final_norm``.
        tokens: which tokens are changed.
        batch_tokens: tokens × edits a batch; default: some times what extraction takes.

    Yields:
        The numbers of some texts, and their states (edits, tokens of these texts in order, d) at
        tokens p − 1 … n − 2, in the model's dtype, on its device.

    Raises:
        MeasurementError: no edits, a site that was not read, or a reading of another position.
        ModelError: a site of the encoder.
    """
    anatomy = Anatomy.of(model)
    _check(edits, acts)
    texts = acts.encoded
    budget = batch_tokens or 4 * default_budget(anatomy.device)
    needed = [item.ids[:-1] for item in texts]
    lengths = [len(ids) for ids in needed]
    once = max(max(lengths), min(budget, default_budget(anatomy.device)))
    run = _Run(model, anatomy, acts, tokens)
    with evaluating(model):
        shares = anatomy.encoder is None and run.shares(edits)
        if anatomy.encoder is None:
            pad = shares or padding_is_unseen(model, anatomy, needed)
            batches = plan_batches(lengths, once, pad=pad)
        else:
            batches = plan_rows(texts, once, pad=rows_read_alike(anatomy, texts))
    for batch in batches:
        numbers = list(batch.prompts)
        chunk = max(1, budget // (len(numbers) * batch.length))
        with evaluating(model):  # not across the yield: the caller runs in its own mode
            parts = [
                run.states(numbers, edits[first : first + chunk], shares)
                for first in range(0, len(edits), chunk)
            ]
        yield numbers, torch.cat(parts)


def _check(edits: Sequence[Edit], acts: PairedActivations) -> None:
    if not edits:
        raise MeasurementError("no edits: give at least one change of a site's states")
    if acts.position != "all":
        raise MeasurementError(
            f"states of position {acts.position}: a change of each token needs a reading at "
            "position all"
        )
    for site in {edit.site for edit in edits}:
        if site == ENCODER:
            raise ModelError(
                "site encoder: edits change the decoder's states; name resid_post.K or final_norm"
            )
        if site not in acts.sites:
            raise MeasurementError(
                f"{site}: its states were not read; the sites read are {', '.join(acts.sites)}"
            )


@dataclass(frozen=True, eq=False)
class _Run:
    """Passes over some texts.

    In a shared pass the batch holds the texts' plain rows first; at each site the rows of its edits
    are put behind. In a whole pass every text has a row an edit from the start.
    """

    model: Model
    anatomy: Anatomy
    acts: PairedActivations
    tokens: Tokens

    def shares(self, edits: Sequence[Edit]) -> bool:
        """Whether rows may part at the sites: on two texts, the states are as of whole passes."""
        if any(component_of(edit.site) is not None for edit in edits):
            return False  # the stream around such a site has a row a text
        lengths = [len(item.ids) for item in self.acts.encoded]
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        first = {edit.site: edit for edit in edits}
        early = sorted(first, key=site_order)[:2]  # the more blocks follow, the more is tried
        few, ends = [first[site] for site in early], [by_length[-1], by_length[0]]
        try:
            both = self.states(ends, few, True)
        except (ModelError, *FAILURES):
            return False
        plain = torch.cat([self.states([number], few, False) for number in ends], dim=1)
        if both.shape != plain.shape:
            return False
        error = float((both - plain).norm() / plain.norm())
        return error <= SAME.get(self.anatomy.dtype, SAME_HALF)

    def states(
        self, numbers: Sequence[int], edits: Sequence[Edit], share: bool
    ) -> Float[Tensor, "e n d"]:
        """The states of some texts under some edits, in one pass."""
        anatomy, count = self.anatomy, len(edits)
        rows = [
            Encoded(self.acts.encoded[n].ids[:-1], self.acts.encoded[n].prompt_length)
            for n in numbers
        ]
        shifts = [decoder_shift(item, anatomy.start) for item in rows]
        inputs = Inputs.of(rows, anatomy.start)
        width = inputs.ids.shape[1]
        chosen = self._chosen(rows, shifts, width)
        order = sorted(range(count), key=lambda e: site_order(edits[e].site))
        by_site: dict[str, list[int]] = {}
        for number in order:
            by_site.setdefault(edits[number].site, []).append(number)
        ran: list[str] = []
        with contextlib.ExitStack() as stack:
            if share:
                stack.enter_context(attending(self.model, causal))
            else:
                inputs = inputs.repeat(count)
                if inputs.encoder_mask is not None:
                    stack.enter_context(expanding(anatomy, ENCODER, count))
            for site, members in by_site.items():
                aims = self._aims(site, numbers, rows, shifts, width)
                changes = [(member, edits[member].change) for member in members]
                hook = _hook(site, changes, aims, chosen, count, share, ran)
                handle: RemovableHandle = site_module(anatomy, site).register_forward_hook(hook)
                stack.callback(handle.remove)
            output = inputs.run(anatomy)
        if sorted(ran) != sorted(by_site):
            missing = next((site for site in by_site if ran.count(site) != 1), "a site")
            raise ModelError(f"{missing}: its module did not run once in the pass")
        states = Anatomy.read(output[0])
        if share:
            grown = states[len(numbers) :].view(count, len(numbers), width, -1)
            states = grown[torch.tensor(order).argsort()]
        else:
            states = states.view(len(numbers), count, width, -1).transpose(0, 1)
        return torch.cat(
            [
                states[:, row, item.prompt_length - 1 + shift : len(item.ids) + shift]
                for row, (item, shift) in enumerate(zip(rows, shifts, strict=True))
            ],
            dim=1,
        )

    def _chosen(
        self, rows: Sequence[Encoded], shifts: Sequence[int], width: int
    ) -> Bool[Tensor, "b t 1"]:
        """Which columns are changed: never padding."""
        mask = torch.zeros(len(rows), width, 1, dtype=torch.bool)
        for row, (item, shift) in enumerate(zip(rows, shifts, strict=True)):
            last, end = item.prompt_length - 1 + shift, len(item.ids) + shift
            start = 0 if self.tokens == "all" else last
            mask[row, start : last + 1 if self.tokens == "prompt_last" else end] = True
        return mask.to(self.anatomy.device)

    def _aims(
        self,
        site: str,
        numbers: Sequence[int],
        rows: Sequence[Encoded],
        shifts: Sequence[int],
        width: int,
    ) -> Float[Tensor, "b t d"]:
        """The tuned model's states at a site, padded as the batch is."""
        aims = torch.zeros(len(numbers), width, self.anatomy.width)
        for row, (number, item, shift) in enumerate(zip(numbers, rows, shifts, strict=True)):
            # of an encoder-decoder model the first state read is that of token p - 1
            start = 0 if self.anatomy.encoder is None else item.prompt_length - 1 + shift
            length = len(item.ids) + shift - start
            first = self.acts.offsets[number]
            aims[row, start : start + length] = self.acts.tuned.rows(site, first, first + length)
        return aims.to(self.anatomy.device)


def _hook(
    site: str,
    changes: Sequence[tuple[int, Change]],
    aims: Float[Tensor, "b t d"],
    chosen: Bool[Tensor, "b t 1"],
    count: int,
    share: bool,
    ran: list[str],
) -> Callable[[nn.Module, object, Any], Any]:
    """Put the rows of a site's edits behind the others, or change the edits' own rows."""
    texts = len(aims)

    def changed(plain: Float[Tensor, "b t d"], change: Change) -> Float[Tensor, "b t d"]:
        target = aims.to(plain.device)
        new = change(plain.float(), target).to(plain.dtype)
        return torch.where(chosen.to(plain.device), new, plain)

    def grow(_module: nn.Module, _inputs: object, output: Any) -> Any:
        ran.append(site)
        state = Anatomy.read(output)
        new = [changed(state[:texts], change) for _, change in changes]
        return Anatomy.write(output, torch.cat([state, *new]))

    def rewrite(_module: nn.Module, _inputs: object, output: Any) -> Any:
        ran.append(site)
        state = Anatomy.read(output).clone()
        rows = state.view(texts, count, *state.shape[1:])
        for member, change in changes:
            rows[:, member] = changed(rows[:, member], change)
        return Anatomy.write(output, state)

    return grow if share else rewrite
