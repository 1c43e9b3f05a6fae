from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsteer.config import PipelineConfig, SyntheticSource
from dsteer.data import load_preferences, read_source
from dsteer.data.jsonl import read_pairs
from dsteer.data.transcript import conversation_key
from dsteer.errors import DataError
from dsteer.progress import SILENT, Reporter
from dsteer.stages import StageContext
from dsteer.stages.data import run
from dsteer.store import hash_file, to_json


def rows(path: Path, count: int) -> Path:
    lines = []
    for number in range(count):
        ask = f"\n\nHuman: Question {number // 2}?\n\nAssistant:"
        lines.append({"chosen": f"{ask} Yes {number}.", "rejected": f"{ask} No."})
    lines.append({"chosen": f"{ask} ", "rejected": f"{ask} No."})
    lines.append(lines[0])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def context(
    folder: Path, sources: list[dict[str, Any]], reporter: Reporter = SILENT, **sections: Any
) -> StageContext:
    splits = {"fit": 6, "tune": 3, "test": 5}
    config = PipelineConfig.model_validate(
        {"name": "t", "data": {"sources": sources, "splits": splits}, **sections}
    )
    return StageContext("data", config, folder, reporter)


def test_the_stage_accounts_for_every_row(tmp_path: Path) -> None:
    source = {"format": "hh-rlhf", "path": str(rows(tmp_path / "rows.jsonl", 30))}
    stream = io.StringIO()
    run_folder = tmp_path / "run"
    result = run(context(run_folder, [source], Reporter("lines", stream=stream)))

    assert result["sources"] == [
        {
            "path": "rows.jsonl",
            "format": "hh-rlhf",
            "identity": f"sha256:{hash_file(tmp_path / 'rows.jsonl')}",
            "rows": 32,
            "kept": 31,
            "dropped": {"empty_answer": 1},
            "messages_skipped": {},
        }
    ]
    assert result["duplicates"] == 1
    cut = result["left_out"].get("conversation_cut", 0)
    assert result["headline"] == {
        "rows": 32,
        "kept": 31,
        "train": 30 - 14 - cut,
        "fit": 6,
        "tune": 3,
        "test": 5,
    }
    assert result["notes"][0] == "rows.jsonl: 32 rows, 31 kept, dropped: empty answer 1"
    for split, described in result["splits"].items():
        path = run_folder / "data" / f"{split}.jsonl"
        pairs = read_pairs(path)
        assert described["sha256"] == hash_file(path)
        assert described["pairs"] == len(pairs)
        assert described["conversations"] == len({pair.conversation for pair in pairs})
        assert {pair.source for pair in pairs} == {"rows.jsonl"}
    assert str(tmp_path) not in to_json(result)
    assert "rows.jsonl: 32 rows, 31 kept" in stream.getvalue()


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", 30)
    first = run(context(tmp_path / "a", [{"format": "hh-rlhf", "path": str(path)}]))
    again = run(context(tmp_path / "b", [{"format": "hh-rlhf", "path": str(path)}]))
    assert first == again
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    run(context(tmp_path / "c", [{"format": "hh-rlhf", "path": str(path)}]))
    for split in first["splits"]:
        texts = [
            [
                (pair.prompt, pair.chosen)
                for pair in read_pairs(tmp_path / run / f"data/{split}.jsonl")
            ]
            for run in "ac"
        ]
        assert texts[0] == texts[1]


def test_prompts_alone_need_no_training_split(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"Question {number}?\n" for number in range(20)))
    source = {"format": "prompts", "path": str(path)}
    result = run(context(tmp_path / "run", [source]))
    assert result["headline"]["train"] == 0
    assert (tmp_path / "run" / "data" / "train.jsonl").read_bytes() == b""
    assert result["left_out"] == {"not_needed": 6}
    with pytest.raises(DataError, match="no pair is left to train on: fit, tune and test take 14"):
        run(context(tmp_path / "run2", [source], base={}))


def test_few_conversations_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ask = "\n\nHuman: Hi.\n\nAssistant:"
    lines = [{"chosen": f"{ask} {number}", "rejected": f"{ask} No."} for number in range(9)]
    lines += [
        {
            "chosen": f"\n\nHuman: Hi {n}.\n\nAssistant: a",
            "rejected": f"\n\nHuman: Hi {n}.\n\nAssistant: b",
        }
        for n in range(20)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in range(200):
        folder = tmp_path / str(seed)
        result = run(context(folder, [{"format": "hh-rlhf", "path": str(path)}], seed=seed))
        if result["splits"]["test"]["conversations"] == 1:
            assert "test: 5 pairs come from only 1 conversations" in result["notes"]
            return
    raise AssertionError("no seed put the long conversation first")


def test_the_synthetic_world_is_a_source(tmp_path: Path) -> None:
    source = SyntheticSource(format="synthetic", conversations=60, seed=3)
    reading = read_source(source)
    assert reading.rows == len(reading.pairs) == 60
    assert all(pair.conversation == conversation_key(pair.prompt) for pair in reading.pairs)
    assert reading.identity == read_source(source).identity
    other = source.model_copy(update={"seed": 4})
    assert reading.identity != read_source(other).identity
    minimal = read_source(source.model_copy(update={"differ": "preferred"}))
    assert minimal.identity != reading.identity
    for pair in minimal.pairs:  # only the openings, so the texts end alike
        assert str(pair.chosen)[-20:] == str(pair.rejected)[-20:]
    settings = {"format": "synthetic", "conversations": 60}
    result = run(context(tmp_path / "run", [settings]))
    assert result["sources"][0]["path"] == "synthetic"
    assert str(result["sources"][0]["identity"]).startswith("synthetic:")
    assert "/" not in read_pairs(tmp_path / "run/data/test.jsonl")[0].source


@pytest.mark.shared_data
def test_the_real_files(tmp_path: Path, shared_data: Path) -> None:
    sources = [
        {"format": "hh-rlhf", "path": str(shared_data / "hh-rlhf-harmless-base-test.jsonl.gz")},
        {"format": "oasst", "path": str(shared_data / "oasst-en-100-trees.jsonl.gz")},
        {"format": "prompts", "path": str(shared_data / "xstest-prompts.csv")},
    ]
    result = run(context(tmp_path, sources))
    assert result["headline"]["rows"] == 2312 + 479 + 450
    assert result["headline"]["kept"] == 2299 + 212 + 450
    placed = sum(result["headline"][split] for split in ("train", "fit", "tune", "test"))
    assert placed + sum(result["left_out"].values()) + result["duplicates"] == 2961


def test_reading_loads_neither_torch_nor_datasets(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", 4)
    assert len(load_preferences(path)) == 5
    code = (
        "import sys, dsteer; "
        f"dsteer.load_preferences({str(path)!r}); "
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
