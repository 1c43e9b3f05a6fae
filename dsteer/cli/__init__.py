"""The command line. Heavy imports live inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from dsteer.cli.doctor import doctor
from dsteer.errors import ConfigError, DsteerError
from dsteer.parallel import ALONE, join

app = typer.Typer(
    name="dsteer",
    help="Find out what preference training did inside a language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Command = TypeVar("Command", bound=Callable[..., None])

PipelineArgument = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A YAML file, or the name of a shipped pipeline.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides of the pipeline.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder; default: results/<name>.")
]
UntilOption = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")]
OnlyOption = Annotated[str | None, typer.Option(metavar="STAGE", help="Run this stage alone.")]
ForceOption = Annotated[
    str | None, typer.Option(metavar="STAGE", help="Redo this stage and all that read it.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the ``dsteer`` command."""
    app()


def _friendly(command: Command) -> Command:
    """Turn a user's mistake into one line and exit code 2, and Ctrl-C into a word on going on.

    Of several processes one speaks. Adds the option ``--debug``, which shows the traceback instead.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            join()
            command(*args, **kwargs)
        except DsteerError as error:
            if debug:
                raise
            _complain(error, str(error))
            raise typer.Exit(2) from None
        except OSError as error:
            from dsteer.pipeline import storage_trouble

            trouble = storage_trouble(error, Path())
            if debug or trouble is None:
                raise
            _complain(error, trouble)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            if join().main:
                print(  # noqa: T201
                    "\ndsteer: interrupted; nothing that was complete is lost, and the same "
                    "command goes on from here (without --force, which starts over)",
                    file=sys.stderr,
                )
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None

    hints = get_type_hints(command, include_extras=True)
    given = inspect.signature(command).parameters.values()
    debug_option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False)
    wrapped.__annotations__ = {**hints, "debug": DebugOption}
    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(annotation=wrapped.__annotations__[parameter.name])
            for parameter in (*given, debug_option)
        ]
    )
    return wrapped  # type: ignore[return-value]


def _complain(error: Exception, text: str) -> None:
    try:
        ranks = join()
    except ConfigError:  # the processes never met
        ranks = ALONE
    if ranks.may_speak(error):
        who = "dsteer" if ranks.main else f"dsteer, process {ranks.rank}"
        print(f"{who}: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _say(text: str = "") -> None:
    if join().main:
        print(text)  # noqa: T201


def _read(pipeline: str, overrides: list[str] | None) -> tuple[Any, str]:
    """Read a pipeline; return its config and its YAML as it stands."""
    from dsteer.config import find_pipeline, read_pipeline

    path = find_pipeline(pipeline)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; expected a YAML pipeline") from None
    return read_pipeline(text, overrides or (), origin=path.name), text


def _folder(out: Path | None, name: str) -> Path:
    return out if out is not None else Path("results") / name


@app.command()
@_friendly
def run(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    force: ForceOption = None,
    out: OutOption = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Of a study: variants at a time, each a process.")
    ] = 1,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, only the end.")
    ] = False,
) -> None:
    """Run a pipeline: what is identical is skipped, what was cut off goes on."""
    config, text = _read(pipeline, overrides)
    _run(
        config,
        text,
        _folder(out, config.name),
        overrides=overrides,
        until=until,
        only=only,
        force=force,
        jobs=jobs,
        quiet=quiet,
    )


def _run(
    config: Any,
    text: str,
    folder: Path,
    *,
    overrides: list[str] | None = None,
    until: str | None = None,
    only: str | None = None,
    force: str | None = None,
    jobs: int = 1,
    quiet: bool = False,
) -> None:
    """Run a pipeline or a study, and print what came out."""
    from dsteer.nulls import run_with_nulls
    from dsteer.progress import Reporter
    from dsteer.study import run_study

    if jobs > 1 and not config.variants:
        raise ConfigError(f"--jobs {jobs}: {config.name} has no variants to spread; leave it out")
    study: dict[str, Any] = {"jobs": jobs} if config.variants else {}
    summary = (run_study if config.variants else run_with_nulls)(
        config,
        text,
        folder,
        overrides=overrides or (),
        until=until,
        only=only,
        force=force,
        reporter=Reporter("quiet" if quiet else "auto"),
        **study,
    )
    if join().main:
        _print_summary(summary, folder)


@app.command()
@_friendly
def plan(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    force: ForceOption = None,
    out: OutOption = None,
) -> None:
    """Show what `run` would do, without loading a model."""
    from dsteer.nulls import nulls_reached, plan_nulls
    from dsteer.pipeline import make_plan
    from dsteer.store import Run
    from dsteer.study import plan_study

    config, _ = _read(pipeline, overrides)
    folder = _folder(out, config.name)
    if config.variants:
        plans = plan_study(config, folder, until=until, only=only, force=force)
    else:
        plans = {"": make_plan(config, Run(folder), until=until, only=only, force=force)}
        if nulls_reached(config, until, only):
            plans |= {f"null {name}": steps for name, steps in plan_nulls(config, folder).items()}
    _say(f"{config.name} → {folder}")
    for variant, steps in plans.items():
        if variant:
            _say(f" {variant}")
        for step in steps:
            _say(f"  {step.stage.name:12} {step.action:7} {step.why}")
            for key, identity in step.identity["inputs"].items():
                known = identity or "not at hand yet: will be asked of the hub"
                _say(f"  {'':12} {'':7} {key}: {known}")


@app.command()
@_friendly
def validate(pipeline: PipelineArgument, overrides: OverridesArgument = None) -> None:
    """Check a pipeline: every mistake at once, by dotted path."""
    from dsteer.config import nulls_of, variants_of
    from dsteer.pipeline import outside_inputs
    from dsteer.stages import planned

    config, _ = _read(pipeline, overrides)
    for whole in variants_of(config).values() if config.variants else (config,):
        for one in (whole, *nulls_of(whole).values()):
            stages = planned(one)
            for stage in stages:
                outside_inputs(stage.name, one)
            _say(f"{one.name}: valid; stages: {' → '.join(stage.name for stage in stages)}")


@app.command()
@_friendly
def report(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name.")],
) -> None:
    """Draw a run's figures again and write its report, from its artifacts alone."""
    from dsteer.stages import NULLS_FOLDER, STAGES
    from dsteer.store import Run

    found = Run(_find_run(run_folder))
    from dsteer.report.comparison_html import write_comparison_report
    from dsteer.report.figures import draw
    from dsteer.report.html import write_report

    manifest = found.manifest() or {}
    variants = [Run(found.path / "variants" / name) for name in manifest.get("variants") or {}]
    nulls = [
        Run(part.path / NULLS_FOLDER / name)
        for part in (*variants, found)
        for name in ((part.manifest() or {}).get("config") or {}).get("nulls") or {}
    ]
    for part in (*nulls, *variants, found):
        if part is not found and not any(part.stage(s.name).record() for s in STAGES):
            continue  # a variant or null that never ran
        with part.lock():
            for stage in (*(stage.name for stage in STAGES), "comparison"):
                if part.stage(stage).record() is not None:
                    draw(stage, part.path / stage)
            config = (part.manifest() or {}).get("config") or {}
            write = write_comparison_report if part is found and variants else write_report
            path = write(part.path, title=(config.get("report") or {}).get("title"))
    _say(str(path))


def _find_run(name: str) -> Path:
    from dsteer.errors import StoreError

    for path in (Path(name), Path("results") / name):
        if (path / "manifest.json").is_file():
            return path
    raise StoreError(f"{name}: no run there (no manifest.json); `dsteer ls` lists runs")


@app.command(name="ls")
@_friendly
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where runs lie.")] = Path(
        "results"
    ),
) -> None:
    """List the runs in a folder with their headline numbers."""
    from dsteer.stages import STAGES
    from dsteer.store import Run, read_json

    runs = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not runs:
        _say(f"no runs in {folder}; `dsteer run tiny` makes one")
    for path in runs:
        found = Run(path)
        done = [s.name for s in STAGES if found.stage(s.name).record() is not None]
        summary_path = path / "summary.json"
        summary = read_json(summary_path) if summary_path.is_file() else {}
        stages = summary.get("stages", {})
        if found.stage("comparison").record() is not None or "variants" in summary:
            told = summary.get("variants") or (found.manifest() or {}).get("variants") or {}
            names = [f"{v} (failed)" if "failed" in (s or {}) else v for v, s in told.items()]
            _say(f"{path.name:24} study of {', '.join(names)}")
            continue
        cosine = stages.get("cosine", {})
        site, value = cosine.get("chosen_site"), cosine.get("held_out_cosine")
        shown = f"held-out cosine {value:.3f} at {site}" if value is not None else ""
        _say(f"{path.name:24} {len(done)} stages, last: {done[-1] if done else '–':12} {shown}")


@app.command()
@_friendly
def pipelines(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this one's YAML.")
    ] = None,
) -> None:
    """List the shipped pipelines, or print one to start your own from."""
    from dsteer.config import find_pipeline, read_pipeline, shipped_pipelines

    if name is not None:
        _say(find_pipeline(name).read_text(encoding="utf-8").rstrip())
        return
    found = shipped_pipelines()
    width = max(map(len, found))
    for shipped, path in found.items():
        config = read_pipeline(path.read_text(encoding="utf-8"), origin=path.name)
        _say(f"{shipped:{width}} {config.description}")


@app.command()
@_friendly
def schema() -> None:
    """Print the JSON schema of a pipeline, for editors."""
    from dsteer.config import json_schema
    from dsteer.store import to_json

    _say(to_json(json_schema()).rstrip())


app.command()(_friendly(doctor))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from dsteer import __version__

        _say(f"dsteer {__version__}")
        raise typer.Exit(0)


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    _say(f"{summary['run']} → {folder}")
    if "claims" in summary["stages"]:
        _print_claims(folder)
    for variant, stages in summary.get("variants", {}).items():
        cosine, vector = stages.get("cosine", {}), stages.get("vector", {})
        told = {
            "failed": stages.get("failed"),
            "held-out cosine": cosine.get("held_out_cosine"),
            "at": cosine.get("chosen_site"),
            "relative norm": vector.get("relative_norm"),
            "KL recovered": vector.get("kl_recovered"),
            **{key.replace("_", " "): value for key, value in stages.get("claims", {}).items()},
        }
        words = ", ".join(f"{key} {_short(v)}" for key, v in told.items() if v is not None)
        _say(f"  {variant:24} {words}")
    for stage, headline in summary["stages"].items():
        shown = ", ".join(f"{key} {_short(value)}" for key, value in headline.items())
        _say(f"  {stage:12} {shown}")
    if summary["notes"]:
        _say("Notes")
        for note in summary["notes"]:
            _say(f"  {note['stage']}: {note['text']}")
    reported = summary["stages"].keys() & {"report", "comparison"}
    if (folder / "report.html").is_file() and reported:
        _say(f"Report: {folder / 'report.html'}")


def _print_claims(folder: Path) -> None:
    """The verdicts: a table on a terminal, else a line each."""
    from dsteer.report.claims_tables import HEAD, claim_rows, self_check_words, warning
    from dsteer.store import read_json

    result = read_json(folder / "claims" / "result.json")
    if (alarm := warning(result)) is not None:
        _say(f"WARNING: {alarm}")
    rows = claim_rows(result)
    if sys.stdout.isatty():
        from rich.console import Console

        from dsteer.cli.text import table

        Console().print(table(HEAD, rows))
    else:
        for claim, verdict, number, null in rows:
            _say(f"  {claim}: {verdict}; {number}; null: {null}")
    _say(f"  {self_check_words(result)}")


def _short(value: Any) -> str:
    if value is None:
        return "undefined"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


from dsteer.cli import build as _build  # noqa: E402, F401
from dsteer.cli import compare as _compare  # noqa: E402, F401
from dsteer.cli import exchange as _exchange  # noqa: E402, F401
from dsteer.cli import learn as _learn  # noqa: E402, F401
from dsteer.cli import serve as _serve  # noqa: E402, F401
from dsteer.cli import steer as _steer  # noqa: E402, F401
from dsteer.cli import transfer as _transfer  # noqa: E402, F401
from dsteer.cli import vectors as _vectors  # noqa: E402, F401
