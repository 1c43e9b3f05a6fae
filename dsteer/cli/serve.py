"""``dsteer serve``: a steered model for clients of OpenAI's API."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from dsteer.cli import _friendly, _say, app
from dsteer.cli.dials import (
    LayerOption,
    PositionsOption,
    ScheduleOption,
    SiteOption,
    VectorOption,
    make_dials,
    read_strengths,
    read_vectors,
)
from dsteer.cli.models import DeviceOption, DtypeOption, ModelArgument, TrustOption, open_model
from dsteer.errors import ConfigError, MissingExtraError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@app.command()
@_friendly
def serve(
    model: ModelArgument,
    vector: VectorOption,
    strength: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]λ", help="Where a request says nothing. Default 0: the model as it is."
        ),
    ] = None,
    site: SiteOption = None,
    layer: LayerOption = None,
    positions: PositionsOption = "all",
    schedule: ScheduleOption = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="DSTEER_API_KEY",
            help="Requests must carry it.",
            show_envvar=True,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the model; default: after MODEL.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Where a request sets no max_tokens.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="Where a request sets none.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", min=0, max=1, help="Where a request sets none.")
    ] = 1.0,
    waiting: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests that may wait; more get a 503.")
    ] = 16,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Serve a model at an OpenAI-compatible endpoint; requests set strengths by "steering"."""
    if not all(map(find_spec, ("fastapi", "uvicorn"))):
        raise MissingExtraError("serve", "dsteer serve")
    if api_key == "":
        raise ConfigError(
            "--api-key (or DSTEER_API_KEY) is empty; expected a key, or leave it out for none"
        )
    sets = read_vectors(vector)
    rows = read_strengths(strength, list(sets), 0.0)
    from dsteer.steering.decode import Decoding

    if len(rows) > 1:
        raise ConfigError(f"--strength gives {len(rows)} combinations; expected one value a vector")
    Decoding(max_new_tokens, temperature, top_p)  # raises where requests could not be followed
    loaded, tokenizer = open_model(model, dtype, device, trust_remote_code=trust_remote_code)
    from dsteer.names import is_local, telling_parts
    from dsteer.serving.app import listen, make_app, run
    from dsteer.serving.engine import Engine
    from dsteer.serving.protocol import Defaults

    dials = make_dials(
        loaded, sets, rows[0], sites=site, layer=layer, positions=positions, schedule=schedule
    )
    name = name or (telling_parts(model)[-1] if is_local(model) else model)
    defaults = Defaults(max_new_tokens, temperature, top_p)
    with listen(host, port) as listening:
        engine = Engine(loaded, tokenizer, dials, waiting)
        application = make_app(engine, name, defaults=defaults, api_key=api_key)
        if host not in _LOOPBACK:
            guard = "with the key alone" if api_key else "and there is no --api-key"
            print(  # noqa: T201
                f"dsteer: --host {host}: other machines can reach this server, {guard}",
                file=sys.stderr,
            )
        shown = f"[{host}]" if ":" in host else host
        _say(f"{name} at http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C ends it)")
        for dial in dials.values():
            _say(f"  {dial.name} at {dial.site}, strength {dial.strength:g} by default")
        sys.stdout.flush()
        try:
            run(application, listening)
        finally:
            engine.close()  # a second Ctrl-C leaves without that
    _say("stopped")
