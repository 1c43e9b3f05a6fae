"""A made-up ``activations`` folder of known displacements, and the context to measure it in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dsteer.activations.extract import write_ids
from dsteer.config import PipelineConfig, TinyModelConfig
from dsteer.data.tokens import Encoded
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.progress import SILENT
from dsteer.stages import BY_NAME, StageContext, call
from dsteer.store import Json, read_json, write_json, write_tensors

WIDTH = 16
ROWS = {"fit": (0, 96), "tune": (96, 128), "test": (128, 192)}
N = 192

SMALL = {
    "vector": {"bootstrap": 100, "convergence_draws": 5},
    "cosine": {"bootstrap": 100, "null_draws": 100},
    "spectrum": {},
}


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers, float64."""
    return np.random.default_rng(seed).normal(size=shape)


def rows(split: str) -> slice:
    """The rows of a split."""
    return slice(*ROWS[split])


def write_pair(folder: Path, *, seed: int = 0) -> Path:
    """Save one random tiny Llama of width 16 with its tokenizer."""
    tokenizer = build_tokenizer(["Tea or coffee?", "Rain again."], 320)
    shape = TinyModelConfig(
        vocab_size=320,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = build_model(shape, tokenizer, seed)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_activations(
    run: Path,
    displacements: Mapping[str, np.ndarray],
    *,
    base: np.ndarray | None = None,
    noise: float = 0.0,
    position: str = "prompt_last",
    response: tuple[np.ndarray, np.ndarray, list[int]] | None = None,
    conversations: Mapping[str, list[str]] | None = None,
) -> None:
    """Write ``activations/`` in the form of its stage.

    Args:
        run: the run folder.
        displacements: site → Δ (192, 16); rows are fit 0-95, tune 96-127, test 128-191.
        base: H_base (192, 16), the same at every site; default: random.
        noise: RMS norm of the rounding noise; the norm of its mean is a tenth of it.
        position: where the states were read.
        response: base states (T, 16), displacements (T, 16) and offsets (65) of response tokens.
        conversations: keys of each split's rows; default: each row its own.
    """
    folder = run / "activations"
    folder.mkdir(parents=True)
    base = normal(0, N, WIDTH) if base is None else base
    write_tensors(
        folder / "base.safetensors",
        {site: base.astype(np.float32) for site in displacements},
        {"position": position},
    )
    write_tensors(
        folder / "tuned.safetensors",
        {site: (base + delta).astype(np.float32) for site, delta in displacements.items()},
    )
    write_ids(folder / "ids.safetensors", [Encoded((0, 1), 1, False)] * N)
    if response is not None:
        states, delta, offsets = response
        for which, values in (("base", states), ("tuned", states + delta)):
            write_tensors(
                folder / f"response_{which}.safetensors",
                {"final_norm": values.astype(np.float32)},
            )
        write_json(folder / "response.json", {"offsets": offsets, "targets": [0] * offsets[-1]})
    keys = conversations or {
        split: [f"{split}-{i}" for i in range(stop - start)]
        for split, (start, stop) in ROWS.items()
    }
    result: dict[str, Any] = {
        "n": N,
        "width": WIDTH,
        "blocks": sum(site.startswith("resid_post") for site in displacements),
        "sites": list(displacements),
        "position": position,
        "template": "none",
        "rows": {split: list(ends) for split, ends in ROWS.items()},
        "ids_sha256": "0" * 64,
        "tokens": N * 7,
        "truncated": 0,
        "noise_floor": {site: {"rms": noise, "mean_norm": noise / 10} for site in displacements},
        "response": {"pairs": 64, "tokens": response[2][-1]} if response else None,
        "conversations": dict(keys),
        "headline": {},
        "notes": [],
    }
    write_json(folder / "result.json", result)


def context(run: Path, stage: str, *, model: Path | None = None, **changes: Any) -> StageContext:
    """The context of one stage over a made-up run; ``changes`` replace sections of the pipeline."""
    config = PipelineConfig.model_validate(
        {
            "name": "made-up",
            "data": {"sources": [{"format": "synthetic"}]},
            "models": {
                "base": str(model or "base"),
                "tuned": str(model or "tuned"),
                "device": "cpu",
            },
            "activations": {},
            **SMALL,
            **changes,
        }
    )
    assert stage in BY_NAME
    return StageContext(stage, config, run, SILENT)


def measure(
    run: Path, *stages: str, model: Path | None = None, figures: bool = False, **changes: Any
) -> Json:
    """Run stages as the pipeline does; return the last one's ``result.json``.

    Figures take most of a small stage's time: they are drawn only where they are asked for.
    """
    for stage in stages:
        within = context(run, stage, model=model, **changes)
        within.folder.mkdir(exist_ok=True)
        drawing = nullcontext() if figures else patch(f"dsteer.stages.{stage}.draw_result")
        with drawing:
            write_json(within.folder / "result.json", call(within))
    return read_json(run / stages[-1] / "result.json")
