"""THE table of stages, in order, and what a stage is given.

A stage is one thin file with ``run(context) -> result``: it loads its inputs, calls the layers
below and returns one JSON result; tensors and figures it writes into its own folder. Stages never
import each other: they meet in artifacts. This module imports no torch, so a plan needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from dsteer.config import PipelineConfig
from dsteer.errors import StoreError
from dsteer.parallel import ALONE, Ranks
from dsteer.progress import Reporter
from dsteer.store import Json, read_json


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    Attributes:
        name: the stage, its config section and its folder.
        entry: import path of its function.
        needs: the stages whose artifacts it reads, where they are part of the plan.
        reads: the config keys that its result depends on.
        version: raised when the same inputs would give another result.
        does: one line for people.
        distributed: whether all processes of a run take part; else the first one works alone.
        reads_nulls: whether it reads the runs of the pipeline's nulls, which go before it.
    """

    name: str
    entry: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    version: int
    does: str
    distributed: bool = False
    reads_nulls: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("data", "dsteer.stages.data:run", (), ("data", "seed"), 1,
          "read, check and split the preference pairs"),
    Stage("base", "dsteer.stages.base:run", ("data",), ("base", "seed", "models.device"), 1,
          "train a tiny base model and its tokenizer"),
    Stage("dpo", "dsteer.stages.dpo:run", ("data", "base"), ("dpo", "models", "seed"), 2,
          "train the tuned model with DPO", distributed=True),
    Stage("activations", "dsteer.stages.activations:run", ("data", "base", "dpo"),
          ("activations", "models"), 2, "read paired hidden states", distributed=True),
    Stage("vector", "dsteer.stages.vector:run", ("base", "dpo", "activations"),
          ("vector", "models", "seed"), 2, "average v* and test its size, direction and reach"),
    Stage("cosine", "dsteer.stages.cosine:run", ("activations", "vector"), ("cosine", "seed"), 3,
          "measure cosines with v*"),
    Stage("spectrum", "dsteer.stages.spectrum:run", ("activations", "vector"),
          ("spectrum",), 3, "measure singular spectra, entropies and ranks"),
    Stage("template", "dsteer.stages.template:run", ("data", "base", "dpo"),
          ("template", "models", "seed"), 3,
          "divide the displacement into chat template and training", distributed=True),
    Stage("geometry", "dsteer.stages.geometry:run",
          ("data", "base", "dpo", "activations", "vector"),
          ("geometry", "dpo.beta", "behaviour.beta", "models", "seed"), 5,
          "measure preference vectors and gradients of the DPO loss"),
    Stage("learned", "dsteer.stages.learned:run",
          ("data", "base", "dpo", "activations", "vector"),
          ("learned", "dpo.beta", "behaviour.beta", "models", "seed"), 2,
          "learn vectors under the DPO loss and hold them against v*"),
    Stage("profile", "dsteer.stages.profile:run",
          ("data", "base", "dpo", "activations", "vector"),
          ("profile", "dpo.beta", "behaviour.beta", "models", "seed"), 2,
          "patch states, add v* and random directions, site by site"),
    Stage("rank", "dsteer.stages.rank:run",
          ("data", "base", "dpo", "activations", "vector", "cosine", "profile"),
          ("rank", "models", "seed"), 2, "count the directions that the change needs"),
    Stage("maps", "dsteer.stages.maps:run",
          ("data", "base", "dpo", "activations", "vector", "cosine", "profile"),
          ("maps", "models", "seed"), 2, "fit nested maps from base to tuned states"),
    Stage("strength", "dsteer.stages.strength:run",
          ("data", "base", "dpo", "activations", "vector", "cosine", "profile"),
          ("strength", "models", "seed"), 2, "find the best strength, and the regret of others"),
    Stage("interpolation", "dsteer.stages.interpolation:run",
          ("data", "base", "dpo", "activations", "vector", "geometry"),
          ("interpolation", "behaviour", "dpo.beta", "models", "seed"), 5,
          "add λv* to the base and measure what it does"),
    Stage("inversion", "dsteer.stages.inversion:run",
          ("data", "base", "dpo", "activations", "vector"),
          ("inversion", "behaviour", "dpo.beta", "models", "seed"), 5,
          "take λv* from the tuned model and measure what it does"),
    Stage("transfer", "dsteer.stages.transfer:run",
          ("data", "base", "dpo", "activations", "vector"),
          ("transfer", "dpo.beta", "models", "seed"), 3,
          "carry another model's vector over and measure what it does here"),
    Stage("control", "dsteer.stages.control:run", ("data", "base"),
          ("control", "models", "seed"), 2,
          "dial planted axes by contrast vectors, one and two at a time"),
    Stage("groups", "dsteer.stages.groups:run",
          ("data", "base", "dpo", "activations", "vector", "cosine", "profile"),
          ("groups", "dpo.beta", "behaviour.beta", "models", "seed"), 2,
          "one vector a group of prompts, and what removing one leaves"),
    Stage("reversal", "dsteer.stages.reversal:run",
          ("data", "base", "dpo", "activations", "vector", "inversion"),
          ("reversal", "dpo", "behaviour.beta", "models", "seed"), 4,
          "undo the tuning by inversion and by training"),
    Stage("claims", "dsteer.stages.claims:run",
          ("base", "dpo", "activations", "vector", "cosine", "spectrum", "profile", "rank", "maps",
           "strength", "interpolation", "inversion"),
          ("claims", "models", "seed"), 4, "grade the claims, and check the measurement itself",
          reads_nulls=True),
    Stage("report", "dsteer.stages.report:run",
          ("data", "base", "dpo", "activations", "vector", "cosine", "spectrum", "template",
           "geometry", "learned", "profile", "rank", "maps", "strength", "interpolation",
           "inversion", "transfer", "control", "groups", "reversal", "claims"),
          ("report", "name", "description"), 1, "draw the figures and write the report",
          reads_nulls=True),
)  # fmt: skip

NULLS_FOLDER = "nulls"
"""The folder inside a run that holds the runs of its nulls."""

BY_NAME: Mapping[str, Stage] = {stage.name: stage for stage in STAGES}


def planned(config: PipelineConfig) -> list[Stage]:
    """The stages that a pipeline configures, in order."""
    return [stage for stage in STAGES if getattr(config, stage.name) is not None]


def needs(stage: Stage, config: PipelineConfig) -> list[Stage]:
    """The planned stages whose artifacts a stage reads."""
    present = {other.name for other in planned(config)}
    if stage.name == "base" and config.base is not None and config.base.texts is not None:
        present.discard("data")  # the base has texts of its own, whatever the preferences
    return [BY_NAME[name] for name in stage.needs if name in present]


@dataclass(frozen=True)
class StageContext:
    """What a stage is given.

    Attributes:
        name: the stage.
        config: the whole pipeline.
        run: the run folder. A stage writes only below ``folder``.
        reporter: shows progress.
        ranks: the processes that do this stage together. All but the first one read and write only
            what it shares with them, and their results count for nothing.
    """

    name: str
    config: PipelineConfig
    run: Path
    reporter: Reporter
    ranks: Ranks = ALONE

    @property
    def folder(self) -> Path:
        """This stage's own folder."""
        return self.run / self.name

    @property
    def nulls(self) -> Mapping[str, Path]:
        """The run folder of each null of the pipeline; one that failed is not complete."""
        return {name: self.run / NULLS_FOLDER / name for name in self.config.nulls}

    @property
    def inputs(self) -> Mapping[str, Path]:
        """Folder of each stage that this one reads."""
        return {
            other.name: self.run / other.name for other in needs(BY_NAME[self.name], self.config)
        }

    def input(self, name: str) -> Path:
        """Folder of a stage that this one can't do without.

        Raises:
            StoreError: the pipeline does not configure that stage.
        """
        if name not in self.inputs:
            raise StoreError(
                f"stage {self.name} reads {name}, which this pipeline does not configure; "
                f"add a `{name}:` section"
            )
        return self.inputs[name]

    def result(self, name: str) -> Json:
        """Another stage's ``result.json``."""
        return read_json(self.input(name) / "result.json")

    def seed(self, *names: str) -> int:
        """A seed for one purpose of this stage."""
        return self.config.seed_for(self.name, *names)

    @property
    def template(self) -> str:
        """How prompts are written: ``none`` or ``chat``."""
        activations = self.config.activations
        return activations.template if activations is not None else "none"

    @property
    def base_path(self) -> str:
        """Hub id or folder of the base model."""
        trained = self.inputs.get("base")
        return str(trained / "model") if trained is not None else str(self.config.models.base)

    @property
    def tuned_path(self) -> str:
        """Hub id or folder of the tuned model (or of its adapter)."""
        if self.config.models.tuned_is_base:
            return self.base_path
        trained = self.inputs.get("dpo")
        return str(trained / "model") if trained is not None else str(self.config.models.tuned)


def call(context: StageContext) -> Json:
    """Import a stage's function and run it."""
    module, _, function = BY_NAME[context.name].entry.partition(":")
    return getattr(import_module(module), function)(context)
