"""The stacked tensor of simple recipes: (L + 1, d), row i a difference of ``hidden_states[i]``.

Row 0 is the input of block 0, where nothing steers; row k + 1 is the output of block k; the last
row is the state after the final norm, so that the raw output of the last block has no row.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dsteer.activations.sites import FINAL_NORM, block_of, component_of, resid_post
from dsteer.errors import ConfigError, ModelError, StoreError
from dsteer.exchange.request import Export, imported, new_file, vector_of
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import Model
from dsteer.steering.files import is_plain, read_pickle, write_pickle
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json


def write(wanted: Export, path: Path) -> list[str]:
    """Write the rows of λv, zeros where there is no vector.

    Raises:
        ConfigError: the number of blocks is unknown; the last block or a site inside one.
    """
    n_blocks = wanted.n_blocks
    if n_blocks is None:
        raise ConfigError(
            "stack has a row a block, and the vectors don't say how many their model has; give the "
            "model (--model)"
        )

    def why_not(site: str) -> str | None:
        block = block_of(site)
        if component_of(site) is not None or (block is None and site != FINAL_NORM):
            return "rows are states between blocks"
        if block is not None and block >= n_blocks - 1:
            return "the last row is the state after the final norm"
        return None

    sites, notes = wanted.expressible(why_not)
    rows = torch.zeros(n_blocks + 1, wanted.vectors.width)
    for site in sites:
        block = block_of(site)
        rows[-1 if block is None else block + 1] = torch.from_numpy(wanted.scaled(site))
    with new_file(path) as temporary:
        write_pickle(temporary, rows)
    absent = n_blocks + 1 - len(sites)
    return [
        *notes,
        f"The strength {wanted.strength:g} is in the tensor. {absent} of its {n_blocks + 1} rows "
        "are zeros. Row k + 1 is added to the output of block k; the last one, where "
        "it is no zero, to that of the final norm.",
    ]


def read(path: Path, model: Model | None = None) -> SteeringVectorSet:
    """Read a stacked tensor; rows of zeros do nothing and are no vectors.

    Raises:
        StoreError: it is none.
        ModelError: its rows are not those of the model.
    """
    rows = read_pickle(path)
    if (
        not isinstance(rows, torch.Tensor)
        or rows.ndim != 2
        or len(rows) < 2
        or not rows.is_floating_point()
        or not is_plain(rows)
    ):
        shape = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise StoreError(
            f"{path}: holds {shape}; expected a tensor (L + 1, d) of real numbers, a row a state"
        )
    n_blocks = len(rows) - 1
    if model is not None and n_blocks != Anatomy.of(model).n_blocks:
        raise ModelError(
            f"{path}: {n_blocks + 1} rows, and the model has {Anatomy.of(model).n_blocks} blocks; "
            f"expected {Anatomy.of(model).n_blocks + 1}"
        )
    sites = [*(resid_post(block) for block in range(n_blocks - 1)), FINAL_NORM]
    vectors = [
        vector_of(row, site, path)
        for site, row in zip(sites, rows[1:], strict=True)
        if bool(row.any())
    ]
    if not vectors:
        raise StoreError(f"{path}: every row behind the first is zero; expected a vector")
    known: dict[str, Json] = {"model_blocks": n_blocks, "model_width": rows.shape[1]}
    if bool(rows[0].any()):
        known["left_out"] = (
            "row 0, a change of the embeddings, which has no site "
            f"(norm {float(rows[0].double().norm()):.4g})"
        )
    return imported(vectors, path, "stack", known)
