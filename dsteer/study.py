"""A study: one pipeline in variants, each an ordinary run, and what they have in common.

``<run>/variants/<name>/`` is the run of a variant. What two variants would do alike is done once:
a stage of the same fingerprint is taken from the variant that has it, and stored states of the base
are offered to a later reading that differs in the tuned model alone. ``<run>/comparison/`` holds
the comparison, ``<run>/report.html`` tells it. One variant that fails does not lose the others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsteer.config import PipelineConfig, as_yaml, resolved, variants_of
from dsteer.errors import DsteerError, StudyError
from dsteer.parallel import join
from dsteer.pipeline import (
    Step,
    identify_stages,
    make_plan,
    manifest_head,
    require_inputs,
    run_pipeline,
)
from dsteer.progress import Reporter
from dsteer.store import (
    Json,
    Run,
    StageFolder,
    atomic_path,
    hash_json,
    read_json,
    write_json,
)

COMPARISON = "comparison"
"""The folder of the comparison, which ``--force`` knows as if it were a stage."""

VERSION = 1
"""Raised when the same variants would give another comparison."""

SHARED_STATES = ("base.safetensors", "response_base.safetensors")
"""Files of ``activations`` that depend on the base alone."""

LINKED_FROM = 1 << 20
"""Files of so many bytes are linked, not copied: nothing writes into a finished one."""


@dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        name: as the pipeline has it.
        config: the whole pipeline that it is.
        run: its run folder.
    """

    name: str
    config: PipelineConfig
    run: Run


def variants(config: PipelineConfig, out: Path) -> list[Variant]:
    """The variants of a study in its run folder, in order."""
    return [
        Variant(name, variant, Run(out / "variants" / name))
        for name, variant in variants_of(config).items()
    ]


def plan_study(
    config: PipelineConfig,
    out: Path,
    *,
    until: str | None = None,
    only: str | None = None,
    force: str | None = None,
) -> dict[str, list[Step]]:
    """The plan of each variant. What variants share is planned in each of them.

    Raises:
        ConfigError: as :func:`dsteer.pipeline.make_plan`, of any variant.
    """
    force = None if force == COMPARISON else force
    plans = {}
    for variant in variants(config, out):
        steps = make_plan(variant.config, variant.run, until=until, only=only, force=force)
        if only is not None:
            require_inputs(only, steps, variant.config)
        plans[variant.name] = steps
    return plans


def run_study(
    config: PipelineConfig,
    yaml_text: str,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    until: str | None = None,
    only: str | None = None,
    force: str | None = None,
    reporter: Reporter,
) -> Json:
    """Run every variant, compare them, and return the study's summary.

    With ``until`` or ``only`` the variants run so far, and are compared as far as they are.
    Where a launcher started several processes, all call this and share each variant's stages; the
    first one alone compares. An error then ends all: the same command goes on from there.

    Raises:
        StudyError: variants failed by what a user can mend; the others are complete and compared.
        DsteerError: what stops all of them, before anything is written.
    """
    ranks = join()
    with ranks.one_fate():
        if ranks.main:
            return _lead(config, yaml_text, Run(out), overrides, until, only, force, reporter)
        for variant in variants(config, out):
            run_pipeline(variant.config, "", variant.run.path, reporter=reporter)
    return {}


def _lead(
    config: PipelineConfig,
    yaml_text: str,
    run: Run,
    overrides: Sequence[str],
    until: str | None,
    only: str | None,
    force: str | None,
    reporter: Reporter,
) -> Json:
    """Run the variants one after the other, compare them, and keep the records."""
    run.check(config.name)
    plan_study(config, run.path, until=until, only=only, force=force)
    forced = None if force == COMPARISON else force
    failures: dict[str, Exception] = {}
    done: list[Variant] = []
    with run.lock():
        run.claim(config.name, yaml_text)
        for variant in variants(config, run.path):
            reporter.line(f"{config.name}: variant {variant.name}")
            try:
                text = as_yaml(variant.config)
                variant.run.check(variant.config.name)
                with variant.run.lock():
                    variant.run.claim(variant.config.name, text)
                    share(variant, done, forced)
                run_pipeline(
                    variant.config,
                    text,
                    variant.run.path,
                    until=until,
                    only=only,
                    force=forced,
                    reporter=reporter,
                )
            except Exception as error:
                if join().world > 1:
                    raise  # the other processes have heard of it, and end
                failures[variant.name] = error
                reporter.line(f"{config.name}: variant {variant.name} failed: {error}")
            else:
                done.append(variant)
        again = force == COMPARISON
        summary = _compare(config, run, failures, overrides, reporter, again=again)
    for failure in failures.values():
        if not isinstance(failure, DsteerError):
            raise failure
    if failures:
        words = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise StudyError(
            f"{len(failures)} of {len(config.variants)} variants failed ({words}); what is "
            "complete stays, and the same command tries again"
        )
    return summary


def share(variant: Variant, done: Sequence[Variant], force: str | None = None) -> None:
    """Take from finished variants what this one would do alike, and offer it the base's states."""
    for name, identity in identify_stages(variant.config).items():
        fingerprint = hash_json(identity)
        own = variant.run.stage(name)
        if name == force or own.state(fingerprint) in {"complete", "partial"}:
            continue
        for other in done:
            folder = other.run.stage(name)
            record = folder.record()
            if record is None or folder.state(record["fingerprint"]) != "complete":
                continue
            if record["fingerprint"] == fingerprint:
                own.clear()
                _take_over(folder, own)
                break
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


# ---------------------------------------------------------------------------------- comparing


def _compare(
    config: PipelineConfig,
    run: Run,
    failures: Mapping[str, Exception],
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    again: bool,
) -> Json:
    """Compare the variants, and write the study's manifest, summary and report."""
    found = variants(config, run.path)
    folder = run.stage(COMPARISON)
    complete = {variant.name: _complete(variant) for variant in found}
    failed = {name: str(error) for name, error in failures.items()}
    for name, stages in complete.items():
        if not stages.keys() >= {"activations", "vector"}:
            failed.setdefault(name, "not run to its end")
    identity = {
        "version": VERSION,
        "config": resolved(config.comparison),
        "seed": config.seed,
        "variants": complete,
        "failed": failed,
    }
    fingerprint = hash_json(identity)
    write_json(run.path / "manifest.json", _manifest(config, overrides, identity))
    if len(failed) == len(found):  # nothing to compare yet, and what was compared is no more
        folder.clear()
        (run.path / "report.html").unlink(missing_ok=True)
        summary = _summary(config, found, failures, None)
        write_json(run.path / "summary.json", summary)
        return summary
    if folder.state(fingerprint) == "complete" and not again:
        reporter.line("comparison: identical and complete, skipped")
    else:
        reporter.line("comparison: compare the variants")
        from dsteer.stages.comparison import compare_runs

        if again:
            folder.clear()
        folder.begin(fingerprint)
        result = compare_runs(
            {variant.name: variant.run.path for variant in found},
            folder.path,
            config.comparison,
            lambda *names: config.seed_for("comparison", *names),
            reporter,
            failed,
            complete,
        )
        folder.finish(fingerprint, result, {"identity": identity, "version": VERSION})
    summary = _summary(config, found, failures, read_json(folder.result_path))
    write_json(run.path / "summary.json", summary)
    from dsteer.report.comparison_html import write_comparison_report

    write_comparison_report(run.path, title=config.report.title if config.report else None)
    return summary


def _summary(
    config: PipelineConfig,
    found: Sequence[Variant],
    failures: Mapping[str, Exception],
    result: Json,
) -> Json:
    """The study's summary; without a result where there was nothing to compare."""
    return {
        "run": config.name,
        "variants": {
            variant.name: {"failed": str(failures[variant.name])}
            if variant.name in failures
            else read_json(variant.run.path / "summary.json")["stages"]
            for variant in found
        },
        "stages": {} if result is None else {COMPARISON: result["headline"]},
        "notes": []
        if result is None
        else [{"stage": COMPARISON, "text": text} for text in result["notes"]],
    }


def _complete(variant: Variant) -> dict[str, Json]:
    """The stages that are complete as the variant is now, each with the hashes of what it wrote."""
    found = {}
    for name, identity in identify_stages(variant.config).items():
        folder, fingerprint = variant.run.stage(name), hash_json(identity)
        if name != "report" and folder.state(fingerprint) == "complete":
            outputs = (folder.record() or {}).get("outputs")
            found[name] = {"fingerprint": fingerprint, "outputs": outputs}
    return found


def _manifest(
    config: PipelineConfig, overrides: Sequence[str], identity: Mapping[str, Json]
) -> dict[str, Json]:
    return {
        **manifest_head(config, overrides),
        "variants": {
            name: {"changes": changes, "complete": list(identity["variants"][name])}
            for name, changes in config.variants.items()
        },
    }
