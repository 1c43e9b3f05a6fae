"""A study: one pipeline in variants, each an ordinary run, and what they have in common.

``<run>/variants/<name>/`` is the run of a variant. What two variants would do alike is done once
(see :mod:`dsteer.sharing`). ``<run>/comparison/`` holds
the comparison, ``<run>/report.html`` tells it. One variant that fails does not lose the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dsteer.config import PipelineConfig, resolved, variants_of
from dsteer.errors import ConfigError
from dsteer.nulls import NullsError, run_with_nulls
from dsteer.parallel import join
from dsteer.pipeline import Step, complete_stages, make_plan, manifest_head, require_inputs
from dsteer.progress import Reporter
from dsteer.sharing import Variant, prepare, raise_failures
from dsteer.spread import spread
from dsteer.store import (
    Json,
    Run,
    hash_json,
    read_json,
    write_json,
)

COMPARISON = "comparison"
"""The folder of the comparison, which ``--force`` knows as if it were a stage."""

VERSION = 5
"""Raised when the same variants would give another comparison."""


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
    jobs: int = 1,
    reporter: Reporter,
) -> Json:
    """Run every variant, compare them, and return the study's summary.

    With ``until`` or ``only`` the variants run so far, and are compared as far as they are.
    Where a launcher started several processes, all call this and share each variant's stages; the
    first one alone compares. An error then ends all: the same command goes on from there.

    With ``jobs`` above 1 that many variants run at a time, each in a process of its own.

    Raises:
        ConfigError: jobs together with a launcher, or with stages that are forced or taken alone.
        StudyError: variants failed by what a user can mend; the others are complete and compared.
        DsteerError: what stops all of them, before anything is written.
    """
    ranks = join()
    if jobs > 1 and (ranks.world > 1 or only is not None or force is not None):
        why = "a launcher's processes" if ranks.world > 1 else "--only" if only else "--force"
        raise ConfigError(f"--jobs {jobs} does not go with {why}; leave one of them out")
    with ranks.one_fate():
        if ranks.main:
            return _lead(config, yaml_text, Run(out), overrides, until, only, force, jobs, reporter)
        forced = None if force == COMPARISON else force
        for variant in variants(config, out):
            run_with_nulls(
                variant.config, "", variant.run.path, until=until, only=only, force=forced,
                reporter=reporter,
            )  # fmt: skip
    return {}


def _lead(
    config: PipelineConfig,
    yaml_text: str,
    run: Run,
    overrides: Sequence[str],
    until: str | None,
    only: str | None,
    force: str | None,
    jobs: int,
    reporter: Reporter,
) -> Json:
    """Run the variants one after the other, compare them, and keep the records."""
    run.check(config.name)
    plan_study(config, run.path, until=until, only=only, force=force)
    forced = None if force == COMPARISON else force
    failures: dict[str, Exception] = {}
    lost: dict[str, Exception] = {}  # nulls of variants that are complete
    done: list[Variant] = []
    with run.lock():
        run.claim(config.name, yaml_text)
        if jobs > 1:
            spread(variants(config, run.path), jobs, until, reporter)
        for variant in variants(config, run.path):
            reporter.line(f"{config.name}: variant {variant.name}")
            try:
                run_with_nulls(
                    variant.config,
                    prepare(variant, done, forced),
                    variant.run.path,
                    until=until,
                    only=only,
                    force=forced,
                    relatives=done,
                    reporter=reporter,
                )
            except NullsError as error:
                lost[variant.name] = error
                done.append(variant)
            except Exception as error:
                if join().world > 1:
                    raise  # the other processes have heard of it, and end
                failures[variant.name] = error
                reporter.line(f"{config.name}: variant {variant.name} failed: {error}")
            else:
                done.append(variant)
        again = force == COMPARISON
        summary = _compare(config, run, failures, overrides, reporter, again=again)
    raise_failures({**failures, **lost}, len(config.variants), "variants")
    return summary


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
    complete = {each.name: complete_stages(each.config, each.run) for each in found}
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
