"""Text becomes ids once: exactly one BOS, no EOS, cut on the left of the prompt."""

from __future__ import annotations

import pytest
from planted import BOS, EOS, byte_tokenizer

from dsteer.data.tokens import Encoded, encode, hash_ids
from dsteer.data.types import Message, PreferencePair
from dsteer.errors import DataError, ModelError

HH = "\n\nHuman: Hi\n\nAssistant:"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def text_of(tokenizer, item: Encoded) -> str:
    return tokenizer.decode(item.ids)


def test_text_stands_as_it_is_behind_one_bos(tokenizer) -> None:
    (item,) = encode(tokenizer, [HH])
    assert item.ids[0] == tokenizer.bos_token_id
    assert item.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in item.ids
    assert text_of(tokenizer, item) == BOS + HH
    assert (item.prompt_length, item.truncated) == (len(item.ids), False)
    assert len(item.ids) == 1 + len(HH)  # one token a byte


def test_text_that_begins_with_bos_gets_no_second(tokenizer) -> None:
    assert encode(tokenizer, [BOS + HH]) == encode(tokenizer, [HH])


def test_tokenizer_that_adds_eos_is_not_obeyed() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    plain = encode(tokenizer, [HH])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    assert tokenizer(HH)["input_ids"][-1] == 1
    assert encode(tokenizer, [HH]) == plain


def test_tokenizer_without_bos_gets_none() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    (item,) = encode(tokenizer, ["abc"])
    assert len(item.ids) == 3


def test_messages_go_through_the_template_with_one_bos(tokenizer) -> None:
    messages = [Message(role="user", content="Hi")]
    (item,) = encode(tokenizer, [messages])
    assert text_of(tokenizer, item) == f"{BOS}<user>Hi\n<assistant>"
    assert item.ids.count(tokenizer.bos_token_id) == 1
    # the empty turn that stands for the answer to come is the same prompt
    open_turn = [*messages, Message(role="assistant", content="")]
    assert encode(tokenizer, [open_turn]) == [item]


def test_chat_template_reads_a_transcript_by_its_turns(tokenizer) -> None:
    text = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:"
    (item,) = encode(tokenizer, [text], template="chat")
    assert text_of(tokenizer, item) == f"{BOS}<user>A\n<assistant>B\n<user>C\n<assistant>"
    (other,) = encode(tokenizer, ["no transcript"], template="chat")
    assert text_of(tokenizer, other) == f"{BOS}<user>no transcript\n<assistant>"


def test_chat_without_a_template_is_refused_and_messages_become_a_transcript() -> None:
    tokenizer = byte_tokenizer(template=None)
    with pytest.raises(ModelError, match=r"no chat template.*template 'none'"):
        encode(tokenizer, [HH], template="chat")
    messages = [Message(role="user", content="Hi")]
    assert encode(tokenizer, [messages]) == encode(tokenizer, [HH])


def test_prompt_that_ends_with_an_answer_is_refused(tokenizer) -> None:
    closed = [Message(role="user", content="Hi"), Message(role="assistant", content="Hello")]
    with pytest.raises(DataError, match="prompt 0 ends with an answer"):
        encode(tokenizer, [closed])


def test_template_that_refuses_a_prompt_names_it() -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('only one turn') }}")
    with pytest.raises(DataError, match=r"prompt 1: the chat template.*only one turn"):
        encode(tokenizer, ["plain", [Message(role="user", content="Hi")]])


def test_left_of_the_prompt_is_cut_behind_the_bos(tokenizer) -> None:
    (item,) = encode(tokenizer, ["abcdefgh"], max_tokens=4)
    assert text_of(tokenizer, item) == BOS + "fgh"
    assert (item.prompt_length, item.truncated) == (4, True)
    (whole,) = encode(tokenizer, ["abc"], max_tokens=4)
    assert (text_of(tokenizer, whole), whole.truncated) == (BOS + "abc", False)


def test_answer_follows_the_same_prompt_ids(tokenizer) -> None:
    pair = PreferencePair(prompt=HH, chosen=" Good day.", rejected=" What.")
    (prompt,) = encode(tokenizer, [pair])
    (item,) = encode(tokenizer, [pair], response="chosen")
    assert item.ids[: item.prompt_length] == prompt.ids
    assert text_of(tokenizer, item) == BOS + HH + " Good day."
    (short,) = encode(tokenizer, [pair], response="chosen", response_tokens=3)
    assert text_of(tokenizer, short) == BOS + HH + " Go"
    # the answer is never cut: the prompt gives way
    (cut,) = encode(tokenizer, [pair], response="chosen", max_tokens=14)
    assert text_of(tokenizer, cut) == BOS + HH[-3:] + " Good day."
    assert (cut.prompt_length, cut.truncated) == (4, True)


def test_tokens_that_merge_across_the_prompts_end_keep_the_prompts_ids() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    )
    (item,) = encode(tokenizer, [PreferencePair(prompt="aa", chosen="bb")], response="chosen")
    assert item == Encoded((0, 0, 1, 1), 2)  # joint tokenisation would give a, ab, b


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["fine", PreferencePair(prompt="x")], {"response": "chosen"}, "prompt 0 has no chosen"),
        ([PreferencePair(prompt="x", chosen="")], {"response": "chosen"}, "no chosen answer"),
        (
            [PreferencePair(prompt="x", chosen="long answer")],
            {"response": "chosen", "max_tokens": 5},
            "leaves no room.*raise max_tokens",
        ),
    ],
)
def test_bad_prompts_are_named(tokenizer, prompts, options, message) -> None:
    with pytest.raises(DataError, match=message):
        encode(tokenizer, prompts, **options)


def test_empty_prompt_without_bos_is_refused() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        encode(tokenizer, ["a", ""])


def test_hash_sees_ids_their_order_and_where_prompts_end() -> None:
    one, two = Encoded((1, 2, 3), 3), Encoded((4,), 1)
    assert hash_ids([one, two]) == hash_ids([Encoded((1, 2, 3), 3), Encoded((4,), 1)])
    others = [
        [two, one],
        [one],
        [Encoded((1, 2, 3), 2), two],
        [Encoded((1, 2), 2), Encoded((3, 4), 1)],
    ]
    assert len({hash_ids([one, two]), *map(hash_ids, others)}) == 5
