"""Vectors built on mlx-lm models, in both kinds of files, and the scale of quantised models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mlx_models import Both, both
from planted import PROMPTS, planted_pair

pytest.importorskip("mlx_lm", reason="needs mlx-lm: no wheels for this platform")

import mlx.core as mx
import mlx.nn as nn

import dsteer
import dsteer.mlx
from dsteer.errors import ConfigError, DataError, MeasurementError, StoreError
from dsteer.mlx.scale import Scale

PAIRS = [
    ("I am glad to help you.", "I help you."),
    ("What a lovely day it is!", "It is a day."),
    ("Thank you so much for asking.", "You asked."),
    ("With pleasure: the answer is four.", "The answer is four."),
    ("Of course, my friend, here it is.", "Here it is."),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both("llama", tmp_path_factory.mktemp("llama"))


def quantised(folder: Path, bits: int) -> object:
    """The model of a folder with its weights in groups of 32, as ``mlx_lm.convert -q`` has them."""
    model, _ = dsteer.mlx.load(folder)
    nn.quantize(
        model,
        group_size=32,
        bits=bits,
        class_predicate=lambda _, module: (
            hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        ),
    )
    return model


# ---------------------------------------------------------------------------------- builders


@pytest.mark.parametrize("method", ["mean", "pca", "logistic"])
@pytest.mark.parametrize("position", ["last", "first", "mean"])
def test_contrast_vectors_are_dsteers(llama: Both, method: str, position: str) -> None:
    pairs = [(f"{number} {p}", n) for number, (p, n) in enumerate(PAIRS)]
    settings = {"method": method, "position": position}
    if position == "first":  # without BOS texts begin with different tokens
        texts = [dsteer.ContrastPair(p, n) for p, n in pairs]
        found = dsteer.mlx.contrast(llama.mlx, llama.mlx_tokenizer, texts, **settings)
        assert all(vector.undefined for vector in found.values())  # BOS in all
        return
    expected = dsteer.contrast(llama.torch, llama.tokenizer, pairs, **settings)
    found = dsteer.mlx.contrast(llama.mlx, llama.mlx_tokenizer, pairs, **settings)
    assert list(found) == list(expected)
    for site, vector in expected.items():
        # float32 states, right to 1e-6 of their norm, of which differences are a tenth or more
        error = (found[site].tensor - vector.tensor).norm() / vector.tensor.norm()
        assert float(error) < 1e-4, site
        assert found[site].metadata["accuracy"] == vector.metadata["accuracy"]
    assert found.metadata["ids_sha256"] == expected.metadata["ids_sha256"]
    assert found.metadata["model_type"] == "llama"
    assert found.metadata["backend"] == "mlx"
    assert found.metadata["quantisation"] is None


def test_contrast_of_messages(llama: Both) -> None:
    ask = {"role": "user", "content": "Hi"}
    pairs = [
        ([ask, {"role": "assistant", "content": "Hello, my friend!"}],
         [ask, {"role": "assistant", "content": "Hello."}]),
        ([ask], [{"role": "user", "content": "Go"}]),
    ]  # fmt: skip
    expected = dsteer.contrast(llama.torch, llama.tokenizer, pairs)
    found = dsteer.mlx.contrast(llama.mlx, llama.mlx_tokenizer, pairs)
    assert found.metadata["ids_sha256"] == expected.metadata["ids_sha256"]


def test_prefix_contrast_by_hand(llama: Both) -> None:
    """From transformers' own hidden states, one text at a time, in float64."""
    prompts = ["How do I boil an egg?", "Name a river.", "Sum 2 and 3."]
    prefixes = {"polite": ["Be kind. ", "Please. "], "brief": ["In short: "]}

    def mean_state(text: str) -> np.ndarray:
        ids = llama.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = llama.torch(ids, output_hidden_states=True).hidden_states
        return states[2][0].double().mean(0).numpy()  # the output of block 1

    plain = np.mean([mean_state(text) for text in prompts], axis=0)
    parts = [
        plain - np.mean([mean_state(one + text) for one in own for text in prompts], axis=0)
        for own in prefixes.values()
    ]
    args = (llama.mlx, llama.mlx_tokenizer, prompts, prefixes)
    raw = dsteer.mlx.prefix_contrast(*args, normalise=None)["resid_post.1"]
    # float32 states of norm 10 against differences of about 1
    np.testing.assert_allclose(raw.tensor.numpy(), np.mean(parts, axis=0), atol=1e-5)
    units = [part / np.linalg.norm(part) for part in parts]
    found = dsteer.mlx.prefix_contrast(*args)
    np.testing.assert_allclose(
        found["resid_post.1"].tensor.numpy(), np.mean(units, axis=0), atol=1e-5
    )
    norms = dict(zip(prefixes, (float(np.linalg.norm(part)) for part in parts), strict=True))
    assert found["resid_post.1"].metadata["norms"] == pytest.approx(norms, rel=1e-4)
    assert found.metadata["direction"] == "from prefixed to plain"
    back = dsteer.mlx.prefix_contrast(*args, direction="to_prefixed")["resid_post.1"]
    assert torch.equal(back.tensor, -found["resid_post.1"].tensor)


def test_mistakes_of_builders(llama: Both) -> None:
    both_models = (llama.mlx, llama.mlx_tokenizer)
    contrast, prefix = dsteer.mlx.contrast, dsteer.mlx.prefix_contrast
    with pytest.raises(ConfigError, match="position 'all': no such position for MLX models"):
        contrast(*both_models, PAIRS, position="all")
    with pytest.raises(ConfigError, match="method 'median': no such method"):
        contrast(*both_models, PAIRS, method="median")
    with pytest.raises(DataError, match="there are no contrast pairs"):
        contrast(*both_models, [])
    with pytest.raises(ConfigError, match=r"direction 'to_planes': no such .* 'to_plain'"):
        prefix(*both_models, ["a"], ["b"], direction="to_planes")
    with pytest.raises(ConfigError, match=r"normalise 'units': no such .* 'unit'"):
        prefix(*both_models, ["a"], ["b"], normalise="units")
    with pytest.raises(ConfigError, match="position 'median': no such"):
        prefix(*both_models, ["a"], ["b"], position="median")
    with pytest.raises(DataError, match="there is no list of prompts"):
        prefix(*both_models, [], ["b"])
    with pytest.raises(DataError, match="a category without prefixes"):
        prefix(*both_models, ["a"], {"polite": []})
    with pytest.raises(MeasurementError, match=r"category prefixes changes no state at .*'first'"):
        prefix(*both_models, ["a"], ["b"], position="first")


# ---------------------------------------------------------------------------------- files


def test_vectors_both_ways(tmp_path: Path) -> None:
    vectors = dsteer.SteeringVectorSet(
        [
            dsteer.SteeringVector([1.5, -2.25, 1 / 3], "resid_post.10", n=4),
            dsteer.SteeringVector([0.0, 1e-9, 7.0], "final_norm"),
        ],
        {"position": "prompt_last"},
    )
    float32 = {site: one.tensor.float() for site, one in vectors.items()}
    for ending in ("safetensors", "npz"):
        path = tmp_path / f"v.{ending}"
        dsteer.mlx.save_arrays(vectors, path)
        arrays = mx.load(str(path))
        assert {key: array.tolist() for key, array in arrays.items()} == {
            site: tensor.tolist() for site, tensor in float32.items()
        }
        back = dsteer.mlx.load_vectors(path)
        assert {site: one.tensor.tolist() for site, one in back.items()} == {
            site: tensor.double().tolist() for site, tensor in float32.items()
        }
    assert dsteer.mlx.load_vectors(tmp_path / "v.safetensors").metadata == vectors.metadata
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.npz", "v.safetensors"]


def test_files_of_mlx_itself(tmp_path: Path) -> None:
    """Half precision too, which numpy lacks."""
    arrays = {"resid_post.1": mx.array([1.0, 2.5]).astype(mx.bfloat16)}
    mx.save_safetensors(str(tmp_path / "v.safetensors"), arrays)
    mx.savez(str(tmp_path / "v.npz"), **{"resid_post.1": mx.array([1.0, 2.5], mx.float16)})
    for name in ("v.safetensors", "v.npz"):
        found = dsteer.mlx.load_vectors(tmp_path / name)
        assert found["resid_post.1"].tensor.tolist() == [1.0, 2.5]
    found = dsteer.mlx.from_arrays(arrays, {"made": "by hand"})
    assert found["resid_post.1"].tensor.tolist() == [1.0, 2.5]
    assert found.metadata == {"made": "by hand"}
    assert dsteer.mlx.to_arrays(found)["resid_post.1"].tolist() == [1.0, 2.5]


def test_mistakes_of_files(tmp_path: Path) -> None:
    vectors = dsteer.SteeringVectorSet([dsteer.SteeringVector([1.0], "final_norm")])
    with pytest.raises(ConfigError, match=r"v\.pt: expected a name that ends in"):
        dsteer.mlx.save_arrays(vectors, tmp_path / "v.pt")
    with pytest.raises(StoreError, match=r"v\.npz: no such file"):
        dsteer.mlx.load_vectors(tmp_path / "v.npz")
    (tmp_path / "v.npz").write_bytes(b"not a file of arrays")
    with pytest.raises(StoreError, match="no set of steering vectors"):
        dsteer.mlx.load_vectors(tmp_path / "v.npz")
    np.savez(tmp_path / "v.npz", final_norm=np.ones((2, 2)))
    with pytest.raises(StoreError, match=r"no set of steering vectors .*shape \(2, 2\)"):
        dsteer.mlx.load_vectors(tmp_path / "v.npz")


def test_one_file_steers_both(llama: Both, tmp_path: Path) -> None:
    """A vector that was built here steers transformers to the same text, from one file."""
    built = dsteer.mlx.contrast(llama.mlx, llama.mlx_tokenizer, PAIRS, sites=["resid_post.1"])
    built.save(tmp_path / "v.safetensors")
    vector = dsteer.SteeringVectorSet.load(tmp_path / "v.safetensors")["resid_post.1"]
    result = dsteer.sweep(
        llama.torch, llama.tokenizer, [PROMPTS[0]], vector, [0.0, 4.0], max_new_tokens=12
    )
    text = dsteer.mlx.generate(
        llama.mlx, llama.mlx_tokenizer, PROMPTS[0], vector, 4.0, max_new_tokens=12
    )
    assert text == result.texts[1][0] != result.texts[0][0]
    raw = mx.load(str(tmp_path / "v.safetensors"))["resid_post.1"]
    assert text == dsteer.mlx.generate(
        llama.mlx, llama.mlx_tokenizer, PROMPTS[0], raw, 4.0, site="resid_post.1", max_new_tokens=12
    )


# ---------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_are_read_steered_and_guided(llama: Both, bits: int) -> None:
    model = quantised(llama.folder, bits)
    wide = dsteer.mlx.read(llama.mlx, PROMPTS, tokenizer=llama.mlx_tokenizer)
    states = dsteer.mlx.read(model, PROMPTS, tokenizer=llama.mlx_tokenizer)
    vectors = dsteer.mlx.contrast(model, llama.mlx_tokenizer, PAIRS)
    assert vectors.metadata["quantisation"] == f"{bits} bits, groups of 32"
    shares = [float((states[s] - wide[s]).norm() / wide[s].norm()) for s in wide]
    # steps of 2^-8 of a group's range, and of 2^-4, through four random layers
    assert 1e-4 < max(shares) < {8: 0.1, 4: 1.0}[bits]
    vector = dsteer.SteeringVector(torch.ones(32), "resid_post.1")
    with dsteer.mlx.steer(model, vector, 2.0):
        moved = dsteer.mlx.read(model, PROMPTS, tokenizer=llama.mlx_tokenizer)
    # exact but for float32's rounding: the vector is not quantised
    torch.testing.assert_close(
        moved["resid_post.1"] - states["resid_post.1"],
        torch.full_like(moved["resid_post.1"], 2.0), rtol=0, atol=1e-4,
    )  # fmt: skip
    plain, steered, guided = (
        dsteer.mlx.generate(model, llama.mlx_tokenizer, PROMPTS[0], *args, max_new_tokens=8, **kw)
        for args, kw in (((), {}), ((vector, 2.0), {}), ((vector, 2.0), {"guidance": 0.0}))
    )
    assert guided == plain != steered


def test_the_natural_scale_is_a_ratio_of_norms(tmp_path: Path) -> None:
    """Planted: the embedding and all that the blocks write is doubled, so the stream is too."""
    planted = planted_pair(block=1)
    planted.save(tmp_path)
    model, tokenizer = dsteer.mlx.load(tmp_path / "base")
    double, _ = dsteer.mlx.load(tmp_path / "base")
    double.model.embed_tokens.weight = double.model.embed_tokens.weight * 2
    for layer in double.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight = part.weight * 2
    settings = {"tokenizer": tokenizer, "position": "prompt_last"}
    scales = dsteer.mlx.natural_scale(double, model, PROMPTS, **settings)
    for site, scale in scales.items():
        # RMSNorm's epsilon of 1e-6 beside states of mean square 1
        assert scale.ratio == pytest.approx(1 if site == "final_norm" else 2, rel=1e-4)
    states = dsteer.mlx.read(model, PROMPTS, tokenizer=tokenizer)
    norms = {
        site: float(np.linalg.norm(rows.numpy(), axis=1).mean()) for site, rows in states.items()
    }
    assert dsteer.mlx.residual_norms(model, PROMPTS, **settings) == pytest.approx(norms, rel=1e-5)
    again = dsteer.mlx.natural_scale(double, norms, PROMPTS, **settings)
    assert again["resid_post.2"].ratio == pytest.approx(scales["resid_post.2"].ratio, rel=1e-5)
    assert Scale(1.0, 0.0).ratio is None


def test_calibration_meets_the_budget(llama: Both) -> None:
    vector = dsteer.SteeringVector(torch.linspace(-1, 1, 32), "resid_post.1")
    triple = dsteer.SteeringVector(3 * vector.tensor, vector.site)
    args = (llama.mlx, llama.mlx_tokenizer, list(PROMPTS[:3]))
    found = dsteer.mlx.calibrate(*args, vector, 0.2, tokens=4)
    assert found.n == 12
    assert found.kl == pytest.approx(0.2, rel=0.02)  # the strength is told to a thousandth
    other = dsteer.mlx.calibrate(*args, triple, 0.2, tokens=4)
    assert other.strength == pytest.approx(found.strength / 3, rel=3e-3)  # both to a thousandth

    kl = []
    for prompt in PROMPTS[:3]:  # transformers, float64
        ids = llama.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = llama.torch.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
            )[:, :-1]
            plain = llama.torch(whole).logits[0, -4:].double().log_softmax(-1)
            with dsteer.steer(llama.torch, vector, found.strength):
                steered = llama.torch(whole).logits[0, -4:].double().log_softmax(-1)
        kl += (plain.exp() * (plain - steered)).sum(-1).tolist()
    assert found.kl == pytest.approx(np.percentile(kl, 95), rel=1e-3)  # float32 logits


def test_mistakes_of_calibration(llama: Both) -> None:
    vector = dsteer.SteeringVector(torch.ones(32), "resid_post.1")
    args = (llama.mlx, llama.mlx_tokenizer, ["a"], vector)
    for target in (0.0, math.inf):
        with pytest.raises(MeasurementError, match="target_kl"):
            dsteer.mlx.calibrate(*args, target)
    with pytest.raises(MeasurementError, match="percentile 101"):
        dsteer.mlx.calibrate(*args, 0.1, percentile=101)
    with pytest.raises(MeasurementError, match=r"at strength .* the KL is still .* nats"):
        dsteer.mlx.calibrate(*args, 1e6, tokens=1)
