"""A conversation: what the model is asked, what commands change, and what a limit drops."""

from __future__ import annotations

import pytest
import torch
from planted import byte_tokenizer, tiny_llama

from dsteer.errors import ConfigError, DataError
from dsteer.steering.answer import answer
from dsteer.steering.chat import HELP, STOPS, Chat, stops_for
from dsteer.steering.decode import Decoding
from dsteer.steering.dials import Dial, Dials
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

MODEL = tiny_llama()
TEMPLATED, BARE = byte_tokenizer(), byte_tokenizer(template=None)
GENERATOR = torch.Generator().manual_seed(5)
SET = SteeringVectorSet(
    [SteeringVector(torch.randn(32, generator=GENERATOR), f"resid_post.{k}") for k in (1, 2)]
)


def chat(tokenizer: object = TEMPLATED, new: int = 8, **settings: object) -> Chat:
    dials = Dials(MODEL, [Dial("a", SET, "resid_post.1", 1.0), Dial("b", SET, "resid_post.2", 0.0)])
    return Chat(MODEL, tokenizer, dials, Decoding(new), **settings)  # type: ignore[arg-type]


def by_hand(ids: list[int], dials: Dials, tokenizer: object = TEMPLATED) -> str:
    """The answer to ids that the test wrote itself."""
    from dsteer.data.tokens import Encoded

    prompt = Encoded(tuple(ids), len(ids))
    acting = dials.interventions([dials.strengths])
    stops = stops_for(tokenizer)
    return answer(MODEL, tokenizer, prompt, acting, Decoding(8, stop=stops))[0].text


def spelled(text: str) -> list[int]:
    return TEMPLATED(text, add_special_tokens=False)["input_ids"]


def test_turns_go_through_the_template() -> None:
    talk = chat(system="Be brief.")
    first = talk.ask("Hi").answers[0].text
    assert first == by_hand(spelled("<s><system>Be brief.\n<user>Hi\n<assistant>"), talk.dials)
    second = talk.ask("And?").answers[0].text
    so_far = f"<s><system>Be brief.\n<user>Hi\n<assistant>{first.strip()}\n"
    assert second == by_hand(spelled(so_far + "<user>And?\n<assistant>"), talk.dials)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_a_transcript_without_a_template() -> None:
    talk = chat(BARE)
    first = talk.ask("Hi").answers[0].text
    head = [0, *spelled("\n\nHuman: Hi\n\nAssistant:")]
    assert first == by_hand(head, talk.dials, BARE)
    assert stops_for(BARE, ("x",)) == ("x", *STOPS)
    assert stops_for(TEMPLATED, ("x",)) == ("x",)
    with pytest.raises(ConfigError, match="a system message needs a chat template"):
        talk.command("/system Be brief.")
    with pytest.raises(ConfigError, match="a system message needs a chat template"):
        chat(BARE, system="Be brief.")


def test_comparing_answers_one_conversation_twice() -> None:
    talk, plain, steered = chat(compare=True), chat(), chat()
    plain.command("/strength 0")
    pieces: dict[int, str] = {0: "", 1: ""}

    def tell(row: int, piece: str) -> None:
        pieces[row] += piece

    both = talk.ask("Hi", tell=tell).answers
    assert both[0].text == pieces[0] == plain.ask("Hi").answers[0].text
    assert both[1].text == pieces[1] == steered.ask("Hi").answers[0].text
    assert both[0].text != both[1].text
    assert talk.messages == steered.messages


def test_each_message_has_its_own_draws() -> None:
    dials = chat().dials
    talk = Chat(MODEL, TEMPLATED, dials, Decoding(8, temperature=1.0))
    first = talk.ask("Hi").answers
    talk.command("/reset")
    assert talk.messages == []
    assert talk.ask("Hi").answers != first
    again = Chat(MODEL, TEMPLATED, dials, Decoding(8, temperature=1.0))
    assert again.ask("Hi").answers == first


def test_the_oldest_turns_go_where_the_limit_is() -> None:
    """256 positions and 8 new tokens; the lengths are those of the text, one token a byte."""
    talk, whole, total = chat(), [], 0
    for letter in "abcdef":
        whole.append({"role": "user", "content": letter * 60})

        def tokens(first: int) -> int:
            turns = (f"<{m['role']}>{m['content']}\n" for m in whole[first:])
            return 1 + len("".join(turns).encode()) + len("<assistant>")

        total = next(first for first in range(total, 12, 2) if tokens(first) + 8 <= 256)
        assert talk.ask(letter * 60).dropped == total
        whole.append(talk.messages[-1])
        assert talk.messages == whole[total:]
    assert total >= 4  # the limit was reached more than once
    with pytest.raises(DataError, match=r"tokens and 8 new ones exceed the 256"):
        talk.ask("e" * 300)
    assert talk.messages == whole[total:]  # as it was


def test_commands() -> None:
    talk = chat()
    assert talk.command("/strength 2") == "a 2 at resid_post.1, b 2 at resid_post.2"
    assert talk.command("/strength b -0.5") == "a 2 at resid_post.1, b -0.5 at resid_post.2"
    assert talk.command("/layer 2") == "a 2 at resid_post.2, b -0.5 at resid_post.2"
    assert talk.command("/layer a 1") == "a 2 at resid_post.1, b -0.5 at resid_post.2"
    assert talk.command("/compare").endswith("on")
    assert talk.compare
    assert talk.command("/compare").endswith("off")
    norm = float(SET["resid_post.1"].tensor.norm())
    assert f"a  resid_post.1  norm {norm:.4g}  strength 2" in talk.command("/vectors")
    assert talk.command("/system  Be brief. ") == "system message set"
    assert talk.command("/system") == "system message removed"
    assert talk.command("/help") == HELP
    assert not talk.over
    assert talk.command("/quit") == ""
    assert talk.over


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/strength", "/strength: no such command; /help lists them"),
        ("/strength much", "strength 'much': expected a number"),
        ("/strength nan", "strength nan of a: expected a finite number"),
        ("/strength c 1", "'c': no vector of this name"),
        ("/layer 3", "a: no vector at site 'resid_post.3'; expected one of resid_post.1"),
        ("/layer c 1", "'c': no vector of this name"),
        ("/", "/: no such command"),
        ("/sing", "/sing: no such command"),
    ],
)
def test_commands_that_cant_be_followed(line: str, told: str) -> None:
    talk = chat()
    with pytest.raises(ConfigError) as caught:
        talk.command(line)
    assert told in str(caught.value)
    assert talk.dials.strengths == {"a": 1.0, "b": 0.0}
