"""Carry a sender's vector to a receiver and measure what it does there, beside the native vector.

The sender A and the receiver B are pairs of a base and a tuned model. The map is learned on neutral
text that both bases read, v_A is carried by its linear part and scaled to the norm of the
receiver's own v* at that site. Site pair, kind of map, steered tokens and strengths are chosen on
tune pairs, all effects are of test pairs. The best of many does well by luck alone, so every draw
of a null is carried in all the ways that v_A is and goes through the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsteer.activations.extract import extract
from dsteer.activations.sites import block_of, resolve_sites
from dsteer.behaviour.dial import POSITIONS
from dsteer.behaviour.teacher_forced import Predictions, Scores, predictions, score
from dsteer.config import (
    ActivationsConfig,
    ModelsConfig,
    PipelineConfig,
    SyntheticSource,
    TransferConfig,
    TransferMap,
)
from dsteer.data.jsonl import read_pairs
from dsteer.data.sources import read_source
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError, ModelError
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.progress import Reporter
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.build import mean_difference
from dsteer.steering.intervene import Positions
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, read_tensors, write_tensors
from dsteer.transfer.align import PARTS, SINK, Text, ordinary, parts, read_states, read_texts
from dsteer.transfer.answers import Answers, Effects, effects, read_answers
from dsteer.transfer.maps import AffineMap, Cloud, choose, fit, widths_for
from dsteer.transfer.share import NULLS, Draws, band, described

_TIE = 1e-9

ARMS = 256
"""Arms of one pass; each keeps its states of all answers of a batch."""

DEPTHS = 4
"""How many depths of each model ``auto`` takes."""


@dataclass(frozen=True)
class Study:
    """What is carried over, and on which data it is judged.

    Attributes:
        config: of the stage.
        activations: how prompts are read.
        sender: both models of A; the base alone, twice, where its vectors come from a file.
        receiver: both models of B.
        vectors: the receiver's own v* a site.
        fit: prompts that the sender's v* is averaged over.
        tune: pairs on which choices are made.
        test: pairs on which effects are measured.
        texts: neutral texts.
        source: where these come from, for the report.
        beta: of the implicit reward.
        seed: a seed for each purpose.
        folder: where vectors are written.
        reporter: shows progress.
    """

    config: TransferConfig
    activations: ActivationsConfig
    sender: ModelPair
    receiver: ModelPair
    vectors: SteeringVectorSet
    fit: Sequence[PreferencePair]
    tune: Sequence[PreferencePair]
    test: Sequence[PreferencePair]
    texts: Sequence[str]
    source: str
    beta: float
    seed: Callable[..., int]
    folder: Path
    reporter: Reporter

    @classmethod
    def of(
        cls,
        config: PipelineConfig,
        inputs: Mapping[str, Path],
        paths: tuple[str, str],
        folder: Path,
        seed: Callable[..., int],
        reporter: Reporter,
    ) -> Study:
        """The study of a pipeline.

        Args:
            config: the pipeline.
            inputs: folders of the stages that it reads.
            paths: of the receiver's base and tuned model.
            folder: where vectors are written.
            seed: a seed for each purpose.
            reporter: shows progress.
        """
        asked, activations = config.transfer, config.activations
        assert asked is not None
        assert activations is not None
        splits = {
            name: read_pairs(inputs["data"] / f"{name}.jsonl")
            for name in ("train", "fit", "tune", "test")
        }
        if asked.text is not None:
            pairs = read_source(asked.text).pairs
            source = "synthetic" if isinstance(asked.text, SyntheticSource) else asked.text.path
            source = label(source)
        else:
            source = "train" if splits["train"] else "fit"
            pairs = splits[source]
            source = f"the {source} split"
        models = config.models
        sender = sending_pair(models, asked)
        receiver = ModelPair.configured(models, *paths)
        for pair in (sender, receiver):
            if pair.encoder_decoder:
                raise ModelError(
                    f"stage transfer: {pair.name('base')} is an encoder-decoder model, whose "
                    "states on running text are of two stacks; expected decoder-only models"
                )
        return cls(
            config=asked,
            activations=activations,
            sender=sender,
            receiver=receiver,
            vectors=SteeringVectorSet.load(inputs["vector"] / "vectors.safetensors"),
            fit=splits["fit"],
            tune=splits["tune"],
            test=splits["test"],
            texts=neutral_texts(pairs),
            source=source,
            beta=config.reward_beta,
            seed=seed,
            folder=folder,
            reporter=reporter,
        )

    def run(self) -> Json:
        """Measure everything; returns the result, and writes vectors beside it."""
        return _Run(self).result()


def sending_pair(models: ModelsConfig, asked: TransferConfig) -> ModelPair:
    """The sender's models, loaded as the receiver's are.

    Raises:
        ModelError: as :meth:`ModelPair.load`.
    """
    alone = asked.tuned is None  # its vectors are given: the base stands for both
    of_sender = {
        "tokenizer": asked.tokenizer,
        "chat_template": None,
        "base_revision": asked.base_revision,
        "tuned_revision": asked.base_revision if alone else asked.tuned_revision,
    }
    own = models.model_copy(update=of_sender)
    return ModelPair.configured(own, asked.base, asked.tuned or asked.base)


def neutral_texts(pairs: Sequence[PreferencePair]) -> list[str]:
    """One text a conversation: the prompt with its chosen answer, if it has one; messages as they
    follow, without roles."""
    found: dict[str, str] = {}
    for pair in pairs:
        if isinstance(pair.prompt, str):
            text = pair.prompt + (pair.chosen or "")
        else:
            contents = [message["content"] for message in pair.prompt]
            text = "\n\n".join([*contents, *([pair.chosen] if pair.chosen else [])])
        found.setdefault(pair.conversation, text)
    return list(found.values())


def label(path: str) -> str:
    """A hub id as it is, a local path by its name: results hold no path of this machine.

    A model that a run trained lies in ``<run>/<stage>/model`` and goes by these three.
    """
    local = Path(path).expanduser()
    if not local.exists():
        return path
    parts = local.resolve().parts[1:]
    return "/".join(parts[-3:] if parts[-1] == "model" else parts[-1:])


def depths(sites: Sequence[str]) -> list[str]:
    """The blocks at the ends of the quarters of some sites; all where they are few or no blocks."""
    blocks = [site for site in sites if block_of(site) is not None] or list(sites)
    if len(blocks) <= DEPTHS:
        return blocks
    return [blocks[round(len(blocks) * (i + 1) / DEPTHS) - 1] for i in range(DEPTHS)]


@dataclass(frozen=True)
class _Setting:
    """A vector, at its site, on the tokens that it steers and with its strength."""

    vector: SteeringVector
    positions: Positions
    strength: float = 1.0

    @property
    def json(self) -> dict[str, Json]:
        """Where and how it acts."""
        return {
            "sender_site": self.vector.metadata.get("sender_site"),
            "receiver_site": self.vector.site,
            "map": self.vector.metadata.get("map"),
            "positions": self.positions,
            "strength": self.strength,
        }


@dataclass(frozen=True)
class _Choice:
    """What was chosen on tune pairs at λ = 1: which of some vectors, on which tokens."""

    index: int
    setting: _Setting
    recovered: Mapping[Positions, float]

    @property
    def json(self) -> dict[str, Json]:
        """The setting with the KL that it recovered."""
        return {**self.setting.json, "kl_recovered_tune": self.recovered[self.setting.positions]}


@dataclass(frozen=True)
class _Candidates:
    """Ways to carry a vector: from a site to a site, by the best map of a kind.

    Attributes:
        described: each way.
        carried: v_A carried in each way.
        nulls: of each null its draws; of each draw what takes the place of v_A in each way.
    """

    described: list[dict[str, Json]] = field(default_factory=list)
    carried: list[SteeringVector] = field(default_factory=list)
    nulls: dict[str, list[list[SteeringVector]]] = field(default_factory=dict)


class _Run:
    """One study, from the sender's vector to the result."""

    def __init__(self, study: Study) -> None:
        self.study, self.config = study, study.config
        self.notes: list[str] = []
        self._readout: Readout | None = None

    def result(self) -> Json:
        study, config = self.study, self.config
        senders = self._sender_vectors()
        receivers = self._receiver_sites()
        divided, texts = self._texts()
        states = self._states(divided, list(senders), receivers)
        fitted = states["sender"].positions
        texts |= {
            "positions": fitted,
            "sinks": sum(map(_positions, divided.values())) - sum(fitted.values()),
        }
        study.sender.release()
        tune = self._answers(study.tune, config.tune_pairs, "tune")
        test = self._answers(study.test, config.pairs, "test")
        with study.receiver.using("tuned") as model:
            aims = Readout.of(model, vocabulary=study.receiver.vocabulary)
            tune_aims = predictions(model, tune.texts[tune.chosen], aims)
            test_aims = predictions(model, test.texts, aims)
            del model
        ways = self._candidates(senders, receivers, states)
        natives = {site: study.vectors[site] for site in receivers}
        offers = [ways.carried, list(natives.values())]
        offers += [draw for draws in ways.nulls.values() for draw in draws]
        (carried, best, *rest), recovered = self._choose(offers, tune, tune_aims)
        remaining = iter(rest)
        nulls = {name: [next(remaining) for _ in draws] for name, draws in ways.nulls.items()}
        for row, vector, values in zip(ways.described, ways.carried, recovered[0], strict=True):
            kind = max(values, key=lambda kind: values[kind])
            row["positions"] = kind
            row["kl_recovered_tune"] = values[kind]
            row["native_kl_recovered_tune"] = recovered[1][list(natives).index(vector.site)][kind]
        chosen, vector = ways.described[carried.index], carried.setting.vector
        native = natives[vector.site]
        levels = self._levels(carried, best, nulls, natives, tune, tune_aims)
        measured = self._measure(levels, test, test_aims)
        SteeringVectorSet([vector]).save(study.folder / "carried.safetensors")
        cosine = _cosine(vector.tensor.numpy(), native)
        cosines = {
            name: band(
                np.array(
                    [
                        _cosine(v.tensor.numpy(), natives[v.site])
                        for v in (choice.setting.vector for choice in choices)
                    ]
                )
            )
            for name, choices in nulls.items()
        }
        highest = max(row["high"] for row in cosines.values())
        self._add_notes(chosen, texts, measured, tune, test)
        kl = measured["kl_recovered"]
        return {
            "sender": {
                "base": label(config.base),
                "tuned": None if config.tuned is None else label(config.tuned),
                "vectors": None if config.vectors is None else label(config.vectors),
                "width": study.sender.width,
                "blocks": study.sender.n_blocks,
                "norms": {site: vector.norm for site, vector in senders.items()},
            },
            "receiver": {
                "width": study.receiver.width,
                "blocks": study.receiver.n_blocks,
                "norms": {site: study.vectors[site].norm for site in receivers},
            },
            "text": texts,
            "candidates": ways.described,
            "chosen": chosen,
            "chosen_on": "tune",
            "chosen_by": "KL recovered at λ = 1",
            "positions": carried.setting.positions,
            "native_best": {name: level["native_best"][0].json for name, level in levels.items()},
            "null_choices": {
                name: [choice.json for choice in choices] for name, choices in nulls.items()
            },
            "natural_norm": native.norm,
            "strengths": {
                "grid": list(config.strengths),
                "tuned": {
                    name: [setting.strength for setting in settings]
                    for name, settings in levels["tuned"].items()
                },
            },
            "pairs": {
                "choice": min(config.choice_pairs, tune.pairs),
                "tune": tune.pairs,
                "test": test.pairs,
                "written": test.written,
            },
            "cosine": {
                "carried": cosine,
                "nulls": cosines,
                "above_nulls": cosine > highest,
            },
            "null_labels": dict(NULLS),
            "metrics": measured,
            "headline": {
                "sender_site": chosen["sender_site"],
                "receiver_site": chosen["receiver_site"],
                "map": chosen["map"],
                "cosine": cosine,
                "share": _value(kl and kl["one"]["share"]),
                "above_nulls": kl and kl["one"]["above_nulls"],
            },
            "notes": list(dict.fromkeys(self.notes)),
        }

    # ------------------------------------------------------------------ vectors and states

    def _sender_vectors(self) -> dict[str, SteeringVector]:
        """v_A at the sender's sites: averaged from both its models, or of a file."""
        study, config = self.study, self.config
        path = study.folder / "sender.safetensors"
        if config.vectors is not None:
            vectors = SteeringVectorSet.load(Path(config.vectors).expanduser())
            if vectors.width != study.sender.width:
                raise MeasurementError(
                    f"transfer.vectors: {label(config.vectors)} has vectors of width "
                    f"{vectors.width}, and {label(config.base)} states of width "
                    f"{study.sender.width}; give the vectors of that model"
                )
            resolve_sites(list(vectors), study.sender.n_blocks)
        else:
            sites = resolve_sites("all", study.sender.n_blocks)
            if config.sender_sites == "auto":
                sites = tuple(depths(sites))
            elif config.sender_sites != "all":
                sites = resolve_sites(config.sender_sites, study.sender.n_blocks)
            read = self.study.activations
            states = extract(
                study.sender,
                study.fit,
                sites=sites,
                position=read.position,
                template=read.template,
                batch_tokens=read.batch_tokens,
                max_tokens=read.max_tokens,
                folder=study.folder / "checkpoints" / "sender",
                reporter=study.reporter,
            )
            study.sender.release("tuned")
            vectors = mean_difference(states)
        vectors.save(path)
        found = self._defined(vectors, config.sender_sites, "sender")
        self.notes += [f"Sender: {note}" for note in study.sender.notes]
        return found

    def _receiver_sites(self) -> list[str]:
        return list(self._defined(self.study.vectors, self.config.receiver_sites, "receiver"))

    def _defined(
        self, vectors: SteeringVectorSet, asked: str | Sequence[str], who: str
    ) -> dict[str, SteeringVector]:
        """The vectors at the asked sites that have a direction."""
        for site in () if isinstance(asked, str) else asked:
            if site not in vectors:
                raise MeasurementError(
                    f"transfer.{who}_sites: {site}: the {who} has no v* there; name some of "
                    f"{', '.join(vectors)}"
                )
        known = [site for site in vectors if isinstance(asked, str) or site in asked]
        zero = [site for site in known if vectors[site].undefined]
        known = [site for site in known if site not in zero]
        if asked == "auto":
            known = depths(known)
        if not known:
            raise MeasurementError(
                f"the {who}'s v* is zero at every site that was asked for ({', '.join(zero)}), so "
                "it has no direction; give a pair of models that differ, or other sites"
            )
        if zero:
            self.notes.append(f"The {who}'s v* is zero, and left out, at {', '.join(zero)}.")
        return {site: vectors[site] for site in known}

    def _texts(self) -> tuple[dict[str, list[Text]], dict[str, Json]]:
        """Neutral texts by part, and what is told of them."""
        study, config = self.study, self.config
        limits = [
            config.text_length if reach is None else min(config.text_length, reach)
            for reach in (study.sender.max_positions, study.receiver.max_positions)
        ]
        order = np.random.default_rng(study.seed("texts")).permutation(len(study.texts))
        texts = read_texts(
            [study.texts[i] for i in order],
            study.sender.tokenizer,
            study.receiver.tokenizer,
            sender_tokens=limits[0],
            receiver_tokens=limits[1],
            budget=config.text_tokens,
        )
        divided = parts(texts, study.seed("parts"))
        return divided, {
            "source": study.source,
            "texts": len(texts),
            "tokens": {
                "sender": sum(len(text.sender) for text in texts),
                "receiver": sum(len(text.receiver) for text in texts),
            },
        }

    def _states(
        self,
        divided: Mapping[str, Sequence[Text]],
        senders: Sequence[str],
        receivers: Sequence[str],
    ) -> dict[str, _Sides]:
        """Both bases' states of the texts at the shared positions, kept until the stage ends.

        Positions at which a state of either model, at any of the sites, is an attention sink are
        left out.
        """
        study = self.study
        texts = [text for part in PARTS for text in divided[part]]
        ends = np.cumsum([0, *(_positions(divided[part]) for part in PARTS)])
        found: dict[str, dict[str, np.ndarray]] = {}
        for who, pair, sites, side in (
            ("sender", study.sender, senders, 0),
            ("receiver", study.receiver, receivers, 1),
        ):
            path = study.folder / "checkpoints" / f"text-{who}.safetensors"
            if not path.exists():
                with pair.using("base") as model:
                    states = read_states(
                        model,
                        [(text.sender, text.receiver)[side] for text in texts],
                        [[both[side] for both in text.positions] for text in texts],
                        sites,
                        batch_tokens=study.activations.batch_tokens,
                        reporter=study.reporter,
                        label=f"texts, {who}",
                    )
                    del model
                write_tensors(path, {site: read.numpy() for site, read in states.items()})
            found[who] = read_tensors(path)
        kept = ordinary(rows for read in found.values() for rows in read.values())
        ends = np.cumsum([0, *kept])[ends]
        rows = {part: slice(*ends[i : i + 2].tolist()) for i, part in enumerate(PARTS)}
        return {
            who: _Sides({site: states[kept] for site, states in read.items()}, rows)
            for who, read in found.items()
        }

    # ------------------------------------------------------------------ choices on tune

    def _candidates(
        self,
        senders: Mapping[str, SteeringVector],
        receivers: Sequence[str],
        states: Mapping[str, _Sides],
    ) -> _Candidates:
        """Every site pair with the best map of every kind: what it makes of v_A and of each null.

        All are scaled to the norm of the native vector at the receiver's site.
        """
        config, study = self.config, self.study
        found = _Candidates()
        draws = {"shuffled": config.shuffles, "mapped_random": config.nulls, "mean_carried": 1,
                 "mean_state": 1, "random": config.nulls}  # fmt: skip
        found.nulls.update({name: [[] for _ in range(draws[name])] for name in NULLS})
        total = len(senders) * len(receivers) * len(config.maps)
        clouds = {site: states["receiver"].cloud(site) for site in receivers}
        with study.reporter.bar("maps", total, unit="maps") as advance:
            for sender_site, v in senders.items():
                sender = states["sender"].cloud(sender_site)
                directions = _directions(
                    config.nulls, len(sender.mean), study.seed("directions of A", sender_site)
                )
                for site, receiver in clouds.items():
                    tune, held = (
                        (states["sender"].of(sender_site, part), states["receiver"].of(site, part))
                        for part in ("tune", "test")
                    )
                    widths = widths_for(config.components, sender, receiver)
                    for kind in dict.fromkeys(config.maps):
                        best = choose(kind, sender, receiver, tune, config.ridge, widths)
                        advance(1)
                        carried = best.carry(v.tensor.numpy())
                        norm = float(np.linalg.norm(carried))
                        if norm == 0:
                            self.notes.append(
                                f"v_A at {sender_site} lies outside what {kind} learned, so "
                                f"nothing of it is carried to {site}."
                            )
                            continue
                        native = study.vectors[site]
                        found.carried.append(_scaled(carried, native, sender_site, kind))
                        found.described.append(
                            {
                                "sender_site": sender_site,
                                "receiver_site": site,
                                "map": kind,
                                "penalty": best.penalty,
                                "components": best.width,
                                "r_squared": best.r_squared(*held),
                                "carried_norm": norm,
                                "natural_norm": native.norm,
                                "cosine": _cosine(carried, native),
                            }
                        )
                        rows: dict[str, Sequence[np.ndarray]] = {
                            "shuffled": [
                                self._shuffled(best, draw).carry(v.tensor.numpy())
                                for draw in range(config.shuffles)
                            ],
                            "mapped_random": [best.carry(row) for row in directions],
                            "mean_carried": [best.carry(sender.mean)],
                            "random": list(
                                _directions(
                                    config.nulls,
                                    len(receiver.mean),
                                    study.seed("directions of B", sender_site, site, kind),
                                )
                            ),
                        }
                        for name, of_draws in rows.items():
                            for offers, row in zip(found.nulls[name], of_draws, strict=True):
                                if np.linalg.norm(row) > 0:
                                    offers.append(_scaled(row, native, sender_site, kind))
        for site, receiver in clouds.items():  # no map and no site of A plays a part in it
            if np.linalg.norm(receiver.mean) > 0:
                found.nulls["mean_state"][0].append(_scaled(receiver.mean, study.vectors[site]))
        if not found.carried:
            raise MeasurementError(
                "no map carries anything of the sender's v*: it lies outside what the neutral text "
                "shows; give more text (transfer.text, transfer.text_tokens)"
            )
        for name, of_null in list(found.nulls.items()):
            found.nulls[name] = [offers for offers in of_null if offers]
            if not found.nulls[name]:
                del found.nulls[name]
        return found

    def _shuffled(self, own: AffineMap, draw: int) -> AffineMap:
        """The map with the same settings, learned on shuffled positions."""
        mixed = own.receiver.shuffled(self.study.seed("shuffle", str(draw)))
        return fit(own.kind, own.sender, mixed, penalty=own.penalty, width=own.width)

    def _choose(
        self, offers: Sequence[Sequence[SteeringVector]], tune: Answers, aims: Predictions
    ) -> tuple[list[_Choice], list[list[dict[Positions, float]]]]:
        """Of each list of vectors the one that recovers most KL at λ = 1 on the first tune pairs,
        on the tokens that suit it best; of equals the first.

        Returns:
            The choices, and of each list what each vector recovers, by steered tokens.

        Raises:
            MeasurementError: the receiver's models predict the same, so nothing can be recovered.
        """
        asked = self.config.positions
        kinds = POSITIONS if asked == "auto" else (asked,)
        settings = [_Setting(v, kind) for some in offers for v in some for kind in kinds]
        few = tune.chosen_only(self.config.choice_pairs)
        values = iter(self._recovered(settings, few, aims))
        choices, recovered = [], []
        for some in offers:
            found = [{kind: next(values) for kind in kinds} for _ in some]
            most = max(max(row.values()) for row in found)
            index, kind = next(
                (i, kind)
                for i, row in enumerate(found)
                for kind in kinds
                if row[kind] > most - _TIE
            )
            choices.append(_Choice(index, _Setting(some[index], kind), found[index]))
            recovered.append(found)
        return choices, recovered

    def _levels(
        self,
        carried: _Choice,
        best: _Choice,
        nulls: Mapping[str, Sequence[_Choice]],
        natives: Mapping[str, SteeringVector],
        tune: Answers,
        aims: Predictions,
    ) -> dict[str, dict[str, list[_Setting]]]:
        """What is measured on test pairs: all at λ = 1, and each at its best λ on tune pairs.

        The native vector acts twice: where the carried one does, and where it does best itself; at
        the second level there with the best of all sites, tokens and strengths.
        """
        own = replace(carried.setting, vector=natives[carried.setting.vector.site])
        one = {
            "native_best": [best.setting],
            "native": [own],
            "carried": [carried.setting],
            **{name: [choice.setting for choice in choices] for name, choices in nulls.items()},
        }
        grid, answers = self.config.strengths, tune.chosen_only()
        ways = {
            name: [[replace(setting, strength=λ) for λ in grid] for setting in settings]
            for name, settings in one.items()
        }
        ways["native_best"] = [
            [
                _Setting(v, kind, λ)
                for v in natives.values()
                for kind in best.recovered
                for λ in grid
            ]
        ]
        flat = [setting for some in ways.values() for row in some for setting in row]
        values = iter(self._recovered(flat, answers, aims))
        tuned: dict[str, list[_Setting]] = {}
        for name, some in ways.items():
            tuned[name] = [row[int(np.argmax([next(values) for _ in row]))] for row in some]
        return {"one": one, "tuned": tuned}

    def _recovered(
        self, settings: Sequence[_Setting], answers: Answers, aims: Predictions
    ) -> list[float]:
        """KL recovered by settings on answers of tune pairs."""
        gained = self._effects(settings, answers, aims, "choice on tune")["kl_recovered"]
        if gained is None:
            raise MeasurementError(
                "the receiver's two models predict the same on the tune pairs: there is nothing to "
                "recover; check that they differ"
            )
        return [float(value) for value in gained.gained.sum(dim=1) / gained.below.sum()]

    # ------------------------------------------------------------------ test

    def _measure(
        self,
        levels: Mapping[str, Mapping[str, Sequence[_Setting]]],
        test: Answers,
        aims: Predictions,
    ) -> dict[str, Json]:
        """Every metric at λ = 1 and at the strengths chosen on tune, those of the nulls too."""
        config = self.config
        settings: list[_Setting] = []
        places: dict[str, dict[str, list[int]]] = {}
        for level, named in levels.items():
            places[level] = {}
            for name, some in named.items():
                places[level][name] = list(range(len(settings), len(settings) + len(some)))
                settings += some
        found = self._effects(settings, test, aims, "test")
        draws = Draws(
            test.clusters, config.bootstrap, config.confidence, self.study.seed("bootstrap")
        )
        return {
            name: None
            if effect is None
            else {level: described(effect, rows, draws) for level, rows in places.items()}
            for name, effect in found.items()
        }

    def _effects(
        self, settings: Sequence[_Setting], answers: Answers, aims: Predictions, what: str
    ) -> dict[str, Effects | None]:
        """Effects of settings, in their order; those of one site and the same tokens at once."""
        alike: dict[tuple[str, Positions], list[int]] = {}
        for place, setting in enumerate(settings):
            alike.setdefault((setting.vector.site, setting.positions), []).append(place)
        groups = [
            rows[first : first + ARMS]
            for rows in alike.values()
            for first in range(0, len(rows), ARMS)
        ]
        found: list[dict[str, Effects | None]] = []
        for rows in groups:
            site, positions = settings[rows[0]].vector.site, settings[rows[0]].positions
            arms = [Arm(settings[row].vector.tensor, settings[row].strength) for row in rows]
            scores = self._score(site, arms, positions, answers, aims, what)
            found.append(effects(scores, answers, self.study.beta))
        order = torch.tensor([row for rows in groups for row in rows]).argsort()
        merged: dict[str, Effects | None] = {}
        for name in found[0]:
            parts = [part for each in found if (part := each[name]) is not None]
            merged[name] = (
                Effects(torch.cat([part.gained for part in parts])[order], parts[0].below)
                if len(parts) == len(found)
                else None
            )
        return merged

    # ------------------------------------------------------------------ small parts

    def _answers(self, pairs: Sequence[PreferencePair], count: int, split: str) -> Answers:
        if not pairs:
            raise DataError(f"the {split} split has no pairs; give data.splits.{split}")
        answers = read_answers(
            self.study.receiver,
            pairs,
            count,
            template=self.study.activations.template,
            max_tokens=self.config.max_tokens,
            response_tokens=self.config.response_tokens,
        )
        if answers.truncated:
            self.notes.append(
                f"{answers.truncated} of {answers.pairs} pairs of the {split} split lost the left "
                "of their prompt to make room for an answer."
            )
        return answers

    def _score(
        self,
        site: str,
        arms: Sequence[Arm],
        positions: Positions,
        answers: Answers,
        aims: Predictions,
        what: str,
    ) -> Scores:
        """Scores of arms in the receiver's base; arm 0 is the base as it is."""
        zero = Arm(torch.zeros_like(arms[0].vector), 0.0)
        steering = Steering(site, (zero, *arms), positions=positions)
        with self.study.receiver.using("base") as model:
            found = score(
                model,
                answers.texts,
                steering,
                self._base_readout(model),
                aims,
                reporter=self.study.reporter,
                label=what,
            )
            del model
        return found

    def _base_readout(self, model: Model) -> Readout:
        if self._readout is None:
            self._readout = Readout.of(model, vocabulary=self.study.receiver.vocabulary)
        return self._readout

    def _add_notes(
        self,
        chosen: Mapping[str, Json],
        texts: Mapping[str, Any],
        measured: Mapping[str, Json],
        tune: Answers,
        test: Answers,
    ) -> None:
        self.notes += self.study.receiver.notes
        fitted, width = texts["positions"]["fit"], self.study.sender.width
        if texts["sinks"]:
            self.notes.append(
                f"{texts['sinks']} shared positions are left out of the maps and of their R²: the "
                f"norm of a state there is more than {SINK} times the median (an attention sink)."
            )
        if fitted < width:
            self.notes.append(
                f"The map was learned on {fitted} positions, fewer than the sender's width "
                f"{width}: what the text does not show of the vector is lost; raise "
                "transfer.text_tokens."
            )
        if test.written or tune.written:
            self.notes.append(
                "The pairs have no answers: KL is measured on texts that the tuned model wrote."
            )
        explained = chosen["r_squared"]
        if explained is None or explained <= 0:
            self.notes.append(
                "The chosen map predicts held-out states no better than their mean does: what it "
                "carries over is not the sender's direction."
            )
        for name, metric in measured.items():
            if metric is None:
                self.notes.append(
                    f"{name} is undefined: "
                    + (
                        "the test pairs have no rejected answers."
                        if name.startswith("reward")
                        else "the receiver's two models predict the same there."
                    )
                )
            elif metric["one"]["share"] is None:
                self.notes.append(
                    f"The share of {name} at λ = 1 is undefined: {metric['one']['why']}."
                )


@dataclass(frozen=True)
class _Sides:
    """One model's states of the neutral text, by site; which rows are of which part."""

    states: Mapping[str, np.ndarray]
    rows: Mapping[str, slice]

    def of(self, site: str, part: str) -> np.ndarray:
        return self.states[site][self.rows[part]]

    @property
    def positions(self) -> dict[str, int]:
        """How many there are in each part."""
        return {part: rows.stop - rows.start for part, rows in self.rows.items()}

    def cloud(self, site: str) -> Cloud:
        return Cloud.of(self.of(site, "fit"), f"states at {site}")


def _directions(count: int, width: int, seed: int) -> np.ndarray:
    """Random directions (count, width)."""
    return np.random.default_rng(seed).standard_normal((count, width))


def _scaled(
    row: np.ndarray,
    native: SteeringVector,
    sender_site: str | None = None,
    kind: TransferMap | None = None,
) -> SteeringVector:
    """A row as a vector at the native one's site and of its norm."""
    scaled = row * (native.norm / np.linalg.norm(row))
    return SteeringVector(scaled, native.site, sender_site=sender_site, map=kind)


def _positions(texts: Sequence[Text]) -> int:
    return sum(len(text.positions) for text in texts)


def _cosine(vector: np.ndarray, native: SteeringVector) -> float:
    own = native.tensor.numpy()
    return float(vector @ own / (np.linalg.norm(vector) * np.linalg.norm(own)))


def _value(interval: Json) -> Json:
    return None if interval is None else interval["value"]
