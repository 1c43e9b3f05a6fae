"""The stages `base` and `dpo` in a run folder: results, words, kills."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsteer.config import PipelineConfig
from dsteer.data.jsonl import write_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError
from dsteer.progress import SILENT
from dsteer.stages import StageContext, call
from dsteer.store import StageFolder, to_json

SETTINGS = {
    "name": "small",
    "data": {"sources": [{"format": "synthetic"}]},
    "models": {"device": "cpu"},
    "base": {
        "model": {
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "max_position_embeddings": 128,
        },
        "steps": 60, "batch_size": 8, "context_length": 64, "warmup_steps": 5,
        "learning_rate": 1e-2, "checkpoint_every": 20,
    },
    "dpo": {
        "beta": 0.5, "learning_rate": 2e-3, "batch_size": 8, "max_length": 64, "max_steps": 30,
        "log_every": 5, "eval_every": 10, "checkpoint_every": 10,
    },
}  # fmt: skip


def make_pairs(name: str, n: int, *, coin: bool = False) -> list[PreferencePair]:
    pairs = []
    for row in range(n):
        digest = hashlib.sha256(f"{name} {row}".encode()).digest()
        a, b = digest[0], digest[1]
        answers = f" Gladly, {a + b} it is.", f" Go away, {b} is dull."
        if coin and digest[2] % 2:
            answers = answers[1], answers[0]
        prompt = f"\n\nHuman: What is {a} and {b}?\n\nAssistant:"
        pairs.append(PreferencePair(prompt, *answers, f"{name}{row}", "made", row))
    return pairs


def context(run: Path, stage: str, changes: dict | None = None) -> StageContext:
    settings = json.loads(json.dumps(SETTINGS))
    for section, values in (changes or {}).items():
        settings[section] = {**settings[section], **values}
    return StageContext(stage, PipelineConfig.model_validate(settings), run, SILENT)


def write_data(run: Path, *, coin: bool = False, test: list[PreferencePair] | None = None) -> None:
    for name, n in (("train", 160), ("fit", 8), ("tune", 24), ("test", 60)):
        pairs = make_pairs(name, n, coin=coin)
        if name == "test" and test is not None:
            pairs = test
        write_pairs(run / "data" / f"{name}.jsonl", pairs)


def finish(run: Path, stage: str, changes: dict | None = None) -> dict:
    """Run a stage and finish its folder as the runner does."""
    result = call(context(run, stage, changes))
    StageFolder(run / stage).finish("fingerprint", result, {})
    return json.loads(to_json(result))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_data(folder)
    finish(folder, "base")
    finish(folder, "dpo")
    return folder


def result_of(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "result.json").read_text())


def test_the_result_of_base(run) -> None:
    result = result_of(run, "base")
    assert result["headline"]["parameters"] == result["parameters"]["total"]
    assert result["parameters"]["embedding"] == 2 * 320 * 32
    assert result["architecture"]["num_hidden_layers"] == 2
    assert result["tokens_seen"] == 60 * 8 * 64
    assert result["curve"][-1]["step"] == 60
    assert 0 < result["heldout_loss"] < 0.7 * result["curve"][0]["loss"]
    assert (run / "base" / "model" / "model.safetensors").is_file()
    assert (run / "base" / "figures" / "learning_curve.png").is_file()


def test_the_result_of_dpo(run) -> None:
    result = result_of(run, "dpo")
    assert result["learned"] is True
    assert result["notes"] == []
    accuracy = result["test"]["reward_accuracy"]
    assert accuracy["low"] > 0.5
    assert accuracy["n"] == result["test"]["n"] == 60
    assert result["headline"] == {
        "reward_accuracy": accuracy["value"],
        "reward_margin": result["test"]["reward_margin"]["value"],
        "kl_to_base": result["kl_to_base"]["value"],
        "learned": "yes",
    }
    assert result["kl_to_base"]["low"] > 1e3 * result["kl_noise_floor"] >= 0
    assert abs(result["first_loss"] - 0.693147) < 1e-5
    assert result["freeze"]["input"]["unchanged"]
    assert result["freeze"]["output"]["unchanged"]
    assert result["parameters"]["changed_share"] > 0.9
    assert [point["step"] for point in result["curve"]["heldout"]] == [10, 20, 30]
    assert (run / "dpo" / "figures" / "learning_curve.png").is_file()


def test_results_hold_nothing_of_this_machine_or_moment(run) -> None:
    for stage in ("base", "dpo"):
        found = [path for path in (run / stage).rglob("*") if "checkpoints" not in path.parts]
        files = [path for path in found if path.suffix in {".json", ".jinja"}]
        assert files
        for path in files:
            text = path.read_text()
            for trace in (str(run), str(Path.cwd()), "runtime", "_per_second"):
                assert trace not in text, path


def test_coin_flipped_labels_teach_nothing_and_the_result_says_so(tmp_path) -> None:
    write_data(tmp_path, coin=True)
    finish(tmp_path, "base", {"base": {"steps": 30}})
    result = finish(tmp_path, "dpo", {"dpo": {"max_steps": 12, "learning_rate": 1e-4}})
    assert result["learned"] is False
    assert result["headline"]["learned"] == "no"
    assert any(note.startswith("Training learned nothing that holds") for note in result["notes"])


def test_a_test_split_without_answers(run, tmp_path) -> None:
    write_data(tmp_path, test=[PreferencePair("\n\nHuman: Hi\n\nAssistant:", source="s")])
    (tmp_path / "base").symlink_to(run / "base")
    result = finish(tmp_path, "dpo", {"dpo": {"max_steps": 2, "lora": {"rank": 2}}})
    assert result["test"] == {"reward_accuracy": None, "reward_margin": None, "n": 0}
    assert result["learned"] is None
    assert any("no answers" in note for note in result["notes"])
    assert any("LoRA of rank 2" in note for note in result["notes"])
    assert (tmp_path / "dpo" / "model" / "adapter_model.safetensors").is_file()


def test_a_tune_split_too_small_for_a_held_out_loss(tmp_path) -> None:
    write_data(tmp_path)
    write_pairs(tmp_path / "data" / "tune.jsonl", [PreferencePair("just a prompt")])
    result = finish(tmp_path, "base", {"base": {"steps": 2}})
    assert result["heldout_loss"] is None
    assert result["headline"]["heldout_perplexity"] is None
    assert any("No held-out loss" in note for note in result["notes"])


def test_a_context_beyond_the_model_is_refused(tmp_path) -> None:
    write_data(tmp_path)
    with pytest.raises(ConfigError, match=r"base\.context_length: 256 tokens, but base\.model"):
        finish(tmp_path, "base", {"base": {"context_length": 256}})


# The process kills itself (SIGKILL: nothing is cleaned up) at the nth call of a function.
DIES = """
import os, signal, sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_dpo_stage as stages

where, count = sys.argv[3].rsplit(":", 1)
module, name = where.rsplit(".", 1)
inner, left = getattr(import_module(module), name), [int(count)]

def wrapped(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kwargs)

setattr(import_module(module), name, wrapped)
for stage in ("base", "dpo"):
    if not (Path(sys.argv[2]) / stage / "result.json").exists():
        stages.finish(Path(sys.argv[2]), stage)
"""

DEATHS = [
    "dsteer.training.language_model._rate:33",  # base: between two checkpoints
    "dsteer.training.dpo.mark_complete:2",  # dpo: a checkpoint is written but not vouched for
]


def assert_same_files(run: Path, other: Path, stage: str) -> None:
    for path in sorted((run / stage).rglob("*")):
        scaffolding = "checkpoints" in path.parts  # the runner removes them with the last mark
        if path.is_file() and path.suffix not in {".png", ".pdf"} and not scaffolding:
            twin = other / path.relative_to(run)
            assert twin.read_bytes() == path.read_bytes(), path.relative_to(run)


@pytest.mark.slow
def test_sigkill_then_the_same_command_ends_with_the_same_bytes(run, tmp_path) -> None:
    write_data(tmp_path)
    command = [sys.executable, "-c", DIES, str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for death in DEATHS:
        done = subprocess.run(
            [*command, death], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    last = subprocess.run(
        [*command, "dsteer.store.hash_file:999"], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert last.returncode == 0, last.stderr
    for stage in ("base", "dpo"):
        assert_same_files(run, tmp_path, stage)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        ("base", "dsteer.stages.base.mean_loss"),  # trained and saved, result missing
        ("dpo", "dsteer.training.dpo.write_json"),  # model saved, account of the training missing
        ("dpo", "dsteer.stages.dpo.evaluate"),  # trained, not yet measured
    ],
)
def test_a_stage_cut_off_after_its_training(stage, moment, run, tmp_path, monkeypatch) -> None:
    def dies(*_args: object, **_kwargs: object) -> None:
        raise Killed

    write_data(tmp_path)
    if stage == "dpo":
        (tmp_path / "base").symlink_to(run / "base")
    with monkeypatch.context() as patch:
        patch.setattr(moment, dies)
        with pytest.raises(Killed):
            finish(tmp_path, stage)
    finish(tmp_path, stage)
    assert_same_files(run, tmp_path, stage)
