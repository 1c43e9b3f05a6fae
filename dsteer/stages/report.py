"""Draw every figure and write ``report.html`` from the artifacts of the other stages."""

from __future__ import annotations

from dsteer.report.html import write_report
from dsteer.stages import StageContext
from dsteer.store import Json


def run(context: StageContext) -> Json:
    """Write the report; the result names its file."""
    path = write_report(
        context.run, title=context.config.report.title if context.config.report else None
    )
    return {"headline": {"report": path.name}, "notes": []}
