"""Carry another model's vector over to this pair, and measure what it does here."""

from __future__ import annotations

from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.store import Json
from dsteer.transfer.study import Study


def run(context: StageContext) -> Json:
    """Measure; write ``sender.safetensors`` (v_A a site) and ``carried.safetensors``."""
    study = Study.of(
        context.config,
        {name: context.input(name) for name in ("data", "activations", "vector")},
        (context.base_path, context.tuned_path),
        context.folder,
        context.seed,
        context.reporter,
    )
    result = study.run()
    draw_result("transfer", result, context.folder)
    return result
