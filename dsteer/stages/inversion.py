"""Take λv* from the tuned model, and measure what it does against the base."""

from __future__ import annotations

from dsteer.behaviour.dial import Study
from dsteer.config import InversionConfig
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.store import Json


def run(context: StageContext) -> Json:
    """Sweep the strength; write ``generations.jsonl`` and, with samples, ``explorer.json``."""
    study = Study.of(
        context.config,
        context.config.inversion or InversionConfig(),
        "tuned",
        {name: context.input(name) for name in ("data", "activations", "vector")}
        | {name: path for name, path in context.inputs.items() if name == "geometry"},
        (context.base_path, context.tuned_path),
        context.folder,
        context.seed,
        context.reporter,
    )
    result = study.run()
    draw_result("inversion", result, context.folder)
    return result
