"""What runs of one family share: variants of a study, and the nulls of a pair.

A stage of the same fingerprint is taken from the run that has it, and stored states of the base are
offered to a later reading that differs in the tuned model alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsteer.config import PipelineConfig, as_yaml
from dsteer.errors import DsteerError, StudyError
from dsteer.pipeline import identify_stages
from dsteer.store import Json, Run, StageFolder, atomic_path, hash_json

SHARED_STATES = ("base.safetensors", "response_base.safetensors")
"""Files of ``activations`` that depend on the base alone."""

LINKED_FROM = 1 << 20
"""Files of so many bytes are linked, not copied: nothing writes into a finished one."""


@dataclass(frozen=True)
class Variant:
    """One run of a family.

    Attributes:
        name: of the variant, or of the null, as the pipeline has it.
        config: the whole pipeline that it is.
        run: its run folder.
    """

    name: str
    config: PipelineConfig
    run: Run


def raise_failures(
    failures: Mapping[str, Exception], total: int, kind: str, error: type[StudyError] = StudyError
) -> None:
    """Tell what failed of a family after all else was done; a bug is raised as it is.

    Raises:
        StudyError: members failed by what a user can mend; of the type that is given.
    """
    for failure in failures.values():
        if not isinstance(failure, DsteerError):
            raise failure
    if failures:
        words = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise error(
            f"{len(failures)} of {total} {kind} failed ({words}); what is complete stays, and the "
            "same command tries again"
        )


def prepare(variant: Variant, done: Sequence[Variant], force: str | None = None) -> str:
    """Make a folder the run of a variant, and take what finished ones have for it; its YAML."""
    text = as_yaml(variant.config)
    variant.run.check(variant.config.name)
    with variant.run.lock():
        variant.run.claim(variant.config.name, text)
        share(variant, done, force)
    return text


def share(variant: Variant, done: Sequence[Variant], force: str | None = None) -> None:
    """Take from finished variants what this one would do alike, and offer it the base's states.

    What it has already is taken again where theirs is of other bytes (done again since, or on
    another machine), and what rests on it is to be done again: one family has one base.
    """
    changed: set[str] = set()
    for name, identity in identify_stages(variant.config, variant.run).items():
        fingerprint = hash_json(identity)
        own = variant.run.stage(name)
        if changed & identity["upstream"].keys():
            changed.add(name)
            own.invalidate()
        state = own.state(fingerprint)
        if name == force or state == "partial":
            continue
        for other in done:
            folder = other.run.stage(name)
            record = folder.record()
            if record is None or folder.state(record["fingerprint"]) != "complete":
                continue
            if record["fingerprint"] == fingerprint:
                if state == "complete":
                    if (own.record() or {}).get("outputs") == record["outputs"]:
                        break
                    changed.add(name)
                own.clear()
                _take_over(folder, own)
                break
            if state == "complete":
                continue
            if name == "activations" and _of_base(record["identity"]) == _of_base(identity):
                _offer_states(other, own, fingerprint)
                break


def _of_base(identity: Mapping[str, Json]) -> str:
    """A hash of what a reading's identity says but for the tuned model."""
    models = {
        key: value
        for key, value in identity["config"]["models"].items()
        if not key.startswith("tuned")
    }
    rest = {
        **identity,
        "config": {**identity["config"], "models": models},
        "inputs": {k: v for k, v in identity["inputs"].items() if "tuned" not in k},
        "upstream": {k: v for k, v in identity["upstream"].items() if k != "dpo"},
    }
    return hash_json(rest)


def _take_over(other: StageFolder, own: StageFolder) -> None:
    """Copy a finished stage; its completion mark comes last."""
    record = other.path / "stage.json"
    for source in sorted(other.path.rglob("*")):
        if source.is_file() and source != record:
            _place(source, own.path / source.relative_to(other.path))
    _place(record, own.path / record.name)


def _offer_states(other: Variant, own: StageFolder, fingerprint: str) -> None:
    """Put another variant's base states where this one's reading looks for its own.

    The reading still takes none but a file whose plan (ids, sites, weights, batches) is its own.
    """
    offered = [other.run.path / "activations" / name for name in SHARED_STATES]
    if any(path.is_file() for path in offered):
        own.clear()
        own.begin(fingerprint, why=f"base states offered by variant {other.name}")
        for path in offered:
            if path.is_file():
                _place(path, own.path / path.name)


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINKED_FROM:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    with atomic_path(target) as temporary:
        shutil.copy2(source, temporary)
