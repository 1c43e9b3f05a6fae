"""Load one model or tokenizer from a hub id, a folder or an adapter folder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from dsteer.config import DType
from dsteer.data.tokens import Tokenizer, has_template
from dsteer.errors import ModelError

Model = Any
"""A transformers causal language model, or a PEFT model around one."""

ModelConfig = Any
"""A transformers config."""


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: DType = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapter_base: Model | None = None,
) -> Model:
    """Load a causal language model, in evaluation mode.

    An adapter folder (or hub id) is put, unmerged, on ``adapter_base``, else on its own load of the
    base that its config names.

    Args:
        path: hub id or folder, of a model or of a PEFT adapter.
        revision: hub commit, tag or branch.
        dtype: of the weights.
        device: ``auto`` (CUDA, else MPS, else CPU), or torch's name of a device.
        trust_remote_code: run code that the model's repository holds.
        adapter_base: the model that an adapter is put on; it is changed in place.

    Raises:
        ModelError: no such model, one that is offline, broken or incomplete, or one that the dtype
            or the device does not suit.
    """
    target = resolve_device(device)
    if is_adapter(path, revision=revision):
        if adapter_base is None:
            base = _adapter_config(path, revision).base_model_name_or_path
            adapter_base = load_model(
                base, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
        return _load_adapter(path, revision, adapter_base)
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    refuse_overflow(config, dtype, path)
    with quiet(), _explained(path, revision):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            revision=revision or "main",
            dtype=getattr(torch, dtype),
            device_map=None if target.type == "cpu" else {"": target},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} weights are missing (such as {missing[0]}), so they would be "
            "random; give a complete causal language model"
        )
    return model.eval()


def load_config(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelConfig:
    """Load a model's config; of an adapter, the config of the base that it names.

    Raises:
        ModelError: there is no model there, or its config is malformed.
    """
    if is_adapter(path, revision=revision):
        base = _adapter_config(path, revision).base_model_name_or_path
        return load_config(base, trust_remote_code=trust_remote_code)
    local = Path(path).expanduser()
    if local.is_dir() and not (local / "config.json").is_file():
        raise ModelError(
            f"{path} is a folder without config.json, so it holds no model; expected a folder that "
            "save_pretrained wrote"
        )
    with quiet(), _explained(path, revision):
        return transformers.AutoConfig.from_pretrained(
            str(path), revision=revision or "main", trust_remote_code=trust_remote_code
        )


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Tokenizer:
    """Load a tokenizer. Where it lacks a pad token, EOS (or BOS) stands in for it.

    Raises:
        ModelError: there is no tokenizer there.
    """
    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path), revision=revision or "main", trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ModelError(
                f"{path}: no tokenizer could be loaded there ({_first_line(error)}); name one with "
                "models.tokenizer"
            ) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


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
    with quiet():
        try:
            return find_adapter_config_file(str(path), revision=revision) is not None
        except (OSError, ValueError):
            return False


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
    """Keep transformers' progress bars and log lines off the terminal while the block runs."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _adapter_config(path: str | Path, revision: str | None) -> Any:
    from peft import PeftConfig

    with quiet(), _explained(path, revision):
        return PeftConfig.from_pretrained(str(path), revision=revision)


def _load_adapter(path: str | Path, revision: str | None, base: Model) -> Model:
    from peft import PeftModel

    with quiet(), _explained(path, revision), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an old name
        return PeftModel.from_pretrained(base, str(path), revision=revision).eval()


@contextlib.contextmanager
def _explained(path: str | Path, revision: str | None) -> Iterator[None]:
    """Turn the library's ways of failing to load something into one clear line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            remedy = "use a smaller dtype or another device"
        elif Path(path).expanduser().exists():
            remedy = "expected a folder that save_pretrained wrote"
        else:
            remedy = "expected a folder, or a hub id that is spelled right and within reach"
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{path}{at}: the model can't be loaded ({_first_line(error)}); {remedy}"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
