"""Train the tuned model with DPO, and say on held-out pairs what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from dsteer.config import Labels
from dsteer.data.jsonl import read_pairs
from dsteer.data.types import PreferencePair
from dsteer.models.load import load_config, load_model, load_tokenizer
from dsteer.models.pair import ModelPair
from dsteer.models.seq2seq import is_encoder_decoder
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.store import Json
from dsteer.training.dpo import train_dpo
from dsteer.training.evaluate import Evaluation, evaluate
from dsteer.training.examples import Example, answered, encode_pairs, fitting


def run(context: StageContext) -> Json:
    """Train, save ``model/`` (a whole model, or an adapter), and evaluate what was saved.

    The processes of a run train together; the first one does the rest.
    """
    config, models = context.config.dpo, context.config.models
    assert config is not None
    data = context.input("data")
    train, tune, test = (
        answered(read_pairs(data / f"{name}.jsonl")) for name in ("train", "tune", "test")
    )
    base_path = context.base_path
    own_base = "base" in context.inputs
    revision = None if own_base else models.base_revision
    tokenizer = load_tokenizer(
        models.tokenizer or base_path,
        revision=None if models.tokenizer else revision,
        trust_remote_code=models.trust_remote_code,
        chat_template=models.chat_template,
    )

    def load_base() -> PreTrainedModel:
        return load_model(
            base_path,
            dtype=models.dtype,
            device=models.device,
            revision=revision,
            trust_remote_code=models.trust_remote_code,
        )

    trained = train_dpo(
        load_base,
        tokenizer,
        relabelled(train, config.labels, context.seed("labels")),
        tune[: config.eval_pairs],
        config,
        folder=context.folder,
        base_path=base_path,
        device=models.device,
        dtype=models.dtype,
        seed=context.seed("train", *([] if config.seed is None else [str(config.seed)])),
        reporter=context.reporter,
        ranks=context.ranks,
    )
    if not context.ranks.main:
        return None
    shape = load_config(base_path, revision=revision, trust_remote_code=models.trust_remote_code)
    encoded = encode_pairs(test, tokenizer, encoder_decoder=is_encoder_decoder(shape))
    examples = fitting(encoded, config.max_length)
    evaluation = _evaluate(context, examples) if examples else None
    result = {
        "curve": {"train": trained.train_curve, "heldout": trained.heldout_curve},
        **_measured(evaluation, len(examples)),
        "first_loss": trained.first_loss,
        "freeze": trained.freeze,
        "parameters": trained.parameters,
        "pairs": trained.pairs,
        "stop": trained.stop,
        "notes": [
            *_warnings(evaluation, len(examples)),
            *trained.notes,
            *_length(context, examples),
        ],
    }
    draw_result("dpo", result, context.folder)
    return result


def relabelled(pairs: Sequence[PreferencePair], labels: Labels, seed: int) -> list[PreferencePair]:
    """Training pairs as they are given, with the two answers swapped, or swapped by a fair coin."""
    if labels == "given":
        return list(pairs)
    tosses = np.random.default_rng(seed).integers(0, 2, len(pairs)).astype(bool)
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        if labels == "swapped" or toss
        else pair
        for pair, toss in zip(pairs, tosses, strict=True)
    ]


def _evaluate(context: StageContext, examples: list[Example]) -> Evaluation:
    config, models = context.config.dpo, context.config.models
    assert config is not None
    pair = ModelPair.configured(models, context.base_path, str(context.folder / "model"))
    return evaluate(
        pair.tuned,
        pair.base,
        examples,
        beta=config.beta,
        seed=context.seed("bootstrap"),
        reporter=context.reporter,
    )


def _measured(evaluation: Evaluation | None, n: int) -> dict[str, Json]:
    if evaluation is None:
        nothing = {"reward_accuracy": None, "reward_margin": None}
        return {
            "test": {**nothing, "n": 0},
            "kl_to_base": None,
            "kl_noise_floor": None,
            "learned": None,
            "headline": {**nothing, "kl_to_base": None, "learned": None},
        }
    accuracy, margin, kl = (
        evaluation.reward_accuracy, evaluation.reward_margin, evaluation.kl_to_base,
    )  # fmt: skip
    return {
        "test": {"reward_accuracy": accuracy.json(), "reward_margin": margin.json(), "n": n},
        "kl_to_base": kl.json(),
        "kl_noise_floor": evaluation.kl_noise_floor,
        "learned": evaluation.learned,
        "headline": {
            "reward_accuracy": accuracy.value,
            "reward_margin": margin.value,
            "kl_to_base": kl.value,
            "learned": "yes" if evaluation.learned else "no",
        },
    }


def _warnings(evaluation: Evaluation | None, n: int) -> list[str]:
    if evaluation is None:
        return ["The test split has no answers, so nothing says whether the training learned."]
    accuracy, kl = evaluation.reward_accuracy, evaluation.kl_to_base
    assert accuracy.low is not None
    assert accuracy.high is not None
    span = f"{accuracy.low:.3f} to {accuracy.high:.3f}"
    shown = f"{accuracy.value:.3f} (95% interval {span}, n = {n})"
    notes = []
    if accuracy.high < 0.5:
        notes.append(
            f"Training made held-out preferences worse than chance: reward accuracy {shown}."
        )
    elif accuracy.low <= 0.5:
        notes.append(
            "Training learned nothing that holds on held-out pairs: the interval of the reward "
            f"accuracy, {shown}, includes chance (0.5). Read every vector below as what training "
            "moved, not as a preference."
        )
    if kl.low is None or kl.low <= evaluation.kl_noise_floor:
        notes.append(
            f"Training learned nothing that can be told from rounding: KL(tuned‖base) is "
            f"{kl.value:.2e} nats a token, the noise floor {evaluation.kl_noise_floor:.2e}."
        )
    return notes


def _length(context: StageContext, examples: list[Example]) -> list[str]:
    """Whether the base reads further here than it ever did in its own training."""
    base = context.config.base
    if base is None:
        return []
    beyond = sum(example.length > base.context_length for example in examples)
    if not beyond:
        return []
    return [
        f"{beyond} of {len(examples)} test pairs are longer than the {base.context_length} tokens "
        "that the base was trained on at once (base.context_length): it extrapolates there."
    ]
