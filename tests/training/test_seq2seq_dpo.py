"""DPO of encoder-decoder models: TRL's loss, frozen embeddings, the same bytes after a kill."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from seq2seq_models import eos_tokenizer, seq2seq
from torch.nn import functional
from trl import DPOTrainer

from dsteer.activations.extract import extract
from dsteer.config import DpoConfig, LoraConfig
from dsteer.data.types import Message, PreferencePair
from dsteer.errors import ConfigError
from dsteer.models.load import load_model, quiet
from dsteer.models.pair import ModelPair
from dsteer.steering.intervene import steer
from dsteer.training import dpo
from dsteer.training.dpo import train_dpo
from dsteer.training.evaluate import (
    Continuation,
    curve_point,
    evaluate,
    log_likelihoods,
    pair_likelihoods,
    reward_margins,
)
from dsteer.training.examples import encode_pairs
from dsteer.training.gradients import margin_gradients
from dsteer.training.seq2seq import LOSSES, preference_loss

TOKENIZER = eos_tokenizer()
EOS = TOKENIZER.eos_token_id


def make_pairs(n: int, first: int = 0) -> list[PreferencePair]:
    return [
        PreferencePair(f"{row}?", f" Yes{row}.", " No!", f"c{row}", "made", row)
        for row in range(first, first + n)
    ]


PAIRS, HELD = make_pairs(24), make_pairs(6, 50)


def save(folder: Path, family: str) -> Path:
    with quiet():
        seq2seq(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save(folder / name, name) for name in ("t5", "t5-gated-untied", "bart")}


def train(base: Path, folder: Path, **changes):
    values = {"batch_size": 6, "learning_rate": 2e-3, "max_length": 40, "log_every": 2,
              "eval_every": 4, "checkpoint_every": 3, "max_steps": 7}  # fmt: skip
    return train_dpo(
        lambda: load_model(base, device="cpu"), TOKENIZER, PAIRS, HELD,
        DpoConfig(**{**values, **changes}),
        folder=folder, base_path=str(base), device="cpu", seed=3,
    )  # fmt: skip


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def trls_loss(log_p: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor, loss: str) -> float:
    """What TRL's own method makes of made-up log-probabilities: chosen rows, then rejected."""
    mode = SimpleNamespace(training=True)
    trainer = SimpleNamespace(
        model=mode, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss], loss_weights=[1.0], beta=0.3, use_weighting=False, label_smoothing=0.0,
        aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
    )  # fmt: skip
    completion = functional.pad(mask, (1, 0))  # a prompt of one token
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1],
    }  # fmt: skip
    outputs = SimpleNamespace(
        log_probs=log_p, entropy=log_p, mean_logits=log_p, is_top1=log_p > 0
    )  # fmt: skip
    return float(DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_trls(loss: str) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    log_p = torch.tensor(
        [[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0], [-1.5, -1.0, 0.0], [-0.2, -4.0, -1.0]]
    )
    reference = torch.tensor([[-3.0, -2.5], [-3.5, -5.0]])
    ratios = log_p.sum(1).view(2, 2) - reference
    ours = preference_loss(ratios, mask.sum(1).view(2, 2), 0.3, loss)
    assert float(ours.mean()) == pytest.approx(trls_loss(log_p, mask, reference, loss), abs=1e-6)
    # by hand: ratios are (-0.5, -0.5) and (1.0, -0.2), margins -1.5 and -0.3
    by_hand = {
        "sigmoid": [math.log1p(math.exp(0.45)), math.log1p(math.exp(0.09))],
        "hinge": [1.45, 1.09],
        "ipo": [(-0.5 / 3 - 0.5 - 1 / 0.6) ** 2, (-0.5 + 0.2 / 3 - 1 / 0.6) ** 2],
    }[loss]
    assert ours.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_pairs_are_texts_of_their_own() -> None:
    (example,) = encode_pairs(PAIRS[:1], TOKENIZER, encoder_decoder=True)
    # the prompt with the encoder's EOS; answers without the space between, with the decoder's EOS
    assert example.prompt == (*TOKENIZER("0?", add_special_tokens=False)["input_ids"], EOS)
    assert example.chosen == (*TOKENIZER("Yes0.", add_special_tokens=False)["input_ids"], EOS)
    asked = PreferencePair([Message(role="user", content="Hi")], "Yes", "No")
    (other,) = encode_pairs([asked], TOKENIZER, encoder_decoder=True)
    assert TOKENIZER.decode(other.prompt) == "\n\nHuman: Hi\n\nAssistant:</s>"


@pytest.mark.parametrize("family", ["t5", "t5-gated-untied", "bart"])
def test_training_learns_and_keeps_embeddings(family: str, bases, tmp_path) -> None:
    run = train(bases[family], tmp_path)
    # dropout is off and the reference is the base: both see the same logits
    assert run.first_loss == pytest.approx(math.log(2), abs=1e-5)
    assert [point["step"] for point in run.train_curve] == [1, 2, 3, 4, 6, 7]
    assert run.heldout_curve[-1]["loss"] < math.log(2)
    assert run.heldout_curve[-1]["reward_accuracy"] == 1.0
    assert run.train_curve[-1]["reward_margin"] > run.train_curve[0]["reward_margin"]
    assert run.freeze["mode"] == "both"
    assert run.freeze["tied"] == (family != "t5-gated-untied")
    assert run.freeze["input"]["unchanged"]
    assert run.freeze["output"]["unchanged"]
    assert any("dsteer's own trainer" in note for note in run.notes)
    tuned, base = (load_model(path, device="cpu") for path in (tmp_path / "model", bases[family]))
    assert torch.equal(tuned.get_input_embeddings().weight, base.get_input_embeddings().weight)
    held = encode_pairs(HELD, TOKENIZER, encoder_decoder=True)
    margins = reward_margins(pair_likelihoods(tuned, held), pair_likelihoods(base, held), 0.1)
    # the saved model is the measured one
    assert curve_point(margins).loss == pytest.approx(run.heldout_curve[-1]["loss"], abs=1e-6)
    found = evaluate(tuned, base, held, beta=0.1, seed=0)
    assert found.reward_accuracy.value == 1.0
    assert found.kl_to_base.value > found.kl_noise_floor


def test_a_killed_training_ends_with_the_same_bytes(bases, tmp_path, monkeypatch) -> None:
    whole = train(bases["t5"], tmp_path / "whole")
    step = dpo._Watcher.on_step_end

    def killed(self, args, state, control, **more):
        if state.global_step == 5:
            raise KeyboardInterrupt
        step(self, args, state, control, **more)

    monkeypatch.setattr(dpo._Watcher, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        train(bases["t5"], tmp_path / "killed")
    monkeypatch.undo()
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-3").is_dir()
    assert train(bases["t5"], tmp_path / "killed") == whole
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")


def test_live_reference_and_adapter(bases, tmp_path) -> None:
    precomputed = train(bases["bart"], tmp_path / "precomputed", max_steps=3)
    live = train(bases["bart"], tmp_path / "live", max_steps=3, reference="live")
    for a, b in zip(precomputed.train_curve, live.train_curve, strict=True):
        # sums in float64 and float32
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    for reference in ("precomputed", "live"):
        folder = tmp_path / f"lora-{reference}"
        lora = LoraConfig(rank=2, targets=("q_proj", "fc2"))
        run = train(bases["bart"], folder, lora=lora, reference=reference, learning_rate=1e-2)
        assert run.first_loss == pytest.approx(math.log(2), abs=1e-5)
        assert run.heldout_curve[-1]["loss"] < math.log(2)
        pair = ModelPair.load(bases["bart"], folder / "model", tokenizer=TOKENIZER, device="cpu")
        held = encode_pairs(HELD, TOKENIZER, encoder_decoder=True)
        margins = reward_margins(
            pair_likelihoods(pair.tuned, held), pair_likelihoods(pair.base, held), 0.1
        )
        assert curve_point(margins).loss == pytest.approx(run.heldout_curve[-1]["loss"], abs=1e-6)
    # the adapter's states are those of the model that it is merged into
    read = extract(pair, make_pairs(4, 80))
    merged = copy.deepcopy(pair.tuned).merge_and_unload()
    merged = ModelPair.load(pair.base, merged, tokenizer=TOKENIZER)
    expected = extract(merged, make_pairs(4, 80))
    for site in read.sites:
        assert torch.allclose(read.tuned[site], expected.tuned[site], atol=1e-4)  # float32 sums
    assert read.displacement("final_norm").any()


def test_a_batch_in_parts_and_checkpointed_is_the_same_step(bases, tmp_path) -> None:
    curves = [
        train(bases["t5"], tmp_path / str(number), max_steps=3, **changes).train_curve
        for number, changes in enumerate((
            {}, {"batch_size": 3, "gradient_accumulation": 2}, {"gradient_checkpointing": True}
        ))
    ]  # fmt: skip
    for other in curves[1:]:
        for a, b in zip(curves[0], other, strict=True):
            # sums in float32, after up to two steps
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_other_losses_are_refused(bases, tmp_path) -> None:
    with pytest.raises(ConfigError, match="exo_pair is not available for encoder-decoder models"):
        train(bases["t5"], tmp_path, loss_type="exo_pair")


@pytest.mark.parametrize("family", ["t5", "bart-forced-bos"])
def test_likelihoods_are_the_models_own(family: str) -> None:
    model = seq2seq(family)
    items = [Continuation((5, 6, 7, 1), (9, 8)), Continuation((4,), (3, 3, 3, 1))]
    start = [2] if family == "t5" else [1, 0]
    for item, found in zip(items, log_likelihoods(model, items), strict=True):
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([item.context]),
                decoder_input_ids=torch.tensor([[*start, *item.tokens[:-1]]]),
            ).logits[0, len(start) - 1 :]
        own = logits.double().log_softmax(1)[range(len(item.tokens)), list(item.tokens)].sum()
        assert float(found) == pytest.approx(float(own), abs=1e-4)  # float32 logits


@pytest.mark.parametrize(
    ("family", "step", "tolerance"),
    # BART in float64: an error of second order in the step. T5's norms are float32 in any case:
    # margins of 1e-5 over the step.
    [("bart", 1e-4, 1e-6), ("t5", 1e-2, 2e-3)],
)
def test_gradients_are_differences(family: str, step: float, tolerance: float) -> None:
    """∇m summed over the decoder's positions is the derivative of m as v is added to them all."""
    model = seq2seq(family).double()
    examples = encode_pairs(PAIRS[:2], TOKENIZER, encoder_decoder=True)
    sites = ["resid_post.1", "final_norm"]
    found = margin_gradients(model, examples, sites)
    v = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v /= v.norm()
    for site in sites:
        margins = []
        for strength in (step, -step):
            with steer(model, v, strength, site=site):
                both = pair_likelihoods(model, examples)
            margins.append(both.chosen - both.rejected)
        slope = (margins[0] - margins[1]) / (2 * step)
        assert torch.allclose(found.sequence[site] @ v, slope, rtol=tolerance, atol=tolerance)
