"""The causal layer profile: patch the tuned state in, add v*, add random directions, site by site.

v* is the run's, of fit prompts; the mean displacement of the changed tokens is of fit pairs; site
and tokens are chosen on tune pairs, by what v* recovers of the whole answers' KL, so that every
place has the same denominator; every number that is reported is of test pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.sites import ENCODER, resolve_sites
from dsteer.behaviour.edited import Bench, Split, json_of, token_rows
from dsteer.behaviour.profile import (
    Effects,
    edits_of,
    efficiency,
    first_largest,
    measure,
    metrics,
    random_band,
    readout_share,
    recovered,
    tuned_margins,
)
from dsteer.config import ProfileConfig
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, write_tensors


def run(context: StageContext) -> Json:
    """Measure every site; write ``pairs.safetensors``, float64, one number a test pair."""
    config = context.config.profile or ProfileConfig()
    vectors = SteeringVectorSet.load(context.input("vector") / "vectors.safetensors")
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    result, tensors = _Profile(context, config, pair, vectors).result()
    write_tensors(context.folder / "pairs.safetensors", tensors)
    draw_result("profile", result, context.folder)
    return result


class _Profile:
    """One stage, from the texts to the result."""

    def __init__(
        self,
        context: StageContext,
        config: ProfileConfig,
        pair: ModelPair,
        vectors: SteeringVectorSet,
    ) -> None:
        self.context, self.config, self.pair = context, config, pair
        self.beta = context.config.reward_beta
        named = resolve_sites(config.sites, pair.n_blocks, encoder=pair.encoder_decoder)
        self.sites = tuple(site for site in named if site != ENCODER)
        self.vectors: dict[str, Tensor] = {
            site: vectors[site].tensor
            for site in self.sites
            if site in vectors and not vectors[site].undefined
        }
        activations = context.config.activations
        self.bench = Bench(
            pair,
            config,
            context.input("data"),
            context.template,
            self.sites,
            context.seed("bootstrap"),
            context.reporter,
        )
        position = activations.position if activations else "prompt_last"
        self.same = {"prompt_last"} & {position}  # tokens whose mean displacement v* is already

    def result(self) -> tuple[Json, dict[str, np.ndarray]]:
        bench, config = self.bench, self.config
        here = self._here()
        tune = bench.split("tune", config.tune_pairs, chosen=True)
        test = bench.split("test", config.pairs)
        few = [test.first_chosen(config.random_pairs), test.first_rejected(config.random_pairs)]
        sites: dict[str, dict[str, Json]] = {site: {} for site in self.sites}
        tensors = {"margin.tuned": tuned_margins(test, self.beta).numpy()}
        on_tune: dict[tuple[str, str], float | None] = {}
        peak: dict[str, Json] = {}
        with self.pair.using("base") as model:
            for tokens in config.tokens:
                added = edits_of(self.sites, self.vectors, {})
                added = {key: edit for key, edit in added.items() if key[1] == "v"}
                if added:
                    found = measure(bench, model, tune, tokens, added, self.beta)
                    for site in self.vectors:
                        share = recovered(bench, tune, found, site, "v", answers=True)
                        on_tune[site, tokens] = None if share is None else share.value
                effects = measure(
                    bench, model, test, tokens,
                    edits_of(self.sites, self.vectors, here[tokens]), self.beta,
                )  # fmt: skip
                tensors |= self._tensors(effects, tokens)
                for site in self.sites:
                    sites[site][tokens] = self._site(model, test, few, effects, site, tokens)
                patched = [(site, _share(sites[site][tokens], "patched")) for site in self.sites]
                highest = first_largest(patched)
                peak[tokens] = (
                    None
                    if highest is None
                    else {"site": highest, "patched": sites[highest][tokens]["patched"]}
                )
            share = readout_share(bench, model, test)
            del model
        self.pair.release()
        # the earliest of equals: by site, then in the order of the tokens asked for
        places = [(site, tokens) for site in self.sites for tokens in config.tokens]
        chosen = first_largest([(place, on_tune.get(place)) for place in places])
        result = {
            "n_test": test.answers.pairs,
            "n_tune": tune.answers.pairs,
            "beta": self.beta,
            "confidence": config.confidence,
            "tokens": list(config.tokens),
            "sites": sites,
            "chosen": None
            if chosen is None
            else {"site": chosen[0], "tokens": chosen[1], "on": "tune"},
            "peak": peak,
            "readout_share": json_of(share),
            "conversations": list(test.answers.clusters),
        }
        result["headline"] = _headline(result)
        result["notes"] = list(dict.fromkeys([*bench.notes, *self._notes(result)]))
        return result, tensors

    def _here(self) -> dict[str, dict[str, Tensor]]:
        """Tokens → site → mean displacement of fit pairs over the tokens that are changed.

        Not where v* is of these tokens already, or where that mean is zero.
        """
        found: dict[str, dict[str, Tensor]] = {tokens: {} for tokens in self.config.tokens}
        wanted = [tokens for tokens in found if tokens not in self.same]
        if not wanted:
            return found
        fit = self.bench.split("fit", self.config.fit_pairs, chosen=True)
        for tokens in wanted:
            for site in self.sites:
                base, tuned, _ = token_rows(fit, site, tokens)  # type: ignore[arg-type]
                mean = (tuned - base).mean(dim=0)
                if bool(mean.any()):
                    found[tokens][site] = mean
        return found

    def _site(
        self,
        model: Model,
        test: Split,
        few: list[Split],
        effects: Effects,
        site: str,
        tokens: str,
    ) -> Json:
        bench = self.bench
        row: dict[str, Json] = {
            kind: metrics(bench, test, effects, site, kind) for kind in ("patched", "v", "v_here")
        }
        row["random"] = None
        if site in self.vectors:
            row["random"] = random_band(
                bench, model, few, site, tokens, self.vectors[site],  # type: ignore[arg-type]
                self.config.random_directions, self.beta, self.context.seed("random", site),
            )  # fmt: skip
        ratio, why = efficiency(bench, test, effects, site)
        row["efficiency"] = json_of(ratio)
        here, _ = efficiency(bench, test, effects, site, "v_here")
        row["efficiency_here"] = json_of(here)
        if why is not None:
            row["efficiency_why"] = why
        row["inert"] = _inert(row)
        return row

    def _tensors(self, effects: Effects, tokens: str) -> dict[str, np.ndarray]:
        """Numbers of each pair; NaN in the rows of sites without a v*."""
        found = {f"kl.base.{tokens}": effects.kl_base.numpy()}
        assert effects.margin is not None
        for name, values in (("margin", effects.margin), ("kl", effects.kl)):
            for kind in ("v", "patched"):
                rows = [effects.row(site, kind) for site in self.sites]
                blank = torch.full_like(effects.kl_base, torch.nan)
                stacked = torch.stack([blank if row is None else values[row] for row in rows])
                found[f"{name}.{tokens}.{kind}"] = stacked.numpy()
        return found

    def _notes(self, result: Mapping[str, Json]) -> list[str]:
        notes = []
        if self.pair.encoder_decoder:
            notes.append("Sites are the decoder's: states of the encoder are not patched.")
        if self.config.random_pairs < result["n_test"]:
            notes.append(
                f"Random directions are measured on the first {self.config.random_pairs} of "
                f"{result['n_test']} test pairs."
            )
        if self.same & set(self.config.tokens):
            notes.append(
                "v* is of the last prompt token: where that token alone is changed, its mean "
                "displacement is v* itself, and is not added twice."
            )
        bare = [site for site in self.sites if site not in self.vectors]
        if bare:
            notes.append(f"The run has no v* other than zero at {', '.join(bare)}.")
        for tokens in self.config.tokens:
            inert = [site for site in self.sites if result["sites"][site][tokens]["inert"]]
            if inert:
                notes.append(
                    f"Tokens {tokens}: at {', '.join(inert)} v* does no more than random "
                    "directions, and patching nothing that is told from zero: it is inert there."
                )
        if result["chosen"] is None:
            notes.append("No site was chosen: v* is zero everywhere, or there is no KL to recover.")
        return notes


# ---------------------------------------------------------------------------------- small parts


def _share(row: Json, kind: str) -> float | None:
    found = row[kind] and row[kind]["kl_recovered"]
    return found["value"] if found else None


def _inert(row: Mapping[str, Json]) -> bool:
    """Whether v* does what random directions do, and patching nothing told from zero."""
    whole, band = row["patched"]["kl_recovered"], row["random"] and row["random"]["kl_recovered"]
    own = row["v"] and row["v"]["kl_recovered"]
    if not (whole and band and own) or own["low"] is None or whole["low"] is None:
        return False
    met = own["low"] <= band["high"] and own["high"] >= band["low"]
    return bool(met and whole["low"] <= 0 <= whole["high"])


def _headline(result: Mapping[str, Json]) -> dict[str, Json]:
    chosen = result["chosen"]
    row = result["sites"][chosen["site"]][chosen["tokens"]] if chosen else None
    share = result["readout_share"]

    def value(*keys: str) -> Json:
        found: Json = row
        for key in keys:
            found = found and found[key]
        return found["value"] if found else None

    return {
        "site": chosen["site"] if chosen else None,
        "tokens": chosen["tokens"] if chosen else None,
        "kl_recovered": value("v", "kl_recovered"),
        "kl_recovered_answers": value("v", "kl_recovered_answers"),
        "kl_recovered_patched": value("patched", "kl_recovered"),
        "efficiency": value("efficiency"),
        "reward_margin": value("v", "reward_margin"),
        "readout_share": share["value"] if share else None,
    }
