"""Vectors learned under the DPO loss: the loss, its gradient, planted truth, and what stays."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers as tf
from planted import byte_tokenizer, planted_pair, tiny_llama

import dsteer
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError
from dsteer.steering.intervene import steer
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.training import steering_vector as module
from dsteer.training.examples import Example, encode_pairs
from dsteer.training.steering_vector import learn_vector, reward

TOKENIZER = byte_tokenizer(template=None)
SITE = "resid_post.1"
WORDS = ("tea", "rain", "a lemma", "bread", "two and three", "bees", "rivers", "an egg")


def pair(number: int, chosen: str, rejected: str) -> PreferencePair:
    prompt = f"\n\nHuman: {WORDS[number % len(WORDS)]}?\n\nAssistant:"
    return PreferencePair(
        prompt=prompt, chosen=chosen, rejected=rejected,
        conversation=f"c{number}", source="made up", row=number,
    )  # fmt: skip


PAIRS = [pair(i, f" yes{'!' * (i % 3)}", " no, no") for i in range(8)]


def gaps(model, examples: list[Example], prompt_lengths=None) -> torch.Tensor:
    """ln π(chosen) − ln π(rejected), one text at a time, without padding."""
    found = []
    for example in examples:
        sums = []
        for answer in (example.chosen, example.rejected):
            ids = torch.tensor([example.prompt + answer])
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            where = torch.arange(len(example.prompt) - 1, ids.shape[1] - 1)
            sums.append(log_p[where, torch.tensor(answer)].sum())
        found.append(sums[0] - sums[1])
    return torch.stack(found)


def dpo_loss(model, examples, vectors, beta, positions="all") -> float:
    """By hand: two passes a text through the public way to steer."""
    with torch.no_grad():
        reference = gaps(model, examples)
        steered = []
        for example in examples:
            with steer(model, vectors, positions=positions, prompt_lengths=[len(example.prompt)]):
                steered.append(gaps(model, [example])[0])
    margins = beta * (torch.stack(steered) - reference)
    return float((1 + (-margins).exp()).log().mean())


def vectors_at(sites, seed=3, size=1.0, width=32) -> SteeringVectorSet:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(sites), width, generator=generator, dtype=torch.float64)
    return SteeringVectorSet(
        [
            SteeringVector(size * row / row.norm(), site)
            for site, row in zip(sites, rows, strict=True)
        ]
    )


@pytest.mark.parametrize("positions", ["all", "prompt_last", "generated", (2, 9)])
def test_the_loss_is_that_of_dpo_under_plain_steering(positions) -> None:
    model, sites = tiny_llama(0), [SITE, "resid_post.3", "mlp_out.2", "final_norm"]
    start = vectors_at(sites, size=2.0)
    found = learn_vector(
        model, TOKENIZER, PAIRS, sites=sites, start=start, heldout=PAIRS, beta=0.5, steps=1,
        batch_size=8, learning_rate=1e-9, positions=positions,
    )  # fmt: skip
    expected = dpo_loss(model, encode_pairs(PAIRS, TOKENIZER), start, 0.5, positions)
    first, last = found.metadata["curve"]
    # float32 states, batched with padding here and one by one there
    assert first["heldout"]["loss"] == pytest.approx(expected, abs=2e-5)
    assert last["loss"] == pytest.approx(expected, abs=2e-5)
    assert abs(expected - math.log(2)) > 2e-4
    assert found.metadata["position"] == (list(positions) if positions == (2, 9) else positions)


def test_without_a_vector_the_loss_is_ln_2() -> None:
    found = learn_vector(
        tiny_llama(0), TOKENIZER, PAIRS, sites=SITE, heldout=PAIRS, steps=1, batch_size=3
    )
    first = found.metadata["curve"][0]
    assert first["heldout"]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # float32 log-softmax
    assert (first["heldout"]["accuracy"], first["loss"], first["norm"]) == (0.5, None, {SITE: 0.0})


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_gradient_by_finite_differences(positions) -> None:
    shape = {"vocab_size": 260, "n_embd": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # a Llama's norms compute in float32 in any case, GPT-2's do not
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**shape)).double().eval()
    sites = (SITE, "attn_out.2")
    anatomy = module.Anatomy.of(model)
    examples = encode_pairs(PAIRS[:3], TOKENIZER)
    begin = {site: v.tensor for site, v in vectors_at(sites).items()}
    with module.frozen(model), module._Policy(model, anatomy, begin, positions) as policy:
        reference = policy.reference(examples)

        def loss() -> torch.Tensor:
            ((margins, _),) = policy.margins(examples, range(3), reference)
            return -torch.nn.functional.logsigmoid(0.7 * margins).mean()

        loss().backward()
        for site in sites:
            vector = policy.vectors[site]
            assert vector.dtype == torch.float64
            for place in (0, 13, 31):
                ends = []
                for step in (1e-5, -1e-5):
                    with torch.no_grad():
                        vector[place] += step
                        ends.append(float(loss()))
                        vector[place] -= step
                slope = (ends[0] - ends[1]) / 2e-5
                # central differences: error about step² times the third derivative
                assert float(vector.grad[place]) == pytest.approx(slope, abs=1e-8, rel=1e-5)


def test_planted_preference_is_recovered() -> None:
    """The preferred answers are those that a constant b after a block makes likelier."""
    planted = planted_pair(1, size=3.0)
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(72):
        letters = [
            "".join(chr(97 + int(i)) for i in torch.randint(26, (3,), generator=generator))
            for _ in range(2)
        ]
        made.append(pair(number, f" {letters[0]}", f" {letters[1]}"))
    examples = encode_pairs(made, TOKENIZER)
    with torch.no_grad():
        shift = gaps(planted.tuned, examples) - gaps(planted.base, examples)
    pairs = [
        one if gap > 0 else pair(one.row, one.rejected, one.chosen)
        for one, gap in zip(made, shift, strict=True)
    ]
    fit, tune, test = pairs[:48], pairs[48:60], pairs[60:]
    found = learn_vector(
        planted.base, TOKENIZER, fit, sites=SITE, heldout=tune, beta=1.0, steps=40, batch_size=16,
        learning_rate=0.1, max_norm=3.0,
    )  # fmt: skip
    v = found[SITE].tensor
    b = planted.b.double()
    cosine = float(v @ b / (v.norm() * b.norm()))
    # a random direction of width 32 has a cosine of 0.35 once in twenty times
    assert cosine > 0.6
    ours, ceiling = (
        reward(planted.base, TOKENIZER, test, policy, beta=1.0) for policy in (found, planted.tuned)
    )
    exact = reward(
        planted.base, TOKENIZER, test, SteeringVectorSet([SteeringVector(b, SITE)]), beta=1.0
    )
    assert exact.margin.value == pytest.approx(ceiling.margin.value, rel=1e-3)  # float32
    assert ceiling.accuracy.value == 1.0
    assert ours.accuracy.value >= 0.75
    assert ours.margin.value > 0.6 * ceiling.margin.value
    assert found[SITE].norm <= 3.0 + 1e-5
    chosen = found.metadata["chosen_step"]
    losses = {row["step"]: row["heldout"]["loss"] for row in found.metadata["curve"]}
    assert losses[chosen] == min(losses.values()) < 0.6 * math.log(2)


def test_a_start_at_a_site_is_not_made_worse_on_held_out_pairs() -> None:
    """Held-out pairs that prefer the opposite: the start, step 0, is what is kept."""
    swapped = [pair(i, one.rejected, one.chosen) for i, one in enumerate(PAIRS)]
    start = vectors_at([SITE], size=0.01)
    found = learn_vector(
        tiny_llama(2), TOKENIZER, PAIRS, sites=SITE, heldout=swapped, start=start, steps=4,
        eval_every=2, batch_size=8,
    )  # fmt: skip
    assert found.metadata["chosen_step"] == 0
    torch.testing.assert_close(found[SITE].tensor, start[SITE].tensor.float().double())
    blind = learn_vector(
        tiny_llama(2), TOKENIZER, PAIRS, sites=SITE, start=start, steps=4, batch_size=8
    )
    assert blind.metadata["chosen_step"] == 4
    assert blind[SITE].norm > 0.1


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama(4)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    wanted = [p.requires_grad for p in model.parameters()]
    learn_vector(model, TOKENIZER, PAIRS, sites=[SITE, "final_norm"], heldout=PAIRS, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(item.training for item in model.modules())
    assert not any(item._forward_hooks for item in model.modules())


def test_cut_off_and_started_again_gives_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    model = tiny_llama(5)
    settings = {"sites": [SITE, "resid_post.2"], "heldout": PAIRS[6:], "steps": 6, "batch_size": 3,
                "eval_every": 2, "seed": 7}  # fmt: skip
    whole = learn_vector(model, TOKENIZER, PAIRS[:6], **settings)
    again = learn_vector(model, TOKENIZER, PAIRS[:6], **settings)
    file = tmp_path / "half.safetensors"
    update, made = module._Learner._update, []

    def killed(self, step: int) -> float:
        if step == 5:
            raise KeyboardInterrupt
        made.append(step)
        return update(self, step)

    monkeypatch.setattr(module._Learner, "_update", killed)
    with pytest.raises(KeyboardInterrupt):
        learn_vector(model, TOKENIZER, PAIRS[:6], checkpoint=file, **settings)
    monkeypatch.setattr(module._Learner, "_update", lambda s, step: made.append(step) or
                        update(s, step))  # fmt: skip
    resumed = learn_vector(model, TOKENIZER, PAIRS[:6], checkpoint=file, **settings)
    assert made == [0, 1, 2, 3, 4, 4, 5]
    for name, one in (("whole", whole), ("again", again), ("resumed", resumed)):
        one.save(tmp_path / f"{name}.safetensors")
    contents = {(tmp_path / f"{n}.safetensors").read_bytes() for n in ("whole", "again", "resumed")}
    assert len(contents) == 1
    made.clear()
    other = learn_vector(model, TOKENIZER, PAIRS[:6], checkpoint=file, **{**settings, "seed": 8})
    assert made == list(range(6)), "a file of other settings is passed over"
    assert not torch.equal(other[SITE].tensor, whole[SITE].tensor)


def test_a_caller_without_gradients_learns_the_same() -> None:
    model, settings = tiny_llama(6), {"sites": SITE, "steps": 2, "batch_size": 8}
    usual = learn_vector(model, TOKENIZER, PAIRS, **settings)
    with torch.no_grad():
        found = learn_vector(model, TOKENIZER, PAIRS, **settings)
        assert not torch.is_grad_enabled()
    assert torch.equal(found[SITE].tensor, usual[SITE].tensor)


def test_bounds_hold_at_each_site() -> None:
    found = learn_vector(
        tiny_llama(6), TOKENIZER, PAIRS, sites=[SITE, "final_norm"], steps=3,
        learning_rate=0.5, max_norm={SITE: 0.25},
    )  # fmt: skip
    assert found[SITE].norm == pytest.approx(0.25, rel=1e-6)
    assert found["final_norm"].norm > 0.5
    assert found.metadata["max_norm"] == {SITE: 0.25}


def test_what_a_set_tells_of_itself(tmp_path: Path) -> None:
    model = tiny_llama(7)
    found = dsteer.learn_vector(model, TOKENIZER, PAIRS, sites="mlp_out.1", heldout=PAIRS, steps=2)
    found.save(tmp_path / "v.safetensors")
    read = SteeringVectorSet.load(tmp_path / "v.safetensors")
    told = read.metadata
    assert told["method"] == "learned under the DPO loss"
    assert (told["pairs"], told["heldout_pairs"], told["beta"]) == (8, 8, 0.1)
    assert told["component"] == {"mlp_out.1": "mlp_out"}
    assert (told["model_width"], told["model_blocks"]) == (32, 4)
    assert len(told["data_sha256"]) == 64
    assert [row["step"] for row in told["curve"]] == [0, 2]
    assert read["mlp_out.1"].metadata["n"] == 8
    assert str(tmp_path) not in str(told)


def test_an_encoder_decoder_model() -> None:
    from seq2seq_models import eos_tokenizer, seq2seq

    model, tokenizer = seq2seq("t5"), eos_tokenizer()
    found = learn_vector(
        model, tokenizer, PAIRS, sites=["encoder", "resid_post.0"], heldout=PAIRS, beta=1.0,
        steps=6, batch_size=8, positions="all",
    )  # fmt: skip
    losses = [row["heldout"]["loss"] for row in found.metadata["curve"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-3
    assert all(vector.norm > 0 for vector in found.values())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"steps": 0}, ConfigError, "steps 0: expected a finite number above 0"),
        ({"learning_rate": math.inf}, ConfigError, "learning_rate inf"),
        ({"beta": -1.0}, ConfigError, "beta -1.0"),
        ({"max_norm": 0.0}, ConfigError, "max_norm at resid_post.1 0.0"),
        ({"max_norm": {"resid_post.2": 1.0}}, ConfigError, "nothing is learned there"),
        ({"sites": "resid_post.9"}, ConfigError, "the model has 4 blocks"),
        ({"positions": (5, 5)}, ConfigError, "expected a window"),
        ({"positions": (200, 220)}, ModelError, "no token of the first 8 pairs is steered"),
        ({"start": "one"}, ConfigError, "expected 'zero' or a SteeringVectorSet"),
        ({"start": vectors_at(["resid_post.2"])}, ConfigError, "no vector at resid_post.1"),
        ({"start": vectors_at([SITE], width=8)}, ModelError, "width"),
        ({"pairs": []}, DataError, "nothing to learn from"),
        ({"pairs": [pair(0, " a", " a")]}, DataError, "none has two different answers"),
        ({"max_length": 4}, DataError, "within 4 tokens"),
        ({"heldout": [PreferencePair(prompt="a", chosen=None, rejected=None, conversation="x",
                                     source="made up", row=0)]}, DataError, "1 held-out pairs"),
    ],
)  # fmt: skip
def test_mistakes(changes, error, words) -> None:
    settings = {"pairs": PAIRS, "sites": SITE, "steps": 1, **changes}
    with pytest.raises(error, match=words.replace("(", r"\(")):
        learn_vector(tiny_llama(0), TOKENIZER, settings.pop("pairs"), **settings)


def test_a_loss_that_is_not_finite_is_told() -> None:
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(MeasurementError, match="step 0: the loss or its gradient is not finite"):
        learn_vector(model, TOKENIZER, PAIRS, sites=SITE, steps=1)


def test_reward_of_vectors_by_hand() -> None:
    model, vectors = tiny_llama(0), vectors_at([SITE, "resid_post.2"])
    found = reward(model, TOKENIZER, PAIRS, vectors, beta=0.5)
    examples = encode_pairs(PAIRS, TOKENIZER)
    with torch.no_grad():
        before = gaps(model, examples)
        with steer(model, vectors):
            after = gaps(model, examples)
    assert found.margin.value == pytest.approx(float(0.5 * (after - before).mean()), abs=2e-5)
    assert found.accuracy.value == float((after > before).double().mean())
    with pytest.raises(DataError, match="two answers"):
        reward(model, TOKENIZER, PAIRS, vectors, max_length=3)
