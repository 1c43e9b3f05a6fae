"""The figures, drawn from a stage's result and tensors.

Each function returns one :class:`Drawing`: the figure, and as ``data`` every number in it with the
caption that says what was drawn. An undefined quantity is hatched and named, never drawn as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, MultipleLocator

from dsteer.report.control_figures import control_grid, control_matrix
from dsteer.report.four_way_figures import four_way
from dsteer.report.geometry_figures import (
    fig1a_preference_geometry,
    fig1b_gradients,
    fig1c_clouds,
)
from dsteer.report.groups_figures import group_cosines, group_removal
from dsteer.report.learned_figures import reward_and_kl
from dsteer.report.maps_figures import best_strength, nested_maps
from dsteer.report.nulls_figures import NULL_FIGURES, beside_nulls, pair_and_nulls
from dsteer.report.profile_figures import layer_profile
from dsteer.report.rank_figures import rank_curves
from dsteer.report.reversal_figures import ways_back
from dsteer.report.style import (
    BLUE,
    COLUMN,
    DELTA_H,
    GREEN,
    GREY,
    H_BASE,
    H_TUNED,
    HELD_OUT,
    HELD_OUT_PAIRS,
    IN_SAMPLE,
    INK,
    LEAVE_ONE_OUT,
    NULL,
    PALE,
    SHADES,
    TRAIN,
    VERMILLION,
    WIDE,
    Drawing,
    Mark,
    styled,
)
from dsteer.report.sweep_figures import (
    fig2a_all_metrics,
    fig2a_interpolation,
    fig2b_all_metrics,
    fig2b_inversion,
)
from dsteer.report.transfer_figures import share_of_native
from dsteer.report.values import (
    FINAL_NORM,
    at,
    block,
    count,
    estimate,
    interval,
    is_undefined,
    items,
    mapping,
    number,
    plural,
    point,
    real,
    site_order,
)
from dsteer.store import Json, read_json, read_tensors

Draw = Callable[[dict[str, Json], Path], Drawing | None]

PAPER_COSINE = (0.92, 0.96)
"""Where the paper's cosines peak (arXiv:2512.11838, Fig. 3)."""

_PAPER_BAND: dict[str, Any] = {"facecolor": PALE, "edgecolor": GREY, "lw": 0.8, "ls": ":"}

_CURVES: tuple[tuple[Any, str], ...] = (
    ("-", "o"),
    ("--", "s"),
    ("-.", "v"),
    (":", "^"),
    ((0, (5, 1, 1, 1, 1, 1)), "P"),
)
"""Line and marker of the curves that one panel tells apart."""

_PRINTED_SITES = 12
"""Up to so many sites, heat maps print the value in each cell and curves have error bars."""


def draw(stage: str, folder: Path) -> list[Path]:
    """Redraw the figures of a completed stage.

    Raises:
        StoreError: ``result.json`` or a tensor file is missing or malformed.
    """
    return draw_result(stage, read_json(folder / "result.json"), folder)


def draw_result(stage: str, result: Json, folder: Path) -> list[Path]:
    """Draw the figures of a stage from its result and the tensors in its folder.

    Args:
        stage: the stage; one without figures gives an empty list.
        result: what the stage returns.
        folder: the stage's folder; the files go to ``figures/`` in it.

    Returns:
        The files written: PDF, PNG and JSON of each figure.

    Raises:
        StoreError: a tensor file is missing or malformed.
    """
    written: list[Path] = []
    for function in FIGURES.get(stage, {}).values():
        with styled():
            drawing = function(result, folder)
            if drawing is not None:
                written += drawing.save(folder / "figures")
    return written


# ---------------------------------------------------------------------------------- learning


def base_learning_curve(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Loss of the language-model training of the base, with the loss on held-out text."""
    steps, losses = _series(result.get("curve"), "step", "loss")
    if not steps:
        return None
    heldout = point(result.get("heldout_loss"))
    vocabulary = real(at(result, "architecture", "vocab_size"))
    uniform = math.log(vocabulary) if vocabulary else None
    figure = Figure(figsize=(COLUMN + 1.0, 2.5))
    axes = figure.add_subplot()
    axes.plot(steps, _gaps(losses), color=BLUE, label="train")
    if heldout is not None:
        axes.axhline(heldout, color=VERMILLION, ls="--", lw=1.1)
        _line_label(axes, heldout, f"held-out, at the end: {number(heldout)}", VERMILLION)
    if uniform is not None:
        axes.axhline(uniform, color=GREY, ls=":", lw=1)
        _line_label(axes, uniform, f"uniform guess: ln V = {number(uniform)}", GREY)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_ylim(0, 1.12 * max(v for v in (*losses, heldout, uniform) if v is not None))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    tokens = result.get("tokens_seen")
    seen = f", {plural(tokens, 'token')} seen" if tokens is not None else ""
    axes.set_title(f"Base model as a language model{seen}")
    return Drawing(
        "learning_curve",
        figure,
        {
            "caption": f"Loss of the base model in training{seen}. The dashed line is the loss on "
            "held-out text (tune split) at the end; the dotted line is the loss of a uniform "
            "guess over the vocabulary.",
            "steps": steps,
            "loss": losses,
            "heldout_loss": heldout,
            "uniform_loss": uniform,
        },
    )


def _begin(first: float | None) -> tuple[float, str]:
    """Where the loss begins, in number and words; ln 2 for DPO."""
    if first is None or math.isclose(first, math.log(2), abs_tol=1e-4):
        return math.log(2), "ln 2: no preference learned"
    return first, f"{first:.3g}: before training"


def dpo_learning_curve(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Loss, reward accuracy and reward margin on training and held-out pairs."""
    curve = mapping(result.get("curve"))
    if not items(curve.get("train")) and not items(curve.get("heldout")):
        return None
    panels = (
        ("loss", "training loss (nats)", *_begin(real(result.get("first_loss")))),
        ("reward_accuracy", "reward accuracy", 0.5, "chance"),
        ("reward_margin", "reward margin (nats × β)", 0.0, "no margin"),
    )
    figure = Figure(figsize=(WIDE, 2.6))
    n = at(result, "test", "n")
    data: dict[str, Json] = {"n_test": n, "panels": {}}
    handles: dict[str, Any] = {}
    for axes, (key, label, reference, words) in zip(figure.subplots(1, 3), panels, strict=True):
        shown: dict[str, Json] = {"reference": reference}
        last = 0.0
        for name, mark in (("train", TRAIN), ("heldout", HELD_OUT_PAIRS)):
            steps, values = _series(curve.get(name), "step", key)
            shown[name] = {"steps": steps, key: values}
            if not steps:
                continue
            last = max(last, *steps)
            marker = mark.marker if len(steps) <= 40 else ""
            handles[f"{mark.label} pairs"] = axes.plot(
                steps,
                values,
                color=mark.colour,
                ls=mark.line,
                marker=marker,
                lw=1.0 if name == "train" else 1.5,
            )[0]
        test = estimate(at(result, "test", key))
        if test.value is not None:
            shown["test"] = {"step": last, **test._asdict()}
            handles["test pairs, at the end"] = axes.errorbar(
                [last],
                [test.value],
                yerr=_bars([test.value], [test.low], [test.high]),
                fmt="D",
                ms=5,
                mfc="white",
                color=INK,
                capsize=2.5,
                zorder=5,
            )
        axes.axhline(reference, color=GREY, ls=":", lw=1)
        axes.set_xlabel("training step")
        axes.set_title(label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if key == "reward_accuracy":
            low = min([0.5, *(v for v in _plotted(shown, key) if v is not None)])
            axes.set_ylim(min(0.4, low - 0.05), 1.02)
        else:
            axes.margins(y=0.12)
        _line_label(axes, reference, words, GREY)
        data["panels"][key] = shown
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    ends = [
        f"{label} {interval(at(result, 'test', key))}"
        for key, label in (("reward_accuracy", "reward accuracy"), ("reward_margin", "margin"))
        if point(at(result, "test", key)) is not None
    ]
    at_end = f" On {plural(n, 'test pair')} at the end: {', '.join(ends)}." if ends else ""
    data["caption"] = (
        "DPO training: loss, share of pairs whose chosen answer has the higher implicit reward, "
        "and mean reward margin, on training pairs (dashed) and held-out pairs (solid). Dotted: "
        f"the value of a model that has learned nothing (ln 2, chance, 0).{at_end}"
    )
    return Drawing("learning_curve", figure, data)


# ---------------------------------------------------------------------------------- vector


_TOKENS = {
    "first_token": ("First response token", "prompt"),
    "response": ("All response tokens", "token"),
}
"""Panels of the KL curve, and what N counts in each."""


def kl_recovery(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Share of KL(tuned‖base) that adding λv* at final_norm recovers, over λ."""
    measured = {
        key: mapping(at(result, "kl_recovery", key))
        for key in _TOKENS
        if any(real(s) is not None for s in items(at(result, "kl_recovery", key, "strengths")))
    }
    if not measured:
        return None
    figure = Figure(figsize=(WIDE if len(measured) > 1 else COLUMN + 1.2, 3.1))
    grid = figure.subplots(1, len(measured), squeeze=False, sharey=True)[0]
    shares = [point(v) for panel in measured.values() for v in items(panel.get("recovered"))]
    floor = max(-1.0, min([0.0, *(share for share in shares if share is not None)]))
    handles: dict[str, Any] = {}
    data: dict[str, Json] = {"panels": {}}
    said = []
    for axes, (key, panel) in zip(grid, measured.items(), strict=True):
        title, unit = _TOKENS[key]
        data["panels"][key] = _kl_panel(axes, panel, floor, handles)
        axes.set_title(f"{title}  (N = {plural(panel.get('n'), unit)})")
        said.append(
            f"{title.lower()}: KL(tuned‖base) = {number(point(panel.get('kl_tuned_base')))} nats, "
            f"least KL at λ = {interval(panel.get('optimal_strength'))}"
        )
    grid[0].set_ylim(floor - 0.06 * (1.15 - floor), 1.15)
    grid[0].set_ylabel("share of KL(tuned‖base) recovered")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=3 if len(measured) > 1 else 2,
        columnspacing=1.4,
    )
    data["caption"] = (
        "Share of KL(tuned‖base) that adding λv* to the base at final_norm recovers on test "
        "prompts, over the strength λ (0: no better than the base, 1: equal to the tuned model, "
        f"below 0: farther from it than the base is). {_sentence('; '.join(said))} Vertical lines: "
        "the best strengths, shaded by their intervals. Diamond: the share at the strength that "
        "was chosen on tune prompts."
    )
    return Drawing("kl_recovery", figure, data)


def _kl_panel(
    axes: Axes, panel: dict[str, Json], floor: float, handles: dict[str, Any]
) -> dict[str, Json]:
    """Draw one KL curve, adding to the legend's handles; return what was drawn."""
    strengths = [real(value) for value in items(panel.get("strengths"))]
    values = [estimate(value) for value in items(panel.get("recovered"))]
    known = [strength for strength in strengths if strength is not None]
    pad = 0.04 * (max(known) - min(known)) or 0.5
    left, right = min(known) - pad, max(known) + pad
    axes.set_xlim(left, right)
    axes.set_xlabel("strength λ (units of v*)")
    for y, words in ((0.0, "0: as far as the base"), (1.0, "1: equals the tuned model")):
        axes.axhline(y, color=GREY, ls=":", lw=1)
        _line_label(axes, y, words, GREY, "left")
    drawn: dict[str, Json] = {
        "n": panel.get("n"),
        "strengths": strengths,
        "recovered": [value._asdict() for value in values],
    }
    if all(value.value is None for value in values):
        reason = str(panel.get("undefined") or "the tuned model equals the base here")
        _say(axes, "undefined:\n" + "\n".join(wrap(reason, 38)))
        return drawn
    handles["share recovered"] = _band(axes, strengths, values, HELD_OUT, markers=True)
    below = [
        strength
        for strength, share in zip(strengths, values, strict=True)
        if share.value is not None and share.value < floor
    ]
    if below:
        edge = [floor] * len(below)
        handles["below the scale"] = axes.plot(
            _gaps(below), edge, ls="", marker="v", color=BLUE, mfc="white", zorder=5
        )[0]
    drawn["off_scale_strengths"] = below
    for name, label, colour, line in (
        ("optimal_strength", "λ of least KL", GREEN, "-"),
        ("least_squares_strength", "λ of least squares", VERMILLION, "--"),
    ):
        best = estimate(panel.get(name))
        drawn[name] = best._asdict()
        if best.value is None or not left < best.value < right:
            continue
        handles[label] = axes.axvline(best.value, color=colour, ls=line, lw=1.2)
        if best.low is not None and best.high is not None:
            axes.axvspan(best.low, best.high, color=colour, alpha=0.18, lw=0)
    chosen, share = real(panel.get("chosen_strength")), estimate(panel.get("recovered_at_chosen"))
    drawn["chosen"] = {"strength": chosen, **share._asdict()}
    if chosen is not None and share.value is not None and left < chosen < right:
        handles["at the λ chosen on tune"] = axes.errorbar(
            [chosen],
            [share.value],
            yerr=_bars([share.value], [share.low], [share.high]),
            fmt="D",
            ms=5.5,
            mfc="white",
            color=INK,
            capsize=2.5,
            zorder=6,
        )
    return drawn


def convergence(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Cosine between the v of two disjoint samples of prompts, over the size of a sample."""
    curves = mapping(result.get("convergence"))
    if not curves:
        return None
    points = {
        site: [p for p in items(curves[site]) if point(at(p, "cosine")) is not None]
        for site in site_order(curves)
    }
    defined = [site for site in points if points[site] and site != FINAL_NORM]
    named = defined
    if len(defined) > len(_CURVES):
        picks = np.linspace(0, len(defined) - 1, len(_CURVES)).round().astype(int)
        named = [defined[i] for i in picks]
    figure = Figure(figsize=(COLUMN + 1.6, 2.8))
    axes = figure.add_subplot()
    shades = colormaps["viridis"](np.linspace(0.0, 0.75, max(len(named), 1)))
    lowest, sizes = 1.0, set[float]()
    for site, drawn in points.items():
        steps, values = _series(drawn, "n", "cosine")
        sizes |= set(steps)
        if site in named:
            i = named.index(site)
            colour, fill, (line, marker) = shades[i], shades[i], _CURVES[i]
        elif site == FINAL_NORM:
            i, colour, fill, line, marker = len(named), INK, "white", "-", "D"
        else:
            axes.plot(steps, _gaps(values), color=PALE, lw=0.8, zorder=1)
            continue
        low, high = ([real(at(p, bound)) for p in drawn] for bound in ("low", "high"))
        lowest = min(v for v in (lowest, *values, *low) if v is not None)
        # Sites stand a little apart, so that their bars can be told apart.
        axes.errorbar(
            np.asarray(steps) * 1.035 ** (i - len(named) / 2),
            _gaps(values),
            yerr=_bars(values, low, high),
            label=site if steps else None,
            color=colour,
            ls=line,
            marker=marker,
            mfc=fill,
            lw=1.2,
            elinewidth=0.8,
            capsize=1.5,
        )
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
        ticks = sorted(sizes)
        while len(ticks) > 8:
            ticks = ticks[::-2][::-1]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.minorticks_off()
        figure.legend(loc="outside right center")
    else:
        _say(axes, "undefined at every site")
        axes.set_xticks([])
    axes.axhline(1, color=GREY, ls=":", lw=1)
    axes.set_ylim(max(-1.05, min(lowest - 0.05, 0.9)), 1.03)
    axes.set_xlabel("prompts in each sample (n)")
    axes.set_ylabel("cosine of the two samples' v")
    pale = len(defined) - len(named)
    undefined = [site for site in points if not points[site]]
    return Drawing(
        "convergence",
        figure,
        {
            "caption": "Convergence of v*: cosine between the mean displacements of two disjoint "
            "samples of n fit prompts (mean over random splits; bars: their spread). Near 1, v* no "
            "longer depends on which prompts were drawn."
            + (f" Pale: the {pale} other sites." if pale else "")
            + (f" Undefined and not drawn: {', '.join(undefined)}." if undefined else ""),
            "sites": points,
        },
    )


# ---------------------------------------------------------------------------------- cosine


_KINDS = {
    "null": NULL,
    "in_sample": IN_SAMPLE,
    "leave_one_out": LEAVE_ONE_OUT,
    "held_out": HELD_OUT,
}


def fig3_cosine(result: dict[str, Json], folder: Path) -> Drawing | None:
    """Figure 3: distributions of cos(Δ, v*) with the null, and the held-out mean at each site."""
    results = mapping(result.get("sites"))
    sites = site_order(results)
    if not sites:
        return None
    tensors = read_tensors(folder / "cosines.safetensors")
    chosen, paper = result.get("chosen_site"), result.get("paper_site") or FINAL_NORM
    shown = [site for site in dict.fromkeys((chosen, paper)) if site in results] or sites[-1:]
    n_fit, n_test = result.get("n_fit"), result.get("n_test")
    figure = Figure(figsize=(WIDE, 5.0))
    rows = GridSpec(2, 1, figure=figure, height_ratios=(1.1, 1))
    upper = rows[0].subgridspec(1, len(shown))
    cosines = {site: _cosines(tensors, site, results[site]) for site in shown}
    edges = _bins([values for kinds in cosines.values() for values in kinds.values()])
    data: dict[str, Json] = {
        "n_fit": n_fit,
        "n_test": n_test,
        "chosen_site": chosen,
        "paper_peak": list(PAPER_COSINE),
        "bin_edges": edges.tolist(),
        "distributions": {},
    }
    first: Axes | None = None
    for i, site in enumerate(shown):
        axes = figure.add_subplot(upper[i], sharex=first, sharey=first)
        role = " and ".join(
            words
            for name, words in ((chosen, "chosen on tune"), (paper, "the paper's"))
            if site == name
        )
        data["distributions"][site] = _histogram(axes, cosines[site], edges)
        axes.set_title(f"{site}{f' ({role})' if role else ''}")
        if first is None:
            first = axes
            axes.set_ylabel("share of prompts (null: of draws)")
            axes.xaxis.set_major_locator(MultipleLocator(0.5 if edges[0] < -0.5 else 0.2))
        else:
            axes.tick_params(labelleft=False)
    if first is not None:
        heights = [
            share
            for drawn in data["distributions"].values()
            for kind in _KINDS
            for share in at(drawn, kind, "share") or []
        ]
        first.set_xlim(float(edges[0]), 1.02)
        first.set_ylim(0, 1.2 * max(heights, default=1.0))
    data["sites"] = {
        site: {
            "held_out_mean": estimate(at(results[site], "held_out", "mean"))._asdict(),
            "in_sample_mean": point(at(results[site], "in_sample", "mean")),
            "null_q95": point(at(results[site], "null", "q95")),
            "undefined": is_undefined(results[site]),
        }
        for site in sites
    }

    def column(values: dict[str, Json], axes: Axes, where: Sequence[float], norm: bool) -> None:
        held = [estimate(value["held_out_mean"]) for value in values.values()]
        in_sample = [value["in_sample_mean"] for value in values.values()]
        null = [value["null_q95"] for value in values.values()]
        axes.axhspan(*PAPER_COSINE, **_PAPER_BAND, zorder=0)
        axes.plot(where, _gaps(null), color=NULL.colour, ls=NULL.line, marker=NULL.marker)
        axes.plot(
            where,
            _gaps(in_sample),
            color=IN_SAMPLE.colour,
            ls=IN_SAMPLE.line,
            marker=IN_SAMPLE.marker,
            mfc="white",
        )
        _band(axes, where, held, HELD_OUT, markers=True, hollow=norm)

    groups = _groups(sites)
    widths = [width for _, _, width in groups]
    lower = rows[1].subgridspec(1, len(groups), width_ratios=widths, wspace=0.03)
    panels = _site_axes(figure, [lower[i] for i in range(len(groups))], sites)
    lows = [
        value
        for site in data["sites"].values()
        for value in (*(site["held_out_mean"][key] for key in ("value", "low")), site["null_q95"])
        if value is not None
    ]
    for axes, group, norm in panels:
        column({site: data["sites"][site] for site in group}, axes, _positions(group), norm)
        _hatch_undefined(axes, group, [is_undefined(results[site]) for site in group])
    lead = panels[0][0]
    lead.set_ylim(min(-0.05, *(low - 0.05 for low in lows)) if lows else -0.05, 1.05)
    lead.set_ylabel("mean cosine with v*")
    lead.set_title("Mean over prompts at each site")
    handles: list[Any] = [_line_handle(mark) for mark in reversed(_KINDS.values())]
    handles.append(Patch(**_PAPER_BAND, label="the paper's peak, 0.92–0.96"))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, columnspacing=1.4)
    said = "; ".join(
        f"at {site}, the held-out mean is {interval(at(results[site], 'held_out', 'mean'))}, "
        f"the null's 95 % quantile {number(point(at(results[site], 'null', 'q95')))}"
        if not is_undefined(results[site])
        else f"at {site}, undefined, because Δ = 0"
        for site in shown
    )
    one = sum(block(site) is None for site in sites) < 2
    data["caption"] = (
        f"Figure 3. Cosines of displacements with v*, fitted on N = {plural(n_fit, 'prompt')} "
        f"(in-sample and leave-one-out on these) and held-out on N = {plural(n_test, 'prompt')}, "
        "with the null: the mean cosine of each draw in which each conversation's displacements "
        "got a random sign. "
        f"{_kept_sentence(result)}{_sentence(said)} "
        "Below: the held-out mean with its interval at each site, the in-sample "
        f"mean (dotted), and the null's 95 % quantile (dash-dotted); {_apart(sites)} "
        f"because {'it is' if one else 'each is'} another quantity than the blocks' outputs."
    )
    return Drawing("fig3_cosine", figure, data)


def _kept_sentence(result: Json) -> str:
    """Which prompts the histograms show, where they do not show all."""
    kept = mapping(result.get("rows_kept"))
    if not kept or all(kept[name] == result.get(f"n_{name}") for name in kept):
        return ""
    return (
        f"Histograms show the prompts whose states were kept: {kept['fit']:,} fit and "
        f"{kept['test']:,} test prompts. "
    )


def _cosines(tensors: dict[str, np.ndarray], site: str, result: Json) -> dict[str, np.ndarray]:
    """The measured cosines of one site by kind; rounding just beyond ±1 is cut off."""
    if is_undefined(result):
        return {}
    found = {}
    for kind in _KINDS:
        values = np.asarray(tensors.get(f"{site}/{kind}", ()), dtype=np.float64).ravel()
        values = np.clip(values[np.isfinite(values)], -1.0, 1.0)
        if values.size:
            found[kind] = values
    return found


def _bins(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Edges that suit the range and the smallest sample, and end at a cosine of 1."""
    low = min([0.0, *(float(values.min()) for values in samples)])
    smallest = min((values.size for values in samples), default=1)
    wanted = (1.0 - low) / min(50.0, max(10.0, 3.2 * math.sqrt(smallest)))
    width = next((w for w in (0.02, 0.025, 0.05, 0.1) if w >= wanted), 0.2)
    first = math.floor(round(low / width, 9))
    return np.round(np.arange(first, round(1 / width) + 1) * width, 10)


def _histogram(axes: Axes, cosines: dict[str, np.ndarray], edges: np.ndarray) -> dict[str, Json]:
    """Draw the distributions of one site; return what was drawn."""
    axes.axvspan(*PAPER_COSINE, **_PAPER_BAND, zorder=0)
    axes.set_xlabel("cosine with v*")
    if not cosines:
        _say(axes, "undefined: Δ = 0")
        return {"undefined": True}
    drawn: dict[str, Json] = {}
    for kind, values in cosines.items():
        shares = np.histogram(values, edges)[0] / values.size
        mark = _KINDS[kind]
        if kind == "null":
            axes.stairs(
                shares, edges, fill=True, facecolor="#efefef", edgecolor=GREY, lw=0, hatch="...."
            )
            axes.stairs(shares, edges, color=GREY, lw=0.8, ls=mark.line)
        elif kind == "held_out":
            axes.stairs(shares, edges, fill=True, color=BLUE, alpha=0.22, lw=0)
            axes.stairs(shares, edges, color=BLUE, lw=1.5)
        else:
            axes.stairs(shares, edges, color=mark.colour, lw=1.3, ls=mark.line)
        drawn[kind] = {"n": int(values.size), "share": shares.tolist()}
    sizes = [
        f"{words} {drawn[kind]['n']:,}"
        for kind, words in (
            ("held_out", "held-out"),
            ("in_sample", "in-sample"),
            ("null", "null draws"),
        )
        if kind in drawn
    ]
    axes.text(
        0.02,
        0.98,
        f"N: {', '.join(sizes)}\nbins of {edges[1] - edges[0]:g}",
        va="top",
        transform=axes.transAxes,
        color=GREY,
        size=7.5,
    )
    return drawn


# ---------------------------------------------------------------------------------- spectrum

_MATRICES = {"base": H_BASE, "tuned": H_TUNED, "delta": DELTA_H}
_NAMES = {"base": r"$H_\mathrm{base}$", "tuned": r"$H_\mathrm{tuned}$", "delta": r"$\Delta H$"}
_CENTRINGS = {
    "uncentred": "Uncentred: shared shift kept",
    "centred": "Centred: what is left",
}


def fig4a_entropy(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Figure 4a: spectral entropy of H_base, H_tuned and ΔH at each site."""
    results = mapping(result.get("sites"))
    sites, shown = site_order(results), _centrings(results)
    if not shown:
        return None
    n, d, power = result.get("n"), result.get("d"), result.get("power", 2)
    limit = math.log(min(n, d)) if isinstance(n, int) and isinstance(d, int) and n else None
    figure = Figure(figsize=(WIDE, 2.9) if len(shown) > 1 else (COLUMN + 1.2, 2.9))
    widths = [width for _, _, width in _groups(sites)]
    grid = GridSpec(1, len(shown) * len(widths), figure=figure, width_ratios=widths * len(shown))
    data: dict[str, Json] = {"n": n, "d": d, "power": power, "limit": limit, "entropy": {}}
    top, first = 0.0, None
    for i, centring in enumerate(shown):
        data["entropy"][centring] = drawn = {
            matrix: {
                site: estimate(at(results[site], matrix, centring, "entropy"))._asdict()
                for site in sites
            }
            for matrix in _MATRICES
        }
        places = [grid[0, i * len(widths) + j] for j in range(len(widths))]
        panels = _site_axes(figure, places, sites, share=first)
        for axes, group, norm in panels:
            for j, (matrix, mark) in enumerate(_MATRICES.items()):
                shift = 0.25 * (j - 1) if norm else 0.0
                values = [estimate(drawn[matrix][site]) for site in group]
                where = [x + shift for x in _positions(group)]
                _band(axes, where, values, mark, markers=True, hollow=norm)
                top = max([top, *(v.high or v.value or 0.0 for v in values)])
            _hatch_undefined(axes, group, [is_undefined(results[site]) for site in group], "ΔH ")
        panels[0][0].set_title(_CENTRINGS[centring])
        if first is None:
            first = panels[0][0]
            first.set_ylabel(f"spectral entropy, p = {power} (nats)")
        else:
            panels[0][0].tick_params(labelleft=False)
    if first is not None:
        first.set_ylim(0, top * 1.08 or 1)
    figure.legend(
        handles=[_line_handle(mark, _NAMES[matrix]) for matrix, mark in _MATRICES.items()],
        loc="outside upper center",
        ncols=3,
        title=_counts(n, d)
        + (
            f";  largest possible: ln min(N, d) = {number(limit)} nats" if limit is not None else ""
        ),
        title_fontsize=8,
    )
    weights = "σ²" if power == 2 else "σ"
    bounded = any(
        value["low"] is not None
        for matrices in data["entropy"].values()
        for values in matrices.values()
        for value in values.values()
    )
    data["caption"] = (
        f"Figure 4a. Spectral entropy (weights {weights}, nats) of the states of the base, of the "
        f"states of the tuned model, and of their difference ΔH, on the same {_counts(n, d)}. "
        + ("Bands and bars: jackknife intervals. " if bounded else "There are no intervals. ")
        + "Left, uncentred spectra hold the shift that all "
        "prompts share; right, centred spectra hold only what differs between prompts. "
        f"{_apart(sites)}." + _undefined_sentence(results, sites)
    )
    return Drawing("fig4a_entropy", figure, data)


def fig4b_singular_values(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Figure 4b: the largest σ_j/‖·‖_F at each site of H_base, H_tuned and ΔH, on one scale."""
    results = mapping(result.get("sites"))
    sites, shown = site_order(results), _centrings(results)
    depth = max(
        (
            len(items(at(results[site], matrix, centring, "top")))
            for site in sites
            for matrix in _MATRICES
            for centring in shown
        ),
        default=0,
    )
    if not shown or depth == 0:
        return None
    n, d = result.get("n"), result.get("d")
    height = 0.55 + len(_MATRICES) * (0.42 + 0.17 * depth)
    figure = Figure(figsize=(WIDE, height) if len(shown) > 1 else (COLUMN + 1.6, height))
    widths = [width for _, _, width in _groups(sites)]
    grid = GridSpec(
        len(_MATRICES),
        len(shown) * len(widths) + 1,
        figure=figure,
        width_ratios=[*widths * len(shown), 0.04 * sum(widths)],
    )
    shades, scale = colormaps[SHADES], Normalize(0.0, 1.0)
    data: dict[str, Json] = {"n": n, "d": d, "colour_scale": [0.0, 1.0], "top": {}}
    printed = len(sites) <= _PRINTED_SITES
    for column, centring in enumerate(shown):
        for row, matrix in enumerate(_MATRICES):
            values = {
                site: [real(v) for v in items(at(results[site], matrix, centring, "top"))]
                for site in sites
            }
            data["top"].setdefault(centring, {})[matrix] = values
            places = [grid[row, column * len(widths) + i] for i in range(len(widths))]
            panels = _site_axes(figure, places, sites, label=row == len(_MATRICES) - 1)
            for axes, group, _norm in panels:
                for x, site in zip(_positions(group), group, strict=True):
                    for j in range(depth):
                        value = values[site][j] if j < len(values[site]) else None
                        _cell(axes, x, j + 1, None if value is None else shades(scale(value)))
                        if printed and value is not None:
                            axes.text(
                                x,
                                j + 1,
                                f"{value:.2f}",
                                ha="center",
                                va="center",
                                size=7,
                                color="white" if value > 0.55 else INK,
                            )
                axes.set_ylim(depth + 0.5, 0.5)
                axes.spines[:].set_visible(False)
                axes.tick_params(length=0)
            lead = panels[0][0]
            lead.set_yticks(range(1, depth + 1))
            lead.set_title(f"{_NAMES[matrix]}, {centring}")
            if column == 0:
                lead.set_ylabel("rank j")
            else:
                lead.tick_params(labelleft=False)
    bar = figure.colorbar(ScalarMappable(scale, shades), cax=figure.add_subplot(grid[:, -1]))
    bar.set_label(r"$\sigma_j\,/\,\Vert\cdot\Vert_F$")
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    short = any(
        len(top) < depth
        for matrices in data["top"].values()
        for matrix, sites_top in matrices.items()
        for site, top in sites_top.items()
        if not (matrix == "delta" and is_undefined(results[site]))
    )
    hatched = _undefined_sentence(results, sites) + (
        " Hatched cells: the matrix has fewer singular values." if short else ""
    )
    data["caption"] = (
        f"Figure 4b. The {depth} largest singular values over the Frobenius norm, σ_j/‖·‖_F, at "
        f"each site, of H_base, H_tuned and ΔH, on one colour scale ({_counts(n, d)}). The squares "
        f"of all of a matrix's values sum to 1. {_apart(sites)}.{hatched}"
    )
    return Drawing("fig4b_singular_values", figure, data)


def _cell(axes: Axes, x: float, y: float, colour: Any) -> None:
    if colour is None:
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5), 1, 1, facecolor="white", edgecolor=GREY, hatch="////", lw=0
            )
        )
    else:
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=0.5)
        )


def _centrings(results: dict[str, Json]) -> list[str]:
    """The centrings that a result holds."""
    return [
        centring
        for centring in _CENTRINGS
        if any(at(site, matrix, centring) for site in results.values() for matrix in _MATRICES)
    ]


def _counts(n: Json, d: Json) -> str:
    return f"N = {plural(n, 'prompt')}, d = {count(d)}"


def _undefined_sentence(results: dict[str, Json], sites: Sequence[str]) -> str:
    undefined = [site for site in sites if is_undefined(results[site])]
    return (
        f" ΔH is undefined (hatched), because Δ = 0, at {', '.join(undefined)}."
        if undefined
        else ""
    )


# ---------------------------------------------------------------------------------- parts


def _groups(sites: Sequence[str]) -> list[tuple[list[str], bool, float]]:
    """The blocks, and apart from them each other site: (sites, whether apart, relative width)."""
    blocks = [site for site in sites if block(site) is not None]
    others = [site for site in sites if block(site) is None]
    span = _positions(blocks)[-1] - _positions(blocks)[0] + 1 if blocks else 0.0
    groups = [(blocks, False, span)] if blocks else []
    return [*groups, *(([site], True, max(1.0, 0.15 * span)) for site in others)]


def _apart(sites: Sequence[str]) -> str:
    """Which sites :func:`_groups` sets apart, as a clause."""
    others = [site for site in sites if block(site) is None]
    return f"{' and '.join(others) or FINAL_NORM} stand{'s' if len(others) < 2 else ''} apart"


def _site_axes(
    figure: Figure,
    places: Sequence[SubplotSpec],
    sites: Sequence[str],
    *,
    share: Axes | None = None,
    label: bool = True,
) -> list[tuple[Axes, list[str], bool]]:
    """Axes for each of :func:`_groups`: (axes, sites, whether apart).

    The blocks are a curve over depth. ``final_norm`` is another quantity, and so is ``encoder``:
    each gets its own narrow axes and is never joined to a curve.
    """
    panels: list[tuple[Axes, list[str], bool]] = []
    for place, (group, apart, _width) in zip(places, _groups(sites), strict=True):
        axes = figure.add_subplot(place, sharey=panels[0][0] if panels else share)
        where = _positions(group)
        axes.set_xlim(where[0] - 0.5, where[-1] + 0.5)
        if apart:
            axes.set_xticks(where, group)
        elif len(group) <= _PRINTED_SITES:
            axes.set_xticks(where, [f"{x:g}" for x in where])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        if not label:
            axes.tick_params(labelbottom=False)
        elif not apart:
            axes.set_xlabel("block k (resid_post.k)")
        if panels:
            axes.tick_params(labelleft=False)
        panels.append((axes, group, apart))
    return panels


def _positions(group: Sequence[str]) -> list[float]:
    """x of each site: k of a block, else its place in the group."""
    return [
        float(k) if (k := block(site)) is not None else float(i) for i, site in enumerate(group)
    ]


def _hatch_undefined(
    axes: Axes, group: Sequence[str], undefined: Sequence[bool], what: str = ""
) -> None:
    """Hatch the sites where nothing is defined, and say so once a run of them."""
    where = _positions(group)
    start: float | None = None
    for i, x in enumerate(where):
        if undefined[i] and start is None:
            start = x
        if start is not None and (i + 1 == len(where) or not undefined[i + 1]):
            axes.axvspan(
                start - 0.5, x + 0.5, facecolor="none", edgecolor=PALE, hatch="////", lw=0, zorder=0
            )
            axes.text(
                (start + x) / 2,
                0.03,
                f"{what}undefined: Δ = 0",
                rotation=90,
                ha="center",
                va="bottom",
                color=GREY,
                transform=axes.get_xaxis_transform(),
                zorder=1,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
            start = None


def _band(
    axes: Axes,
    where: Sequence[float | None],
    values: Sequence[Any],
    mark: Mark,
    *,
    markers: bool = False,
    hollow: bool = False,
) -> Any:
    """A curve with its interval: a band, and error bars where there are few points."""
    middle = _gaps([value.value for value in values])
    low = _gaps([value.low for value in values])
    high = _gaps([value.high for value in values])
    x = _gaps(list(where))
    axes.fill_between(x, low, high, color=mark.colour, alpha=0.18, lw=0)
    if len(x) <= _PRINTED_SITES:
        bars = _bars(middle, low, high)
        axes.errorbar(
            x, middle, yerr=bars, fmt="none", ecolor=mark.colour, elinewidth=0.9, capsize=2
        )
    return axes.plot(
        x,
        middle,
        color=mark.colour,
        ls=mark.line,
        marker=mark.marker if markers else "",
        ms=3.8 if len(x) <= 2 * _PRINTED_SITES else 2.4,
        mfc="white" if hollow else mark.colour,
        label=mark.label,
        zorder=3,
    )[0]


def _bars(middle: Any, low: Any, high: Any) -> np.ndarray:
    """Lengths of error bars; none where a bound is undefined."""
    centre = _gaps(list(middle))
    lengths = np.stack([centre - _gaps(list(low)), _gaps(list(high)) - centre])
    lengths[~(lengths > 0)] = 0.0
    return lengths


def _gaps(values: Sequence[float | None]) -> np.ndarray:
    """Floats with NaN, which matplotlib leaves out, where a value is undefined."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _series(points: Json, x: str, y: str) -> tuple[list[float], list[float | None]]:
    """Two columns of a list of points, those without x left out."""
    kept = [(at(p, x), real(at(p, y))) for p in items(points) if real(at(p, x)) is not None]
    return [a for a, _ in kept], [b for _, b in kept]


def _plotted(shown: dict[str, Json], key: str) -> list[float | None]:
    return [v for name in ("train", "heldout") for v in at(shown, name, key) or []]


def _line_handle(mark: Mark, label: str | None = None) -> Any:
    return Line2D(
        [], [], color=mark.colour, ls=mark.line, marker=mark.marker, label=label or mark.label
    )


def _line_label(axes: Axes, y: float, words: str, colour: str, side: str = "right") -> None:
    """Name a horizontal reference line at one of its ends, just above it."""
    axes.annotate(
        words,
        (0.99 if side == "right" else 0.01, y),
        ha=side,
        va="bottom",
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 1.5),
        size=7.5,
        color=colour,
        textcoords="offset points",
        zorder=2,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )


def _say(axes: Axes, words: str) -> None:
    """Words in place of a curve that can't be drawn."""
    axes.patch.set(hatch="////", edgecolor=PALE)
    axes.text(
        0.5,
        0.5,
        words,
        transform=axes.transAxes,
        ha="center",
        va="center",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 3},
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


FIGURES: dict[str, dict[str, Draw]] = {
    "base": {"learning_curve": base_learning_curve},
    "dpo": {"learning_curve": dpo_learning_curve},
    "vector": {"kl_recovery": kl_recovery, "convergence": convergence},
    "cosine": {"fig3_cosine": fig3_cosine},
    "spectrum": {"fig4a_entropy": fig4a_entropy, "fig4b_singular_values": fig4b_singular_values},
    "template": {"four_way": four_way},
    "geometry": {
        "fig1a_preference_geometry": fig1a_preference_geometry,
        "fig1b_gradients": fig1b_gradients,
        "fig1c_clouds": fig1c_clouds,
    },
    "learned": {"reward_and_kl": reward_and_kl},
    "profile": {"profile": layer_profile},
    "rank": {"rank": rank_curves},
    "maps": {"maps": nested_maps},
    "strength": {"strength": best_strength},
    "reversal": {"ways_back": ways_back},
    "interpolation": {
        "fig2a_interpolation": fig2a_interpolation,
        "fig2a_all_metrics": fig2a_all_metrics,
    },
    "inversion": {"fig2b_inversion": fig2b_inversion, "fig2b_all_metrics": fig2b_all_metrics},
    "transfer": {"share_of_native": share_of_native},
    "control": {"control_matrix": control_matrix, "control_grid": control_grid},
    "claims": {
        "pair_and_nulls": pair_and_nulls,
        **{name: beside_nulls(stage) for stage, name in NULL_FIGURES.items()},
    },
    "groups": {"group_cosines": group_cosines, "group_removal": group_removal},
}
"""The figures of each stage, by file name, in the order of the report."""
