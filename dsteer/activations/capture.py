"""Hooks that copy states out of one pass through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsteer.activations.sites import block_of
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy

Select = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "r d"]]
"""Copies the wanted rows out of a state. It must copy: a later operation may change the state."""


def select_tokens(ranges: Sequence[range]) -> Select:
    """Copy the states of some tokens of each row, row by row, in the model's dtype."""
    rows = torch.tensor([row for row, tokens in enumerate(ranges) for _ in tokens])
    columns = torch.tensor([token for tokens in ranges for token in tokens])

    def select(state: Float[Tensor, "b t d"]) -> Float[Tensor, "r d"]:
        nonlocal rows, columns
        rows, columns = rows.to(state.device), columns.to(state.device)
        return state[rows, columns]

    return select


def select_means(ranges: Sequence[range], length: int) -> Select:
    """Average the states of some tokens of each row, in float32."""
    weights = torch.zeros(len(ranges), 1, length)
    for row, tokens in enumerate(ranges):
        weights[row, 0, tokens.start : tokens.stop] = 1 / len(tokens)

    def select(state: Float[Tensor, "b t d"]) -> Float[Tensor, "r d"]:
        nonlocal weights
        weights = weights.to(state.device)
        return torch.bmm(weights, state.float())[:, 0]

    return select


@contextmanager
def capture(
    anatomy: Anatomy, sites: Sequence[str], select: Select
) -> Iterator[dict[str, Float[Tensor, "r d"]]]:
    """Yield a dictionary that the next pass fills: site → selected states. Hooks always go again.

    Hooks run in the order in which they were registered, so a capture sees what hooks registered
    before it did to a block's output (a steering vector, say) and not what later ones do.
    """
    states: dict[str, Tensor] = {}

    def catch(site: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if site in states:
                raise ModelError(f"{site}: its module ran twice in one pass; expected once")
            states[site] = select(anatomy.read(output))

        return hook

    handles = []
    try:
        for site in sites:
            block = block_of(site)
            module = anatomy.final_norm if block is None else anatomy.blocks[block]
            handles.append(module.register_forward_hook(catch(site)))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def read_batch(
    anatomy: Anatomy, ids: Int[Tensor, "b t"], sites: Sequence[str], select: Select
) -> dict[str, Float[Tensor, "r d"]]:
    """Run right-padded ids (B, T) through the decoder once; return float32 states on the CPU.

    The head is not run, no cache is built, and no mask is passed, so that the causal kernels need
    none. Call it inside :func:`dsteer.models.anatomy.evaluating`.

    Raises:
        ModelError: a site's module did not run.
    """
    with capture(anatomy, sites, select) as states:
        anatomy.decoder(input_ids=ids.to(anatomy.device), use_cache=False)
    silent = [site for site in sites if site not in states]
    if silent:
        raise ModelError(f"{silent[0]}: its module did not run; expected every block to run once")
    return {site: states[site].to("cpu", torch.float32) for site in sites}
