"""Which ids and which template both models read."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import PROMPTS, TEMPLATE, byte_tokenizer, tiny_llama
from transformers import PreTrainedTokenizerFast

from dsteer.activations.extract import encode_for, extract
from dsteer.errors import DataError, ModelError
from dsteer.models import pair as pair_module
from dsteer.models.load import load_tokenizer, quiet, with_template
from dsteer.models.pair import ModelPair

OTHER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def save(folder: Path, tokenizer: PreTrainedTokenizerFast | None, vocab_size: int = 260) -> Path:
    with quiet():
        tiny_llama(vocab_size=vocab_size).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def grown(*tokens: str, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def swapped(folder: Path) -> Path:
    """The tokens 'a' and 'b' change their ids in a saved tokenizer."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    vocabulary = byte_tokenizer().get_vocab()
    for token, other in (("a", "b"), ("b", "a")):
        here, there = f'"{token}": {vocabulary[token]}', f'"{token}": -{vocabulary[other]}'
        assert text.count(here) == 1
        text = text.replace(here, there)
    path.write_text(text.replace(": -", ": "), encoding="utf-8")
    return folder


def pair_of(base: Path, tuned: Path, **options: object) -> ModelPair:
    return ModelPair.load(base, tuned, device="cpu", **options)


def test_much_larger_vocabulary_with_the_same_ids(tmp_path: Path) -> None:
    base = save(tmp_path / "base", byte_tokenizer())
    added = [f"<new{number}>" for number in range(140)]
    tuned = save(tmp_path / "tuned", grown(*added), vocab_size=400)
    pair = pair_of(base, tuned)
    assert pair.vocabulary == 260
    assert len(extract(pair, PROMPTS).encoded) == len(PROMPTS)
    assert "has 140 tokens that the base's lacks" in pair.notes[0]
    assert "vocabularies differ (260 and 400 tokens)" in pair.notes[1]


def test_sizes_alone_decide_without_two_tokenizers(tmp_path: Path) -> None:
    base = save(tmp_path / "base", byte_tokenizer())
    with pytest.raises(ModelError, match=r"260 tokens.*has 400; .*a tokenizer beside each model"):
        pair_of(base, save(tmp_path / "large", None, vocab_size=400))
    assert pair_of(base, save(tmp_path / "near", None, vocab_size=264)).vocabulary == 260


def test_ids_that_disagree(tmp_path: Path) -> None:
    base = save(tmp_path / "base", byte_tokenizer())
    tuned = swapped(save(tmp_path / "tuned", byte_tokenizer()))
    number = min(byte_tokenizer().convert_tokens_to_ids(["a", "b"]))
    pair = pair_of(base, tuned)
    with pytest.raises(ModelError, match=rf"id {number} is 'a' in .*base and 'b' in .*models\.tok"):
        _ = pair.tokenizer
    # A tokenizer that is named is taken as it is.
    assert pair_of(base, tuned, tokenizer=base).tokenizer("a")["input_ids"] == [0, number]
    large = swapped(save(tmp_path / "large", byte_tokenizer(), vocab_size=400))
    with pytest.raises(ModelError, match=f"id {number} is 'a'"):
        pair_of(base, large)


def test_ids_above_the_shared_range_may_differ(tmp_path: Path) -> None:
    base = save(tmp_path / "base", grown("<one>", "<two>"), vocab_size=264)
    tuned = save(tmp_path / "tuned", grown("<one>", "<other>"))
    assert pair_of(base, tuned).tokenizer.convert_tokens_to_ids("<two>") == 260


def test_each_tokenizer_is_loaded_once_and_late(tmp_path: Path, monkeypatch) -> None:
    base = save(tmp_path / "base", byte_tokenizer())
    tuned = save(tmp_path / "tuned", byte_tokenizer())
    loaded: list[str] = []

    def load(path: str, **options: object) -> object:
        loaded.append(Path(path).name)
        return load_tokenizer(path, **options)

    monkeypatch.setattr(pair_module, "load_tokenizer", load)
    pair = pair_of(base, tuned)
    assert loaded == []
    _ = pair.tokenizer, pair.tokenizer, pair.tokenizer_for("chat")
    assert loaded == ["base", "tuned"]


# ---------------------------------------------------------------------------------- templates


def test_template_of_the_tuned_model_where_the_base_has_none(tmp_path: Path) -> None:
    base = save(tmp_path / "base", byte_tokenizer(None))
    tuned = save(tmp_path / "tuned", grown("<user>", template=TEMPLATE))
    pair = pair_of(base, tuned)
    raw = encode_for(pair, PROMPTS[:1], template="none")
    assert not any("read prompts through the template" in note for note in pair.notes)
    chat = encode_for(pair, PROMPTS[:1], template="chat")
    own = load_tokenizer(tuned)
    text = "<s><user>How do I boil an egg?\n<assistant>"
    assert list(chat[0].ids) == own(text, add_special_tokens=False)["input_ids"]
    assert own.convert_tokens_to_ids("<user>") in chat[0].ids  # one id, which the base has
    assert raw[0].ids == tuple(load_tokenizer(base)(PROMPTS[0])["input_ids"])
    assert sum("read prompts through the template" in note for note in pair.notes) == 1
    _ = extract(pair, PROMPTS, template="chat")
    assert sum("read prompts through the template" in note for note in pair.notes) == 1


def test_template_that_writes_tokens_which_the_base_lacks(tmp_path: Path) -> None:
    base = save(tmp_path / "base", byte_tokenizer(None))
    tuned = save(tmp_path / "tuned", grown("<one>", "<user>", template=TEMPLATE), vocab_size=264)
    pair = pair_of(base, tuned)
    with pytest.raises(ModelError, match=r"writes '<user>' \(id 260\).*only 260 tokens; give a te"):
        encode_for(pair, PROMPTS, template="chat")
    assert len(encode_for(pair, PROMPTS)) == len(PROMPTS)
    given = tmp_path / "plain.jinja"
    given.write_text(OTHER, encoding="utf-8")
    assert len(encode_for(pair_of(base, tuned, chat_template=given), PROMPTS, template="chat"))


def test_template_that_writes_tokens_of_rows_which_nothing_trained(tmp_path: Path) -> None:
    """The base's embedding is padded, so the ids exist, and its tokenizer has no such token."""
    writes = TEMPLATE.replace("<{{ m['role'] }}>", "<user>")
    base = save(tmp_path / "base", byte_tokenizer(None), vocab_size=264)
    told = {}
    for name, tokenizer in (("new", grown("<user>", template=writes)), ("old", byte_tokenizer())):
        pair = pair_of(base, save(tmp_path / name, tokenizer, vocab_size=264))
        for _ in range(2):
            encode_for(pair, PROMPTS[:1], template="chat")
        told[name] = [note for note in pair.notes if "training never saw" in note]
    assert told["old"] == []
    (note,) = told["new"]
    assert "writes '<user>', which the tokenizer of the base lacks" in note


def test_given_template_is_that_of_both(tmp_path: Path) -> None:
    base = save(tmp_path / "base", byte_tokenizer())
    given = tmp_path / "other.jinja"
    given.write_text(OTHER, encoding="utf-8")
    tokenizer = byte_tokenizer()
    for source, options in ((given, {}), (given, {"tokenizer": tokenizer}), (base, {})):
        pair = pair_of(base, base, chat_template=source, **options)
        assert pair.tokenizer.chat_template == (OTHER if source == given else TEMPLATE)
    assert tokenizer.chat_template == TEMPLATE  # the caller's own is not changed
    made = encode_for(pair_of(base, base, chat_template=given), PROMPTS[:1], template="chat")
    assert pair.tokenizer.decode(made[0].ids) == "[user] How do I boil an egg?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}", r"no Jinja \(line 1: .*endfor"),
        (b"", "has no chat template; expected a Jinja file"),
        (b"\xff\xfe", "can't be read .*utf-8.*expected a Jinja file"),
    ],
)
def test_broken_template_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        with_template(byte_tokenizer(), path)
    assert "\n" not in str(caught.value)


def test_templates_that_are_nowhere(tmp_path: Path) -> None:
    byte_tokenizer(None).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="bare has no chat template"):
        with_template(byte_tokenizer(), tmp_path / "bare")
    with pytest.raises(ModelError, match="no tokenizer could be loaded there"):
        with_template(byte_tokenizer(), tmp_path / "absent")
    refusing = tmp_path / "refusing.jinja"  # is no broken file: the prompt is at fault
    refusing.write_text("{{ raise_exception('no such role') }}", encoding="utf-8")
    tokenizer = with_template(byte_tokenizer(), refusing)
    pair = ModelPair.load(tiny_llama(), tiny_llama(), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"prompt 0: the chat template .* refuses it"):
        encode_for(pair, PROMPTS, template="chat")
