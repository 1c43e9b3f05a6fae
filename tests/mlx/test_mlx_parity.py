"""The same weights under transformers and under mlx-lm: the same states and the same texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mlx_models import FAMILIES, Both, both
from planted import PROMPTS, planted_pair

pytest.importorskip("mlx_lm", reason="needs mlx-lm: no wheels for this platform")

import mlx.core as mx
import mlx_lm

import dsteer
import dsteer.mlx
from dsteer.activations.sites import resolve_sites
from dsteer.data.tokens import Encoded
from dsteer.errors import ConfigError, DataError, ModelError
from dsteer.mlx.anatomy import Anatomy, around
from dsteer.mlx.capture import capture

PARITY = 1e-5
"""Float32: two implementations round each of a few hundred products in another order; measured
1e-6 of the state's norm."""

TEXTS = list(PROMPTS[:2])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both(request.param, tmp_path_factory.mktemp(request.param))


def pushed(model: Both) -> dsteer.SteeringVector:
    """A vector about as long as the states, which changes what is written."""
    width = model.torch.config.hidden_size
    generator = torch.Generator().manual_seed(3)
    return dsteer.SteeringVector(torch.randn(width, generator=generator), "resid_post.1")


def hidden_states(model: Both, text: str) -> dict[str, torch.Tensor]:
    """transformers' own states (T, d) of one prompt, without any of our hooks."""
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.torch(ids, output_hidden_states=True).hidden_states
    sites = resolve_sites("all", len(states) - 1)
    found = {f"resid_post.{k}": state[0] for k, state in enumerate(states[1:-1])}
    return {site: found.get(site, states[-1][0]) for site in sites if site in found} | {
        "final_norm": states[-1][0]
    }


@pytest.mark.parametrize("position", ["prompt_last", "prompt_mean", "all"])
def test_states_are_those_of_transformers(model: Both, position: str) -> None:
    """In padded batches of several, against one prompt at a time."""
    acts = dsteer.mlx.read(model.mlx, TEXTS, tokenizer=model.mlx_tokenizer, position=position)
    expected = [hidden_states(model, text) for text in TEXTS]
    pick = {
        "prompt_last": lambda rows: rows[-1:],
        "prompt_mean": lambda rows: rows.mean(0, keepdim=True),
        "all": lambda rows: rows,
    }[position]
    assert set(expected[0]) <= set(acts)
    assert len(acts) == model.torch.config.num_hidden_layers + 1
    for site in expected[0]:
        rows = torch.cat([pick(states[site]) for states in expected])
        error = (acts[site] - rows).norm(dim=1) / rows.norm(dim=1)
        assert float(error.max()) < PARITY, site


def test_the_last_block_is_dsteers(model: Both) -> None:
    """transformers gives the last block's raw output nowhere; dsteer reads it by a hook."""
    pair = dsteer.ModelPair.load(model.torch, model.torch, tokenizer=model.tokenizer)
    last = f"resid_post.{model.torch.config.num_hidden_layers - 1}"
    expected = dsteer.extract(pair, TEXTS, sites=[last]).base[last]
    acts = dsteer.mlx.read(model.mlx, TEXTS, tokenizer=model.mlx_tokenizer, sites=[last])
    assert float(((acts[last] - expected).norm(dim=1) / expected.norm(dim=1)).max()) < PARITY


def test_parts_of_a_block_are_dsteers(model: Both) -> None:
    pair = dsteer.ModelPair.load(model.torch, model.torch, tokenizer=model.tokenizer)
    sites = ["attn_out.1", "mlp_out.1"]
    expected = dsteer.extract(pair, TEXTS, sites=sites).base
    acts = dsteer.mlx.read(model.mlx, TEXTS, tokenizer=model.mlx_tokenizer, sites=sites)
    for site in sites:
        error = (acts[site] - expected[site]).norm(dim=1) / expected[site].norm(dim=1)
        assert float(error.max()) < PARITY, site


def test_greedy_texts_are_those_of_transformers(model: Both) -> None:
    """Plain and steered, one prompt at a time through transformers' generate under dsteer.steer."""
    vector = pushed(model)
    for text in TEXTS:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        found = []
        for strength in (0.0, 3.0):
            with dsteer.steer(model.torch, vector, strength):
                out = model.torch.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
                )
            new = out[0, ids.shape[1] :].tolist()
            new = new[: new.index(1)] if 1 in new else new
            with dsteer.mlx.steer(model.mlx, vector, strength):
                responses = list(
                    mlx_lm.stream_generate(
                        model.mlx, model.mlx_tokenizer, ids[0].tolist(), max_tokens=12
                    )
                )
            tokens = [response.token for response in responses]
            assert [token for token in tokens if token != 1] == new
            found.append(new)
        assert found[0] != found[1]  # a vector longer than the states turns what is written


# ---------------------------------------------------------------------------------- pairs


def test_planted_truth_through_mlx(tmp_path: Path) -> None:
    """Everything that dsteer computes from a pair takes what is read here."""
    planted = planted_pair(block=2)
    base, tuned = planted.save(tmp_path)
    acts = dsteer.mlx.extract(base, tuned, list(PROMPTS))
    assert float(acts.displacement("resid_post.1").abs().max()) == 0  # the same operations
    vectors = dsteer.mean_difference(acts)
    error = (vectors["resid_post.2"].tensor - planted.b).norm() / planted.b.norm()
    assert float(error) < 1e-5  # float32: b of norm 2 beside states of norm 10
    found = dsteer.spectrum(acts.displacement("resid_post.2"))
    assert found.sigma_ratio is not None
    assert found.sigma_ratio < 1e-5
    reference = dsteer.extract(planted.pair, list(PROMPTS))
    assert acts.encoded == reference.encoded
    for site in acts.sites:
        expected = dsteer.mean_difference(reference)[site].tensor
        # of differences of states of norm 10, each right to 1e-6 of that
        assert float((vectors[site].tensor - expected).norm()) < 1e-4, site


def test_the_answers_positions(tmp_path: Path) -> None:
    planted = planted_pair(block=1)
    base, tuned = planted.save(tmp_path)
    pairs = [dsteer.PreferencePair(text, " Yes, of course.", " No.") for text in PROMPTS]
    one, tokenizer = dsteer.mlx.load(base)
    other, _ = dsteer.mlx.load(tuned)
    for position in ("response_last", "response_mean"):
        reference = dsteer.extract(planted.pair, pairs, position=position)
        acts = dsteer.mlx.extract(one, other, pairs, tokenizer=tokenizer, position=position)
        assert acts.encoded == reference.encoded
        assert acts.offsets == reference.offsets
        for site in acts.sites:
            error = (acts.base[site] - reference.base[site]).norm(dim=1)
            assert float((error / reference.base[site].norm(dim=1)).max()) < PARITY, site


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both("llama", tmp_path_factory.mktemp("llama"))


def test_batches_do_not_matter(llama: Both) -> None:
    settings = {"tokenizer": llama.mlx_tokenizer, "position": "all"}
    together = dsteer.mlx.read(llama.mlx, PROMPTS, **settings)
    alone = dsteer.mlx.read(llama.mlx, PROMPTS, batch_tokens=1, **settings)
    for site in together:
        error = (together[site] - alone[site]).norm(dim=1) / alone[site].norm(dim=1)
        assert float(error.max()) < PARITY, site


def test_a_model_that_sees_padding_is_read_without(llama: Both) -> None:
    """Its last block adds the mean over all columns, so padding shows."""
    anatomy = Anatomy.of(llama.mlx)
    last = anatomy.blocks[-1]

    def leak(call: object, *args: object, **kwargs: object) -> mx.array:
        state = call(*args, **kwargs)
        return state + state.mean(axis=1, keepdims=True)

    with around(last, leak):
        together = dsteer.mlx.read(llama.mlx, PROMPTS, tokenizer=llama.mlx_tokenizer)
        alone = dsteer.mlx.read(llama.mlx, PROMPTS, tokenizer=llama.mlx_tokenizer, batch_tokens=1)
    error = (together["final_norm"] - alone["final_norm"]).norm(dim=1)
    assert float((error / alone["final_norm"].norm(dim=1)).max()) < PARITY


def test_half_precision_is_read(llama: Both) -> None:
    """numpy has no bfloat16."""
    wide = dsteer.mlx.read(llama.mlx, TEXTS, tokenizer=llama.mlx_tokenizer)
    model, _ = dsteer.mlx.load(llama.folder)
    model.set_dtype(mx.bfloat16)
    states = capture(Anatomy.of(model), mx.array([[0, 5, 9]]), ["resid_post.0"])
    assert states["resid_post.0"].dtype == mx.bfloat16
    half = dsteer.mlx.read(model, TEXTS, tokenizer=llama.mlx_tokenizer)
    for site in wide:
        assert half[site].dtype == torch.float32
        error = (half[site] - wide[site]).norm(dim=1) / wide[site].norm(dim=1)
        assert 1e-4 < float(error.max()) < 0.1, site  # 8 bits of mantissa, a few layers


def test_mistakes_of_reading(llama: Both, tmp_path: Path) -> None:
    read, tokenizer = dsteer.mlx.read, llama.mlx_tokenizer
    with pytest.raises(DataError, match="prompts is one text"):
        read(llama.mlx, "Hi", tokenizer=tokenizer)
    with pytest.raises(DataError, match="there are no prompts"):
        read(llama.mlx, [], tokenizer=tokenizer)
    with pytest.raises(DataError, match="no tokenizer is given"):
        read(llama.mlx, ["Hi"])
    with pytest.raises(DataError, match="1 of 2 prompts are token ids"):
        read(llama.mlx, ["Hi", Encoded((1,), 1)], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="the model has 4 blocks"):
        read(llama.mlx, ["Hi"], tokenizer=tokenizer, sites=["resid_post.4"])
    with pytest.raises(ConfigError, match="no such position"):
        read(llama.mlx, ["Hi"], tokenizer=tokenizer, position="somewhere")
    with pytest.raises(ModelError, match="token id 260, and the model has only 260 tokens"):
        read(llama.mlx, [Encoded((1, 260), 2)])
    with pytest.raises(ModelError, match=r"Linear is no mlx-lm language model"):
        read(mx_linear(), [Encoded((1,), 1)])
    with pytest.raises(ModelError, match=r"nowhere: mlx-lm can't load .* spelled right"):
        dsteer.mlx.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "none_such"}')
    with pytest.raises(ModelError, match=r"No safetensors found .*; expected safetensors of an"):
        dsteer.mlx.load(tmp_path)


def mx_linear() -> object:
    import mlx.nn as nn

    return nn.Linear(2, 2)


def test_models_of_two_shapes_are_no_pair(llama: Both, tmp_path: Path) -> None:
    other = both("qwen3", tmp_path)
    with pytest.raises(ModelError, match="4 and 3 blocks, and widths 32 and 64"):
        dsteer.mlx.extract(llama.mlx, other.mlx, TEXTS, tokenizer=llama.mlx_tokenizer)


def test_broken_weights_are_told(llama: Both) -> None:
    model, _ = dsteer.mlx.load(llama.folder)
    model.layers[2].mlp.down_proj.weight = mx.full((32, 48), np.inf)
    with pytest.raises(dsteer.DsteerError, match=r"resid_post\.2 of the model holds states that"):
        dsteer.mlx.read(model, TEXTS, tokenizer=llama.mlx_tokenizer)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import sys

    for name in [name for name in sys.modules if name.startswith("dsteer.mlx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dsteer.errors.MissingExtraError, match=r"pip install 'dsteer\[mlx\]'"):
        __import__("dsteer.mlx")
