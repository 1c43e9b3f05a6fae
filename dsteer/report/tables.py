"""The report's tables. Each column says what it is: its equation in words, and its unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsteer.report.values import (
    DASH,
    UNDEFINED,
    at,
    block,
    count,
    duration,
    estimate,
    interval,
    is_undefined,
    items,
    mapping,
    memory,
    number,
    percent,
    plain,
    plural,
    point,
    ratio,
    short_hash,
    site_order,
    split_rows,
)
from dsteer.store import Json

Results = dict[str, dict[str, Json]]
"""Stage → its result, of the stages that ran."""


@dataclass(frozen=True)
class Column:
    """A column: its title, and what stands in it (nothing to say where the title says it all)."""

    title: str
    meaning: str = ""
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A table ready to print; the first cell of a row heads it."""

    key: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    @property
    def definitions(self) -> dict[str, str]:
        """What the columns mean, where the title alone does not say it."""
        return {column.title: column.meaning for column in self.columns if column.meaning}


# ---------------------------------------------------------------------------------- comparison


def paper_table(results: Results) -> Table | None:
    """The paper's values beside ours."""
    cosine, spectrum = results.get("cosine"), results.get("spectrum")
    if cosine is None and spectrum is None:
        return None
    paper = at(cosine, "paper_site") or "final_norm"
    chosen = at(cosine, "chosen_site")
    sites = [paper, *([chosen] if chosen not in (None, paper) else [])]

    def row(claim: str, theirs: str, ours: Callable[[str], str], reading: str) -> list[str]:
        return [claim, theirs, *(ours(site) for site in sites), reading]

    def peaks(site: str) -> str:
        found = at(cosine, "sites", site)
        if is_undefined(found):
            return UNDEFINED
        kinds = (
            ("in-sample", "in_sample"),
            ("leave-one-out", "leave_one_out"),
            ("held-out", "held_out"),
        )
        return "; ".join(f"{words} {number(point(at(found, key, 'peak')))}" for words, key in kinds)

    def held_out(site: str) -> str:
        found = at(cosine, "sites", site)
        return UNDEFINED if is_undefined(found) else interval(at(found, "held_out", "mean"))

    def spectral(*keys: str) -> Callable[[str], str]:
        def cell(site: str) -> str:
            found = at(spectrum, "sites", site)
            return UNDEFINED if is_undefined(found) else interval(at(found, *keys))

        return cell

    rows = []
    if cosine is not None:
        rows += [
            row(
                "cos(Δ, v*) peaks high",
                "0.92–0.96 (Fig. 3)",
                peaks,
                "In-sample cosines are biased upward, by about 1/√N on pure noise; held-out "
                "cosines are not.",
            ),
            row(
                "the same, mean over held-out prompts",
                "not reported",
                held_out,
                "The headline of this report.",
            ),
        ]
    if spectrum is not None:
        rows += [
            row(
                "ΔH is nearly rank one: σ₂/σ₁",
                "< 0.1",
                spectral("delta", "uncentred", "sigma_ratio"),
                "Nearly empty alone: with cosines of only 0.5 and an isotropic rest it is 0.10 at "
                "N = 500. Read it with the shared share m below.",
            ),
            row(
                "shared share m",
                "not reported",
                spectral("shared_share"),
                "The part of ‖ΔH‖² that one constant vector holds: the rank-one test that means "
                "something.",
            ),
            row(
                "u₁ ≈ v*: |cos(u₁, v*)|",
                "≈ 1",
                spectral("u1_cosine"),
                "Near 1 whenever m is large.",
            ),
            row(
                "the first singular value dominates: σ₁/‖ΔH‖",
                "“dominates” in the upper layers (Fig. 4b)",
                lambda site: (
                    UNDEFINED
                    if is_undefined(at(spectrum, "sites", site))
                    else number(point(at(spectrum, "sites", site, "delta", "uncentred", "top", 0)))
                ),
                "Its square is the share of ‖ΔH‖² along u₁.",
            ),
            [
                "spectral entropy falls in the upper layers of the tuned model",
                "falls (Fig. 4a)",
                *_entropy_fall(spectrum, len(sites)),
                "From the middle block to the last, uncentred. A fall that the base shows too is "
                "not the tuning's.",
            ],
        ]
    rows += [
        [
            claim,
            theirs,
            *(_recovered_by_sweep(results.get(stage), site) for site in sites),
            "Share of KL to the target model recovered at λ = 1, at this site; the stage's section "
            "has every metric.",
        ]
        for stage, claim, theirs in (
            ("interpolation", "h + λv dials behaviour", "yes (Fig. 2a)"),
            ("inversion", "h_tuned − λv* restores the base", "near λ = 1 (Fig. 2b)"),
        )
    ]
    return Table(
        "paper",
        "The paper's values (arXiv:2512.11838) beside ours. Brackets: interval.",
        [
            Column("claim", text=True),
            Column("paper", text=True),
            *(
                Column(
                    f"ours, {site}" + (" (the paper's site)" if site == paper else ""), text=True
                )
                for site in sites
            ),
            Column("how to read it", text=True),
        ],
        rows,
    )


def _recovered_by_sweep(sweep: Json, site: str) -> str:
    """Share of KL recovered at λ = 1 by v*'s arm at a site, where the sweep has one there."""
    strengths = items(at(sweep, "strengths"))
    for arm in ("v", "final_norm"):
        if at(sweep, "arms", arm, "site") == site and 1.0 in strengths:
            curve = at(sweep, "metrics", "kl_recovered", "curves", arm)
            return interval(at(curve, strengths.index(1.0)))
    return "not measured"


def _entropy_fall(spectrum: Json, width: int) -> list[str]:
    """Entropy of both models from the middle block to the last, in the cells of all sites."""
    sites = mapping(at(spectrum, "sites"))
    blocks = [site for site in site_order(sites) if block(site) is not None]
    if len(blocks) < 2:
        return ["needs two blocks", *[DASH] * (width - 1)]
    first, last = blocks[(len(blocks) - 1) // 2], blocks[-1]
    said = []
    for matrix, name in (("tuned", "H_tuned"), ("base", "H_base")):
        start, end = (point(at(sites, s, matrix, "uncentred", "entropy")) for s in (first, last))
        said.append(f"{name} {number(start)} → {number(end)}")
    return [f"{first} → {last}: {'; '.join(said)} nats", *[DASH] * (width - 1)]


# ---------------------------------------------------------------------------------- stages


def _data(result: Json) -> list[Table]:
    sources = items(at(result, "sources"))
    lost = [
        [plain(at(source, "path")), what, reason.replace("_", " "), count(n)]
        for source in sources
        for what, key in (("rows dropped", "dropped"), ("messages skipped", "messages_skipped"))
        for reason, n in mapping(at(source, key)).items()
    ]
    lost += [
        ["all", "pairs in no split", reason.replace("_", " "), count(n)]
        for reason, n in mapping(at(result, "left_out")).items()
    ]
    if at(result, "duplicates"):
        lost.append(["all", "pairs removed", "same texts as another", count(result["duplicates"])])
    splits = mapping(at(result, "splits"))
    order = sorted(splits, key=lambda s: (("train", "fit", "tune", "test", s).index(s), s))
    tables = [
        Table(
            "data-sources",
            "Sources: every row is kept, or counted as dropped.",
            [
                Column("source", text=True),
                Column("format", text=True),
                Column("rows", "rows read"),
                Column("kept", "rows that became preference pairs"),
                Column("dropped", "rows left out; the next table has the reasons"),
                Column("identity", "hash of the file, or commit of the hub dataset", text=True),
            ],
            [
                [
                    plain(at(source, "path")),
                    plain(at(source, "format")),
                    count(at(source, "rows")),
                    count(at(source, "kept")),
                    count(sum(mapping(at(source, "dropped")).values())),
                    short_hash(at(source, "identity")),
                ]
                for source in sources
            ],
        )
    ]
    if lost:
        tables.append(
            Table(
                "data-lost",
                "What was left out, by reason.",
                [
                    Column("source", text=True),
                    Column("what", text=True),
                    Column("reason", text=True),
                    Column("count"),
                ],
                lost,
            )
        )
    tables.append(
        Table(
            "data-splits",
            "Splits, disjoint by conversation. Models are trained on train; v* is fitted on fit, "
            "choices are made on tune, numbers are reported on test.",
            [
                Column("split", text=True),
                Column("pairs"),
                Column("conversations", "different conversations that the pairs come from"),
                Column("sha256", "hash of the split's file", text=True),
            ],
            [
                [
                    split,
                    count(at(splits, split, "pairs")),
                    count(at(splits, split, "conversations")),
                    short_hash(at(splits, split, "sha256")),
                ]
                for split in order
            ],
        )
    )
    return tables


def _base(result: Json) -> list[Table]:
    loss = point(at(result, "heldout_loss"))
    rows = [
        ["parameters", count(at(result, "parameters", "total"))],
        ["of them embeddings", count(at(result, "parameters", "embedding"))],
        ["tokens seen", count(at(result, "tokens_seen"))],
        ["passes over the training text", number(point(at(result, "epochs")))],
        ["held-out loss (nats a token, tune split)", number(loss)],
        ["held-out perplexity", number(point(at(result, "headline", "heldout_perplexity")))],
        *([key, plain(v)] for key, v in mapping(at(result, "architecture")).items()),
    ]
    return [
        Table(
            "base-model",
            "The base model: a language model trained from nothing on the training split.",
            [Column("quantity", text=True), Column("value")],
            rows,
        )
    ]


def _dpo(result: Json) -> list[Table]:
    n = at(result, "test", "n")
    tables = [
        Table(
            "dpo-test",
            f"What DPO did, measured on {plural(n, 'held-out test pair')}. Brackets: interval.",
            [
                Column("quantity", text=True),
                Column("value"),
                Column("if nothing was learned", text=True),
                Column("definition", text=True),
            ],
            [
                [
                    "reward accuracy",
                    interval(at(result, "test", "reward_accuracy")),
                    "0.5",
                    "share of pairs with r(chosen) > r(rejected), where "
                    "r = β [log π(y|x) − log π_ref(y|x)]",
                ],
                [
                    "reward margin",
                    interval(at(result, "test", "reward_margin")),
                    "0",
                    "mean of r(chosen) − r(rejected) (nats × β)",
                ],
                [
                    "KL to the base",
                    interval(at(result, "kl_to_base")),
                    f"the noise floor, {number(point(at(result, 'kl_noise_floor')))}",
                    "KL(tuned‖base) on the tokens of the chosen test answers, teacher-forced "
                    "(nats a token); the floor is the base against itself at another batch size",
                ],
                [
                    "first logged loss",
                    number(point(at(result, "first_loss")), 4),
                    "ln 2 = 0.6931",
                    "training starts at the reference, where the DPO loss is ln 2",
                ],
                [
                    "training pairs",
                    count(at(result, "pairs", "train")),
                    DASH,
                    f"{count(at(result, 'pairs', 'dropped'))} more were dropped (prompt too long), "
                    f"{count(at(result, 'pairs', 'truncated'))} of these were cut",
                ],
                [
                    "parameters changed",
                    f"{count(at(result, 'parameters', 'changed'))} "
                    f"({percent(point(at(result, 'parameters', 'changed_share')))})",
                    "0",
                    f"of {count(at(result, 'parameters', 'total'))} parameters, "
                    f"{count(at(result, 'parameters', 'trainable'))} of them trainable",
                ],
                [
                    "learned",
                    plain(at(result, "learned")),
                    "no",
                    "accuracy interval above chance, and KL above its noise floor",
                ],
            ],
        )
    ]
    freeze = mapping(at(result, "freeze"))
    matrices = [key for key in ("input", "output") if mapping(freeze.get(key))]
    if matrices:
        tied = " The two are tied: one tensor serves as both." if freeze.get("tied") else ""
        tables.append(
            Table(
                "dpo-freeze",
                f"Embeddings before and after training; freeze: {plain(freeze.get('mode'))}.{tied}",
                [
                    Column("matrix", text=True),
                    Column("before", "SHA-256 of the tensor's bytes before training", text=True),
                    Column("after", "the same after training", text=True),
                    Column("byte-identical", text=True),
                ],
                [
                    [
                        f"{key} embedding",
                        short_hash(at(freeze, key, "before")),
                        short_hash(at(freeze, key, "after")),
                        plain(at(freeze, key, "unchanged")),
                    ]
                    for key in matrices
                ],
            )
        )
    return tables


def _activations(result: Json) -> list[Table]:
    sizes = ", ".join(f"{name} {count(rows)}" for name, rows in split_rows(result).items())
    spans = mapping(at(result, "rows"))
    kept = ", ".join(f"{name} {count(stop - start)}" for name, (start, stop) in spans.items())
    response = at(result, "response")
    facts = [
        ["prompts", f"{count(at(result, 'n'))}" + (f" ({sizes})" if sizes else "")],
        *([["states kept", kept]] if at(result, "store") == "moments" else []),
        ["tokens", count(at(result, "tokens"))],
        ["prompts cut on the left", count(at(result, "truncated"))],
        ["position read", plain(at(result, "position"))],
        ["template", plain(at(result, "template"))],
        ["blocks", count(at(result, "blocks"))],
        ["width d", count(at(result, "width"))],
        ["sites", count(len(items(at(result, "sites"))))],
        [
            "response tokens, teacher-forced",
            f"{count(at(response, 'tokens'))} of {plural(at(response, 'pairs'), 'test pair')}"
            if response
            else "none",
        ],
        ["hash of the token ids", short_hash(at(result, "ids_sha256"))],
    ]
    floor = mapping(at(result, "noise_floor"))
    return [
        Table(
            "activations-read",
            "What was read, from both models on identical token ids.",
            [Column("quantity", text=True), Column("value")],
            facts,
        ),
        Table(
            "activations-noise",
            "Noise floor: the base read twice, at two batch sizes. Any displacement must be read "
            "against it.",
            [
                Column("site", text=True),
                Column(
                    "rms",
                    "√(mean of ‖noise‖² over prompts): what rounding does to one state "
                    "(units of the residual stream)",
                ),
                Column("norm of mean", "‖mean noise‖: what rounding does to v* (same units)"),
            ],
            [
                [
                    site,
                    number(point(at(floor, site, "rms"))),
                    number(point(at(floor, site, "mean_norm"))),
                ]
                for site in site_order(floor)
            ],
        ),
    ]


def _vector(result: Json) -> list[Table]:
    sites = mapping(at(result, "sites"))
    per_site = Table(
        "vector-sites",
        f"The steering vector v* at each site: the mean displacement of "
        f"N = {plural(at(result, 'n'), 'fit prompt')}.",
        [
            Column("site", text=True),
            Column(
                "‖v*‖", "length of v* = mean of Δ = h_tuned − h_base (units of the residual stream)"
            ),
            Column("relative", "‖v*‖ / mean ‖h_base‖ (no unit)"),
            Column(
                "noise floor",
                "‖mean noise‖: the length that v* would have from rounding alone "
                "(units of the residual stream)",
            ),
            Column("× noise", "‖v*‖ / noise floor"),
            Column(
                "cos(v*, h̄)",
                "cosine of v* with the mean base state; near ±1, v* mostly makes "
                "states longer or shorter, and the norm takes that away again",
            ),
            Column(
                "radial",
                "part of v* along the mean base state, signed (units of the residual stream)",
            ),
            Column("tangential", "length of the part of v* across it (same units)"),
            Column(
                "inert",
                "yes: the shift is almost purely radial, so it changes next to nothing after the "
                "next norm; no norm follows final_norm, an encoder or a post-norm block",
                text=True,
            ),
            Column(
                "λ, least squares",
                "⟨mean Δ_test, v*⟩ / ‖v*‖²: the strength at which λv* is "
                "nearest to the mean displacement of the test prompts (units of v*)",
            ),
        ],
        [
            [
                site,
                number(point(at(row, "norm"))),
                number(point(at(row, "relative_norm"))),
                number(point(at(row, "noise_mean_norm"))),
                number(ratio(point(at(row, "norm")), point(at(row, "noise_mean_norm")))),
                *_measured(row, ("radial_cosine",), ("radial_norm",), ("tangential_norm",)),
                UNDEFINED if is_undefined(row) else plain(at(row, "inert")),
                *_measured(row, ("strength_least_squares",)),
            ]
            for site, row in _rows(sites)
        ],
    )
    recovery = mapping(at(result, "kl_recovery"))
    parts = {
        words: recovery[key]
        for key, words in (("first_token", "first token"), ("response", "response"))
        if mapping(recovery.get(key))
    }
    if not parts:
        return [per_site]
    strengths = items(at(next(iter(parts.values())), "strengths"))
    return [
        per_site,
        Table(
            "vector-best",
            "How far one constant vector at final_norm carries the base's predictions to the tuned "
            "model's, on test prompts. Brackets: bootstrap interval.",
            [
                Column("tokens", text=True),
                Column("N", "prompts for the first token, tokens for the response"),
                Column("KL(tuned‖base)", "mean (nats a token)"),
                Column(
                    "KL noise floor",
                    "mean KL of the base against itself, its states moved by random shifts as long "
                    "as rounding noise (nats a token)",
                ),
                Column(
                    "λ of least KL",
                    "the strength that brings base + λv* nearest to the tuned model in KL, which "
                    "is convex in λ here (units of v*); the next column says on which prompts",
                ),
                Column("on", "split on which that strength was found", text=True),
                Column("λ, least squares", "as in the table above, for these tokens (units of v*)"),
                Column(
                    "λ chosen", "strength of least KL for the first token on tune (units of v*)"
                ),
                Column(
                    "recovered there",
                    "share of KL recovered at the chosen strength: "
                    "1 − Σ KL(tuned‖steered) / Σ KL(tuned‖base)",
                ),
                Column("recovered at λ = 1", "the same for v* itself"),
            ],
            [
                [
                    words,
                    count(at(part, "n")),
                    number(point(at(part, "kl_tuned_base"))),
                    number(point(at(part, "kl_noise_floor"))),
                    interval(at(part, "optimal_strength")),
                    plain(at(part, "optimal_on")),
                    interval(at(part, "least_squares_strength")),
                    number(point(at(part, "chosen_strength"))),
                    interval(at(part, "recovered_at_chosen")),
                    interval(recovered_at(part, 1.0)),
                ]
                for words, part in parts.items()
            ],
        ),
        Table(
            "vector-recovery",
            "The curve of the figure, in numbers.",
            [
                Column("λ", "strength (units of v*)"),
                *(
                    Column(f"{words}: {title}", meaning)
                    for words in parts
                    for title, meaning in (
                        (
                            "share recovered",
                            "1 − Σ KL(tuned‖steered) / Σ KL(tuned‖base); below 0: farther off than "
                            "the base itself",
                        ),
                        ("KL", "mean KL(tuned‖steered) (nats a token)"),
                        (
                            "agreement",
                            "share of tokens where steered and tuned model find the same token "
                            "most likely",
                        ),
                    )
                ),
            ],
            [
                [
                    plain(strength),
                    *(
                        cell
                        for part in parts.values()
                        for cell in (
                            interval(at(part, "recovered", i)),
                            number(point(at(part, "kl", i))),
                            percent(point(at(part, "agreement", i))),
                        )
                    ),
                ]
                for i, strength in enumerate(strengths)
            ],
        ),
    ]


def recovered_at(part: Json, strength: float) -> Json:
    """The share of KL recovered at one of the measured strengths; None if it was not measured."""
    for i, value in enumerate(items(at(part, "strengths"))):
        if value == strength:
            return at(part, "recovered", i)
    return None


def _cosine(result: Json) -> list[Table]:
    chosen, paper = at(result, "chosen_site"), at(result, "paper_site")

    def name(site: str) -> str:
        roles = [words for key, words in ((chosen, "chosen"), (paper, "paper's")) if key == site]
        return f"{site} ({', '.join(roles)})" if roles else site

    return [
        Table(
            "cosine-sites",
            f"Cosines of displacements with v*, fitted on N = "
            f"{plural(at(result, 'n_fit'), 'prompt')}; held-out on N = "
            f"{plural(at(result, 'n_test'), 'test prompt')}. Brackets: interval of a bootstrap "
            "over conversations, v* fitted anew in each draw. No unit.",
            [
                Column(
                    "site",
                    "chosen: the site with the highest held-out mean on the tune prompts",
                    text=True,
                ),
                Column(
                    "held-out mean", "mean of cos(Δ, v*) over test prompts, which v* has not seen"
                ),
                Column("median", "of the held-out cosines"),
                Column(
                    "peak",
                    "mode of the histogram of the held-out cosines: the form in which "
                    "the paper states its figure",
                ),
                Column("> 0.9", "share of held-out prompts with a cosine above 0.9"),
                Column("leave-one-out mean", "each fit prompt against the mean of all others"),
                Column(
                    "in-sample mean",
                    "each fit prompt against the mean that holds it, as in "
                    "the paper; biased upward",
                ),
                Column("in-sample peak", "mode of these"),
                Column(
                    "null mean",
                    "mean cosine when each conversation's displacement gets a random "
                    "sign and v is fitted anew: what no shared direction gives",
                ),
                Column("null 95 %", "95 % quantile of the null"),
                Column("m, test", "shared share of the test prompts: N‖mean Δ‖² / Σ‖Δ‖²"),
            ],
            [
                [
                    name(site),
                    *_measured(
                        row, ("held_out", "mean"), ("held_out", "median"), ("held_out", "peak")
                    ),
                    UNDEFINED
                    if is_undefined(row)
                    else percent(point(at(row, "held_out", "share_above_0.9"))),
                    *_measured(
                        row,
                        ("leave_one_out", "mean"),
                        ("in_sample", "mean"),
                        ("in_sample", "peak"),
                        ("null", "mean"),
                        ("null", "q95"),
                        ("shared_share_test",),
                    ),
                ]
                for site, row in _rows(mapping(at(result, "sites")))
            ],
        )
    ]


_RANKS = (
    Column("σ₂/σ₁", "second singular value over the first"),
    Column("entropy", "H = −Σ q ln q with q = σ^p / Σσ^p and the pipeline's p (nats)"),
    Column("normalised", "entropy / ln min(N, d): 0 for rank one, 1 for a flat spectrum"),
    Column("effective rank", "exp(entropy with q = σ / Σσ), Roy & Vetterli"),
    Column("participation", "(Σσ²)² / Σσ⁴"),
    Column("stable rank", "‖·‖_F² / σ₁²"),
)
_RANK_KEYS = (
    "sigma_ratio",
    "entropy",
    "entropy_normalised",
    "effective_rank",
    "participation_ratio",
    "stable_rank",
)


def _spectrum(result: Json) -> list[Table]:
    sites = _rows(mapping(at(result, "sites")))
    counts = f"N = {plural(at(result, 'n'), 'prompt')}, d = {count(at(result, 'd'))}"
    power = plain(at(result, "power"))
    site = Column("site", text=True)

    def ranks(row: Json, matrix: str, centring: str) -> list[str]:
        return _measured(row, *((matrix, centring, key) for key in _RANK_KEYS))

    models = ("base", "tuned")
    of_model = (
        ("entropy", "as above, of the model's own states (nats); likewise for H_tuned"),
        ("normalised", "entropy / ln min(N, d)"),
        ("effective rank", "exp(entropy with q = σ / Σσ)"),
        ("σ₂/σ₁", "second singular value over the first"),
    )
    model_keys = ("entropy", "entropy_normalised", "effective_rank", "sigma_ratio")
    return [
        Table(
            "spectrum-uncentred",
            f"ΔH, uncentred: the shift that all prompts share is kept ({counts}, p = {power}). "
            "Ranks depend on N. Brackets: jackknife intervals; of σ₂/σ₁ and the stable rank, "
            "bootstrap.",
            [
                site,
                Column(
                    "m",
                    "shared share N‖v‖² / ‖ΔH‖_F²: the part of the squared displacement "
                    "that one constant vector holds",
                ),
                Column(
                    "m, debiased",
                    "mean of ⟨Δᵢ, Δⱼ⟩ over i ≠ j / mean ‖Δ‖²: 0 on pure noise, where m is 1/N",
                ),
                *_RANKS,
                Column("|cos(u₁, v*)|", "first right singular vector of ΔH against v*"),
            ],
            [
                [
                    name,
                    *_measured(row, ("shared_share",), ("shared_share_debiased",)),
                    *ranks(row, "delta", "uncentred"),
                    *_measured(row, ("u1_cosine",)),
                ]
                for name, row in sites
            ],
        ),
        Table(
            "spectrum-centred",
            f"ΔH, centred: what is left when the mean, which is v*, is taken away ({counts}).",
            [site, *_RANKS],
            [[name, *ranks(row, "delta", "centred")] for name, row in sites],
        ),
        *(
            Table(
                f"spectrum-models-{centring}",
                f"The states of each model, {centring} ({counts}, p = {power}).",
                [
                    site,
                    *(Column(f"H_base: {title}", meaning) for title, meaning in of_model),
                    *(Column(f"H_tuned: {title}") for title, _ in of_model),
                ],
                [
                    [
                        name,
                        *(
                            interval(at(row, matrix, centring, key))
                            for matrix in models
                            for key in model_keys
                        ),
                    ]
                    for name, row in sites
                ],
            )
            for centring in ("uncentred", "centred")
        ),
    ]


def _rows(sites: dict[str, Json]) -> list[tuple[str, Json]]:
    return [(site, sites[site]) for site in site_order(sites)]


def _geometry(result: Json) -> list[Table]:
    found = (_preference(result), _descent(result), _clouds(result))
    return [table for table in found if table is not None]


def _preference(result: Json) -> Table | None:
    measured = mapping(at(result, "preference"))
    if not measured:
        return None
    chance = f"sd {number(point(measured.get('random_sd')))} for random directions"
    rows = [
        ["margin of the base", "margin_base", "–", "mean ⟨n_base, e_w − e_l⟩ (nats)"],
        ["margin of the tuned model", "margin_tuned", "–", "mean ⟨n_tuned, e_w − e_l⟩ (nats)"],
        ["margin change", "margin_change", "0", "paired, tuned − base (nats)"],
        [
            "margin change, each model's own head",
            "margin_change_own_heads",
            "0",
            "the same with e_w − e_l of each model; given where the heads differ (nats)",
        ],
        [
            "margin change of v* alone",
            "margin_change_v",
            "0",
            "mean ⟨v*, e_w − e_l⟩: one vector for all pairs (nats)",
        ],
        [
            "the same change on other pairs' tokens",
            "margin_change_other_pairs",
            "0",
            "mean ⟨n_tuned − n_base, e_w − e_l of another pair⟩ (nats)",
        ],
        [
            "share of margins that rise",
            "share_rising",
            "0.5",
            "share of pairs with a change above 0",
        ],
        ["cos(n_tuned − n_base, e_w − e_l)", "cosine", chance, "of each pair with its own tokens"],
        [
            "the same with other pairs' tokens",
            "cosine_other_pairs",
            chance,
            "as large as the pair's own: the change is not about the pair's tokens",
        ],
        ["cos(v*, e_w − e_l)", "cosine_v", chance, "v* at final_norm, each pair"],
        [
            "cos between the e_w − e_l of two pairs",
            "pairwise_cosine",
            "0",
            "mean over all couples of pairs",
        ],
    ]
    cells = [
        [title, interval(measured.get(key)), chance, meaning]
        for title, key, chance, meaning in rows
        if measured.get(key) is not None
    ]
    if mapping(measured.get("mean")):
        cells.append(
            [
                "cos(v*, mean e_w − e_l)",
                number(point(at(measured, "mean", "cosine_v"))),
                chance,
                f"the mean over {plural(at(measured, 'mean', 'n'), 'fit pair')}",
            ]
        )
    return Table(
        "geometry-preference",
        f"Preference vectors at final_norm, at the first token in which the answers differ, of "
        f"{plural(measured.get('n'), 'test pair')}. Brackets: interval.",
        [
            Column("quantity", text=True),
            Column("value"),
            Column("without an effect", text=True),
            Column("definition", text=True),
        ],
        cells,
    )


def _descent(result: Json) -> Table | None:
    policies = mapping(at(result, "gradients", "policies"))
    if not policies:
        return None
    rows = []
    for policy, found in policies.items():
        for site, measured in mapping(at(found, "sites")).items():
            for key, words in (("sequence", "all tokens"), ("context", "shared context")):
                part = at(measured, key)
                rows.append(
                    [
                        site,
                        policy,
                        words,
                        interval(at(part, "pairwise_cosine")),
                        number(point(at(part, "pairwise_sign_flip_q95"))),
                        interval(at(part, "cosine_v")),
                        interval(at(part, "cosine_preference")),
                    ]
                )
    return Table(
        "geometry-gradients",
        f"Descent of the DPO loss with respect to hidden states, on "
        f"{plural(at(result, 'gradients', 'n'), 'test pair')}; β = "
        f"{number(point(at(result, 'beta')))}. Independent random directions have cosines of "
        f"standard deviation {number(point(at(result, 'gradients', 'random_sd')))}.",
        [
            Column("site", text=True),
            Column("policy", "the model whose loss it is; the base is the reference", text=True),
            Column(
                "where",
                "all tokens: summed over both texts; shared context: at the last token before the "
                "answers differ",
                text=True,
            ),
            Column("cos of two pairs", "mean cosine between the gradients of different pairs"),
            Column("null", "95 % quantile of that mean with random signs"),
            Column("cos with v*", "mean cosine of descent with v* of the site"),
            Column("cos with e_w − e_l", "mean cosine with the pair's own; final_norm only"),
        ],
        rows,
    )


def _clouds(result: Json) -> Table | None:
    clouds = mapping(at(result, "clouds"))
    if not clouds:
        return None
    return Table(
        "geometry-clouds",
        "Clouds of states on test prompts. The axes are those in which the base's states of the "
        "fit prompts vary most.",
        [
            Column("site", text=True),
            Column("variance on two axes", "share of the base's variance, fit prompts"),
            Column("v* in the plane", "share of ‖v*‖² along these axes"),
            Column("‖h_tuned − h_base‖", "mean over prompts"),
            Column("‖h_tuned − h_base − v*‖", "mean over prompts: what is left after steering"),
            Column("left over", "the second mean over the first"),
            Column("spread of h_base", "root mean square distance from the cloud's mean"),
            Column("spread of h_tuned", "likewise"),
        ],
        [
            [
                site,
                percent(sum(items(at(clouds, site, "explained")))),
                percent(point(at(clouds, site, "v_in_plane"))),
                *_measured(clouds[site], ("distance",), ("distance_steered",), ("distance_ratio",)),
                number(point(at(clouds, site, "spread_base"))),
                number(point(at(clouds, site, "spread_tuned"))),
            ]
            for site in site_order(clouds)
        ],
    )


def _measured(row: Json, *paths: Sequence[str]) -> list[str]:
    """Cells of a site: numbers with their intervals, or `undefined` where Δ = 0."""
    return [
        UNDEFINED
        if is_undefined(row) and estimate(at(row, *path)).value is None
        else interval(at(row, *path))
        for path in paths
    ]


STAGE_TABLES: dict[str, Callable[[Json], list[Table]]] = {
    "data": _data,
    "base": _base,
    "dpo": _dpo,
    "activations": _activations,
    "vector": _vector,
    "cosine": _cosine,
    "spectrum": _spectrum,
    "geometry": _geometry,
}


# ---------------------------------------------------------------------------------- settings


def settings_tables(manifest: dict[str, Json]) -> list[Table]:
    """How the run was made: versions, stages with times and memory, inputs, resolved config."""
    facts = {
        "run": manifest.get("name"),
        "dsteer": manifest.get("dsteer_version"),
        "commit": manifest.get("commit"),
        "uncommitted changes": manifest.get("dirty"),
        "platform": manifest.get("platform"),
        "device": manifest.get("device"),
        "overrides": manifest.get("overrides"),
        **mapping(manifest.get("versions")),
    }
    pair = (Column("key", text=True), Column("value", text=True))
    tables = [
        Table(
            "settings-machine",
            "Program and machine.",
            pair,
            [[key, plain(value)] for key, value in facts.items() if value is not None],
        )
    ]
    # The report does not tell of itself: drawn again, it is the same file.
    stages = {k: v for k, v in mapping(manifest.get("stages")).items() if k != "report"}
    if stages:
        tables.append(
            Table(
                "settings-stages",
                "Stages: what each cost.",
                [
                    Column("stage", text=True),
                    Column("wall time"),
                    Column(
                        "peak memory",
                        "largest resident memory of the process while the stage "
                        "ran; of the GPU where one was used",
                    ),
                    Column(
                        "resumed",
                        "yes: an interrupted run was continued, and the time is that "
                        "of the last part",
                        text=True,
                    ),
                    Column("version", "of the stage's code"),
                    Column(
                        "fingerprint",
                        "hash of the stage's config, version, inputs and upstream fingerprints",
                        text=True,
                    ),
                ],
                [
                    [
                        name,
                        duration(at(stage, "seconds")),
                        _memory(at(stage, "peak_memory_bytes")),
                        plain(at(stage, "resumed")),
                        plain(at(stage, "version")),
                        short_hash(at(stage, "fingerprint")),
                    ]
                    for name, stage in stages.items()
                ],
            )
        )
    inputs = mapping(manifest.get("inputs"))
    if inputs:
        tables.append(
            Table(
                "settings-inputs",
                "Inputs: exactly what was read.",
                [
                    Column("input", text=True),
                    Column(
                        "identity",
                        "hash of the file or folder, or commit of the hub repository",
                        text=True,
                    ),
                ],
                [[name, plain(identity)] for name, identity in inputs.items()],
            )
        )
    config = _flat(manifest.get("config"))
    if config:
        tables.append(
            Table(
                "settings-config",
                "Resolved config: every setting, defaults included.",
                pair,
                [[key, plain(value)] for key, value in config],
            )
        )
    return tables


def _memory(value: Json) -> str:
    if isinstance(value, dict):
        parts = (f"{memory(amount)} {device}" for device, amount in value.items())
        return ", ".join(parts) if value else DASH
    return memory(value)


def _flat(value: Json, prefix: str = "") -> list[tuple[str, Json]]:
    """A nested config as dotted keys and leaves."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{prefix}{key}.")]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in _flat(item, f"{prefix}{i}.")]
    return [(prefix.removesuffix("."), value)] if prefix else []
