"""``dsteer build learned``: a steering vector learned under the DPO loss, the model frozen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from dsteer.cli import _friendly, _say
from dsteer.cli.build import build
from dsteer.cli.compare import DataOption, FormatOption, LimitOption, QuietOption
from dsteer.cli.models import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    TrustOption,
    dtype_for,
    open_model,
)
from dsteer.errors import ConfigError, StoreError, did_you_mean

if TYPE_CHECKING:
    from dsteer.config import DType
    from dsteer.data.types import PreferencePair
    from dsteer.models.load import Model
    from dsteer.models.pair import ModelPair
    from dsteer.progress import Reporter
    from dsteer.steering.intervene import Positions
    from dsteer.steering.vector import SteeringVectorSet


TOKENS = ("all", "prompt", "prompt_last", "generated")
"""What may be steered."""


@build.command()
@_friendly
def learned(
    model: ModelArgument,
    site: Annotated[
        list[str],
        typer.Option(metavar="SITE", help="Where, such as resid_post.6; again for several."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="A .safetensors file.")],
    data: DataOption = "Anthropic/hh-rlhf",
    data_format: FormatOption = None,
    limit: LimitOption = None,
    start: Annotated[
        str,
        typer.Option(
            metavar="START",
            help="zero; vector: v*, averaged from MODEL and --tuned; or a .safetensors file.",
        ),
    ] = "zero",
    tuned: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The tuned model: its reward is shown as the ceiling."),
    ] = None,
    beta: Annotated[float, typer.Option(metavar="β", help="Of the loss.")] = 0.1,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Updates.")] = 100,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Pairs an update.")] = 16,
    learning_rate: Annotated[
        float,
        typer.Option(metavar="R", help="Largest update, as a share of the norm of the states."),
    ] = 0.1,
    max_norm: Annotated[
        float | None, typer.Option(metavar="NORM", help="The largest ‖v‖; default: no bound.")
    ] = None,
    positions: Annotated[
        str, typer.Option(metavar="TOKENS", help="all, prompt, prompt_last or generated.")
    ] = "all",
    max_length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a text.")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of splits and order.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    quiet: QuietOption = False,
) -> None:
    """From preference pairs, under the DPO loss, the model frozen.

    Pairs are split by conversation: learned from fit, stopped on tune, held-out reward on test.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected the name of a .safetensors file")
    if out.exists() and not force:
        raise StoreError(f"{out}: exists already; choose another --out, or replace it by --force")
    if positions not in TOKENS:
        raise ConfigError(
            f"--positions {positions}: no such positions{did_you_mean(positions, TOKENS)}"
        )
    if start == "vector" and tuned is None:
        raise ConfigError("--start vector is v* of a pair of models; give --tuned MODEL too")
    from dsteer.models.pair import ModelPair
    from dsteer.pipeline import require_local
    from dsteer.progress import Reporter
    from dsteer.steering.vector import SteeringVectorSet
    from dsteer.training.steering_vector import learn_vector, reward

    if tuned is not None:
        require_local("--tuned", tuned)
    split = _splits(data, data_format, limit, seed)
    begin: Literal["zero"] | SteeringVectorSet = "zero"
    if start not in {"zero", "vector"}:
        if not Path(start).is_file():
            raise ConfigError(
                f"--start {start}: no such file; expected zero, vector or a .safetensors file"
            )
        begin = SteeringVectorSet.load(start)
    loaded, tokenizer = open_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pair = None
    if tuned is not None:
        pair = ModelPair.load(
            loaded,
            tuned,
            tokenizer=tokenizer,
            dtype=cast("DType", dtype or dtype_for(device)),
            device=device,
            trust_remote_code=trust_remote_code,
        )
    reporter = Reporter("quiet" if quiet else "auto")
    if start == "vector" and pair is not None:
        begin = _v_star(pair, split["fit"], site, reporter)
    steered = cast("Positions", positions)
    vectors = learn_vector(
        loaded,
        tokenizer,
        split["fit"],
        sites=site,
        heldout=split["tune"],
        start=begin,
        beta=beta,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_norm=max_norm,
        positions=steered,
        max_length=max_length,
        seed=seed,
        reporter=reporter,
    )
    vectors.save(out)

    def tell(name: str, policy: SteeringVectorSet | Model) -> None:
        found = reward(
            loaded, tokenizer, split["test"], policy,
            beta=beta, positions=steered, max_length=max_length, seed=seed,
        )  # fmt: skip
        margin, accuracy = found.margin, found.accuracy
        span = "" if margin.low is None else f" [{margin.low:.4g}, {margin.high:.4g}]"
        _say(
            f"  {name:8} reward margin {margin.value:.4g}{span}, preference accuracy "
            f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]"
        )

    norms = ", ".join(f"{name} ‖v‖ {vector.norm:.4g}" for name, vector in vectors.items())
    _say(f"{out}: {norms}; step {vectors.metadata['chosen_step']} of {steps}, chosen on tune")
    _say(f"Held-out reward, {len(split['test'])} test pairs, β = {beta:g}:")
    tell("learned", vectors)
    if isinstance(begin, SteeringVectorSet):
        tell("start", SteeringVectorSet([begin[name] for name in vectors], begin.metadata))
    else:
        _say("  start    reward margin 0: the model as it is")
    if pair is not None:
        with pair.using("tuned") as other:
            tell("tuned", other)


def _splits(
    data: str, data_format: str | None, limit: int | None, seed: int
) -> dict[str, list[PreferencePair]]:
    """Pairs as a pipeline splits them."""
    from pydantic import TypeAdapter

    from dsteer.compare import find_prompts, split_sizes
    from dsteer.config import SPLITS, Source, SplitSizes
    from dsteer.data.sources import read_source
    from dsteer.data.splits import split_pairs
    from dsteer.errors import DataError

    prompts = find_prompts(data, data_format, limit)
    if not prompts.answered:
        raise DataError(
            f"--data {data}: no pair with two answers, and a vector is learned from what is "
            "preferred; give preference pairs"
        )
    pairs = read_source(TypeAdapter(Source).validate_python(dict(prompts.source))).pairs
    sizes = SplitSizes(**split_sizes(prompts.conversations))
    return {
        str(name): some for name, some in split_pairs([(pairs, SPLITS)], sizes, seed).pairs.items()
    }


def _v_star(
    pair: ModelPair, pairs: list[PreferencePair], sites: list[str], reporter: Reporter
) -> SteeringVectorSet:
    """v* of the fit prompts."""
    from dsteer.activations.extract import extract
    from dsteer.steering.build import mean_difference
    from dsteer.steering.vector import SteeringVectorSet

    found = mean_difference(extract(pair, pairs, sites=sites, reporter=reporter))
    return SteeringVectorSet(found.values(), {**found.metadata, "method": "v*"})
