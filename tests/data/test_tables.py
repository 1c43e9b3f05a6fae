from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from dsteer.config import HHSource, PreferenceSource
from dsteer.data import load_preferences, read_source
from dsteer.data.tables import read_rows
from dsteer.errors import ConfigError, DataError

GOOD: dict[str, Any] = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: What?",
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def problem(path: Path | str, **options: Any) -> str:
    """The one line that a user gets."""
    with pytest.raises(DataError) as caught:
        load_preferences(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------ formats


def test_the_first_row_tells_the_format(tmp_path: Path) -> None:
    assert load_preferences(write(tmp_path / "a.jsonl", HH))[0].chosen == " Hello."
    assert load_preferences(write(tmp_path / "b.jsonl", GOOD))[0].chosen == " blue."
    assert load_preferences(write(tmp_path / "c.jsonl.gz", {"prompt": "x"}))[0].chosen is None
    replies = [
        {"text": text, "role": "assistant", "lang": "en", "rank": rank}
        for rank, text in enumerate(["One.", "Two."])
    ]
    root = {"text": "Hi", "role": "prompter", "lang": "en", "replies": replies}
    assert load_preferences(write(tmp_path / "d.jsonl", {"prompt": root}))[0].chosen == " One."
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    other = [messages[0], {"role": "assistant", "content": "No."}]
    row = {"chosen": messages, "rejected": other}
    assert load_preferences(write(tmp_path / "e.jsonl", row))[0].chosen == "Yes."
    unknown = write(tmp_path / "f.jsonl", {"question": "x"})
    assert problem(unknown).startswith(f"{unknown} line 1: columns of no known format ('question')")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GOOD, {**GOOD, "chosen": None}]), path)
    assert load_preferences(path, limit=1)[0].rejected == " green."
    assert problem(path) == f"{path} row 2: 'chosen' is null, expected text"
    reading = read_source(PreferenceSource(format="preference", path=str(path), limit=1))
    assert (reading.rows, reading.pairs[0].source) == (1, "rows.parquet")
    conversation = [{"role": "user", "content": "Hi"}]
    row = {
        "prompt": conversation,
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert load_preferences(path)[0].prompt == conversation
    path.write_bytes(b"PAR1 not really")
    assert problem(path).startswith(f"{path}: not a Parquet file (")


def test_limit_counts_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": " "}, {**GOOD, "chosen": " x"})
    assert [pair.row for pair in load_preferences(path)] == [0, 2]
    assert [pair.row for pair in load_preferences(path, limit=2)] == [0]


def test_unknown_format_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(
        ConfigError, match="unknown format 'preferences'; did you mean 'preference'"
    ):
        load_preferences(path, format="preferences")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="limit 0: expected"):
        load_preferences(path, limit=0)


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b"", "empty; expected a JSON object, so delete the line"),
        (b"  ", "empty; expected a JSON object, so delete the line"),
        (b"[1]", "expected a JSON object, got list"),
        (b'"text"', "expected a JSON object, got str"),
        (b'{"prompt": "\xff"}', "not UTF-8 text (invalid start byte)"),
        (b'{"prompt": "\\ud83d"}', "half a character (a lone \\ud… surrogate) in a text"),
        (b"[" * 100_000, "JSON that is nested too deeply"),
    ],
)
def test_malformed_lines(tmp_path: Path, name: str, bad: bytes, says: str) -> None:
    path = tmp_path / name
    raw = json.dumps(GOOD).encode() + b"\n" + bad + b"\n" + json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    assert problem(path) == f"{path} line 2: {says}"


def test_json_lines_of_other_editors(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = json.dumps({**GOOD, "chosen": " blue\u2028\U0001f600"}, ensure_ascii=False).encode()
    escaped = json.dumps({**GOOD, "chosen": " \U0001f600"}).encode()  # a whole surrogate pair
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + escaped)
    assert [pair.chosen for pair in load_preferences(path)] == [
        " blue\u2028\U0001f600",
        " \U0001f600",
    ]


def test_a_gzip_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(
        b"".join(json.dumps({**GOOD, "n": n}).encode() + b"\n" for n in range(99))
    )
    for keep in (len(whole) - 4, len(whole) // 2, 12):
        path.write_bytes(whole[:keep])
        assert "a gzip file that is cut short after line" in problem(path)
    path.write_bytes(whole[:-8] + bytes(8))
    assert "can't be read (CRC check failed" in problem(path)
    path.write_bytes(b"plain text")
    assert "can't be read (Not a gzipped file" in problem(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.csv"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert problem(path) == f"{path}: empty, it holds no row"
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert problem(path, format="prompts") == f"{path}: empty, it holds no row"


def test_a_file_without_a_single_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{**GOOD, "chosen": " "}] * 3)
    assert problem(path) == (
        f"{path}: no row makes a pair (empty_answer 3); is its format preference?"
    )


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"prompt,label\none,safe\ntwo\n", "line 3: expected 2 fields, as the header has"),
        (b"prompt\none,safe\n", "line 2: expected 1 fields, as the header has"),
        (b'prompt\none\n"two\n', "line 3: not CSV (unexpected end of data)"),
        (b"prompt\n\xff\n", "after line 1: not UTF-8 text (invalid start byte)"),
        (b"question\none\n", "line 2: no column 'prompt'; found 'question'"),
    ],
)
def test_malformed_csv(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    assert problem(path, format="prompts") == f"{path} {says}"


@pytest.mark.parametrize(
    "path", ["./x.jsonl", "x.jsonl", "data/x.jsonl.gz", "/nowhere/x", "~/nowhere", "a/b/c", "x.csv"]
)
def test_a_path_that_is_not_there_is_no_hub_id(path: str) -> None:
    assert problem(path) == f"{path}: no such file or folder; check the path"


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[]")
    assert problem(path).startswith(f"{path}: unknown kind of file; expected .jsonl, .jsonl.gz,")


# ------------------------------------------------------------------------------ folders


def test_a_folder_is_read_by_subset_and_split(tmp_path: Path) -> None:
    folder = tmp_path / "harmless-base"
    write(folder / "train.jsonl.gz", HH, HH)
    write(folder / "test.jsonl", HH)
    assert len(load_preferences(folder)) == 2
    [pair] = load_preferences(tmp_path, subset="harmless-base", split="test")
    assert pair.source == "test.jsonl"
    source = HHSource(format="hh-rlhf", path=str(tmp_path), subset="harmless-base", split="test")
    assert read_source(source).rows == 1
    assert problem(folder, split="validation") == (
        f"{folder}: no file named after the split 'validation'; found test.jsonl, train.jsonl.gz; "
        "name the file itself"
    )
    assert problem(tmp_path).endswith("found no data file; name the file itself")


def test_files_that_are_named_after_no_split_are_all_read(tmp_path: Path) -> None:
    write(tmp_path / "part-1.jsonl", HH)
    write(tmp_path / "part-2.jsonl", HH, HH)
    pairs = load_preferences(tmp_path)
    assert [(pair.source, pair.row) for pair in pairs] == [
        ("part-1.jsonl", 0),
        ("part-2.jsonl", 0),
        ("part-2.jsonl", 1),
    ]


# ------------------------------------------------------------------------------ hub


def test_an_unknown_hub_id_offline() -> None:
    message = problem("no-such-owner/no-such-dataset", split="test")
    assert message.startswith("'no-such-owner/no-such-dataset': no such local path, and the hub")
    assert "gives no split 'test'" in message


def test_no_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class TransportError(Exception):
        """Stands for those of whichever HTTP library the hub's client uses."""

    def refuse(*_args: object, **_options: object) -> None:
        raise TransportError("name not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    message = problem("owner/name")
    assert "the hub can't be reached (name not known)" in message
    assert "HF_HUB_OFFLINE=1" in message


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, Any]]:
        calls.append({"path": path, **options})
        return [HH if "hh" in path else GOOD]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [pair] = load_preferences("Anthropic/hh-rlhf", subset="harmless-base", split="test")
    assert (pair.chosen, pair.source, pair.row) == (" Hello.", "Anthropic/hh-rlhf", 0)
    assert calls.pop() == {
        "path": "Anthropic/hh-rlhf",
        "data_dir": "harmless-base",
        "split": "test",
        "revision": None,
    }
    source = PreferenceSource(format="preference", path="me/prefs", subset="big", revision="v1")
    reading = read_source(source)
    assert (reading.rows, reading.identity) == (1, None)
    assert calls == [{"path": "me/prefs", "name": "big", "split": "train", "revision": "v1"}]
    row = next(read_rows("me/prefs"))
    assert row.where == "me/prefs row 1"


def test_an_hh_folder_of_the_hub_is_found_by_datasets_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data_dir` picks a folder; the text that Arrow gives back is the file's, byte for byte."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    odd = {key: text + "\u2028\r\n\x0b é \U0001f600  " for key, text in HH.items()}
    write(tmp_path / "hub" / "harmless-base" / "test.jsonl.gz", HH, odd)
    write(tmp_path / "hub" / "helpful-base" / "test.jsonl.gz", {"other": 1})
    table = datasets.load_dataset(
        str(tmp_path / "hub"),
        data_dir="harmless-base",
        split="test",
        cache_dir=str(tmp_path / "cache"),
    )
    assert list(table) == [HH, odd]
