"""Named sets of steering vectors, each with the site where it acts and how far it is turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsteer.activations.sites import resid_post
from dsteer.errors import ConfigError, MeasurementError, did_you_mean
from dsteer.models.load import Model
from dsteer.steering.intervene import Hooks, Intervention, Positions, Schedule
from dsteer.steering.provenance import require_fit
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

Measure = Callable[[SteeringVector, float], float]
"""λ of a vector at a strength in other units."""


@dataclass(frozen=True, eq=False)
class Dial:
    """One vector of a set, and its strength.

    Attributes:
        name: what it is called.
        vectors: the set.
        site: where it acts, one of the set's.
        strength: how far it is turned, in the units of its :class:`Dials`.

    Raises:
        ConfigError: the set holds no vector at the site.
        MeasurementError: the strength is not finite.
    """

    name: str
    vectors: SteeringVectorSet
    site: str
    strength: float = 0.0

    def __post_init__(self) -> None:
        if self.site not in self.vectors:
            held = ", ".join(self.vectors)
            raise ConfigError(
                f"{self.name}: no vector at site {self.site!r}; expected one of {held}"
            )
        if not math.isfinite(self.strength):
            raise MeasurementError(
                f"{self.name}: strength {self.strength}; expected a finite number"
            )

    @property
    def vector(self) -> SteeringVector:
        """The vector that acts."""
        return self.vectors[self.site]


class Dials(Mapping[str, Dial]):
    """Dials of one model: a mapping from name to dial, and what they do to rows of a batch.

    Args:
        model: the model that is steered.
        dials: at least one; they act in their order.
        positions: the tokens that are steered.
        schedule: how strengths change over the generated tokens.
        measure: gives λ of a vector at a strength in other units than the vector's; asked once a
            vector and strength.

    Raises:
        ConfigError: none, two of one name, or a site that the model lacks.
        ModelError: vectors that are of another model.
    """

    def __init__(
        self,
        model: Model,
        dials: Sequence[Dial],
        *,
        positions: Positions = "all",
        schedule: Schedule | None = None,
        measure: Measure | None = None,
    ) -> None:
        if not dials:
            raise ConfigError("there are no vectors to steer by; give at least one")
        self._dials: dict[str, Dial] = {}
        for dial in dials:
            if dial.name in self._dials:
                raise ConfigError(
                    f"two vectors are called {dial.name!r}; give each a name, as in NAME=FILE"
                )
            require_fit(dial.vectors, model)
            self._dials[dial.name] = dial
        self._model = model
        self._require_sites(self._dials)
        self.positions, self.schedule = positions, schedule
        self._measure = measure
        self._measured: dict[tuple[SteeringVector, float], float] = {}

    def __getitem__(self, name: str) -> Dial:
        return self._dials[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dials)

    def __len__(self) -> int:
        return len(self._dials)

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each."""
        return {name: dial.strength for name, dial in self.items()}

    @property
    def plain(self) -> dict[str, float]:
        """Strengths of 0: the model as it is."""
        return dict.fromkeys(self, 0.0)

    def turned(self, changes: Mapping[str, object]) -> dict[str, float]:
        """The strengths with some of them changed.

        Raises:
            ConfigError: a name that no dial has, or a strength that is no finite number.
        """
        found = self.strengths
        for name, value in changes.items():
            self._require(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"strength {value!r} of {name}: expected a number")
            try:
                found[name] = float(value)
            except OverflowError:
                found[name] = math.inf
            if not math.isfinite(found[name]):
                raise ConfigError(f"strength {found[name]} of {name}: expected a finite number")
        return found

    def turn(self, changes: Mapping[str, object]) -> None:
        """Change strengths for good; errors as of :meth:`turned`."""
        for name, strength in self.turned(changes).items():
            self._dials[name] = replace(self._dials[name], strength=strength)

    def move(self, site: str, name: str | None = None) -> None:
        """Let one dial, or all, act at another site; a number is a block's.

        Raises:
            ConfigError: a name that no dial has, or a site where its set holds no vector, or that
                the model lacks.
        """
        if name is not None:
            self._require(name)
        site = resid_post(int(site)) if site.isdecimal() else site
        moved = {
            dial.name: replace(dial, site=site)
            for dial in self._dials.values()
            if name in (None, dial.name)
        }
        self._require_sites(moved)
        self._dials |= moved

    def lambdas(self, row: Mapping[str, float]) -> dict[str, float]:
        """λ of each, in units of its vector, of strengths; 0 is 0 in all units.

        Raises:
            MeasurementError: a strength that its units can't measure.
        """
        return {name: self._lambda(self[name].vector, strength) for name, strength in row.items()}

    def _lambda(self, vector: SteeringVector, strength: float) -> float:
        if self._measure is None or strength == 0:
            return strength
        key = (vector, strength)
        if key not in self._measured:
            self._measured[key] = self._measure(vector, strength)
        return self._measured[key]

    def interventions(self, rows: Sequence[Mapping[str, float]]) -> list[Intervention]:
        """What is done to a batch whose row i is steered by ``rows[i]``, a strength a name.

        A dial that all rows leave at 0 does nothing, not even hook the model.

        Raises:
            MeasurementError: a strength that its units can't measure.
        """
        lambdas = [self.lambdas(row) for row in rows]
        return [
            Intervention(
                dial.site,
                dial.vector,
                strength=[row[name] for row in lambdas],
                positions=self.positions,
                schedule=self.schedule,
            )
            for name, dial in self.items()
            if any(row[name] for row in rows)
        ]

    def _require_sites(self, dials: Mapping[str, Dial]) -> None:
        Hooks(self._model, [Intervention(dial.site, dial.vector) for dial in dials.values()])

    def _require(self, name: str) -> None:
        if name not in self._dials:
            raise ConfigError(f"{name!r}: no vector of this name{did_you_mean(name, self._dials)}")
