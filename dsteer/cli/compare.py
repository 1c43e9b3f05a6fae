"""``dsteer compare``: how far apart two models are inside, and how much of it is one vector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsteer.cli import OutOption, UntilOption, _folder, _friendly, _run, _say, app
from dsteer.cli.models import DeviceOption, DtypeOption, dtype_for
from dsteer.errors import ConfigError

DataOption = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help="Prompts: a hub dataset, a file or folder of pairs or prompts, or synthetic.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="hh-rlhf, oasst, preference or prompts; default: what the first row tells.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Use only the first rows.")
]
NameOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of the run; default: from the models.")
]
YamlOption = Annotated[
    bool, typer.Option("--yaml", help="Print the pipeline instead of running it.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the end.")]


@app.command()
@_friendly
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder or file.")],
    tuned: Annotated[
        list[str],
        typer.Argument(
            metavar="TUNED... [KEY.PATH=VALUE...]",
            help="One model or several, adapters too; then overrides of the pipeline.",
        ),
    ],
    data: DataOption = "Anthropic/hh-rlhf",
    data_format: FormatOption = None,
    limit: LimitOption = None,
    template: Annotated[
        str,
        typer.Option(
            metavar="TEMPLATE",
            help="none: raw transcripts for both; chat: the chat template for both; four-way: both "
            "forms, and how much of the change each makes; or a Jinja file or a model whose "
            "template both get.",
        ),
    ] = "none",
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    name: NameOption = None,
    until: UntilOption = None,
    out: OutOption = None,
    yaml: YamlOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare models that exist: activations to report, without training.

    Several tuned models make a study: one report, one table, and the cosines between their vectors.
    """
    from dsteer.compare import comparison, find_prompts, is_override

    models = [item for item in tuned if not is_override(item)]
    if not models:
        raise ConfigError(f"compare {base}: no tuned model given; expected BASE TUNED [TUNED …]")
    text = comparison(
        base,
        models,
        find_prompts(data, data_format, limit),
        name=name,
        dtype=dtype or dtype_for(device),
        device=device,
        template=template,
        overrides=[item for item in tuned if is_override(item)],
    )
    go(text, out, name, until=until, yaml=yaml, quiet=quiet)


def go(
    text: str, out: Path | None, name: str | None, *, until: str | None, yaml: bool, quiet: bool
) -> None:
    """Print a pipeline that was written for models which exist, or check these and run it."""
    from dsteer.compare import check_folder, check_pair
    from dsteer.config import read_pipeline, variants_of

    config = read_pipeline(text, origin="the pipeline")
    if yaml:
        _say(text.rstrip())
        return
    for one in variants_of(config).values() if config.variants else (config,):
        check_pair(one)
    folder = _folder(out, config.name)
    if out is None and name is None:
        check_folder(config, folder)
    _run(config, text, folder, until=until, quiet=quiet)
    _say(f"Pipeline: {folder / 'pipeline.yaml'}")
