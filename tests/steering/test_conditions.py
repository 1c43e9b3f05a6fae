"""Conditional steering: rows whose prompt meets a condition are steered, others keep every bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from architectures import build, prompts_of
from planted import byte_tokenizer, tiny_llama
from torch import Tensor

import dsteer
from dsteer.data.tokens import Encoded, encode
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError
from dsteer.steering.conditions import Condition, _fit, fit_condition
from dsteer.steering.intervene import Intervention
from dsteer.steering.vector import SteeringVector

TOKENIZER = byte_tokenizer()
PROMPTS = prompts_of((5, 9, 2, 7, 12, 4))
V = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
C = SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(2)), "resid_post.0")


@pytest.fixture
def llama() -> Any:
    return build("llama")


def padded(prompts: list[Encoded], left: bool) -> dict[str, Tensor]:
    width = max(len(item.ids) for item in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, item in enumerate(prompts):
        at = slice(width - len(item.ids), width) if left else slice(0, len(item.ids))
        ids[row, at], mask[row, at] = torch.tensor(item.ids), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def projections(model: Any, position: str) -> np.ndarray:
    """Of each prompt alone, from the model's own hidden_states, in float64."""
    unit = (C.tensor / C.tensor.norm()).numpy()
    found = []
    for prompt in PROMPTS:
        out = model(torch.tensor([prompt.ids]), output_hidden_states=True)
        h = out.hidden_states[1][0].double().numpy()
        found.append((h[-1] if position == "prompt_last" else h.mean(0)) @ unit)
    return np.array(found)


def halving(model: Any, position: str = "prompt_last") -> tuple[Condition, np.ndarray]:
    """A condition that half of the prompts meet, and which."""
    found = projections(model, position)
    threshold = float(np.median(found))  # between two of six
    assert np.abs(found - threshold).min() > 1e-3  # far from rounding in float32
    return Condition(C, threshold, position), found >= threshold


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("position", ["prompt_last", "prompt_mean"])
@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.2", "final_norm"])
def test_rows_without_the_trigger_are_bit_identical(
    llama: Any, site: str, position: str, left: bool
) -> None:
    condition, meets = halving(llama, position)
    inputs = padded(PROMPTS, left)
    with torch.no_grad():
        plain = llama(**inputs).logits
        with dsteer.steer(llama, V, site=site):
            always = llama(**inputs).logits
        with dsteer.steer(llama, V, site=site, when=condition) as hooks:
            found = llama(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert hooks.fired(condition).tolist() == meets.tolist()  # type: ignore[union-attr]
    for row, met in enumerate(meets):
        assert torch.equal(found[row], (always if met else plain)[row])
        assert not torch.equal(always[row][real[row]], plain[row][real[row]])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mamba", "qwen3-next"])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_a_row_stays_as_it_was_judged_while_it_generates(name: str, positions: Any) -> None:
    model = build(name)
    condition, meets = halving(model)
    inputs = padded(PROMPTS, left=True)
    settings: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    plain = model.generate(**inputs, **settings)
    with dsteer.steer(model, V, positions=positions, site="resid_post.1"):
        always = model.generate(**inputs, **settings)
    with dsteer.steer(model, V, positions=positions, site="resid_post.1", when=condition):
        found = model.generate(**inputs, **settings)
        again = model.generate(**{k: x.flip(0) for k, x in inputs.items()}, **settings)
    meets_rows = torch.from_numpy(meets)
    assert torch.equal(found, torch.where(meets_rows[:, None], always, plain))
    assert torch.equal(again, found.flip(0))  # the second prompts are judged anew
    assert not torch.equal(plain[meets_rows], always[meets_rows])


def test_uncached_generation_judges_the_same(llama: Any) -> None:
    condition, _ = halving(llama)
    inputs = padded(PROMPTS, left=True)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with dsteer.steer(llama, V, site="resid_post.1", when=condition):
        cached = llama.generate(**inputs, **settings)
        assert torch.equal(llama.generate(**inputs, use_cache=False, **settings), cached)
        beams = llama.generate(**inputs, num_beams=2, **settings)
    with dsteer.steer(llama, V, site="resid_post.1"):
        assert not torch.equal(llama.generate(**inputs, num_beams=2, **settings), beams)


def test_several_interventions_with_their_own_conditions(llama: Any) -> None:
    condition, meets = halving(llama)
    opposite = Condition(SteeringVector(-C.tensor, C.site), -condition.threshold)
    what = [
        Intervention("resid_post.1", V, when=condition),
        Intervention("resid_post.2", -V, when=opposite),
        Intervention("resid_post.2", None, operation="scale", strength=0.1),
    ]
    inputs = padded(PROMPTS, left=True)
    with torch.no_grad():
        with dsteer.steer(llama, what) as hooks:
            found = llama(**inputs).logits
            assert hooks.sites == ("resid_post.1", "resid_post.2")
        for kept, rows in ((what[::2], meets), (what[1:], ~meets)):
            bare = [Intervention(i.site, i.vector, i.operation, i.strength) for i in kept]
            with dsteer.steer(llama, bare):
                assert torch.equal(llama(**inputs).logits[rows], found[rows])


def test_guided_only_where_the_condition_is_met(llama: Any) -> None:
    condition, meets = halving(llama)
    options: dict[str, Any] = {"weight": 2.0, "max_new_tokens": 6, "site": "resid_post.1"}
    plain = dsteer.guided(llama, TOKENIZER, PROMPTS, V, **{**options, "weight": 0.0})
    always = dsteer.guided(llama, TOKENIZER, PROMPTS, V, **options)
    found = dsteer.guided(llama, TOKENIZER, PROMPTS, V, when=condition, **options)
    wanted = [
        (always if met else plain).tokens[number] for number, met in enumerate(meets.tolist())
    ]
    assert list(found.tokens) == wanted
    assert found.tokens not in (always.tokens, plain.tokens)
    assert "condition judges" in str(found.note)
    with dsteer.Guidance(
        llama, V, weight=2.0, site="resid_post.1", when=condition
    ) as guidance:  # fmt: skip
        made = llama.generate(
            **padded(PROMPTS, left=True), max_new_tokens=6, do_sample=False, pad_token_id=0,
            eos_token_id=[1, 2], logits_processor=[guidance],
        )[:, 12:].tolist()  # fmt: skip
    for row, tokens in zip(made, wanted, strict=True):
        assert tuple(row[: len(tokens)]) == tokens


def test_an_encoder_judges_for_its_decoder() -> None:
    config = tf.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.T5ForConditionalGeneration(config).eval()
    inputs = padded(PROMPTS, left=False)
    with torch.no_grad():
        states = model.get_encoder()(**inputs).last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    along = states[range(6), last].double() @ (C.tensor / C.tensor.norm())
    threshold = float(along.sort().values[2:4].mean())
    condition = Condition(SteeringVector(C.tensor, "encoder"), threshold)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    with dsteer.steer(model, V, 20.0, site="resid_post.0"):
        always = model.generate(**inputs, **settings)
    with dsteer.steer(model, V, 20.0, site="resid_post.0", when=condition):
        found = model.generate(**inputs, **settings)
    meets = along >= threshold
    assert meets.sum() == 3
    assert torch.equal(found, torch.where(meets[:, None], always, plain))
    assert not torch.equal(plain[meets], always[meets])


# Fitting


def labelled(count: int) -> tuple[list[str], list[str]]:
    """Texts that end with a question mark, and texts that end with a full stop."""
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice(list("abcdefgh "), 6)) for _ in range(2 * count)]
    return [f"{text}?" for text in letters[:count]], [f"{text}." for text in letters[count:]]


def test_fitted_on_states_that_a_last_token_tells() -> None:
    """Vector and threshold by hand; states of block 0 tell the last token, so nothing is missed."""
    model, (asking, telling) = tiny_llama(), labelled(12)
    with torch.no_grad():  # so block 0 knows the token alone
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    found = fit_condition(model, TOKENIZER, asking, telling, site="resid_post.0")
    states = []
    for text in (*asking, *telling):
        ids = torch.tensor([encode(TOKENIZER, [text])[0].ids])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        states.append(out.hidden_states[1][0, -1].double().numpy())
    h = np.stack(states)
    difference = h[:12].mean(0) - h[12:].mean(0)
    unit = difference / np.linalg.norm(difference)
    # float32 states
    assert found.vector.tensor.numpy() == pytest.approx(unit, abs=1e-6)
    along = h @ unit
    middle = (along[:12].min() + along[12:].max()) / 2
    assert found.threshold == pytest.approx(middle, abs=1e-5)
    told = found.detection
    assert told is not None
    assert (told.n_positive, told.n_negative, told.folds) == (12, 12, 5)
    assert told.accuracy == 1.0
    assert told.precision is not None
    assert told.recall.value == told.precision.value == 1.0
    # Wilson at 12 of 12: 1/(1 + z²/12), z = 1.96
    assert told.recall.low == pytest.approx(1 / (1 + 1.959964**2 / 12), abs=1e-6)
    assert found.vector.metadata["model_type"] == "llama"
    with (
        torch.no_grad(),
        dsteer.steer(model, torch.ones(32), site="resid_post.2", when=found) as on,
    ):
        for text, wanted in (("unseen?", True), ("unseen.", False)):
            model(torch.tensor([encode(TOKENIZER, [text])[0].ids]))
            assert on.fired(found).tolist() == [wanted]  # type: ignore[union-attr]


def test_labels_that_mean_nothing_are_told_apart_only_in_sample() -> None:
    """Held-out precision and recall fall to chance, though the fit's own accuracy does not."""
    texts = [text for part in labelled(15) for text in part]
    np.random.default_rng(3).shuffle(texts)
    found = fit_condition(tiny_llama(), TOKENIZER, texts[:15], texts[15:], site="resid_post.3")
    told = found.detection
    assert told is not None
    assert told.accuracy > 0.75
    assert told.precision is not None
    assert told.precision.low is not None
    assert told.precision.low < 0.5  # half of the prompts are positive
    assert told.recall.value < 0.8


def test_counts_of_left_out_prompts_by_hand() -> None:
    """Each fold by numpy: a condition fitted without it judges it."""
    model, (asking, telling) = tiny_llama(), labelled(5)
    asking = [*asking, asking[0], "abc."]  # one twice, and one that looks like the others
    found = fit_condition(model, TOKENIZER, asking, telling, site="resid_post.0", folds=3, seed=2)
    sets = []
    for texts in (asking, telling):
        rows = []
        for text in texts:
            ids = torch.tensor([encode(TOKENIZER, [text])[0].ids])
            with torch.no_grad():
                rows.append(model(ids, output_hidden_states=True).hidden_states[1][0, -1].double())
        sets.append(torch.stack(rows).numpy())
    folds = []
    for texts in (asking, telling):
        ids = [item.ids for item in encode(TOKENIZER, texts)]
        order = np.random.default_rng(2).permutation(len(set(ids)))
        place = dict(zip(sorted(set(ids)), order, strict=True))
        folds.append(np.array([place[item] % 3 for item in ids]))
    assert folds[0][0] == folds[0][5]
    hits = alarms = 0
    for fold in range(3):
        p, n = (h[f != fold] for h, f in zip(sets, folds, strict=True))
        direction = p.mean(0) - n.mean(0)
        direction /= np.linalg.norm(direction)
        a, b = p @ direction, n @ direction
        edges = np.unique(np.concatenate([a, b]))
        middles = (edges[1:] + edges[:-1]) / 2
        score = [(round((a >= t).mean() + (b < t).mean(), 12), w) for t, w in zip(
            middles, np.diff(edges), strict=True)]  # fmt: skip
        threshold = middles[score.index(max(score))]
        hits += int((sets[0][folds[0] == fold] @ direction >= threshold).sum())
        alarms += int((sets[1][folds[1] == fold] @ direction >= threshold).sum())
    told = found.detection
    assert told is not None
    assert told.precision is not None
    assert told.recall.value == pytest.approx(hits / 7)
    assert told.precision.value == pytest.approx(hits / (hits + alarms))
    assert hits < 7


def test_equal_states_are_not_told_by_the_rounding_of_their_means() -> None:
    rows = np.tile(np.array([0.1, 0.7, -0.3]), (7, 1))
    assert (rows[:3].mean(0) != rows.mean(0)).any()
    with pytest.raises(MeasurementError, match="have the same mean state"):
        _fit("resid_post.0", rows[:3], rows)


# Mistakes


def test_mistakes_are_told_in_one_line(llama: Any) -> None:
    zero = SteeringVector(torch.zeros(32), "resid_post.0")
    late = Condition(SteeringVector(C.tensor, "final_norm"), 0.0)
    condition = Condition(C, 0.0)
    asking, telling = labelled(3)
    model = tiny_llama()

    def fitted(*sets: Any, **settings: Any) -> Callable[[], Any]:
        return lambda: fit_condition(
            model, TOKENIZER, *sets, **{"site": "resid_post.0", **settings}
        )

    def steered(what: Condition, **inputs: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad(), dsteer.steer(llama, V, site="resid_post.1", when=what, **inputs):
                cache = tf.DynamicCache(config=llama.config)
                llama(torch.tensor([[5, 6]]), past_key_values=cache)
                llama(torch.tensor([[7]]), past_key_values=cache)

        return run

    def continued() -> None:
        cache = tf.DynamicCache(config=llama.config)
        llama(torch.tensor([[5, 6]]), past_key_values=cache)
        with dsteer.steer(llama, V, site="resid_post.1", when=condition, prompt_lengths=[2]):
            llama(torch.tensor([[7]]), past_key_values=cache)

    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ConfigError, "position 'last' of a condition: no such", lambda: Condition(
            C, 0.0, "last")),
        (MeasurementError, "condition's vector at resid_post.0 is zero", lambda: Condition(
            zero, 0)),
        (MeasurementError, "threshold nan", lambda: Condition(C, float("nan"))),
        (ConfigError, "condition at final_norm for steering at resid_post.1", steered(late)),
        (ModelError, "condition's vector has width 3", steered(
            Condition(SteeringVector([1.0, 2, 3], "resid_post.0"), 0.0))),
        (ModelError, "none or only a part of it", steered(condition, prompt_lengths=[3])),
        (ModelError, "none or only a part of it", continued),
        (ConfigError, "when beside an Intervention", lambda: dsteer.steer(
            llama, Intervention("resid_post.1", V), when=condition).__enter__()),
        (DataError, "negative holds fewer than two different", fitted(asking, ["a", "a"])),
        (DataError, "prompt 1 of positive is among negative", fitted(asking, [asking[1], "b"])),
        (ConfigError, "folds 1", fitted(asking, telling, folds=1)),
        (ConfigError, "position 'all' of a condition", fitted(asking, telling, position="all")),
        (ConfigError, "resid_post.9", fitted(asking, telling, site="resid_post.9")),
        (MeasurementError, "the same mean state", lambda: fit_condition(
            silenced(model), TOKENIZER, asking, telling, site="resid_post.0")),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def silenced(model: Any) -> Any:
    """A model whose states are zero."""
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    return model
