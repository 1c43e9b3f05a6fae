"""Read the base through an adapter: the one model in memory, with its adapter off."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsteer.names import is_local, split_revision
from dsteer.store import hash_file

_KEEP_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "True", "False", "None"})
"""Ways to start a LoRA that leave the weights under it as they were."""

_WHOLE = re.compile(r"\.(embed_tokens|wte|word_embeddings|embed_in|shared|lm_head|embed_out)\.")
"""The modules whose rows are tokens, as an adapter that saved one whole names it."""

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
"""Where the hub's cache keeps ``owner/name``."""


def restores_base(config: Any) -> bool:
    """Whether a model whose adapter is off is the base, bit for bit.

    Not so where biases were trained (PEFT keeps them), where the weights under the adapter were
    changed when it was put on (PiSSA, OLoRA and their like), or where blocks were repeated.
    """
    start = str(getattr(config, "init_lora_weights", True))
    return (
        getattr(config, "bias", "none") == "none"
        and start in _KEEP_THE_BASE
        and not getattr(config, "layer_replication", None)
    )


def saved_rows(weights: Path) -> int | None:
    """How many tokens an adapter's own embedding or head has; None where it saved neither.

    Args:
        weights: the adapter's safetensors file, of which only the header is read.
    """
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                if _WHOLE.search(key) and key.endswith(".weight") and ".lora_" not in key:
                    return int(file.get_slice(key).get_shape()[0])
    except (OSError, SafetensorError):
        pass  # told when it is loaded
    return None


def other_base_note(named: str | None, given: str, adapter: str) -> str | None:
    """What a person should know where an adapter is put on another model than it was trained on.

    Args:
        named: the hub id or folder that the adapter's config names.
        given: that of the model that it is put on.
        adapter: that of the adapter.

    Returns:
        A sentence; None where they are one model, or one of them is not known.
    """
    if not named or not given or _hub_id(named) == _hub_id(given) != "":
        return None
    one, other = Path(named).expanduser(), Path(given).expanduser()
    verdict = "whether they are one model is not known"
    if one.is_dir() and other.is_dir():
        if one.resolve() == other.resolve() or _weights(one) == _weights(other):
            return None
        verdict = "their weights differ"
    elif is_local(named) and not one.exists():
        verdict = f"{named} is not there, so their weights can't be compared"
    return (
        f"The adapter {adapter} was trained on {named} and is put on {given}: {verdict}. If they "
        "are not one model, what is read as tuned is none that anyone trained; give the base that "
        "the adapter's config names."
    )


def _hub_id(name: str) -> str:
    """The hub id that a name stands for, of a folder of the hub's cache too; else nothing."""
    cached = _CACHED.search(f"{name}/")
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    return "" if is_local(name) else split_revision(name)[0]


def _weights(folder: Path) -> dict[str, str]:
    """Hashes of the weights in a folder; of an adapter's, those of the adapter alone."""
    return {
        file.name: hash_file(file)
        for file in sorted(folder.iterdir())
        if file.suffix in {".safetensors", ".bin", ".gguf"} and file.is_file()
    }


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Turn a PEFT model's adapter off while the block runs; which weights train stays as it was."""
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with contextlib.ExitStack() as switch:
        # In inference mode, because weights that were moved in that mode can't be set otherwise.
        with torch.inference_mode():
            switch.enter_context(model.disable_adapter())
        try:
            yield
        finally:
            with torch.inference_mode():
                switch.close()
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(trains[name])


def weights_in_use(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """The weights and buffers that a model computes with, by name: holder, own name, tensor.

    Without those of an adapter that is off: then names, too, are those of the base itself.
    """
    off = {name: module for name, module in model.named_modules() if is_off(module)}
    found = {}
    for prefix, holder in model.named_modules():
        for own, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            if tensor is None:
                continue
            name = f"{prefix}.{own}" if prefix else own
            if off:
                if _of_adapter(name, off):
                    continue
                name = name.removeprefix("base_model.model.")
                name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            found[name] = holder, own, tensor
    return found


def is_off(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT whose adapter is off."""
    return (
        type(module).__module__.startswith("peft.")
        and getattr(module, "disable_adapters", False) is True
    )


def _of_adapter(name: str, off: dict[str, nn.Module]) -> bool:
    return any(
        name.startswith(f"{prefix}.")
        and not name[len(prefix) + 1 :].startswith(("base_layer.", "original_module."))
        for prefix in off
    )
