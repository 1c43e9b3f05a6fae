"""What commands that work on one model share: its options, and how it is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from dsteer.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from dsteer.data.tokens import Tokenizer
    from dsteer.models.load import Model

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id (id@revision too), folder or GGUF file.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="Of the weights; default: bfloat16, on a CPU float32."),
]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, mps …")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model brings.")
]


def open_model(
    name: str, dtype: str | None, device: str, *, trust_remote_code: bool = False
) -> tuple[Model, Tokenizer]:
    """Load a model, an adapter on its base included, and its tokenizer.

    Raises:
        ConfigError: a dtype that is none, or a path where nothing is.
        ModelError: it can't be loaded.
    """
    from dsteer.config import DType
    from dsteer.models.load import load_model, load_tokenizer
    from dsteer.names import split_revision
    from dsteer.pipeline import require_local

    dtype = dtype or dtype_for(device)
    if dtype not in get_args(DType):
        raise ConfigError(f"--dtype {dtype}: no such dtype{did_you_mean(dtype, get_args(DType))}")
    require_local("MODEL", name)
    repository, revision = split_revision(name)
    model = load_model(
        repository,
        revision=revision,
        dtype=cast("DType", dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(repository, revision=revision, trust_remote_code=trust_remote_code)
    return model, tokenizer


def dtype_for(device: str) -> str:
    """What weights are read in where nothing is said."""
    from dsteer.models.load import resolve_device

    return "float32" if resolve_device(device).type == "cpu" else "bfloat16"
