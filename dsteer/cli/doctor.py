"""``dsteer doctor``: print how dsteer sees a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsteer.errors import ConfigError, MeasurementError, did_you_mean

if TYPE_CHECKING:
    from dsteer.doctor import Check, Diagnosis


def doctor(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, or a folder of a model or an adapter.")
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Hub commit, tag or branch.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that the model brings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how dsteer sees a model, and whether reading and steering it pass a self-test."""
    from typing import cast, get_args

    from dsteer.config import DType

    if dtype not in get_args(DType):
        raise ConfigError(f"--dtype {dtype}: no such dtype{did_you_mean(dtype, get_args(DType))}")
    from dsteer.names import is_local
    from dsteer.pipeline import require_local

    require_local("MODEL", model)
    if revision is not None and is_local(model):
        raise ConfigError(
            f"--revision {revision}: {model} is a local path, which has no revisions; drop it"
        )
    from dsteer.doctor import diagnose
    from dsteer.store import to_json

    found = diagnose(
        model,
        revision=revision,
        dtype=cast("DType", dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    print(to_json(found.as_json()).rstrip() if as_json else "\n".join(_lines(found)))  # noqa: T201
    failed = [check.name for check in found.checks if not check.passed]
    if failed:
        raise MeasurementError(
            f"{model}: {len(failed)} of {len(found.checks)} checks failed ({', '.join(failed)}); "
            "expected all to pass, so don't trust what dsteer measures on this model"
        )


def _lines(found: Diagnosis) -> list[str]:
    facts = found.facts
    blocks, head, tokenizer = facts["blocks"], facts["head"], facts["tokenizer"]
    rows = [
        ("model", _at(facts["model"], facts["revision"])),
        ("class", f"{facts['class']} ({facts['type']})"),
        ("adapter", facts["adapter"] or "none"),
        ("blocks", f"{blocks['count']} × {' | '.join(blocks['classes'])} at {blocks['path']}"),
        ("", f"each returns {facts['block_returns'] or 'what could not be read'}"),
        ("width", facts["width"]),
        ("vocabulary", facts["vocabulary"]),
        ("final norm", f"{facts['final_norm']['class']} at {facts['final_norm']['path']}"),
        ("embeddings", "tied" if facts["tied_embeddings"] else "not tied"),
        ("head", _head(head)),
        ("positions", facts["max_positions"] or "no limit known"),
        *_tokenizer(tokenizer),
        ("weights", f"{facts['parameters']:,} parameters, {facts['dtype']}, {facts['device']}"),
        ("padding", _padding(facts["right_padding_unseen"])),
        ("decoding", "fast path" if facts["decoding"]["fast"] else facts["decoding"]["note"]),
    ]
    shown = [f"{name:12} {value}" for name, value in rows]
    return [*shown, "self-test", *map(_check, found.checks)]


def _at(name: str, revision: str | None) -> str:
    return f"{name} at revision {revision}" if revision else name


def _head(head: dict[str, Any]) -> str:
    where = f"{head['class']} at {head['path']}" if "class" in head else ""
    if "trouble" in head:
        return f"{where}: {head['trouble']}".removeprefix(": ")
    scale = f", logits × {head['logit_scale']:g}" if head["logit_scale"] != 1 else ""
    cap = f", soft cap {head['soft_cap']:g}" if head["soft_cap"] is not None else ", no soft cap"
    return f"{where}{', with a bias' if head['bias'] else ''}{scale}{cap}"


def _tokenizer(tokenizer: dict[str, Any] | None) -> list[tuple[str, str]]:
    if tokenizer is None or "missing" in tokenizer:
        why = "" if tokenizer is None else f": {tokenizer['missing']}"
        return [("tokenizer", f"none, so random ids are read{why}")]
    named = ", ".join(f"{kind.upper()} {tokenizer[kind]!r}" for kind in ("bos", "eos", "pad"))
    template = tokenizer["template"]
    return [
        ("tokenizer", f"{tokenizer['class']}, {tokenizer['size']} tokens, {named}"),
        ("template", "none" if template is None else template[:80]),
    ]


def _padding(unseen: bool | None) -> str:
    if unseen is None:
        return "not tried"
    if unseen:
        return "on the right is not seen by real tokens, so prompts share batches"
    return "on the right is seen by real tokens, so only prompts of one length share batches"


def _check(check: Check) -> str:
    verdict = "pass" if check.passed else "FAIL"
    if check.error is None:
        return f"  {verdict}  {check.name:8} {'–':>7}{'':9} {check.what} ({check.trouble})"
    sign = ">" if check.at_least else "≤"
    error = f"{check.error:.1e}" if check.error else "0"
    bound = f"{check.bound:.0e}" if check.bound else "0"
    return f"  {verdict}  {check.name:8} {error:>7} {sign} {bound:6} {check.what}"
