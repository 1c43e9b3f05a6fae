"""Accumulated moments against extracted states, merging of shards, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import PROMPTS, planted_pair
from safetensors import SafetensorError
from seq2seq_models import eos_tokenizer, seq2seq

from dsteer.activations import accumulate as module
from dsteer.activations.accumulate import accumulate
from dsteer.activations.extract import extract
from dsteer.activations.moments import (
    PairedMoments,
    SiteMoments,
    open_moments,
    open_streamed,
    write_moments,
)
from dsteer.activations.spool import IdSpool
from dsteer.data.tokens import Encoded, hash_ids
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError, StoreError
from dsteer.geometry.spectrum import spectra_from_moments
from dsteer.geometry.sums import NULL_DRAWS, bucket_of, signs_of
from dsteer.models.pair import ModelPair
from dsteer.steering.build import mean_difference
from dsteer.store import write_tensors

SITES = ("resid_post.1", "final_norm")
D = 32


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return planted_pair(1).pair


@pytest.mark.parametrize("rows", [1, 3, None])
def test_moments_are_those_of_the_extracted_states(pair: ModelPair, rows: int | None) -> None:
    acts = extract(pair, PROMPTS, batch_tokens=128)
    moments = accumulate(pair, iter(PROMPTS), batch_tokens=128, rows=rows)
    assert moments.sites == acts.sites
    assert (moments.n, moments.position) == (len(PROMPTS), "prompt_last")
    assert moments.ids_sha256 == hash_ids(acts.encoded)
    for site in acts.sites:
        found = moments[site]
        states = {
            "base": acts.base[site].double().numpy(),
            "tuned": acts.tuned[site].double().numpy(),
            "delta": acts.displacement(site).numpy(),
        }
        for name, matrix in states.items():
            sums = found.matrices[name]
            scale = np.abs(matrix).max()
            np.testing.assert_allclose(sums.mean, matrix.mean(axis=0), atol=1e-13 * scale)
            second = matrix.T @ matrix / len(matrix)
            np.testing.assert_allclose(sums.second_moment, second, atol=1e-12 * scale**2)
            sigma = np.linalg.svd(matrix, compute_uv=False)
            got = spectra_from_moments(sums)[0].singular_values
            np.testing.assert_allclose(got, sigma, atol=1e-10 * max(sigma[0], 1e-300))
        norms = np.linalg.norm(states["base"], axis=1)
        assert found.base_norms == pytest.approx(norms.sum(), rel=1e-12)
    vectors, expected = mean_difference(moments), mean_difference(acts)
    for site in acts.sites:
        torch.testing.assert_close(vectors[site].tensor, expected[site].tensor, atol=1e-14, rtol=0)
        assert vectors[site].metadata["n"] == len(PROMPTS)
    with pytest.raises(MeasurementError, match="accumulate those prompts alone"):
        mean_difference(moments, rows=slice(2))


def test_shards_merge_into_the_whole(pair: ModelPair) -> None:
    # one prompt a batch, so that a prompt has the same states in every shard
    given: dict[str, Any] = {"sites": SITES, "batch_tokens": 1}
    whole = accumulate(pair, PROMPTS, **given)
    parts = [accumulate(pair, PROMPTS[at::3], **given) for at in range(3)]
    sent = [PairedMoments.from_tensors(p.tensors(), p.position, p.ids_sha256) for p in parts]
    merged = sent[0].merged(*sent[1:])
    assert merged.n == whole.n
    for site in SITES:
        for name, moments in whole[site].matrices.items():
            found = merged[site].matrices[name]
            np.testing.assert_allclose(found.mean, moments.mean, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(
                found.second_moment, moments.second_moment, rtol=1e-11, atol=1e-13
            )
        assert merged[site].base_norms == pytest.approx(whole[site].base_norms)
    assert sent[0].n == 3  # merging leaves the parts alone
    assert sent[0].merged().ids_sha256 == sent[0].ids_sha256
    other = accumulate(pair, PROMPTS, sites=["final_norm"])
    with pytest.raises(MeasurementError, match="moments of final_norm at prompt_last, expected"):
        whole.merged(other)
    with pytest.raises(MeasurementError, match="moments of nothing, expected moments of delta"):
        whole["final_norm"].merge(SiteMoments(D, ()))


def test_conversations_fall_into_their_buckets(pair: ModelPair) -> None:
    prompts = [
        PreferencePair(text, conversation=f"talk {i // 4}") for i, text in enumerate(PROMPTS)
    ]
    sums = accumulate(pair, prompts, sites="final_norm")["final_norm"].sums
    expected = np.zeros(len(sums.rows))
    for key in ("talk 0", "talk 1"):
        expected[bucket_of(key)] += 4
    assert (sums.rows == expected).all()


def test_conversations_keep_their_signs(pair: ModelPair) -> None:
    prompts = [
        PreferencePair(text, conversation=f"talk {i // 4}") for i, text in enumerate(PROMPTS)
    ]
    bits = np.array([np.unpackbits(np.frombuffer(signs_of(p.conversation), "u1")) for p in prompts])
    signs = 2.0 * bits.reshape(len(prompts), 2, NULL_DRAWS) - 1
    for position in ("prompt_last", "all"):
        acts = extract(pair, prompts, sites="final_norm", position=position, batch_tokens=128)
        delta = acts.displacement("final_norm").numpy()
        of = np.repeat(signs, np.diff(acts.offsets), axis=0)
        unit = delta / np.linalg.norm(delta, axis=1)[:, None]
        for rows in (1, 3):  # parts
            sums = accumulate(
                pair, prompts, sites="final_norm", position=position, batch_tokens=128, rows=rows
            )["final_norm"].sums
            # float64 sums of some 400 rows of size 10 in another order
            np.testing.assert_allclose(sums.signed_total, of[:, 0].T @ delta, atol=1e-10)
            np.testing.assert_allclose(sums.signed_unit, of[:, 1].T @ unit, atol=1e-10)


def test_a_killed_reading_goes_on(
    tmp_path: Path, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"sites": SITES, "batch_tokens": 64, "rows": 1}
    accumulate(pair, PROMPTS, folder=tmp_path / "whole", **given)
    read, calls = module.Reading.read, []

    def counted(self: Any, *rest: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return read(self, *rest, **more)

    monkeypatch.setattr(module.Reading, "read", counted)
    with pytest.raises(OSError, match="No space"):
        accumulate(pair, PROMPTS, folder=tmp_path / "cut", **given)
    found = accumulate(pair, PROMPTS, folder=tmp_path / "cut", **given)
    whole, cut = (tmp_path / name / "moments.safetensors" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()
    assert [path.name for path in cut.parent.iterdir()] == ["moments.safetensors"]
    done = len(calls)
    again = accumulate(pair, PROMPTS, folder=tmp_path / "cut", **given)
    assert len(calls) == done  # nothing is read twice
    assert again.n == found.n == len(PROMPTS)
    accumulate(pair, PROMPTS[:5], folder=tmp_path / "cut", **given)  # other prompts: begun anew
    assert open_moments(cut)["all"].n == 5


def test_models_that_do_not_fit_together_are_read_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = planted_pair(1).save(tmp_path / "models")
    given: dict[str, Any] = {"sites": SITES, "batch_tokens": 256, "rows": 4}
    accumulate(ModelPair.load(base, tuned), PROMPTS, folder=tmp_path / "both", **given)
    monkeypatch.setattr("dsteer.models.pair._free_memory", lambda _model: 0)
    read, loaded = module.Reading.read, []

    def watched(self: Any, *rest: Any, **more: Any) -> Any:
        loaded.append(list(pair._models))
        return read(self, *rest, **more)

    monkeypatch.setattr(module.Reading, "read", watched)
    pair = ModelPair.load(base, tuned)
    accumulate(pair, PROMPTS, folder=tmp_path / "one", **given)
    assert len(loaded) > 2
    assert loaded == [["base"], ["tuned"]] * (len(loaded) // 2)
    both, one = (tmp_path / name / "moments.safetensors" for name in ("both", "one"))
    assert one.read_bytes() == both.read_bytes()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_said_in_one_line(
    tmp_path: Path, pair: ModelPair, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(module, "write_moments", full)
    with pytest.raises(StoreError, match=r"can't be written .No space left on device.; free space"):
        accumulate(pair, PROMPTS, folder=tmp_path / "new")
    assert not list(tmp_path.glob("new/*"))


def test_one_prompt_has_moments(pair: ModelPair) -> None:
    moments = accumulate(pair, PROMPTS[:1], sites="final_norm")["final_norm"]
    uncentred, centred = spectra_from_moments(moments.matrices["delta"])
    assert uncentred.sigma_ratio == 0
    assert centred.sigma_ratio is None


@pytest.mark.parametrize(
    ("prompts", "kind", "words"),
    [
        ("one text", DataError, "one text; expected a list"),
        ([], DataError, "no prompts to read"),
        (
            ["fine"] * 1030 + [[{"role": "assistant", "content": "Hi"}]],
            DataError,
            "all, counted from its prompt 1024: prompt 6 ends with an answer",
        ),
        (["x", Encoded((3, 4), 2)], DataError, "1 of 2 prompts are token ids"),
        ([Encoded((9999,), 1)], ModelError, "prompt 0 has the token id 9999"),
    ],
    ids=["text", "none", "late", "mixed", "id"],
)
def test_bad_prompts_are_refused_before_anything_is_written(
    tmp_path: Path, pair: ModelPair, prompts: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        accumulate(pair, prompts, folder=tmp_path / "new")
    assert not list(tmp_path.glob("new/*"))


def test_encoder_decoders_are_refused_before_any_prompt(tmp_path: Path) -> None:
    both = ModelPair.load(seq2seq("t5"), seq2seq("t5", 1), tokenizer=eos_tokenizer())
    stream = iter(PROMPTS)
    with pytest.raises(ModelError, match=r"encoder-decoder model.*set activations\.store: states"):
        accumulate(both, stream, folder=tmp_path / "new")
    assert len(list(stream)) == len(PROMPTS)
    assert not (tmp_path / "new").exists()


def test_an_unknown_site_is_refused(pair: ModelPair) -> None:
    with pytest.raises(ConfigError, match="no such site"):
        accumulate(pair, PROMPTS, sites=["nowhere"])


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, pair: ModelPair) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="can't be written"):
        accumulate(pair, PROMPTS, folder=tmp_path / "taken")


def test_files_that_hold_no_moments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    assert open_streamed(tmp_path) is None
    write_tensors(path, {"x": np.zeros(3)})
    with pytest.raises(StoreError, match="holds no moments"):
        open_streamed(tmp_path)
    known = {"position": "all", "ids_sha256": "0", "parts": [1, 2]}
    write_moments(path, {"fit": {"final_norm": SiteMoments(3)}}, known)
    with pytest.raises(StoreError, match="holds 1 of 2 parts"):
        open_moments(path)
    assert open_moments(path, unfinished=True)["fit"].n == 0


def test_the_spool_gives_back_what_it_was_given(tmp_path: Path) -> None:
    items = [Encoded((1, 2, 3), 2, truncated=True), Encoded((70000,), 1), Encoded((5, 6), 2)]
    with IdSpool(tmp_path / "ids") as spool:
        for item in items:
            spool.append(item)
            assert spool[len(spool) - 1] == item
        assert list(spool) == items
        assert spool[1:] == items[1:]
        assert (spool.tokens, spool.truncated) == (6, 1)
        assert hash_ids(spool) == hash_ids(items)
        with pytest.raises(IndexError):
            spool[3]
    assert not list(tmp_path.iterdir())
