"""Contrast vectors are those of the packages that people know, on the same pairs and model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from planted import byte_tokenizer, tiny_llama
from reference import builders
from seq2seq_models import eos_tokenizer, seq2seq
from sklearn.linear_model import LogisticRegression

import dsteer
from dsteer import ContrastPair, DsteerError
from dsteer.data.tokens import encode
from dsteer.steering import states as states_module
from dsteer.steering.build import contrast, contrast_from_states
from dsteer.steering.directions import Groups, cohens_d, folds_of, logistic, separation
from dsteer.steering.prefix import prefix_contrast
from dsteer.steering.refusal import refusal_direction

WORDS = ("fine", "well", "here at last", "off", "hungry again", "late", "sure", "so very sorry",
         "in", "glad about it", "out", "ready to go now")  # fmt: skip
PAIRS = [(f"I am {word}, and I thank you.", f"im {word} lol") for word in WORDS]


def small(**changes: object) -> dict[str, object]:
    return {
        "vocab_size": 260, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        **changes,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small())),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=260, n_embd=24, n_layer=3, n_head=4, n_positions=64,
                      initializer_range=0.2, bos_token_id=0, eos_token_id=1)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **small(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, num_hidden_layers=6)
        )
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**small(num_local_experts=4, num_experts_per_tok=2, head_dim=8))
    ),
}  # fmt: skip


def build(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[family]().float().eval()


def cosine(a: object, b: object) -> float:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def own_states(model: Any, texts: list[str], pick: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The model's own hidden_states, one text at a time: [text][layer] as pick reads it."""
    tokenizer, found = byte_tokenizer(), []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        found.append([pick(state[0].double()).numpy() for state in hidden[1:]])
    return found


# ------------------------------------------------------------------------------ the packages


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list:UserWarning")  # theirs
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equal_to_steering_vectors(family: str, side: str) -> None:
    peer = pytest.importorskip("steering_vectors")
    model, tokenizer = build(family), byte_tokenizer()
    tokenizer.padding_side = side
    aggregators = {
        "mean": peer.mean_aggregator(),
        "pca": peer.pca_aggregator(),
        # by default it stops at a gradient of 1e-4
        "logistic": peer.logistic_aggregator({"tol": 1e-8, "max_iter": 10_000}),
    }
    layers = {"decoder_block": "model.layers.{num}"} if family != "gpt2" else None
    for method, aggregator in aggregators.items():
        theirs = peer.train_steering_vector(
            model, tokenizer, PAIRS, aggregator=aggregator, layer_config=layers, batch_size=1
        ).layer_activations
        ours = contrast(model, tokenizer, PAIRS, method=method)
        assert len(theirs) == model.config.num_hidden_layers
        for layer, vector in theirs.items():
            v = ours[f"resid_post.{layer}"]
            assert cosine(v.tensor, vector) > 0.9999
            # the same scale: natural for mean, unit for the others; float32 states and sums
            assert v.norm == pytest.approx(float(vector.norm()), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_repeng(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # it was written for numpy 1
    pytest.importorskip("repeng")
    from repeng import ControlVector, DatasetEntry

    model, tokenizer = build(family), byte_tokenizer()
    dataset = [DatasetEntry(positive, negative) for positive, negative in PAIRS]
    for theirs_is, ours_is in (("pca_center", "pca"), ("pca_diff", "pca_centred")):
        theirs = ControlVector.train(
            model, tokenizer, dataset, method=theirs_is, batch_size=1
        ).directions
        ours = contrast(model, tokenizer, PAIRS, method=ours_is)
        assert len(theirs) == model.config.num_hidden_layers - 1  # it leaves block 0 out
        for layer, vector in theirs.items():
            # its last layer is hidden_states[-1], the state after the last norm
            last = layer == model.config.num_hidden_layers - 1
            v = ours["final_norm" if last else f"resid_post.{layer}"]
            assert cosine(v.tensor, vector) > 0.9999
            assert v.norm == pytest.approx(float(np.linalg.norm(vector)), rel=1e-6)  # both unit


# ------------------------------------------------------------------------------ definitions


@pytest.mark.parametrize(
    ("position", "pick"),
    [
        ("last", lambda state: state[-1]),
        ("first", lambda state: state[0]),
        ("mean", lambda state: state.mean(dim=0)),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_positions_are_those_of_the_models_own_states(
    family: str, position: str, pick: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model, tokenizer = build(family), byte_tokenizer()
    if position == "first":  # without BOS texts can begin differently
        tokenizer.backend_tokenizer.post_processor = None
        pairs = [(f"{i}A", f"b{i}") for i in range(4)]
        texts = [text for pair in pairs for text in pair]
        found = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            found.append([pick(state[0].double()).numpy() for state in hidden[1:]])
    else:
        pairs = PAIRS[:5]
        found = own_states(model, [text for pair in pairs for text in pair], pick)
    ours = contrast(model, tokenizer, pairs, position=position)
    sites = [site for site in ours if site != f"resid_post.{model.config.num_hidden_layers - 1}"]
    states = np.array(found)  # [text, layer, d]
    for layer, site in enumerate(sites):
        expected = builders.difference(states[::2, layer], states[1::2, layer])
        # float32 states of padded batches: 1e-5 of their norm
        assert np.abs(ours[site].tensor.numpy() - expected).max() < 1e-5 * np.abs(states).max()


def test_all_tokens_count_alike() -> None:
    model = tiny_llama()
    ours = contrast(model, byte_tokenizer(), PAIRS, position="all", method="mean")
    probe = contrast(model, byte_tokenizer(), PAIRS, position="all", method="logistic")
    rows = [
        np.concatenate(
            [text[0] for text in own_states(model, [p[side] for p in PAIRS], lambda s: s)]
        )
        for side in (0, 1)
    ]
    v = ours["resid_post.0"]
    expected = builders.difference(*rows)
    assert np.abs(v.tensor.numpy() - expected).max() < 1e-5 * np.abs(rows[0]).max()
    centre = (rows[0].mean(axis=0) + rows[1].mean(axis=0)) / 2
    labels = np.concatenate([np.ones(len(rows[0])), -np.ones(len(rows[1]))])
    reference = builders.probe(np.concatenate(rows) - centre, labels, 1.0)
    assert cosine(probe["resid_post.0"].tensor, reference) > 0.99999
    with pytest.raises(DsteerError, match="tokens of two texts are no pairs"):
        contrast(model, byte_tokenizer(), PAIRS, position="all", method="pca")


def test_components_are_what_the_modules_return() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    caught: dict[str, list[np.ndarray]] = {"attn_out.2": [], "mlp_out.2": []}
    block = model.model.layers[2]
    handles = [
        block.self_attn.register_forward_hook(
            lambda _m, _i, out: caught["attn_out.2"].append(out[0][0, -1].double().numpy())
        ),
        block.mlp.register_forward_hook(
            lambda _m, _i, out: caught["mlp_out.2"].append(out[0, -1].double().numpy())
        ),
    ]
    for pair in PAIRS:
        for text in pair:
            with torch.no_grad():
                model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
    for handle in handles:
        handle.remove()
    for component, site in (("attn", "attn_out.2"), ("mlp", "mlp_out.2")):
        ours = contrast(model, tokenizer, PAIRS, component=component)
        assert list(ours) == [f"{site[:-2]}.{k}" for k in range(4)]
        states = np.array(caught[site])
        expected = builders.difference(states[::2], states[1::2])
        assert np.abs(ours[site].tensor.numpy() - expected).max() < 1e-5 * np.abs(states).max()


def test_batches_leave_vectors_as_they_are() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    alone = contrast(model, tokenizer, PAIRS, batch_tokens=1)
    together = contrast(model, tokenizer, PAIRS, batch_tokens=10_000)
    for site, v in alone.items():
        # float32 sums in another order
        torch.testing.assert_close(v.tensor, together[site].tensor, rtol=0, atol=1e-4)


def test_many_states_go_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    held = contrast(model, tokenizer, PAIRS, position="all", method="logistic")
    monkeypatch.setattr(states_module, "_IN_MEMORY", 0)
    stored = contrast(model, tokenizer, PAIRS, position="all", method="logistic")
    for site, v in held.items():
        assert torch.equal(v.tensor, stored[site].tensor)


def test_messages_end_with_their_answer() -> None:
    """An answer at the end is read up to its last token, after the template's prompt."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    question = {"role": "user", "content": "Tea?"}

    def chat(answer: str) -> list[dict[str, str]]:
        return [question, {"role": "assistant", "content": answer}]

    pairs = [ContrastPair(chat("Yes, please."), chat("nah")), ContrastPair(chat("Do."), chat("no"))]
    texts = [
        (f"<user>Tea?\n<assistant>{a[1]['content']}", f"<user>Tea?\n<assistant>{b[1]['content']}")
        for a, b in pairs
    ]
    by_messages = contrast(model, tokenizer, pairs)
    by_texts = contrast(model, tokenizer, texts)  # BOS comes from the template, and from encode
    for site, v in by_messages.items():
        assert torch.equal(v.tensor, by_texts[site].tensor)
    bare = byte_tokenizer(template=None)
    transcripts = [
        tuple(f"\n\nHuman: Tea?\n\nAssistant: {side[1]['content']}" for side in pair)
        for pair in pairs
    ]
    without, plain = contrast(model, bare, pairs), contrast(model, bare, transcripts)
    assert torch.equal(without["final_norm"].tensor, plain["final_norm"].tensor)


def test_an_encoder_reads_both_texts() -> None:
    model, tokenizer = seq2seq("t5"), eos_tokenizer()
    ours = contrast(model, tokenizer, PAIRS[:3])
    last = []
    for pair in PAIRS[:3]:
        for text in pair:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                last.append(model.encoder(input_ids=ids)[0][0, -1].double().numpy())
    expected = builders.difference(np.array(last[::2]), np.array(last[1::2]))
    np.testing.assert_allclose(ours["encoder"].tensor.numpy(), expected, atol=1e-4)  # float32
    assert list(ours)[:2] == ["encoder", "resid_post.0"]
    mean = contrast(model, tokenizer, PAIRS[:3], position="mean", sites="encoder")
    assert list(mean) == ["encoder"]
    with pytest.raises(DsteerError, match="the tokens of an encoder see all others"):
        contrast(model, tokenizer, PAIRS, position="first")
    with pytest.raises(DsteerError, match="an encoder does not read what its decoder writes"):
        prefix_contrast(model, tokenizer, ["Tea?"], "Well,", new_tokens=2, position="last")
    with pytest.raises(DsteerError, match="has no refusal direction"):
        refusal_direction(model, tokenizer, ["a", "b"], ["c", "d"])


# ------------------------------------------------------------------------------ directions


def test_a_planted_axis_is_found_by_every_method() -> None:
    generator = np.random.default_rng(0)
    axis = generator.standard_normal(48)
    axis /= np.linalg.norm(axis)
    noise = generator.standard_normal((2, 400, 48))
    gaps = 8 + generator.standard_normal((400, 1))
    positive, negative = noise[0] + gaps * axis / 2, noise[1] - gaps * axis / 2
    for method in ("mean", "pca", "logistic"):
        v = contrast_from_states(positive, negative, "resid_post.0", method=method)
        # noise of the mean: √(2·48/400) = 0.5 against 8; a probe leans on the nearest states alone
        assert cosine(v.tensor, axis) > (0.98 if method == "logistic" else 0.99)
        assert v.metadata["accuracy"] > 0.998  # Φ(4/√1.25)
        assert v.metadata["cohens_d"] == pytest.approx(8 / 1.25**0.5, abs=0.5)
        assert v.metadata["gap"] == pytest.approx(8, abs=0.3)
    # the share of the energy: (8² + 1 + 2) of (8² + 1 + 2·48)
    found = contrast_from_states(positive, negative, "resid_post.0", method="pca")
    assert found.metadata["share"] == pytest.approx(67 / 161, abs=0.03)


@pytest.mark.parametrize("shape", [(30, 60), (60, 10)])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_the_probe_is_that_of_scikit_learn(shape: tuple[int, int], c: float) -> None:
    generator = np.random.default_rng(1)
    rows = generator.standard_normal(shape) * generator.uniform(0.1, 5, shape[1]) + 0.2
    labels = np.ones(len(rows))
    w = logistic(rows, np.full(len(rows), 2.0), c=c)
    both = np.concatenate([rows, -rows])
    signs = np.concatenate([labels, -labels])
    model = LogisticRegression(fit_intercept=False, C=c, tol=1e-10, max_iter=100_000)
    theirs = model.fit(both, signs).coef_[0]
    # sklearn's stopping rule; ours is exact to 1e-10 of the gradient
    np.testing.assert_allclose(w, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    gradient = w - c * (2 / (1 + np.exp(rows @ w))) @ rows
    assert np.abs(gradient).max() < 1e-8 * c * np.abs(rows.sum(axis=0)).max()


def test_held_out_numbers_are_those_of_the_definition() -> None:
    generator = np.random.default_rng(2)
    positive = generator.standard_normal((11, 6)) + 0.7
    negative = generator.standard_normal((11, 6))
    parts = folds_of(11, 4, seed=3)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(11))
    v = contrast_from_states(positive, negative, "resid_post.0", folds=4, seed=3)
    accuracy, d = builders.held_out(positive, negative, [part.tolist() for part in parts])
    assert v.metadata["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert v.metadata["cohens_d"] == pytest.approx(d, rel=1e-9)


def test_noise_does_not_separate_held_out_though_it_does_in_sample() -> None:
    generator = np.random.default_rng(4)
    positive, negative = generator.standard_normal((2, 40, 400))
    v = contrast_from_states(positive, negative, "resid_post.0")
    unit = v.tensor.numpy() / v.norm
    middle = (positive + negative).mean(axis=0) @ unit / 2
    in_sample = ((positive @ unit > middle).mean() + (negative @ unit < middle).mean()) / 2
    assert in_sample > 0.95
    assert 0.35 < v.metadata["accuracy"] < 0.65  # 80 states: ½ ± 2.7 σ


def test_a_pair_that_repeats_is_left_out_as_one() -> None:
    """Two different pairs are told by parts of one each, however often each stands there."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    once = contrast(model, tokenizer, PAIRS[:2])
    twice = contrast(model, tokenizer, [*PAIRS[:2]] * 3)
    assert twice.metadata["folds"] == once.metadata["folds"] == 2
    for site in once:
        assert twice[site].metadata["n"] == 6
        assert twice[site].metadata["accuracy"] == once[site].metadata["accuracy"]


def test_what_is_undefined_is_none() -> None:
    one = contrast_from_states(np.ones((1, 3)), np.zeros((1, 3)), "resid_post.0")
    assert one.metadata["accuracy"] is one.metadata["cohens_d"] is None
    same = contrast_from_states(np.ones((4, 3)), np.ones((4, 3)), "resid_post.0", method="pca")
    assert same.undefined
    assert same.metadata["gap"] is same.metadata["share"] is same.metadata["accuracy"] is None
    assert cohens_d(np.array([1.0, 1.0]), np.array([0.0, 0.0])) is None
    groups = Groups.of_pairs(np.ones((4, 2)), np.zeros((4, 2)))
    assert separation(groups, lambda pairs: np.zeros(2), folds_of(4, 2, 0)).accuracy is None


# ------------------------------------------------------------------------------ provenance


def test_metadata_and_file(tmp_path: Any) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ours = contrast(model, tokenizer, PAIRS, method="pca", layers=[2, 0], seed=7)
    assert list(ours) == ["resid_post.0", "resid_post.2"]
    told = ours.metadata
    assert told["method"] == "contrast pca"
    assert (told["pairs"], told["position"], told["component"]) == (12, "last", "residual")
    assert told["model_width"] == 32
    assert told["seed"] == 7
    other = contrast(model, tokenizer, PAIRS[::-1], method="pca", layers=[2])
    assert told["data_sha256"] != other.metadata["data_sha256"]
    ours.save(tmp_path / "v.safetensors")
    again = dsteer.SteeringVectorSet.load(tmp_path / "v.safetensors")
    assert again.metadata == told
    assert again["resid_post.2"].metadata == ours["resid_post.2"].metadata
    assert again["resid_post.2"].metadata["n"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lda"}, "method 'lda': no such method"),
        ({"component": "mpl"}, "component 'mpl': no such component; did you mean 'mlp'"),
        ({"position": "final"}, "position 'final': no such position"),
        ({"layers": [9]}, "the model has 4 blocks"),
        ({"layers": [-1]}, "layer -1: expected blocks counted from 0"),
        ({"layers": []}, "sites is empty"),
        ({"layers": [1], "sites": "resid_post.1"}, "give one of both"),
        (
            {"sites": "mlp_out.1"},
            "'mlp_out.1' is none of component 'residual'; give component 'mlp'",
        ),
        ({"template": "jinja"}, "template 'jinja': no such template"),
        ({"folds": 1}, "folds 1: expected at least 2"),
        ({"method": "logistic", "c": -1.0}, "c -1.0: expected a finite weight"),
        ({"c": float("nan")}, "c nan: expected a finite weight"),
        ({"position": "first"}, r"the same token \(BOS\)"),
        ({"pairs": []}, "there are no contrast pairs"),
        ({"pairs": ["ab"]}, "pair 0 is 'ab'; expected"),
        ({"pairs": [("a", "")]}, "negative ''"),
        ({"pairs": [("same", "same")]}, "are the same at position 'last' of all 1 pairs"),
    ],
)
def test_mistakes_are_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"pairs": PAIRS, **changes}
    with pytest.raises(DsteerError, match=message) as caught:
        contrast(tiny_llama(), byte_tokenizer(), **arguments)
    assert "\n" not in str(caught.value)


def test_states_that_do_not_match_are_refused() -> None:
    with pytest.raises(DsteerError, match=r"\(3, 2\) and negative ones \(2, 2\)"):
        contrast_from_states(np.ones((3, 2)), np.ones((2, 2)), "resid_post.0")


def test_ids_are_those_of_the_tokenizer() -> None:
    """One BOS, and a long text is cut on the left and counted."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    pairs = [("abcdefgh", "hgfedcba")]
    found = contrast(model, tokenizer, pairs, max_tokens=4)
    assert found.metadata["truncated"] == 2
    assert encode(tokenizer, ["abcdefgh"], max_tokens=4)[0].ids[1:] == tuple(
        tokenizer("fgh", add_special_tokens=False)["input_ids"]
    )
    by_hand = contrast(model, tokenizer, [("fgh", "cba")])
    assert torch.equal(found["final_norm"].tensor, by_hand["final_norm"].tensor)
