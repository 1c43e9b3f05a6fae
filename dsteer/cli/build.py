"""``dsteer build``: steering vectors, in every known way; one command a way."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsteer.cli import _friendly, _say, app
from dsteer.cli.compare import DataOption, QuietOption
from dsteer.cli.models import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    TrustOption,
    dtype_for,
    open_model,
)
from dsteer.errors import ConfigError, DataError, StoreError

if TYPE_CHECKING:
    from dsteer.data.types import PreferencePair
    from dsteer.steering.vector import SteeringVector, SteeringVectorSet

build = typer.Typer(
    help="Build steering vectors: contrast, prefix, refusal, learned, diff.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(build, name="build")

OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="The vectors: a .safetensors file.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]
ComponentOption = Annotated[
    str, typer.Option(metavar="PART", help="residual, attn or mlp: where in a block.")
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers", "--layer", metavar="K,…", help="Blocks from 0, such as 3,5-8; default: all."
    ),
]
SitesOption = Annotated[
    str | None,
    typer.Option(
        "--sites", "--site", metavar="SITE,…", help="Sites instead, such as resid_post.3."
    ),
]
TemplateOption = Annotated[
    str,
    typer.Option(
        metavar="TEMPLATE", help="none: texts as they stand; chat: through the chat template."
    ),
]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, help="Of splits and draws.")]
BatchOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Tokens a batch; default: by device.")
]
MaxTokensOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Cut longer texts on the left.")
]
LimitOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Use only the first rows.")
]

# ---------------------------------------------------------------------------------- commands


@build.command()
@_friendly
def contrast(
    model: ModelArgument,
    pairs: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="Rows with positive and negative (texts or messages), or a shipped set's name.",
        ),
    ],
    out: OutOption,
    method: Annotated[
        str, typer.Option(metavar="METHOD", help="mean, pca, pca_centred or logistic.")
    ] = "mean",
    component: ComponentOption = "residual",
    position: Annotated[
        str, typer.Option(metavar="TOKENS", help="last, first, mean or all of each text.")
    ] = "last",
    layers: LayersOption = None,
    sites: SitesOption = None,
    template: TemplateOption = "none",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    batch_tokens: BatchOption = None,
    max_tokens: MaxTokensOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """From pairs of texts with and without a property (contrastive activation addition)."""
    _require_new(out, force)
    from dsteer.data.contrast import load_contrast
    from dsteer.steering.build import contrast as build_contrast

    where = _where(component, layers, sites)
    found = load_contrast(pairs)[:limit]
    loaded, tokenizer = open_model(model, dtype, device, trust_remote_code=trust_remote_code)
    vectors = build_contrast(
        loaded,
        tokenizer,
        found,
        method=method,
        position=position,
        template=template,
        seed=seed,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        reporter=_reporter(quiet),
        **where,
    )
    best = _best_separated(vectors)
    why = "tells the two sides apart best, held out"
    _finish(vectors, out, _SEPARATED, next_step=_steer(model, out, vectors, best), why=why)


@build.command()
@_friendly
def prefix(
    model: ModelArgument,
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts: .txt, .jsonl, .csv, or preference pairs.")
    ],
    out: OutOption,
    prefix: Annotated[
        list[str] | None,
        typer.Option("--prefix", metavar="TEXT", help="An instruction; again for more."),
    ] = None,
    prefixes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="One a line (.txt), or rows with prefix and, if there are kinds, category.",
        ),
    ] = None,
    separator: Annotated[
        str, typer.Option(metavar="TEXT", help="Between prefix and prompt.")
    ] = " ",
    samples: Annotated[
        int, typer.Option(metavar="K", help="Prefixes (and answers) drawn for each prompt.")
    ] = 1,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Read each sample with so long an answer of its own.")
    ] = 0,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of these answers.")] = 1.0,
    unnormalised: Annotated[
        bool, typer.Option("--unnormalised", help="Categories keep the size of their shift.")
    ] = False,
    direction: Annotated[
        str, typer.Option(metavar="WAY", help="to_plain or to_prefixed.")
    ] = "to_plain",
    position: Annotated[str, typer.Option(metavar="TOKENS", help="mean or last.")] = "mean",
    component: ComponentOption = "residual",
    layers: LayersOption = None,
    sites: SitesOption = None,
    template: TemplateOption = "none",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    batch_tokens: BatchOption = None,
    max_tokens: MaxTokensOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """From the same prompts with and without an instruction in front."""
    _require_new(out, force)
    from dsteer.steering.prefix import prefix_contrast

    if (prefixes is None) == (not prefix):
        raise ConfigError("expected one of --prefix TEXT (again for more) and --prefixes FILE")
    where = _where(component, layers, sites)
    kinds = prefix or _read_prefixes(str(prefixes))
    asked = _read_prompts(prompts, limit)
    loaded, tokenizer = open_model(model, dtype, device, trust_remote_code=trust_remote_code)
    vectors = prefix_contrast(
        loaded,
        tokenizer,
        asked,
        kinds,
        separator=separator,
        samples=samples,
        new_tokens=new_tokens,
        temperature=temperature,
        normalise=None if unnormalised else "unit",
        direction=direction,
        position=position,
        template=template,
        seed=seed,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        reporter=_reporter(quiet),
        **where,
    )
    best = _best_separated(vectors)
    why = "tells plain from prefixed prompts best, held out"
    _finish(vectors, out, _SEPARATED, next_step=_steer(model, out, vectors, best), why=why)


@build.command()
@_friendly
def refusal(
    model: ModelArgument,
    harmful: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts that the model refuses: your own.")
    ],
    harmless: Annotated[str, typer.Option(metavar="FILE", help="Prompts that it answers.")],
    out: OutOption,
    validation: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the prompts, left out to choose on.")
    ] = 0.25,
    refusal_token: Annotated[
        list[str] | None,
        typer.Option(
            "--refusal-token",
            metavar="TEXT",
            help="What its refusals begin with, one token; again for more; default: I, As, …",
        ),
    ] = None,
    positions: Annotated[
        int, typer.Option(metavar="N", help="Last tokens of the prompt with candidates.")
    ] = 1,
    max_kl: Annotated[
        float, typer.Option(metavar="NATS", help="Most that harmless prompts may change.")
    ] = 0.1,
    layers: LayersOption = None,
    template: TemplateOption = "none",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    batch_tokens: BatchOption = None,
    max_tokens: MaxTokensOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """The direction along which it refuses, chosen on prompts that it was not fitted on."""
    _require_new(out, force)
    from dsteer.steering.refusal import REFUSAL_WORDS, refusal_direction

    blocks = None if layers is None else _layers(layers)
    bad, good = _read_prompts(harmful, limit), _read_prompts(harmless, limit)
    loaded, tokenizer = open_model(model, dtype, device, trust_remote_code=trust_remote_code)
    vectors = refusal_direction(
        loaded,
        tokenizer,
        bad,
        good,
        validation=validation,
        refusal_tokens=refusal_token or REFUSAL_WORDS,
        layers=blocks,
        positions=positions,
        max_kl=max_kl,
        template=template,
        seed=seed,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        reporter=_reporter(quiet),
    )
    told = vectors.metadata
    plain: Any = told["plain"]
    chosen: Any = told["chosen"]
    _finish(
        vectors,
        out,
        _CHOSEN,
        next_step=None if chosen is None else _steer(model, out, vectors, chosen),
        why=str(told["chosen_note"]),
        before=f"refusal score as it is: harmful {plain['harmful']:.3g}, harmless "
        f"{plain['harmless']:.3g}",
    )
    if chosen is None:
        _say(f"no site is chosen: {told['chosen_note']}")


@build.command()
@_friendly
def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder or file.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Likewise, or an adapter.")],
    data: DataOption,
    out: OutOption,
    directions: Annotated[
        int,
        typer.Option(
            metavar="K", min=0, help="Principal directions instead of the mean, one file each."
        ),
    ] = 0,
    centred: Annotated[
        bool, typer.Option("--centred", help="Of directions: take the mean shift off first.")
    ] = False,
    position: Annotated[
        str, typer.Option(metavar="POSITION", help="prompt_last, prompt_mean, response_last, …")
    ] = "prompt_last",
    sites: SitesOption = None,
    template: TemplateOption = "none",
    limit: LimitOption = None,
    batch_tokens: BatchOption = None,
    max_tokens: MaxTokensOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """The mean difference of two models' states, v*, or its principal directions."""
    import tempfile
    from typing import cast, get_args

    from dsteer.config import DType
    from dsteer.pipeline import require_local

    if centred and not directions:
        raise ConfigError("--centred without --directions K: the mean can't be taken off itself")
    numbers = range(1, directions + 1)
    files = [out] if directions < 2 else [out.with_suffix(f".{j}{out.suffix}") for j in numbers]
    for path in files:
        _require_new(path, force)
    for name, value in (("BASE", base), ("TUNED", tuned)):
        require_local(name, value)
    dtype = dtype or dtype_for(device)
    if dtype not in get_args(DType):
        raise ConfigError(f"--dtype {dtype}: no such dtype; known: {', '.join(get_args(DType))}")
    prompts = _read_prompts(data, limit)
    from dsteer.activations.extract import extract
    from dsteer.models.pair import ModelPair

    pair = ModelPair.load(
        base,
        tuned,
        dtype=cast("DType", dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with tempfile.TemporaryDirectory(prefix="dsteer-") as folder:
        acts = extract(
            pair,
            prompts,
            sites=_names(sites) if sites else "all",
            position=position,
            template=template,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            folder=Path(folder),
            reporter=_reporter(quiet),
        )
        built = _differences(pair, acts, directions, centred)
    columns = _DIRECTIONS if directions else _DIFFERENCES
    for number, (vectors, path) in enumerate(zip(built, files, strict=True)):
        last = number == len(built) - 1
        step = f"dsteer vectors {' '.join(shlex.quote(str(file)) for file in files)}"
        _finish(vectors, path, columns, next_step=step if last else None)


# ---------------------------------------------------------------------------------- inputs


def _reporter(quiet: bool) -> Any:
    from dsteer.progress import Reporter

    return Reporter("quiet" if quiet else "auto")


def _require_new(out: Path, force: bool) -> None:
    """Refuse a path that can't take the vectors, before any work."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a file whose name ends in .safetensors")
    if out.is_dir():
        raise StoreError(f"--out {out}: a folder; expected the path of a file")
    if out.exists() and not force:
        raise StoreError(f"--out {out}: is there already; give another name, or --force")


def _where(component: str, layers: str | None, sites: str | None) -> dict[str, Any]:
    if layers is not None and sites is not None:
        raise ConfigError(f"--layers {layers} and --sites {sites}: give one of both")
    found: dict[str, Any] = {"component": component}
    if layers is not None:
        found["layers"] = _layers(layers)
    if sites is not None:
        found["sites"] = _names(sites)
    return found


def _names(sites: str) -> str | list[str]:
    names = [name.strip() for name in sites.split(",") if name.strip()]
    return "all" if names == ["all"] else names


def _layers(text: str) -> list[int]:
    """``3,5-8`` as [3, 5, 6, 7, 8]."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--layers {text}: expected blocks from 0, such as 3 or 3,5-8")
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise ConfigError(f"--layers {text}: no block in it; expected such as 3 or 3,5-8")
    return found


def _read_prompts(path: str, limit: int | None) -> list[PreferencePair]:
    from dsteer.compare import HH, SYNTHETIC
    from dsteer.config import SyntheticSource
    from dsteer.data.sources import load_preferences, read_source
    from dsteer.pipeline import require_local

    if path == SYNTHETIC:
        source = SyntheticSource(format="synthetic", conversations=limit or 500)
        return read_source(source).pairs
    require_local("prompts", path)
    if path == HH:
        return load_preferences(path, subset="harmless-base", split="test", limit=limit)
    return load_preferences(path, limit=limit)


def _read_prefixes(path: str) -> dict[str, list[str]]:
    """Category → prefixes of a file; of one without categories, under its one name."""
    from dsteer.data.tables import read_rows
    from dsteer.pipeline import require_local

    require_local("--prefixes", path)
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        plain = row.source.endswith((".txt", ".txt.gz"))
        text = row.text("prompt" if plain else "prefix")
        if not text.strip():
            if plain:
                continue
            raise row.error("'prefix' is empty")
        kind = "prefix" if "category" not in row.columns else row.text("category")
        found.setdefault(kind, []).append(text)
    if not found:
        raise DataError(f"{path}: no prefix in it; expected one a line, or rows with 'prefix'")
    return found


def _differences(
    pair: Any, acts: Any, directions: int, centred: bool
) -> Sequence[SteeringVectorSet]:
    """v* or its principal directions, with what is known of models, data and sizes."""
    from dsteer.activations.sites import component_of
    from dsteer.geometry.alignment import cosine_to_mean
    from dsteer.steering.build import mean_difference, principal_directions
    from dsteer.steering.provenance import of_model
    from dsteer.steering.states import PART_OF
    from dsteer.steering.vector import SteeringVector, SteeringVectorSet

    sizes = {site: float(acts.base[site].double().norm(dim=1).mean()) for site in acts.sites}
    with pair.using("base") as model:
        known = of_model(model)
    with pair.using("tuned") as model:
        known |= {f"tuned_{key}": value for key, value in of_model(model).items()}
    parts = sorted({PART_OF[component_of(site)] for site in acts.sites})
    known |= {"component": ", ".join(parts), "data_sha256": _hash_of(acts)}
    if directions:
        found = principal_directions(acts, directions, centred=centred)
    else:
        found = (mean_difference(acts),)
        known |= {"method": "model difference", "units": "states"}
        known |= {"direction": "from base to tuned"}
    built = []
    for vectors in found:
        own = []
        for site, vector in vectors.items():
            told = {"norm": vector.norm, "mean_state_norm": sizes[site], **vector.metadata}
            if not directions:
                cosines = cosine_to_mean(acts.displacement(site), "leave_one_out")
                told["cosine"] = _mean(cosines.tolist())
            own.append(SteeringVector(vector.tensor, site, **told))
        built.append(SteeringVectorSet(own, {**known, **vectors.metadata}))
    return built


def _hash_of(acts: Any) -> str:
    from dsteer.data.tokens import hash_ids

    return hash_ids(acts.encoded)


def _mean(values: list[float]) -> float | None:
    import math

    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else None


# ---------------------------------------------------------------------------------- the end

Column = Callable[["SteeringVector"], Any]


def _relative(vector: SteeringVector) -> float | None:
    size: Any = vector.metadata.get("mean_state_norm")
    return vector.norm / size if size else None


def _of(key: str) -> Column:
    return lambda vector: vector.metadata.get(key)


_SIZES: Mapping[str, Column] = {"norm": lambda v: v.norm, "of state": _relative}
_SEPARATED: Mapping[str, Column] = {
    **_SIZES,
    "gap": _of("gap"),
    "accuracy": _of("accuracy"),
    "Cohen's d": _of("cohens_d"),
}
_CHOSEN: Mapping[str, Column] = {
    **_SIZES,
    "bypass": _of("bypass"),
    "induce": _of("induce"),
    "KL": _of("kl"),
    "eligible": _of("eligible"),
}
_DIFFERENCES: Mapping[str, Column] = {**_SIZES, "cosine": _of("cosine")}
_DIRECTIONS: Mapping[str, Column] = {"σ": _of("singular_value"), "share": _of("share")}


def _best_separated(vectors: SteeringVectorSet) -> str | None:
    """The site in the blocks that separates best held out; the earlier of two that are alike."""
    from dsteer.activations.sites import block_of

    known = {
        site: (vector.metadata["accuracy"], vector.metadata["cohens_d"] or 0.0)
        for site, vector in vectors.items()
        if block_of(site) is not None and vector.metadata["accuracy"] is not None
    }
    return max(known, key=lambda site: known[site]) if known else None  # type: ignore[type-var]


def _steer(model: str, out: Path, vectors: SteeringVectorSet, site: str | None) -> str:
    """The command that shifts states by the whole gap between both sides."""
    at, strength = "", 1.0
    if site is not None:
        at = f" --site {site}"
        gap: Any = vectors[site].metadata.get("gap")
        strength = gap / vectors[site].norm if gap else strength
    return (
        f"dsteer steer {shlex.quote(model)} --vector {shlex.quote(str(out))}{at} "
        f'--strength {strength:.3g} --prompt "…"'
    )


def _finish(
    vectors: SteeringVectorSet,
    out: Path,
    columns: Mapping[str, Column],
    *,
    next_step: str | None,
    why: str | None = None,
    before: str | None = None,
) -> None:
    """Write the vectors, and print what they are and what to do with them."""
    vectors.save(out)
    told = vectors.metadata
    _say(f"{told['method']}, {told['position']} → {out}")
    if before is not None:
        _say(f"  {before}")
    rows = [["site", *columns]]
    rows += [[site, *(_cell(read(v)) for read in columns.values())] for site, v in vectors.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        _say("  " + "  ".join(cells))
    cut: Any = told.get("truncated")
    if cut:
        _say(f"{cut} texts were cut on the left: they are longer than the model takes")
    if next_step is not None:
        _say(f"next: {next_step}" + (f"   ({why})" if why else ""))


def _cell(value: Any) -> str:
    if value is None:
        return "undefined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}"
