"""Names of models: ids, paths, revisions, GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsteer.names import is_local, split_gguf, split_revision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ("gpt2", None)),
        ("gpt2@main", ("gpt2", "main")),
        ("meta-llama/Llama-3.1-8B@0e9e39f", ("meta-llama/Llama-3.1-8B", "0e9e39f")),
        ("owner/name@refs/pr/7", ("owner/name", "refs/pr/7")),
        ("owner/name@v1.0@x", ("owner/name", "v1.0@x")),
        ("owner/name:q4.gguf@abc", ("owner/name:q4.gguf", "abc")),
        ("owner/name/sub/q4.gguf@abc", ("owner/name/sub/q4.gguf", "abc")),
        ("owner/name@", ("owner/name@", None)),
        ("a/b/c@d", ("a/b/c@d", None)),  # no id has three parts
        ("./a@b", ("./a@b", None)),
        ("/home/me@work/model", ("/home/me@work/model", None)),
        ("~/a@b", ("~/a@b", None)),
    ],
)
def test_revision(name: str, expected: tuple[str, str | None]) -> None:
    assert split_revision(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name:q4.gguf", ("owner/name", "q4.gguf")),
        ("owner/name:sub/q4.gguf", ("owner/name", "sub/q4.gguf")),
        ("owner/name/q4.gguf", ("owner/name", "q4.gguf")),
        ("owner/name/sub/q4.gguf", ("owner/name", "sub/q4.gguf")),
        ("owner/model.gguf", ("owner/model.gguf", None)),
        ("/models/q4.gguf", ("/models", "q4.gguf")),
        ("./q4.gguf", (".", "q4.gguf")),
    ],
)
def test_gguf(name: str, expected: tuple[str, str | None]) -> None:
    assert split_gguf(name) == expected


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("owner/name@v1")
    (tmp_path / "owner" / "name@v1").mkdir(parents=True)
    assert is_local("owner/name@v1")
    assert split_revision("owner/name@v1") == ("owner/name@v1", None)
    (tmp_path / "owner" / "name" / "q4.gguf").parent.mkdir()
    (tmp_path / "owner" / "name" / "q4.gguf").write_bytes(b"")
    assert split_gguf("owner/name/q4.gguf") == ("owner/name", "q4.gguf")
    assert split_gguf("owner/name/other.gguf") == ("owner/name", "other.gguf")
