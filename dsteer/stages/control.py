"""Dial planted axes of the synthetic world by contrast vectors, one and two at a time."""

from __future__ import annotations

from dsteer.behaviour.control import Control
from dsteer.config import SyntheticSource
from dsteer.data.jsonl import read_pairs
from dsteer.data.synthetic import PromptRecord, World
from dsteer.data.types import PreferencePair
from dsteer.errors import ModelError
from dsteer.models.pair import ModelPair
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.store import Json


def run(context: StageContext) -> Json:
    """Measure; write ``{axis}-{read}.safetensors``, the contrast vectors a site.

    Raises:
        ModelError: an encoder-decoder model.
    """
    config, data = context.config, context.input("data")
    assert config.control is not None
    records: dict[str, tuple[World, PromptRecord]] = {}
    for source in config.data.sources:
        if isinstance(source, SyntheticSource):
            world = World(source.seed, source.styled)
            for record in world.records(source.conversations, source.topics, source.axes):
                records[record.text] = world, record

    def planted(split: str) -> list[PreferencePair]:
        pairs = read_pairs(data / f"{split}.jsonl")
        return [pair for pair in pairs if str(pair.prompt) in records]

    models = ModelPair.configured(config.models, context.base_path, context.base_path)
    if models.encoder_decoder:
        raise ModelError(
            f"stage control: {models.name('base')} is an encoder-decoder model; expected a "
            "decoder-only one, which goes on where a dialogue of the synthetic world ends"
        )
    with models.using("base") as model:
        result = Control(
            config=config.control,
            model=model,
            tokenizer=models.tokenizer_for("none"),
            records=records,
            fit=planted("fit"),
            tune=planted("tune"),
            test=planted("test"),
            seed=context.seed,
            folder=context.folder,
            reporter=context.reporter,
        ).run()
    draw_result("control", result, context.folder)
    return result
