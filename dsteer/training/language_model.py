"""Training a tiny base as a language model, with exact resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsteer.config import BaseConfig
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError
from dsteer.progress import SILENT, Reporter
from dsteer.store import Json, read_metadata, read_tensors, write_tensors
from dsteer.training.examples import answered, as_text

MAX_GRAD_NORM = 1.0
FINAL_RATE = 0.1  # of the peak learning rate, where the cosine ends


@dataclass(frozen=True)
class LanguageModelRun:
    """What the training did.

    Attributes:
        curve: mean training loss in nats a token since the point before, by step.
        tokens_seen: tokens read in all steps.
    """

    curve: list[dict[str, float | int]]
    tokens_seen: int


def preference_texts(pairs: Sequence[PreferencePair]) -> list[str]:
    """The whole text of both answers of each pair, so that the base prefers neither."""
    texts = []
    for pair in answered(pairs):
        prompt, chosen, rejected = as_text(pair)
        texts += [prompt + chosen, prompt + rejected]
    return texts


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> Int[Tensor, "blocks length"]:
    """Write texts (BOS … EOS) one after the other in random order, cut into full blocks.

    Nothing is padded; the tokens after the last full block are left out.

    Raises:
        DataError: the texts fill no block.
    """
    order = torch.randperm(len(texts), generator=_generator(seed)).tolist()
    encoded = (
        tokenizer([texts[index] for index in order], verbose=False)["input_ids"] if texts else []
    )
    stream = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    blocks = len(stream) // length
    if blocks == 0:
        raise DataError(
            f"the texts have {len(stream)} tokens and fill no block of {length}; lower "
            "base.context_length or give more pairs"
        )
    return torch.tensor(stream[: blocks * length]).view(blocks, length)


def train_language_model(
    model: PreTrainedModel,
    blocks: Int[Tensor, "blocks length"],
    config: BaseConfig,
    *,
    checkpoint: Path,
    seed: int,
    device: torch.device,
    reporter: Reporter = SILENT,
) -> LanguageModelRun:
    """Train a model in place on next-token prediction.

    AdamW; the learning rate rises linearly over the warm-up and falls on a cosine to a tenth of its
    peak; gradients are clipped at norm 1. Which blocks make a batch depends on the seed and the
    step alone, and weights, moments and curve are in the checkpoint, so that a run which was killed
    at any moment ends with the same bytes.

    Args:
        model: as built; on ``device`` afterwards.
        blocks: token ids, one row a sequence.
        config: steps, batch size, rates.
        checkpoint: safetensors file to resume from and to write to.
        seed: of the order of blocks.
        device: where to train.
        reporter: shows progress.

    Raises:
        MeasurementError: the loss is no longer finite.
    """
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    done, curve = _restore(checkpoint, model, optimizer)
    since: list[Tensor] = []
    with reporter.bar("base", config.steps, unit="steps", done=done) as advance:
        for step in range(done + 1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, config)
            batch = blocks[_batch(step - 1, len(blocks), config.batch_size, seed)].to(device)
            loss = _next_token_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            since.append(loss.detach())
            saves = step % config.checkpoint_every == 0 or step == config.steps
            if saves or step == 1 or step % config.log_every == 0:
                mean = float(torch.stack(since).mean())
                if not math.isfinite(mean):
                    raise MeasurementError(
                        f"training the base: the loss is {mean} at step {step}; lower "
                        f"base.learning_rate (now {config.learning_rate})"
                    )
                curve.append({"step": step, "loss": mean})
                since.clear()
            if saves:
                _save(checkpoint, model, optimizer, step, curve)
            advance(1)
    model.eval()
    return LanguageModelRun(curve, config.steps * config.batch_size * blocks.shape[1])


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, blocks: Int[Tensor, "blocks length"], batch_size: int
) -> float:
    """Mean next-token loss in nats a token."""
    device = model.device
    total = 0.0
    for batch in torch.split(blocks, batch_size):
        total += float(_next_token_loss(model, batch.to(device))) * len(batch)
    return total / len(blocks)


def _next_token_loss(model: PreTrainedModel, batch: Int[Tensor, "batch length"]) -> Tensor:
    states = model.base_model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(states)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _rate(step: int, config: BaseConfig) -> float:
    """Learning rate of a step, counted from 1."""
    warmup = min(config.warmup_steps, config.steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def _batch(step: int, blocks: int, size: int, seed: int) -> Int[Tensor, " size"]:
    """Indices of a step's blocks: every epoch is one permutation, and batches run across epochs."""
    wanted = range(step * size, (step + 1) * size)
    orders = {
        epoch: torch.randperm(blocks, generator=_generator(seed + 1 + epoch))
        for epoch in range(wanted[0] // blocks, wanted[-1] // blocks + 1)
    }
    return torch.stack([orders[place // blocks][place % blocks] for place in wanted])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _save(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    curve: Sequence[Json],
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    write_tensors(path, arrays, {"step": step, "curve": curve})


def _restore(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float | int]]]:
    """Load a checkpoint, if there is one: its step and curve."""
    if not path.is_file():
        return 0, []
    metadata = read_metadata(path)
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for name, array in read_tensors(path).items():
        owner, _, rest = name.partition(".")
        if owner == "model":
            weights[rest] = torch.from_numpy(array)
        else:
            index, _, moment = rest.partition(".")
            tensor = torch.from_numpy(array)  # the store makes a scalar a vector of one
            state.setdefault(int(index), {})[moment] = tensor[0] if moment == "step" else tensor
    model.load_state_dict(weights, strict=False)  # a tied head is no parameter of its own
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    curve = [{"step": point["step"], "loss": point["loss"]} for point in metadata["curve"]]
    return metadata["step"], curve
