from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.types import Message, PreferencePair
from dsteer.errors import DataError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
messages = st.lists(
    st.builds(lambda role, text: Message(role=role, content=text), st.just("user"), texts),
    max_size=3,
)
pairs = st.builds(
    PreferencePair,
    prompt=texts | messages,
    chosen=st.none() | texts,
    rejected=st.none() | texts,
    conversation=texts,
    source=texts,
    row=st.integers(-1, 9),
    tags=st.dictionaries(texts, texts, max_size=3),
)


@given(st.lists(pairs, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pairs_survive_the_file(tmp_path: Path, written: list[PreferencePair]) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, written)
    assert read_pairs(path) == written
    assert path.read_bytes().count(b"\n") == len(written)


def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match="can't be read"):
        read_pairs(path)
    for line in ['{"chosen": "a"}', '{"prompt": "a", "answer": "b"}']:
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=f"^{path} line 1: not a preference pair"):
            read_pairs(path)
