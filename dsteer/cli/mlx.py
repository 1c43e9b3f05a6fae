"""``dsteer steer --backend mlx``: prompts continued by a model that mlx-lm runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsteer.cli.dials import parse_positions, parse_schedule, place_dials
from dsteer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dsteer.data.types import Prompt
    from dsteer.steering.answer import Answer
    from dsteer.steering.dials import Dial
    from dsteer.steering.vector import SteeringVectorSet


def refuse(options: Mapping[str, object]) -> None:
    """Refuse options that MLX models lack, where they are given.

    Raises:
        ConfigError: the first that is.
    """
    for option, given in options.items():
        if given:
            raise ConfigError(f"{option}: not with --backend mlx; leave it out, or use torch")


def open_model(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Raises:
        MissingExtraError: mlx-lm is not installed.
        ConfigError: a path where nothing is.
        ModelError: mlx-lm can't load it.
    """
    import dsteer.mlx
    from dsteer.names import split_revision
    from dsteer.pipeline import require_local

    require_local("MODEL", name)
    return dsteer.mlx.load(*split_revision(name))


def make_dials(
    model: Any,
    name: str,
    sets: Mapping[str, SteeringVectorSet],
    strengths: Mapping[str, float],
    sites: Sequence[str] | None,
    layer: int | None,
) -> dict[str, Dial]:
    """Dials of a model as the options say.

    Raises:
        ConfigError: options that can't be followed.
        ModelError: vectors that are of another model.
    """
    from dsteer.activations.sites import resolve_sites
    from dsteer.mlx.anatomy import Anatomy
    from dsteer.steering.provenance import require_like

    anatomy = Anatomy.of(model)
    dials = place_dials(sets, strengths, sites, layer, _only_site)
    for dial in dials:
        require_like(dial.vectors, anatomy.about(), name)
        resolve_sites(dial.site, anatomy.n_blocks)
        anatomy.site(dial.site)
    return {dial.name: dial for dial in dials}


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    dials: Mapping[str, Dial],
    rows: Sequence[Mapping[str, float]],
    *,
    wanted: int | None,
    default: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    guidance: float | None,
    template: bool,
    positions: str,
    schedule: str | None,
) -> list[list[Answer]]:
    """``[prompt][row]``, with the draws of a transformers model.

    Args:
        model: what :func:`open_model` returns.
        tokenizer: likewise.
        prompts: texts or message lists.
        dials: what it is steered by.
        rows: strengths.
        wanted: new tokens at most; None: the default, or half of what the model was made for.
        default: new tokens where nothing is said.
        temperature, top_p, seed, stop: see :class:`dsteer.steering.decode.Decoding`.
        guidance: w, see :func:`dsteer.mlx.guide`.
        template: whether texts go through the chat template.
        positions: the option.
        schedule: the option.

    Raises:
        DataError: no prompts, or one that is too long for the model.
        DsteerError: as :func:`dsteer.mlx.steer`.
    """
    from dsteer.mlx.anatomy import Anatomy
    from dsteer.mlx.generate import answer
    from dsteer.mlx.load import encode_prompts
    from dsteer.progress import Reporter
    from dsteer.steering.decode import Decoding
    from dsteer.steering.intervene import Intervention

    anatomy = Anatomy.of(model)
    limit, new = anatomy.max_positions, wanted
    if new is None:
        new = default if limit is None else max(1, min(default, limit // 2))
    Decoding(new, temperature, top_p, seed, stop)  # raises before any prompt is read
    where, how = parse_positions(positions), parse_schedule(schedule)
    encoded = encode_prompts(tokenizer, prompts, anatomy, template="chat" if template else "none")
    for item in encoded:
        if limit is not None and len(item.ids) + new > limit:
            raise DataError(
                f"a prompt of {len(item.ids)} tokens and {new} new ones exceed the {limit} that "
                "the model was made for; shorten the prompt or ask for fewer new tokens"
            )
    found: list[list[Answer]] = []
    with Reporter().bar("decoding", len(encoded), unit="prompts") as advance:
        for number, item in enumerate(encoded):
            found.append([])
            for row in rows:
                acting = [
                    Intervention(
                        dial.site, dial.vector, strength=row[name], positions=where, schedule=how
                    )
                    for name, dial in dials.items()
                    if row[name]
                ]
                found[-1].append(
                    answer(
                        model,
                        tokenizer,
                        item,
                        acting or None,
                        guidance=guidance if acting else None,
                        stop=stop,
                        max_new_tokens=new,
                        temperature=temperature,
                        top_p=top_p,
                        seed=seed,
                        number=number,
                    )
                )
            advance(1)
    return found


def _only_site(vectors: SteeringVectorSet, name: str) -> str:
    if len(vectors) > 1:
        raise ConfigError(
            f"{name}: it holds vectors at {len(vectors)} sites ({', '.join(vectors)}); choose one "
            "by --site"
        )
    return next(iter(vectors))
