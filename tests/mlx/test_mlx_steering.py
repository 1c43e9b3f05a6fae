"""Steering and guidance of mlx-lm models, against dsteer's on transformers and by definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from mlx_models import Both, both
from planted import PROMPTS, byte_tokenizer

pytest.importorskip("mlx_lm", reason="needs mlx-lm: no wheels for this platform")

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import dsteer
import dsteer.mlx
from dsteer.errors import ConfigError, MeasurementError, ModelError
from dsteer.mlx.anatomy import Anatomy, around
from dsteer.mlx.capture import capture
from dsteer.mlx.steering import mix, operate
from dsteer.models.load import quiet
from dsteer.steering.intervene import Intervention, Schedule
from dsteer.steering.intervene import operate as torch_operate

TEXTS = list(PROMPTS[:2])
TOKENS = 12


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Gemma 3 keeps a cache of its last tokens alone in five of six blocks."""
    return both(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """With heads that are wide enough for a quantised cache."""
    return both("llama-wide", tmp_path_factory.mktemp("wide"))


def vector(model: Both, site: str = "resid_post.1", seed: int = 3) -> dsteer.SteeringVector:
    """A vector about as long as the states, which changes what is written."""
    generator = torch.Generator().manual_seed(seed)
    width = model.torch.config.hidden_size
    return dsteer.SteeringVector(torch.randn(width, generator=generator), site)


def ids_of(model: Both, text: str) -> list[int]:
    return model.tokenizer(text)["input_ids"]


def tokens_of(model: Both, text: str, **settings: Any) -> list[int]:
    responses = mlx_lm.stream_generate(
        model.mlx, model.mlx_tokenizer, ids_of(model, text), max_tokens=TOKENS, **settings
    )
    return [response.token for response in responses]


def swept(model: Both, text: str, *args: Any, **settings: Any) -> str:
    """What dsteer writes with the same weights in transformers."""
    result = dsteer.sweep(
        model.torch, model.tokenizer, [text], *args, max_new_tokens=TOKENS, **settings
    )
    return result.texts[0][0]


def written(model: Both, text: str, *args: Any, **settings: Any) -> str:
    return dsteer.mlx.generate(
        model.mlx, model.mlx_tokenizer, text, *args, max_new_tokens=TOKENS, **settings
    )


# ---------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("operation", "relative"),
    [("add", False), ("add", True), ("ablate", False), ("scale", False), ("project", False),
     ("noise", False)],
)  # fmt: skip
def test_operations_are_those_of_torch(operation: Any, relative: bool) -> None:
    rng = np.random.default_rng(0)
    state = rng.normal(size=(2, 5, 8)).astype(np.float32)
    v = None if operation == "scale" else rng.normal(size=(2, 8)).astype(np.float32)
    s = np.array([[0.7, 0.0, 1.5, -2.0, 1.0], [0.3, 0.2, 0.1, 1.0, 0.0]], dtype=np.float32)
    selected = rng.random((2, 5)) < 0.7
    noise = rng.normal(size=state.shape).astype(np.float32) if operation == "noise" else None
    args = (state, operation, v, s, selected)
    expected = torch_operate(
        *(torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in args),
        relative=relative,
        noise=None if noise is None else torch.from_numpy(noise),
    ).numpy()
    got = np.array(
        operate(
            *(mx.array(arg) if isinstance(arg, np.ndarray) else arg for arg in args),
            relative=relative,
            noise=None if noise is None else mx.array(noise),
        )
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # float32, sums of 8
    unchanged = ~selected | (s == 0)
    np.testing.assert_array_equal(got[unchanged], state[unchanged])
    assert (got[~unchanged] != state[~unchanged]).any()


def test_half_precision_states_keep_their_dtype_and_bits() -> None:
    state = mx.random.normal((1, 3, 4), key=mx.random.key(0)).astype(mx.bfloat16)
    v, selected = mx.ones((1, 4)), mx.array([[True, False, True]])
    out = operate(state, "add", v, mx.array([[1.0, 1.0, 0.0]]), selected)
    assert out.dtype == mx.bfloat16
    assert mx.array_equal(out[0, 1:], state[0, 1:])
    wide = state[0, 0].astype(mx.float32) + 1
    assert mx.array_equal(out[0, 0], wide.astype(mx.bfloat16))


# ---------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("positions", ["all", "prompt", "prompt_last", "generated", (2, 9)])
def test_positions_are_those_of_dsteer(model: Both, positions: Any) -> None:
    v, plain = vector(model), [swept(model, text, vector(model), [0.0]) for text in TEXTS]
    expected = [swept(model, text, v, [3.0], positions=positions) for text in TEXTS]
    assert [written(model, text, v, 3.0, positions=positions) for text in TEXTS] == expected
    assert expected != plain


@pytest.mark.parametrize("positions", ["prompt", "prompt_last", "generated"])
def test_prompts_read_in_pieces(llama: Both, positions: Any) -> None:
    """mlx-lm reads a long prompt in chunks and its last token alone; a chunk may hold one token."""
    v = vector(llama)
    with dsteer.mlx.steer(llama.mlx, v, 3.0, positions):
        whole = tokens_of(llama, TEXTS[1])
        length = len(ids_of(llama, TEXTS[1]))
        for size in (1, 5, length - 2):
            assert tokens_of(llama, TEXTS[1], prefill_step_size=size) == whole
    assert whole != tokens_of(llama, TEXTS[1])


def test_a_prompt_cache_is_prompt(llama: Both) -> None:
    """A conversation that goes on from a cache reads as the whole of it does."""
    v, ids = vector(llama), ids_of(llama, TEXTS[1])
    for positions in ("prompt", "generated", (3, 11)):
        with dsteer.mlx.steer(llama.mlx, v, 3.0, positions, prompt_lengths=len(ids)) as steering:
            cache = make_prompt_cache(llama.mlx)
            llama.mlx(mx.array([ids[:9]]), cache=cache)
            found = [
                response.token
                for response in mlx_lm.stream_generate(
                    llama.mlx, llama.mlx_tokenizer, ids[9:], max_tokens=TOKENS, prompt_cache=cache
                )
            ]
            assert steering.prompt_lengths == len(ids)
            assert found == tokens_of(llama, TEXTS[1])


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_schedules_are_those_of_dsteer(llama: Both, positions: Any) -> None:
    v = vector(llama)
    for schedule in (Schedule("linear", steps=5), Schedule("exponential", half_life=2)):
        settings = {"schedule": schedule, "positions": positions}
        with dsteer.steer(llama.torch, v, 4.0, **settings):
            ids = torch.tensor([ids_of(llama, TEXTS[0])])
            out = llama.torch.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        with dsteer.mlx.steer(llama.mlx, v, 4.0, **settings):
            tokens = tokens_of(llama, TEXTS[0])
        assert tokens == out[0, ids.shape[1] :].tolist()
        with dsteer.mlx.steer(llama.mlx, v, 4.0, positions):
            assert tokens_of(llama, TEXTS[0]) != tokens


@pytest.mark.parametrize("site", ["resid_post.3", "final_norm", "attn_out.2", "mlp_out.0"])
@pytest.mark.parametrize("operation", ["add", "ablate", "project", "scale", "noise"])
def test_logits_at_every_site(model: Both, site: str, operation: Any) -> None:
    """Beside transformers' under dsteer.steer, in one pass over right-padded rows."""
    v = None if operation == "scale" else vector(model, site)
    settings = {"operation": operation, "site": site, "seed": 5}
    ids = [ids_of(model, text)[:12] for text in PROMPTS[:2]]
    with torch.no_grad(), dsteer.steer(model.torch, v, 0.8, **settings):
        expected = model.torch(torch.tensor(ids)).logits
    with dsteer.mlx.steer(model.mlx, v, 0.8, **settings):
        logits = np.array(model.mlx(mx.array(ids)))
    plain = np.array(model.mlx(mx.array(ids)))
    scale = float(expected.norm())
    # float32, a few layers: measured 1e-6
    assert float(np.linalg.norm(logits - expected.numpy())) < 1e-5 * scale
    if operation != "scale":  # of which a norm that follows takes all away
        assert float(np.linalg.norm(logits - plain)) > 1e-3 * scale


def test_values_by_row(llama: Both) -> None:
    """Each row with its own vector and strength, as if it were alone."""
    ids = mx.array([ids_of(llama, text)[:10] for text in PROMPTS[2:4]])
    vectors = torch.stack([vector(llama, seed=seed).tensor for seed in (1, 2)])
    with dsteer.mlx.steer(llama.mlx, vectors, [1.0, -2.0], site="resid_post.1"):
        both_rows = llama.mlx(ids)
        with pytest.raises(ModelError, match=r"2 values of strength, .* a batch of 1 rows"):
            llama.mlx(ids[:1])
    for row, strength in enumerate((1.0, -2.0)):
        with dsteer.mlx.steer(llama.mlx, vectors[row], strength, site="resid_post.1"):
            alone = llama.mlx(ids[row : row + 1])
        # float32: kernels differ by the number of rows
        assert mx.allclose(both_rows[row], alone[0], rtol=1e-4, atol=1e-5)


def test_prompt_lengths_by_row(llama: Both) -> None:
    """A prompt and its answer in one pass, padded."""
    ids = [ids_of(llama, text)[:n] for text, n in zip(PROMPTS[2:4], (6, 10), strict=True)]
    rows = mx.array([[*row, *[0] * (10 - len(row))] for row in ids])
    v = vector(llama)
    with dsteer.mlx.steer(llama.mlx, v, 2.0, "generated", prompt_lengths=[4, 7]):
        states = capture(Anatomy.of(llama.mlx), rows, ["resid_post.1"])["resid_post.1"]
    plain = capture(Anatomy.of(llama.mlx), rows, ["resid_post.1"])["resid_post.1"]
    moved = np.abs(np.array(states - plain)).max(axis=-1) > 0
    assert np.argmax(moved[0]) == 3  # the last prompt token, which writes the answer's first
    assert np.argmax(moved[1]) == 6
    assert moved[0, 3:].all()
    assert moved[1, 6:].all()
    with (
        dsteer.mlx.steer(llama.mlx, v, 2.0, "generated", prompt_lengths=[4, 7, 1]),
        pytest.raises(ModelError, match="3 prompt lengths for a batch of 2 rows"),
    ):
        llama.mlx(rows)


def test_a_batch_of_prompts_is_steered_as_each_alone(llama: Both) -> None:
    """mlx_lm.batch_generate pads: the cache tells where each row's text begins."""
    v, texts = vector(llama), [TEXTS[0], TEXTS[1], "a"]
    ids = [ids_of(llama, text) for text in texts]
    with dsteer.mlx.steer(llama.mlx, v, 3.0):
        out = mlx_lm.batch_generate(llama.mlx, llama.mlx_tokenizer, ids, max_tokens=8)
        alone = [mlx_lm.generate(llama.mlx, llama.mlx_tokenizer, one, max_tokens=8) for one in ids]
    assert out.texts == alone


# ---------------------------------------------------------------------------------- run time


def test_strength_at_run_time(llama: Both) -> None:
    v = vector(llama)
    vectors = dsteer.SteeringVectorSet([v, vector(llama, "resid_post.2", 4)])
    with dsteer.mlx.steer(llama.mlx, vectors, {"resid_post.1": 3.0}):
        only = tokens_of(llama, TEXTS[0])
    with dsteer.mlx.steer(llama.mlx, vectors, 0.0) as steering:
        assert steering.sites == ("resid_post.1", "resid_post.2")
        assert tokens_of(llama, TEXTS[0]) == tokens_of(llama, TEXTS[0])
        steering.set_strength(3.0, "resid_post.1")
        assert tokens_of(llama, TEXTS[0]) == only
        steering.set_strength(0.0)
        off = tokens_of(llama, TEXTS[0])
        with pytest.raises(ConfigError, match=r"site 'resid_post.0': nothing acts there"):
            steering.set_strength(1.0, "resid_post.0")
        with pytest.raises(MeasurementError, match="expected finite"):
            steering.set_strength(math.nan)
    assert off == tokens_of(llama, TEXTS[0]) != only


def test_everything_is_restored(llama: Both) -> None:
    """In whatever order, and after errors: classes, parameters, and mlx-lm's own function."""
    from importlib import import_module

    generation = import_module("mlx_lm.generate")
    before = (generation.generate_step, type(llama.mlx), type(llama.mlx.layers[1]))
    plain = tokens_of(llama, TEXTS[0])
    one = dsteer.mlx.steer(llama.mlx, vector(llama), 3.0)
    two = dsteer.mlx.guide(llama.mlx, vector(llama), 2.0)
    one.__enter__()
    two.__enter__()
    assert dict(llama.mlx.parameters()).keys() == {"model", "lm_head"}
    assert isinstance(llama.mlx.layers[1], before[2])
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    with pytest.raises(ZeroDivisionError), dsteer.mlx.steer(llama.mlx, vector(llama), 3.0):
        raise ZeroDivisionError
    with pytest.raises(ModelError, match="its module ran outside a pass"):  # noqa: SIM117
        with dsteer.mlx.steer(llama.mlx, vector(llama), 3.0):
            llama.mlx.layers[1](mx.zeros((1, 2, 32)))
    assert (generation.generate_step, type(llama.mlx), type(llama.mlx.layers[1])) == before
    assert tokens_of(llama, TEXTS[0]) == plain


def test_two_steerings_add_up(llama: Both) -> None:
    v, w = vector(llama), vector(llama, seed=4)
    both_at_once = dsteer.SteeringVector(v.tensor * 2 + w.tensor, v.site)
    with dsteer.mlx.steer(llama.mlx, v, 2.0), dsteer.mlx.steer(llama.mlx, w):
        nested = llama.mlx(mx.array([[0, 5, 9]]))
    with dsteer.mlx.steer(llama.mlx, both_at_once):
        once = llama.mlx(mx.array([[0, 5, 9]]))
    with dsteer.mlx.steer(llama.mlx, [Intervention(v.site, v, strength=2.0),
                                      Intervention(w.site, w)]):  # fmt: skip
        listed = llama.mlx(mx.array([[0, 5, 9]]))
    assert mx.allclose(nested, once, rtol=1e-4, atol=1e-5)  # float32, summed in another order
    assert mx.allclose(listed, once, rtol=1e-4, atol=1e-5)


def test_reading_sees_the_steering(llama: Both) -> None:
    """Reading while steered gives states that are steered, whichever began first."""
    v = vector(llama)
    plain = dsteer.mlx.read(llama.mlx, TEXTS, tokenizer=llama.mlx_tokenizer)
    with dsteer.mlx.steer(llama.mlx, v, 2.0):
        steered = dsteer.mlx.read(llama.mlx, TEXTS, tokenizer=llama.mlx_tokenizer)
    shift = (steered["resid_post.1"] - plain["resid_post.1"]).double()
    # float32 states of norm 10
    torch.testing.assert_close(shift, (2 * v.tensor).expand_as(shift), rtol=1e-4, atol=1e-5)
    assert torch.equal(steered["resid_post.0"], plain["resid_post.0"])


# ---------------------------------------------------------------------------------- sampling


def test_draws_are_those_of_a_sweep(llama: Both) -> None:
    v, settings = vector(llama), {"temperature": 1.3, "top_p": 0.9, "seed": 11}
    expected = swept(llama, TEXTS[0], v, [2.0], **settings)
    assert written(llama, TEXTS[0], v, 2.0, **settings) == expected
    assert written(llama, TEXTS[0], v, 2.0) != expected
    assert written(llama, TEXTS[0], v, 2.0, **{**settings, "seed": 12}) != expected


def test_messages_and_plain_text(llama: Both) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = llama.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = written(llama, text)
    assert written(llama, messages) == expected
    assert written(llama, "Hi", template="chat") == expected
    streamed = dsteer.mlx.stream(llama.mlx, llama.mlx_tokenizer, "Hi", max_new_tokens=3)
    assert [response.finish_reason for response in streamed] == [None, None, "length"]


def test_texts_written_in_turns(llama: Both) -> None:
    """A stream that waits steers no other text of the model, and one that is dropped none later."""
    v, settings = vector(llama), {"max_new_tokens": TOKENS}
    plain, steered = tokens_of(llama, TEXTS[0]), []
    with dsteer.mlx.steer(llama.mlx, v, 3.0, "generated"):
        steered = tokens_of(llama, TEXTS[0])
    given = (llama.mlx, llama.mlx_tokenizer, TEXTS[0])
    pairs = zip(
        dsteer.mlx.stream(*given, v, 3.0, positions="generated", **settings),
        dsteer.mlx.stream(*given, **settings),
        strict=True,
    )
    assert [(one.token, other.token) for one, other in pairs] == list(
        zip(steered, plain, strict=True)
    )
    waiting = dsteer.mlx.stream(*given, v, 3.0, guidance=2.0, **settings)
    next(waiting)
    assert tokens_of(llama, TEXTS[0]) == plain


def test_stop_strings_and_draws_of_later_prompts(llama: Both) -> None:
    """As a sweep over several prompts writes them."""
    v, settings = vector(llama), {"temperature": 1.0, "seed": 4}
    result = dsteer.sweep(
        llama.torch, llama.tokenizer, TEXTS, v, [2.0], max_new_tokens=TOKENS, **settings
    )
    expected = result.texts[0]
    found = [written(llama, text, v, 2.0, number=n, **settings) for n, text in enumerate(TEXTS)]
    assert found == list(expected)
    text, stop = expected[1], expected[1][3:5]
    answer = dsteer.mlx.answer(
        llama.mlx, llama.mlx_tokenizer, TEXTS[1], v, 2.0, stop=(stop,), number=1,
        max_new_tokens=TOKENS, **settings,
    )  # fmt: skip
    assert answer.text == text[: text.index(stop)]
    assert answer.finish == "stop"
    assert len(answer.tokens) < TOKENS


# ---------------------------------------------------------------------------------- guidance


def two_passes(model: Both, text: str, v: dsteer.SteeringVector, weight: float) -> list[int]:
    """The definition: whole passes without a cache, plain and steered, token by token."""
    ids = ids_of(model, text)
    for _ in range(TOKENS):
        base = np.array(model.mlx(mx.array([ids])))[0, -1].astype(np.float64)
        with dsteer.mlx.steer(model.mlx, v, 2.0):
            steered = np.array(model.mlx(mx.array([ids])))[0, -1].astype(np.float64)
        ids = [*ids, int((base + weight * (steered - base)).argmax())]
    return ids[-TOKENS:]


def test_guidance_is_its_definition(model: Both) -> None:
    v = vector(model)
    for weight in (-0.5, 0.5, 1.7):
        expected = two_passes(model, TEXTS[0], v, weight)
        with dsteer.mlx.guide(model.mlx, v, weight, 2.0):
            for size in (5, 2048):
                assert tokens_of(model, TEXTS[0], prefill_step_size=size) == expected


def test_guidance_of_weight_none_and_one(model: Both) -> None:
    v = vector(model)
    for positions in ("all", "generated"):
        with dsteer.mlx.steer(model.mlx, v, 2.0, positions):
            steered = tokens_of(model, TEXTS[0])
        plain = tokens_of(model, TEXTS[0])
        with dsteer.mlx.guide(model.mlx, v, 0.0, 2.0, positions) as guidance:
            assert tokens_of(model, TEXTS[0]) == plain
            guidance.weight = 1.0
            assert tokens_of(model, TEXTS[0]) == steered != plain


def test_guided_text_and_draws(llama: Both) -> None:
    v = vector(llama)
    guided = written(llama, TEXTS[0], v, 2.0, guidance=1.7)
    tokens = two_passes(llama, TEXTS[0], v, 1.7)
    assert guided == llama.tokenizer.decode(tokens, skip_special_tokens=True)
    drawn = written(llama, TEXTS[0], v, 2.0, guidance=1.0, temperature=1.0, seed=3)
    assert drawn == written(llama, TEXTS[0], v, 2.0, temperature=1.0, seed=3)


def test_a_cache_of_one_row_is_refused(llama: Both, wide: Both) -> None:
    cache = make_prompt_cache(llama.mlx)
    llama.mlx(mx.array([[0, 5, 9]]), cache=cache)
    quantised = make_prompt_cache(wide.mlx)
    wide.mlx(mx.array([[0, 5, 9]]), cache=quantised)
    quantised = [one.to_quantized(group_size=32) for one in quantised]
    for model, filled in ((llama, cache), (wide, quantised)):
        with (
            dsteer.mlx.guide(model.mlx, vector(model), 2.0),
            pytest.raises(ModelError, match="the prompt cache holds 1 rows, and guidance needs 2"),
        ):
            model.mlx(mx.array([[7]]), cache=filled)


def test_excluded_tokens_stay_excluded() -> None:
    plain, steered = mx.array([1.0, -mx.inf, 2.0]), mx.array([2.0, -mx.inf, -mx.inf])
    assert mix(plain, steered, 2.0).tolist() == [3.0, -mx.inf, -mx.inf]
    assert mix(plain, steered, 0).tolist() == plain.tolist()
    assert mix(plain, steered, 1).tolist() == steered.tolist()


# ---------------------------------------------------------------------------------- mistakes


def test_mistakes(llama: Both) -> None:
    v = vector(llama)

    def fails(kind: type[Exception], match: str, what: Any, *args: Any, **settings: Any) -> None:
        with pytest.raises(kind, match=match), dsteer.mlx.steer(llama.mlx, what, *args, **settings):
            pass

    fails(ModelError, "vector has width 3, and the states of Model 32", torch.ones(3), site=v.site)
    fails(ConfigError, "does not say where it acts", torch.ones(32))
    fails(ConfigError, "the model has 4 blocks", torch.ones(32), site="resid_post.4")
    fails(ConfigError, "no encoder", torch.ones(32), site="encoder")
    fails(ConfigError, "expected a window", v, positions=(4, 2))
    fails(MeasurementError, "expected finite numbers", v, math.inf)
    vectors = dsteer.SteeringVectorSet([v])
    fails(ConfigError, "the set holds no vector there", vectors, site="resid_post.2")
    fails(ConfigError, "the set holds no vector there", vectors, {"final_norm": 1.0})
    with pytest.raises(ModelError, match="Linear is no mlx-lm language model"):
        dsteer.mlx.steer(llama.mlx.lm_head, v).__enter__()
    with pytest.raises(MeasurementError, match="guidance weight inf"):
        dsteer.mlx.guide(llama.mlx, v, math.inf).__enter__()
    with pytest.raises(ConfigError, match="guidance without a vector"):
        written(llama, TEXTS[0], guidance=2.0)
    with pytest.raises(ConfigError, match="positions without a vector"):
        written(llama, TEXTS[0], positions="all")
    with pytest.raises(MeasurementError, match="max_new_tokens 0"):
        list(dsteer.mlx.stream(llama.mlx, llama.mlx_tokenizer, "a", max_new_tokens=0))


def test_what_mlx_models_lack_is_refused(llama: Both) -> None:
    """An intervention of a kind that is not built here is not taken for another one."""

    @dataclass(frozen=True, eq=False)
    class Later(Intervention):
        later: object = None

    v = vector(llama)
    with dsteer.mlx.steer(llama.mlx, Later(v.site, v)):
        pass
    with pytest.raises(ConfigError, match="later: MLX models can't be steered with it"):
        dsteer.mlx.steer(llama.mlx, Later(v.site, v, later="yes")).__enter__()
    twist = Intervention(v.site, v)
    object.__setattr__(twist, "operation", "twist")
    with pytest.raises(ConfigError, match="operation 'twist': none for MLX models"):
        dsteer.mlx.steer(llama.mlx, twist).__enter__()


def test_a_length_that_is_needed_and_not_known(llama: Both) -> None:
    """Passes with a cache, and nobody to tell where the prompt ends."""
    with dsteer.mlx.steer(llama.mlx, vector(llama), 1.0, "generated"):
        with pytest.raises(ModelError, match="length is not known; give prompt_lengths"):
            llama.mlx(mx.array([[0, 5]]), cache=make_prompt_cache(llama.mlx))
        llama.mlx(mx.array([[0, 5]]))  # without a cache, it is all prompt


def test_a_module_that_does_not_run_or_runs_twice(llama: Both) -> None:
    anatomy = Anatomy.of(llama.mlx)

    def skip(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return x

    def twice(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return call(call(x, *args, **kwargs), *args, **kwargs)

    for block, site, what, message in (
        (anatomy.blocks[2], "mlp_out.2", skip, "did not run"),
        (anatomy.blocks[0], "mlp_out.0", twice, "ran twice in one pass"),
    ):
        with (
            around(block, what),
            pytest.raises(ModelError, match=message),
            dsteer.mlx.steer(llama.mlx, vector(llama, site)),
        ):
            llama.mlx(mx.array([[0, 5]]))


def test_a_recurrent_model(tmp_path: Path) -> None:
    """Its cache tells no length, so the passes are counted; one that was not seen is refused."""
    shape = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = tf.MambaForCausalLM(tf.MambaConfig(**shape, initializer_range=0.3)).eval()
    with quiet():
        made.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = dsteer.mlx.load(tmp_path)
    v, ids = dsteer.SteeringVector(torch.linspace(-9, 9, 32), "resid_post.0"), [0, 9, 30, 41, 7]

    def tokens(**settings: Any) -> list[int]:
        found = mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=6, **settings)
        return [response.token for response in found]

    with dsteer.mlx.steer(model, v, 1.0, "generated"):
        steered = tokens()
        assert tokens(prefill_step_size=2) == steered
    expected = list(ids)
    for _ in range(6):  # whole passes without a cache
        with dsteer.mlx.steer(model, v, 1.0, "generated", prompt_lengths=len(ids)):
            expected.append(int(mx.argmax(model(mx.array([expected]))[0, -1])))
    assert steered == expected[5:] != tokens()
    cache = make_prompt_cache(model)
    model(mx.array([ids]), cache=cache)
    with (
        dsteer.mlx.steer(model, v),
        pytest.raises(ModelError, match="continues a recurrent state whose prompt was not seen"),
    ):
        model(mx.array([[3]]), cache=cache)
