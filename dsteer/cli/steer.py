"""``dsteer steer``: text from a steered model, of prompts or in a conversation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dsteer.cli import _friendly, app, mlx
from dsteer.cli.dials import (
    LayerOption,
    PositionsOption,
    ScheduleOption,
    SiteOption,
    VectorOption,
    make_dials,
    parse_positions,
    read_strengths,
    read_vectors,
)
from dsteer.cli.models import DeviceOption, DtypeOption, ModelArgument, TrustOption, open_model
from dsteer.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from dsteer.data.tokens import Tokenizer
    from dsteer.data.types import Prompt
    from dsteer.models.load import Model
    from dsteer.steering.answer import Answer
    from dsteer.steering.dials import Dial, Measure
    from dsteer.steering.vector import SteeringVector

_BACKENDS = ("torch", "mlx")
_NEW_TOKENS = {"prompts": 64, "chat": 256}
"""New tokens at most, where nothing is said; at most half of what the model was made for."""


@app.command()
@_friendly
def steer(
    model: ModelArgument,
    vector: VectorOption,
    strength: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]λ[,λ…]", help="In units of the vector; several: a table. Default 1."
        ),
    ] = None,
    units: Annotated[
        str,
        typer.Option(
            metavar="UNITS",
            help="Of strengths: v, residual (mean norms of the states) or kl (nats, at the 95th "
            "percentile).",
        ),
    ] = "v",
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts by which units are measured; default: those that are continued.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="W", help="Guide by W times the difference that steering makes to the logits."
        ),
    ] = None,
    site: SiteOption = None,
    layer: LayerOption = None,
    positions: PositionsOption = "all",
    schedule: ScheduleOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt; again for more.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts: .txt, .jsonl, .csv, or preference pairs."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the model.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Plain and steered side by side.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message; needs a chat template.")
    ] = None,
    template: Annotated[
        bool, typer.Option("--template", help="Put prompts through the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Default: 64, in a conversation 256.")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of sampling.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="Ends a text; again for more."),
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="torch, or mlx for models that mlx-lm runs.")
    ] = "torch",
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Steer a model by one vector or several: continue prompts, or talk with it (--chat)."""
    _require_one_source(prompt, prompts, chat)
    if backend not in _BACKENDS:
        raise ConfigError(f"--backend {backend}: no such backend{did_you_mean(backend, _BACKENDS)}")
    if backend == "mlx":
        mlx.refuse(
            {
                "--chat": chat,
                "--units": units != "v",
                "--measure": measure,
                "--dtype": dtype,
                "--device": device != "auto",
                "--trust-remote-code": trust_remote_code,
            }
        )
    sets = read_vectors(vector)
    rows = read_strengths(strength, list(sets), 1.0)
    if chat and len(rows) > 1:
        raise ConfigError(
            f"--chat with {len(rows)} strengths: expected one; /strength changes it in the chat"
        )
    if chat and as_json:
        raise ConfigError("--json beside --chat, which prints a conversation; drop one of them")
    asked = [] if chat else _read_prompts(prompt or [], prompts)
    measured = asked if measure is None else _read_prompts([], measure)
    if units != "v" and not measured:
        raise ConfigError(
            f"--units {units} beside --chat: give prompts to measure by, --measure FILE"
        )
    if backend == "mlx":
        on_mlx, its_tokenizer = mlx.open_model(model)
        by_name = mlx.make_dials(on_mlx, model, sets, rows[0], site, layer)
        if system is not None:
            _require_template(its_tokenizer)
            asked = [_with_system(system, item) for item in asked]
        rows = [*([dict.fromkeys(sets, 0.0)] if compare else []), *rows]
        texts = mlx.answers(
            on_mlx,
            its_tokenizer,
            asked,
            by_name,
            rows,
            wanted=max_new_tokens,
            default=_NEW_TOKENS["prompts"],
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            guidance=guidance,
            template=template,
            positions=positions,
            schedule=schedule,
        )
        head: dict[str, Any] = {"units": units, "guidance": guidance}
        _print(by_name, rows, head, asked, rows, texts, compare=compare, as_json=as_json)
        return
    loaded, tokenizer = open_model(model, dtype, device, trust_remote_code=trust_remote_code)
    from dsteer.steering.decode import Decoding

    dials = make_dials(
        loaded,
        sets,
        rows[0],
        sites=site,
        layer=layer,
        positions=positions,
        schedule=schedule,
        measure=_measure(units, loaded, tokenizer, measured, positions, template),
    )
    new = max_new_tokens
    if new is None:
        new = _room(loaded, _NEW_TOKENS["chat" if chat else "prompts"])
    decoding = Decoding(new, temperature, top_p, seed, tuple(stop or ()))
    if chat:
        from dsteer.cli.chat import converse
        from dsteer.steering.chat import Chat

        talk = Chat(
            loaded, tokenizer, dials, decoding, guidance=guidance, system=system, compare=compare
        )
        converse(talk)
        return
    from dsteer.data.tokens import encode
    from dsteer.models.seq2seq import is_encoder_decoder
    from dsteer.progress import Reporter
    from dsteer.steering.answer import answers

    if system is not None:
        _require_template(tokenizer)
        asked = [_with_system(system, item) for item in asked]
    encoded = encode(
        tokenizer,
        asked,
        template="chat" if template else "none",
        encoder_decoder=is_encoder_decoder(loaded.config),
    )
    rows = [*([dials.plain] if compare else []), *rows]
    found = answers(
        loaded, tokenizer, encoded, dials, rows, decoding, guidance=guidance, reporter=Reporter()
    )
    head = {"units": units, "guidance": guidance}
    lambdas = [dials.lambdas(row) for row in rows]
    _print(dials, lambdas, head, asked, rows, found, compare=compare, as_json=as_json)


def _require_one_source(prompt: list[str] | None, prompts: str | None, chat: bool) -> None:
    given = [
        name
        for name, value in (("--prompt", prompt), ("--prompts", prompts), ("--chat", chat))
        if value
    ]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given) or 'nothing to answer'}: expected one of --prompt TEXT (again "
            "for more), --prompts FILE and --chat"
        )


def _read_prompts(given: list[str], file: str | None) -> list[Prompt]:
    if file is None:
        return list(given)
    from dsteer.data import load_preferences

    return [pair.prompt for pair in load_preferences(file)]


def _measure(
    units: str,
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    positions: str,
    template: bool,
) -> Measure | None:
    """What turns strengths in some units into λ; None for those of the vector."""
    from dsteer.steering.calibrate import Units, strength_in

    if units not in get_args(Units):
        raise ConfigError(f"--units {units}: no such units{did_you_mean(units, get_args(Units))}")
    if units == "v":
        return None

    def measure(vector: SteeringVector, strength: float) -> float:
        return strength_in(
            vector,
            model,
            prompts,
            strength,
            units,
            tokenizer=tokenizer,
            positions=parse_positions(positions),
            template="chat" if template else "none",
        )

    return measure


def _room(model: Model, wanted: int) -> int:
    """So many new tokens, or half of what the model was made for."""
    from dsteer.models.anatomy import max_positions

    limit = max_positions(model.config)
    return wanted if limit is None else max(1, min(wanted, limit // 2))


def _require_template(tokenizer: Tokenizer) -> None:
    from dsteer.data.tokens import has_template

    if not has_template(tokenizer):
        raise ConfigError(
            "--system needs a chat template, which this tokenizer lacks; say it in the prompts"
        )


def _with_system(system: str, prompt: Prompt) -> Prompt:
    from dsteer.data.types import Message

    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    return [Message(role="system", content=system), *turns]


# ---------------------------------------------------------------------------------- output


def _print(
    dials: Mapping[str, Dial],
    lambdas: Sequence[Mapping[str, float]],
    head: Mapping[str, Any],
    prompts: Sequence[Prompt],
    rows: Sequence[Mapping[str, float]],
    found: Sequence[Sequence[Answer]],
    *,
    compare: bool,
    as_json: bool,
) -> None:
    if as_json:
        from dsteer.store import to_json

        said = {**head, **_as_json(dials, lambdas, prompts, rows, found)}
        print(to_json(said).rstrip())  # noqa: T201
    else:
        _show(prompts, rows, found, compare=compare)


def _as_json(
    dials: Mapping[str, Dial],
    lambdas: Sequence[Mapping[str, float]],
    prompts: Sequence[Prompt],
    rows: Sequence[Mapping[str, float]],
    found: Sequence[Sequence[Answer]],
) -> dict[str, Any]:
    return {
        "vectors": [
            {"name": dial.name, "site": dial.site, "norm": dial.vector.norm}
            for dial in dials.values()
        ],
        "prompts": [
            {
                "prompt": prompt,
                "answers": [
                    {
                        "strengths": dict(row),
                        "lambdas": dict(scaled),
                        "text": answer.text,
                        "tokens": len(answer.tokens),
                        "finish": answer.finish,
                    }
                    for row, scaled, answer in zip(rows, lambdas, answers, strict=True)
                ],
            }
            for prompt, answers in zip(prompts, found, strict=True)
        ],
    }


def _show(
    prompts: Sequence[Prompt],
    rows: Sequence[Mapping[str, float]],
    found: Sequence[Sequence[Answer]],
    *,
    compare: bool,
) -> None:
    """Print the continuation alone where there is one, else a table a prompt."""
    from rich.console import Console
    from rich.text import Text

    from dsteer.cli.text import columns, printable, table

    console = Console(highlight=False)
    for prompt, answers in zip(prompts, found, strict=True):
        texts = [printable(answer.text) for answer in answers]
        if len(prompts) > 1:
            console.print(Text(f"› {_short(prompt)}", style="bold"))
        if len(rows) == 1:
            print(texts[0])  # noqa: T201
        elif compare and len(rows) == 2:
            console.print(columns(*texts))
        else:
            plain = [compare and number == 0 for number in range(len(rows))]
            labels = ["plain" if p else _label(row) for p, row in zip(plain, rows, strict=True)]
            console.print(table(("strength", "text"), list(zip(labels, texts, strict=True))))
        if len(prompts) > 1:
            print()  # noqa: T201
    sys.stdout.flush()


def _label(row: Mapping[str, float]) -> str:
    if len(row) == 1:
        return f"{next(iter(row.values())):g}"
    return ", ".join(f"{name} {value:g}" for name, value in row.items())


def _short(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    line = " ".join(text.split())
    return line if len(line) <= 72 else line[:71] + "…"
