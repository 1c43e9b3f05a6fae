"""Read both models' hidden states on identical token ids, and the noise floor of the reading."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

from dsteer.activations.extract import PairedActivations, encode_for, write_ids
from dsteer.activations.reading import NoiseFloor, Reading, noise_floor
from dsteer.activations.sites import FINAL_NORM
from dsteer.config import ActivationsConfig
from dsteer.data.jsonl import read_pairs
from dsteer.data.tokens import hash_ids
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError
from dsteer.models.pair import ModelPair, Which
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.store import Json, write_json

MEASURED = ("fit", "tune", "test")
CHUNK_ROWS = 4096


def run(context: StageContext) -> Json:
    """Extract the fit, tune and test prompts in one go, one model after the other."""
    config, models = context.config.activations, context.config.models
    assert config is not None
    splits = {name: read_pairs(context.input("data") / f"{name}.jsonl") for name in MEASURED}
    for name, pairs in splits.items():
        if not pairs:
            raise DataError(f"the {name} split has no prompts to read; give data.splits.{name}")
    prompts = [pair for pairs in splits.values() for pair in pairs]
    pair = ModelPair.configured(models, context.base_path, context.tuned_path)
    encoded = encode_for(
        pair,
        prompts,
        position=config.position,
        template=config.template,
        max_tokens=config.max_tokens,
    )
    reading = Reading.of(
        pair,
        encoded,
        sites=config.sites,
        position=config.position,
        batch_tokens=config.batch_tokens,
    )
    responses, response = _responses(pair, splits["test"], config)
    noise: dict[str, NoiseFloor] = {}
    for which in _models():
        with pair.using(which) as model:
            path = context.folder / f"{which}.safetensors"
            states = reading.run(model, which, path, context.reporter)
            if which == "base":
                noise = noise_floor(reading, model, states, config.noise_floor_prompts)
            if responses is not None:
                path = context.folder / f"response_{which}.safetensors"
                responses.run(model, which, path, context.reporter)
    write_ids(context.folder / "ids.safetensors", encoded)
    if response is not None:
        write_json(context.folder / "response.json", response)
    _require_change(PairedActivations.open(context.folder), pair)

    ends = [0, *accumulate(len(pairs) for pairs in splits.values())]
    offsets = reading.offsets
    truncated = sum(item.truncated for item in encoded)
    tokens = sum(len(item.ids) for item in encoded)
    result = {
        "n": offsets[-1],
        "width": pair.width,
        "blocks": pair.n_blocks,
        "sites": list(reading.sites),
        "position": config.position,
        "template": config.template,
        "rows": {
            name: [offsets[ends[index]], offsets[ends[index + 1]]]
            for index, name in enumerate(splits)
        },
        "conversations": {
            name: _keys(pairs, offsets[ends[index] : ends[index + 1] + 1])
            for index, (name, pairs) in enumerate(splits.items())
        },
        "ids_sha256": hash_ids(encoded),
        "tokens": tokens,
        "truncated": truncated,
        "noise_floor": {
            site: {"rms": floor.rms, "mean_norm": floor.mean_norm} for site, floor in noise.items()
        },
        "response": None
        if response is None
        else {
            "pairs": sum(pair.chosen is not None for pair in splits["test"]),
            "tokens": len(response["targets"]),
        },
        "headline": {
            "prompts": len(prompts),
            "tokens": tokens,
            "sites": len(reading.sites),
            "truncated": truncated,
        },
        "notes": [*pair.notes, *_notes(truncated, len(prompts), config)],
    }
    draw_result("activations", result, context.folder)
    return result


def _models() -> tuple[Which, ...]:
    return ("base", "tuned")


def _responses(
    pair: ModelPair, test: Sequence[PreferencePair], config: ActivationsConfig
) -> tuple[Reading | None, Json]:
    """What is read of the test pairs' chosen answers, and ``response.json``; None without answers.

    The states are those at ``final_norm`` that predict the first tokens of each answer.
    """
    answered = [item for item in test if item.chosen]
    if not answered or config.response_tokens == 0:
        return None, None
    encoded = encode_for(
        pair,
        answered,
        position="response_predictors",
        template=config.template,
        max_tokens=config.max_tokens,
        response_tokens=config.response_tokens,
    )
    reading = Reading.of(
        pair,
        encoded,
        sites=FINAL_NORM,
        position="response_predictors",
        batch_tokens=config.batch_tokens,
    )
    lengths = iter([len(item.ids) - item.prompt_length for item in encoded])
    spans = [next(lengths) if item.chosen else 0 for item in test]
    targets = [token for item in encoded for token in item.ids[item.prompt_length :]]
    return reading, {"offsets": [0, *accumulate(spans)], "targets": targets}


def _keys(pairs: Sequence[PreferencePair], offsets: Sequence[int]) -> list[str]:
    """A short key of the conversation of each row."""
    keys = []
    for number, pair in enumerate(pairs):
        key = hashlib.sha256(pair.conversation.encode()).hexdigest()[:12]
        keys += [key] * (offsets[number + 1] - offsets[number])
    return keys


def _require_change(acts: PairedActivations, pair: ModelPair) -> None:
    """Refuse two models that do the same: every ratio that follows would be 0/0."""
    rows = acts.base.n
    for site in acts.sites:
        for start in range(0, rows, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, rows)
            if not acts.base.rows(site, start, stop).equal(acts.tuned.rows(site, start, stop)):
                return
    raise MeasurementError(
        f"base {pair.name('base')} and tuned {pair.name('tuned')} have identical states at every "
        "site, so there is no change to measure; expected two different models (was the learning "
        "rate too small for the weights' dtype?)"
    )


def _notes(truncated: int, prompts: int, config: ActivationsConfig) -> list[str]:
    if not truncated:
        return []
    return [
        f"{truncated} of {prompts} prompts were cut on the left to fit into {config.max_tokens} "
        "tokens or the models' context; the position that is read was kept."
    ]
