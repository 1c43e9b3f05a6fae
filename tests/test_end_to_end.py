"""The shipped `tiny` pipeline, shortened: whole, killed at every stage, interrupted, changed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsteer.store import hash_file, read_json

pytestmark = pytest.mark.slow

SHORT = (
    "data.sources.0.conversations=500",
    "data.splits={fit: 64, tune: 32, test: 48}",
    "base.model={vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}",
    "base.steps=30", "base.batch_size=8", "base.log_every=5", "base.checkpoint_every=5",
    "dpo.max_steps=24", "dpo.batch_size=8", "dpo.log_every=4", "dpo.eval_every=8",
    "dpo.eval_pairs=16", "dpo.checkpoint_every=4",
    "activations.batch_tokens=256",
    "vector.bootstrap=100", "cosine.bootstrap=100", "cosine.null_draws=40",
    "geometry.gradient_pairs=8", "geometry.bootstrap=100",
    "learned.steps=4", "learned.batch_size=4", "learned.eval_every=2", "learned.tune_pairs=8",
    "learned.pairs=8", "learned.bootstrap=100",
    *(
        f"{stage}.{setting}"
        for stage in ("profile", "rank", "maps", "strength")
        for setting in ("pairs=8", "tune_pairs=4", "fit_pairs=8", "response_tokens=8",
                        "bootstrap=100")
    ),
    "profile.random_pairs=2", "rank.random_pairs=2", "rank.most=4", "claims.bootstrap=100",
    *(
        f"{stage}.{setting}"
        for stage in ("interpolation", "inversion")
        for setting in (
            "pairs=16", "prompts=8", "range_prompts=4", "sample_prompts=4", "points=9",
            "random_directions=2", "random_generations=1", "max_new_tokens=16", "bootstrap=100",
        )
    ),
)  # fmt: skip


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dsteer", "run", "tiny", *SHORT, *more, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(out: Path, *more: str) -> tuple[str, str]:
    process = start(out, *more)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout, stderr


def outputs(run: Path) -> dict[str, str]:
    """Hash of every file that a run's stages vouch for, and of the summary."""
    found = {"summary.json": hash_file(run / "summary.json")}
    for record in sorted(run.glob("*/stage.json")):
        stage = record.parent
        for name, digest in read_json(record)["outputs"].items():
            assert hash_file(stage / name) == digest
            found[f"{stage.name}/{name}"] = digest
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    stdout, stderr = finish(out)
    assert "Report:" in stdout
    assert "Traceback" not in stderr
    assert "Warning" not in stderr, f"a clean run warns of nothing: {stderr}"
    return out


def test_a_run_leaves_everything(undisturbed: Path) -> None:
    for name in ("pipeline.yaml", "manifest.json", "summary.json", "report.html"):
        assert (undisturbed / name).stat().st_size > 0
    for stage, figure in {
        "base": "learning_curve", "dpo": "learning_curve", "vector": "kl_recovery",
        "cosine": "fig3_cosine", "spectrum": "fig4a_entropy", "geometry": "fig1c_clouds",
        "interpolation": "fig2a_interpolation", "inversion": "fig2b_inversion",
    }.items():  # fmt: skip
        for suffix in ("png", "pdf", "json"):
            assert (undisturbed / stage / "figures" / f"{figure}.{suffix}").stat().st_size > 0
    freeze = read_json(undisturbed / "dpo" / "result.json")["freeze"]
    assert freeze["input"]["before"] == freeze["input"]["after"]
    assert freeze["output"]["before"] == freeze["output"]["after"]
    here = str(undisturbed)
    for path in undisturbed.rglob("*.json"):
        assert here not in path.read_text(encoding="utf-8"), f"{path.name} holds a machine's path"
    assert here not in (undisturbed / "report.html").read_text(encoding="utf-8")
    assert not list(undisturbed.rglob("checkpoints")), "scaffolding is gone"
    assert not list(undisturbed.rglob("*.tmp"))
    assert not list(undisturbed.rglob("*.partial"))


def test_same_config_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    finish(tmp_path / "again", "--quiet")
    assert outputs(tmp_path / "again") == outputs(undisturbed)


def wait_for(process: subprocess.Popen[str], run: Path, patterns: Sequence[str]) -> None:
    """Wait until a file that matches one of the patterns exists in the run."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(next(run.glob(pattern), None) for pattern in patterns):
            return
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()}"
        time.sleep(0.002)
    raise AssertionError(f"no {patterns} within two minutes")


def test_kill_9_in_every_stage_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    moments = [
        ["data/partial.json"],
        ["base/checkpoints/*.safetensors"],  # in the middle of training the base
        ["dpo/partial.json"],
        ["dpo/checkpoints/checkpoint-*/complete.json"],  # in the middle of DPO
        ["activations/*.tmp", "activations/*.partial", "activations/partial.json"],
        ["vector/partial.json"],
        ["spectrum/partial.json"],
        ["geometry/partial.json"],
        ["interpolation/checkpoints/texts-v.jsonl"],  # in the middle of a sweep
        ["inversion/checkpoints/range-0.jsonl"],
        ["report/partial.json"],
    ]
    for patterns in moments:
        process = start(run)
        wait_for(process, run, patterns)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (run / "report" / "stage.json").exists()
    _, stderr = finish(run)
    assert "data: identical and complete, skipped" in stderr
    assert outputs(run) == outputs(undisturbed)


def test_ctrl_c_leaves_a_resumable_run(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "interrupted"
    process = start(run)
    wait_for(process, run, ["base/checkpoints/*.safetensors"])
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in stderr
    assert "Traceback" not in stderr
    _, stderr = finish(run)
    assert "cut off before it was complete" in stderr
    assert outputs(run) == outputs(undisturbed)


def test_one_changed_key_reruns_only_what_reads_it(tmp_path: Path, undisturbed: Path) -> None:
    import shutil

    run = tmp_path / "changed"
    shutil.copytree(undisturbed, run)
    before = outputs(run)
    _, stderr = finish(run, "cosine.bootstrap=120")
    ran = re.findall(r"^(\w+): done in", stderr, flags=re.MULTILINE)
    assert ran == [
        "cosine", "rank", "maps", "strength", "cosine", "report",  # the null `self`: the last two
        "claims", "report",
    ]  # fmt: skip
    after = outputs(run)
    changed = {name for name in after if after[name] != before.get(name)}
    left = {name for name in changed if not name.startswith(("cosine/", "claims/"))}
    assert left <= {"summary.json", "report/result.json"}


def test_report_is_drawn_again_from_artifacts_alone(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(undisturbed, run, ignore=shutil.ignore_patterns("model", "*.jsonl"))
    before = (run / "report.html").read_bytes()
    for path in (*run.rglob("figures"), run / "report.html"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = subprocess.run(
        [sys.executable, "-m", "dsteer", "report", str(run)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("report.html")
    assert (run / "report.html").read_bytes() == before
    assert (run / "cosine" / "figures" / "fig3_cosine.pdf").is_file()


def test_compare_gives_the_numbers_of_the_pipeline_that_trained_the_models(
    undisturbed: Path, tmp_path: Path
) -> None:
    """The same two models, named instead of trained: every number of every stage is the same."""
    out = tmp_path / "compared"
    settings = [s for s in SHORT if not s.startswith(("base.", "dpo."))]
    yaml = "data.sources.0={format: synthetic, conversations: 500, axes: {polite: 1.0}, differ: preferred}"  # noqa: E501
    process = subprocess.run(
        [sys.executable, "-m", "dsteer", "compare", str(undisturbed / "base" / "model"),
         str(undisturbed / "dpo" / "model"), "--data", "synthetic", "--limit", "500",
         "--device", "cpu", "--out", str(out), yaml, *settings, "behaviour.beta=2.0",
         "interpolation.temperature=1.0", "inversion.temperature=1.0",
         "interpolation.baselines=[amplify, noise]"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    measuring = ("vector", "cosine", "spectrum", "geometry", "interpolation", "inversion")
    for stage in ("activations", *measuring):
        trained, named = (read_json(run / stage / "result.json") for run in (undisturbed, out))
        for result in (trained, named):
            del result["notes"]  # they say whether this run trained the model
        assert named == trained, stage
    assert (out / "report.html").stat().st_size > 0
