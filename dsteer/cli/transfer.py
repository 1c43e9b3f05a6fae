"""``dsteer transfer``: does the vector of one pair of models work in another?"""

from __future__ import annotations

from typing import Annotated

import typer

from dsteer.cli import OutOption, UntilOption, _friendly, app
from dsteer.cli.compare import (
    DataOption,
    FormatOption,
    LimitOption,
    NameOption,
    QuietOption,
    YamlOption,
    go,
)
from dsteer.cli.models import DeviceOption, DtypeOption, dtype_for


@app.command()
@_friendly
def transfer(
    a_base: Annotated[str, typer.Argument(metavar="A_BASE", help="Hub id, folder or file.")],
    a_tuned: Annotated[
        str,
        typer.Argument(
            metavar="A_TUNED", help="Likewise, an adapter, or a .safetensors file of A's vectors."
        ),
    ],
    b_base: Annotated[str, typer.Argument(metavar="B_BASE", help="Hub id, folder or file.")],
    b_tuned: Annotated[str, typer.Argument(metavar="B_TUNED", help="Likewise, or an adapter.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides of the pipeline."),
    ] = None,
    data: DataOption = "Anthropic/hh-rlhf",
    data_format: FormatOption = None,
    limit: LimitOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    name: NameOption = None,
    until: UntilOption = None,
    out: OutOption = None,
    yaml: YamlOption = False,
    quiet: QuietOption = False,
) -> None:
    """Carry the vector of pair A to pair B and measure what it does there.

    B's own vector is measured too: it is the ceiling that A's is held against, above nulls.
    """
    from dsteer.compare import find_prompts, transfer_between
    from dsteer.config import SPLITS

    text = transfer_between(
        (a_base, a_tuned),
        (b_base, b_tuned),
        find_prompts(data, data_format, limit, SPLITS),
        name=name,
        dtype=dtype or dtype_for(device),
        device=device,
        overrides=overrides or (),
    )
    go(text, out, name, until=until, yaml=yaml, quiet=quiet)
