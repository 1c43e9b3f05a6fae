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
    from dsteer.data.contrast import ContrastPair as ContrastPair
    from dsteer.data.types import PreferencePair as PreferencePair
    from dsteer.errors import DsteerError as DsteerError
    from dsteer.geometry.alignment import cosine_to as cosine_to
    from dsteer.geometry.alignment import cosine_to_mean as cosine_to_mean
    from dsteer.geometry.spectrum import Spectrum as Spectrum
    from dsteer.geometry.spectrum import spectrum as spectrum
    from dsteer.models.pair import ModelPair as ModelPair
    from dsteer.steering.build import contrast as contrast
    from dsteer.steering.build import increments as increments
    from dsteer.steering.build import mean_difference as mean_difference
    from dsteer.steering.build import principal_directions as principal_directions
    from dsteer.steering.calibrate import Calibration as Calibration
    from dsteer.steering.calibrate import strength_in as strength_in
    from dsteer.steering.conditions import Condition as Condition
    from dsteer.steering.conditions import fit_condition as fit_condition
    from dsteer.steering.decode import SweepResult as SweepResult
    from dsteer.steering.decode import sweep as sweep
    from dsteer.steering.guidance import Guidance as Guidance
    from dsteer.steering.guidance import GuidedResult as GuidedResult
    from dsteer.steering.guidance import guided as guided
    from dsteer.steering.hooks import ActivationHook as ActivationHook
    from dsteer.steering.hooks import ActivationInjector as ActivationInjector
    from dsteer.steering.hooks import MultiVectorInjector as MultiVectorInjector
    from dsteer.steering.hooks import get_all_hidden_states as get_all_hidden_states
    from dsteer.steering.intervene import steer as steer
    from dsteer.steering.prefix import prefix_contrast as prefix_contrast
    from dsteer.steering.recommend import MODEL_CONFIGS as MODEL_CONFIGS
    from dsteer.steering.recommend import recommended_layers as recommended_layers
    from dsteer.steering.refusal import refusal_direction as refusal_direction
    from dsteer.steering.vector import SteeringVector as SteeringVector
    from dsteer.steering.vector import SteeringVectorSet as SteeringVectorSet
    from dsteer.steering.vector import cosine_matrix as cosine_matrix
    from dsteer.training.steering_vector import learn_vector as learn_vector

__version__ = "0.1.0"

_HOMES = {
    "ActivationHook": "dsteer.steering.hooks",
    "ActivationInjector": "dsteer.steering.hooks",
    "Calibration": "dsteer.steering.calibrate",
    "Condition": "dsteer.steering.conditions",
    "ContrastPair": "dsteer.data.contrast",
    "DsteerError": "dsteer.errors",
    "Guidance": "dsteer.steering.guidance",
    "GuidedResult": "dsteer.steering.guidance",
    "MODEL_CONFIGS": "dsteer.steering.recommend",
    "ModelPair": "dsteer.models.pair",
    "MultiVectorInjector": "dsteer.steering.hooks",
    "PairedActivations": "dsteer.activations.extract",
    "PairedMoments": "dsteer.activations.moments",
    "PreferencePair": "dsteer.data.types",
    "Spectrum": "dsteer.geometry.spectrum",
    "SteeringVector": "dsteer.steering.vector",
    "SteeringVectorSet": "dsteer.steering.vector",
    "SweepResult": "dsteer.steering.decode",
    "accumulate": "dsteer.activations.accumulate",
    "contrast": "dsteer.steering.build",
    "cosine_matrix": "dsteer.steering.vector",
    "cosine_to": "dsteer.geometry.alignment",
    "cosine_to_mean": "dsteer.geometry.alignment",
    "extract": "dsteer.activations.extract",
    "fit_condition": "dsteer.steering.conditions",
    "get_all_hidden_states": "dsteer.steering.hooks",
    "guided": "dsteer.steering.guidance",
    "increments": "dsteer.steering.build",
    "learn_vector": "dsteer.training.steering_vector",
    "load_preferences": "dsteer.data",
    "mean_difference": "dsteer.steering.build",
    "prefix_contrast": "dsteer.steering.prefix",
    "principal_directions": "dsteer.steering.build",
    "recommended_layers": "dsteer.steering.recommend",
    "refusal_direction": "dsteer.steering.refusal",
    "spectrum": "dsteer.geometry.spectrum",
    "steer": "dsteer.steering.intervene",
    "strength_in": "dsteer.steering.calibrate",
    "sweep": "dsteer.steering.decode",
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
