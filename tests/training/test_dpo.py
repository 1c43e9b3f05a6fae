"""DPO through TRL: freezing, adapters, references, rewards, resume, and a frozen trajectory."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsteer.config import DpoConfig, LoraConfig, TinyModelConfig
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, MeasurementError
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.training import dpo
from dsteer.training.dpo import _arguments, _filling, _quiet, _Trainer, known_losses, train_dpo
from dsteer.training.evaluate import curve_point, pair_likelihoods, reward_margins
from dsteer.training.examples import encode_pairs, to_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "dpo.json"


def make_pairs(n: int, *, seed: int) -> list[PreferencePair]:
    drawn = random.Random(seed)
    pairs = []
    for row in range(n):
        a, b = drawn.randrange(100), drawn.randrange(100)
        prompt = f"\n\nHuman: What is {a} and {b}?\n\nAssistant:"
        good, bad = f" Gladly, it makes {a + b}.", f" Go away, {b} is dull. Count it yourself."
        pairs.append(PreferencePair(prompt, good, bad, f"c{seed}-{row}", "made", row))
    return pairs


PAIRS, HELD = make_pairs(48, seed=0), make_pairs(12, seed=1)
TEXTS = [pair.prompt + answer for pair in PAIRS for answer in (pair.chosen, pair.rejected)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, 320)


def save_base(folder: Path, tokenizer, *, tied: bool = False) -> Path:
    shape = TinyModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=tied,
        max_position_embeddings=128,
    )  # fmt: skip
    with _quiet():
        build_model(shape, tokenizer, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base", tokenizer)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory, tokenizer) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "tied", tokenizer, tied=True)


def load(path: Path):
    with _quiet():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def config(**changes) -> DpoConfig:
    values = {"batch_size": 8, "learning_rate": 2e-3, "max_length": 64, "log_every": 2,
              "eval_every": 4, "checkpoint_every": 3, "max_steps": 8}  # fmt: skip
    return DpoConfig(**{**values, **changes})


def train(base: Path, tokenizer, folder: Path, *, pairs=PAIRS, held=HELD, **changes):
    return train_dpo(
        lambda: load(base), tokenizer, pairs, held, config(**changes),
        folder=folder, base_path=str(base), device="cpu", seed=3,
    )  # fmt: skip


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(base, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train(base, tokenizer, folder), folder


# ---------------------------------------------------------------------------------- training


def test_training_learns_and_says_how(trained) -> None:
    run, _ = trained
    # the policy is the reference before the first step
    assert run.first_loss == pytest.approx(math.log(2), abs=1e-6)
    # every second step, the first, and those before a checkpoint (3, 6)
    assert [point["step"] for point in run.train_curve] == [1, 2, 3, 4, 6, 8]
    assert [point["step"] for point in run.heldout_curve] == [4, 8]
    last = run.heldout_curve[-1]
    assert last["reward_accuracy"] == 1.0
    assert last["reward_margin"] > run.heldout_curve[0]["reward_margin"] > 0
    assert last["loss"] < math.log(2)
    assert run.pairs == {"train": 48, "dropped": 0, "truncated": 0, "split_token": 0}
    assert run.notes == []
    assert not any("time" in key for point in run.train_curve for key in point)


def test_the_saved_model_is_the_measured_one(trained, base, tokenizer) -> None:
    run, folder = trained
    tuned, reference, held = load(folder / "model"), load(base), encode_pairs(HELD, tokenizer)
    margins = reward_margins(pair_likelihoods(tuned, held), pair_likelihoods(reference, held), 0.1)
    # the last point of the curve, from the files alone
    assert float(margins.mean()) == run.heldout_curve[-1]["reward_margin"]
    again = AutoTokenizer.from_pretrained(folder / "model")
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]


def test_rewards_equal_those_of_trl(trained, base, tokenizer, tmp_path) -> None:
    tuned, reference = load(trained[1] / "model"), load(base)
    examples = encode_pairs(HELD, tokenizer)
    ours = curve_point(
        reward_margins(
            pair_likelihoods(tuned, examples), pair_likelihoods(reference, examples), 0.1
        )
    )
    with _quiet():
        args = _arguments(config(reference="live"), tmp_path, "cpu", "float32", 0)
        args.per_device_eval_batch_size = 4  # divides 12: TRL averages over batches
        trainer = _Trainer(
            model=tuned,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_list(to_rows(PAIRS[:1], tokenizer)),
            eval_dataset=Dataset.from_list(to_rows(HELD, tokenizer)),
            processing_class=tokenizer,
        )
        theirs = trainer.evaluate()
    # both in float32, over about 15 tokens
    assert theirs["eval_rewards/margins"] == pytest.approx(ours.margin, abs=1e-5)
    assert theirs["eval_loss"] == pytest.approx(ours.loss, abs=1e-5)
    assert theirs["eval_rewards/accuracies"] == ours.accuracy


@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_live_and_precomputed_references_agree(
    reference, trained, base, tokenizer, tmp_path
) -> None:
    run = train(
        base, tokenizer, tmp_path, reference=reference, gradient_accumulation=2, batch_size=4
    )
    first, known = run.train_curve[-1], trained[0].train_curve[-1]
    # the same pairs a step, in other batches: float32 through 8 steps of Adam
    assert first["loss"] == pytest.approx(known["loss"], abs=1e-3)
    assert run.first_loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("loss", known_losses())
def test_every_loss_that_trl_knows_trains(loss, base, tokenizer, tmp_path) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    run = train(
        base, tokenizer, tmp_path, loss_type=loss, label_smoothing=smoothing, max_steps=2, held=[]
    )
    assert math.isfinite(run.first_loss)
    assert run.heldout_curve == []


def test_trl_documents_its_losses() -> None:
    assert {"sigmoid", "hinge", "ipo", "robust", "apo_zero", "sft"} <= set(known_losses())


def test_nothing_is_printed_and_nothing_left_behind(base, tokenizer, tmp_path, capfd) -> None:
    before = random.getstate(), torch.random.get_rng_state()
    train(base, tokenizer, tmp_path, max_steps=2)
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert capfd.readouterr() == ("", "")


def test_two_runs_give_the_same_bytes(trained, base, tokenizer, tmp_path) -> None:
    run, folder = trained
    assert train(base, tokenizer, tmp_path) == run
    for path in (folder / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes(), path.name


def test_a_frozen_trajectory(base, tokenizer, tmp_path) -> None:
    """Guards against a change of TRL, transformers or torch that moves the training."""
    run = train(base, tokenizer, tmp_path, log_every=1)
    losses = [point["loss"] for point in run.train_curve]
    golden = json.loads(GOLDEN.read_text())
    # other processors round sums of float32 differently; a changed rule moves far more
    assert losses == pytest.approx(golden["losses"], abs=1e-4)


# ---------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("none", set()), ("input", {"input"}), ("output", {"output"}), ("both", {"input", "output"})],
)
def test_what_is_frozen_keeps_its_bytes(mode, kept, base, tokenizer, tmp_path) -> None:
    run = train(base, tokenizer, tmp_path, freeze=mode, max_steps=3)
    assert run.freeze["mode"] == mode
    assert not run.freeze["tied"]
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    names = {"input": "model.embed_tokens.weight", "output": "lm_head.weight"}
    for which, name in names.items():
        same = before[name].numpy().tobytes() == after[name].numpy().tobytes()
        assert same == run.freeze[which]["unchanged"] == (which in kept)
        digest = hashlib.sha256(after[name].numpy().tobytes()).hexdigest()
        assert run.freeze[which]["after"] == digest
    frozen = sum(before[names[which]].numel() for which in kept)
    assert run.parameters["trainable"] == run.parameters["total"] - frozen
    # input rows of tokens that never occur stay as they were; all else moves
    assert (0.5 if "input" not in kept else 0.99) < run.parameters["changed_share"] <= 1


@pytest.mark.parametrize("mode", ["input", "output", "both", "none"])
def test_tied_embeddings_freeze_together(mode, tied_base, tokenizer, tmp_path) -> None:
    run = train(tied_base, tokenizer, tmp_path, freeze=mode, max_steps=2)
    assert run.freeze["tied"]
    assert run.freeze["mode"] == ("none" if mode == "none" else "both")
    assert run.freeze["input"] == run.freeze["output"]
    assert run.freeze["input"]["unchanged"] == (mode != "none")
    said = any("tied" in note for note in run.notes)
    assert said == (mode in {"input", "output"})


# ---------------------------------------------------------------------------------- adapters


def test_an_adapter_is_saved_without_traces_of_this_machine(base, tokenizer, tmp_path) -> None:
    folder = tmp_path / "dpo"
    run = train(base, tokenizer, folder, lora=LoraConfig(rank=4), reference="live")
    saved = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(saved["target_modules"])
    named = saved["base_model_name_or_path"]
    assert (folder / "model" / named).resolve() == base.resolve()
    for path in (folder / "model").iterdir():
        assert str(tmp_path.parent.parent).encode() not in path.read_bytes(), path.name
    assert any("LoRA of rank 4 bounds the rank" in note for note in run.notes)
    assert run.parameters["trainable"] < 0.2 * run.parameters["total"]
    assert run.freeze["input"]["unchanged"]
    assert run.freeze["output"]["unchanged"]
    # the adapter on its own load of the base gives what the training measured
    held = encode_pairs(HELD, tokenizer)
    with _quiet():
        tuned = PeftModel.from_pretrained(load(base), folder / "model")
    margins = reward_margins(pair_likelihoods(tuned, held), pair_likelihoods(load(base), held), 0.1)
    assert float(margins.mean()) == pytest.approx(run.heldout_curve[-1]["reward_margin"], abs=1e-5)
    assert run.first_loss == pytest.approx(math.log(2), abs=1e-6)


def test_adapter_dropout_is_used(base, tokenizer, tmp_path, monkeypatch) -> None:
    seen = []

    class Spy(_Trainer):
        def train(self, *args, **kwargs):
            seen.extend(
                module.p for name, module in self.model.named_modules()
                if name.endswith("lora_dropout.default")
            )  # fmt: skip
            return super().train(*args, **kwargs)

    monkeypatch.setattr(dpo, "_Trainer", Spy)
    train(base, tokenizer, tmp_path, lora=LoraConfig(rank=2, dropout=0.25), max_steps=2)
    assert set(seen) == {0.25}


@pytest.mark.parametrize(
    ("targets", "freeze", "message"),
    [
        (("lm_head",), "none", "TRL can't train an adapter on the head 'lm_head'"),
        (
            ("q_proj", "embed_tokens"),
            "input",
            "'embed_tokens' is an embedding that dpo.freeze keeps",
        ),
    ],
)
def test_adapters_on_embeddings_are_refused(
    targets, freeze, message, base, tokenizer, tmp_path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(base, tokenizer, tmp_path, lora=LoraConfig(targets=targets), freeze=freeze)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_gradient_checkpointing_changes_nothing(lora, base, tokenizer, tmp_path) -> None:
    settings = {"lora": lora, "reference": "live", "max_steps": 4}
    run = train(base, tokenizer, tmp_path / "a", gradient_checkpointing=True, **settings)
    plain = train(base, tokenizer, tmp_path / "b", **settings)
    assert run.train_curve == plain.train_curve


# ---------------------------------------------------------------------------------- accounts


def test_pairs_that_are_cut_or_dropped_are_counted(base, tokenizer, tmp_path) -> None:
    lengths = sorted(
        (len(example.prompt), example.length) for example in encode_pairs(PAIRS, tokenizer)
    )
    limit = lengths[0][1] - 1  # below the longer answer of every pair
    long = PreferencePair("\n\nHuman:" + " what" * 60 + "\n\nAssistant:", " a", " b", "l", "s", 9)
    run = train(base, tokenizer, tmp_path, pairs=[*PAIRS, long], max_length=limit, max_steps=2)
    assert run.pairs["dropped"] == 1
    assert run.pairs["train"] == 48
    assert run.pairs["truncated"] == sum(length > limit for _, length in lengths)
    assert any("1 training pairs were left out" in note for note in run.notes)
    assert any("lost the end of an answer" in note for note in run.notes)
    with pytest.raises(DataError, match="none of 48 training pairs has a prompt shorter"):
        train(base, tokenizer, tmp_path / "b", max_length=3)


def test_what_several_processes_fill_up_is_told() -> None:
    assert _filling(config(), 48, 2.0, 2) == []  # whole batches of 8
    assert _filling(config(), 50, 2.0, 1) == []
    assert _filling(config(), 50, 0.9, 2) == [], "no epoch ended"
    (note,) = _filling(config(), 50, 1.0, 2)
    assert "of 2 pairs, was filled up to 8 with pairs" in note
    # batches of 1 in 8 turns, shared as 4 turns of 2
    (note,) = _filling(config(batch_size=1, gradient_accumulation=8), 49, 1.0, 2)
    assert "of 1 pairs, was filled up to 2 with pairs" in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "sigmod"}, r"knows no 'sigmod'; did you mean 'sigmoid'\? \(all: "),
        ({"max_length": 200}, r"dpo\.max_length: 200 tokens, but the base reads at most 128"),
    ],
)
def test_what_can_not_work_is_refused_before_training(
    changes, message, base, tokenizer, tmp_path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(base, tokenizer, tmp_path, **changes)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [("cpu", "float16", "float16 weights can't be trained"), ("cuda:1", "float32", "CUDA_VISIBLE")],
)
def test_devices_and_dtypes_that_can_not_train(device, dtype, message) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo.check_config(config(), device, dtype)


def test_bfloat16_weights_keep_steps_below_their_precision(base, tokenizer, tmp_path) -> None:
    # Weights near 0.02 have bfloat16 steps of 1e-4: each of 24 Adam steps of 1e-5 alone would be
    # lost, their sum of up to 2.4e-4 is not.
    def load_half():
        with _quiet():
            return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

    run = train_dpo(
        load_half, tokenizer, PAIRS, [], config(learning_rate=1e-5, max_steps=24),
        folder=tmp_path, base_path=str(base), device="cpu", dtype="bfloat16", seed=3,
    )  # fmt: skip
    assert run.parameters["changed_share"] > 0.3
    assert run.freeze["input"]["unchanged"]
    assert run.freeze["output"]["unchanged"]
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_training_that_changes_nothing_is_an_error(base, tokenizer, tmp_path) -> None:
    # the weights are near 0.02, where float32 steps are 2e-9: 1e-14 is lost; norms and zeros too
    with pytest.raises(MeasurementError, match=r"changed none of \d+ trainable parameters"):
        train(base, tokenizer, tmp_path, learning_rate=1e-30, max_steps=2)


def test_a_loss_that_is_not_finite_stops(base, tokenizer, tmp_path) -> None:
    with pytest.raises(MeasurementError, match=r"DPO: the loss is nan at step \d; lower dpo"):
        train(
            base,
            tokenizer,
            tmp_path,
            learning_rate=1e30,
            max_grad_norm=1e30,
            lr_scheduler="constant",
        )


def test_a_reference_that_is_not_the_start_is_told(base, tokenizer, tmp_path) -> None:
    first = []

    def other():
        model = load(base)
        if first:  # the live reference
            with torch.no_grad():
                model.lm_head.weight *= 40
        first.append(model)
        return model

    run = train_dpo(
        other, tokenizer, PAIRS, [], config(reference="live", max_steps=2),
        folder=tmp_path, device="cpu", seed=3,
    )  # fmt: skip
    assert any("not ln 2" in note for note in run.notes)


# ---------------------------------------------------------------------------------- resume


class Killed(BaseException):
    pass


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.2)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_cut_off_anywhere_ends_with_the_same_bytes(
    lora, accumulation, base, tokenizer, tmp_path, monkeypatch
) -> None:
    # 48 pairs in batches of 8: an epoch has 6 (or 3) steps, so the run crosses its end
    changes = {"lora": lora, "gradient_accumulation": accumulation, "lr_scheduler": "cosine"}
    whole = train(base, tokenizer, tmp_path / "whole", **changes)
    calls = {"mark": dpo.mark_complete, "save": dpo._save}

    def dies(*_args: object) -> None:
        raise Killed

    for moment in ("before the first marker", "before the second marker", "before the model"):
        folder = tmp_path / moment
        if moment == "before the model":
            monkeypatch.setattr(dpo, "_save", dies)
        else:
            left = [calls["mark"]] if "second" in moment else []
            monkeypatch.setattr(
                dpo, "mark_complete", lambda path, left=left: (left.pop() if left else dies)(path)
            )
        with pytest.raises(Killed):
            train(base, tokenizer, folder, **changes)
        monkeypatch.setattr(dpo, "mark_complete", calls["mark"])
        monkeypatch.setattr(dpo, "_save", calls["save"])
        assert train(base, tokenizer, folder, **changes) == whole
        name = "model.safetensors" if lora is None else "adapter_model.safetensors"
        assert file_hash(folder / "model" / name) == file_hash(tmp_path / "whole/model" / name)


def test_a_finished_training_is_not_repeated(trained, tokenizer) -> None:
    run, folder = trained

    def fails():
        raise AssertionError("the base was loaded again")

    assert train_dpo(fails, tokenizer, PAIRS, HELD, config(), folder=folder, device="cpu") == run
