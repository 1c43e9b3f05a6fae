"""A study over processes ends as one over none: the same bytes, what is shared done once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsteer.config import read_pipeline
from dsteer.errors import ConfigError, StudyError
from dsteer.progress import SILENT
from dsteer.store import Json, read_json
from dsteer.study import run_study

YAML = """
name: small
data:
  sources: [{format: synthetic, conversations: 120}]
  splits: {fit: 16, tune: 8, test: 8}
models: {device: cpu}
base:
  model: {vocab_size: 400, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
          num_attention_heads: 2, num_key_value_heads: 2}
  steps: 3
  batch_size: 4
  context_length: 64
dpo: {max_steps: 3, batch_size: 4, learning_rate: 1.0e-3, max_length: 160, eval_pairs: 4}
activations: {batch_tokens: 2048, response_tokens: 0}
vector: {bootstrap: 20, convergence_draws: 2}
variants:
  slow: {dpo.learning_rate: 1.0e-3}
  fast: {dpo.learning_rate: 2.0e-3}
"""


def go(out: Path, jobs: int, text: str) -> Json:
    return run_study(read_pipeline(text), text, out, jobs=jobs, reporter=SILENT)


def test_the_same_bytes_what_is_shared_once_and_a_failure_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = YAML + "  broken: {dpo.loss_type: nosuch}\n"
    for jobs in (1, 2):
        with pytest.raises(StudyError, match=r"1 of 3 variants failed \(broken"):
            go(tmp_path / str(jobs), jobs, text)
    alone, spread = (read_json(tmp_path / jobs / "summary.json") for jobs in ("1", "2"))
    assert alone == spread
    for name in ("slow", "fast"):
        for file in ("vector/vectors.safetensors", "dpo/model/model.safetensors"):
            one, two = (tmp_path / jobs / "variants" / name / file for jobs in ("1", "2"))
            assert one.read_bytes() == two.read_bytes()
    bases = [
        read_json(tmp_path / "2" / "variants" / name / "base" / "stage.json")["seconds"]
        for name in ("slow", "fast")
    ]
    assert bases[0] == bases[1], "the record of one training, taken over"


def test_what_is_shared_behind_what_is_not_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base with texts of its own does not read the variants' data, which differ."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = YAML.replace(
        "  steps: 3\n", "  steps: 3\n  texts: {format: synthetic, conversations: 40}\n"
    )
    text = text.replace("slow: {dpo.learning_rate: 1.0e-3}", "few: {data.splits.fit: 12}")
    text = text.replace("fast: {dpo.learning_rate: 2.0e-3}", "fewer: {data.splits.fit: 10}")
    run_study(read_pipeline(text), text, tmp_path / "run", until="base", jobs=2, reporter=SILENT)
    records = [
        read_json(tmp_path / "run" / "variants" / name / "base" / "stage.json")
        for name in ("few", "fewer")
    ]
    assert records[0] == records[1], "the record of one training, taken over"


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--jobs 2 does not go with --force"):
        run_study(read_pipeline(YAML), YAML, tmp_path, jobs=2, force="vector", reporter=SILENT)


def test_a_folder_that_is_not_a_variants_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_study(read_pipeline(YAML), YAML, tmp_path / "run", until="data", reporter=SILENT)
    for name in ("slow", "fast"):
        shutil.rmtree(tmp_path / "run" / "variants" / name)
    stray = tmp_path / "run" / "variants" / "slow" / "stray"
    stray.parent.mkdir(parents=True)
    stray.write_text("x")
    with pytest.raises(StudyError, match=r"1 of 2 variants failed \(slow: .*is not empty"):
        run_study(
            read_pipeline(YAML), YAML, tmp_path / "run", until="data", jobs=2, reporter=SILENT
        )
    assert (tmp_path / "run" / "variants" / "fast" / "data" / "result.json").is_file()
