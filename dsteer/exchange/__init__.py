"""Steering vectors for other programs, and theirs for dsteer; one module a format.

============  ===============================================================================
gguf          llama.cpp's control vector: blocks 1 … L − 1
repeng        the same file for repeng and EasySteer, block 0 too
rotalabs      a folder of ``layer_{k}.json`` and ``layer_{k}.pt``: all blocks
stack         a ``.pt`` tensor (L + 1, d), row i as ``hidden_states[i]``: all but the last block
lm-eval       a ``.pt`` dictionary for ``lm_eval --model steered``: one site, of any kind
baked         a model folder with λv in the biases of the steered blocks: any blocks
card          a folder with the vectors and a model card for the hub: all sites
============  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from dsteer.activations.sites import resolve_sites
from dsteer.data.tokens import Tokenizer
from dsteer.errors import ConfigError, StoreError, did_you_mean
from dsteer.exchange.request import Export, Steering, as_set
from dsteer.models.anatomy import Anatomy, text_config
from dsteer.models.load import Model
from dsteer.steering.provenance import require_fit
from dsteer.steering.vector import SteeringVectorSet

FORMATS = {
    "gguf": "llama_cpp",
    "repeng": "repeng",
    "rotalabs": "rotalabs",
    "stack": "stack",
    "lm-eval": "lm_eval",
    "baked": "baked",
    "card": "card",
}
"""The module of each format."""


def export(
    what: Steering,
    path: str | Path,
    format: str,  # noqa: A002
    *,
    strength: float = 1.0,
    sites: str | Sequence[str] | None = None,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
    skip: bool = False,
) -> list[str]:
    """Write steering vectors in another program's format, so that it adds λv where dsteer would.

    Args:
        what: a vector, a set, or interventions that add one at all positions.
        path: of the file or folder; a folder that holds something is refused.
        format: one of :data:`FORMATS`.
        strength: λ, in units of v.
        sites: those of the vectors that are written; default: all.
        model: that the vectors are for; it is checked, and ``lm-eval`` and ``baked`` need it.
        tokenizer: what ``baked`` puts beside the model.
        skip: leave out what the format can't express, instead of refusing it.

    Returns:
        What a person should know of the file, as sentences.

    Raises:
        ConfigError: no such format or site, or what the format can't express.
        ModelError: vectors that don't suit the model, or a model that the format can't hold.
        MeasurementError: a strength that is not finite.
        StoreError: something is there already.
        MissingExtraError: the package that writes the format.
    """
    module = _module(format)
    wanted = Export.of(
        what, format, strength, sites=sites, model=model, tokenizer=tokenizer, skip=skip
    )
    notes: list[str] = module.write(wanted, Path(path).expanduser())
    return notes


def read(
    path: str | Path,
    format: str,  # noqa: A002
    *,
    model: Model | None = None,
) -> SteeringVectorSet:
    """Read another program's steering vectors.

    What a file holds is what it adds: λv, where a strength was written into it. Pickles are read
    as tensors alone.

    Args:
        path: of the file or folder.
        format: one of :data:`FORMATS`.
        model: that the vectors are for; they are checked against it.

    Returns:
        The vectors; the metadata says where they come from and, as ``left_out``, what of the file
        has no site.

    Raises:
        ConfigError: no such format, or sites that the model does not have.
        StoreError: no such file, or one that is not of the format.
        ModelError: vectors that don't suit the model.
        MissingExtraError: the package that reads the format.
    """
    module = _module(format)
    path = Path(path).expanduser()
    if not path.exists():
        raise StoreError(f"{path}: no such file or folder; expected one in the format {format}")
    vectors: SteeringVectorSet = module.read(path, model)
    if model is None:
        return vectors
    require_fit(vectors, model)
    anatomy = Anatomy.of(model)
    resolve_sites(list(vectors), anatomy.n_blocks, encoder=anatomy.encoder is not None)
    own = {
        "model_type": text_config(model.config).model_type,
        "model_blocks": anatomy.n_blocks,
        "model_width": anatomy.width,
    }
    return SteeringVectorSet(vectors.values(), {**vectors.metadata, **own})


def _module(name: str) -> ModuleType:
    if name not in FORMATS:
        raise ConfigError(f"format {name!r}: no such format{did_you_mean(name, FORMATS)}")
    return import_module(f"dsteer.exchange.{FORMATS[name]}")


__all__ = ["FORMATS", "Export", "as_set", "export", "read"]
