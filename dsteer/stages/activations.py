"""Read both models' hidden states on identical token ids, and the noise floor of the reading.

With ``store: moments`` sums of the states are kept instead of the states (``moments.safetensors``),
and states of the first prompts of each split alone, for what needs states one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice

from dsteer.activations.accumulate import accumulate_splits
from dsteer.activations.extract import PairedActivations, encode_for, write_ids
from dsteer.activations.reading import NoiseFloor, Reading, noise_floor
from dsteer.activations.sites import FINAL_NORM
from dsteer.config import KEPT_PROMPTS, ActivationsConfig
from dsteer.data.jsonl import read_pairs, stream_pairs
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
    """Extract the fit, tune and test prompts in one go.

    The processes of a run share the reading; the first one does the rest.
    """
    config = context.config.activations
    assert config is not None
    result = (_moments if config.store == "moments" else _states)(context, config)
    if result is None:
        return None
    draw_result("activations", result, context.folder)
    return result


def _states(context: StageContext, config: ActivationsConfig) -> Json:
    """Read one model after the other, and keep every state; None but in the first process."""
    models = context.config.models
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
            states = reading.run(model, which, path, context.reporter, context.ranks)
            if which == "base" and context.ranks.main:
                noise = noise_floor(reading, model, states, config.noise_floor_prompts)
            if responses is not None:
                path = context.folder / f"response_{which}.safetensors"
                responses.run(model, which, path, context.reporter, context.ranks)
    if not context.ranks.main:
        return None
    write_ids(context.folder / "ids.safetensors", encoded)
    if response is not None:
        write_json(context.folder / "response.json", response)
    if not models.tuned_is_base:
        _require_change(PairedActivations.open(context.folder), pair)

    ends = [0, *accumulate(len(pairs) for pairs in splits.values())]
    offsets = reading.offsets
    truncated = sum(item.truncated for item in encoded)
    tokens = sum(len(item.ids) for item in encoded)
    return {
        "n": offsets[-1],
        "width": pair.width,
        "blocks": pair.n_blocks,
        "sites": list(reading.sites),
        "position": config.position,
        "template": config.template,
        **({"post_norm": pair.post_norm} if pair.encoder_decoder else {}),
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
        "noise_floor": _floors(noise),
        "response": _response_counts(splits["test"], response),
        "headline": {
            "prompts": len(prompts),
            "tokens": tokens,
            "sites": len(reading.sites),
            "truncated": truncated,
        },
        "notes": [*pair.notes, *_notes(truncated, len(prompts), config)],
    }


def _moments(context: StageContext, config: ActivationsConfig) -> Json:
    """Read both models part by part, and keep moments, and the states of a few prompts.

    None but in the first process.
    """
    files = {name: context.input("data") / f"{name}.jsonl" for name in MEASURED}
    for name, path in files.items():
        if next(stream_pairs(path), None) is None:
            raise DataError(f"the {name} split has no prompts to read; give data.splits.{name}")
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    keep = config.keep or KEPT_PROMPTS
    found = accumulate_splits(
        pair,
        {name: stream_pairs(path) for name, path in files.items()},
        spectra=("fit",),
        nulls=("fit", "test"),
        keep=keep,
        sites=config.sites,
        position=config.position,
        template=config.template,
        batch_tokens=config.batch_tokens,
        max_tokens=config.max_tokens,
        folder=context.folder,
        reporter=context.reporter,
        ranks=context.ranks,
    )
    kept = found.kept
    assert kept is not None
    if not context.config.models.tuned_is_base and not any(
        split[site].sums.squares.any() for split in found.moments.values() for site in split
    ):
        raise _unchanged(pair)
    test = list(islice(stream_pairs(files["test"]), keep))
    responses, response = _responses(pair, test, config)
    reading = Reading.of(
        pair,
        kept.encoded,
        sites=config.sites,
        position=config.position,
        batch_tokens=config.batch_tokens,
    )
    noise: dict[str, NoiseFloor] = {}
    for which in _models():
        with pair.using(which) as model:
            if which == "base" and context.ranks.main:
                noise = noise_floor(reading, model, kept.base, config.noise_floor_prompts)
            if responses is not None:
                path = context.folder / f"response_{which}.safetensors"
                responses.run(model, which, path, context.reporter, context.ranks)
    if not context.ranks.main:
        return None
    if response is not None:
        write_json(context.folder / "response.json", response)

    rows = {name: moments.n for name, moments in found.moments.items()}
    prompts = sum(found.prompts.values())
    ends = [0, *accumulate(len(keys) for keys in found.kept_keys.values())]
    spans = {
        name: [kept.offsets[ends[index]], kept.offsets[ends[index + 1]]]
        for index, name in enumerate(MEASURED)
    }
    return {
        "store": "moments",
        "n": sum(rows.values()),
        "counts": rows,
        "width": pair.width,
        "blocks": pair.n_blocks,
        "sites": list(found.sites),
        "position": config.position,
        "template": config.template,
        "rows": spans,
        "conversations": {
            name: _keys_of(found.kept_keys[name], kept.offsets[ends[index] : ends[index + 1] + 1])
            for index, name in enumerate(MEASURED)
        },
        "ids_sha256": found.ids_sha256,
        "tokens": found.tokens,
        "truncated": found.truncated,
        "noise_floor": _floors(noise),
        "response": _response_counts(test, response),
        "headline": {
            "prompts": prompts,
            "tokens": found.tokens,
            "sites": len(found.sites),
            "truncated": found.truncated,
        },
        "notes": [
            *pair.notes,
            *_notes(found.truncated, prompts, config),
            *_kept_notes(rows, spans, keep),
        ],
    }


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
    return _keys_of([pair.conversation for pair in pairs], offsets)


def _keys_of(conversations: Sequence[str], offsets: Sequence[int]) -> list[str]:
    keys = []
    for number, conversation in enumerate(conversations):
        key = hashlib.sha256(conversation.encode()).hexdigest()[:12]
        keys += [key] * (offsets[number + 1] - offsets[number])
    return keys


def _floors(noise: Mapping[str, NoiseFloor]) -> Json:
    return {site: {"rms": floor.rms, "mean_norm": floor.mean_norm} for site, floor in noise.items()}


def _response_counts(test: Sequence[PreferencePair], response: Json) -> Json:
    if response is None:
        return None
    return {
        "pairs": sum(pair.chosen is not None for pair in test),
        "tokens": len(response["targets"]),
    }


def _require_change(acts: PairedActivations, pair: ModelPair) -> None:
    """Refuse two models that do the same: every ratio that follows would be 0/0."""
    rows = acts.base.n
    for site in acts.sites:
        for start in range(0, rows, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, rows)
            if not acts.base.rows(site, start, stop).equal(acts.tuned.rows(site, start, stop)):
                return
    raise _unchanged(pair)


def _unchanged(pair: ModelPair) -> MeasurementError:
    return MeasurementError(
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


def _kept_notes(
    rows: Mapping[str, int], spans: Mapping[str, Sequence[int]], keep: int
) -> list[str]:
    kept = {name: stop - start for name, (start, stop) in spans.items()}
    if kept == rows:
        return []
    sizes = ", ".join(f"{name} {kept[name]} of {count}" for name, count in rows.items())
    return [
        f"States were not stored but for those of the first {keep} prompts of each split "
        f"(activations.keep; rows: {sizes}). v*, spectra, shares and mean cosines are of all "
        "prompts; noise floors, single cosines, KL, clouds and what sweeps show of held-out "
        "cosines are of the kept ones."
    ]
