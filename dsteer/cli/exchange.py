"""``dsteer export`` and ``dsteer import``: steering vectors for other programs, and theirs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dsteer.cli import _friendly, _say, app
from dsteer.cli.models import DeviceOption, DtypeOption, TrustOption, open_model
from dsteer.errors import ConfigError

if TYPE_CHECKING:
    from dsteer.models.load import Model

ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]

FORMATS = "gguf, repeng, rotalabs, stack, lm-eval, baked or card"


@app.command()
@_friendly
def export(
    vectors: Annotated[
        str,
        typer.Argument(
            metavar="VECTORS",
            help="A file of steering vectors; or a baked folder, whose --strength is changed.",
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"One of {FORMATS}.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PATH", help="File or folder that is written."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="That the vectors are for: they are checked against it."
        ),
    ] = None,
    strength: Annotated[float, typer.Option(metavar="λ", help="In units of the vectors.")] = 1.0,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="Write this site; may be repeated. Default: all."),
    ] = None,
    skip: Annotated[
        bool, typer.Option("--skip", help="Leave out the sites that the format can't express.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Of a card: upload it to the hub.")
    ] = None,
    force: ForceOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Write steering vectors for another program: llama.cpp, repeng, lm_eval, any model server."""
    from dsteer.exchange import FORMATS as KNOWN
    from dsteer.exchange import baked, card
    from dsteer.exchange import export as write
    from dsteer.steering.vector import SteeringVectorSet

    if push is not None and to != "card":
        raise ConfigError(f"--push with --to {to}: only a card is uploaded; use --to card")
    if to == "baked" and Path(vectors).expanduser().is_dir() and out is None:
        before = baked.strength_of(vectors)
        baked.rebake(vectors, strength)
        _say(f"{vectors}: strength {before:g} → {strength:g}")
        return
    if out is None:
        raise ConfigError("--out is missing; give the file or folder that is written")
    _require_new(out, force)
    loaded, tokenizer = None, None
    if model is not None and to == "baked":
        loaded, tokenizer = open_model(model, dtype, device, trust_remote_code=trust_remote_code)
    elif model is not None and to in KNOWN:
        loaded = _shape_of(model, trust_remote_code)
    notes = write(
        SteeringVectorSet.load(vectors),
        out,
        to,
        strength=strength,
        sites=site,
        model=loaded,
        tokenizer=tokenizer,
        skip=skip,
    )
    _say(f"{vectors} → {out}")
    for note in notes:
        _say(f"  {note}")
    if push is not None:
        _say(f"{out} → {card.push(out, push)}")


@app.command("import")
@_friendly
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="File or folder of another program.")],
    source: Annotated[str, typer.Option("--from", metavar="FORMAT", help=f"One of {FORMATS}.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="A .safetensors file.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="That the vectors are for: they are checked against it."
        ),
    ] = None,
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Read another program's steering vectors into a file of dsteer's."""
    from dsteer.exchange import read

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    _require_new(out, force)
    loaded = None if model is None else _shape_of(model, trust_remote_code)
    vectors = read(file, source, model=loaded)
    vectors.save(out)
    _say(f"{file} → {out}: {len(vectors)} of width {vectors.width} at {', '.join(vectors)}")
    if "left_out" in vectors.metadata:
        _say(f"  Left out: {vectors.metadata['left_out']}.")


def _require_new(out: Path, force: bool) -> None:
    if out.is_file() and not force:
        raise ConfigError(f"--out {out}: there is such a file; name another, or give --force")


def _shape_of(name: str, trust_remote_code: bool) -> Model:
    """A model without its weights: enough to check vectors against."""
    import torch

    from dsteer.models.families import auto_class
    from dsteer.models.load import load_config, quiet
    from dsteer.names import split_revision
    from dsteer.pipeline import require_local

    require_local("--model", name)
    repository, revision = split_revision(name)
    config = load_config(repository, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"), quiet():
        made = auto_class(config, name).from_config(config, trust_remote_code=trust_remote_code)
    return cast("Model", made)
