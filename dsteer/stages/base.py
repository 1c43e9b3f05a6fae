"""Train a tiny base model and its tokenizer on the training split, or on texts of its own."""

from __future__ import annotations

import math

from dsteer.config import resolved
from dsteer.data import read_source
from dsteer.data.jsonl import read_pairs
from dsteer.errors import ConfigError, DataError
from dsteer.models.load import quiet, resolve_device
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.store import Json, atomic_folder
from dsteer.training.language_model import (
    mean_loss,
    pack,
    preference_texts,
    train_language_model,
)

HELD_OUT = 32
"""Of the base's own texts, each conversation of that number is held out."""


def run(context: StageContext) -> Json:
    """Train, save ``model/``, and measure the loss on the tune split, or on the texts held out.

    Raises:
        ConfigError: context_length is longer than the model can read.
    """
    config = context.config.base
    assert config is not None
    length, reach = config.context_length, config.model.max_position_embeddings
    if length > reach:
        raise ConfigError(
            f"base.context_length: {length} tokens, but base.model.max_position_embeddings is "
            f"{reach}; lower the one or raise the other"
        )
    if config.texts is None:
        data = context.input("data")
        learned, kept = read_pairs(data / "train.jsonl"), read_pairs(data / "tune.jsonl")
    else:
        pairs = read_source(config.texts).pairs
        learned = [pair for row, pair in enumerate(pairs) if row % HELD_OUT]
        kept = pairs[::HELD_OUT]
    texts = preference_texts(learned)
    tokenizer = build_tokenizer(texts, config.model.vocab_size, reach)
    blocks = pack(texts, tokenizer, length, context.seed("pack"))
    model = build_model(config.model, tokenizer, context.seed("init"))
    checkpoints = context.folder / "checkpoints"
    trained = train_language_model(
        model,
        blocks,
        config,
        checkpoint=checkpoints / "base.safetensors",
        seed=context.seed("order"),
        device=resolve_device(context.config.models.device),
        reporter=context.reporter,
    )
    with quiet(), atomic_folder(context.folder / "model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    notes = []
    if len(tokenizer) < config.model.vocab_size:
        notes.append(
            f"The texts gave {len(tokenizer)} tokens, fewer than the {config.model.vocab_size} "
            "asked for."
        )
    heldout_loss = None
    try:
        held = pack(preference_texts(kept), tokenizer, length, context.seed("pack"))
    except DataError as error:
        notes.append(f"No held-out loss on the tune split: {error}.")
    else:
        heldout_loss = mean_loss(model, held, config.batch_size)
    embedding = model.get_input_embeddings().weight.numel()
    tied = config.model.tie_word_embeddings
    parameters = {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "embedding": embedding if tied else 2 * embedding,
    }
    result = {
        "parameters": parameters,
        "architecture": {**resolved(config.model), "vocab_size": len(tokenizer)},
        "tokens_seen": trained.tokens_seen,
        "epochs": trained.tokens_seen / blocks.numel(),
        "curve": trained.curve,
        "heldout_loss": heldout_loss,
        "headline": {
            "parameters": parameters["total"],
            "heldout_perplexity": None if heldout_loss is None else math.exp(heldout_loss),
        },
        "notes": notes,
    }
    draw_result("base", result, context.folder)
    return result
