"""The one-file HTML report of a run, from its artifacts alone."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dsteer.errors import StoreError
from dsteer.report.claims_tables import claims_table, claims_tables, warning
from dsteer.report.control_tables import control_tables
from dsteer.report.explorer import Explorer, embedded, explorer, policy
from dsteer.report.four_way_tables import four_way_tables
from dsteer.report.groups_tables import groups_tables
from dsteer.report.headline import Point, confidence, headline
from dsteer.report.learned_tables import learned_tables
from dsteer.report.maps_tables import maps_tables, strength_tables
from dsteer.report.nulls_tables import Compared, compared, null_names, null_tables
from dsteer.report.profile_tables import profile_tables
from dsteer.report.rank_tables import rank_tables
from dsteer.report.reversal_tables import reversal_tables
from dsteer.report.sweep_tables import sweep_tables
from dsteer.report.sweep_values import SWEEPS
from dsteer.report.tables import STAGE_TABLES, Results, Table, paper_table, settings_tables
from dsteer.report.transfer_tables import transfer_tables
from dsteer.report.values import at, items, mapping
from dsteer.store import Json, atomic_path, read_json

SECTIONS: dict[str, tuple[str, str]] = {
    "data": ("Data", "Preference pairs, read, checked and split."),
    "base": ("Base model", "A small model trained from nothing, so that the run is complete."),
    "dpo": ("DPO training", "What preference training did to the base, on pairs it has not seen."),
    "activations": ("Activations", "Hidden states of both models on identical token ids."),
    "vector": ("Steering vector", "v*, the mean displacement: its size, direction and reach."),
    "cosine": ("Cosines", "How well the displacement of each prompt agrees with v*."),
    "spectrum": ("Spectra", "How many dimensions the displacements take."),
    "template": (
        "Template and training",
        "How much of the displacement is the chat template, and how much the training.",
    ),
    "geometry": (
        "Geometry",
        "Preference vectors, gradients of the DPO loss, and clouds of states, on real pairs.",
    ),
    "learned": (
        "Learned vectors",
        "Vectors learned under the DPO loss with the base frozen, beside v*: held-out reward, and "
        "its cost in KL.",
    ),
    "profile": (
        "Causal layer profile",
        "What the change of each site does to the base, and how much of it one constant does.",
    ),
    "rank": (
        "How many directions",
        "KL recovered when of the displacement only k directions are added.",
    ),
    "maps": (
        "Which map",
        "Nested maps from base to tuned states: what a constant vector misses.",
    ),
    "strength": (
        "Which strength",
        "The best strength of v*, each prompt's own, and what constants lose.",
    ),
    "interpolation": ("Interpolation", "λv* added to the base: what it does to behaviour."),
    "inversion": (
        "Inversion",
        "λv* taken from the tuned model: whether, and at which λ, the base comes back.",
    ),
    "reversal": (
        "Reversal",
        "The tuning undone: by taking v* off, and by training on the rejected answers.",
    ),
    "transfer": (
        "Transfer",
        "The vector of another model, carried over by a map learned on neutral text: what it does "
        "here, beside this pair's own v* and beside nulls.",
    ),
    "control": (
        "Control",
        "Contrast vectors of planted axes: what each does to its own oracle and to all others, and "
        "two axes dialled at once.",
    ),
    "claims": (
        "Claims",
        "Five claims, graded by rule, and the measurement itself checked on planted truth.",
    ),
    "groups": (
        "Groups of prompts",
        "One vector a group: how the vectors lie to each other, how many directions they take, and "
        "what removing one leaves of the others.",
    ),
}
"""Stage → title and first line of its section, in order."""

FIGURES: dict[str, tuple[str, ...]] = {
    "base": ("learning_curve",),
    "dpo": ("learning_curve",),
    "vector": ("kl_recovery", "convergence"),
    "cosine": ("fig3_cosine",),
    "spectrum": ("fig4a_entropy", "fig4b_singular_values"),
    "template": ("four_way",),
    "geometry": ("fig1a_preference_geometry", "fig1b_gradients", "fig1c_clouds"),
    "learned": ("reward_and_kl",),
    "profile": ("profile",),
    "rank": ("rank",),
    "maps": ("maps",),
    "strength": ("strength",),
    "interpolation": ("fig2a_interpolation", "fig2a_all_metrics"),
    "inversion": ("fig2b_inversion", "fig2b_all_metrics"),
    "reversal": ("ways_back",),
    "transfer": ("share_of_native",),
    "control": ("control_matrix", "control_grid"),
    "claims": ("pair_and_nulls",),
    "groups": ("group_cosines", "group_removal"),
}
"""The figures of each section, in order."""

_TABLES = {
    **STAGE_TABLES,
    **dict.fromkeys(SWEEPS, sweep_tables),
    "template": four_way_tables,
    "learned": learned_tables,
    "profile": profile_tables,
    "rank": rank_tables,
    "maps": maps_tables,
    "strength": strength_tables,
    "reversal": reversal_tables,
    "transfer": transfer_tables,
    "control": control_tables,
    "claims": claims_tables,
    "groups": groups_tables,
}
"""The tables of each section."""

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "claim",
        "a statement about the pair that a fixed rule grades as supported, not supported or, where "
        "a stage, a control or an interval is missing, not tested",
    ),
    (
        "null pair",
        "a run that shares everything with the pair but one thing, such as labels drawn by a coin",
    ),
    (
        "self-check",
        "the same measurements on a tiny random model of the same architecture, in which a known "
        "shift was planted",
    ),
    ("efficiency", "KL that v* recovers over KL that patching the tuned states recovers"),
    (
        "base, tuned",
        "the model before and after preference training; h_base and h_tuned are their states",
    ),
    (
        "site",
        "where states are read. resid_post.k is the raw output of block k, counted from 0; "
        "final_norm is the state after the last norm, which the unembedding reads. They are "
        "different quantities. Of an encoder-decoder model both are the decoder's, and encoder is "
        "the encoder's last state",
    ),
    ("displacement Δ", "h_tuned(x) − h_base(x) on identical token ids, at one site and position"),
    ("ΔH", "the matrix of displacements, one row a prompt (N × d)"),
    ("v*", "the mean displacement over the fit prompts"),
    ("strength λ", "how many times v* is added; 1 adds v* itself"),
    ("fit, tune, test", "splits that share no conversation: v* is fitted on fit, sites and "
     "strengths are chosen on tune, numbers are reported on test"),
    ("held-out cosine", "cos(Δ, v*) on test prompts, which v* has not seen"),
    ("leave-one-out cosine", "each fit prompt against the mean of all others, "
     "(N v* − Δ) / (N − 1)"),
    ("in-sample cosine", "each fit prompt against the mean that holds it; the paper's kind, biased "
     "upward, by about 1/√N on pure noise"),
    ("null", "the same measurement on displacements with random signs, one a conversation, where "
     "no direction is shared"),
    ("shared share m", "N‖v‖² / ‖ΔH‖_F²; debiased: mean of ⟨Δᵢ, Δⱼ⟩ over i ≠ j, over mean ‖Δ‖²"),
    ("uncentred, centred", "with and without the mean row; centring removes v* by construction"),
    ("spectral entropy", "H = −Σ q ln q, q = σ^p / Σσ^p over the singular values (nats)"),
    ("effective rank", "exp(H) with p = 1"),
    ("KL(p‖q)", "Σ p (ln p − ln q) over the vocabulary (nats)"),
    ("share of KL recovered", "1 − Σ KL(tuned‖steered) / Σ KL(tuned‖base), teacher-forced"),
    ("implicit reward r", "β [log π(y|x) − log π_ref(y|x)]; accuracy is the share of pairs with "
     "r(chosen) > r(rejected)"),
    ("T_raw, T_templ", "training effects: h_tuned − h_base on raw text, and in the chat template"),
    ("B, U", "template effects: h(template) − h(raw) in the base, and in the tuned model, at the "
     "token from which the model answers"),
    ("interaction I", "difference in differences, T_templ − T_raw = U − B"),
    ("G(P, Q)", "product of two parts' mean vectors: average of ⟨Pᵢ, Qⱼ⟩ over pairs of prompts of "
     "different conversations, which the prompts' scatter does not shift"),
    ("patching", "putting the tuned model's states of some tokens at one site into the base"),
    ("efficiency", "KL recovered by v* over KL recovered by patching, at the same site and tokens; "
     "of the first answer token where the last prompt token alone is changed"),
    ("k₅₀, k₉₀", "the least number of directions that recovers half, or nine tenths, of the KL "
     "that patching the whole displacement recovers"),
    ("learned vector", "the vector that lowers the DPO loss most when it is added to the frozen "
     "base"),
    ("KL to the base", "KL(steered‖base) a token: what a vector costs"),
    ("arm", "what a sweep adds: v* at its site, v* at final_norm, or another direction; λ counts "
     "the arm's own vector"),
    ("baseline", "an arm without a direction, whose shift is as long as λv*: the layer amplified, "
     "or seeded noise"),
    ("λ-equivalent", "the λ at which a metric of the steered model meets the target model's level"),
    ("random band", "range of the same measurement for random directions with v*'s norm"),
    ("sham arm", "hooks on, λ = 0: everything must be identical to the model without hooks"),
    ("degenerate", "an output that is empty, loops, or leaks a role header"),
    ("noise floor", "what the same measurement gives for the base against itself at another batch "
     "size"),
    ("inert", "a shift along the state itself, which the norm takes away again"),
    ("sender A, receiver B", "the model whose vector is carried over, and the pair of this run"),
    ("native vector", "the receiver's own v* at the same site: the ceiling of what is carried"),
    ("contrast vector", "mean difference of the states of texts that differ in one property, "
     "positive − negative"),
    ("oracle", "a score of any text on one planted axis of the synthetic world, in [−1, 1]"),
    ("move", "mean over prompts of (score at +λ − score at −λ) / 2"),
    ("leakage", "the largest |move| of another axis's oracle over the move of the own one"),
    ("v_g", "the mean displacement over the fit prompts of one group"),
    ("participation", "(Σσ²)² / Σσ⁴: how many directions the displacements take, as if equally"),
    ("interval", "by conversation: bootstrap; for spectra, m and G jackknife; for shares of yes "
     "and no Wilson's"),
)  # fmt: skip


@dataclass(frozen=True)
class FigureView:
    """A figure ready to embed."""

    name: str
    stage: str
    caption: str
    source: str
    width: int
    height: int
    links: Sequence[tuple[str, str]]
    folded: bool


@dataclass(frozen=True)
class Section:
    """One stage's section; in a study's report, one variant's."""

    stage: str
    title: str
    lead: str
    figures: Sequence[FigureView]
    missing_figures: Sequence[str]
    tables: Sequence[Table]
    remarks: Sequence[str]
    diagnoses: Sequence[str] | None
    points: Sequence[Point] = ()
    link: str | None = None


def write_report(run: Path, title: str | None = None) -> Path:
    """Write ``report.html`` into a run folder: one file, readable offline.

    Figures are embedded as they lie in ``<stage>/figures``; those that are absent are drawn first.
    A stage without a valid result has no section, and the report says so.

    Args:
        run: the run folder.
        title: heading of the report; default: the run's name.

    Raises:
        StoreError: the folder holds no result of any stage, or an artifact is malformed.
    """
    manifest = _read(run / "manifest.json")
    summary = _read(run / "summary.json")
    results, absent = stage_results(run, manifest)
    if not results:
        raise StoreError(f"{run}: no stage of a run is complete here; run `dsteer run` first")
    name = str(manifest.get("name") or summary.get("run") or run.name)
    yaml = run / "pipeline.yaml"
    if "claims" in results:
        _draw_missing(run, "claims", results["claims"])  # its figures stand in other sections too
    runs = compared(run, null_names(run, manifest), results)
    level = confidence(manifest, "cosine", "vector", "spectrum", "template", "control")
    return render(
        run / "report.html",
        title=title or name,
        name=name,
        description=manifest.get("description") or "",
        version=manifest.get("dsteer_version") or "",
        explorers=_explorers(run, results),
        claims=claims_table(results.get("claims")),
        warning=warning(results.get("claims")),
        headline=headline(manifest, results),
        interval_words=f"{level} intervals" if level else "intervals",
        notes=_notes(summary, results),
        titles={stage: words for stage, (words, _) in SECTIONS.items()},
        paper=paper_table(results),
        sections=[_section(runs, stage, manifest) for stage in SECTIONS if stage in results],
        absent=absent,
        settings=settings_tables(manifest),
        yaml=yaml.read_text(encoding="utf-8") if yaml.is_file() else "",
        glossary=GLOSSARY,
    )


def render(path: Path, *, explorers: Sequence[Explorer], **values: object) -> Path:
    """Fill the report's template and write it as one file."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_part("template.html.jinja"))
    style, script = _part("report.css"), _part("explorer.js") if explorers else None
    text = template.render(
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script or ""),
        explorers=explorers,
        explorer_data=Markup(embedded(explorers)),
        **values,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _part(name: str) -> str:
    return files("dsteer.report").joinpath(name).read_text(encoding="utf-8")


def _explorers(run: Path, results: Results) -> list[Explorer]:
    """The explorers of the sweeps that wrote texts."""
    read = (
        explorer(stage, SECTIONS[stage][0], _read(run / stage / "explorer.json"))
        for stage in SWEEPS
        if stage in results
    )
    return [found for found in read if found is not None]


def _read(path: Path) -> dict[str, Json]:
    return mapping(read_json(path)) if path.is_file() else {}


def stage_results(run: Path, manifest: dict[str, Json]) -> tuple[Results, list[tuple[str, str]]]:
    """The results of the stages that ran, and of each other stage why it is absent."""
    recorded = manifest.get("stages")
    results: Results = {}
    absent = []
    for stage, (title, _) in SECTIONS.items():
        written = (run / stage / "result.json").is_file()
        if written and (recorded is None or stage in recorded):
            results[stage] = mapping(read_json(run / stage / "result.json"))
            if (timing := run / stage / "timing.json").is_file():
                results[stage] |= mapping(read_json(timing))
        elif written:
            absent.append((title, "its result belongs to other settings than this run's"))
        elif mapping(at(manifest, "config")).get(stage) is not None:
            absent.append((title, "configured, but not run to its end"))
        else:
            absent.append((title, "not part of this pipeline"))
    return results, absent


def _notes(summary: dict[str, Json], results: Results) -> list[tuple[str, str]]:
    """All notes as (stage, text), in the order of the stages, each once."""
    notes = [
        (stage, str(text))
        for stage, result in results.items()
        for text in items(result.get("notes"))
    ]
    notes += [(str(at(note, "stage") or ""), str(at(note, "text") or ""))
              for note in items(summary.get("notes"))]  # fmt: skip
    return list(dict.fromkeys(note for note in notes if note[0] in results))


def _section(runs: Sequence[Compared], stage: str, manifest: dict[str, Json]) -> Section:
    """A stage's section, beside its nulls where the run has any; the pair is the first run."""
    run, results = runs[0].folder, runs[0].results
    title, lead = SECTIONS[stage]
    trouble = _draw_missing(run, stage, results[stage])
    found = {name: figure_view(run, stage, name) for name in FIGURES.get(stage, ())}
    if "claims" in results:
        found["beside nulls"] = figure_view(run, "claims", f"nulls_{stage}")
    remarks = []
    if stage == "spectrum" and at(manifest, "config", "dpo", "lora"):
        rank = at(manifest, "config", "dpo", "lora", "rank")
        remarks.append(
            f"The tuned model is a LoRA of rank {rank}: the rank of each weight's change is "
            "bounded by construction, so low ranks here are partly built in."
        )
    return Section(
        stage=stage,
        title=title,
        lead=lead,
        figures=[figure for figure in found.values() if figure is not None],
        missing_figures=trouble,
        tables=[*_TABLES[stage](results[stage]), *null_tables(runs, stage)],
        remarks=remarks,
        diagnoses=[str(words) for words in items(results[stage]["diagnoses"])]
        if "diagnoses" in results[stage]
        else None,
    )


def _draw_missing(run: Path, stage: str, result: Json) -> list[str]:
    """Draw a stage's figures if one is absent; say in words what could not be drawn."""
    folder = run / stage
    names = FIGURES.get(stage, ())
    if all((folder / "figures" / f"{name}.png").is_file() for name in names):
        return []
    from dsteer.report.figures import draw_result  # matplotlib is slow to import

    try:
        draw_result(stage, result, folder)
    except StoreError as error:
        return [f"A figure could not be drawn: {str(error).replace(f'{run}/', '')}"]
    return []


def figure_view(run: Path, stage: str, name: str) -> FigureView | None:
    """A figure's PNG as a data URI, its caption and links to its files; None if not drawn."""
    folder = run / stage / "figures"
    png = folder / f"{name}.png"
    if not png.is_file():
        return None
    content = png.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # the IHDR chunk
    data = _read(folder / f"{name}.json")
    return FigureView(
        name=name,
        stage=stage,
        caption=str(data.get("caption") or name),
        source=f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}",
        width=width // 2,
        height=height // 2,
        links=[
            (suffix.upper(), f"{stage}/figures/{name}.{suffix}")
            for suffix in ("pdf", "png", "json")
            if (folder / f"{name}.{suffix}").is_file()
        ],
        folded=name.endswith("_all_metrics"),
    )
