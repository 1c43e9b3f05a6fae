"""dsteer finds out what preference training did inside a language model.

Names are imported on first use, so that ``import dsteer`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsteer.activations.accumulate import accumulate as accumulate
    from dsteer.activations.extract import PairedActivations as PairedActivations
    from dsteer.activations.extract import extract as extract
    from dsteer.activations.moments import PairedMoments as PairedMoments
    from dsteer.data import load_preferences as load_preferences
    from dsteer.data.types import PreferencePair as PreferencePair
    from dsteer.errors import DsteerError as DsteerError
    from dsteer.geometry.alignment import cosine_to as cosine_to
    from dsteer.geometry.alignment import cosine_to_mean as cosine_to_mean
    from dsteer.geometry.spectrum import Spectrum as Spectrum
    from dsteer.geometry.spectrum import spectrum as spectrum
    from dsteer.models.pair import ModelPair as ModelPair
    from dsteer.steering.build import mean_difference as mean_difference
    from dsteer.steering.decode import SweepResult as SweepResult
    from dsteer.steering.decode import sweep as sweep
    from dsteer.steering.intervene import steer as steer
    from dsteer.steering.vector import SteeringVector as SteeringVector
    from dsteer.steering.vector import SteeringVectorSet as SteeringVectorSet

__version__ = "0.1.0"

_HOMES = {
    "DsteerError": "dsteer.errors",
    "ModelPair": "dsteer.models.pair",
    "PairedActivations": "dsteer.activations.extract",
    "PairedMoments": "dsteer.activations.moments",
    "PreferencePair": "dsteer.data.types",
    "Spectrum": "dsteer.geometry.spectrum",
    "SteeringVector": "dsteer.steering.vector",
    "SteeringVectorSet": "dsteer.steering.vector",
    "SweepResult": "dsteer.steering.decode",
    "accumulate": "dsteer.activations.accumulate",
    "cosine_to": "dsteer.geometry.alignment",
    "cosine_to_mean": "dsteer.geometry.alignment",
    "extract": "dsteer.activations.extract",
    "load_preferences": "dsteer.data",
    "mean_difference": "dsteer.steering.build",
    "spectrum": "dsteer.geometry.spectrum",
    "sweep": "dsteer.steering.decode",
    "steer": "dsteer.steering.intervene",
}

__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsteer' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
