"""Load one model or tokenizer from a hub id, a folder, a GGUF file or an adapter folder."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import struct
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils import logging as transformers_logging

from dsteer.config import DeviceMap, DType, Quantization
from dsteer.data.tokens import Tokenizer, has_template
from dsteer.errors import MissingExtraError, ModelError
from dsteer.models.adapters import saved_rows
from dsteer.models.families import auto_class, refuse_kind
from dsteer.models.placement import is_dispatched
from dsteer.models.seq2seq import refuse_family
from dsteer.names import is_local, split_gguf, split_revision

_FAILURES = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError,
    struct.error,
)  # fmt: skip
"""The ways in which the libraries fail to load something."""

_ADAPTER_WEIGHTS = "adapter_model.safetensors"

Model = Any
"""A transformers language model, decoder-only or encoder-decoder, or a PEFT model around one."""

ModelConfig = Any
"""A transformers config."""


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: DType = "float32",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    adapter_base: Model | None = None,
) -> Model:
    """Load a language model, in evaluation mode.

    An adapter folder (or hub id) is put, unmerged, on ``adapter_base``, else on its own load of the
    base that its config names (an adapter in that base is merged). The weights of a GGUF file are
    unpacked.

    Args:
        path: hub id (``id@revision`` too), folder or GGUF file, of a model or of a PEFT adapter.
        revision: hub commit, tag or branch.
        dtype: of the weights.
        device: ``auto`` (CUDA, else MPS, else CPU), or torch's name of a device.
        device_map: spread the model over all devices, memory and disk, in this way.
        max_memory: with a device map, the most of each device, such as ``{0: "20GiB"}``.
        offload_folder: with a device map, where weights go that fit nowhere else.
        quantization: quantise by bitsandbytes, to 8 bits or to 4 (nf4); a checkpoint that is
            quantised stays as it is.
        trust_remote_code: run code that the model's repository holds.
        adapter_base: the model that an adapter is put on; it is changed in place.

    Raises:
        ModelError: no such model, one that is offline, broken or incomplete, or one that the dtype
            or the device does not suit.
        MissingExtraError: a package that the model's format or the quantisation needs.
    """
    target = resolve_device(device)
    spread = {} if device_map is None else _spread(device_map, max_memory, offload_folder)
    if is_adapter(path, revision=revision):
        if adapter_base is None:
            adapter_base = load_model(
                adapter_config(path, revision=revision).base_model_name_or_path,
                dtype=dtype,
                device=device,
                device_map=device_map,
                max_memory=max_memory,
                offload_folder=offload_folder,
                quantization=quantization,
                trust_remote_code=trust_remote_code,
            )
        return _load_adapter(path, revision, adapter_base, spread)
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    refuse_overflow(config, dtype, path)
    refuse_family(config, path)
    refuse_kind(config, path)
    repository, at, gguf = _locate(path, revision)
    quantized = _quantized(config, quantization, dtype, path, gguf)
    if not spread and (quantized or quantization_of(config) or target.type != "cpu"):
        spread = {"device_map": {"": str(target)}}
    with quiet(), _explained(path, revision), _unseen_bar(gguf):
        model, report = auto_class(config, path).from_pretrained(
            repository,
            config=config,
            revision=at or "main",
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **spread,
            **quantized,
            **_gguf_file(path, gguf),
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} weights are missing (such as {missing[0]}), so they would be "
            "random; give a complete language model"
        )
    if is_dispatched(model):  # flags of weights that were moved in inference mode can't be set
        model.requires_grad_(False)
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            # bitsandbytes would multiply in bfloat16, without gradients, and change its weights.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_config(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelConfig:
    """Load a model's config; of an adapter, the config of the base that it names.

    Raises:
        ModelError: there is no model there, or its config is malformed.
        MissingExtraError: it is a GGUF file, and the package that reads it is missing.
    """
    if is_adapter(path, revision=revision):
        base = adapter_config(path, revision=revision).base_model_name_or_path
        return load_config(base, trust_remote_code=trust_remote_code)
    local = Path(path).expanduser()
    if local.is_dir() and not (local / "config.json").is_file():
        raise ModelError(
            f"{path} is a folder without config.json, so it holds no model; expected a folder that "
            "save_pretrained wrote"
        )
    repository, at, gguf = _locate(path, revision)
    with quiet(), _explained(path, revision):
        return transformers.AutoConfig.from_pretrained(
            repository,
            revision=at or "main",
            trust_remote_code=trust_remote_code,
            **_gguf_file(path, gguf),
        )


def load_generation_config(path: str | Path, *, revision: str | None = None) -> Any | None:
    """Load a model's generation config; of an adapter, that of its base; None where there is none.

    Raises:
        ModelError: an adapter whose config is malformed.
    """
    if is_adapter(path, revision=revision):
        return load_generation_config(
            adapter_config(path, revision=revision).base_model_name_or_path
        )
    repository, at, _ = _locate(path, revision)
    with quiet():
        try:
            return transformers.GenerationConfig.from_pretrained(repository, revision=at or "main")
        except OSError:
            return None


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
) -> Tokenizer:
    """Load a tokenizer. Where it lacks a pad token, EOS (or BOS) stands in for it.

    Args:
        path: hub id, folder or GGUF file.
        revision: hub commit, tag or branch.
        trust_remote_code: run code that the repository holds.
        chat_template: see :func:`with_template`; default: the tokenizer's own.

    Raises:
        ModelError: there is no tokenizer there, or no such template.
    """
    repository, at, gguf = _locate(path, revision)
    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                repository,
                revision=at or "main",
                trust_remote_code=trust_remote_code,
                **_gguf_file(path, gguf),
            )
        except (*_FAILURES, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path}: no tokenizer could be loaded there ({_first_line(error)}); name one with "
                "models.tokenizer"
            ) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if chat_template is not None:
        return with_template(tokenizer, chat_template, trust_remote_code=trust_remote_code)
    return tokenizer


def with_template(
    tokenizer: Tokenizer, source: str | Path, *, trust_remote_code: bool = False
) -> Tokenizer:
    """A copy of a tokenizer with another chat template.

    Args:
        tokenizer: any.
        source: a Jinja file, or the hub id or folder of a tokenizer that has a template.
        trust_remote_code: run code that the repository holds.

    Raises:
        ModelError: no template is there, or one that is no Jinja.
    """
    local = Path(source).expanduser()
    if local.is_file() and local.suffix != ".gguf":
        try:
            template: Any = local.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"{source}: the chat template can't be read ({_first_line(error)}); expected a "
                "Jinja file"
            ) from None
    else:
        owner = load_tokenizer(source, trust_remote_code=trust_remote_code)
        template = owner.chat_template
    if not template:
        raise ModelError(
            f"{source} has no chat template; expected a Jinja file, or a tokenizer that has one"
        )
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    try:
        copied.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{source}: the chat template is no Jinja (line {error.lineno}: {error.message}); "
            "expected such a file"
        ) from None
    except Exception:  # noqa: BLE001  # a template may refuse this conversation in any way
        pass
    return copied


def tokenizer_notes(tokenizer: Tokenizer) -> list[str]:
    """What a person should know of a tokenizer: that it has no pad token or template of its own."""
    notes = []
    if tokenizer.pad_token in {None, tokenizer.eos_token}:
        notes.append(
            "The tokenizer has no pad token of its own; EOS stands in. Reading states needs none: "
            "rows are padded on the right with a token that no real token sees."
        )
    if not has_template(tokenizer):
        notes.append(
            "The tokenizer has no chat template; prompts that are message lists are read as "
            "'Human:' / 'Assistant:' transcripts."
        )
    return notes


def is_adapter(path: str | Path, *, revision: str | None = None) -> bool:
    """Whether a path or hub id holds a PEFT adapter rather than a whole model."""
    local = Path(path).expanduser()
    if local.exists():
        return (local / "adapter_config.json").is_file()
    repository, at, gguf = _locate(path, revision)
    if gguf is not None:
        return False
    with quiet():
        try:
            return find_adapter_config_file(repository, revision=at) is not None
        except (OSError, ValueError):
            return False


def adapter_config(path: str | Path, *, revision: str | None = None) -> Any:
    """The config of a PEFT adapter.

    Raises:
        ModelError: it is malformed.
    """
    repository, at, _ = _locate(path, revision)
    with quiet(), _explained(path, revision):
        from peft import PeftConfig

        return PeftConfig.from_pretrained(repository, revision=at)


def adapter_rows(path: str | Path, *, revision: str | None = None) -> int | None:
    """How many tokens an adapter's own embedding or head has; None where it saved neither."""
    repository, at, _ = _locate(path, revision)
    weights: str | None = str(Path(repository).expanduser() / _ADAPTER_WEIGHTS)
    if not is_local(repository):
        with quiet(), contextlib.suppress(OSError, ValueError):
            weights = cached_file(repository, _ADAPTER_WEIGHTS, revision=at)
    return None if weights is None else saved_rows(Path(weights))


def quantization_of(config: ModelConfig) -> str | None:
    """How a checkpoint is quantised, as its config says (``bitsandbytes``, ``gptq``, …)."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    named = isinstance(found, Mapping)
    method = found.get("quant_method") if named else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def resolve_device(device: str) -> torch.device:
    """Turn ``auto`` or a name into a device.

    Raises:
        ModelError: torch knows no such device, or this machine lacks it.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(
            f"device {device!r} can't be used here ({_first_line(error)}); expected auto, cpu, "
            "cuda, cuda:N or mps"
        ) from None
    return target


def refuse_overflow(config: ModelConfig, dtype: object, name: object) -> None:
    """Refuse float16 for Gemma, whose states exceed its range.

    Raises:
        ModelError: that combination.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind.startswith("gemma") and str(dtype).removeprefix("torch.") == "float16":
        raise ModelError(
            f"{name}: float16 overflows in {kind} models; use dtype bfloat16 or float32"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and log lines off the terminal while the block runs."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("accelerate", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _unseen_bar(gguf: str | None) -> Iterator[None]:
    """The bar of unpacking a GGUF file heeds no setting, so it goes nowhere."""
    with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():
        yield


def _locate(path: str | Path, revision: str | None) -> tuple[str, str | None, str | None]:
    """Where transformers finds a model: folder or hub id, revision, GGUF file.

    Raises:
        ModelError: two revisions, a file that is not there, or one that is no model.
    """
    name, at = split_revision(str(path))
    if at is not None and revision is not None:
        raise ModelError(f"{path} names a revision, and {revision} is another; give one of them")
    repository, gguf = split_gguf(name)
    local = Path(name).expanduser()
    if local.is_file() and gguf is None:
        raise ModelError(
            f"{path} is a file; expected a folder that save_pretrained wrote, a GGUF file or a hub "
            "id"
        )
    on_the_hub = gguf is not None and not is_local(name)
    if name.endswith(".gguf") and not local.is_file() and not on_the_hub:
        raise ModelError(
            f"{path}: no such file; expected a GGUF file, or owner/name:file.gguf on the hub"
        )
    return repository, revision or at, gguf


def _gguf_file(path: str | Path, gguf: str | None) -> dict[str, str]:
    """What transformers is told of a GGUF file.

    Raises:
        MissingExtraError: the package that reads it is not installed.
    """
    if gguf is None:
        return {}
    if find_spec("gguf") is None:
        raise MissingExtraError("gguf", str(path))
    return {"gguf_file": gguf}


def _spread(
    device_map: DeviceMap,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | Path | None,
) -> dict[str, Any]:
    """What accelerate is told of where weights go.

    Raises:
        ModelError: a device is named that this machine lacks.
    """
    devices = torch.accelerator.device_count()
    for device in max_memory or ():
        if isinstance(device, int) and device >= devices:
            raise ModelError(
                f"max_memory names device {device}, and this machine has {devices}; expected a "
                "number below that, or cpu"
            )
    folder = None if offload_folder is None else str(Path(offload_folder).expanduser())
    memory = None if max_memory is None else dict(max_memory)
    return {"device_map": device_map, "max_memory": memory, "offload_folder": folder}


def _quantized(
    config: ModelConfig,
    quantization: Quantization | None,
    dtype: DType,
    path: str | Path,
    gguf: str | None,
) -> dict[str, Any]:
    """What transformers is told of quantisation.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ModelError: a GGUF file is to be quantised again.
    """
    own = quantization_of(config)
    if gguf is not None:
        if quantization is not None:
            raise ModelError(
                f"{path}: a GGUF file can't be quantised to {quantization} again; drop "
                "models.quantization"
            )
        if hasattr(transformers, "GgufConfig"):  # else it is unpacked in any case
            return {"quantization_config": transformers.GgufConfig(dequantize=True)}
        return {}
    if own is None and quantization is None:
        return {}
    if find_spec("bitsandbytes") is None and own in {None, "bitsandbytes"}:
        raise MissingExtraError("bnb", f"{path} in {quantization or 'bitsandbytes'}")
    if own is not None:
        return {}
    how: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": getattr(torch, dtype),
        }
    return {"quantization_config": transformers.BitsAndBytesConfig(**how)}


def _load_adapter(
    path: str | Path, revision: str | None, base: Model, spread: Mapping[str, Any]
) -> Model:
    repository, at, _ = _locate(path, revision)
    spread = {**spread, "low_cpu_mem_usage": True} if spread else {}  # else nothing fills `meta`
    with quiet(), _explained(path, revision), warnings.catch_warnings():
        from peft import PeftModel

        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an old name
        if "disk" in (getattr(base, "hf_device_map", None) or {}).values():
            # PEFT would write the base's weights anew, into the working directory.
            raise ModelError(
                f"{path}: an adapter can't be put on a base that is partly on disk; merge it into "
                "its base first (merge_and_unload), or give models.max_memory more"
            )
        if isinstance(base, PeftModel):
            base = base.merge_and_unload()  # a second adapter would take the place of the first
        rows = adapter_rows(path, revision=revision)
        if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
            # It was trained on a base that was given more tokens; it brings all their rows itself.
            base.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(base, repository, revision=at, **spread).eval()


@contextlib.contextmanager
def _explained(path: str | Path, revision: str | None) -> Iterator[None]:
    """Turn the library's ways of failing to load something into one clear line."""
    try:
        yield
    except _FAILURES as error:
        why = _first_line(error)
        if isinstance(error, UnpicklingError):
            why = "its pickle holds more than tensors, which may be code"
            remedy = "expected weights as safetensors"
        elif isinstance(error, ImportError):
            if str(path).endswith(".gguf"):
                raise MissingExtraError("gguf", f"{path}") from None
            remedy = "install the package that it needs"
        elif isinstance(error, torch.OutOfMemoryError):
            remedy = "use a smaller dtype or another device, or spread it (models.device_map)"
        elif "offload_folder" in str(error):
            remedy = "give models.offload_folder"
        elif Path(path).expanduser().exists():
            remedy = "expected a folder that save_pretrained wrote"
        else:
            remedy = "expected a folder, or a hub id that is spelled right and within reach"
        at = f" at revision {revision}" if revision else ""
        raise ModelError(f"{path}{at}: the model can't be loaded ({why}); {remedy}") from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    told = 2 if lines[0].endswith(":") else 1  # a heading alone says nothing
    return " ".join(lines[:told]).rstrip(".,")
