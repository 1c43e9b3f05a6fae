"""Plan a pipeline, skip what is identical, run the rest, resume what was cut off.

A stage's identity is its fingerprint: the hash of its name and version, the config values that it
reads, the identity of its outside inputs (files, hub commits) and its upstreams' fingerprints.
"""

from __future__ import annotations

import errno
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dsteer import __version__
from dsteer.config import PipelineConfig, nulls_of, resolved, select
from dsteer.errors import ConfigError, DsteerError, StoreError, did_you_mean
from dsteer.names import is_local, split_gguf, split_revision
from dsteer.parallel import ALONE, Ranks, join, place, share_batch, started_alone
from dsteer.progress import SILENT, Reporter
from dsteer.stages import (
    BY_NAME,
    NULLS_FOLDER,
    STAGES,
    Stage,
    StageContext,
    call,
    needs,
    planned,
)
from dsteer.store import Json, Run, hash_json, identify, read_json, write_json

Action = Literal["skip", "run", "resume", "redo", "wait"]

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers",
            "safetensors", "numpy", "scipy", "matplotlib")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One stage of a plan.

    Attributes:
        stage: the row of the table.
        identity: what the fingerprint is the hash of.
        fingerprint: names exactly this work.
        action: skip (identical and complete), resume (cut off), redo (something changed), run
            (never ran), wait (not asked for now).
        why: the reason for people.
    """

    stage: Stage
    identity: Mapping[str, Json]
    fingerprint: str
    action: Action
    why: str


# ---------------------------------------------------------------------------------- planning


def outside_inputs(stage: str, config: PipelineConfig) -> dict[str, str | None]:
    """The identity of each file, folder or hub id that a stage reads from outside the run.

    Raises:
        ConfigError: a local file or folder is named that does not exist.
    """
    found: dict[str, str | None] = {}

    def add(key: str, path: str | None, revision: str | None, kind: str) -> None:
        if path is not None:
            path, at = split_revision(path)
            repository, file = split_gguf(path)
            # A GGUF file on the hub is identified by its repository's commit.
            named = path if file is None or is_local(path) else repository
            require_local(key, named)
            if is_local(named) and (revision or at):
                raise ConfigError(
                    f"{key}: {named} at revision {revision or at}: a local path has no revisions; "
                    "drop it, or name the hub id"
                )
            found[key] = identify(named, revision=revision or at, kind=kind)
            if kind == "model":
                add_adapter_bases(key, path)

    def add_adapter_bases(key: str, path: str) -> None:
        """The models that an adapter on disk was trained on, down to the one without an adapter."""
        seen = {path}
        while (base := _adapter_base(path)) is not None and base not in seen:
            seen.add(base)
            key, (path, at) = f"{key}.adapter_base", split_revision(base)
            found[key] = identify(path, revision=at)

    models = config.models
    if stage == "data":
        for index, source in enumerate(config.data.sources):
            if source.format != "synthetic":
                add(f"data.sources.{index}.path", source.path, source.revision, "dataset")
    if stage in {"dpo", "activations", "template", "control"}:
        add("models.base", models.base, models.base_revision, "model")
        add("models.tokenizer", models.tokenizer, None, "model")
        add("models.chat_template", models.chat_template, None, "model")
    if stage in {"activations", "template"}:
        add("models.tuned", models.tuned, models.tuned_revision, "model")
    if stage in {"interpolation", "inversion"}:
        sweep, behaviour = getattr(config, stage), config.behaviour
        if sweep.samples not in {"auto", "test", "benign", "none"}:
            add(f"{stage}.samples", sweep.samples, None, "dataset")
        add("behaviour.reward_model", behaviour.reward_model, None, "model")
        if behaviour.toxicity is not None:
            add("behaviour.toxicity.classifier", behaviour.toxicity.classifier, None, "model")
        if behaviour.truthfulqa is not None:
            add("behaviour.truthfulqa.path", behaviour.truthfulqa.path, None, "dataset")
    if stage == "transfer" and config.transfer is not None:
        sender = config.transfer
        add("transfer.base", sender.base, sender.base_revision, "model")
        add("transfer.tuned", sender.tuned, sender.tuned_revision, "model")
        add("transfer.tokenizer", sender.tokenizer, None, "model")
        add("transfer.vectors", sender.vectors, None, "model")
        if sender.text is not None and sender.text.format != "synthetic":
            add("transfer.text.path", sender.text.path, sender.text.revision, "dataset")
    return found


def _adapter_base(path: str) -> str | None:
    """The model that an adapter on disk says it was trained on; None of anything else."""
    try:
        text = (Path(path).expanduser() / "adapter_config.json").read_text(encoding="utf-8")
        base = json.loads(text).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None  # no adapter, or one whose loading tells what it lacks
    return base if isinstance(base, str) and base else None


_FILE_SUFFIXES = {
    ".jsonl", ".json", ".gz", ".csv", ".txt", ".parquet", ".yaml", ".jinja", ".j2", ".gguf",
    ".safetensors",
}  # fmt: skip


def require_local(key: str, path: str) -> None:
    """Refuse what can only be meant as a local path and isn't there."""
    local = Path(path).expanduser()
    meant_local = path.startswith(("/", "./", "../", "~")) or local.suffix in _FILE_SUFFIXES
    if meant_local and not local.exists():
        raise ConfigError(
            f"{key}: {path}: no such file or folder; give a path that exists, or a hub id"
        )


def check_stages(
    config: PipelineConfig, *, until: str | None, only: str | None, force: str | None
) -> None:
    """Refuse names of stages that there are not.

    Raises:
        ConfigError: a stage is named that does not exist or that the pipeline does not configure.
    """
    for option, name in (("--until", until), ("--only", only), ("--force", force)):
        _check_stage(option, name, planned(config))


def make_plan(
    config: PipelineConfig,
    run: Run,
    *,
    until: str | None = None,
    only: str | None = None,
    force: str | None = None,
) -> list[Step]:
    """Decide for each configured stage what would be done now. Loads no weights.

    Raises:
        ConfigError: a stage is named that does not exist or that the pipeline does not configure,
            or a local input is missing.
    """
    check_stages(config, until=until, only=only, force=force)
    identities = identify_stages(config, run)
    return _decide_all(run, identities, until=until, only=only, force=force)


def identify_stages(config: PipelineConfig, run: Run | None = None) -> dict[str, dict[str, Json]]:
    """What the fingerprint of each configured stage is the hash of.

    Args:
        config: the pipeline.
        run: its run, in which its nulls lie; a stage that reads them depends on what of them is
            complete there.

    Raises:
        ConfigError: a local input is missing.
    """
    identities: dict[str, dict[str, Json]] = {}
    for stage in planned(config):
        identities[stage.name] = {
            "stage": stage.name,
            "version": stage.version,
            "config": select(config, stage.reads),
            "inputs": outside_inputs(stage.name, config),
            "upstream": {
                other.name: hash_json(identities[other.name]) for other in needs(stage, config)
            },
        }
        if stage.reads_nulls and config.nulls:
            identities[stage.name]["nulls"] = {
                name: complete_stages(null, Run(run.path / NULLS_FOLDER / name)) if run else {}
                for name, null in nulls_of(config).items()
            }
    return identities


def complete_stages(config: PipelineConfig, run: Run) -> dict[str, Json]:
    """The stages that are complete as the pipeline is now, each with the hashes of what it wrote.

    The report is not among them: nothing reads it.
    """
    found: dict[str, Json] = {}
    for name, identity in identify_stages(config, run).items():
        folder, fingerprint = run.stage(name), hash_json(identity)
        if name != "report" and folder.state(fingerprint) == "complete":
            outputs = (folder.record() or {}).get("outputs")
            found[name] = {"fingerprint": fingerprint, "outputs": outputs}
    return found


def _decide_all(
    run: Run,
    identities: Mapping[str, Mapping[str, Json]],
    *,
    until: str | None,
    only: str | None,
    force: str | None,
) -> list[Step]:
    names = list(identities)
    last = names.index(until) if until is not None else len(names) - 1
    steps: dict[str, Step] = {}
    for index, (name, identity) in enumerate(identities.items()):
        stage, fingerprint = BY_NAME[name], hash_json(identity)
        action, why = _decide(run, stage, identity, fingerprint)
        again = [other for other in identity["upstream"] if steps[other].action != "skip"]
        if name == force:
            action, why = "redo", "forced"
        elif again and action == "skip":
            # Its inputs are written again: on another machine they need not be the same bytes.
            action, why = "redo", f"{again[0]} runs again"
        asked = name == only if only is not None else index <= last
        if not asked and action != "skip":
            action = "wait"
        steps[name] = Step(stage, identity, fingerprint, action, why)
    return list(steps.values())


def _check_stage(option: str, name: str | None, stages: Sequence[Stage]) -> None:
    if name is None or any(stage.name == name for stage in stages):
        return
    if name in BY_NAME:
        raise ConfigError(
            f"{option} {name}: this pipeline does not configure that stage; add a `{name}:` section"
        )
    raise ConfigError(
        f"{option} {name}: no such stage{did_you_mean(name, [stage.name for stage in STAGES])}"
    )


def _decide(
    run: Run, stage: Stage, identity: Mapping[str, Json], fingerprint: str
) -> tuple[Action, str]:
    folder = run.stage(stage.name)
    state = folder.state(fingerprint)
    if state == "complete":
        return "skip", "identical and complete"
    if state == "partial":
        return "resume", folder.why_partial()
    if state == "absent":
        return "run", "not run yet"
    return "redo", _what_changed(folder.record(), identity)


def _what_changed(record: Mapping[str, Json] | None, identity: Mapping[str, Json]) -> str:
    if record is None or "identity" not in record:
        return "left unfinished under other settings"
    before = record["identity"]
    changed = [
        f"{path} was {old!r}, is {new!r}"
        for path, old, new in _differences(before["config"], identity["config"])
    ]
    for part, words in (("inputs", "has other content"), ("upstream", "changes")):
        changed += [
            f"{key} {words}"
            for key, value in identity[part].items()
            if before[part].get(key) != value
        ]
    if before.get("version") != identity["version"]:
        changed.insert(0, "dsteer's own stage changed")
    return "; ".join(changed[:3]) or "its outputs are incomplete"


def _differences(old: Json, new: Json, path: str = "") -> list[tuple[str, Json, Json]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            found
            for index, (left, right) in enumerate(zip(old, new, strict=True))
            for found in _differences(left, right, f"{path}.{index}")
        ]
    return [(path, old, new)] if old != new else []


# ---------------------------------------------------------------------------------- running


def run_pipeline(
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
    """Run a pipeline into a folder and return its summary.

    Where a launcher started several processes, all call this. The first one plans, holds the lock,
    writes and speaks; the others take part in the stages that are distributed. They share the
    folder, and an error of one ends all.

    Raises:
        DsteerError: anything that the user can mend; what was complete stays.
    """
    ranks = join()
    with ranks.one_fate(), _storage_explained(out):
        place(ranks, config.models.device, config.models.device_map)
        if ranks.main:
            if started_alone():
                reporter.line(
                    "accelerate started one process only: without several cards it needs "
                    "--multi_gpu for more (torchrun starts them in any case)"
                )
            _lead(config, yaml_text, Run(out), overrides, until, only, force, reporter, ranks)
        else:
            _follow(config, Run(out), ranks)
    return read_json(out / "summary.json")


@contextmanager
def _storage_explained(out: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into one clear line."""
    try:
        yield
    except DsteerError:
        raise
    except Exception as error:
        trouble = storage_trouble(error, out)
        if trouble is None:
            raise
        raise StoreError(trouble) from error


def _lead(
    config: PipelineConfig,
    yaml_text: str,
    run: Run,
    overrides: Sequence[str],
    until: str | None,
    only: str | None,
    force: str | None,
    reporter: Reporter,
    ranks: Ranks,
) -> None:
    """Plan, lock, take step by step, and keep the records."""
    run.check(config.name)
    steps = make_plan(config, run, until=until, only=only, force=force)
    if only is not None:
        require_inputs(only, steps, config)
    trains = any(s.stage.name == "dpo" and s.action not in {"skip", "wait"} for s in steps)
    if config.dpo is not None and trains:  # told now, not after the base was trained
        share_batch(config.dpo.batch_size, config.dpo.gradient_accumulation, ranks.world)
    with run.lock():
        run.claim(config.name, yaml_text)
        # Another run may have finished a stage since; the identities stand.
        identities = {step.stage.name: step.identity for step in steps}
        steps = _decide_all(run, identities, until=until, only=only, force=force)
        for step in steps:
            _take(step, steps, config, run, overrides, reporter, ranks)
        _write_records(config, run, steps, overrides)
    ranks.broadcast(None)


def _follow(config: PipelineConfig, run: Run, ranks: Ranks) -> None:
    """Take part in the stages that the first process calls out, until it has no more."""
    while (name := ranks.broadcast(None)) is not None:
        call(StageContext(name, config, run.path, SILENT, ranks))


def require_inputs(only: str, steps: Sequence[Step], config: PipelineConfig) -> None:
    """Refuse to run one stage alone whose inputs are not there.

    Raises:
        StoreError: naming them.
    """
    needed = {stage.name for stage in needs(BY_NAME[only], config)}
    missing = [s.stage.name for s in steps if s.stage.name in needed and s.action != "skip"]
    if missing:
        raise StoreError(
            f"--only {only}: its inputs are missing or out of date ({', '.join(missing)}); "
            f"run --until {only} instead"
        )


def _take(
    step: Step,
    steps: Sequence[Step],
    config: PipelineConfig,
    run: Run,
    overrides: Sequence[str],
    reporter: Reporter,
    ranks: Ranks,
) -> None:
    name = step.stage.name
    if step.action in {"skip", "wait"}:
        if step.action == "skip":
            reporter.line(f"{name}: {step.why}, skipped")
        return
    reporter.line(f"{name}: {step.stage.does} ({step.why})")
    folder = run.stage(name)
    for other in _readers(name, steps):
        run.stage(other).invalidate()
    if step.action == "redo":
        folder.clear()
    folder.begin(step.fingerprint)
    # The report reads the manifest and the summary, so they are brought up to date before it runs.
    _write_records(config, run, steps, overrides)
    ranks = ranks if step.stage.distributed else ALONE
    ranks.broadcast(name)
    context = StageContext(name, config, run.path, reporter, ranks)
    _reset_peak_memory()
    start = time.monotonic()
    result = call(context)
    record = {
        "identity": step.identity,
        "version": step.stage.version,
        "seconds": round(time.monotonic() - start, 2),
        "peak_memory_bytes": _peak_memory(),
        "resumed": step.action == "resume",
        "processes": ranks.world,
    }
    folder.finish(step.fingerprint, result, record)
    reporter.line(f"{name}: done in {record['seconds']:.1f} s")


def _readers(name: str, steps: Sequence[Step]) -> list[str]:
    """The stages that read a stage, directly or through others."""
    found = {name}
    for step in steps:
        if found & step.identity["upstream"].keys():
            found.add(step.stage.name)
    return sorted(found - {name})


_RECORDED = ("fingerprint", "version", "seconds", "peak_memory_bytes", "resumed", "processes",
             "outputs")  # fmt: skip


def _write_records(
    config: PipelineConfig, run: Run, steps: Sequence[Step], overrides: Sequence[str]
) -> None:
    """Write manifest.json and summary.json from the stages that are complete and up to date."""
    complete = [s for s in steps if run.stage(s.stage.name).state(s.fingerprint) == "complete"]
    records = {step.stage.name: run.stage(step.stage.name).record() or {} for step in complete}
    manifest = {
        **manifest_head(config, overrides),
        "inputs": {k: v for step in steps for k, v in step.identity["inputs"].items()},
        "stages": {
            name: {key: record.get(key) for key in _RECORDED} for name, record in records.items()
        },
    }
    results = {name: read_json(run.stage(name).result_path) for name in records}
    if "data" in results:
        manifest["data"] = {
            key: results["data"].get(key) for key in ("sources", "duplicates", "left_out", "splits")
        }
    write_json(run.path / "manifest.json", manifest)
    summary = {
        "run": config.name,
        "stages": {name: result["headline"] for name, result in results.items()},
        "notes": [
            {"stage": name, "text": text}
            for name, result in results.items()
            for text in result["notes"]
        ],
    }
    write_json(run.path / "summary.json", summary)


def manifest_head(config: PipelineConfig, overrides: Sequence[str]) -> dict[str, Json]:
    """What every manifest says of the program, the machine and the pipeline."""
    commit, dirty = _git_state()
    return {
        "name": config.name,
        "description": config.description,
        "dsteer_version": __version__,
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device(config),
        "config": resolved(config),
        "overrides": list(overrides),
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _device(config: PipelineConfig) -> str:
    """The device that was asked for, and what `auto` meant if torch is loaded by now."""
    device = config.models.device
    torch = sys.modules.get("torch")
    if device == "auto" and torch is not None:
        if torch.cuda.is_available():
            return f"cuda ({torch.cuda.get_device_name()})"
        if torch.backends.mps.is_available():
            return "mps"
        return f"cpu ({torch.get_num_threads()} threads)"
    return device


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of dsteer's own checkout; None where it is installed from a wheel."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return None, None
    try:
        commit = _git(package, "rev-parse", "HEAD")
        # What a run writes is not a change of the program.
        changes = _git(package, "status", "--porcelain", "--", "..", ":(exclude,top)results")
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changes)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _reset_peak_memory() -> None:
    """Start the kernel's high-water mark anew, so that each stage has its own (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> dict[str, int]:
    """Peak resident memory of this process, and of the GPU where one was used, in bytes."""
    peak: dict[str, int] = {}
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                peak["host"] = int(line.split()[1]) * 1024
    else:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def storage_trouble(error: Exception, out: Path) -> str | None:
    """One line if an exception comes from a full, read-only or forbidden disk; else None."""
    if isinstance(error, OSError):
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return f"{out}: the disk is full; free some space and run the same command again"
        if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
            where = error.filename or out
            return f"{where}: can't be written ({error.strerror}); choose another --out"
    existing = next((path for path in (out, *out.resolve().parents) if path.exists()), None)
    # Libraries wrap a full disk into errors of their own; the disk itself tells.
    full = existing is not None and shutil.disk_usage(existing).free < 1 << 20
    if full or "No space left on device" in str(error):
        return f"{out}: the disk is full; free some space and run the same command again"
    return None
