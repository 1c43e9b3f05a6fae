"""A pair with its nulls: runs that share everything with it but one thing.

``<run>/nulls/<name>/`` is the run of a null, an ordinary one. The pair goes first, as far as it
reads no null; then each null takes what is identical from it (data, base, states of the base) and
does the rest; then the pair is graded beside them. A null that fails does not lose the others: the
claims that need it are then not tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsteer.config import PipelineConfig, nulls_of
from dsteer.errors import StudyError
from dsteer.parallel import join
from dsteer.pipeline import Step, check_stages, make_plan, run_pipeline
from dsteer.progress import Reporter
from dsteer.sharing import Variant, prepare, raise_failures
from dsteer.stages import BY_NAME, NULLS_FOLDER, planned
from dsteer.store import Json, Run


class NullsError(StudyError):
    """Nulls failed; the pair is complete, and what needs them is not tested."""


def null_runs(config: PipelineConfig, out: Path) -> list[Variant]:
    """The nulls of a pipeline in its run folder, in order."""
    return [
        Variant(name, null, Run(out / NULLS_FOLDER / name))
        for name, null in nulls_of(config).items()
    ]


def plan_nulls(config: PipelineConfig, out: Path) -> dict[str, list[Step]]:
    """The plan of each null. What it shares with the pair is planned in it too."""
    return {null.name: make_plan(null.config, null.run) for null in null_runs(config, out)}


def nulls_reached(config: PipelineConfig, until: str | None, only: str | None) -> bool:
    """Whether a run so far goes through its nulls: up to a stage that reads them, or to the end."""
    if not config.nulls or only is not None:
        return False
    return until is None or until not in _before_readers(config)


def _before_readers(config: PipelineConfig) -> list[str]:
    """The stages of the pair that come before its nulls."""
    names = [stage.name for stage in planned(config)]
    reader = next((name for name in names if BY_NAME[name].reads_nulls), None)
    return names if reader is None else names[: names.index(reader)]


def run_with_nulls(
    config: PipelineConfig,
    yaml_text: str,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    until: str | None = None,
    only: str | None = None,
    force: str | None = None,
    relatives: Sequence[Variant] = (),
    reporter: Reporter,
) -> Json:
    """Run a pipeline and its nulls, and return its summary.

    Nulls are run where a stage that reads them is: not with ``until`` or ``only`` of another one.

    Args:
        config: the pipeline, without variants.
        yaml_text: as it was written.
        out: the run folder.
        overrides: of the YAML, for the manifest.
        until: run so far.
        only: run this stage alone.
        force: run this stage of the pair again.
        relatives: finished runs from which nulls may take what is identical too.
        reporter: shows progress.

    Raises:
        NullsError: nulls failed by what a user can mend; all else is complete.
        DsteerError: as :func:`dsteer.pipeline.run_pipeline`.
    """
    check_stages(config, until=until, only=only, force=force)
    before = _before_readers(config)
    failures: dict[str, Exception] = {}
    if nulls_reached(config, until, only):
        run_pipeline(
            config,
            yaml_text,
            out,
            overrides=overrides,
            until=before[-1],
            force=force if force in before else None,
            reporter=reporter,
        )
        force = None if force in before else force
        failures = _run_nulls(config, out, relatives, reporter)
    summary = run_pipeline(
        config,
        yaml_text,
        out,
        overrides=overrides,
        until=until,
        only=only,
        force=force,
        reporter=reporter,
    )
    raise_failures(failures, len(config.nulls), "nulls", NullsError)
    return summary


def _run_nulls(
    config: PipelineConfig, out: Path, relatives: Sequence[Variant], reporter: Reporter
) -> dict[str, Exception]:
    """Run each null; what failed, by name."""
    ranks = join()
    failures: dict[str, Exception] = {}
    done = [*relatives, Variant(config.name, config, Run(out))]
    for null in null_runs(config, out):
        reporter.line(f"{config.name}: null {null.name}")
        try:
            text = prepare(null, done) if ranks.main else ""
            run_pipeline(null.config, text, null.run.path, reporter=reporter)
        except Exception as error:
            if ranks.world > 1:
                raise  # the other processes have heard of it, and end
            failures[null.name] = error
            reporter.line(f"{config.name}: null {null.name} failed: {error}")
        else:
            done.append(null)
    return failures
