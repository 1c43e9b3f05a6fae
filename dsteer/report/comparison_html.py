"""The one-file HTML report of a study: its variants side by side, with a link to each one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsteer.errors import StoreError
from dsteer.report.claims_tables import variant_verdicts
from dsteer.report.comparison_tables import compared, comparison_findings, comparison_tables
from dsteer.report.headline import headline
from dsteer.report.html import GLOSSARY, FigureView, Section, figure_view, render, stage_results
from dsteer.report.tables import settings_tables
from dsteer.report.values import at, items, mapping, plural, real
from dsteer.store import Json, read_json

FIGURES: tuple[str, ...] = (
    "variants_forest",
    "variants_causal",
    "claims_matrix",
    "vector_cosines",
    "cosines_over_depth",
    "principal_angles",
)
"""The comparison's figures, in order."""

_GLOSSARY: tuple[tuple[str, str], ...] = (
    ("variant", "one run of the study, with a base, a tuned model and a v* of its own"),
    ("split-half reliability", "random halves of the conversations give two v*s; r is the mean of "
     "their cosine, and 2r/(1 + r) the reliability of v* on all of them (Spearman-Brown)"),
    ("disattenuated cosine", "the cosine of two v*s from different halves of the conversations, "
     "over √(r_a r_b): an estimate of the cosine that endlessly many prompts would give; it may "
     "exceed 1, and is undefined where a reliability is not positive"),
    ("principal angles", "the smallest angle between two subspaces, then the smallest one across "
     "to it, and so on; 0°: a shared direction, 90°: an orthogonal one"),
    ("shared subspace", "eigenvectors of the average of the variants' projectors; eigenvalue 1: in "
     "every variant's subspace, 1/m: in one of m"),
    ("jackknife", "each conversation is left out in turn; value ± t · standard error"),
)  # fmt: skip


def write_comparison_report(run: Path, title: str | None = None) -> Path:
    """Write ``report.html`` into the folder of a study: one file, readable offline.

    Args:
        run: the study's folder, with ``comparison/`` and ``variants/``.
        title: heading of the report; default: the study's name.

    Raises:
        StoreError: the folder holds no comparison or no variants, or an artifact is malformed.
    """
    path = run / "comparison" / "result.json"
    if not (run / "variants").is_dir() or not path.is_file():
        lacking = "comparison/result.json" if (run / "variants").is_dir() else "variants/"
        raise StoreError(
            f"{run}: no {lacking} here, expected the folder of a study; run it with `dsteer run` "
            "or `dsteer compare` first"
        )
    result = mapping(read_json(path))
    manifest = _read(run / "manifest.json")
    name = str(manifest.get("name") or run.name)
    yaml = run / "pipeline.yaml"
    sections = [_comparison(run, result)]
    sections += [
        _variant(run, variant, at(entry, "failed"))
        for variant, entry in mapping(result.get("variants")).items()
    ]
    level = real(result.get("confidence"))
    return render(
        run / "report.html",
        title=title or name,
        name=name,
        description=manifest.get("description") or "",
        version=manifest.get("dsteer_version") or "",
        explorers=[],
        claims=variant_verdicts(compared(result)),
        warning=_warning(result),
        headline=comparison_findings(result),
        interval_words=f"{100 * level:g}\u00a0% intervals" if level else "intervals",
        notes=[("comparison", str(text)) for text in items(result.get("notes"))],
        titles={"comparison": "Comparison"},
        paper=None,
        sections=sections,
        absent=[],
        settings=settings_tables(manifest),
        yaml=yaml.read_text(encoding="utf-8") if yaml.is_file() else "",
        glossary=(*GLOSSARY, *_GLOSSARY),
    )


def _warning(result: dict[str, Json]) -> str | None:
    """The variants whose self-check failed."""
    lost = [name for name, v in compared(result).items()
            if at(v, "claims", "self_check") == "failed"]  # fmt: skip
    return (
        f"The self-check of {', '.join(lost)} failed: no number of theirs can be trusted."
        if lost
        else None
    )


def _comparison(run: Path, result: dict[str, Json]) -> Section:
    folder = run / "comparison"
    if not all((folder / "figures" / f"{name}.png").is_file() for name in FIGURES):
        from dsteer.report.comparison_figures import draw_comparison  # matplotlib is slow to import

        draw_comparison(result, folder)
    found = (figure_view(run, "comparison", name) for name in FIGURES)
    figures: list[FigureView] = [figure for figure in found if figure is not None]
    return Section(
        stage="comparison",
        title="Comparison",
        lead="The variants side by side: what each run found, and how their v*s and subspaces lie "
        "to each other.",
        figures=figures,
        missing_figures=[],
        tables=comparison_tables(result),
        remarks=[],
        diagnoses=None,
    )


def _variant(run: Path, name: str, failed: Json) -> Section:
    """One variant: its own headline, and the way to its own report."""
    folder = run / "variants" / name
    manifest = _read(folder / "manifest.json")
    results, _ = stage_results(folder, manifest)
    notes = sum(len(items(result.get("notes"))) for result in results.values())
    remarks: Sequence[str] = []
    if failed is not None:
        remarks = [f"Not compared: {failed}."]
    elif notes:
        remarks = [f"{plural(notes, 'note')} of its stages: see its own report."]
    own = folder / "report.html"
    return Section(
        stage=f"variant-{name}",
        title=name,
        lead=str(manifest.get("description") or "A variant of this study."),
        figures=[],
        missing_figures=[],
        tables=[],
        remarks=remarks,
        diagnoses=None,
        # the last point, on final_norm, stands among the study's own findings
        points=headline(manifest, results)[:-1] if results else [],
        link=f"variants/{name}/report.html" if own.is_file() else None,
    )


def _read(path: Path) -> dict[str, Json]:
    return mapping(read_json(path)) if path.is_file() else {}
