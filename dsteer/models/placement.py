"""Where the weights of a model are, if accelerate spread it over devices, memory and disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def is_dispatched(model: nn.Module) -> bool:
    """Whether hooks of accelerate move a model's weights or states between devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes. Weights that wait in memory or on disk are on ``meta`` meanwhile."""
    device: torch.device = next(module.parameters()).device
    if device.type != "meta":
        return device
    found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if found is None else found)


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Hold a module's own weights where it computes while the block runs."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
