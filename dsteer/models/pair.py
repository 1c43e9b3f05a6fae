"""A base model and a tuned one that share their shape and their token ids."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from dsteer.config import DType, ModelsConfig
from dsteer.data.tokens import Tokenizer
from dsteer.errors import ModelError
from dsteer.models.anatomy import max_positions, model_name, text_config
from dsteer.models.load import (
    Model,
    ModelConfig,
    is_adapter,
    load_config,
    load_model,
    load_tokenizer,
    refuse_overflow,
    resolve_device,
    tokenizer_notes,
)

Which = Literal["base", "tuned"]

ROOM = 2.0
"""A model stays loaded while the other one is read if so many times its size is still free."""

VOCABULARY_SLACK = 0.05
"""Sizes of two vocabularies may differ by this share: added tokens and padding do that."""


class ModelPair:
    """A base model and a tuned one. Made by :meth:`load`; weights are loaded on first use.

    Attributes:
        width: d of both models.
        n_blocks: L of both models.
        vocabulary: ids below it exist in both models.
        max_positions: the longest sequence that both were made for; None if they have no limit.
        notes: what a person should know of this pair, as sentences.
    """

    def __init__(
        self,
        sources: dict[Which, str | nn.Module],
        revisions: dict[Which, str | None],
        tokenizer: Tokenizer | str | None,
        dtype: DType,
        device: str,
        trust_remote_code: bool,
    ) -> None:
        self._sources = sources
        self._revisions = revisions
        self._dtype = dtype
        self._device = device
        self._trust = trust_remote_code
        self._models: dict[Which, Model] = {}
        self._tokenizer_source = tokenizer
        self._tokenizer: Tokenizer | None = None
        self.notes: list[str] = []
        for which, source in sources.items():
            if isinstance(source, nn.Module):
                self._models[which] = source
        configs = {which: self._config(which) for which in sources}
        for which, config in configs.items():
            refuse_overflow(config, self._dtype_of(which), self.name(which))
        self._compare(configs["base"], configs["tuned"])
        self._refuse_shared_adapter()

    @classmethod
    def load(
        cls,
        base: str | Path | Model,
        tuned: str | Path | Model,
        *,
        tokenizer: Tokenizer | str | Path | None = None,
        dtype: DType = "float32",
        device: str = "auto",
        base_revision: str | None = None,
        tuned_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> ModelPair:
        """Name a pair. Configs are read and compared now, weights are loaded on first use.

        Args:
            base: hub id, folder or loaded model.
            tuned: likewise, or an adapter folder: it is put, unmerged, on its own load of the base.
            tokenizer: object, hub id or folder; default: the base's, else the tuned model's.
            dtype: of the weights; a loaded model keeps its own.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; a loaded model stays put.
            base_revision: hub commit, tag or branch.
            tuned_revision: likewise.
            trust_remote_code: run code that a model's repository holds.

        Raises:
            ModelError: a model that is not there, or two whose depth, width or vocabulary differ.
        """
        resolve_device(device)
        return cls(
            {"base": _source(base), "tuned": _source(tuned)},
            {"base": base_revision, "tuned": tuned_revision},
            str(tokenizer) if isinstance(tokenizer, Path) else tokenizer,
            dtype,
            device,
            trust_remote_code,
        )

    @classmethod
    def configured(cls, models: ModelsConfig, base: str, tuned: str) -> ModelPair:
        """Name the pair of a pipeline: these two paths, loaded as its ``models`` section says.

        Raises:
            ModelError: as :meth:`load`.
        """
        return cls.load(
            base,
            tuned,
            tokenizer=models.tokenizer,
            dtype=models.dtype,
            device=models.device,
            base_revision=models.base_revision,
            tuned_revision=models.tuned_revision,
            trust_remote_code=models.trust_remote_code,
        )

    @property
    def base(self) -> Model:
        """The base model; loaded now if it wasn't, and kept until :meth:`release`."""
        return self._load("base")

    @property
    def tuned(self) -> Model:
        """The tuned model; loaded now if it wasn't, and kept until :meth:`release`."""
        return self._load("tuned")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of both models.

        Raises:
            ModelError: none was given, and neither model's folder holds one.
        """
        if self._tokenizer is None:
            self._tokenizer = self._find_tokenizer()
            self.notes += tokenizer_notes(self._tokenizer)
        return self._tokenizer

    def name(self, which: Which) -> str:
        """Hub id, folder or class of a model."""
        source = self._sources[which]
        return source if isinstance(source, str) else model_name(source)

    @contextlib.contextmanager
    def using(self, which: Which) -> Iterator[Model]:
        """Yield a model for a while.

        One that had to be loaded for it is dropped afterwards, so that one model is in memory at a
        time, unless at least twice its size is then still free: both fit, and it stays.
        """
        was_loaded = which in self._models
        model = self._load(which)
        try:
            yield model
        finally:
            if not was_loaded and _free_memory(model) < ROOM * _size(model):
                del model
                self.release(which)

    def release(self, which: Which | None = None) -> None:
        """Drop loaded weights (of both models by default); models given as objects stay."""
        for name in ("base", "tuned") if which is None else (which,):
            if isinstance(self._sources[name], str):
                self._models.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, which: Which) -> Model:
        if which not in self._models:
            source = self._sources[which]
            assert isinstance(source, str)
            revision = self._revisions[which]
            adapter_base = None
            if which == "tuned" and is_adapter(source, revision=revision):
                adapter_base = self._own_base()
            self._models[which] = load_model(
                source,
                revision=revision,
                dtype=self._dtype,
                device=self._device,
                trust_remote_code=self._trust,
                adapter_base=adapter_base,
            )
        return self._models[which]

    def _own_base(self) -> Model:
        """A base that an adapter may change in place."""
        source = self._sources["base"]
        if isinstance(source, nn.Module):
            return copy.deepcopy(source)
        return load_model(
            source,
            revision=self._revisions["base"],
            dtype=self._dtype,
            device=self._device,
            trust_remote_code=self._trust,
        )

    def _config(self, which: Which) -> ModelConfig:
        source = self._sources[which]
        if isinstance(source, nn.Module):
            if not hasattr(source, "config"):
                raise ModelError(
                    f"{type(source).__name__} is no transformers language model: it has no "
                    "config; expected what AutoModelForCausalLM loads"
                )
            return source.config
        revision = self._revisions[which]
        if which == "tuned" and is_adapter(source, revision=revision):
            return self._config("base")
        return load_config(source, revision=revision, trust_remote_code=self._trust)

    def _dtype_of(self, which: Which) -> object:
        model = self._models.get(which)
        return self._dtype if model is None else next(model.parameters()).dtype

    def _compare(self, base: ModelConfig, tuned: ModelConfig) -> None:
        shapes = []
        for config in (base, tuned):
            text = text_config(config)
            shapes.append((text.num_hidden_layers, text.hidden_size, text.vocab_size))
        for index, what in enumerate(("blocks", "width")):
            if shapes[0][index] != shapes[1][index]:
                raise ModelError(
                    f"base {self.name('base')} has {what} {shapes[0][index]}, tuned "
                    f"{self.name('tuned')} has {what} {shapes[1][index]}; expected a model and its "
                    "own fine-tune"
                )
        small, large = sorted((shapes[0][2], shapes[1][2]))
        if large - small > VOCABULARY_SLACK * large:
            raise ModelError(
                f"base {self.name('base')} has {shapes[0][2]} tokens, tuned {self.name('tuned')} "
                f"has {shapes[1][2]}; expected one vocabulary: the same ids must be the same text"
            )
        if large != small:
            self.notes.append(
                f"The vocabularies differ ({shapes[0][2]} and {shapes[1][2]} tokens); only ids "
                f"below {small} are read, and logits are compared on these."
            )
        self.n_blocks, self.width, self.vocabulary = int(shapes[0][0]), int(shapes[0][1]), small
        limits = [limit for limit in map(max_positions, (base, tuned)) if limit is not None]
        self.max_positions = min(limits) if limits else None

    def _refuse_shared_adapter(self) -> None:
        """An adapter put on the base object itself changes the base in place."""
        base, tuned = self._models.get("base"), self._models.get("tuned")
        if base is None or tuned is None or base is tuned:
            return
        if not hasattr(tuned, "peft_config"):
            return
        if {id(p) for p in base.parameters()} & {id(p) for p in tuned.parameters()}:
            raise ModelError(
                "the tuned model's adapter sits on the base object itself, so reading the base "
                "would read the tuned model; pass the base's hub id, folder or an earlier copy"
            )

    def _find_tokenizer(self) -> Tokenizer:
        given = self._tokenizer_source
        if given is not None and not isinstance(given, str):
            return given
        if given is not None:
            return load_tokenizer(given, trust_remote_code=self._trust)
        failures = []
        for which, source in self._sources.items():
            path = source if isinstance(source, str) else model_name(source)
            try:
                return load_tokenizer(
                    path, revision=self._revisions[which], trust_remote_code=self._trust
                )
            except ModelError as error:
                failures.append(str(error))
        raise ModelError(f"the pair has no tokenizer: {failures[0]}")


def _source(model: str | Path | Model) -> str | nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str | Path):
        return str(model)
    raise ModelError(
        f"{type(model).__name__} is no model; expected a hub id, a folder or a loaded model"
    )


def _size(model: nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _free_memory(model: nn.Module) -> int:
    """Bytes that are free where a model lives."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)
