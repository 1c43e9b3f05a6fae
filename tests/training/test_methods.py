"""SimPO, CPO, ORPO and KTO: losses by hand, guarantees of DPO, and a stop at a matched KL."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from dsteer.config import DpoConfig, LoraConfig, TinyModelConfig
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.parallel import ALONE
from dsteer.training import dpo
from dsteer.training.dpo import _quiet, train_dpo
from dsteer.training.examples import encode_pairs
from dsteer.training.methods import check_model, first_loss, unpaired

METHODS = ["simpo", "cpo", "orpo", "kto"]


def make_pairs(n: int, *, seed: int) -> list[PreferencePair]:
    drawn = random.Random(seed)
    pairs = []
    for row in range(n):
        a, b = drawn.randrange(100), drawn.randrange(100)
        prompt = f"\n\nHuman: What is {a} and {b}?\n\nAssistant:"
        good, bad = f" Gladly, it makes {a + b}.", f" Oh well, {b} is dull. Count it yourself."
        pairs.append(PreferencePair(prompt, good, bad, f"c{seed}-{row}", "made", row))
    return pairs


PAIRS, HELD = make_pairs(24, seed=0), make_pairs(8, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([p.prompt + p.chosen + p.rejected for p in PAIRS], 320)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "base"
    shape = TinyModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=128
    )
    with _quiet():
        build_model(shape, tokenizer, seed=0).save_pretrained(folder)
    return folder


def load(path):
    with _quiet():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def train(base, tokenizer, folder, *, pairs=PAIRS, held=HELD, **changes):
    values = {"batch_size": 8, "learning_rate": 2e-3, "max_length": 64, "log_every": 2,
              "eval_every": 2, "checkpoint_every": 2, "max_steps": 5}  # fmt: skip
    return train_dpo(
        lambda: load(base), tokenizer, pairs, held, DpoConfig(**{**values, **changes}),
        folder=folder, base_path=str(base), device="cpu", seed=3,
    )  # fmt: skip


def by_hand(method, model, tokenizer, pairs) -> float:
    """The first loss from its paper's formula, one text at a time, with TRL's default weights."""

    def scores(prompt, answer):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            log_p = model(ids).logits[0].double().log_softmax(-1)
        return log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]

    examples = encode_pairs(pairs, tokenizer)
    chosen = [scores(e.prompt, e.chosen) for e in examples]
    rejected = [scores(e.prompt, e.rejected) for e in examples]
    # of the chosen answers a token; ORPO's as in the pre-training of its text, prompt and all
    texts = [scores(e.prompt[:1], (*e.prompt[1:], *e.chosen)) for e in examples]
    likelihood = -float(torch.cat(texts if method == "orpo" else chosen).mean())
    beta, total = 0.1, 0.0
    for good, bad in zip(chosen, rejected, strict=True):
        if method == "simpo":
            margin = beta * float(good.mean() - bad.mean()) - 0.5
        elif method == "cpo":
            margin = beta * float(good.sum() - bad.sum())
        else:
            one, two = (math.exp(float(score.mean())) for score in (good, bad))
            margin = math.log(one / (1 - one)) - math.log(two / (1 - two))
        total += math.log1p(math.exp(-margin)) / len(pairs)
    return {"simpo": total, "cpo": total + likelihood, "orpo": likelihood + beta * total}[method]


@pytest.mark.parametrize("method", ["simpo", "cpo", "orpo"])
def test_the_first_loss_is_that_of_the_paper(method, base, tokenizer, tmp_path) -> None:
    pairs = PAIRS[:4]  # one batch, whatever its order
    run = train(base, tokenizer, tmp_path, method=method, pairs=pairs, max_steps=2, batch_size=4)
    # float32 sums over about 15 tokens
    assert run.first_loss == pytest.approx(by_hand(method, load(base), tokenizer, pairs), abs=2e-4)


@pytest.mark.parametrize("reference", ["precomputed", "live"])
def test_kto_starts_at_one_half(reference, base, tokenizer, tmp_path) -> None:
    run = train(base, tokenizer, tmp_path, method="kto", reference=reference, max_steps=3)
    # σ(0) of both kinds of answers, as the policy is the reference
    assert run.first_loss == pytest.approx(0.5, abs=1e-6)
    assert run.train_curve[-1]["loss"] < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_what_dpo_promises(
    method, base, tokenizer, tmp_path, monkeypatch, capfd
) -> None:
    whole = train(base, tokenizer, tmp_path / "whole", method=method)
    assert whole.freeze["input"]["unchanged"]
    assert whole.freeze["output"]["unchanged"]
    assert whole.parameters["changed_share"] > 0.9
    assert [point["step"] for point in whole.heldout_curve] == [2, 4, 5]
    assert whole.heldout_curve[-1]["reward_margin"] > 0
    assert whole.notes == []

    marked = dpo.mark_complete

    def killed(folder):
        marked(folder)
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "mark_complete", killed)
    with pytest.raises(KeyboardInterrupt):
        train(base, tokenizer, tmp_path / "cut", method=method)
    monkeypatch.setattr(dpo, "mark_complete", marked)
    assert train(base, tokenizer, tmp_path / "cut", method=method) == whole
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["simpo", "kto"])  # one without a reference, one with
def test_methods_train_adapters(method, base, tokenizer, tmp_path) -> None:
    run = train(base, tokenizer, tmp_path, method=method, lora=LoraConfig(rank=2), max_steps=2)
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    assert run.parameters["trainable"] < run.parameters["total"] / 2


def test_rows_of_kto_alternate_and_part_the_answers_of_a_pair(tokenizer) -> None:
    rows = unpaired(PAIRS, tokenizer, seed=0)
    assert [row["label"] for row in rows] == [True, False] * len(PAIRS)
    texts = {(row["prompt"], row["completion"]) for row in rows}
    assert texts == {(p.prompt, answer) for p in PAIRS for answer in (p.chosen, p.rejected)}
    beside = sum(a["prompt"] == b["prompt"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert beside < len(PAIRS) / 2  # one is expected of independent orders


def test_training_stops_at_the_first_evaluation_past_the_kl(base, tokenizer, tmp_path) -> None:
    free = train(base, tokenizer, tmp_path / "free", stop_at_kl=1e9, lr_scheduler="constant")
    assert not free.stop["reached"]
    assert any("short of dpo.stop_at_kl" in note for note in free.notes)
    kl = {point["step"]: point["kl_to_base"] for point in free.heldout_curve}
    assert kl[2] < kl[4]
    target = (kl[2] + kl[4]) / 2
    run = train(base, tokenizer, tmp_path / "run", stop_at_kl=target, lr_scheduler="constant")
    assert run.stop == {"target": target, "reached": True, "step": 4, "kl": kl[4]}
    assert [point["step"] for point in run.heldout_curve] == [2, 4]
    # the saved model has that KL, from its files
    tuned, reference, total, tokens = load(tmp_path / "run" / "model"), load(base), 0.0, 0
    for e in encode_pairs(HELD, tokenizer):
        with torch.no_grad():
            ids = torch.tensor([[*e.prompt, *e.chosen]])
            p, q = (
                model(ids).logits[0, len(e.prompt) - 1 : -1].double().log_softmax(-1)
                for model in (tuned, reference)
            )
        total += float((p.exp() * (p - q)).sum())
        tokens += len(e.chosen)
    # float32 logits of padded batches against single texts
    assert run.stop["kl"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_stop_needs_pairs_to_measure(base, tokenizer, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"dpo\.stop_at_kl: 0\.1 is measured on pairs"):
        train(base, tokenizer, tmp_path, held=[], stop_at_kl=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "kto", "loss_type": "ipo"}, "loss_type ipo is a loss of method: dpo"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, r"0\.1 changes nothing in the loss ipo"),
        ({"method": "orpo", "label_smoothing": 0.1}, r"changes nothing in the loss orpo"),
        ({"loss_type": "robust"}, "label_smoothing 0 makes the loss robust"),
    ],
)
def test_settings_that_a_method_lacks_are_refused(changes, said) -> None:
    with pytest.raises(ValidationError, match=said):
        DpoConfig(**changes)


def test_models_that_a_method_cannot_train_are_refused() -> None:
    config = DpoConfig(method="simpo")
    with pytest.raises(ConfigError, match=r"dpo\.method: simpo trains decoder-only models"):
        check_model(config, True, ALONE)
    with pytest.raises(ConfigError, match="one process, not 2"):
        check_model(config, False, type("Two", (), {"world": 2})())
    check_model(DpoConfig(), True, ALONE)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss_type": "robust", "label_smoothing": 0.1}, math.log(2)),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "ipo"}, 25.0),  # (0 − 1/(2 · 0.1))²
    ],
)
def test_known_first_losses(changes, expected, base, tokenizer, tmp_path) -> None:
    run = train(base, tokenizer, tmp_path, max_steps=2, **changes)
    assert run.first_loss == pytest.approx(expected, rel=1e-5)
    assert first_loss(DpoConfig(**changes))[0] == pytest.approx(expected)
    assert run.notes == []
