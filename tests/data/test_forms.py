"""The same conversation raw and through the chat template, and what has not both forms."""

from __future__ import annotations

import pytest
from planted import BOS, PROMPTS, TEMPLATE, byte_tokenizer

from dsteer.data.forms import BothForms, both_forms
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import ModelError

CONVERSATION = [
    {"role": "user", "content": "Name three rivers."},
    {"role": "assistant", "content": "The Nile."},
    {"role": "user", "content": "Two more?"},
]


def texts(found: BothForms, form: str, tokenizer=None) -> list[str]:
    tokenizer = tokenizer or byte_tokenizer()
    return [tokenizer.decode(item.ids) for item in getattr(found, form)]


def test_forms_of_texts() -> None:
    found = both_forms(byte_tokenizer(), PROMPTS, most=100)
    assert found.kept == tuple(range(8))
    assert found.dropped == {}
    assert texts(found, "raw") == [BOS + prompt for prompt in PROMPTS]
    expected = f"{BOS}<user>Name three rivers.\n<assistant>The Nile.\n<user>Two more?\n<assistant>"
    assert texts(found, "templated")[2] == expected
    assert texts(found, "templated")[5] == f"{BOS}<user>a\n<assistant>", "a plain text is one turn"
    for items in (found.raw, found.templated):
        for item in items:
            assert item.ids.count(0) == 1, "one BOS"
            assert item.prompt_length == len(item.ids)


@pytest.mark.parametrize("cue", [[], [{"role": "assistant", "content": ""}]])
def test_messages_and_their_transcript_have_the_same_forms(cue: list) -> None:
    found = both_forms(byte_tokenizer(), [CONVERSATION + cue, PROMPTS[2]], most=2)
    assert found.raw[0] == found.raw[1]
    assert found.templated[0] == found.templated[1]


def test_pairs_give_their_prompt_alone() -> None:
    pair = PreferencePair(PROMPTS[0], " Boil it.", " No.")
    assert both_forms(byte_tokenizer(), [pair], most=1) == both_forms(
        byte_tokenizer(), PROMPTS[:1], most=1
    )


REFUSING = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + TEMPLATE


@pytest.mark.parametrize(
    ("rule", "prompt"),
    [
        ("ends_elsewhere", "\n\nHuman: Hi\n\nAssistant: Hello."),
        ("ends_elsewhere", "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?"),
        ("ends_elsewhere", "\n\nHuman: Hi\n\nAssistant:  "),
        ("ends_elsewhere", [*CONVERSATION[:1], {"role": "assistant", "content": "Hello."}]),
        ("no_transcript", [{"role": "system", "content": "Be brief."}, *CONVERSATION[:1]]),
        ("no_transcript", [{"role": "user", "content": "a\n\nHuman: b"}]),
        ("no_transcript", "A preface.\n\nHuman: Hi\n\nAssistant:"),
        ("template_refuses", PROMPTS[2]),
        ("template_refuses", CONVERSATION),
        ("template_refuses", []),
        ("too_long", "\n\nHuman: " + "x" * 60 + "\n\nAssistant:"),
    ],
)
def test_rules(rule: str, prompt: Prompt) -> None:
    found = both_forms(byte_tokenizer(REFUSING), [prompt, PROMPTS[1]], most=5, max_tokens=64)
    assert found.dropped == {rule: 1}
    assert found.kept == (1,)
    assert len(found.raw) == len(found.templated) == 1


def test_too_long_counts_the_longer_form() -> None:
    raw = len(PROMPTS[1]) + 1
    header = byte_tokenizer("{{ bos_token }}" + "h" * raw + "{{ messages[0]['content'] }}")
    assert both_forms(header, PROMPTS[1:2], most=1, max_tokens=raw).dropped == {"too_long": 1}
    assert both_forms(header, PROMPTS[1:2], most=1, max_tokens=raw + 3).dropped == {}
    short = byte_tokenizer("{{ bos_token }}{{ messages[0]['content'] }}")
    assert both_forms(short, PROMPTS[1:2], most=1, max_tokens=raw - 1).dropped == {"too_long": 1}


def test_stops_at_the_number_asked_for() -> None:
    answered = "\n\nHuman: Hi\n\nAssistant: Hello."
    found = both_forms(byte_tokenizer(), [answered, *PROMPTS[:2], answered, *PROMPTS[2:]], most=2)
    assert found.kept == (1, 2)
    assert found.dropped == {"ends_elsewhere": 1}, "what is not looked at is not counted"


def test_no_template() -> None:
    with pytest.raises(ModelError, match="has no chat template"):
        both_forms(byte_tokenizer(None), PROMPTS, most=1)
