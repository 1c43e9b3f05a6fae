"""The file of lm-evaluation-harness for ``lm_eval --model steered``: a pickled dictionary.

It maps the name of a module, relative to ``model.base_model``, to what is done with its output at
every token: ``add`` puts ``steering_coefficient`` times ``steering_vector`` on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from dsteer.activations.capture import site_module
from dsteer.activations.sites import COMPONENTS, all_sites, resid_post
from dsteer.errors import ConfigError, ModelError, StoreError
from dsteer.exchange.request import (
    Export,
    imported,
    new_file,
    refuse_adapter,
    require_model,
    vector_of,
)
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import Model
from dsteer.steering.files import read_pickle, write_pickle
from dsteer.steering.vector import SteeringVectorSet

_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(0|[1-9]\d*)")


def write(wanted: Export, path: Path) -> list[str]:
    """Write the file; λ is its coefficient.

    Raises:
        ConfigError: several sites, for some versions of the harness add the last vector at all of
            them; no model.
    """
    model = require_model(wanted, "whose modules the file names")
    refuse_adapter(model, wanted.format)
    if len(wanted.vectors) > 1:
        raise ConfigError(
            f"lm-eval can't express {len(wanted.vectors)} sites ({', '.join(wanted.vectors)}): "
            "versions of the harness add the last vector at all of them; name one site"
        )
    if path.suffix not in {".pt", ".pth"}:
        raise ConfigError(f"{path}: the harness tells the file by its name; expected NAME.pt")
    (site,) = wanted.vectors
    name = _names(model).get(site)
    if name is None:
        raise ConfigError(f"lm-eval can't express {site}: the model has no module that returns it")
    wanted.scaled(site)  # which the harness will compute
    vector = wanted.vectors[site].tensor.float()
    entry = {
        "action": "add",
        "steering_coefficient": float(wanted.strength),
        "steering_vector": vector,
        "bias": None,
        "head_index": None,
    }
    with new_file(path) as temporary:
        write_pickle(temporary, {name: entry})
    return [
        f"Run it with: lm_eval --model steered --model_args "
        f"pretrained=MODEL,steer_path={path.name}; it steers {name} at every token."
    ]


def read(path: Path, model: Model | None = None) -> SteeringVectorSet:
    """Read the entries of a file, each times its coefficient; they need the action ``add``.

    Without a model, names such as ``layers.12`` and ``h.12`` are understood.

    Raises:
        StoreError: it is no such file, or one that does something else.
        ModelError: the model has no such module at a site.
    """
    entries = read_pickle(path)
    if not isinstance(entries, Mapping) or not all(
        isinstance(name, str)
        and isinstance(entry, Mapping)
        and isinstance(entry.get("steering_vector"), torch.Tensor)
        and isinstance(entry.get("steering_coefficient", 1.0), int | float)
        for name, entry in entries.items()
    ):
        raise StoreError(
            f"{path}: no dictionary from module to action, steering_vector and "
            "steering_coefficient; expected a file of lm_eval --model steered"
        )
    sites = {} if model is None else {name: site for site, name in _names(model).items()}
    vectors = []
    for name, entry in entries.items():
        if entry.get("action") != "add" or entry.get("head_index") is not None:
            raise StoreError(
                f"{path}: {name} has action {entry.get('action')!r}, head_index "
                f"{entry.get('head_index')!r}; expected 'add' of a whole state"
            )
        site = sites.get(name) if model is not None else _guess(name)
        if site is None:
            known = ", ".join(sorted(sites)) if sites else "layers.K or h.K, or the model (--model)"
            raise ModelError(f"{path}: {name!r} is no site's module; expected {known}")
        vector = vector_of(entry["steering_vector"], site, path, {"module": name})
        scaled = vector.tensor * entry.get("steering_coefficient", 1.0)
        vectors.append(vector_of(scaled, site, path, vector.metadata))
    return imported(vectors, path, "lm-eval")


def _guess(name: str) -> str | None:
    match = _BLOCK.fullmatch(name)
    return None if match is None else resid_post(int(match[1]))


def _names(model: Model) -> dict[str, str]:
    """The module of each site, by its name below the base model."""
    anatomy = Anatomy.of(model)
    names = {id(module): name for name, module in model.base_model.named_modules()}
    sites = [*all_sites(anatomy.n_blocks)]
    sites += [f"{kind}.{block}" for kind in COMPONENTS for block in range(anatomy.n_blocks)]
    found = {}
    for site in sites:
        try:
            found[site] = names[id(site_module(anatomy, site))]
        except ModelError:  # its blocks have no such part
            continue
    return found
