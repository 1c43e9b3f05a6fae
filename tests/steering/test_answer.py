"""Answers as they are written: the tokens of the model's own passes, and pieces that join."""

from __future__ import annotations

import pytest
import torch
from planted import PROMPTS, byte_tokenizer, planted_pair, tiny_llama
from seq2seq_models import eos_tokenizer, planted_seq2seq

import dsteer
from dsteer.data.tokens import encode
from dsteer.errors import DataError
from dsteer.steering.answer import Unfolding, answer, answers
from dsteer.steering.decode import Decoding
from dsteer.steering.dials import Dial, Dials
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

MODEL = tiny_llama()
TOKENIZER = byte_tokenizer()
WIDTH = MODEL.config.hidden_size


def vector(seed: int, site: str = "resid_post.1", size: float = 3.0) -> SteeringVectorSet:
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return SteeringVectorSet([SteeringVector(v * size / v.norm(), site)])


def dials(*strengths: float) -> Dials:
    return Dials(
        MODEL,
        [
            Dial(name, vector(seed, f"resid_post.{seed}"), f"resid_post.{seed}", strength)
            for seed, (name, strength) in enumerate(zip("abc", strengths, strict=False))
        ],
    )


def logits(ids: list[int], shifts: dict[int, torch.Tensor]) -> torch.Tensor:
    """Of a whole pass without a cache, each block's output shifted by hand."""
    handles = [
        MODEL.model.layers[block].register_forward_hook(
            lambda _m, _i, out, shift=shift: (
                (out[0] + shift, *out[1:]) if isinstance(out, tuple) else out + shift
            )
        )
        for block, shift in shifts.items()
    ]
    try:
        with torch.inference_mode():
            return MODEL(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def greedy(
    ids: tuple[int, ...], steps: int, shifts: dict[int, torch.Tensor], weight: float = 1.0
) -> tuple[int, ...]:
    """Tokens of z + w (z′ − z) up to EOS, by two passes a token."""
    text = list(ids)
    for _ in range(steps):
        plain = logits(text, {})
        token = int((plain + weight * (logits(text, shifts) - plain)).argmax())
        if token == TOKENIZER.eos_token_id:
            break
        text.append(token)
    return tuple(text[len(ids) :])


def test_rows_are_steered_each_by_its_own_strengths() -> None:
    """Three rows of one batch against passes of one row with the vectors added by hand."""
    both = dials(0.0, 0.0)
    rows = [both.plain, {"a": 1.0, "b": 0.0}, {"a": -0.5, "b": 2.0}]
    (prompt,) = encode(TOKENIZER, [PROMPTS[1]])
    found = answer(
        MODEL, TOKENIZER, prompt, both.interventions(rows), Decoding(12), draws=[0] * len(rows)
    )
    for row, one in zip(rows, found, strict=True):
        shifts = {
            k: row[name] * both[name].vector.tensor.float() for k, name in enumerate(("a", "b"))
        }
        assert one.tokens == greedy(prompt.ids, 12, shifts)
    assert len({one.tokens for one in found}) == 3  # the strengths matter
    assert not any(module._forward_hooks for module in MODEL.modules())


def test_one_vector_takes_the_sweeps_way() -> None:
    only = dials(1.0)
    rows = [only.plain, {"a": 1.0}]
    encoded = encode(TOKENIZER, PROMPTS[:3])
    found = answers(MODEL, TOKENIZER, encoded, only, rows, Decoding(8))
    swept = dsteer.sweep(MODEL, TOKENIZER, encoded, only["a"].vector, [0.0, 1.0], 8)
    told = [
        answer(MODEL, TOKENIZER, item, only.interventions(rows), Decoding(8), draws=[0, 0])
        for item in encoded
    ]
    for number in range(3):
        for row in range(2):
            assert found[number][row].text == swept.texts[row][number]
            assert found[number][row].tokens == told[number][row].tokens


def test_guidance_is_two_passes() -> None:
    """Of rows in one batch, and of prompts in one batch; the plain row is the model as it is."""
    both = dials(1.0, -0.5)
    shifts = {
        k: both[name].strength * both[name].vector.tensor.float() for k, name in enumerate("ab")
    }
    encoded = encode(TOKENIZER, [PROMPTS[1], PROMPTS[5]])
    rows = [both.plain, both.strengths]
    together = answers(MODEL, TOKENIZER, encoded, both, rows, Decoding(8), guidance=2.5)
    for prompt, found in zip(encoded, together, strict=True):
        expected = [greedy(prompt.ids, 8, {}), greedy(prompt.ids, 8, shifts, 2.5)]
        acting = both.interventions(rows)
        alone = answer(MODEL, TOKENIZER, prompt, acting, Decoding(8), draws=[0, 0], guidance=2.5)
        assert [one.tokens for one in alone] == expected
        assert found == alone
        assert expected[1] != greedy(prompt.ids, 8, shifts)
    assert not any(module._forward_hooks for module in MODEL.modules())


def test_several_vectors_share_draws_by_prompt() -> None:
    both = dials(0.0, 0.0)
    encoded = encode(TOKENIZER, [PROMPTS[5]] * 2)
    drawing = Decoding(8, temperature=1.0, seed=3)
    found = answers(MODEL, TOKENIZER, encoded, both, [both.plain] * 2, drawing)
    assert found[0][0] == found[0][1]
    assert found[0][0] != found[1][0]
    assert found == answers(MODEL, TOKENIZER, encoded, both, [both.plain] * 2, drawing)


def test_pieces_join_and_stop_strings_end_rows() -> None:
    (prompt,) = encode(TOKENIZER, [PROMPTS[3]])
    plain = answer(MODEL, TOKENIZER, prompt, [], Decoding(40))[0]
    assert plain.text == TOKENIZER.decode(plain.tokens)
    stop = plain.text[10:12]
    first = plain.text.index(stop)
    pieces: list[str] = []
    stopped = answer(
        MODEL,
        TOKENIZER,
        prompt,
        [],
        Decoding(40, stop=(stop,)),
        tell=lambda _row, piece: pieces.append(piece),
    )[0]
    assert stopped.text == "".join(pieces) == plain.text[:first]
    assert stopped.finish == "stop"
    assert len(stopped.tokens) < len(plain.tokens)


def test_cancelling_ends_at_the_next_token() -> None:
    (prompt,) = encode(TOKENIZER, [PROMPTS[0]])
    asked = iter([False, False, True])
    found = answer(MODEL, TOKENIZER, prompt, [], Decoding(40), cancelled=lambda: next(asked))[0]
    assert (len(found.tokens), found.finish) == (2, "cancelled")


def test_what_tells_may_fail_and_hooks_go() -> None:
    def fail(_row: int, _piece: str) -> None:
        raise ValueError("told enough")

    one = dials(1.0)
    (prompt,) = encode(TOKENIZER, [PROMPTS[5]])
    before = MODEL.generation_config
    with pytest.raises(ValueError, match="told enough"):
        answer(
            MODEL, TOKENIZER, prompt, one.interventions([one.strengths]), Decoding(40), tell=fail
        )
    assert not any(module._forward_hooks for module in MODEL.modules())
    assert MODEL.generation_config is before


def test_too_long_a_prompt() -> None:
    (prompt,) = encode(TOKENIZER, ["a" * 250])
    with pytest.raises(DataError, match="a prompt of 251 tokens and 6 new ones exceed the 256"):
        answer(MODEL, TOKENIZER, prompt, [], Decoding(6))
    with pytest.raises(DataError, match="no prompts to continue"):
        answers(MODEL, TOKENIZER, [], dials(1.0), [{"a": 1.0}], Decoding(6))


def test_an_encoder_decoder_model() -> None:
    """The base steered by b writes what ``generate`` of the tuned model writes."""
    base, tuned, b = planted_seq2seq("t5", 1)
    tokenizer = eos_tokenizer()
    planted = SteeringVectorSet([SteeringVector(b, "resid_post.1")])
    one = Dials(base, [Dial("b", planted, "resid_post.1", 1.0)])
    (prompt,) = encode(tokenizer, [PROMPTS[7]], encoder_decoder=True)
    found = answer(base, tokenizer, prompt, one.interventions([one.strengths]), Decoding(10))[0]
    made = tuned.generate(
        input_ids=torch.tensor([prompt.ids]), max_new_tokens=10, do_sample=False, num_beams=1
    )
    expected = made[0, 1:].tolist()
    assert list(found.tokens) == expected[: expected.index(1) if 1 in expected else None]
    assert found.tokens


# ------------------------------------------------------------------------------------ texts


def unfold(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Unfolding]:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    unfolding = Unfolding(TOKENIZER, [TOKENIZER.bos_token_id], stop)
    pieces = []
    for token in ids:
        pieces.append(unfolding.add(token))
        if unfolding.stopped:
            break
    return [*pieces, unfolding.end()], unfolding


def test_characters_are_told_whole() -> None:
    """Each byte is a token: characters of two to four bytes wait for their last."""
    text = "a é 你好 🙂!"
    pieces, _ = unfold(text)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_are_no_character() -> None:
    """They are told with what follows, or at the end, as the tokenizer writes them."""
    lone = TOKENIZER("é", add_special_tokens=False)["input_ids"][0]
    letter = TOKENIZER("x", add_special_tokens=False)["input_ids"][0]
    unfolding = Unfolding(TOKENIZER, [], ())
    told = [unfolding.add(token) for token in (letter, lone, letter, lone)]
    assert told == ["x", "", "\ufffdx", ""]
    assert unfolding.end() == "\ufffd"
    assert unfolding.text == "x\ufffdx\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("one EEND", ("END",), "one E"),
        ("ends in EN", ("END",), "ends in EN"),
        ("abcabd", ("abd", "xyz"), "abc"),
        ("a\n\nHuman: b", ("\n\nHuman:", "\n\nAssistant:"), "a"),
        ("ENDing", ("END",), ""),
    ],
)
def test_stop_strings_are_never_told(text: str, stop: tuple[str, ...], kept: str) -> None:
    pieces, unfolding = unfold(text, stop)
    assert "".join(pieces) == unfolding.text == kept
    assert unfolding.stopped == (kept != text)


def test_a_piece_waits_while_it_may_become_a_stop_string() -> None:
    pieces, _ = unfold("aENb", ("END",))
    assert pieces == ["a", "", "", "ENb", ""]


def test_planted_shift_is_the_tuned_model() -> None:
    """The base steered by b writes what the tuned model writes."""
    planted = planted_pair(1)
    site = SteeringVectorSet([SteeringVector(planted.b, "resid_post.1")])
    one = Dials(planted.base, [Dial("b", site, "resid_post.1", 1.0)])
    (prompt,) = encode(planted.tokenizer, [PROMPTS[7]])
    steered = answer(
        planted.base, planted.tokenizer, prompt, one.interventions([one.strengths]), Decoding(16)
    )
    tuned = answer(planted.tuned, planted.tokenizer, prompt, [], Decoding(16))
    assert steered == tuned
