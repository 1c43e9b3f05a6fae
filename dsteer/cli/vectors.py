"""``dsteer vectors``: what files of steering vectors hold."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from dsteer.cli import _friendly, app
from dsteer.cli.dials import read_vectors


@app.command()
@_friendly
def vectors(
    files: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FILE…", help="Files of steering vectors.")
    ],
    site: Annotated[
        str | None, typer.Option("--site", metavar="SITE", help="This site alone; default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what files of steering vectors hold: provenance, norms, and cosines between them."""
    from dsteer.steering.overview import overview
    from dsteer.store import to_json

    found = overview(read_vectors(files), site)
    if as_json:
        print(to_json(found).rstrip())  # noqa: T201
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    from dsteer.cli.text import number_tables, table

    console = Console(highlight=False)
    sets, pairs = found["sets"], found["cosines"]
    for name, one in sets.items():
        facts = {"width": one["width"], "sites": len(one["sites"]), **one["metadata"]}
        rows = [(key, _value(value)) for key, value in facts.items() if value is not None]
        console.print(table((name, ""), rows))
    sites = found["sites"]
    known = {
        name: any(_relative(one, site) is not None for site in sites) for name, one in sets.items()
    }
    head = ["norm"]
    for name in sets:
        head += [name, *(["÷ ‖h‖"] if known[name] else [])]
    norms = []
    for site in sites:
        row = [site]
        for name, one in sets.items():
            row.append(_number(one["sites"].get(site, {}).get("norm"), ".4g"))
            row += [_number(_relative(one, site), ".3g")] if known[name] else []
        norms.append(row)
    console.print(*number_tables(console, head, norms))
    if not pairs:
        return
    cosine = {(pair["a"], pair["b"]): pair["mean"] for pair in pairs}
    shared = [site for site in sites if any(site in pair["by_site"] for pair in pairs)]
    label = f"cosine at {shared[0]}" if len(shared) == 1 else "mean cosine"
    matrix = [
        [a, *(_number(1.0 if a == b else cosine.get((a, b), cosine.get((b, a)))) for b in sets)]
        for a in sets
    ]
    console.print(*number_tables(console, (label, *sets), matrix))
    if len(shared) > 1:
        head = ["cosine at", *(f"{pair['a']} · {pair['b']}" for pair in pairs)]
        by_site = [
            [site, *(_number(pair["by_site"].get(site)) for pair in pairs)] for site in shared
        ]
        console.print(*number_tables(console, head, by_site))
    for pair in pairs:
        if pair["note"]:
            console.print(f"{pair['a']} · {pair['b']}: no cosine ({pair['note']})", markup=False)


def _relative(one: dict[str, Any], site: str) -> float | None:
    value: float | None = one["sites"].get(site, {}).get("relative_norm")
    return value


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else f"{value:{form}}"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] + "…" if re.fullmatch("[0-9a-f]{40,}", value) else value  # a hash
    return json.dumps(value, ensure_ascii=False)
