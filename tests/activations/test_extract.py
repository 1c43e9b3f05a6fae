"""A pair over prompts: the planted truth, streaming, resuming, and what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from planted import PROMPTS, byte_tokenizer, planted_pair, tiny_llama

import dsteer
from dsteer.activations import reading as reading_module
from dsteer.activations.extract import PairedActivations, encode_for, extract
from dsteer.activations.reading import Reading, has_foreign_hooks, noise_floor, sample_weights
from dsteer.activations.storage import FileSink
from dsteer.data.tokens import Encoded
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError, StoreError
from dsteer.models.pair import ModelPair

FILES = ["base.safetensors", "ids.safetensors", "tuned.safetensors"]


@pytest.mark.parametrize("block", range(4))
def test_planted_constant_is_found_at_its_block_and_nowhere_before(block: int) -> None:
    planted = planted_pair(block)
    acts = extract(planted.pair, PROMPTS, batch_tokens=128)
    for k in range(block):
        assert not acts.displacement(f"resid_post.{k}").any()  # exactly 0
    delta = acts.displacement(f"resid_post.{block}")
    assert delta.dtype == torch.float64
    # h + b is rounded to float32 where |h| is up to about 10: 1e-6
    assert torch.allclose(delta, planted.b.double().expand_as(delta), atol=1e-5)
    for site in acts.sites[block + 1 :]:
        after = acts.displacement(site)
        assert (after - after.mean(0)).norm() > 0.1  # no constant any more


def test_a_model_against_itself_differs_by_exactly_nothing() -> None:
    model = tiny_llama()
    acts = extract(ModelPair.load(model, model, tokenizer=byte_tokenizer()), PROMPTS)
    assert not any(acts.displacement(site).any() for site in acts.sites)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_tokenizer_does_not_matter(side: str) -> None:
    planted = planted_pair(1)
    expected = extract(planted.pair, PROMPTS, batch_tokens=300)
    planted.tokenizer.padding_side = side
    found = extract(planted.pair, PROMPTS, batch_tokens=300)
    assert all(torch.equal(found.base[site], expected.base[site]) for site in found.sites)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    planted = planted_pair(1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(extract(planted.pair, PROMPTS, batch_tokens=100))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other.tuned[site], found[0].tuned[site]) for site in other.sites)


def test_sites_and_rows_are_in_order() -> None:
    planted = planted_pair(1)
    every = extract(planted.pair, PROMPTS)
    some = extract(planted.pair, PROMPTS, sites=["final_norm", "resid_post.2"])
    assert some.sites == ("resid_post.2", "final_norm")
    assert (
        every.sites == tuple(every.base) == (*(f"resid_post.{k}" for k in range(4)), "final_norm")
    )
    turned = extract(planted.pair, PROMPTS[::-1])
    assert torch.allclose(turned.base["final_norm"].flip(0), every.base["final_norm"], atol=1e-5)


def test_answers_and_all_tokens() -> None:
    planted = planted_pair(1)
    pairs = [PreferencePair(prompt=text, chosen=" Yes, of course.") for text in PROMPTS[:3]]
    whole = extract(planted.pair, encode_for(planted.pair, pairs, position="response_last"),
                    position="all")  # fmt: skip
    assert whole.offsets == (0, *(sum(len(e.ids) for e in whole.encoded[:n]) for n in (1, 2, 3)))
    states = whole.base["final_norm"]
    spans = [range(*whole.offsets[n : n + 2]) for n in range(3)]
    cuts = [(span, item.prompt_length) for span, item in zip(spans, whole.encoded, strict=True)]
    expected = {
        "prompt_last": [states[span[p - 1]] for span, p in cuts],
        "prompt_mean": [states[span.start : span.start + p].mean(0) for span, p in cuts],
        "response_last": [states[span[-1]] for span, _ in cuts],
        "response_mean": [states[span.start + p : span.stop].mean(0) for span, p in cuts],
    }
    for position, rows in expected.items():
        found = extract(planted.pair, pairs, position=position)
        assert torch.allclose(found.base["final_norm"], torch.stack(rows), atol=1e-5), position
    found = extract(planted.pair, pairs, position="response_predictors")
    rows = torch.cat([states[span.start + p - 1 : span.stop - 1] for span, p in cuts])
    assert torch.allclose(found.base["final_norm"], rows, atol=1e-5)
    part = found.select(slice(1, 3))
    assert torch.equal(part.base["final_norm"], found.base["final_norm"][found.offsets[1] :])
    assert part.offsets[0] == 0


def test_long_prompts_are_cut_to_the_models_context_and_counted() -> None:
    model = tiny_llama(max_position_embeddings=32)
    pair = ModelPair.load(model, model, tokenizer=byte_tokenizer())
    acts = extract(pair, [PROMPTS[0], "short"], max_tokens=1000)
    assert [len(item.ids) for item in acts.encoded] == [32, 6]
    assert acts.truncated == 1
    assert acts.encoded[0].ids[0] == 0  # BOS stays
    assert extract(pair, [PROMPTS[0]], max_tokens=10).encoded[0].prompt_length == 10
    with pytest.raises(DataError, match="40 tokens, and the models were made for 32"):
        extract(pair, [Encoded(tuple(range(40)), 40)])


# ---------------------------------------------------------------------------------- on disk


def test_streamed_states_equal_those_in_memory(tmp_path: Path) -> None:
    planted = planted_pair(2)
    held = extract(planted.pair, PROMPTS, batch_tokens=128)
    stored = extract(planted.pair, PROMPTS, batch_tokens=128, folder=tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == FILES
    for acts in (stored, PairedActivations.open(tmp_path)):
        assert acts.sites == held.sites
        assert acts.encoded == held.encoded
        assert acts.offsets == held.offsets
        for site in held.sites:
            assert torch.equal(acts.base[site], held.base[site])
            assert torch.equal(acts.displacement(site), held.displacement(site))
            assert torch.equal(acts.select(slice(2, 5)).tuned[site], held.tuned[site][2:5])


@pytest.mark.parametrize("position", ["prompt_mean", "all"])
def test_stored_offsets_return(tmp_path: Path, position: str) -> None:
    acts = extract(planted_pair(1).pair, PROMPTS, position=position, folder=tmp_path)
    assert PairedActivations.open(tmp_path).offsets == acts.offsets
    assert acts.base.n == acts.offsets[-1]


def test_work_is_not_redone_nor_reused_for_something_else(tmp_path: Path, monkeypatch) -> None:
    planted = planted_pair(2)
    extract(planted.pair, PROMPTS, folder=tmp_path)
    passes = []
    put = FileSink.put

    def count(self: FileSink, *rest: object) -> None:
        passes.append(1)
        put(self, *rest)

    monkeypatch.setattr(FileSink, "put", count)
    extract(planted.pair, PROMPTS, folder=tmp_path)
    assert not passes  # the same again: nothing to do
    other = ModelPair.load(planted.base, planted_pair(1).tuned, tokenizer=planted.tokenizer)
    acts = extract(other, PROMPTS, folder=tmp_path)
    assert passes  # other weights on the same prompts and shapes
    assert acts.displacement("resid_post.1").any()
    first = acts.base["final_norm"][0].clone()
    passes.clear()
    turned = extract(other, PROMPTS[::-1], folder=tmp_path)
    assert passes  # other prompts of the same shapes
    assert torch.allclose(turned.base["final_norm"][-1], first, atol=1e-5)
    with pytest.raises(StoreError, match="was replaced since it was opened"):
        acts.base["final_norm"]


def test_hooks_of_others_are_seen_and_never_resumed_over(tmp_path: Path) -> None:
    planted = planted_pair(2)
    plain = extract(planted.pair, PROMPTS, folder=tmp_path).base["resid_post.1"].clone()
    assert not has_foreign_hooks(planted.base)
    with torch.no_grad():  # transformers leaves hooks of its own behind
        planted.base(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert not has_foreign_hooks(planted.base)
    handle = planted.base.model.layers[1].register_forward_hook(lambda _m, _i, out: out + 1)
    assert has_foreign_hooks(planted.base)
    steered = extract(planted.pair, PROMPTS, folder=tmp_path).base["resid_post.1"]
    handle.remove()
    assert torch.equal(steered, plain + 1)


KILLED = """
    import os, signal, sys
    sys.path[:0] = {paths!r}
    import torch
    torch.set_num_threads({threads})
    from pathlib import Path
    from planted import PROMPTS, planted_pair
    from dsteer.activations.extract import extract
    from dsteer.activations.storage import FileSink

    put, calls = FileSink.put, []

    def killed(self, *rest):
        put(self, *rest)
        calls.append(1)
        if len(calls) == {after}:
            os.kill(os.getpid(), signal.SIGKILL)

    FileSink.put = killed
    extract(planted_pair(2).pair, PROMPTS, batch_tokens=60, folder=Path({folder!r}))
"""


@pytest.mark.parametrize(("after", "threads"), [(2, 1), (7, 2)])
def test_kill_9_resumes_with_identical_bytes(tmp_path: Path, after: int, threads: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extract(planted_pair(2).pair, PROMPTS, batch_tokens=60, folder=whole)
    tests = Path(__file__).parents[1]
    script = textwrap.dedent(KILLED).format(
        paths=[str(tests.parent), str(tests)], threads=threads, after=after, folder=str(cut)
    )
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert any(item.name.endswith(".partial") for item in cut.iterdir())
    extract(planted_pair(2).pair, PROMPTS, batch_tokens=60, folder=cut)
    assert sorted(item.name for item in cut.iterdir()) == FILES
    assert all((cut / name).read_bytes() == (whole / name).read_bytes() for name in FILES)


def test_resumed_work_reads_only_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    planted = planted_pair(2)
    encoded = encode_for(planted.pair, PROMPTS)
    reading = Reading.of(planted.pair, encoded, batch_tokens=60)
    put, calls = FileSink.put, []

    def stop(self: FileSink, number: int, *rest: object) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(number)
        put(self, number, *rest)

    monkeypatch.setattr(FileSink, "put", stop)
    monkeypatch.setattr(reading_module, "workers_for", lambda *_: 1)
    with pytest.raises(KeyboardInterrupt):
        reading.run(planted.base, "base", tmp_path / "base.safetensors")
    first = list(calls)
    calls.clear()
    monkeypatch.setattr(FileSink, "put", lambda self, n, *r: (calls.append(n), put(self, n, *r))[1])
    reading.run(planted.base, "base", tmp_path / "base.safetensors")
    assert not set(first) & set(calls)


# ---------------------------------------------------------------------------------- noise


def test_noise_floor_is_rounding_and_no_more() -> None:
    planted = planted_pair(1)
    reading = Reading.of(planted.pair, encode_for(planted.pair, PROMPTS), batch_tokens=400)
    states = reading.run(planted.base, "base")
    floor = noise_floor(reading, planted.base, states, prompts=6)
    assert set(floor) == set(reading.sites)
    for site, noise in floor.items():
        size = float(states[site].norm(dim=1).mean())
        assert noise.mean_norm <= noise.rms < 1e-5 * size
    shifted = type(states).hold({site: states[site] + 3.0 for site in states})
    worse = noise_floor(reading, planted.base, shifted, prompts=6)["resid_post.0"]
    # a constant 3 in each of 32 dimensions is 3·√32 = 16.97 long, and its mean as well
    assert worse.rms == pytest.approx(3 * 32**0.5, rel=1e-5)
    assert worse.mean_norm == pytest.approx(3 * 32**0.5, rel=1e-5)


# ---------------------------------------------------------------------------------- refusals


def test_states_that_are_not_finite_are_refused() -> None:
    planted = planted_pair(1)
    with torch.no_grad():
        planted.tuned.model.layers[2].mlp.down_proj.bias[0] = float("inf")
    with pytest.raises(MeasurementError, match=r"resid_post\.2 of the tuned model .*not finite"):
        extract(planted.pair, PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "message"),
    [
        ([], {}, DataError, "no prompts to read"),
        ("one text", {}, DataError, "expected a list of prompts"),
        (["x"], {"sites": ["resid_post.4"]}, ConfigError, "the model has 4 blocks"),
        (["x"], {"position": "last"}, ConfigError, "no such position"),
        (["x"], {"template": "jinja"}, ConfigError, "expected none or chat"),
        (["x"], {"position": "response_last"}, DataError, "no chosen answer"),
        (["x", Encoded((3, 4), 2)], {}, DataError, "1 of 2 prompts are token ids and the others"),
        ([Encoded((3, 999), 2)], {}, ModelError, "token id 999, and the models have only 260"),
    ],
)
def test_what_cannot_be_read_is_refused(prompts, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        extract(planted_pair(1).pair, prompts, **options)


def test_chat_without_a_template_is_refused() -> None:
    planted = planted_pair(1)
    pair = ModelPair.load(planted.base, planted.tuned, tokenizer=byte_tokenizer(template=None))
    with pytest.raises(ModelError, match="no chat template"):
        extract(pair, PROMPTS, template="chat")


def test_weights_are_told_apart() -> None:
    planted = planted_pair(3)
    assert sample_weights(planted.base) == sample_weights(planted_pair(0).base)
    assert sample_weights(planted.base) != sample_weights(planted.tuned)


def test_extract_is_importable_from_the_top() -> None:
    assert dsteer.extract is extract
    assert dsteer.ModelPair is ModelPair
