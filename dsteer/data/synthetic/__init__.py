"""The synthetic preference world: benign dialogues with independently planted preference axes."""

from __future__ import annotations

from dsteer.data.synthetic.axes import AXES, Axis
from dsteer.data.synthetic.world import PromptRecord, World

__all__ = ["AXES", "Axis", "PromptRecord", "World"]
