"""Pipelines for models that exist: what ``dsteer compare`` and ``dsteer transfer`` write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from dsteer.config import (
    STAGE_SECTIONS,
    PipelineConfig,
    Source,
    SplitSizes,
    override,
    resolved,
)
from dsteer.errors import ConfigError, DataError, did_you_mean
from dsteer.names import labels
from dsteer.pipeline import outside_inputs
from dsteer.stages import planned
from dsteer.store import Run

HH = "Anthropic/hh-rlhf"
SYNTHETIC = "synthetic"
FORMATS = ("hh-rlhf", "oasst", "preference", "prompts")

FEWEST = 12
"""Conversations that a comparison needs: below, no split would have more than a handful."""

MEASURING = ("fit", "tune", "test")


@dataclass(frozen=True)
class Prompts:
    """Prompts for a comparison.

    Attributes:
        source: the source's entry in the pipeline.
        conversations: how many it holds.
        answered: whether they have answers.
    """

    source: Mapping[str, Any]
    conversations: int
    answered: bool


def find_prompts(
    data: str,
    kind: str | None = None,
    limit: int | None = None,
    use: Sequence[str] = MEASURING,
) -> Prompts:
    """Read a source once, to tell its format, its size and whether it has answers.

    Args:
        data: ``synthetic``, a hub dataset, or a local file or folder of pairs or prompts.
        kind: its format; default: what its first row tells.
        limit: use only the first rows.
        use: the splits that it feeds, prompts without answers never ``train``.

    Raises:
        ConfigError: an unknown format.
        DataError: nothing is there, or too few conversations.
    """
    from dsteer.data.sources import detect_format, read_source

    if kind is not None and kind not in FORMATS:
        raise ConfigError(f"--format {kind!r}: no such format{did_you_mean(kind, FORMATS)}")
    source: dict[str, Any]
    if data == SYNTHETIC:
        source = {"format": SYNTHETIC} | ({"conversations": limit} if limit else {})
    else:
        if kind is None:
            kind = "hh-rlhf" if data == HH else detect_format(data)
        source = {"format": kind, "path": data}
        if kind == "hh-rlhf":
            source |= {"subset": "harmless-base", "split": "test"} if data == HH else {}
        if limit:
            source["limit"] = limit
    source["use"] = [split for split in use if split != "train" or kind != "prompts"]
    pairs = read_source(TypeAdapter(Source).validate_python(source)).pairs
    conversations = len({pair.conversation for pair in pairs})
    if conversations < FEWEST:
        raise DataError(
            f"{data}: {conversations} conversations; a comparison needs {FEWEST} or more, which "
            "it splits into fit, tune and test"
        )
    return Prompts(source, conversations, any(pair.chosen and pair.rejected for pair in pairs))


def split_sizes(conversations: int) -> dict[str, int]:
    """Sizes of fit, tune and test: the defaults, or of fewer conversations the same shares."""
    wanted = SplitSizes().model_dump(include=set(MEASURING))
    total = sum(wanted.values())
    if conversations >= total:
        return {name: wanted[name] for name in MEASURING}
    return {name: wanted[name] * conversations // total for name in MEASURING}


def comparison(
    base: str,
    tuned: Sequence[str],
    prompts: Prompts,
    *,
    name: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    template: str = "none",
    overrides: Sequence[str] = (),
) -> str:
    """The YAML of a comparison: a pipeline for one tuned model, a study for several.

    Args:
        base: hub id (``id@revision``), folder or file.
        tuned: likewise, or adapters; one or more.
        prompts: what both models read.
        name: of the run; default: made from the models' names.
        dtype: of the weights.
        device: where they are read.
        template: ``none`` (the transcript as it stands, for both), ``chat`` (through the chat
            template), ``four-way`` (both, and how much of the change each makes), or a Jinja file
            or a model whose template both get.
        overrides: ``key.path=value`` items, which the YAML then holds.

    Raises:
        ConfigError: an override that is none, or does not fit.
    """
    for model in (base, *tuned):
        if not model:
            raise ConfigError("'' is no model: expected a hub id, a folder or a file")
    names = labels([base, *tuned])
    models: dict[str, Any] = {"base": base}
    changes: dict[str, dict[str, str]] = {}
    if len(tuned) == 1:
        models["tuned"] = tuned[0]
        default = f"compare-{names[0]}-{names[1]}"
        description = f"What distinguishes {names[1]} from {names[0]}."
    else:
        changes = {
            label: {"models.tuned": model} for label, model in zip(names[1:], tuned, strict=True)
        }
        default = f"compare-{names[0]}-{len(tuned)}-models"
        description = f"What distinguishes {', '.join(names[1:])} from {names[0]}."
    models |= {"dtype": dtype, "device": device}
    if template not in {"none", "chat", "four-way"}:
        models["chat_template"] = template
    pipeline: dict[str, Any] = {
        "name": name or default,
        "description": description,
        "seed": 0,
        "data": {
            "sources": [dict(prompts.source)],
            "splits": split_sizes(prompts.conversations),
        },
        "models": models,
        "activations": {
            "position": "prompt_last",
            "template": "none" if template in {"none", "four-way"} else "chat",
        },
        "vector": {},
        "cosine": {},
        "spectrum": {},
    }
    if template == "four-way":
        pipeline["template"] = {}
    if prompts.answered:
        pipeline |= {"geometry": {}, "profile": {}, "rank": {}}
    pipeline |= {"interpolation": {}, "inversion": {}, "claims": {}, "report": {}}
    if changes:
        pipeline["variants"] = changes
    return _written("compare", pipeline, overrides)


def transfer_between(
    sender: tuple[str, str],
    receiver: tuple[str, str],
    prompts: Prompts,
    *,
    name: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    overrides: Sequence[str] = (),
) -> str:
    """The YAML of a transfer: does the sender's vector work in the receiver?

    Args:
        sender: base, and the tuned model or a .safetensors file of its vectors.
        receiver: base and tuned: the pipeline's own pair, whose own vector is the ceiling.
        prompts: what is read; what fit, tune and test leave is the neutral text of the map.
        name: of the run; default: made from the models' names.
        dtype: of the weights.
        device: where they are read.
        overrides: ``key.path=value`` items, which the YAML then holds.

    Raises:
        ConfigError: an override that is none, or does not fit.
        DataError: the prompts have no answers, on which effects are measured.
    """
    if not prompts.answered:
        raise DataError(
            "the prompts have no answers, and a transfer is measured on answers; give pairs "
            "(chosen and rejected)"
        )
    kind = "vectors" if sender[1].endswith(".safetensors") else "tuned"
    ends = [sender[1].removesuffix(".safetensors"), receiver[1]]
    names = labels(ends) if ends[0] != ends[1] else labels(ends[:1]) * 2
    # Half of the conversations measure; the map is learned on the other half.
    splits = split_sizes(prompts.conversations // 2)
    pipeline: dict[str, Any] = {
        "name": name or f"transfer-{names[0]}-to-{names[1]}",
        "description": f"Does the vector of {names[0]} work in {names[1]}?",
        "seed": 0,
        "data": {"sources": [dict(prompts.source)], "splits": splits},
        "models": {"base": receiver[0], "tuned": receiver[1], "dtype": dtype, "device": device},
        "activations": {"position": "prompt_last"},
        "vector": {},
        "cosine": {},
        "transfer": {"base": sender[0], kind: sender[1]},
        "report": {},
    }
    return _written("transfer", pipeline, overrides)


def _written(command: str, pipeline: dict[str, Any], overrides: Sequence[str]) -> str:
    for item in overrides:
        override(pipeline, item)
    for name in STAGE_SECTIONS & pipeline.keys():
        if pipeline[name] is None:  # removed; written as null it would ask for its defaults
            del pipeline[name]
    head = f"# Written by `dsteer {command}`. Edit it and run it again: dsteer run this-file.yaml\n"
    return head + yaml.safe_dump(
        pipeline, sort_keys=False, allow_unicode=True, default_flow_style=None, width=96
    )


def check_pair(config: PipelineConfig) -> None:
    """See that a pipeline's models are there and make pairs; reads configs, no weights.

    Raises:
        ConfigError: a local path that isn't there, or no chat template where one is asked for.
        ModelError: a model or tokenizer that can't be read, or two models that are no pair.
    """
    from dsteer.data.tokens import has_template
    from dsteer.models.pair import ModelPair

    for stage in planned(config):
        outside_inputs(stage.name, config)
    models, sender = config.models, config.transfer
    assert models.base is not None
    assert models.tuned is not None
    pair = ModelPair.configured(models, models.base, models.tuned)
    chat = config.activations is not None and config.activations.template == "chat"
    if (chat or config.template is not None) and not has_template(pair.tokenizer_for("chat")):
        raise ConfigError(
            f"neither {models.base} nor {models.tuned} has a chat template; name one "
            "(--template FILE-OR-MODEL, models.chat_template), or read raw transcripts "
            "(--template none)"
        )
    _ = pair.tokenizer
    if sender is not None:
        from dsteer.transfer.study import sending_pair

        _ = sending_pair(models, sender).tokenizer


def check_folder(config: PipelineConfig, folder: Path) -> None:
    """See that a folder whose name was made up here holds no other comparison.

    Raises:
        ConfigError: it does.
    """
    manifest = Run(folder).manifest() or {}
    before = manifest.get("config")
    if before is None:
        return
    now = resolved(config)
    for key in ("models", "transfer", "variants"):
        named = [_named(values.get(key)) for values in (before, now)]
        if named[0] != named[1]:
            raise ConfigError(
                f"{folder} holds a run of other models ({_words(named[0])}, now "
                f"{_words(named[1])}); give this one a --name, or another --out"
            )


def _named(section: Any) -> dict[str, Any]:
    """The models that a section names."""
    keys = ("base", "tuned", "vectors", "base_revision", "tuned_revision")
    values = section or {}
    found = {key: values.get(key) for key in keys if values.get(key)}
    for variant, changes in values.items():
        if isinstance(changes, dict) and any(key.startswith("models.") for key in changes):
            found[variant] = changes.get("models.tuned")
    return found


def _words(named: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in named.items()) or "none"


def is_override(argument: str) -> bool:
    """Whether an argument of the command line is ``key.path=value`` rather than a model."""
    looks = re.match(r"[a-z_]+(\.[A-Za-z0-9_-]+)*=", argument) is not None
    return looks and not Path(argument).exists()
