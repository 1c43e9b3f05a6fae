"""Steering of encoder-decoder models: states move by λv, texts are those of generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seq2seq_models import eos_tokenizer, planted_seq2seq, random_rows, seq2seq
from torch import Tensor

import dsteer
from dsteer.behaviour.teacher_forced import predictions, score
from dsteer.data.tokens import Encoded
from dsteer.errors import ConfigError, ModelError
from dsteer.models.anatomy import Anatomy
from dsteer.models.readout import Readout
from dsteer.steering.arms import Arm, Steering, steered_states
from dsteer.steering.intervene import Schedule, steer
from dsteer.steering.vector import SteeringVector

ROWS = random_rows()
V = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 2
FAMILIES = ("t5", "t5-gated-untied", "bart-forced-bos", "mbart", "marian")
TOKENIZER = eos_tokenizer()


def inputs(model: Any, rows: list[Encoded]) -> dict[str, Tensor]:
    """A padded batch, on the left in the encoder, as a user would pass it."""
    longest = max(row.prompt_length for row in rows)
    pads = [longest - row.prompt_length for row in rows]
    ids = [
        [2] * pad + list(row.ids[: row.prompt_length]) for pad, row in zip(pads, rows, strict=True)
    ]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    start = Anatomy.of(model).start
    decoder = [[*start, 5, 6, 7]] * len(rows)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "decoder_input_ids": torch.tensor(decoder),
    }


def encoder_and_decoder(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States of the encoder, and of the decoder's first block by a plain hook, the last to run."""
    caught = []
    handle = (
        Anatomy.of(model)
        .blocks[0]
        .register_forward_hook(
            lambda _module, _args, output: caught.append(Anatomy.read(output).clone())
        )
    )
    with torch.no_grad():
        output = model(**batch, use_cache=False)
    handle.remove()
    return output.encoder_last_hidden_state, caught[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_states_move_by_lambda_v(family: str) -> None:
    model = seq2seq(family)
    batch = inputs(model, ROWS[:4])
    first = len(Anatomy.of(model).start) - 1
    encoder, decoder = encoder_and_decoder(model, batch)
    real = batch["attention_mask"].bool()
    last = torch.zeros_like(real)
    last[:, -1] = True
    for positions, moved in (("all", real), ("prompt", real), ("prompt_last", last)):
        with steer(model, V, 0.5, positions, site="encoder"):
            steered, _ = encoder_and_decoder(model, batch)
        # float32 rounding of states of ordinary size
        assert torch.allclose(steered[moved] - encoder[moved], 0.5 * V, atol=1e-5)
        assert torch.equal(steered[~moved], encoder[~moved])
    columns = torch.arange(decoder.shape[1])
    for positions, moved in (
        ("all", columns >= 0),
        ("prompt_last", columns == first),
        ("prompt", columns <= first),
        ("generated", columns >= first),
    ):
        with steer(model, V, [0.5, -1.0, 0.0, 2.0], positions, site="resid_post.0"):
            _, steered = encoder_and_decoder(model, batch)
        delta = steered - decoder
        expected = torch.tensor([0.5, -1.0, 0.0, 2.0])[:, None, None] * V * moved[:, None]
        assert torch.allclose(delta, expected, atol=1e-5)
    assert torch.equal(encoder_and_decoder(model, batch)[1], decoder)  # hooks are gone


@pytest.mark.parametrize("site", ["encoder", "resid_post.1", "final_norm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_the_same_with_and_without_a_cache(family: str, site: str) -> None:
    model = seq2seq(family)
    batch = inputs(model, ROWS[:4])
    batch.pop("decoder_input_ids")
    made = []
    for use_cache in (True, False):
        with steer(model, V, [1.0, 0.0, -1.0, 3.0], site=site):
            made.append(
                model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=use_cache)
            )
    assert torch.equal(*made)
    plain = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(made[0][1], plain[1][: made[0].shape[1]])
    assert not torch.equal(made[0][[0, 2, 3]], plain[[0, 2, 3]][:, : made[0].shape[1]])


@pytest.mark.parametrize("family", ["t5", "bart-forced-bos", "mbart"])
@pytest.mark.parametrize("site", ["encoder", "resid_post.1"])
def test_sweep_is_generate_under_steering(family: str, site: str) -> None:
    model = seq2seq(family)
    prompts = ["How do I boil an egg?", "Hi", "Name three rivers."]
    strengths = [-2.0, 0.0, 2.0]
    swept = dsteer.sweep(
        model, TOKENIZER, prompts, SteeringVector(V, site), strengths, max_new_tokens=6
    )
    assert not swept.fast
    assert swept.note.startswith("Decoded by generate")
    assert "encoder-decoder" in swept.note
    for i, strength in enumerate(strengths):
        for j, prompt in enumerate(prompts):
            ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
            assert ids[0, -1] == TOKENIZER.eos_token_id
            with steer(model, V, strength, site=site):
                made = model.generate(
                    input_ids=ids,
                    max_new_tokens=6 + len(Anatomy.of(model).start) - 1,
                    do_sample=False,
                )
            tokens = made[0, len(Anatomy.of(model).start) :].tolist()
            ended = tokens.index(1) if 1 in tokens else len(tokens)
            assert list(swept.tokens[i][j]) == tokens[:ended]
            assert swept.texts[i][j] == TOKENIZER.decode(tokens[:ended], skip_special_tokens=True)
    with pytest.raises(ModelError, match="two caches"):
        dsteer.sweep(model, TOKENIZER, prompts, SteeringVector(V, site), [1.0], fast=True)


@pytest.mark.parametrize(
    "family",
    [
        "t5",
        "t5-gated-untied",
        "bart",
        "bart-forced-bos",
        "umt5",
        "mt5",
        "blenderbot-small",
        "pegasus",
    ],
)
def test_readout_gives_the_models_own_logits(family: str) -> None:
    model = seq2seq(family)
    readout = Readout.of(model)
    for row in ROWS[:3]:
        ((_, states),) = steered_states(model, [row], Steering.none(32))
        start = Anatomy.of(model).start
        with torch.no_grad():
            own = model(
                input_ids=torch.tensor([row.ids[: row.prompt_length]]),
                decoder_input_ids=torch.tensor([[*start, *row.ids[row.prompt_length : -1]]]),
            ).logits[0, len(start) - 1 :]
        # float32: one matrix product of width 32
        assert torch.allclose(readout(states[0]), own, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("family", ["t5", "t5-gated-untied", "bart", "bart-forced-bos", "mbart"])
def test_planted_vector_gives_the_tuned_predictions(family: str) -> None:
    base, tuned, b = planted_seq2seq(family, 1)
    texts, readout = ROWS, Readout.of(base)
    aims = predictions(tuned, texts, readout)
    arms = (Arm(b, 0.0), Arm(b, 1.0))
    scores = score(base, texts, Steering("resid_post.1", arms), readout, aims)
    before, after = scores.kl.sum(dim=1).tolist()
    assert before > 0.05
    assert after < 1e-9 * before  # rounding: the states agree to 1e-6, and KL is of second order
    late = score(base, texts, Steering("resid_post.2", arms), readout, aims).kl.sum(dim=1)
    assert float(late[1]) > 1e-3 * before
    # the log-likelihoods are those of the tuned model, run as its own
    start = Anatomy.of(tuned).start
    for number, row in enumerate(texts):
        answer = row.ids[row.prompt_length :]
        with torch.no_grad():
            logits = tuned(
                input_ids=torch.tensor([row.ids[: row.prompt_length]]),
                decoder_input_ids=torch.tensor([[*start, *answer[:-1]]]),
            ).logits[0, len(start) - 1 :].double()  # fmt: skip
        own = logits.log_softmax(-1)[torch.arange(len(answer)), list(answer)].sum()
        assert float(scores.log_likelihood[1, number]) == pytest.approx(float(own), abs=1e-3)


@pytest.mark.parametrize("site", ["encoder", "resid_post.0"])
def test_arms_in_one_batch_are_steered_passes(site: str) -> None:
    model = seq2seq("mbart")
    for positions in ("all", "prompt_last"):
        arms = tuple(Arm(V, strength) for strength in (0.0, 1.0, -2.0))
        found: dict[int, Tensor] = {}
        for numbers, states in steered_states(
            model, ROWS, Steering(site, arms, positions=positions)
        ):
            lengths = [len(ROWS[n].ids) - ROWS[n].prompt_length for n in numbers]
            found |= dict(zip(numbers, states.split(lengths, dim=1), strict=True))
        for number, row in enumerate(ROWS):
            for index, arm in enumerate(arms):
                with torch.no_grad(), steer(model, V, arm.strength, positions, site=site):
                    alone = model.model(
                        input_ids=torch.tensor([row.ids[: row.prompt_length]]),
                        decoder_input_ids=torch.tensor([[1, *row.ids[row.prompt_length : -1]]]),
                    ).last_hidden_state[0]
                assert torch.allclose(found[number][index], alone, atol=1e-5)


def test_what_an_encoder_does_not_do() -> None:
    model = seq2seq("t5")
    with (
        pytest.raises(ConfigError, match="generates nothing"),
        steer(model, V, positions="generated", site="encoder"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="a schedule at site 'encoder'"),
        steer(model, V, site="encoder", schedule=Schedule("linear", steps=3)),
    ):
        pass
    encoded = model.get_encoder()(input_ids=torch.tensor([[3, 4, 1]]))
    with pytest.raises(ModelError, match="encoder ran before"), steer(model, V, site="encoder"):
        model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[2]]))
