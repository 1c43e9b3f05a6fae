"""Pydantic models of a pipeline.

A pipeline is one YAML file. Each top-level section configures the stage of that name; a section
that is absent leaves its stage out of the plan. Unknown keys are refused, and all mistakes are
reported at once with their dotted path.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dsteer.errors import ConfigError, did_you_mean
from dsteer.names import split_revision

SplitName = Literal["train", "fit", "tune", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
Position = Literal["prompt_last", "prompt_mean", "response_last", "response_mean", "all"]
DType = Literal["float32", "bfloat16", "float16"]
DeviceMap = Literal["auto", "balanced", "sequential"]
Quantization = Literal["8bit", "4bit"]
Freeze = Literal["none", "input", "output", "both"]


SITE = r"encoder|final_norm|resid_post\.(0|[1-9]\d*)"
"""What sites are called."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What runs and variants may be called: their folders have these names."""


def _site(value: str) -> str:
    if not re.fullmatch(SITE, value):
        raise ValueError(f"{value!r} is no site: expected resid_post.K, final_norm or encoder")
    return value


def _auto_or_site(value: str) -> str:
    if not re.fullmatch(f"auto|{SITE}", value):
        raise ValueError(
            f"{value!r} is no site: expected auto, resid_post.K, final_norm or encoder"
        )
    return value


Sites = Annotated[tuple[Annotated[str, AfterValidator(_site)], ...], Field(min_length=1)]
Places = Annotated[tuple[Annotated[str, AfterValidator(_auto_or_site)], ...], Field(min_length=1)]
"""Sites of a stage, ``auto`` among them."""


class Section(BaseModel):
    """A part of a pipeline: immutable, and strict about its keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


# ---------------------------------------------------------------------------------- data


class _Source(Section):
    path: str = Field(description="Hub id, local file or local folder.")
    revision: str | None = Field(None, description="Hub revision (commit, tag or branch).")
    limit: PositiveInt | None = Field(None, description="Use only the first rows.")
    use: tuple[SplitName, ...] = Field(SPLITS, description="The splits that this source may feed.")

    @field_validator("use")
    @classmethod
    def _some_split(cls, value: tuple[SplitName, ...]) -> tuple[SplitName, ...]:
        if not value:
            raise ValueError("name at least one of train, fit, tune, test")
        return value


class HHSource(_Source):
    """Anthropic hh-rlhf: rows with two transcripts, ``chosen`` and ``rejected``."""

    format: Literal["hh-rlhf"]
    path: str = "Anthropic/hh-rlhf"
    subset: str | None = Field("harmless-base", description="Folder of the hub dataset.")
    split: Literal["train", "test"] = "train"


class OasstSource(_Source):
    """Open-Assistant conversation trees; sibling answers are paired by their rank (0 is best)."""

    format: Literal["oasst"]
    path: str = "OpenAssistant/oasst1"
    split: Literal["train", "validation"] = "train"
    lang: str | None = Field("en", description="Keep only messages in this language.")
    pairing: Literal["best_worst", "adjacent", "all"] = Field(
        "best_worst", description="Which ranked siblings make pairs."
    )


class PreferenceSource(_Source):
    """TRL's ``prompt``, ``chosen``, ``rejected`` (text or messages): JSONL, Parquet or hub."""

    format: Literal["preference"]
    subset: str | None = None
    split: str = "train"


class PromptSource(_Source):
    """A plain list of prompts (.txt: one a line; .jsonl or .csv: a ``prompt`` column)."""

    format: Literal["prompts"]
    use: tuple[SplitName, ...] = ("fit", "tune", "test")

    @field_validator("use")
    @classmethod
    def _no_training(cls, value: tuple[SplitName, ...]) -> tuple[SplitName, ...]:
        if "train" in value:
            raise ValueError("prompts have no answers to train on: leave 'train' out of 'use'")
        return value


class SyntheticSource(Section):
    """The synthetic preference world: benign dialogues with planted preference axes."""

    format: Literal["synthetic"]
    conversations: PositiveInt = Field(4000, description="How many pairs to write.")
    axes: dict[str, float] = Field(
        default_factory=lambda: {"polite": 1.0},
        description="Preference weight of each axis; a negative weight prefers its other pole.",
    )
    switch: tuple[dict[str, float], ...] | None = Field(
        None,
        description="Instead of axes: the weights of each group of prompts. A prompt's topic says "
        "which group it is in: topics take turns.",
    )
    topics: Literal["all", "seen", "held_out"] = Field(
        "all", description="Which topics the prompts are about."
    )
    label_noise: float = Field(0.0, ge=0, le=0.5, description="Share of flipped labels.")
    differ: Literal["all", "preferred"] = Field(
        "all",
        description="Where a pair's two answers differ: in all poles and words, or (minimal pairs) "
        "only in the words of axes with a weight.",
    )
    styled: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of prompts with an earlier turn whose style (its poles but `brief` and "
        "`declines`) the answers keep, but for the axes with a weight; 0: such turns are fewer and "
        "say nothing about the answers.",
    )
    seed: int = 0
    use: tuple[SplitName, ...] = SPLITS

    @model_validator(mode="after")
    def _axes_or_switch(self) -> Self:
        if self.switch is not None and "axes" in self.model_fields_set:
            raise ValueError(
                "axes and switch are both given: axes prefers the same on every prompt, switch "
                "another in each group of prompts; drop one"
            )
        return self


Source = Annotated[
    HHSource | OasstSource | PreferenceSource | PromptSource | SyntheticSource,
    Field(discriminator="format"),
]


class SplitSizes(Section):
    """Pairs a split. Splits are disjoint by conversation."""

    train: PositiveInt | None = Field(None, description="Default: all that the others leave.")
    fit: PositiveInt = Field(512, description="v* is fitted on these.")
    tune: PositiveInt = Field(128, description="Choices (site, strength) are made on these.")
    test: PositiveInt = Field(256, description="Numbers are reported on these.")


class DataConfig(Section):
    """Where preference pairs come from and how they are split."""

    sources: tuple[Source, ...] = Field(min_length=1)
    splits: SplitSizes = SplitSizes()


# ---------------------------------------------------------------------------------- models


class ModelsConfig(Section):
    """Which models, and in which precision they are read."""

    base: str | None = Field(
        None,
        description="Hub id (or id@revision), folder or GGUF file; absent if `base` trains one.",
    )
    tuned: str | None = Field(
        None, description="Likewise, or an adapter; absent if `dpo` trains it."
    )
    tuned_is_base: bool = Field(
        False, description="The base against itself: a null, whose every displacement is 0."
    )
    base_revision: str | None = None
    tuned_revision: str | None = None
    tokenizer: str | None = Field(None, description="Hub id or folder; default: the base model's.")
    chat_template: str | None = Field(
        None,
        description="A Jinja file, or hub id or folder of a tokenizer: both models' template.",
    )
    dtype: DType = "float32"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    device_map: DeviceMap | None = Field(
        None, description="Spread a model that is read over all devices, then memory, then disk."
    )
    max_memory: dict[int | str, int | str] | None = Field(
        None, description="With device_map: the most of each device, as {0: 20GiB, cpu: 60GiB}."
    )
    offload_folder: str | None = Field(
        None, description="With device_map: where weights go that fit nowhere else."
    )
    quantization: Quantization | None = Field(
        None, description="Read both models quantised by bitsandbytes (extra `bnb`)."
    )
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _split_revisions(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for which in ("base", "tuned"):
            name = values.get(which)
            if not isinstance(name, str):
                continue
            path, revision = split_revision(name)
            if revision is None:
                continue
            given = values.get(f"{which}_revision")
            if given is not None:
                raise ValueError(
                    f"{which} {name} names a revision, and so does {which}_revision {given}; give "
                    "one of them"
                )
            values = {**values, which: path, f"{which}_revision": revision}
        return values

    @field_validator("max_memory")
    @classmethod
    def _sizes(cls, value: dict[int | str, int | str] | None) -> dict[int | str, int | str] | None:
        if value is None:
            return None
        found: dict[int | str, int | str] = {}
        for device, size in value.items():
            if not re.fullmatch(r"\d+|cpu|mps", str(device)):
                raise ValueError(f"{device!r} is no device: expected 0, 1, …, cpu or mps")
            if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?[KMG]i?B", str(size)):
                raise ValueError(f"{size!r} of {device} is no size: expected such as 20GiB")
            found[int(device) if str(device).isdigit() else device] = size
        return found

    @model_validator(mode="after")
    def _one_placement(self) -> Self:
        if self.device_map is None:
            for key in ("max_memory", "offload_folder"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} needs device_map: auto, balanced or sequential")
        elif self.device != "auto":
            raise ValueError(
                f"device {self.device} and device_map {self.device_map} are both given: drop one "
                "(max_memory limits the devices of a map)"
            )
        return self


class TinyModelConfig(Section):
    """Shape of a model built from nothing, and of its byte-level BPE tokenizer."""

    architecture: Literal["llama", "qwen3", "gpt_neox", "gpt2"] = Field(
        "llama",
        description="llama and qwen3 have RMSNorm and no biases; gpt_neox (parallel blocks) and "
        "gpt2 (learned positions) have LayerNorm and biases, and use no num_key_value_heads.",
    )
    vocab_size: int = Field(2048, ge=300)
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 344
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    max_position_embeddings: PositiveInt = 1024
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class BaseConfig(Section):
    """Trains a tiny base model as a language model on the spot."""

    model: TinyModelConfig = TinyModelConfig()
    texts: SyntheticSource | None = Field(
        None,
        description="Learn these texts and not those of the training split, so that the base is "
        "the same whatever the preferences; every 32nd conversation is held out.",
    )
    steps: PositiveInt = 600
    batch_size: PositiveInt = 32
    context_length: PositiveInt = 128
    learning_rate: PositiveFloat = 3e-3
    warmup_steps: int = Field(50, ge=0)
    weight_decay: NonNegativeFloat = 0.01
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 200


Labels = Literal["given", "coin_flip", "swapped"]


class LoraConfig(Section):
    """Low-rank adapters. The rank bounds the rank of each weight's change by construction."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


SMOOTHED = ("sigmoid", "robust", "exo_pair")
"""The losses of DPO that ``label_smoothing`` changes; of the other methods, simpo and cpo."""


class DpoConfig(Section):
    """Preference training through TRL, on the training split."""

    method: Literal["dpo", "simpo", "cpo", "orpo", "kto"] = Field(
        "dpo", description="All but dpo: decoder-only models, one process."
    )
    beta: PositiveFloat = 0.1
    loss_type: str = Field(
        "sigmoid",
        description="With method: dpo, any loss that TRL's DPOTrainer knows; encoder-decoder "
        "models have sigmoid, hinge and ipo.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of swapped labels; robust needs it above 0."
    )
    simpo_gamma: NonNegativeFloat = Field(0.5, description="Target margin of method: simpo.")
    cpo_alpha: NonNegativeFloat = Field(
        1.0, description="Weight of the chosen answers' likelihood in method: cpo."
    )
    stop_at_kl: PositiveFloat | None = Field(
        None,
        description="Training stops at the first evaluation with so much KL(tuned‖base), in nats "
        "a token of the chosen answers of the curve's pairs.",
    )
    labels: Labels = Field(
        "given",
        description="Which answer of a training pair is called chosen: the given one, one by the "
        "toss of a coin (a null: the same tokens and compute, no preference), or the other one.",
    )
    seed: int | None = Field(
        None, description="Another seed of the training alone; default: from the pipeline's seed."
    )
    freeze: Freeze = Field("both", description="Embeddings that may not change.")
    lora: LoraConfig | None = None
    reference: Literal["precomputed", "live"] = "precomputed"
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = Field(None, description="Overrides epochs.")
    batch_size: PositiveInt = 16
    gradient_accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 5e-7
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_length: PositiveInt = 512
    log_every: PositiveInt = 10
    eval_every: PositiveInt = 100
    eval_pairs: PositiveInt = Field(128, description="Pairs of the tune split for the curve.")
    checkpoint_every: PositiveInt = 100
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _method_has_these(self) -> Self:
        if self.method != "dpo" and self.loss_type != "sigmoid":
            raise ValueError(
                f"loss_type {self.loss_type} is a loss of method: dpo, not of method: "
                f"{self.method}; drop one of them"
            )
        smoothed = self.method in {"simpo", "cpo"} or (
            self.method == "dpo" and self.loss_type in SMOOTHED
        )
        if self.label_smoothing and not smoothed:
            loss = self.loss_type if self.method == "dpo" else self.method
            raise ValueError(
                f"label_smoothing {self.label_smoothing} changes nothing in the loss {loss}; "
                f"set it to 0, or choose one of {', '.join(SMOOTHED)}, simpo, cpo"
            )
        if self.loss_type == "robust" and not self.label_smoothing:
            raise ValueError(
                "label_smoothing 0 makes the loss robust that of plain DPO; set the share of "
                "labels that may be swapped, such as 0.1"
            )
        return self


# ---------------------------------------------------------------------------------- measuring


KEPT_PROMPTS = 1024
"""The default of ``activations.keep`` with ``store: moments``."""


class ActivationsConfig(Section):
    """Paired hidden states of base and tuned on identical token ids."""

    sites: Literal["all"] | tuple[str, ...] = Field(
        "all",
        description="all, or names such as resid_post.3, final_norm and (encoder-decoder) encoder.",
    )
    position: Position = "prompt_last"
    template: Literal["none", "chat"] = Field(
        "none", description="none: the transcript as it stands; chat: the tokenizer's template."
    )
    batch_tokens: PositiveInt | None = Field(
        None, description="Tokens a batch; default: by device."
    )
    max_tokens: PositiveInt = Field(
        1024, description="Longer prompts are cut on the left, counted."
    )
    noise_floor_prompts: PositiveInt = Field(
        32, description="Prompts that the base reads again, one at a time, to measure rounding."
    )
    response_tokens: int = Field(
        32, ge=0, description="Response tokens a test prompt for teacher-forced KL; 0: none."
    )
    store: Literal["states", "moments"] = Field(
        "states",
        description="states: every state, on disk; moments: sums alone, for millions of prompts.",
    )
    keep: PositiveInt | None = Field(
        None,
        description="With store: moments alone: prompts of each split whose states are kept all "
        f"the same, for what needs states one by one; default: {KEPT_PROMPTS}.",
    )

    @field_validator("keep")
    @classmethod
    def _keeps_of_moments(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("store") == "states":
            raise ValueError("store: states keeps every state; drop keep, or set store: moments")
        return value


class VectorConfig(Section):
    """v* a site, its size, direction and convergence, and KL recovered at `final_norm`."""

    strengths: tuple[float, ...] = Field(
        tuple(round(-1 + 0.25 * i, 2) for i in range(17)), description="The λ of the KL curve."
    )
    convergence_draws: PositiveInt = Field(20, description="Random split halves a size.")
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @field_validator("strengths")
    @classmethod
    def _sorted(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) < 3 or any(a >= b for a, b in pairwise(value)):
            raise ValueError("needs at least 3 strengths, in rising order")
        return value


class CosineConfig(Section):
    """Cosines of displacements with v*: in-sample, leave-one-out, held-out, and the null."""

    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)
    null_draws: PositiveInt = Field(
        1000,
        description="Sign-flipped refits that make the null, enough for a p-value after Holm over "
        "50 sites; 200 at most with store: moments.",
    )


class SpectrumConfig(Section):
    """Singular spectra of ΔH, H_base and H_tuned."""

    top: PositiveInt = Field(5, description="Singular values that figure 4b shows.")
    power: Literal[1, 2] = Field(2, description="p of the spectral entropy's weights σ^p.")
    confidence: float = Field(0.95, gt=0.5, lt=1)


class TemplateConfig(Section):
    """How much is the chat template, how much the training: base/tuned × raw/templated."""

    prompts: PositiveInt = Field(
        256, description="Test prompts that are measured, and fit prompts that directions rest on."
    )
    sites: Literal["all"] | tuple[str, ...] = Field(
        "all", description="all, or names such as resid_post.3 and final_norm."
    )
    batch_tokens: PositiveInt | None = Field(
        None, description="Tokens a batch; default: by device."
    )
    max_tokens: PositiveInt = Field(
        1024, description="Prompts that are longer in either form are left out, counted."
    )
    noise_floor_prompts: PositiveInt = Field(
        32, description="Prompts that the base reads again, one at a time, to measure rounding."
    )
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)


class GeometryConfig(Section):
    """Figures 1a to 1c on real pairs: preference vectors, gradients of the DPO loss, clouds."""

    pairs: PositiveInt = Field(256, description="Test pairs whose preference vectors are read.")
    gradient_pairs: PositiveInt = Field(48, description="Test pairs whose gradients are taken.")
    inner_site: str = Field(
        "auto", description="The inner block of figure 1b; auto: the middle one."
    )
    max_tokens: PositiveInt = Field(384, description="Longer prompts are cut on the left, counted.")
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)


SteeredPositions = Literal["auto", "all", "prompt", "prompt_last", "generated"]


Baseline = Literal["amplify", "noise"]
"""A simple arm of a sweep beside v*."""


class SweepConfig(Section):
    """Turn the strength λ of v*, generate, and measure; v* is added to, or taken from, a model."""

    site: str = Field(
        "auto", description="Where v* acts; auto: where it recovers most KL on the tune pairs."
    )
    strengths: tuple[float, ...] | Literal["auto"] = Field(
        "auto",
        description="The λ, in units of v*; auto: the live range and one step past collapse.",
    )
    points: int = Field(13, ge=9, description="How many λ an automatic grid has.")
    max_strength: PositiveFloat = Field(16.0, description="The live range is searched no further.")
    positions: SteeredPositions = Field(
        "auto",
        description="Tokens that are steered; auto: of all, prompt_last and generated the one that "
        "recovers most KL on the tune pairs, chosen together with the site.",
    )
    pairs: PositiveInt = Field(96, description="Test pairs of the teacher-forced metrics.")
    response_tokens: PositiveInt = Field(48, description="Tokens of each answer that these read.")
    prompts: PositiveInt = Field(32, description="Test prompts that are answered.")
    range_prompts: PositiveInt = Field(16, description="Tune prompts that find the live range.")
    max_new_tokens: PositiveInt = 64
    max_tokens: PositiveInt = Field(768, description="Longer prompts are cut on the left, counted.")
    temperature: float = Field(0.0, ge=0, lt=math.inf, description="0: greedy.")
    stop: tuple[str, ...] = Field(
        ("\n\nHuman:",), description="A generated text ends before the first of these."
    )
    random_directions: int = Field(
        20, ge=2, description="Norm-matched random directions of the teacher-forced metrics."
    )
    random_generations: int = Field(3, ge=0, description="Those of them that also generate.")
    baselines: tuple[Baseline, ...] = Field(
        (),
        description="Simple arms beside v*, at its site and on its tokens, whose shift is as long: "
        "amplify (the state longer or shorter) and noise (seeded, another direction each token).",
    )
    memory_mb: PositiveInt = Field(1024, description="Memory for cached keys, values and logits.")
    samples: str = Field(
        "auto",
        description="Prompts of the λ explorer, which the report shows with their answers: test, "
        "benign (a shipped list), none, or a file; auto: test in the synthetic world, else benign.",
    )
    sample_prompts: PositiveInt = Field(12, description="Prompts in the λ explorer.")
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @field_validator("site")
    @classmethod
    def _a_site(cls, value: str) -> str:
        return _auto_or_site(value)

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would end every text before it begins")
        return value

    @model_validator(mode="after")
    def _enough_directions(self) -> Self:
        if self.random_generations > self.random_directions:
            raise ValueError(
                f"random_generations {self.random_generations} of random_directions "
                f"{self.random_directions}: expected no more"
            )
        return self

    @field_validator("baselines")
    @classmethod
    def _each_once(cls, value: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)}: expected each baseline once")
        return value

    @field_validator("strengths")
    @classmethod
    def _a_grid(cls, value: tuple[float, ...] | Literal["auto"]) -> tuple[float, ...] | str:
        if value == "auto":
            return value
        if len(value) < 3 or any(a >= b for a, b in pairwise(value)):
            raise ValueError("needs at least 3 strengths, in rising order, or 'auto'")
        if not all(math.isfinite(strength) for strength in value):
            raise ValueError("needs finite numbers")
        if 0.0 not in value:
            raise ValueError("needs the strength 0, the sham arm")
        return value


class InterpolationConfig(SweepConfig):
    """Add λv* to the base (figure 2a)."""


class InversionConfig(SweepConfig):
    """Take λv* from the tuned model (figure 2b)."""


class ToxicityConfig(Section):
    """A text classifier, or the Perspective API (key: PERSPECTIVE_API_KEY in the environment)."""

    classifier: str | None = Field(None, description="Hub id or folder of a text classifier.")
    label: str = Field("toxic", description="The label whose probability is the score.")
    multi_label: bool | None = Field(
        None, description="Labels are independent (sigmoid); default: as the classifier's config."
    )
    perspective: bool = Field(False, description="The API ends with 2026, as Google announced.")
    perspective_url: str = Field(
        "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze",
        description="Another server that speaks the API's protocol.",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.classifier is None) == (not self.perspective):
            raise ValueError("name a classifier, or set perspective: true (one of the two)")
        return self


class JudgeConfig(Section):
    """G-Eval through an OpenAI-compatible server."""

    base_url: str = Field(description="Such as http://localhost:8080/v1.")
    model: str
    criterion: str = "helpfulness: how well the answer meets what the user asked for"
    scale: tuple[int, ...] = Field(
        (1, 2, 3, 4, 5), min_length=2, description="The grades: digits, each one token."
    )
    top_logprobs: int = Field(
        10, ge=1, le=20, description="Alternatives of a token to ask for; many servers cap this."
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable with the key.")
    threads: PositiveInt = Field(4, description="Questions that are under way at once.")
    retries: int = Field(3, ge=0)
    timeout: PositiveFloat = Field(60.0, description="Seconds.")
    refusal: bool = Field(False, description="Ask the judge for refusals too.")
    prefer: bool = Field(
        False, description="Compare each text with the target's own too, shown in both orders."
    )

    @field_validator("scale")
    @classmethod
    def _digits(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in pairwise(value)) or value[0] < 0 or value[-1] > 9:
            raise ValueError("needs rising digits from 0 to 9: more may be more than one token")
        return value


class TruthfulqaConfig(Section):
    """TruthfulQA multiple choice: MC1 and MC2 of the steered model."""

    path: str = Field("truthfulqa/truthful_qa", description="Hub id or the benchmark's CSV file.")
    limit: PositiveInt | None = Field(None, description="Use only the first questions.")


class BehaviourConfig(Section):
    """Metrics of the sweeps that need something from outside, and the β of the reward."""

    beta: PositiveFloat | None = Field(
        None, description="β of the implicit reward; default: that of `dpo`, or 0.1 without one."
    )
    reward_model: str | None = Field(
        None, description="Hub id or folder of a sequence-classification reward model."
    )
    toxicity: ToxicityConfig | None = None
    judge: JudgeConfig | None = None
    truthfulqa: TruthfulqaConfig | None = None


class ComparisonConfig(Section):
    """The variants of a study side by side: one table, cosines of their v*s, shared subspaces."""

    sites: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="Where subspaces are compared; auto: each variant's chosen site, and "
        "final_norm. Cosines of v*s are taken at every site that two variants have in common.",
    )
    subspace: PositiveInt = Field(
        5, description="Right singular vectors of ΔH that span a variant's subspace, at most."
    )
    draws: PositiveInt = Field(100, description="Random halves of the conversations.")
    null_draws: PositiveInt = Field(200, description="Random subspaces that make the null.")
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @field_validator("sites")
    @classmethod
    def _some_site(cls, value: tuple[str, ...] | Literal["auto"]) -> tuple[str, ...] | str:
        if not value:
            raise ValueError("name at least one site, or auto")
        for site in () if isinstance(value, str) else value:
            if not re.fullmatch(SITE, site):
                raise ValueError(
                    f"{site!r} is no site: expected encoder, final_norm or resid_post.K"
                )
        return value


SitesOfTransfer = Literal["auto", "all"] | tuple[str, ...]
TransferMap = Literal["ridge", "procrustes", "cca"]


class TransferConfig(Section):
    """Carry the vector of another model, the sender, to this pipeline's pair, the receiver."""

    base: str = Field(description="Hub id or folder of the sender's base model.")
    tuned: str | None = Field(
        None, description="Hub id, folder or adapter of its tuned model: v* is averaged from both."
    )
    vectors: str | None = Field(
        None, description="Or a file of its steering vectors, one a site (safetensors)."
    )
    base_revision: str | None = None
    tuned_revision: str | None = None
    tokenizer: str | None = Field(None, description="Hub id or folder; default: the sender's own.")
    text: Source | None = Field(
        None,
        description="Neutral text that the map is learned on; default: the train split's "
        "transcripts, else those of the fit split.",
    )
    text_tokens: PositiveInt = Field(20_000, description="Tokens of it that the receiver reads.")
    text_length: PositiveInt = Field(
        256, description="Tokens of one text; longer ones are cut on the right."
    )
    maps: tuple[TransferMap, ...] = Field(
        get_args(TransferMap), min_length=1, description="Kinds of map to choose from."
    )
    sender_sites: SitesOfTransfer = Field(
        "auto", description="Where the sender's vector is taken; auto: four depths."
    )
    receiver_sites: SitesOfTransfer = Field(
        "auto", description="Where it may act in the receiver; auto: four depths."
    )
    ridge: tuple[PositiveFloat, ...] = Field(
        (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        min_length=1,
        description="Penalties to choose from, in units of the states' mean variance.",
    )
    components: tuple[PositiveInt, ...] | Literal["auto"] = Field(
        "auto",
        description="Widths of procrustes and cca to choose from; auto: the narrower model's "
        "width, its half, quarter and eighth.",
    )
    positions: SteeredPositions = Field(
        "auto",
        description="Tokens that are steered; auto: all, prompt_last or generated, chosen together "
        "with the site pair and the map.",
    )
    strengths: tuple[PositiveFloat, ...] = Field(
        (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0),
        description="The λ to choose from, for the native vector, the carried one and each null "
        "alike; with 1.",
    )
    tune_pairs: PositiveInt = Field(32, description="Tune pairs on which the λ are chosen.")
    choice_pairs: PositiveInt = Field(
        16,
        description="The first of them, on which site pair, map and steered tokens are chosen, of "
        "the carried vector and of each draw of a null alike.",
    )
    pairs: PositiveInt = Field(64, description="Test pairs on which effects are measured.")
    response_tokens: PositiveInt = Field(48, description="Tokens of each answer that are read.")
    max_tokens: PositiveInt = Field(768, description="Longer prompts are cut on the left, counted.")
    nulls: int = Field(20, ge=20, description="Random directions of each of the two kinds.")
    shuffles: PositiveInt = Field(5, description="Maps learned on shuffled positions.")
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @field_validator("sender_sites", "receiver_sites")
    @classmethod
    def _are_sites(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            return value
        if not value:
            raise ValueError("needs at least one site, or 'auto', or 'all'")
        for site in value:
            if not re.fullmatch(r"final_norm|resid_post\.(0|[1-9]\d*)", site):
                raise ValueError(f"{site!r} is no site: expected final_norm or resid_post.K")
        return value

    @field_validator("strengths")
    @classmethod
    def _with_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in value or any(a >= b for a, b in pairwise(value)):
            raise ValueError("needs rising strengths, 1 among them")
        return value

    @model_validator(mode="after")
    def _one_vector(self) -> Self:
        if (self.tuned is None) == (self.vectors is None):
            raise ValueError("name the sender's tuned model or a file of its vectors, one of both")
        return self


class LearnedConfig(Section):
    """Learn vectors under the DPO loss, the base frozen, and hold them against v*."""

    sites: tuple[str, ...] = Field(
        ("auto",),
        min_length=1,
        description="Where a vector is learned, at each site by itself; auto: where v* recovers "
        "most KL on the tune pairs.",
    )
    positions: SteeredPositions = Field(
        "auto",
        description="Tokens that are steered; auto: of all, prompt_last and generated the one that "
        "suits v* best at the site, on the tune pairs.",
    )
    starts: tuple[Literal["zero", "vector"], ...] = Field(
        ("zero", "vector"), min_length=1, description="What learning begins with; vector: v*."
    )
    max_norm: tuple[Literal["none", "vector"], ...] = Field(
        ("none", "vector"),
        min_length=1,
        description="The largest norm of a learned vector; vector: that of v*. Each start is "
        "learned with each bound.",
    )
    split: Literal["fit", "train"] = Field(
        "fit", description="Pairs that are learned from: those that v* is fitted on, or DPO's."
    )
    steps: PositiveInt = 100
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = Field(
        0.1,
        description="How far a step can move a vector, as a share of the norm of the base's "
        "states; falls to 0 as half a cosine.",
    )
    eval_every: PositiveInt = Field(
        10, description="Steps between two readings of the loss on tune pairs."
    )
    tune_pairs: PositiveInt = Field(
        64, description="Tune pairs on which steps, strengths of v* and the site are chosen."
    )
    pairs: PositiveInt = Field(128, description="Test pairs on which all are measured.")
    max_length: PositiveInt = Field(
        512, description="Tokens of a text: longer prompts are left out, answers lose their end."
    )
    strengths: tuple[PositiveFloat, ...] = Field(
        (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
        min_length=2,
        description="The λ of v* to choose from.",
    )
    random_directions: int = Field(
        20, ge=20, description="Random directions, of the norm of v* and of the learned vector."
    )
    random_pairs: PositiveInt = Field(32, description="Test pairs on which these are measured.")
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @field_validator("sites")
    @classmethod
    def _are_sites(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_auto_or_site, value))

    @field_validator("strengths")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in pairwise(value)):
            raise ValueError("needs strengths in rising order")
        return value


class ControlConfig(Section):
    """Dial planted axes of the synthetic world by contrast vectors in the base model."""

    axes: tuple[str, ...] = Field(
        ("enthusiastic", "numbered"),
        min_length=1,
        description="The axes, each with its own vector; the first two are dialled at once too.",
    )
    pairs: PositiveInt = Field(200, description="Contrast pairs an axis, written on fit prompts.")
    read: tuple[Literal["last", "mean"], ...] = Field(
        ("last", "mean"),
        min_length=1,
        description="Where states of the pairs are read, to choose from: at the last token, from "
        "which the pole is decided, or the mean over all tokens.",
    )
    sites: Literal["auto"] | tuple[str, ...] = Field(
        "auto", description="Where vectors may act; auto: after any block."
    )
    positions: SteeredPositions = Field(
        "auto", description="Tokens that are steered; auto: all or generated, chosen with the site."
    )
    strengths: tuple[PositiveFloat, ...] = Field(
        (0.125, 0.25, 0.5, 0.75, 1.0),
        min_length=1,
        description="The λ to choose from, in units of the mean norm of the states that were read.",
    )
    most_degenerate: float = Field(
        0.1, ge=0, le=1, description="Share of degenerate tune answers that a choice may have."
    )
    tune_prompts: PositiveInt = Field(64, description="Tune prompts on which choices are made.")
    prompts: PositiveInt = Field(128, description="Test prompts that are answered.")
    max_new_tokens: PositiveInt = 96
    max_tokens: PositiveInt = Field(768, description="Longer prompts are cut on the left, counted.")
    temperature: float = Field(1.0, ge=0, lt=math.inf, description="0: greedy.")
    stop: tuple[str, ...] = Field(
        ("\n\nHuman:",), description="A generated text ends before the first of these."
    )
    nulls: int = Field(20, ge=20, description="Norm-matched random directions an axis.")
    memory_mb: PositiveInt = Field(1024, description="Memory for cached keys, values and logits.")
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @field_validator("axes", "read")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name in value if value.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} stands there twice; name each once")
        return value

    @field_validator("sites")
    @classmethod
    def _blocks(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("name at least one site, or auto")
        for site in () if isinstance(value, str) else value:
            if not re.fullmatch(r"resid_post\.(0|[1-9]\d*)", site):
                raise ValueError(f"{site!r} is no site after a block: expected resid_post.K")
        return value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would end every text before it begins")
        return value


class EditedConfig(Section):
    """Which pairs are read, when states are changed token by token."""

    pairs: PositiveInt = Field(64, description="Test pairs that are measured.")
    tune_pairs: PositiveInt = Field(32, description="Tune pairs on which choices are made.")
    fit_pairs: PositiveInt = Field(64, description="Fit pairs to which maps are fitted.")
    response_tokens: PositiveInt = Field(32, description="Tokens of each answer that are read.")
    max_tokens: PositiveInt = Field(
        384, description="Pairs whose prompt alone fills it are left out, counted."
    )
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)


EditedTokens = Literal["prompt_last", "all", "generated"]


class ProfileConfig(EditedConfig):
    """Causal layer profile: patch the tuned state in, add v*, add random directions, by site."""

    sites: Literal["all"] | Sites = Field(
        "all", description="all, or names such as resid_post.3 and final_norm."
    )
    tokens: tuple[EditedTokens, ...] = Field(
        ("prompt_last", "all"),
        min_length=1,
        description="Tokens whose states are changed: each gives a profile of its own.",
    )
    random_directions: int = Field(20, ge=20, description="Norm-matched random directions.")
    random_pairs: PositiveInt = Field(16, description="Test pairs on which these are measured.")


class RankConfig(EditedConfig):
    """KL recovered against the number k of directions: oracle, deployable and random."""

    sites: Places = Field(
        ("auto",), description="auto: where v* recovers most KL on tune; or names of sites."
    )
    tokens: EditedTokens | Literal["auto"] = Field(
        "auto", description="Tokens whose states are changed; auto: as the site was chosen for."
    )
    most: PositiveInt = Field(32, description="The largest k, at most the width.")
    random_subspaces: int = Field(20, ge=20)
    random_pairs: PositiveInt = Field(16, description="Test pairs on which these are measured.")


class MapsConfig(EditedConfig):
    """Nested maps from base to tuned states: scale, translation, both, reduced-rank, ridge."""

    sites: Literal["all"] | Sites = Field(
        "all", description="Sites whose R² is measured on the run's own states."
    )
    kl_sites: Places = Field(
        ("auto", "final_norm"), description="Sites at which each map's KL is measured too."
    )
    tokens: EditedTokens | Literal["auto"] = "auto"
    ranks: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 8, 16), description="Ranks of the low-rank map; the best is chosen on tune."
    )
    ridge: tuple[PositiveFloat, ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        description="Ridge penalties in units of the mean variance of a base coordinate; the best "
        "is chosen on tune.",
    )


class StrengthConfig(EditedConfig):
    """The best strength of v*: least squares, least KL, each prompt's own; and their regret."""

    sites: Places = ("auto", "final_norm")
    tokens: EditedTokens | Literal["auto"] = "auto"
    strengths: tuple[float, ...] = Field(
        tuple(round(0.125 * i, 3) for i in range(25)), description="The grid of λ."
    )

    @field_validator("strengths")
    @classmethod
    def _sorted(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) < 3 or any(a >= b for a, b in pairwise(value)) or 1.0 not in value:
            raise ValueError("needs at least 3 strengths, in rising order, and 1 among them")
        return value


class GroupsConfig(EditedConfig):
    """One vector a group of prompts: how they lie to each other, and what removing one leaves."""

    by: str = Field("axes", description="The tag of a pair that names its group; or `source`.")
    pairs: PositiveInt = Field(64, description="Test pairs of each group that are measured.")
    sites: Places = ("auto", "final_norm")
    tokens: EditedTokens | Literal["auto"] = "auto"
    random_directions: PositiveInt = Field(
        20, description="Directions that move states as far as the removal does: the null."
    )


class ReversalConfig(Section):
    """Undo the tuning: by inversion, and by training on the rejected answers."""

    ways: tuple[Literal["inversion", "dpo_swapped", "sft_rejected"], ...] = (
        "inversion", "dpo_swapped", "sft_rejected",
    )  # fmt: skip
    steps: PositiveInt | None = Field(None, description="Default: as many as dpo took.")
    learning_rate: PositiveFloat | None = Field(None, description="Default: that of dpo.")
    pairs: PositiveInt = 96
    response_tokens: PositiveInt = 48
    bootstrap: PositiveInt = 1000
    confidence: float = Field(0.95, gt=0.5, lt=1)


class ClaimsConfig(Section):
    """Grade five claims by rule, and check the measurement itself on planted truth."""

    low_rank_share: float = Field(
        0.05, gt=0, lt=1, description="Low-dimensional: k₉₀ is at most this share of the width."
    )
    suffices: float = Field(
        0.8, gt=0, le=1,
        description="One constant vector suffices: it recovers at least this share of the KL over "
        "whole answers.",
    )  # fmt: skip
    reversed_share: float = Field(
        0.8, gt=0, le=1, description="Reversible: inversion recovers at least this share of KL."
    )  # fmt: skip
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Level of tests, after Holm over sites.")
    bootstrap: PositiveInt = 2000
    confidence: float = Field(0.95, gt=0.5, lt=1)


class ReportConfig(Section):
    """The figures and the one-file report."""

    title: str | None = None


NULLS: Mapping[str, Mapping[str, Any]] = {
    "coin_flip": {"dpo.labels": "coin_flip"},
    "swapped": {"dpo.labels": "swapped"},
    "sft": {"dpo.method": "dpo", "dpo.loss_type": "sft", "dpo.label_smoothing": 0.0},
    "second_seed": {"dpo.seed": 1},
    "lora": {"dpo.lora": {"rank": 4}},
    "self": {
        "dpo": None, "models.tuned": None, "models.tuned_is_base": True, "geometry": None,
        "template": None, "profile": None, "rank": None, "maps": None, "strength": None,
        "interpolation": None, "inversion": None,
    },
}  # fmt: skip
"""What the known nulls change: labels, the objective, the order of training, its rank, or all."""

NOT_OF_NULLS = ("learned", "transfer", "control", "groups", "reversal", "claims")
"""Stages that a null does not run: they ask about the pair itself."""


class PipelineConfig(Section):
    """A whole pipeline."""

    name: str = Field(pattern=f"^{NAME}$")
    description: str = ""
    seed: int = 0
    data: DataConfig
    models: ModelsConfig = ModelsConfig()
    base: BaseConfig | None = None
    dpo: DpoConfig | None = None
    activations: ActivationsConfig | None = None
    vector: VectorConfig | None = None
    cosine: CosineConfig | None = None
    spectrum: SpectrumConfig | None = None
    template: TemplateConfig | None = None
    geometry: GeometryConfig | None = None
    learned: LearnedConfig | None = None
    profile: ProfileConfig | None = None
    rank: RankConfig | None = None
    maps: MapsConfig | None = None
    strength: StrengthConfig | None = None
    interpolation: InterpolationConfig | None = None
    inversion: InversionConfig | None = None
    transfer: TransferConfig | None = None
    control: ControlConfig | None = None
    groups: GroupsConfig | None = None
    reversal: ReversalConfig | None = None
    claims: ClaimsConfig | None = None
    behaviour: BehaviourConfig = BehaviourConfig()
    report: ReportConfig | None = None
    comparison: ComparisonConfig = ComparisonConfig()
    nulls: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Null pairs, each a run of its own that shares everything with this one but "
        "what it changes: name → {key.path: value}. coin_flip, swapped, sft, second_seed, lora and "
        "self bring their changes with them; a list of these names will do.",
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Makes the pipeline a study: name of a variant → what it changes "
        "({key.path: value}). Each is a run of its own, and they are compared.",
    )

    @field_validator("nulls", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {str(name): {} for name in value}
        if value is None:  # `key=null` takes them away
            return {}
        if isinstance(value, dict):
            return {name: {} if changes is None else changes for name, changes in value.items()}
        return value

    @field_validator("nulls", "variants")
    @classmethod
    def _names(
        cls, value: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        kind = str(info.field_name).removesuffix("s")
        for name, changes in value.items():
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"{name!r} is no name of a {kind}: expected letters, digits, '.', '_' and '-'"
                )
            if kind == "null" and not changes and name not in NULLS:
                raise ValueError(
                    f"{name!r} changes nothing and is no known null{did_you_mean(name, NULLS)} "
                    f"(known: {', '.join(NULLS)}); say what it changes"
                )
        return value

    @model_validator(mode="after")
    def _one_of_each_model(self) -> Self:
        if self.variants:
            return self  # each variant is checked as a whole
        if self.base is not None and self.models.base is not None:
            raise ValueError("models.base and base are both given: name a model or train one")
        if self.dpo is not None and self.models.tuned is not None:
            raise ValueError("models.tuned and dpo are both given: name a model or train one")
        itself = self.models.tuned_is_base
        if itself and (self.dpo is not None or self.models.tuned is not None):
            raise ValueError(
                "models.tuned_is_base goes with neither models.tuned nor dpo: the base is the tuned"
            )
        has_base = self.base is not None or self.models.base is not None
        has_tuned = itself or self.dpo is not None or self.models.tuned is not None
        for key in ("device_map", "quantization"):
            given = getattr(self.models, key)
            if self.dpo is not None and given is not None:
                raise ValueError(
                    f"models.{key} {given} and dpo are both given, and training holds the whole "
                    f"model, as it is, on one device: drop models.{key}, or train elsewhere and "
                    "give models.tuned"
                )
        if self.dpo is not None and not has_base:
            raise ValueError("dpo needs a base: give models.base or a base section")
        for stage, need in (("activations", "need"), ("template", "needs")):
            if getattr(self, stage) is not None and not (has_base and has_tuned):
                raise ValueError(
                    f"{stage} {need} a pair: give models.base or base, and models.tuned or dpo"
                )
        if self.control is not None:
            if not has_base:
                raise ValueError("control needs a model: give models.base or base")
            if not any(isinstance(source, SyntheticSource) for source in self.data.sources):
                raise ValueError(
                    "control needs a source of format synthetic: its oracles are of that world"
                )
        return self

    @property
    def reward_beta(self) -> float:
        """β of the implicit reward: as given, else that of ``dpo``, else the default of ``dpo``."""
        return self.behaviour.beta or (self.dpo or DpoConfig()).beta

    def seed_for(self, *names: str) -> int:
        """A seed for one purpose, independent of the seeds of all other purposes."""
        digest = hashlib.sha256("/".join((str(self.seed), *names)).encode()).digest()
        return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


# ---------------------------------------------------------------------------------- reading


def read_pipeline(
    text: str, overrides: Sequence[str] = (), *, origin: str = "pipeline"
) -> PipelineConfig:
    """Parse a pipeline's YAML with dotted overrides.

    Args:
        text: the YAML.
        overrides: ``key.path=value`` items; the value is read as YAML, ``key=null`` removes it.
        origin: the name that error messages give to the YAML.

    Raises:
        ConfigError: with every mistake at once, each with its dotted path.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f" line {where.line + 1}" if where is not None else ""
        raise ConfigError(
            f"{origin}{at}: not YAML ({getattr(error, 'problem', None) or error})"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: expected a mapping of sections, got {type(raw).__name__}")
    for item in overrides:
        override(raw, item)
    # A section written without content (`vector:`) asks for the stage with its defaults.
    for name in STAGE_SECTIONS & raw.keys():
        if raw[name] is None and not _was_removed(name, overrides):
            raw[name] = {}
    config, mistakes = _validated(raw)
    if config is not None:
        mistakes = [
            f"variants.{name}: {mistake.removeprefix('pipeline: ')}"
            for name in config.variants
            for mistake in _variant(config, name)[1]
        ]
        whole = [config] if not config.variants else list(variants_of(config).values())
        mistakes += [
            f"nulls.{name}: {mistake.removeprefix('pipeline: ')}"
            for one in whole
            for name in one.nulls
            for mistake in _null(one, name)[1]
        ]
        mistakes = list(dict.fromkeys(mistakes))
    if config is None or mistakes:
        head = f"{origin}: " if len(mistakes) == 1 else f"{origin}: {len(mistakes)} mistakes\n  "
        raise ConfigError(head + "\n  ".join(mistakes))
    return config


def _validated(raw: Any) -> tuple[PipelineConfig | None, list[str]]:
    """A pipeline, or every mistake in it."""
    try:
        return PipelineConfig.model_validate(raw), []
    except ValidationError as error:
        found = error.errors()
        # A list whose items are all wrong is also called too short: tell only the cause.
        return None, [
            _describe(dict(mistake))
            for mistake in found
            if not (mistake["type"] == "too_short" and _has_below(mistake["loc"], found))
        ]


def variants_of(config: PipelineConfig) -> dict[str, PipelineConfig]:
    """The pipeline of each variant of a study that :func:`read_pipeline` has read, by its name."""
    found = {name: _variant(config, name)[0] for name in config.variants}
    return {name: variant for name, variant in found.items() if variant is not None}


def _variant(config: PipelineConfig, name: str) -> tuple[PipelineConfig | None, list[str]]:
    """A variant's pipeline, or every mistake in it."""
    raw = resolved(config) | {"name": f"{config.name}.{name}", "variants": {}}
    own = {"name", "variants", "comparison"}
    return _changed(
        raw, config.variants[name], own, "a variant can't change it; it is the study's own"
    )


def nulls_of(config: PipelineConfig) -> dict[str, PipelineConfig]:
    """The pipeline of each null pair of a pipeline without variants, by its name."""
    found = {name: _null(config, name)[0] for name in config.nulls}
    return {name: null for name, null in found.items() if null is not None}


def _null(config: PipelineConfig, name: str) -> tuple[PipelineConfig | None, list[str]]:
    """A null's pipeline, or every mistake in it."""
    raw = resolved(config) | {"name": f"{config.name}.{name}", "nulls": {}, "variants": {}}
    raw |= dict.fromkeys(NOT_OF_NULLS)
    changes = {**NULLS.get(name, {}), **config.nulls[name]}
    trained = [path for path in changes if path.startswith("dpo.")]
    if trained and config.dpo is None:
        return None, [f"{trained[0]}: the pipeline trains no tuned model (no dpo section)"]
    own = {"name", "nulls", "variants", "comparison", "data", "seed"}
    why = "a null can't change it; it shares it with the pair"
    before = dict(raw)
    null, mistakes = _changed(json.loads(json.dumps(raw)), changes, own, why)
    if null is None:
        return None, mistakes
    after, left_out = resolved(null), {path for path, value in changes.items() if value is None}
    if all(after[key] == before[key] for key in after if key not in left_out):
        told = ", ".join(path for path in changes if path not in left_out) or "nothing"
        return None, [f"it changes nothing: the pair has the same {told}; leave this null out"]
    defining = {"coin_flip": "dpo.labels", "swapped": "dpo.labels", "sft": "dpo.loss_type"}
    path = defining.get(name)
    if path is not None and null.dpo is not None:
        found = getattr(null.dpo, path.removeprefix("dpo."))
        if found != name:
            return None, [
                f"{path} is {found}, expected {name}, which is what this null is; call it "
                "something else"
            ]
    return null, []


def _changed(
    raw: dict[str, Any], changes: Mapping[str, Any], own: set[str], why: str
) -> tuple[PipelineConfig | None, list[str]]:
    """A pipeline with some values at dotted paths, or every mistake in it."""
    mistaken = [path for path in changes if path.split(".")[0] in own]
    if mistaken:
        return None, [f"{path}: {why}" for path in mistaken]
    try:
        for path, value in changes.items():
            revision = f"{path}_revision"
            if re.fullmatch(r"(models|transfer)\.(base|tuned)", path) and revision not in changes:
                _put(raw, revision, None, revision)  # that of the pipeline's own model
            _put(raw, path, value, f"{path}={value}")
    except ConfigError as error:
        return None, [str(error)]
    return _validated(raw)


def _has_below(location: Sequence[object], mistakes: Sequence[Any]) -> bool:
    """Whether another mistake lies inside the value at a location."""
    depth = len(location)
    return any(len(m["loc"]) > depth and m["loc"][:depth] == location for m in mistakes)


STAGE_SECTIONS = frozenset(
    {
        "base", "dpo", "activations", "vector", "cosine", "spectrum", "template", "geometry",
        "learned", "profile", "rank", "maps", "strength", "interpolation", "inversion", "transfer",
        "control", "groups", "reversal", "claims", "report",
    }
)  # fmt: skip


def _was_removed(name: str, overrides: Sequence[str]) -> bool:
    return any(item.partition("=")[0] == name for item in overrides)


def override(raw: dict[str, Any], item: str) -> None:
    """Change a pipeline that is not validated yet by one ``key.path=value``.

    Raises:
        ConfigError: no such item, or a path through what has no keys.
    """
    path, sign, value = item.partition("=")
    if not sign or not path:
        raise ConfigError(f"override {item!r}: expected key.path=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {item!r}: the value is not YAML") from None
    _put(raw, path, parsed, item)


def _put(raw: dict[str, Any], path: str, parsed: Any, item: str) -> None:
    """Set the value at a dotted path; ``item`` names the change in messages."""
    node: Any = raw
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(
                    f"override {item!r}: {'.'.join(keys[:depth])} is a list of {len(node)}, "
                    f"and {key!r} is not an index of it"
                )
            if last:
                node[int(key)] = parsed
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = parsed
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            raise ConfigError(
                f"override {item!r}: {'.'.join(keys[:depth])} is {node!r}, which has no keys"
            )


def _describe(mistake: dict[str, Any]) -> str:
    location = [
        part for index, part in enumerate(mistake["loc"]) if not _is_tag(mistake["loc"], index)
    ]
    path = ".".join(str(part) for part in location) or "pipeline"
    kind, message = str(mistake["type"]), str(mistake["msg"])
    message = message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        key = str(mistake["loc"][-1])
        return f"{path}: unknown key{did_you_mean(key, _known_keys(mistake['loc']))}"
    if kind == "missing":
        return f"{path}: required, but not given"
    message = message[0].lower() + message[1:] if message else message
    given = mistake.get("input")
    shown = "" if isinstance(given, dict | list | BaseModel) else f" (got {given!r})"
    return f"{path}: {message}{shown}"


_TAGS: dict[str, type[BaseModel]] = {
    "hh-rlhf": HHSource,
    "oasst": OasstSource,
    "preference": PreferenceSource,
    "prompts": PromptSource,
    "synthetic": SyntheticSource,
}


def _is_tag(location: Sequence[object], index: int) -> bool:
    """Whether a part of an error's location names a branch of a union rather than a key."""
    part = location[index]
    if index == 0 or not isinstance(part, str):
        return False
    if part in _TAGS:
        return isinstance(location[index - 1], int) or location[index - 1] == "text"
    return part.startswith(("tuple[", "literal["))


def _known_keys(location: Sequence[object]) -> list[str]:
    """The keys of the section that holds the last part of a pydantic error location."""
    model: type[BaseModel] = PipelineConfig
    for part in location[:-1]:
        if part in _TAGS:
            model = _TAGS[str(part)]
        elif isinstance(part, str) and part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _section_in(inner)
        if found is not None:
            return found
    return None


# ---------------------------------------------------------------------------------- shipped


def shipped_folder() -> Path:
    """The folder of shipped pipelines: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "pipelines"
    return inside if inside.is_dir() else package.parent / "pipelines"


def shipped_pipelines() -> dict[str, Path]:
    """Name → file of each shipped pipeline, sorted by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def find_pipeline(pipeline: str) -> Path:
    """Turn a path or a shipped name into the pipeline's file.

    Raises:
        ConfigError: there is neither such a file nor such a shipped pipeline.
    """
    path = Path(pipeline)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise ConfigError(
                f"{pipeline}: no such file; `dsteer pipelines` lists the shipped ones"
            )
        return path
    shipped = shipped_pipelines()
    if pipeline not in shipped:
        raise ConfigError(
            f"{pipeline!r} is neither a file nor a shipped pipeline"
            f"{did_you_mean(pipeline, shipped)}"
        )
    return shipped[pipeline]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a pipeline, for editors."""
    schema = PipelineConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "dsteer pipeline"
    return schema


def resolved(config: BaseModel) -> dict[str, Any]:
    """A config with every default filled in, as plain JSON values."""
    return cast(dict[str, Any], json.loads(config.model_dump_json()))


def as_yaml(config: PipelineConfig) -> str:
    """A pipeline's YAML, every default filled in; it reads back as the same pipeline."""
    values = {
        key: value
        for key, value in resolved(config).items()
        if not (key in STAGE_SECTIONS and value is None)  # written, it would ask for its defaults
    }
    texts = (values.get("base") or {}).get("texts")
    for source in (*values["data"]["sources"], *([texts] if texts else [])):
        if source.get("switch") is not None:
            del source["axes"]  # their default; the two exclude each other
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def select(config: PipelineConfig, keys: Sequence[str]) -> Mapping[str, Any]:
    """The resolved values at some dotted keys of a pipeline (part of a stage's fingerprint)."""
    values = resolved(config)
    chosen: dict[str, Any] = {}
    for key in keys:
        node: Any = values
        for part in key.split("."):
            node = node[part] if node is not None else None
        chosen[key] = node
    return chosen
