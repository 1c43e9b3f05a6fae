"""DPO through TRL, with frozen embeddings. Only this module and ``methods`` import TRL.

TRL trains decoder-only models; encoder-decoder ones get a trainer of our own, with the same loss.

The loss of a pair is −ln σ(β[(ln π(y_w|x) − ln π(y_l|x)) − (ln π_ref(y_w|x) − ln π_ref(y_l|x))]).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from dsteer.config import DpoConfig, Freeze, LoraConfig
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, MeasurementError, did_you_mean
from dsteer.models.load import quiet, resolve_device
from dsteer.models.seq2seq import is_encoder_decoder
from dsteer.parallel import ALONE, Ranks, share_batch
from dsteer.progress import SILENT, Advance, Reporter
from dsteer.store import Json, atomic_folder, read_json, write_json
from dsteer.training.checkpoints import latest_checkpoint, mark_complete, own_random_state
from dsteer.training.evaluate import (
    Continuation,
    PairLikelihoods,
    answer_kl,
    curve_point,
    pair_likelihoods,
    reward_margins,
)
from dsteer.training.examples import Example, Row, encode_pairs, fitting, to_rows
from dsteer.training.methods import (
    check_model,
    first_loss,
    method_arguments,
    method_trainer,
)
from dsteer.training.seq2seq import Seq2SeqDpoTrainer, check_loss

LN2_TOLERANCE = 1e-2
"""How far the first loss may be from ln 2: bfloat16 rounds sums of log-probabilities that much."""

_OWN_LOOP = (
    "TRL trains decoder-only models; this encoder-decoder model was trained with the same loss by "
    "dsteer's own trainer."
)

LOW_SHARE = 0.25
"""Below it, the share of changed parameters is worth a warning."""


# ---------------------------------------------------------------------------------- embeddings


@dataclass(frozen=True)
class Frozen:
    """Which embeddings may not change.

    Attributes:
        mode: as it took effect; on tied embeddings ``input`` and ``output`` both mean ``both``.
        tied: whether the head is the input embedding.
    """

    mode: Freeze
    tied: bool


def embeddings(model: PreTrainedModel) -> dict[Literal["input", "output"], Tensor]:
    """The input embedding and the head; one tensor twice where they are tied."""
    head = model.get_output_embeddings()
    found: dict[Literal["input", "output"], Tensor] = {"input": model.get_input_embeddings().weight}
    if head is not None:
        found["output"] = head.weight
    return found


def freeze_embeddings(model: PreTrainedModel, mode: Freeze) -> Frozen:
    """Keep embeddings from training: TRL freezes nothing, so this comes before its construction."""
    tensors = embeddings(model)
    tied = tensors.get("output") is tensors["input"]
    if tied and mode != "none":
        mode = "both"
    for name, tensor in tensors.items():
        if mode in {name, "both"}:
            tensor.requires_grad_(False)
    head = model.get_output_embeddings()
    if mode in {"output", "both"} and head is not None and getattr(head, "bias", None) is not None:
        head.bias.requires_grad_(False)
    return Frozen(mode, tied)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _hashes(model: PreTrainedModel) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in embeddings(model).items()}


# ---------------------------------------------------------------------------------- checks


def known_losses() -> list[str]:
    """The loss types that the installed TRL documents; empty if it documents them otherwise."""
    text = DPOConfig.__dataclass_fields__["loss_type"].metadata.get("help", "")
    return re.findall(r"'(\w+)'", text)


def check_config(config: DpoConfig, device: str, dtype: str) -> None:
    """Refuse what would fail or mislead after an hour of training.

    Raises:
        ConfigError: an unknown loss, a dtype that can't be trained, a card that can't be chosen.
    """
    losses = known_losses()
    if losses and config.loss_type not in losses:
        raise ConfigError(
            f"dpo.loss_type: TRL knows no {config.loss_type!r}"
            f"{did_you_mean(config.loss_type, losses)} (all: {', '.join(losses)})"
        )
    if dtype == "float16":
        raise ConfigError(
            "models.dtype: float16 weights can't be trained (gradients overflow); use float32 or "
            "bfloat16"
        )
    if device.startswith("cuda:") and device != "cuda:0":
        raise ConfigError(
            f"models.device: training uses the first visible card, not {device}; set "
            f"CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')} and device: cuda"
        )


def _check_lora(lora: LoraConfig, model: PreTrainedModel, frozen: Frozen) -> None:
    if lora.targets == "all-linear":
        return
    roles = {model.get_input_embeddings(): "input", model.get_output_embeddings(): "output"}
    for name, module in model.named_modules():
        role, last = roles.get(module), name.rpartition(".")[2]
        if role is not None and last in lora.targets:
            if role == "output":
                raise ConfigError(
                    f"dpo.lora.targets: TRL can't train an adapter on the head {last!r}; remove it"
                )
            if frozen.mode in {role, "both"}:
                raise ConfigError(
                    f"dpo.lora.targets: {last!r} is an embedding that dpo.freeze keeps; remove it, "
                    "or set dpo.freeze: none"
                )


# ---------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class DpoRun:
    """What the training did; JSON values throughout, so that a finished training can be re-read.

    Attributes:
        train_curve: step, loss, reward_accuracy and reward_margin, means since the point before.
        heldout_curve: the same on held-out pairs at that step (sigmoid loss, whatever was trained).
        first_loss: the loss of the first batch, before any change of a weight.
        freeze: mode, tied, and for each embedding its hash before and after.
        parameters: total, trainable, changed (elementwise), changed_share.
        pairs: train (used), dropped (prompt alone fills max_length), truncated, split_token.
        stop: with ``stop_at_kl``: target, reached, and the last evaluation's step and kl.
        notes: sentences for a person.
    """

    train_curve: list[dict[str, Json]]
    heldout_curve: list[dict[str, Json]]
    first_loss: float
    freeze: dict[str, Json]
    parameters: dict[str, Json]
    pairs: dict[str, int]
    stop: dict[str, Json] | None
    notes: list[str]


def train_dpo(
    load_base: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[PreferencePair],
    heldout: Sequence[PreferencePair],
    config: DpoConfig,
    *,
    folder: Path,
    base_path: str = "",
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    reporter: Reporter = SILENT,
    ranks: Ranks = ALONE,
) -> DpoRun:
    """Train a base with DPO and save the tuned model (or its adapter) in ``folder/model``.

    The model in memory is then dropped: TRL patches its forward and its pad id, and gradient
    checkpointing leaves hooks on its embedding. Read the saved one.

    ``folder/checkpoints`` holds what an interrupted run resumes from; a run that was killed at any
    moment and started again ends with the same bytes. The caller deletes it when all is done.

    Several processes share each batch (DDP): the same pairs make the same steps as in one process,
    up to the rounding of sums. The first one measures and saves.

    Args:
        load_base: loads the base afresh, in the asked dtype.
        tokenizer: with EOS and PAD.
        train: pairs to train on.
        heldout: pairs for the held-out curve (may be empty).
        config: the `dpo` section.
        folder: where to write.
        base_path: what an adapter's config names as its base.
        device: auto, cpu, cuda or mps.
        dtype: of the weights.
        seed: of data order, adapters and dropout.
        reporter: shows progress.
        ranks: the processes that train together.

    Raises:
        ConfigError: see :func:`check_config`; a length beyond the model's context; a batch that the
            processes can't share.
        DataError: no pair fits into max_length.
        MeasurementError: the loss is no longer finite, or no parameter changed.
    """
    check_config(config, device, dtype)
    checkpoints = folder / "checkpoints"
    finished = checkpoints / "finished.json"
    if not ranks.broadcast(finished.is_file()):
        with _quiet(), own_random_state(seed):
            run = _train(
                load_base, tokenizer, train, heldout, config, folder, checkpoints, base_path,
                device, dtype, seed, reporter, ranks,
            )  # fmt: skip
        if run is not None:
            write_json(finished, vars(run))
        ranks.barrier()
    return DpoRun(**read_json(finished))


def _train(
    load_base: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[PreferencePair],
    heldout: Sequence[PreferencePair],
    config: DpoConfig,
    folder: Path,
    checkpoints: Path,
    base_path: str,
    device: str,
    dtype: str,
    seed: int,
    reporter: Reporter,
    ranks: Ranks,
) -> DpoRun | None:
    """Train; all but the first process return None."""
    args = _arguments(config, checkpoints, device, dtype, seed, ranks)
    model = load_base()
    _check_length(config, model)
    seq2seq = is_encoder_decoder(model.config)
    check_model(config, seq2seq, ranks)
    if seq2seq:
        check_loss(config.loss_type)
    frozen = freeze_embeddings(model, config.freeze)
    if config.lora is not None:
        _check_lora(config.lora, model, frozen)
    before = _hashes(model)
    weights = model.dtype
    if config.lora is None:
        # bfloat16 weights swallow small steps: float32 sums them up, and their sum is what is saved
        model.float()
    total = sum(parameter.numel() for parameter in model.parameters())
    encoded = encode_pairs(train, tokenizer, encoder_decoder=seq2seq)
    pairs = _count(encoded, config.max_length)
    held = encode_pairs(heldout, tokenizer, encoder_decoder=seq2seq)
    held = fitting(held, config.max_length)
    if config.stop_at_kl is not None and not held:
        raise ConfigError(
            f"dpo.stop_at_kl: {config.stop_at_kl} is measured on pairs of the tune split, and none "
            "has two answers within dpo.max_length; give it some, or drop stop_at_kl"
        )
    watcher = _Watcher(held, config, reporter, ranks)
    if seq2seq:
        used = fitting(encoded, config.max_length)
        trainer: Trainer = Seq2SeqDpoTrainer(
            model=_with_adapter(model, config.lora),
            ref_model=_reference(load_base, config),
            args=args,
            examples=used,
            processing_class=tokenizer,
            callbacks=[watcher],
        )
        if config.reference == "precomputed":
            with trainer.accelerator.autocast():
                trainer.reference = pair_likelihoods(trainer.model, used)
    elif config.method != "dpo":
        reference = _reference(load_base, config) if config.method == "kto" else None
        adapter = _peft_config(config.lora)
        trainer = method_trainer(
            config, model, reference, args, train, tokenizer, adapter, [watcher]
        )
    else:
        trainer = _Trainer(
            model=model,
            ref_model=_reference(load_base, config),
            args=args,
            train_dataset=_dataset(to_rows(train, tokenizer), checkpoints / "pairs", ranks),
            processing_class=tokenizer,
            peft_config=_peft_config(config.lora),
            callbacks=[watcher],
        )
    if config.lora is not None:
        _set_lora_dropout(trainer.model, config.lora.dropout)
    trainer.remove_callback(PrinterCallback)
    initial = {
        name: parameter.detach().to(
            "cpu", parameter.dtype if config.lora is not None else weights, copy=True
        )
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    if held and ranks.main:
        with trainer.accelerator.autocast():  # as the trainer will run the model
            watcher.reference = pair_likelihoods(trainer.model, held)
        if config.stop_at_kl is not None:
            watcher.base = load_base().eval()
    with watcher:
        newest = latest_checkpoint(checkpoints) if ranks.main else None
        path = ranks.broadcast(str(newest) if newest else None)
        trainer.train(resume_from_checkpoint=path)
    if not ranks.main:
        return None
    if config.lora is None:
        model.to(weights)
    parameters = _changes(trainer.model, initial, total, config, dtype)
    after = _hashes(model)
    train_curve = [
        _point(
            entry["step"],
            loss=entry["loss"],
            # KTO's answers come unpaired: no pair is right or wrong, and a batch may lack one kind
            reward_accuracy=entry.get("rewards/accuracies"),
            reward_margin=entry.get("rewards/margins"),
        )
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    first = train_curve[0]["loss"]
    stop = _stop(config, trainer.state.log_history)
    _save(trainer.model, tokenizer, folder / "model", base_path)
    return DpoRun(
        train_curve=train_curve,
        heldout_curve=[
            _point(entry["step"], **entry["heldout"])
            for entry in trainer.state.log_history
            if "heldout" in entry
        ],
        first_loss=first,
        freeze=_freeze_record(frozen, before, after),
        parameters=parameters,
        pairs=pairs,
        stop=stop,
        notes=[
            *([_OWN_LOOP] if seq2seq else []),
            *_notes(config, frozen, pairs, first, parameters["changed_share"]),
            *_stop_notes(stop),
            *_filling(config, pairs["train"], trainer.state.epoch, ranks.world),
        ],
    )


class _Trainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer, without its model cards and its telemetry."""

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        pass


def _arguments(
    config: DpoConfig,
    checkpoints: Path,
    device: str,
    dtype: str,
    seed: int,
    ranks: Ranks = ALONE,
) -> TrainingArguments:
    batch_size, accumulation = share_batch(
        config.batch_size, config.gradient_accumulation, ranks.world
    )
    ranks.connect()  # before the trainer would, which does not wait as long
    # transformers renamed the setting on its way to 6
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    common = dict(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        bf16=dtype == "bfloat16",
        use_cpu=resolve_device(device).type == "cpu",
        dataloader_pin_memory=False,
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        **{checkpointing: config.gradient_checkpointing},
    )
    if config.method == "dpo":
        # EXO needs some smoothing; the value is its paper's (arXiv:2402.00856)
        smoothing = config.label_smoothing or (1e-3 if config.loss_type == "exo_pair" else 0.0)
        args = DPOConfig(
            beta=config.beta,
            loss_type=[config.loss_type],
            label_smoothing=smoothing,
            precompute_ref_log_probs=config.reference == "precomputed",
            max_length=config.max_length,
            **common,
        )
    else:
        args = method_arguments(config, common)
    args._n_gpu = min(args.n_gpu, 1)  # several cards: one is used, or a launcher starts more
    return args


def _dataset(rows: list[Row], folder: Path, ranks: Ranks) -> Dataset:
    """The pairs for TRL. Several processes read them from one folder: there the first one leaves
    the reference's log-probabilities for all."""
    dataset = Dataset.from_list(rows)
    if ranks.world == 1:
        return dataset
    if ranks.main:
        with atomic_folder(folder) as temporary:
            dataset.save_to_disk(temporary)
    ranks.barrier()
    return Dataset.load_from_disk(folder)


def _reference(
    load_base: Callable[[], PreTrainedModel], config: DpoConfig
) -> PreTrainedModel | None:
    """A live reference for full training; adapters are switched off to get theirs."""
    return load_base() if config.reference == "live" and config.lora is None else None


def _with_adapter(model: PreTrainedModel, lora: LoraConfig | None) -> PreTrainedModel:
    """An encoder-decoder model with the adapter around it, where one is asked for."""
    config = _peft_config(lora, "SEQ_2_SEQ_LM")
    return model if config is None else get_peft_model(model, config)


def _peft_config(lora: LoraConfig | None, task: str = "CAUSAL_LM") -> PeftLoraConfig | None:
    if lora is None:
        return None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type=task,
    )


def _set_lora_dropout(model: nn.Module, dropout: float) -> None:
    """TRL switches all dropout off; the adapters' own was asked for."""
    for name, module in model.named_modules():
        if ".lora_dropout." in name and isinstance(module, nn.Dropout):
            module.p = dropout


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Progress, the held-out curve, and checkpoints that can be trusted.

    The trainer forgets the sums of its running log when it resumes, so each checkpoint is preceded
    by a log, and the curve of a resumed run equals that of an undisturbed one. Of several processes
    the first one measures the curve; the others wait for it at their next step.
    """

    def __init__(
        self, held: list[Example], config: DpoConfig, reporter: Reporter, ranks: Ranks
    ) -> None:
        self.reference: PairLikelihoods | None = None
        self.base: PreTrainedModel | None = None
        self._held = held if ranks.main else []
        self._ranks = ranks
        self._config = config
        self._reporter = reporter
        self._stack = ExitStack()
        self._advance: Advance = lambda _n: None

    def __enter__(self) -> None:
        self._stack.__enter__()

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        self._advance = self._stack.enter_context(
            self._reporter.bar("DPO", state.max_steps, unit="steps", done=state.global_step)
        )

    def on_step_end(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        last = state.global_step >= state.max_steps
        due = last or state.global_step % self._config.eval_every == 0
        point = self._heldout(model) if self._held and due else None
        if due and self._config.stop_at_kl is not None:
            reached = point is not None and point["kl_to_base"] >= self._config.stop_at_kl
            if self._ranks.broadcast(reached):
                control.should_training_stop = last = True
        if last:
            # A checkpoint of the last step could not be resumed from: the trainer would take
            # one more.
            control.should_save = False
        if last or control.should_save:
            control.should_log = True
        if point is not None:
            state.log_history.append({"step": state.global_step, "heldout": point})
        self._advance(1)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        *,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise MeasurementError(
                f"DPO: the loss is {logs['loss']} at step {state.global_step}; lower "
                f"dpo.learning_rate (now {self._config.learning_rate})"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        self._ranks.barrier()  # each process has written its own random state
        if self._ranks.main:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _heldout(self, model: PreTrainedModel) -> dict[str, float]:
        assert self.reference is not None
        model.eval()
        margins = reward_margins(
            pair_likelihoods(model, self._held), self.reference, self._config.beta
        )
        point = curve_point(margins)
        found = {
            "loss": point.loss,
            "reward_accuracy": point.accuracy,
            "reward_margin": point.margin,
        }
        if self.base is not None:
            chosen = [Continuation(example.prompt, example.chosen) for example in self._held]
            kl, tokens = answer_kl(model, self.base, chosen)
            found["kl_to_base"] = float(kl.sum() / tokens.sum())
        model.train()
        return found


def _point(
    step: int,
    *,
    loss: float,
    reward_accuracy: float | None,
    reward_margin: float | None,
    **more: float,
) -> dict[str, Json]:
    return {
        "step": step,
        "loss": loss,
        "reward_accuracy": reward_accuracy,
        "reward_margin": reward_margin,
        **more,
    }


# ---------------------------------------------------------------------------------- accounts


def _check_length(config: DpoConfig, model: PreTrainedModel) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and config.max_length > context:
        raise ConfigError(
            f"dpo.max_length: {config.max_length} tokens, but the base reads at most {context}; "
            f"set it to {context} or less"
        )


def _count(examples: Sequence[Example], max_length: int) -> dict[str, int]:
    """What TRL does to the training pairs.

    Raises:
        DataError: nothing is left.
    """
    kept = [example for example in examples if len(example.prompt) < max_length]
    if not kept:
        raise DataError(
            f"none of {len(examples)} training pairs has a prompt shorter than dpo.max_length "
            f"{max_length}; raise it"
        )
    return {
        "train": len(kept),
        "dropped": len(examples) - len(kept),
        "truncated": sum(example.length > max_length for example in kept),
        "split_token": sum(example.split_token for example in kept),
    }


def _changes(
    model: nn.Module, initial: dict[str, Tensor], total: int, config: DpoConfig, dtype: str
) -> dict[str, Json]:
    """Count the elements that are not what they were.

    Raises:
        MeasurementError: none changed.
    """
    now = dict(model.named_parameters())
    changed = sum(int((now[name].detach().cpu() != old).sum()) for name, old in initial.items())
    trainable = sum(old.numel() for old in initial.values())
    if changed == 0:
        raise MeasurementError(
            f"DPO changed none of {trainable} trainable parameters: a learning rate of "
            f"{config.learning_rate} is below what {dtype} can add to them; raise "
            "dpo.learning_rate, or set models.dtype: float32"
        )
    return {
        "total": total,
        "trainable": trainable,
        "changed": changed,
        "changed_share": changed / trainable,
    }


def _freeze_record(
    frozen: Frozen, before: dict[str, str], after: dict[str, str]
) -> dict[str, Json]:
    record: dict[str, Json] = {"mode": frozen.mode, "tied": frozen.tied}
    for name, old in before.items():
        record[name] = {"before": old, "after": after[name], "unchanged": old == after[name]}
    return record


def _notes(
    config: DpoConfig, frozen: Frozen, pairs: dict[str, int], first: float, share: float
) -> list[str]:
    notes = []
    if frozen.mode != config.freeze:
        notes.append(
            f"The embeddings are tied: freezing the {config.freeze} embedding freezes both."
        )
    if pairs["dropped"]:
        notes.append(
            f"{pairs['dropped']} training pairs were left out: their prompt alone fills "
            f"dpo.max_length ({config.max_length} tokens)."
        )
    if pairs["truncated"]:
        notes.append(
            f"{pairs['truncated']} of {pairs['train']} training pairs lost the end of an answer to "
            f"dpo.max_length ({config.max_length} tokens)."
        )
    if pairs["split_token"]:
        notes.append(
            f"In {pairs['split_token']} training pairs the end of the prompt merges with the "
            "answer into one token and was left out: end prompts on a token boundary."
        )
    known = first_loss(config)
    if known is not None and abs(first - known[0]) > LN2_TOLERANCE * max(1.0, known[0]):
        notes.append(
            f"The first {config.method.upper()} loss is {first:.4f}, not {known[1]} = "
            f"{known[0]:.4f}: the reference is not the model that training started from, so "
            "rewards are measured from the wrong place."
        )
    if share < LOW_SHARE:
        notes.append(
            f"Only {share:.2%} of the trainable parameters changed: the learning rate "
            f"({config.learning_rate}) is near the precision of the weights."
        )
    if config.lora is not None:
        notes.append(
            f"LoRA of rank {config.lora.rank} bounds the rank of each weight's change by "
            "construction: read every rank and spectrum with that in mind."
        )
    return notes


def _stop(config: DpoConfig, history: list[dict[str, Any]]) -> dict[str, Json] | None:
    if config.stop_at_kl is None:
        return None
    last = [entry for entry in history if "heldout" in entry][-1]
    kl = last["heldout"]["kl_to_base"]
    return {
        "target": config.stop_at_kl,
        "reached": kl >= config.stop_at_kl,
        "step": last["step"],
        "kl": kl,
    }


def _stop_notes(stop: dict[str, Json] | None) -> list[str]:
    if stop is None or stop["reached"]:
        return []
    return [
        f"Training ended at step {stop['step']} with KL(tuned‖base) {stop['kl']:.3g} nats a token "
        f"on the curve's pairs, short of dpo.stop_at_kl ({stop['target']})."
    ]


def _filling(config: DpoConfig, pairs: int, epochs: float, world: int) -> list[str]:
    """Where several processes did not take the batches of one: each needs as many pairs."""
    own, _ = share_batch(config.batch_size, config.gradient_accumulation, world)
    rest = pairs % (own * world)
    if world == 1 or rest == 0 or epochs < 1:
        return []
    return [
        f"{world} processes trained together: the last batch of each epoch, of {rest} pairs, was "
        f"filled up to {own * world} with pairs from the epoch's beginning."
    ]


# ---------------------------------------------------------------------------------- files


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, base_path: str
) -> None:
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            fields = json.loads(adapter.read_text(encoding="utf-8"))
            local = Path(base_path).is_dir()
            fields["base_model_name_or_path"] = (
                os.path.relpath(base_path, path) if local else base_path
            )
            if isinstance(fields.get("target_modules"), list):
                fields["target_modules"].sort()  # a set, whose order differs from run to run
            write_json(adapter, fields)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of other libraries (progress is ours to show), no log lines that our notes replace,
    and no warnings that TRL owes to transformers."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    tqdm_before = os.environ.get("TQDM_DISABLE")
    logger = logging.getLogger("trl")
    level = logger.level
    datasets.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            # TRL 1.16 reads names that transformers 5.23 renamed
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
        if tqdm_before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm_before
        if bars:
            datasets.utils.logging.enable_progress_bar()
