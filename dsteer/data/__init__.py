"""Preference pairs: reading them, writing synthetic ones, splitting them."""

from dsteer.data.sources import SourceReading, load_preferences, read_source
from dsteer.data.types import Message, PreferencePair, Prompt

__all__ = [
    "Message",
    "PreferencePair",
    "Prompt",
    "SourceReading",
    "load_preferences",
    "read_source",
]
