"""The one-file report: complete, honest about what is absent, escaped, and alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fabricate import STAGES, edited, fabricate

from dsteer.errors import StoreError
from dsteer.report import figures, html
from dsteer.report.headline import CONSTANT_BIAS
from dsteer.report.html import write_report
from dsteer.report.nulls_figures import NULL_FIGURES
from dsteer.report.values import interval
from dsteer.store import read_json

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What the tests ask of a page: its elements, its text, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if a.get("id")]  # type: ignore[misc]


def report(run: Path, **arguments: Any) -> Page:
    return Page(write_report(run, **arguments).read_text(encoding="utf-8"))


@pytest.fixture
def run(drawn_run: Path, tmp_path: Path) -> Path:
    """A copy of the drawn run, to be changed."""
    return Path(shutil.copytree(drawn_run, tmp_path / "run"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave absent figures absent, for tests of the text alone."""
    monkeypatch.setattr(figures, "draw_result", lambda *_: [])


# ---------------------------------------------------------------------------------- complete


def test_has_every_section_figure_and_the_constant_bias(run: Path) -> None:
    page = report(run)
    assert set(STAGES) <= set(page.ids)
    for stage in set(html.FIGURES) & set(STAGES):
        assert {f"f-{stage}-{name}" for name in html.FIGURES[stage]} <= set(page.ids)
    assert CONSTANT_BIAS in page.text
    assert ("Without a section here" in page.text) == (set(STAGES) != set(html.SECTIONS))


def test_figures_of_sections_are_those_that_are_drawn() -> None:
    drawn = {
        stage: tuple(name for name in names if name not in NULL_FIGURES.values())
        for stage, names in figures.FIGURES.items()
    }
    assert drawn == html.FIGURES


def test_numbers_of_the_findings_are_those_of_the_results(run: Path) -> None:
    page = report(run)
    cosine = read_json(run / "cosine" / "result.json")
    spectrum = read_json(run / "spectrum" / "result.json")
    dpo = read_json(run / "dpo" / "result.json")
    site = cosine["chosen_site"]
    for value in (
        cosine["sites"][site]["held_out"]["mean"],
        cosine["sites"]["final_norm"]["null"]["q95"],
        spectrum["sites"][site]["delta"]["uncentred"]["sigma_ratio"],
        spectrum["sites"][site]["shared_share"],
        dpo["test"]["reward_accuracy"],
        dpo["kl_to_base"],
    ):
        findings = page.text[: page.text.index("Beside the paper The paper")]
        assert interval(value) in findings
    assert "N = 624 prompts (fit 400, tune 64, test 160)" in page.text
    assert "σ₂/σ₁" in page.text
    assert "DPO learned the preference" in page.text


def test_paper_stands_beside_ours(run: Path) -> None:
    text = report(run).text
    for words in ("0.92–0.96 (Fig. 3)", "< 0.1", "falls (Fig. 4a)", "not measured"):
        assert words in text


def test_notes_stand_before_the_first_section(run: Path) -> None:
    text = report(run).text
    note = "3 prompts were longer than the context"
    assert 0 < text.index(note) < text.index("The paper's values")
    assert text.count(note) == 1  # in result.json and in summary.json, told once


def test_data_accounting_and_hashes(run: Path) -> None:
    text = report(run).text
    assert "roles do not alternate 9" in text
    assert "transcripts differ earlier 13" in text
    freeze = read_json(run / "dpo" / "result.json")["freeze"]["input"]["before"]
    assert f"{freeze[:12]}…" in text
    assert "byte-identical" in text


def test_settings_tell_cost_versions_and_config(run: Path) -> None:
    text = report(run).text
    for words in ("12.5 s", "858 MiB host", "2.13.0", "dpo.beta 0.1", "name: made-up"):
        assert words in text


# ---------------------------------------------------------------------------------- honest


def test_undefined_is_said_and_never_a_number(run: Path) -> None:
    text = (write_report(run)).read_text(encoding="utf-8")
    row = text[text.index('id="t-cosine-sites"') :]
    row = row[row.index('<th scope="row">resid_post.0</th>') :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[: row.index("</tr>")])
    assert cells == ["undefined"] * 10


def test_all_undefined(tmp_path: Path, undrawn: None) -> None:
    made = fabricate(tmp_path / "run", all_undefined=True, n_fit=30, n_test=10)
    text = report(made).text
    assert "At final_norm, Δ = 0: v* is undefined." in text
    assert "On the first response token: undefined, KL(tuned‖base) is 0 nats" in text


def test_learning_nothing_is_said_first(tmp_path: Path, undrawn: None) -> None:
    made = fabricate(tmp_path / "run", stages=("data", "base", "dpo"), learned=False)
    text = report(made).text
    assert "DPO learned nothing that shows on held-out pairs" in text
    assert text.index("learned nothing") < text.index("Notes and warnings")


def test_missing_stages_have_no_section_and_are_named(tmp_path: Path, undrawn: None) -> None:
    stages = [stage for stage in STAGES if stage not in ("base", "dpo")]
    made = fabricate(tmp_path / "run", stages=stages, n_fit=30, n_test=10)
    page = report(made)
    assert not {"base", "dpo"} & set(page.ids)
    assert (
        "Without a section here: Base model (not part of this pipeline); "
        "DPO training (not part of this pipeline)" in page.text
    )


def test_stale_results_are_left_out(run: Path) -> None:
    with edited(run / "manifest.json") as manifest:
        del manifest["stages"]["spectrum"]
    page = report(run)
    assert "spectrum" not in page.ids
    assert "Spectra (its result belongs to other settings than this run's)" in page.text


def test_configured_but_interrupted(tmp_path: Path, undrawn: None) -> None:
    made = fabricate(tmp_path / "run", stages=("data", "base"), config={"dpo": {"beta": 0.1}})
    assert "DPO training (configured, but not run to its end)" in report(made).text


def test_lora_bounds_the_rank_and_the_report_says_so(run: Path) -> None:
    with edited(run / "manifest.json") as manifest:
        manifest["config"]["dpo"]["lora"] = {"rank": 8}
    text = report(run).text
    assert "LoRA of rank 8" in text
    assert "bounded by construction" in text


def test_shift_within_rounding_is_called_so(run: Path) -> None:
    with edited(run / "vector" / "result.json") as result:
        result["sites"]["final_norm"] |= {
            "norm": 2e-6,
            "noise_mean_norm": 1e-6,
            "within_rounding": True,
        }
    assert "2.00 times the noise floor (1.00\u00a0×\u00a010⁻⁶): not to be told from" in (
        write_report(run).read_text(encoding="utf-8")
    )


def test_worse_than_chance_is_called_so(run: Path) -> None:
    with edited(run / "dpo" / "result.json") as result:
        result["learned"] = False
        result["test"]["reward_accuracy"] = {"value": 0.3, "low": 0.2, "high": 0.4}
    assert "DPO made held-out preferences worse than chance" in report(run).text


def test_cosine_within_the_null_is_called_so(run: Path) -> None:
    with edited(run / "cosine" / "result.json") as result:
        result["sites"]["final_norm"]["held_out"]["mean"] = {"value": 0.1, "low": -0.1, "high": 0.3}
    assert "cannot be told from chance" in report(run).text


# ---------------------------------------------------------------------------------- tolerant


def test_without_manifest_and_summary(run: Path) -> None:
    for name in ("manifest.json", "summary.json", "pipeline.yaml"):
        (run / name).unlink()
    page = report(run)
    assert set(STAGES) <= set(page.ids)
    assert "22 rows were dropped" in page.text


def test_results_with_nothing_but_headlines(tmp_path: Path) -> None:
    made = fabricate(tmp_path / "run", n_fit=20, n_test=10)
    for stage in STAGES:
        with edited(made / stage / "result.json") as result:
            result.clear()
            result["headline"] = {}
    report(made)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no stage of a run is complete here"):
        write_report(tmp_path)


def test_absent_figures_are_drawn_and_present_ones_kept(run: Path) -> None:
    shutil.rmtree(run / "cosine" / "figures")
    kept = run / "vector" / "figures" / "kl_recovery.png"
    before = kept.stat().st_mtime_ns
    assert "f-cosine-fig3_cosine" in report(run).ids
    assert kept.stat().st_mtime_ns == before


def test_figure_that_cannot_be_drawn_is_said(run: Path) -> None:
    shutil.rmtree(run / "cosine" / "figures")
    (run / "cosine" / "cosines.safetensors").unlink()
    text = report(run).text
    assert "A figure could not be drawn: cosine/cosines.safetensors: no such file" in text
    assert str(run) not in text


# ---------------------------------------------------------------------------------- safe


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    made = fabricate(
        tmp_path / "run", stages=("data", "activations"), name=evil, note=f"{evil} in a note"
    )
    with edited(made / "data" / "result.json") as result:
        result["sources"][0] |= {"path": evil, "dropped": {evil: 1}}
    with edited(made / "activations" / "result.json") as result:
        result["noise_floor"] = {evil: {"rms": 1.0, "mean_norm": 1.0}}
        result["template"] = evil
    with edited(made / "manifest.json") as manifest:
        manifest |= {"description": evil, "platform": evil, "inputs": {evil: evil}}
        manifest["config"] = {"models": {"base": evil}, evil: evil}
    text = write_report(made, title=f'"{evil}').read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10
    Page(text)


def test_one_file_that_asks_for_nothing(run: Path) -> None:
    path = write_report(run)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.stat().st_size < 6_000_000
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not any(script.get("src") for script in page.all("script"))
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'")


def test_accessible(run: Path) -> None:
    page = report(run)
    assert page.all("html")[0]["lang"] == "en"
    assert not [name for name, n in Counter(page.ids).items() if n > 1]
    assert all(image.get("alt") for image in page.all("img"))
    assert all(cell.get("scope") in {"col", "row"} for cell in page.all("th"))
    scrolling = [a for tag, a in page.elements if tag == "div" and a.get("class") == "scroll"]
    assert scrolling
    assert all(a.get("tabindex") == "0" and a.get("role") == "region" for a in scrolling)
    for anchor in page.all("a"):
        target = str(anchor["href"])
        if target.startswith("#"):
            assert target[1:] in page.ids
        else:
            assert (run / target).is_file()
    for attributes in (a for _, a in page.elements if a.get("aria-labelledby")):
        assert attributes["aria-labelledby"] in page.ids
    style = (run / "report.html").read_text(encoding="utf-8")
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem"):
        assert query in style


def test_every_column_is_defined(run: Path) -> None:
    """A measured column has its definition under the table; plain counts need none."""
    for table in html.STAGE_TABLES["cosine"](read_json(run / "cosine" / "result.json")):
        assert all(column.meaning for column in table.columns)
    for table in html.STAGE_TABLES["vector"](read_json(run / "vector" / "result.json")):
        assert all(column.meaning for column in table.columns if not column.text)
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_same_artifacts_give_the_same_report(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_needs_neither_torch_nor_matplotlib(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dsteer.report.html import write_report;"
        f"write_report(Path({str(run)!r}));"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'matplotlib'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
