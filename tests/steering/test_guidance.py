"""Guidance is z + w (z' − z) of two plain passes, token for token, however it is batched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import build, prompts_of
from planted import PROMPTS, byte_tokenizer, planted_pair
from torch import Tensor

import dsteer
from dsteer.data.tokens import Encoded
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError
from dsteer.steering.decode import Decoding
from dsteer.steering.guidance import mix
from dsteer.steering.intervene import Intervention, Schedule
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TOKENIZER = byte_tokenizer()
V = SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(1)), "resid_post.1")
LENGTHS = (1, 3, 8, 8, 13)
NEW = 10
KINDS = (
    "llama", "gpt2", "gemma2", "gemma3", "mistral-window", "gpt-oss", "falcon-alibi", "bloom",
    "phi3-longrope", "mamba", "falcon-h1", "qwen3-next",
)  # fmt: skip
"""Sliding windows, sinks, position biases, positions by the longest text, recurrent states."""


@pytest.fixture
def llama() -> Any:
    return build("llama")


@torch.no_grad()
def two_passes(
    model: Any, other: Any, prompt: Encoded, weight: float, new: int = NEW,
    ends: Sequence[int] = (), decoding: Decoding | None = None, number: int = 0, **steering: Any,
) -> tuple[list[int], float]:  # fmt: skip
    """The definition: a whole plain pass and a whole steered one for each token, in float64.

    Returns:
        The tokens, and the smallest gap between the two largest guided logits on the way.
    """
    ids, gap = list(prompt.ids), float("inf")
    for step in range(new):
        row = torch.tensor([ids])
        z = model(row, use_cache=False).logits[:, -1].double()
        if isinstance(other, torch.nn.Module):
            steered = other(row, use_cache=False).logits[:, -1].double()
        else:
            with dsteer.steer(model, other, prompt_lengths=[len(prompt.ids)], **steering):
                steered = model(row, use_cache=False).logits[:, -1].double()
        guided = z + weight * (steered - z)
        if decoding is None:
            top = guided[0].topk(2)
            gap = min(gap, float(top.values[0] - top.values[1]))
            token = int(top.indices[0])
        else:
            uniform = torch.from_numpy(decoding.draws(number)[step : step + 1])
            token = int(decoding.choose(guided, uniform)[0])
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt.ids) :], gap


def texts_of(model: Any, other: Any, prompts: Sequence[Encoded], weight: float, **kw: Any) -> Any:
    return [tuple(two_passes(model, other, p, weight, **kw)[0]) for p in prompts]


# Both streams in one batch


@pytest.mark.parametrize("name", KINDS)
def test_equals_two_passes_a_token(name: str) -> None:
    model, prompts, weight = build(name), prompts_of(LENGTHS), 2.5
    model.generation_config.eos_token_id = None
    found = dsteer.guided(model, TOKENIZER, prompts, V, 1.5, weight=weight, max_new_tokens=NEW)
    plain = dsteer.sweep(model, TOKENIZER, prompts, V, [0.0, 1.5], NEW)
    assert found.fast == plain.fast
    assert len({found.tokens, *plain.tokens}) == 3  # it is neither of its streams
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        wanted, gap = two_passes(model, V, prompt, weight, ends=[1], strength=1.5)
        if list(tokens) != wanted:  # only a tie may part them, within float32's rounding
            assert gap < 1e-4


def test_weights_0_and_1_are_the_base_and_plain_steering(llama: Any) -> None:
    prompts = prompts_of(LENGTHS)
    base, steered = dsteer.sweep(llama, TOKENIZER, prompts, V, [0.0, 1.5], NEW).tokens
    assert base != steered
    for fast in (True, False):
        for weight, wanted in ((0.0, base), (1.0, steered)):
            found = dsteer.guided(
                llama, TOKENIZER, prompts, V, 1.5, weight=weight, max_new_tokens=NEW, fast=fast
            )
            assert found.tokens == wanted


@pytest.mark.parametrize("fast", [True, False])
def test_sampled_with_the_same_draws(llama: Any, fast: bool) -> None:
    prompts = prompts_of(LENGTHS)
    decoding = Decoding(NEW, temperature=0.8, top_p=0.9, seed=5)
    found, by_intervention = (
        dsteer.guided(
            llama, TOKENIZER, prompts, what, weight=2.0, max_new_tokens=NEW, temperature=0.8,
            top_p=0.9, seed=5, fast=fast,
        )
        for what in (V, Intervention(V.site, V))
    )  # fmt: skip
    assert found.tokens == by_intervention.tokens
    wanted = [
        tuple(two_passes(llama, V, p, 2.0, ends=[1, 2], decoding=decoding, number=i)[0])
        for i, p in enumerate(prompts)
    ]
    assert list(found.tokens) == wanted
    greedy = dsteer.guided(llama, TOKENIZER, prompts, V, weight=2.0, max_new_tokens=NEW)
    assert found.tokens != greedy.tokens


@pytest.mark.parametrize("fast", [True, False])
def test_texts_end_by_themselves_and_rows_go(llama: Any, fast: bool) -> None:
    """An id that some guided texts hold early ends them; others go on, and memory makes batches."""
    prompts = prompts_of((4, 9, 2, 7, 5, 12))
    whole = texts_of(llama, V, prompts, 2.0)
    end = next(t for t in whole[0][2:] if sum(t in row for row in whole) < len(whole))
    llama.generation_config.eos_token_id = end
    wanted = [row[: row.index(end)] if end in row else row for row in whole]
    for memory in (2**30, 1):
        found = dsteer.guided(
            llama, TOKENIZER, prompts, V, weight=2.0, max_new_tokens=NEW, fast=fast, memory=memory
        )
        assert list(found.tokens) == wanted
        assert found.finished == tuple(end in row for row in whole)
    assert {True, False} == set(found.finished)


def test_a_stop_string_ends_a_text() -> None:
    planted = planted_pair(1)
    options: dict[str, Any] = {"weight": 2.0, "max_new_tokens": 24}
    whole = dsteer.guided(planted.base, TOKENIZER, PROMPTS, V, **options)
    text = max(whole.texts, key=len)
    stop = text[2]
    found = dsteer.guided(planted.base, TOKENIZER, PROMPTS, V, stop=stop, **options)
    assert found.texts == tuple(t.split(stop)[0] for t in whole.texts)
    assert found.finished[whole.texts.index(text)]


SETTINGS: tuple[dict[str, Any], ...] = (
    {"positions": "generated"},
    {"positions": "prompt", "strength": 4.0},
    {"schedule": Schedule("linear", steps=4)},
    {"relative": True, "strength": 0.5},
    {"operation": "ablate"},
    {"operation": "noise", "strength": 2.0},
    {"site": "attn_out.1"},
    {"site": "final_norm"},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steering_of_any_kind(llama: Any, settings: dict[str, Any]) -> None:
    prompts = prompts_of(LENGTHS)
    wanted = texts_of(llama, V, prompts, 2.0, ends=[1, 2], **settings)
    found = dsteer.guided(llama, TOKENIZER, prompts, V, weight=2.0, max_new_tokens=NEW, **settings)
    assert list(found.tokens) == wanted
    assert found.fast == (settings.get("site") != "attn_out.1")


def test_several_interventions_at_several_sites(llama: Any) -> None:
    """The streams part at the first site; what comes later in the list may act earlier."""
    prompts = prompts_of(LENGTHS)
    what = [
        Intervention("resid_post.2", V, strength=2.0, positions="generated"),
        Intervention("resid_post.0", V.tensor.flip(0), positions="prompt"),
        Intervention("resid_post.0", None, operation="scale", strength=0.2),
    ]
    wanted = texts_of(llama, what, prompts, 2.0, ends=[1, 2])
    for fast in (True, False):
        found = dsteer.guided(
            llama, TOKENIZER, prompts, what, weight=2.0, max_new_tokens=NEW, fast=fast
        )
        assert list(found.tokens) == wanted
    both = SteeringVectorSet([V, SteeringVector(V.tensor, "resid_post.0")])
    found = dsteer.guided(llama, TOKENIZER, prompts, both, weight=2.0, max_new_tokens=NEW)
    assert list(found.tokens) == texts_of(llama, both, prompts, 2.0, ends=[1, 2])


# Two models


@pytest.mark.parametrize("fast", [True, False])
def test_between_two_models(fast: bool) -> None:
    planted, prompts = planted_pair(1), prompts_of(LENGTHS)
    options: dict[str, Any] = {"max_new_tokens": NEW, "fast": fast}
    for weight in (0.0, 1.0, 3.0):
        found = dsteer.guided(
            planted.base, TOKENIZER, prompts, planted.tuned, weight=weight, **options
        )
        wanted = texts_of(planted.base, planted.tuned, prompts, weight, ends=[1])
        assert list(found.tokens) == wanted
        assert found.fast == fast
    # b after block 1 of the base is the tuned model, so steering by it guides alike.
    by_vector = dsteer.guided(
        planted.base, TOKENIZER, prompts, planted.b, weight=3.0, site="resid_post.1", **options
    )
    assert by_vector.tokens == found.tokens


def test_two_models_of_different_shape_and_vocabulary() -> None:
    """The other is deeper, wider and has three tokens more, which are never chosen."""
    planted, prompts = planted_pair(1), prompts_of(LENGTHS)
    wider = planted_pair(1, hidden_size=48, num_hidden_layers=6, vocab_size=263).base
    for model, other in ((planted.base, wider), (wider, planted.base)):
        for fast in (True, False):
            found = dsteer.guided(
                model, TOKENIZER, prompts, other, weight=2.0, max_new_tokens=NEW, fast=fast
            )
            for prompt, tokens in zip(prompts, found.tokens, strict=True):
                ids = torch.tensor([[*prompt.ids, *tokens]])
                with torch.no_grad():
                    z = model(ids).logits[0, len(prompt.ids) - 1 : -1, :260].double()
                    seen = other(ids).logits[0, len(prompt.ids) - 1 : -1, :260].double()
                assert (z + 2 * (seen - z)).argmax(-1).tolist() == list(tokens)


def test_models_that_share_a_config_are_decoded_by_generate() -> None:
    planted, prompts = planted_pair(1), prompts_of(LENGTHS)
    planted.tuned.config = planted.base.config
    found = dsteer.guided(
        planted.base, TOKENIZER, prompts, planted.tuned, weight=3.0, max_new_tokens=NEW
    )
    assert not found.fast
    assert "config" in str(found.note)
    assert list(found.tokens) == texts_of(planted.base, planted.tuned, prompts, 3.0, ends=[1])


# A processor of generate


def padded(prompts: Sequence[Encoded], left: bool = True) -> dict[str, Tensor]:
    width = max(len(item.ids) for item in prompts)
    return {
        "input_ids": torch.tensor([[0] * (width - len(p.ids)) + list(p.ids) for p in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts]
        ),
    }


def generated(model: Any, prompts: Sequence[Encoded], guidance: Any, **kw: Any) -> list[list[int]]:
    inputs = padded(prompts)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(**inputs, logits_processor=[guidance], **{**settings, **kw})
    return made[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3", "mistral-window", "mamba", "falcon-h1", "qwen3-next"]
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_processor_equals_two_passes(name: str, use_cache: bool) -> None:
    """Left-padded rows of mixed lengths; a mask or positions that were lost would change them."""
    model = build(name)
    prompts = prompts_of(LENGTHS)
    with dsteer.Guidance(model, V, 1.5, weight=2.5, positions="generated") as guidance:
        found = generated(model, prompts, guidance, use_cache=use_cache)
        again = generated(model, prompts[::-1], guidance, use_cache=use_cache)
    assert found == again[::-1]
    for prompt, tokens in zip(prompts, found, strict=True):
        wanted, gap = two_passes(model, V, prompt, 2.5, strength=1.5, positions="generated")
        assert tokens == wanted or gap < 1e-4
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_the_processor_takes_strengths_by_row(llama: Any) -> None:
    prompts = prompts_of((5, 9, 7))
    with dsteer.Guidance(llama, V, [0.0, 1.0, -2.0], weight=2.0) as guidance:
        found = generated(llama, prompts, guidance)
    wanted = [
        two_passes(llama, V, prompt, 2.0, strength=strength)[0]
        for prompt, strength in zip(prompts, (0.0, 1.0, -2.0), strict=True)
    ]
    assert found == wanted


def test_a_conversation_goes_on_in_its_cache(llama: Any) -> None:
    """The second turn continues both caches, and equals reading all of it at once."""
    first, more = prompts_of((6,))[0], [9, 8, 7]
    cache = tf.DynamicCache(config=llama.config)
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with dsteer.Guidance(llama, V, weight=2.0) as guidance:
        settings["logits_processor"] = [guidance]
        turn = llama.generate(torch.tensor([first.ids]), past_key_values=cache, **settings)
        whole = torch.cat([turn, torch.tensor([more])], dim=1)
        found = llama.generate(whole, past_key_values=cache, **settings)
    ids = tuple(whole[0].tolist())
    wanted, _ = two_passes(llama, V, Encoded(ids, len(ids)), 2.0, new=4)
    assert found[0, len(ids) :].tolist() == wanted


def test_between_two_models_by_processor() -> None:
    planted, prompts = planted_pair(1), prompts_of(LENGTHS)
    with dsteer.Guidance(planted.base, planted.tuned, weight=3.0) as guidance:
        found = generated(planted.base, prompts, guidance)
    assert list(map(tuple, found)) == texts_of(planted.base, planted.tuned, prompts, 3.0)


def test_an_encoder_decoder_model() -> None:
    config = tf.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.T5ForConditionalGeneration(config).eval()
    prompts = prompts_of((5, 5, 9))
    found = dsteer.guided(model, TOKENIZER, prompts, V, weight=3.0, max_new_tokens=6)
    assert not found.fast
    with dsteer.Guidance(model, V, weight=3.0) as guidance:
        made = model.generate(
            **padded(prompts[:2]), max_new_tokens=6, do_sample=False, logits_processor=[guidance]
        )
    for number, (prompt, tokens) in enumerate(zip(prompts, found.tokens, strict=True)):
        written: list[int] = []
        for _ in range(6):
            call = {
                "input_ids": torch.tensor([prompt.ids]),
                "decoder_input_ids": torch.tensor([[0, *written]]),
            }
            with torch.no_grad():
                z = model(**call).logits[0, -1].double()
                with dsteer.steer(model, V):
                    steered = model(**call).logits[0, -1].double()
            written.append(int((z + 3 * (steered - z)).argmax()))
        ends = [i for i, token in enumerate(written) if token == 1]
        assert list(tokens) == written[: ends[0] if ends else 6]
        if number < 2 and not ends:
            assert made[number, 1:].tolist() == written


# Arithmetic and mistakes


def test_mixing_by_hand() -> None:
    plain = torch.tensor([[1.0, 2.0, -torch.inf, 0.1]])
    other = torch.tensor([[3.0, 2.0, 5.0, 0.3]])
    assert torch.allclose(mix(plain, other, 2.0), torch.tensor([[5.0, 2.0, -torch.inf, 0.5]]))
    assert mix(plain, other, 0.0) is plain
    assert torch.equal(mix(plain, other, 1.0), torch.tensor([[3.0, 2.0, -torch.inf, 0.3]]))
    assert mix(plain, other[:, :3], 2.0)[0, 3] == -torch.inf
    assert mix(plain[:, :2], other, 2.0).tolist() == [[5.0, 2.0]]


def test_mistakes_are_told_in_one_line(llama: Any) -> None:
    prompts, planted = prompts_of((3,)), planted_pair(1)
    other, options = planted.tuned, {"weight": 2.0}
    cases: list[tuple[type[Exception], str, Any]] = [
        (MeasurementError, "weight nan", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, V, weight=float("nan"))),
        (MeasurementError, "weight inf", lambda: dsteer.Guidance(llama, V, weight=float("inf"))),
        (MeasurementError, "strength by row", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, Intervention("resid_post.0", V, strength=[1.0]), **options)),
        (MeasurementError, "vector by row", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, torch.ones(1, 32), site="resid_post.0", **options)),
        (MeasurementError, "seed by row", lambda: dsteer.guided(
            llama, TOKENIZER, prompts,
            Intervention("resid_post.0", V, operation="noise", seed=[1]), **options)),
        (ConfigError, "no interventions", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, [], **options)),
        (ConfigError, "strength 2.0 beside another model", lambda: dsteer.guided(
            planted.base, TOKENIZER, prompts, other, 2.0, **options)),
        (ConfigError, "site 'final_norm' beside", lambda: dsteer.Guidance(
            planted.base, other, site="final_norm", **options)),
        (DataError, "no prompts", lambda: dsteer.guided(llama, TOKENIZER, [], V, **options)),
        (DataError, "no prompts", lambda: dsteer.guided(
            planted.base, TOKENIZER, [], other, **options)),
        (DataError, "one text", lambda: dsteer.guided(llama, TOKENIZER, "a", V, **options)),
        (DataError, "exceed the 64", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, V, max_new_tokens=62, **options)),
        (ModelError, "guided by itself", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, llama, **options)),
        (ModelError, "128 tokens", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, other, **options)),
        (ModelError, "128 tokens", lambda: dsteer.Guidance(llama, other, **options)),
        (ModelError, "width 3", lambda: dsteer.guided(
            llama, TOKENIZER, prompts, torch.ones(3), site="resid_post.0", **options)),
        (ModelError, "can't decode", lambda: dsteer.guided(
            build("bloom"), TOKENIZER, prompts, V, fast=True, **options)),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_tokenizers_are_compared() -> None:
    planted, prompts = planted_pair(1), prompts_of((3,))
    swapped = byte_tokenizer()
    text = swapped.backend_tokenizer.to_str().replace('"a":', '"A!":').replace('"b":', '"a":')
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(text.replace('"A!":', '"b":'))
    with pytest.raises(ModelError, match=r"id 67 is 'a' in the tokenizer of \S+ and 'b' in"):
        dsteer.guided(
            planted.base, TOKENIZER, prompts, planted.tuned, weight=2.0, other_tokenizer=swapped
        )
    same = copy.deepcopy(TOKENIZER)
    dsteer.guided(
        planted.base, TOKENIZER, prompts, planted.tuned, weight=2.0, other_tokenizer=same,
        max_new_tokens=1,
    )  # fmt: skip


def test_what_the_second_stream_cannot_repeat_is_refused(llama: Any) -> None:
    prompts = prompts_of((6,))
    cache = tf.DynamicCache(config=llama.config)
    llama(torch.tensor([[5, 6]]), past_key_values=cache)
    with dsteer.Guidance(llama, V, weight=2.0) as guidance:
        with pytest.raises(ModelError, match="no pass since"):
            guidance(torch.tensor([[5]]), torch.zeros(1, 128))
        with pytest.raises(ModelError, match="beam search"):
            generated(llama, prompts, guidance, num_beams=4)
        with pytest.raises(ModelError, match="filled before"):
            llama(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(ModelError, match="by name"):
            llama(torch.tensor([[5]]))
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                    decoder_start_token_id=0)
    )  # fmt: skip
    with pytest.raises(ModelError, match="has an encoder"):
        dsteer.guided(t5, TOKENIZER, prompts, llama, weight=2.0)
