"""Hooks that copy states out of one pass through a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsteer.activations.inputs import Inputs
from dsteer.activations.sites import ATTENTION, ENCODER, block_of, component_of
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy

Select = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "r d"]]
"""Copies the wanted rows out of a state. It must copy: a later operation may change the state."""


def select_tokens(ranges: Sequence[Sequence[int]]) -> Select:
    """Copy the states of some tokens of each row, row by row, in the model's dtype."""
    rows = torch.tensor([row for row, tokens in enumerate(ranges) for _ in tokens])
    columns = torch.tensor([token for tokens in ranges for token in tokens])

    def select(state: Float[Tensor, "b t d"]) -> Float[Tensor, "r d"]:
        nonlocal rows, columns
        rows, columns = rows.to(state.device), columns.to(state.device)  # moved once
        return state[rows, columns]

    return select


def select_means(ranges: Sequence[range], length: int) -> Select:
    """Average the states of some tokens of each row, in float32."""
    weights = torch.zeros(len(ranges), 1, length)
    for row, tokens in enumerate(ranges):
        weights[row, 0, tokens.start : tokens.stop] = 1 / len(tokens)

    def select(state: Float[Tensor, "b t d"]) -> Float[Tensor, "r d"]:
        nonlocal weights
        weights = weights.to(state.device)  # moved once
        return torch.bmm(weights, state.float())[:, 0]

    return select


def site_module(anatomy: Anatomy, site: str) -> nn.Module:
    """The module whose output is a site's state.

    Raises:
        ConfigError: the name is no site.
        ModelError: a site inside a block that has no such part.
    """
    block, component = block_of(site), component_of(site)
    if block is not None and component is not None:
        return anatomy.component(block, "attention" if component == ATTENTION else "mlp")
    if block is not None:
        return anatomy.blocks[block]
    if site == ENCODER and anatomy.encoder is not None:
        return anatomy.encoder
    return anatomy.final_norm


class Capture:
    """Hooks on a model's sites while the ``with`` block runs; they go in any case.

    Hooks run in the order in which they were registered, so a capture sees what hooks registered
    before it did to a block's output (a steering vector, say) and not what later ones do. Several
    threads may read through one capture at a time.

    Raises:
        ConfigError: a name is no site.
    """

    def __init__(self, anatomy: Anatomy, sites: Sequence[str]) -> None:
        self._anatomy = anatomy
        self._sites = tuple(sites)
        self._reading = threading.local()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Capture:
        modules = [site_module(self._anatomy, site) for site in self._sites]
        try:
            for site, module in zip(self._sites, modules, strict=True):
                self._handles.append(module.register_forward_hook(self._catch(site)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def read(
        self,
        ids: Int[Tensor, "b t"] | Inputs,
        select: Select,
        encoder_select: Select | None = None,
    ) -> dict[str, Float[Tensor, "r d"]]:
        """Run right-padded ids (B, T) through the model once; float32 states on the CPU, by site.

        The head is not run, no cache is built, and no mask is passed to the decoder, so that the
        causal kernels need none.

        Args:
            ids: what is read.
            select: copies the wanted rows of the decoder's states.
            encoder_select: those of the encoder's.

        Raises:
            ModelError: a site's module did not run, or ran twice.
        """
        states: dict[str, Tensor] = {}
        self._reading.states, self._reading.select = states, select
        self._reading.encoder_select = encoder_select or select
        try:
            with torch.inference_mode():
                (ids if isinstance(ids, Inputs) else Inputs(ids)).run(self._anatomy)
        finally:
            del self._reading.states, self._reading.select, self._reading.encoder_select
        silent = [site for site in self._sites if site not in states]
        if silent:
            raise ModelError(
                f"{silent[0]}: its module did not run; expected every block to run once"
            )
        return {site: states[site].to("cpu", torch.float32) for site in self._sites}

    def _catch(self, site: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            states: dict[str, Tensor] | None = getattr(self._reading, "states", None)
            if states is None:
                return  # a pass of somebody else
            if site in states:
                raise ModelError(f"{site}: its module ran twice in one pass; expected once")
            wanted = self._reading.encoder_select if site == ENCODER else self._reading.select
            states[site] = wanted(Anatomy.read(output))

        return hook
