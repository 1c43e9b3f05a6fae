"""Which layer to steer: as a run measured for this model, else as published, else a guess."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from dsteer.activations.sites import block_of
from dsteer.errors import StoreError
from dsteer.models.anatomy import count_blocks, model_name
from dsteer.models.load import Model
from dsteer.store import Json, Run, hash_json, identify, read_json

_RUNS = ("results", "runs")
"""Where runs are looked for."""


@dataclass(frozen=True)
class PublishedLayer:
    """A layer that was reported to steer.

    Attributes:
        layer: the block whose output it is, from 0.
        what: what was steered.
        source: where it was reported, and how its layer is counted there.
    """

    layer: int
    what: str
    source: str


@dataclass(frozen=True)
class ModelConfig:
    """What is published of one family at one size.

    Attributes:
        blocks: L; a model of another depth is not of this family.
        published: the layers.
    """

    blocks: int
    published: tuple[PublishedLayer, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, each once, ascending."""
        return tuple(sorted({entry.layer for entry in self.published}))


def _refusal(enters: int, run: str) -> PublishedLayer:
    """The refusal direction that the authors of arXiv:2406.11717 chose, by their published runs."""
    return PublishedLayer(
        enters - 1,
        "refusal direction",
        "Arditi et al. 2024, arXiv:2406.11717: github.com/andyrdt/refusal_direction, pipeline/runs/"
        f"{run}/direction_metadata.json, layer {enters}, the state that enters block {enters}",
    )


MODEL_CONFIGS: dict[str, ModelConfig] = {
    "Llama-2-7b": ModelConfig(
        32,
        (
            PublishedLayer(
                13,
                "contrastive activation addition",
                "Panickssery et al. 2023, arXiv:2312.06681: github.com/nrimsky/CAA, script.sh, "
                "layer 13, the output of block 13",
            ),
            _refusal(14, "llama-2-7b-chat-hf"),
        ),
    ),
    "Meta-Llama-3-8B": ModelConfig(32, (_refusal(12, "meta-llama-3-8b-instruct"),)),
    "DeepSeek-R1-Distill-Llama-8B": ModelConfig(
        32, (_refusal(16, "DeepSeek-R1-Distill-Llama-8B"),)
    ),
    "gemma-2b": ModelConfig(18, (_refusal(10, "gemma-2b-it"),)),
    "gemma-2-2b": ModelConfig(26, (_refusal(15, "gemma-2-2b-it"),)),
    "Qwen-1_8B": ModelConfig(24, (_refusal(15, "qwen-1_8b-chat"),)),
    "Yi-6B": ModelConfig(32, (_refusal(20, "yi-6b-chat"),)),
    "gpt2-xl": ModelConfig(
        48,
        (
            PublishedLayer(
                5,
                "activation addition, wedding",
                "Turner et al. 2023, arXiv:2308.10248, and their post 'Steering GPT-2-XL by adding "
                "an activation vector': layer 6, the state that enters block 6",
            ),
        ),
    ),
}
"""Families by a part of their models' names, with the source of each layer.

A family that is not here has no layer published that is known to this list.
"""


@dataclass(frozen=True)
class RecommendedLayers:
    """Layers to steer first.

    Attributes:
        layers: blocks, from 0.
        kind: how they are known.
        source: the same in words, with the number or the citation.
    """

    layers: tuple[int, ...]
    kind: Literal["measured", "published", "guess"]
    source: str


def recommended_layers(
    model: Model, *, runs: str | Path | Sequence[str | Path] | None = None
) -> RecommendedLayers:
    """The layers at which to steer a model first, and how that is known.

    1. *Measured*: the layer at which v* recovers the most KL on the tune split, in a run whose base
       or tuned model is this one (the same hub commit, or the same files).
    2. *Published*: the layers of its family in :data:`MODEL_CONFIGS`.
    3. *Guess*: the median depth of all layers there. Depths vary from model to model and from one
       behaviour to another, so measure.

    Args:
        model: a loaded language model.
        runs: run folders, or folders of them; default: ``results`` and ``runs``, where they are.

    Raises:
        StoreError: a folder that is given does not exist, or a run in it is broken.
    """
    identity = _identity(model)
    found = [] if identity is None else list(_measured(identity, runs))
    best = max(found, key=lambda item: item[0], default=None)
    if best is not None and best[0] > 0:
        recovered, layer, positions, run = best
        return RecommendedLayers(
            (layer,),
            "measured",
            f"measured in run {run}: KL recovered {recovered:.2f} on tune (λ = 1, positions "
            f"{positions})",
        )
    tried = "" if best is None else f"; run {best[3]} measured no layer that recovers KL"
    name, blocks = model_name(model).lower(), count_blocks(model.config)
    for family, config in MODEL_CONFIGS.items():
        if family.lower() in name and config.blocks == blocks:
            said = "; ".join(f"{entry.what} ({entry.source})" for entry in config.published)
            return RecommendedLayers(config.layers, "published", f"published: {said}{tried}")
    depth = _median_depth()
    return RecommendedLayers(
        (max(0, round(depth * blocks) - 1),),
        "guess",
        f"guess: {depth:.2f} of {blocks} blocks, the median depth of the layers in MODEL_CONFIGS"
        f"{tried}; dsteer compare measures a model",
    )


def _median_depth() -> float:
    """The depth of the published layers: blocks up to and with them, as a share of all blocks."""
    return median(
        (entry.layer + 1) / config.blocks
        for config in MODEL_CONFIGS.values()
        for entry in config.published
    )


def _identity(model: Model) -> str | None:
    """What :func:`dsteer.store.identify` says of where a model was loaded from, if it is known."""
    if getattr(model, "peft_config", None):
        return None  # its name is the base's
    name, commit = model_name(model), getattr(model.config, "_commit_hash", None)
    if commit is not None:
        return f"hub:{name}@{commit}"
    return identify(name) if Path(name).expanduser().is_dir() else None


def _measured(
    identity: str, runs: str | Path | Sequence[str | Path] | None
) -> Iterator[tuple[float, int, str, str]]:
    """KL recovered on tune, layer, positions and run, of each layer in each run of a model."""
    for run in _folders(runs):
        with contextlib.suppress(*((StoreError,) if runs is None else ())):
            manifest = _manifest(run)
            path = run.stage("interpolation").result_path
            if identity not in _models(manifest) or not path.is_file():
                continue
            sites: dict[str, Any] = read_json(path).get("sites") or {}
            for site, measured in sites.items():
                layer = block_of(site)
                if layer is None:
                    continue
                for positions, recovered in measured["kl_recovered"].items():
                    if recovered is not None and math.isfinite(recovered):
                        yield recovered, layer, positions, run.path.name


def _manifest(run: Run) -> dict[str, Json]:
    found = read_json(run.path / "manifest.json")
    return found if isinstance(found, dict) else {}


def _models(manifest: dict[str, Json]) -> set[str]:
    """The identities of a run's base and tuned model, given or trained."""
    inputs = _table(manifest, "inputs")
    found = {str(inputs[key]) for key in ("models.base", "models.tuned") if inputs.get(key)}
    for stage in ("base", "dpo"):
        outputs = _table(_table(_table(manifest, "stages"), stage), "outputs")
        files = {
            name.removeprefix("model/"): value
            for name, value in outputs.items()
            if name.startswith("model/")
        }
        if files:
            found.add(f"sha256:{hash_json(files)}")
    return found


def _table(of: dict[str, Json], key: str) -> dict[str, Json]:
    """What stands at a key; nothing where it is no table, as in another program's manifest."""
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def _folders(runs: str | Path | Sequence[str | Path] | None) -> Iterator[Run]:
    if runs is None:
        places = [Path(name) for name in _RUNS if Path(name).is_dir()]
    else:
        given = [runs] if isinstance(runs, str | Path) else runs
        places = [Path(item).expanduser() for item in given]
    for place in places:
        if not place.is_dir():
            raise StoreError(f"{place}: no such folder; expected a run, or a folder of runs")
        inside = sorted(path for path in place.iterdir() if (path / "manifest.json").is_file())
        for path in [place] if (place / "manifest.json").is_file() else inside:
            yield Run(path)
