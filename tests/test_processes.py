"""Real processes on one run, under torchrun and accelerate: same results, kills, mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from dsteer.config import read_pipeline
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.store import hash_file, read_json, read_tensors

pytestmark = pytest.mark.slow

# 192 pairs: an epoch of whole batches, so that none has to be filled up.
YAML = """
name: shared
data:
  sources: [{format: synthetic, conversations: 360}]
  splits: {fit: 120, tune: 24, test: 24}
models: {device: cpu}
base:
  model: {vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}
  steps: 4
  batch_size: 4
  context_length: 64
dpo: {max_steps: 16, batch_size: 8, log_every: 2, eval_every: 2, eval_pairs: 8,
      checkpoint_every: 5, learning_rate: 3.0e-3, max_length: 256}
activations: {batch_tokens: 128}
vector: {bootstrap: 100}
"""
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0")  # fmt: skip
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", "0")  # fmt: skip


def launch(launcher: Sequence[str], *what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def start(folder: Path, out: Path, launcher: Sequence[str] = TORCHRUN) -> subprocess.Popen[str]:
    (folder / "shared.yaml").write_text(YAML)
    return launch(launcher, "-m", "dsteer", "run", str(folder / "shared.yaml"), "--out", str(out))


def run_alone(out: Path, **options: str) -> None:
    run_pipeline(read_pipeline(YAML), YAML, out, reporter=SILENT, **options)  # type: ignore[arg-type]


def outputs(run: Path, *stages: str) -> dict[str, str]:
    return {
        f"{stage}/{name}": digest
        for stage in stages
        for name, digest in read_json(run / stage / "stage.json")["outputs"].items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    run_alone(out)
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    process = start(folder, folder / "run")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("shared → ") == 1, "one process speaks"
    assert stderr.count("data: done in") == 1
    assert "Warning" not in stderr
    return folder / "run"


def test_training_is_that_of_one_process(alone: Path, together: Path) -> None:
    assert outputs(alone, "data", "base") == outputs(together, "data", "base")
    one, two = (read_json(run / "dpo" / "result.json") for run in (alone, together))
    # the reference is read in batches of another size: float32 rounds otherwise
    assert two["first_loss"] == pytest.approx(one["first_loss"], abs=2e-6)
    for curve in ("train", "heldout"):
        assert len(one["curve"][curve]) > 5
        for a, b in zip(one["curve"][curve], two["curve"][curve], strict=True):
            assert a["step"] == b["step"]
            # sums over a batch in another order, float32, through 16 steps of Adam
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
            assert b["reward_margin"] == pytest.approx(a["reward_margin"], abs=1e-4)
    # the loss falls by hundreds of times what they may differ by
    assert min(point["loss"] for point in one["curve"]["heldout"]) < one["first_loss"] - 0.03
    assert two["freeze"] == one["freeze"]
    assert two["pairs"] == one["pairs"]
    assert two["notes"] == one["notes"]
    assert not list(together.rglob("checkpoints"))
    records = read_json(together / "manifest.json")["stages"]
    assert [name for name, record in records.items() if record["processes"] == 2] == [
        "dpo", "activations",
    ]  # fmt: skip


def test_rows_are_those_of_one_process(alone: Path, together: Path, tmp_path: Path) -> None:
    one, two = (outputs(run, "activations") for run in (alone, together))
    same = {name for name in one if one[name] == two[name]}
    assert same >= {"activations/base.safetensors", "activations/response_base.safetensors",
                    "activations/ids.safetensors", "activations/response.json"}  # fmt: skip
    assert "activations/tuned.safetensors" in one.keys() - same, "trained apart by rounding"
    vectors = [read_tensors(run / "vector" / "vectors.safetensors") for run in (alone, together)]
    for site, vector in vectors[0].items():
        assert vectors[1][site] == pytest.approx(vector, abs=1e-4)
    # of the very same models everything is the same
    import shutil

    again = tmp_path / "run"
    shutil.copytree(together, again)
    run_alone(again, force="activations")
    assert outputs(again, "activations", "vector") == outputs(together, "activations", "vector")


def wait_for(process: subprocess.Popen[str], path: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(item.stat().st_size for item in path.glob(pattern)):
            return
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()}"
        time.sleep(0.002)
    raise AssertionError(f"no {pattern} within two minutes")


def kill(process: subprocess.Popen[str], rank: int) -> None:
    """Kill one of the processes as the system would, and wait for the launcher to notice."""
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(rank):
            child.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_killing_one_process_changes_nothing(together: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(tmp_path, run)
    wait_for(process, run, "dpo/checkpoints/checkpoint-*/complete.json")
    kill(process, 1)
    assert not (run / "dpo" / "stage.json").exists()
    process = start(tmp_path, run)
    wait_for(process, run, "activations/base.safetensors.journal.1")
    kill(process, 0)
    assert not (run / "activations" / "stage.json").exists()
    run_alone(run)  # the training of two, the reading of two and one
    assert outputs(run, "dpo", "activations") == outputs(together, "dpo", "activations")
    assert hash_file(run / "summary.json") == hash_file(together / "summary.json")
    assert not [path for pattern in ("*.journal*", "*.partial") for path in run.rglob(pattern)]


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    for launcher, mistake in ((ACCELERATE, "dpo.bta=1"), (TORCHRUN, "dpo.batch_size=7")):
        (tmp_path / "shared.yaml").write_text(YAML)
        process = launch(
            launcher, "-m", "dsteer", "run", str(tmp_path / "shared.yaml"), mistake,
            "--out", str(tmp_path / "run"),
        )  # fmt: skip
        stdout, stderr = process.communicate(timeout=120)
        # the launchers turn any failure into 1; dsteer's own 2 is in their report
        assert process.returncode == 1
        assert "exitcode  : 2" in stderr
        told = [line for line in stderr.splitlines() if line.startswith("dsteer")]
        assert len(told) == 2, stderr  # the second is the launcher's "dsteer FAILED"
        assert "dpo.b" in stderr.partition("dsteer FAILED")[0]
        assert stdout == ""
        assert not (tmp_path / "run").exists()
