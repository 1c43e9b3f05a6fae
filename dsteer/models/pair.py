"""A base model and a tuned one that share their shape and their token ids."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
import torch
from jinja2 import TemplateError
from torch import nn

from dsteer.config import DeviceMap, DType, ModelsConfig, Quantization
from dsteer.data.tokens import Tokenizer, has_template
from dsteer.errors import ModelError
from dsteer.models.adapters import adapter_off, other_base_note, restores_base
from dsteer.models.anatomy import count_blocks, max_positions, model_name, text_config
from dsteer.models.load import (
    Model,
    ModelConfig,
    adapter_config,
    adapter_rows,
    is_adapter,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    quantization_of,
    refuse_overflow,
    resolve_device,
    tokenizer_notes,
    with_template,
)
from dsteer.models.placement import is_dispatched
from dsteer.models.seq2seq import (
    decoder_notes,
    is_encoder_decoder,
    is_post_norm,
    refuse_family,
    start_ids,
    start_of,
)
from dsteer.names import split_gguf, split_revision

Which = Literal["base", "tuned"]

ROOM = 2.0
"""A model stays loaded while the other one is read if so many times its size is still free."""

VOCABULARY_SLACK = 0.05
"""Without tokenizers to compare, sizes of two vocabularies may differ by this share: added tokens
and padding do that."""


class ModelPair:
    """A base model and a tuned one. Made by :meth:`load`; weights are loaded on first use.

    Attributes:
        width: d of both models.
        n_blocks: L of both models.
        vocabulary: ids below it exist in both models.
        max_positions: the longest sequence that both were made for; None if they have no limit.
        encoder_decoder: whether an encoder reads the prompts and a decoder writes the answers.
        post_norm: whether each block's output is normalised, and no norm follows the last one.
        notes: what a person should know of this pair, as sentences.
    """

    def __init__(
        self,
        sources: dict[Which, str | nn.Module],
        revisions: dict[Which, str | None],
        tokenizer: Tokenizer | str | None,
        chat_template: str | None,
        options: dict[str, Any],
        offload_folder: str | Path | None,
    ) -> None:
        self._sources = sources
        self._revisions = revisions
        self._options = options
        self._trust: bool = options["trust_remote_code"]
        self._offload_folder = offload_folder
        self._models: dict[Which, Model] = {}
        self._kept: set[Which] = set()
        self._in_use: dict[Which, int] = {"base": 0, "tuned": 0}
        self._adapter_is_off = False
        self._tokenizer_source = tokenizer
        self._chat_template = chat_template
        self._tokenizer: Tokenizer | None = None
        self._own_tokenizers: dict[Which, Tokenizer | ModelError] = {}
        self.notes: list[str] = []
        for which, source in sources.items():
            if isinstance(source, nn.Module):
                self._models[which] = source
        self._base_is_adapter = self._is_adapter("base")
        self._tuned_is_adapter = self._is_adapter("tuned")
        self._base_is_inside = self._tuned_is_adapter and self._base_can_be_inside()
        self._refuse_repeated_blocks()
        configs = {which: self._config(which) for which in sources}
        for which, config in configs.items():
            refuse_overflow(config, self._dtype_of(which), self.name(which))
            refuse_family(config, self.name(which))
        self._compare(configs["base"], configs["tuned"])
        self._refuse_shared_adapter()
        self._note_precision(configs)
        self._note_other_base()

    @classmethod
    def load(
        cls,
        base: str | Path | Model,
        tuned: str | Path | Model,
        *,
        tokenizer: Tokenizer | str | Path | None = None,
        chat_template: str | Path | None = None,
        dtype: DType = "float32",
        device: str = "auto",
        device_map: DeviceMap | None = None,
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | Path | None = None,
        quantization: Quantization | None = None,
        base_revision: str | None = None,
        tuned_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> ModelPair:
        """Name a pair. Configs are read and compared now, weights are loaded on first use.

        Args:
            base: hub id (``id@revision`` too), folder, GGUF file or loaded model.
            tuned: likewise, or an adapter: it is put, unmerged, on its own load of the base (where
                the base is an adapter too, of the one that its config names), and the base is read
                from the same weights with the adapter off.
            tokenizer: object, hub id or folder; default: the base's, else the tuned model's.
            chat_template: a Jinja file, or the hub id or folder of a tokenizer that has one.
            dtype: of the weights; a loaded model keeps its own.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``, without a device map; a
                loaded model stays put.
            device_map: ``auto``, ``balanced`` or ``sequential``: spread each model over all
                devices, then memory, then disk.
            max_memory: with a device map, the most of each device, such as ``{0: "20GiB"}``.
            offload_folder: with a device map, where weights go that fit nowhere else.
            quantization: ``8bit`` or ``4bit``, of both models, by bitsandbytes; a checkpoint that
                is quantised stays as it is.
            base_revision: hub commit, tag or branch.
            tuned_revision: likewise.
            trust_remote_code: run code that a model's repository holds.

        Raises:
            ModelError: a model that is not there, or two whose depth, width or vocabulary differ.
            MissingExtraError: a package that a model's format or the quantisation needs.
        """
        resolve_device(device)
        return cls(
            {"base": _source(base), "tuned": _source(tuned)},
            {"base": base_revision, "tuned": tuned_revision},
            str(tokenizer) if isinstance(tokenizer, Path) else tokenizer,
            None if chat_template is None else str(chat_template),
            {
                "dtype": dtype,
                "device": device,
                "device_map": device_map,
                "max_memory": max_memory,
                "quantization": quantization,
                "trust_remote_code": trust_remote_code,
            },
            offload_folder,
        )

    @classmethod
    def configured(cls, models: ModelsConfig, base: str, tuned: str) -> ModelPair:
        """Name the pair of a pipeline: these two paths, loaded as its ``models`` section says.

        Raises:
            ModelError, MissingExtraError: as :meth:`load`.
        """
        return cls.load(
            base,
            tuned,
            tokenizer=models.tokenizer,
            chat_template=models.chat_template,
            dtype=models.dtype,
            device=models.device,
            device_map=models.device_map,
            max_memory=models.max_memory,
            offload_folder=models.offload_folder,
            quantization=models.quantization,
            base_revision=models.base_revision,
            tuned_revision=models.tuned_revision,
            trust_remote_code=models.trust_remote_code,
        )

    @property
    def base(self) -> Model:
        """The base model; loaded now if it wasn't, and kept until :meth:`release`."""
        self._kept.add("base")
        return self._load("base")

    @property
    def tuned(self) -> Model:
        """The tuned model; loaded now if it wasn't, and kept until :meth:`release`.

        Raises:
            ModelError: inside ``using("base")`` of an adapter's pair, which has the adapter off.
        """
        if self._adapter_is_off:
            raise ModelError(
                "the tuned model's adapter is off while the base is read through it; ask for "
                "pair.tuned before, or read it by pair.using('tuned')"
            )
        self._kept.add("tuned")
        return self._load("tuned")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of both models.

        Raises:
            ModelError: none was given, and neither model's folder holds one, or both do, and they
                give one id to different tokens.
        """
        if self._tokenizer is None:
            self._tokenizer = self._find_tokenizer()
            self.notes += tokenizer_notes(self._tokenizer)
        return self._tokenizer

    def tokenizer_for(self, template: str) -> Tokenizer:
        """The tokenizer that writes prompts: for ``chat``, one that has a chat template.

        Where the base's has none, that is the tuned model's own, which knows its template's tokens.

        Raises:
            ModelError: as :attr:`tokenizer`; or that template writes a token that the base lacks.
        """
        own = self.tokenizer
        if template != "chat" or has_template(own) or self._tokenizer_source is not None:
            return own
        tuned = self._own_tokenizer("tuned")
        if isinstance(tuned, ModelError) or not has_template(tuned):
            return own
        self._check_foreign_tokens(tuned, own)
        note = (
            f"The base's tokenizer has no chat template: both models read prompts through the "
            f"template of {self.name('tuned')}."
        )
        if note not in self.notes:
            self.notes.append(note)
        return tuned

    def name(self, which: Which) -> str:
        """Hub id, folder or class of a model."""
        source = self._sources[which]
        return source if isinstance(source, str) else model_name(source)

    @contextlib.contextmanager
    def using(self, which: Which) -> Iterator[Model]:
        """Yield a model for a while.

        One that had to be loaded for it is dropped afterwards, so that one model is in memory at a
        time, unless at least twice its size is then still free: both fit, and it stays.

        An adapter and its base are one model: the base is read with the adapter off. (Not where
        either was asked for as :attr:`base` or :attr:`tuned`, or is in use already: two objects
        then have their own weights.)
        """
        if which == "base" and self._one_model():
            model, was_off = self._load("tuned"), self._adapter_is_off
            self._adapter_is_off = True
            try:
                with adapter_off(model):
                    yield model
            finally:
                self._adapter_is_off = was_off
            return
        if which == "tuned" and self._adapter_is_off:
            yield self._read("tuned")
            return
        was_loaded = which in self._models
        model = self._load(which)
        self._in_use[which] += 1
        try:
            yield model
        finally:
            self._in_use[which] -= 1
            if not was_loaded and not self._stays(model):
                del model
                self.release(which)

    def release(self, which: Which | None = None) -> None:
        """Drop loaded weights (of both models by default); models given as objects stay."""
        for name in ("base", "tuned") if which is None else (which,):
            self._kept.discard(name)
            if isinstance(self._sources[name], str):
                self._models.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, which: Which) -> Model:
        if which not in self._models:
            self._models[which] = self._read(which)
        return self._models[which]

    def _read(self, which: Which) -> Model:
        """Load a model anew.

        Raises:
            ModelError: it can't be loaded, or is not what its config said.
        """
        source, adapter_base = self._sources[which], None
        assert isinstance(source, str)
        if which == "tuned" and self._tuned_is_adapter and not self._base_is_adapter:
            adapter_base = self._own_base()
        model = load_model(
            source,
            revision=self._revisions[which],
            adapter_base=adapter_base,
            **self._loading(which),
        )
        blocks = count_blocks(model.config)
        if blocks != self.n_blocks:
            raise ModelError(
                f"{self.name(which)} has {blocks} blocks once it is loaded, and its config said "
                f"{self.n_blocks}; expected a model whose config says what it has"
            )
        return model

    def _own_base(self) -> Model:
        """A base that an adapter may change in place."""
        source = self._sources["base"]
        if isinstance(source, nn.Module):
            return copy.deepcopy(source)
        return load_model(source, revision=self._revisions["base"], **self._loading("tuned"))

    def _loading(self, which: Which) -> dict[str, Any]:
        """How weights are loaded. Each model has its own folder of offloaded weights."""
        folder = None if self._offload_folder is None else Path(self._offload_folder) / which
        return {**self._options, "offload_folder": folder}

    def _one_model(self) -> bool:
        """Whether the base is read from the tuned model's weights, with the adapter off."""
        own = self._kept or "base" in self._models or any(self._in_use.values())
        return self._base_is_inside and not own

    def _stays(self, model: Model) -> bool:
        """Whether a model that was loaded for a while stays for the next time."""
        if self._base_is_inside and "base" not in self._models:
            return True  # there is no other one to make room for
        return not is_dispatched(model) and _free_memory(model) >= ROOM * _size(model)

    def _base_can_be_inside(self) -> bool:
        base, source = self._sources["base"], self._sources["tuned"]
        if not isinstance(source, str) or not isinstance(base, str) or self._base_is_adapter:
            return False
        revision = self._revisions["tuned"]
        if not restores_base(adapter_config(source, revision=revision)):
            return False
        rows = adapter_rows(source, revision=revision)
        return rows is None or rows == text_config(self._config("base")).vocab_size

    def _is_adapter(self, which: Which) -> bool:
        source = self._sources[which]
        return isinstance(source, str) and is_adapter(source, revision=self._revisions[which])

    def _config(self, which: Which) -> ModelConfig:
        source = self._sources[which]
        if isinstance(source, nn.Module):
            return _config_of(source)
        revision = self._revisions[which]
        is_adapter = self._base_is_adapter if which == "base" else self._tuned_is_adapter
        if is_adapter and which == "tuned" and not self._base_is_adapter:
            config = self._config("base")
        else:
            config = load_config(source, revision=revision, trust_remote_code=self._trust)
        rows = adapter_rows(source, revision=revision) if is_adapter else None
        if rows is not None:
            config = copy.deepcopy(config)
            text_config(config).vocab_size = rows
        return config

    def _dtype_of(self, which: Which) -> object:
        model = self._models.get(which)
        return self._options["dtype"] if model is None else next(model.parameters()).dtype

    def _compare(self, base: ModelConfig, tuned: ModelConfig) -> None:
        self._compare_kinds(base, tuned)
        shapes = []
        for config in (base, tuned):
            text = text_config(config)
            shapes.append((count_blocks(config), text.hidden_size, text.vocab_size))
        for index, what in enumerate(("blocks", "width")):
            if shapes[0][index] != shapes[1][index]:
                raise ModelError(
                    f"base {self.name('base')} has {what} {shapes[0][index]}, tuned "
                    f"{self.name('tuned')} has {what} {shapes[1][index]}; expected a model and its "
                    "own fine-tune"
                )
        self.n_blocks, self.width = int(shapes[0][0]), int(shapes[0][1])
        small, large = sorted((shapes[0][2], shapes[1][2]))
        self.vocabulary = int(small)
        limits = [limit for limit in map(max_positions, (base, tuned)) if limit is not None]
        self.max_positions = min(limits) if limits else None
        if large - small > VOCABULARY_SLACK * large and not self._same_ids():
            raise ModelError(
                f"base {self.name('base')} has {shapes[0][2]} tokens, tuned {self.name('tuned')} "
                f"has {shapes[1][2]}; expected one vocabulary (the same ids must be the same "
                "text), or a tokenizer beside each model that shows it"
            )
        if large != small:
            self.notes.append(
                f"The vocabularies differ ({shapes[0][2]} and {shapes[1][2]} tokens); only ids "
                f"below {small} are read, and logits are compared on these."
            )

    def _refuse_repeated_blocks(self) -> None:
        """Such an adapter's model is deeper than its base, and shares the base's config object."""
        for which in self._sources:
            if not (self._base_is_adapter if which == "base" else self._tuned_is_adapter):
                continue
            config = adapter_config(str(self._sources[which]), revision=self._revisions[which])
            ranges = getattr(config, "layer_replication", None)
            if ranges:
                raise ModelError(
                    f"{which} {self.name(which)} is an adapter that repeats blocks of its base "
                    f"(layer_replication {[list(pair) for pair in ranges]}), so its blocks are not "
                    "those of the base; expected an adapter without layer_replication"
                )

    def _note_other_base(self) -> None:
        """Say where an adapter was trained on another model than the one that it is put on."""
        base, tuned = self._sources["base"], self._sources["tuned"]
        if not self._tuned_is_adapter or self._base_is_adapter or not isinstance(tuned, str):
            return
        config = adapter_config(tuned, revision=self._revisions["tuned"])
        given = base if isinstance(base, str) else str(_config_of(base).name_or_path)
        note = other_base_note(config.base_model_name_or_path, given, tuned)
        if note is not None:
            self.notes.append(note)

    def _note_precision(self, configs: dict[Which, ModelConfig]) -> None:
        """Say where weights were rounded: the states carry it."""
        methods: dict[Which, str | None] = {}
        for which, config in configs.items():
            source = self._sources[which]
            own, asked = quantization_of(config), self._options["quantization"]
            if isinstance(source, str) and split_gguf(split_revision(source)[0])[1]:
                own = "GGUF, unpacked on load"
            elif own is None and asked is not None and isinstance(source, str):
                own = f"bitsandbytes, {asked} on load"
            methods[which] = own
        if self._tuned_is_adapter and not self._base_is_adapter:
            methods["tuned"] = methods["base"]  # it sits on that
        base, tuned = methods["base"], methods["tuned"]
        if base == tuned and base is not None:
            self.notes.append(
                f"Both models are quantised ({base}): the states are those of the rounded weights, "
                "which can differ from the full models'."
            )
        elif base != tuned:
            told = [f"{which}: {how or 'not quantised'}" for which, how in methods.items()]
            self.notes.append(
                f"The models are not quantised alike ({', '.join(told)}): a part of every "
                "displacement is rounding of weights, not training."
            )

    def _compare_kinds(self, base: ModelConfig, tuned: ModelConfig) -> None:
        kinds = [is_encoder_decoder(config) for config in (base, tuned)]
        words = ["an encoder-decoder model" if kind else "a decoder-only one" for kind in kinds]
        if kinds[0] != kinds[1]:
            raise ModelError(
                f"base {self.name('base')} is {words[0]}, tuned {self.name('tuned')} {words[1]}; "
                "expected a model and its own fine-tune"
            )
        starts = [self._start("base", base), self._start("tuned", tuned)]
        if starts[0] != starts[1]:
            raise ModelError(
                f"the decoder of base {self.name('base')} starts with tokens {starts[0]}, that of "
                f"tuned {self.name('tuned')} with {starts[1]}; expected the same ids in both (set "
                "decoder_start_token_id and forced_bos_token_id in config.json and "
                "generation_config.json alike)"
            )
        self.encoder_decoder, self.post_norm = kinds[0], is_post_norm(base)
        self.notes += decoder_notes(base)

    def _start(self, which: Which, config: ModelConfig) -> tuple[int, ...] | None:
        """The tokens that the decoder of a model begins with; None of a decoder-only model."""
        source = self._sources[which]
        if which == "tuned" and self._tuned_is_adapter and not self._base_is_adapter:
            return self._start("base", config)  # it sits on that
        if isinstance(source, nn.Module):
            return start_ids(source)
        generation = None
        if is_encoder_decoder(config):
            generation = load_generation_config(source, revision=self._revisions[which])
        return start_of(config, generation, self.name(which))

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
        if given is None:
            self._same_ids()
            found = [self._own_tokenizer(which) for which in self._sources]
            tokenizers = [item for item in found if not isinstance(item, ModelError)]
            if not tokenizers:
                raise ModelError(f"the pair has no tokenizer: {found[0]}")
            given = tokenizers[0]
        elif isinstance(given, str):
            given = load_tokenizer(given, trust_remote_code=self._trust)
        if self._chat_template is None:
            return given
        return with_template(given, self._chat_template, trust_remote_code=self._trust)

    def _own_tokenizer(self, which: Which) -> Tokenizer | ModelError:
        """The tokenizer that a model's folder holds, loaded once; or why there is none."""
        if which not in self._own_tokenizers:
            source = self._sources[which]
            path = source if isinstance(source, str) else str(_config_of(source).name_or_path)
            try:
                if not path:
                    raise ModelError(
                        f"{self.name(which)} is an object without a path; give a tokenizer"
                    )
                self._own_tokenizers[which] = load_tokenizer(
                    path, revision=self._revisions[which], trust_remote_code=self._trust
                )
            except ModelError as error:
                self._own_tokenizers[which] = error
        return self._own_tokenizers[which]

    def _same_ids(self) -> bool:
        """Whether both models have a tokenizer, so that their ids could be compared.

        Raises:
            ModelError: an id that both models have is another token in each.
        """
        tokens: dict[Which, dict[int, str]] = {}
        for which in self._sources:
            tokenizer = self._own_tokenizer(which)
            if isinstance(tokenizer, ModelError):
                return False
            tokens[which] = {number: token for token, number in tokenizer.get_vocab().items()}
        base, tuned = tokens["base"], tokens["tuned"]
        for number in sorted(base.keys() & tuned.keys()):
            if number < self.vocabulary and base[number] != tuned[number]:
                raise ModelError(
                    f"id {number} is {base[number]!r} in the tokenizer of {self.name('base')} and "
                    f"{tuned[number]!r} in that of {self.name('tuned')}; expected one vocabulary "
                    "(if such tokens are unused in your prompts, name the tokenizer that both "
                    "models shall read, as models.tokenizer)"
                )
        added = len(tuned.keys() - base.keys())
        note = f"The tuned model's tokenizer has {added} tokens that the base's lacks."
        if added and note not in self.notes:
            self.notes.append(note)
        return True

    def _check_foreign_tokens(self, tokenizer: Tokenizer, own: Tokenizer) -> None:
        """A template may write tokens that training added, of which the base has no embedding, or
        one that nothing trained: many models have more rows than tokens.
        """
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError:
            return  # it refuses this conversation; what it writes of others is checked later
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        foreign = [number for number in ids if number >= self.vocabulary]
        if foreign:
            token = tokenizer.convert_ids_to_tokens(foreign[0])
            raise ModelError(
                f"the chat template of {self.name('tuned')} writes {token!r} (id {foreign[0]}), "
                f"and base {self.name('base')} has only {self.vocabulary} tokens; give a template "
                "of tokens that both have (models.chat_template), or use template none"
            )
        known = set(own.get_vocab().values())
        unseen = sorted({number for number in ids if number not in known})
        if unseen:
            tokens = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(unseen)))
            note = (
                f"The chat template of {self.name('tuned')} writes {tokens}, which the tokenizer "
                "of the base lacks: the base reads them through rows of its embedding that its "
                "training never saw, so a part of every displacement is these rows. Give a "
                "template of tokens that both have (models.chat_template) to leave it out."
            )
            if note not in self.notes:
                self.notes.append(note)


def _source(model: str | Path | Model) -> str | nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str | Path):
        return str(model)
    raise ModelError(
        f"{type(model).__name__} is no model; expected a hub id, a folder or a loaded model"
    )


def _config_of(model: Model) -> ModelConfig:
    if not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is no transformers language model: it has no config; expected "
            "what AutoModelForCausalLM loads"
        )
    return model.config


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
