"""The template stage on planted pairs: the template, the training and their interaction are found.

In a Llama whose attention and MLPs write nothing, the residual stream is the embedding of the last
token. The raw transcript ends with ":", the template with ">", so the template's effect is the
difference t of two embeddings; a bias b of one block is the training effect from there on; and a
tuned model whose ">" has another embedding, by c, has the interaction c.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import context, measure
from planted import TEMPLATE, byte_tokenizer, planted_pair, tiny_llama
from transformers import LlamaForCausalLM

from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, ModelError
from dsteer.models.load import quiet
from dsteer.stages import call
from dsteer.store import Json, read_json, read_tensors

BLOCK = 1
SITES = [f"resid_post.{k}" for k in range(4)]
THINGS = ("tea", "bread", "rivers", "a lemma", "bees", "snow", "tin", "the moon")
SMALL = {"template": {"bootstrap": 20, "noise_floor_prompts": 2}}
# float32 states of size 1 to 10: a difference of two is off by a few units of 1e-7 of that.
ROUNDING = 1e-5


def silent_llama() -> LlamaForCausalLM:
    """A Llama whose blocks write nothing."""
    model = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


def normal(seed: int, size: float) -> torch.Tensor:
    v = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return size * v / v.norm()


def write_data(run: Path) -> None:
    """Benign prompts of different lengths; each word of THINGS twice in fit and once in test."""
    (run / "data").mkdir(parents=True)
    for split, times in (("fit", 2), ("test", 1)):
        pairs = [
            PreferencePair(
                f"\n\nHuman: Say {number} words about {thing}.\n\nAssistant:",
                conversation=f"{split} {thing} {number}",
            )
            for number in range(times)
            for thing in THINGS
        ]
        write_pairs(run / "data" / f"{split}.jsonl", pairs)


def write_models(folder: Path, base, tuned, template: str | None = TEMPLATE) -> Json:
    """Save both models with the byte tokenizer; returns the pipeline's models section."""
    for name, model in (("base", base), ("tuned", tuned)):
        with quiet():
            model.save_pretrained(folder / name)
        byte_tokenizer(template).save_pretrained(folder / name)
    return {"base": str(folder / "base"), "tuned": str(folder / "tuned"), "device": "cpu"}


def planted_run(tmp_path: Path, c: torch.Tensor) -> tuple[Path, Json, dict[str, np.ndarray]]:
    """A run of the stage on a silent pair; its folder, its result and the planted vectors."""
    base = silent_llama()
    tuned = copy.deepcopy(base)
    colon, angle = byte_tokenizer()(":>", add_special_tokens=False)["input_ids"]
    b = normal(1, 0.7)
    embedding = base.model.embed_tokens.weight.detach()
    t = embedding[angle] - embedding[colon]
    with torch.no_grad():
        tuned.model.layers[BLOCK].mlp.down_proj.bias += b
        tuned.model.embed_tokens.weight[angle] += c
    models = write_models(tmp_path / "models", base, tuned)
    run = tmp_path / "run"
    write_data(run)
    result = measure(run, "template", models=models, **SMALL)
    truth = {"b": b, "t": t, "c": c, "raw": embedding[colon]}
    return run, result, {name: vector.double().numpy() for name, vector in truth.items()}


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_template_training_and_interaction_are_recovered(tmp_path: Path, size: float) -> None:
    run, result, truth = planted_run(tmp_path, normal(2, size))
    b, t, c, raw = (truth[name] for name in ("b", "t", "c", "raw"))
    vectors = read_tensors(run / "template" / "vectors.safetensors")
    assert (result["n_fit"], result["n_test"]) == (16, 8)
    for k, site in enumerate(SITES):
        trained = b * (k >= BLOCK)
        planted = {
            "training_raw": trained,
            "training_templated": trained + c,
            "template_base": t,
            "template_tuned": t + c,
        }
        for name, vector in planted.items():
            np.testing.assert_allclose(vectors[f"{site}/{name}"], vector, atol=ROUNDING)
        check_site(result["sites"][site], planted | {"interaction": c}, np.linalg.norm(raw))

    # final_norm bends the states: the same four states, put through RMSNorm by hand
    def norm(h: np.ndarray) -> np.ndarray:
        return h / np.sqrt((h**2).mean() + 1e-6)

    br, bt, tr, tt = (norm(raw + h) for h in (0 * t, t, b, t + b + c))
    planted = {
        "training_raw": tr - br,
        "training_templated": tt - bt,
        "template_base": bt - br,
        "template_tuned": tt - tr,
        "interaction": (tt - bt) - (tr - br),
    }
    check_site(result["sites"]["final_norm"], planted, np.linalg.norm(br))
    assert result["headline"]["site"] == "final_norm"
    expected = result["sites"]["final_norm"]["parts"]["template_base"]["share"]["value"]
    assert result["headline"]["template_share"] == expected

    # all prompts have one state a cell, so the total vector reaches the target exactly
    kl = result["kl"]
    assert kl["base_raw"]["recovered"]["value"] == 0
    assert kl["v_total"]["recovered"]["value"] == pytest.approx(1, abs=1e-6)
    assert kl["v_template"]["kl"]["value"] == pytest.approx(kl["base_templated"]["kl"]["value"])
    assert kl["v_training"]["kl"]["value"] == pytest.approx(kl["tuned_raw"]["kl"]["value"])
    assert kl["v_both"]["recovered"]["value"] < 1 - 1e-4, "the norm makes them interact"


def check_site(found: Json, planted: dict[str, np.ndarray], base_norm: float) -> None:
    """Norms, shares and cosines of one site against the planted mean vectors."""
    parts = found["parts"]
    total = planted["training_raw"] + planted["template_base"] + planted["interaction"]
    assert found["base_norm"] == pytest.approx(base_norm, rel=1e-6)
    for name, vector in planted.items():
        length = np.linalg.norm(vector)
        assert parts[name]["norm"]["value"] == pytest.approx(length, abs=ROUNDING)
        assert parts[name]["relative_norm"]["value"] == pytest.approx(
            length / base_norm, abs=ROUNDING
        )
        share = vector @ total / (total @ total)
        assert parts[name]["share"]["value"] == pytest.approx(share, abs=ROUNDING)
        assert parts[name]["within_rounding"] == (length == 0)
        if length:
            assert parts[name]["shared_share"]["value"] == pytest.approx(1, abs=ROUNDING)
    raw, templated = planted["training_raw"], planted["training_templated"]
    lengths = np.linalg.norm(raw) * np.linalg.norm(templated)
    if lengths:
        cosine = raw @ templated / lengths
        assert found["cosines"]["training_forms"]["value"] == pytest.approx(cosine, abs=ROUNDING)
        assert found["held_out"]["raw"]["templated"]["value"] == pytest.approx(cosine, abs=ROUNDING)
        assert found["held_out"]["raw"]["raw"]["value"] == pytest.approx(1, abs=ROUNDING)
    else:
        assert found["cosines"]["training_forms"] is None
        assert found["held_out"]["raw"]["raw"] is None


def test_a_random_model_trained_by_a_constant_has_no_interaction_there(tmp_path: Path) -> None:
    planted = planted_pair(BLOCK)
    base, tuned = planted.save(tmp_path / "models")
    run = tmp_path / "run"
    write_data(run)
    models = {"base": str(base), "tuned": str(tuned), "device": "cpu"}
    result = measure(run, "template", models=models, **SMALL)
    vectors = read_tensors(run / "template" / "vectors.safetensors")
    for name in ("training_raw", "training_templated"):
        assert (vectors[f"resid_post.0/{name}"] == 0).all()
        np.testing.assert_allclose(vectors[f"resid_post.1/{name}"], planted.b, atol=ROUNDING)
    before, there, after = (result["sites"][site]["parts"] for site in SITES[:3])
    assert before["training_raw"]["zero"]
    assert before["interaction"]["zero"]
    assert before["template_base"]["share"]["value"] == pytest.approx(1)
    assert before["interaction"]["share"]["value"] == 0
    assert there["interaction"]["within_rounding"]
    assert not there["training_raw"]["within_rounding"]
    assert not after["interaction"]["within_rounding"], "later blocks mix training and template"
    notes = " ".join(result["notes"])
    assert "The training effect on raw text is exactly zero at resid_post.0." in notes
    assert "The mean of the interaction is within rounding at resid_post.1" in notes
    assert result["forms"]["raw"]["last_token"] == ":"
    assert result["forms"]["templated"]["last_token"] == ">"


# ---------------------------------------------------------------------------------- the run


def test_same_bytes_again_and_finished_cells_stay(tmp_path: Path) -> None:
    run, result, _ = planted_run(tmp_path, normal(2, 0.5))
    models = {name: str(tmp_path / "models" / name) for name in ("base", "tuned")}
    cells = sorted((run / "template" / "cells").iterdir())
    assert [path.name for path in cells] == [
        f"{which}_{form}.safetensors"
        for which in ("base", "tuned")
        for form in ("raw", "templated")
    ]
    before = [path.stat().st_mtime_ns for path in cells]
    cells[-1].unlink()
    again = measure(run, "template", models={**models, "device": "cpu"}, **SMALL)
    assert again == result
    after = [path.stat().st_mtime_ns for path in cells]
    assert after[:-1] == before[:-1]
    assert str(tmp_path) not in (run / "template" / "result.json").read_text(encoding="utf-8")


def test_chosen_sites_without_final_norm(tmp_path: Path) -> None:
    base = silent_llama()
    models = write_models(tmp_path / "models", base, base)
    write_data(tmp_path / "run")
    settings = {**SMALL["template"], "sites": ["resid_post.2"], "prompts": 5}
    result = measure(tmp_path / "run", "template", models=models, template=settings)
    assert list(result["sites"]) == ["resid_post.2"]
    assert result["kl"] is None
    assert (result["n_fit"], result["n_test"]) == (5, 5)
    assert result["headline"]["template_share"] == pytest.approx(1)
    assert any("KL was not measured" in note for note in result["notes"])


TRANSCRIPT = (
    "{{ bos_token }}{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else "
    "'\n\nAssistant: ' }}{{ m['content'] }}{% endfor %}{{ '\n\nAssistant:' }}"
)
"""A template that writes the ids of the raw text."""


def test_rounding_is_never_a_number(tmp_path: Path) -> None:
    base = silent_llama()
    tuned = copy.deepcopy(base)
    colon = byte_tokenizer()(":", add_special_tokens=False)["input_ids"][0]
    state = base.model.embed_tokens.weight.detach()[colon]
    with torch.no_grad():
        # two units in the last place of a float32: below what counts as measured, 5 √2 of them
        tuned.model.layers[BLOCK].mlp.down_proj.bias += 2 * torch.finfo(torch.float32).eps * state
    models = write_models(tmp_path / "models", base, tuned, TRANSCRIPT)
    write_data(tmp_path / "run")
    result = measure(tmp_path / "run", "template", models=models, figures=True, **SMALL)
    site = result["sites"]["resid_post.2"]
    assert not site["parts"]["total"]["zero"]
    assert site["parts"]["total"]["within_rounding"]
    assert (site["undefined"], site["why"]) == (True, "rounding")
    for part in site["parts"].values():
        assert part["share"] is part["energy"] is part["shared_share"] is None
    assert set(site["cosines"].values()) == {None}
    assert all(cosine is None for row in site["held_out"].values() for cosine in row.values())
    assert result["sites"]["resid_post.0"]["why"] == "zero"
    kl = result["kl"]
    assert all(item["recovered"] is None for item in kl.values())
    assert 0 < kl["base_raw"]["kl"]["value"] <= result["kl_floor"]
    notes = " ".join(result["notes"])
    assert "resid_post.2, resid_post.3" in notes
    assert "the mean displacement is not above 5 times what rounding alone can make" in notes
    assert "KL recovered is undefined" in notes


def test_one_conversation_has_no_shares(tmp_path: Path) -> None:
    base = silent_llama()
    models = write_models(tmp_path / "models", base, base)
    run = tmp_path / "run"
    write_data(run)
    pairs = read_pairs(run / "data" / "test.jsonl")
    one = [dataclasses.replace(pair, conversation="test one") for pair in pairs]
    write_pairs(run / "data" / "test.jsonl", one)
    result = measure(run, "template", models=models, **SMALL)
    assert {site["why"] for site in result["sites"].values()} == {"one_conversation"}
    assert result["headline"]["template_share"] is None
    assert any("all test prompts are of one conversation" in note for note in result["notes"])


def test_a_template_that_writes_the_transcript_changes_nothing(tmp_path: Path) -> None:
    base = silent_llama()
    models = write_models(tmp_path / "models", base, base, TRANSCRIPT)
    write_data(tmp_path / "run")
    result = measure(tmp_path / "run", "template", models=models, **SMALL)
    for site in result["sites"].values():
        assert (site["undefined"], site["why"]) == (True, "zero")
        assert all(part["zero"] and part["share"] is None for part in site["parts"].values())
    assert result["kl"]["v_total"] == {"kl": None, "recovered": None}
    notes = " ".join(result["notes"])
    for words in ("so the template part is 0 by construction", "No share is defined",
                  "KL recovered is undefined"):  # fmt: skip
        assert words in notes


def test_what_has_not_both_forms_is_left_out_and_counted(tmp_path: Path) -> None:
    refuses = "{% if 'tin' in messages[0]['content'] %}{{ raise_exception('no tin') }}{% endif %}"
    base = silent_llama()
    models = write_models(tmp_path / "models", base, base, refuses + TEMPLATE)
    run = tmp_path / "run"
    write_data(run)
    pairs = read_pairs(run / "data" / "test.jsonl")
    odd = PreferencePair("\n\nHuman: Hi", conversation="odd")
    write_pairs(run / "data" / "test.jsonl", [odd, *pairs])
    result = measure(run, "template", models=models, **SMALL)
    assert result["dropped"] == {
        "fit": {"template_refuses": 2}, "test": {"ends_elsewhere": 1, "template_refuses": 1}
    }  # fmt: skip
    assert (result["n_fit"], result["n_test"]) == (14, 7)
    assert any("left out by rule: ends_elsewhere 1, template_refuses 1" in note
               for note in result["notes"])  # fmt: skip


def refused(run: Path, kind: type[Exception], models: Json, **changes: Json) -> str:
    within = context(run, "template", models=models, template={**SMALL["template"], **changes})
    with pytest.raises(kind) as caught:
        call(within)
    assert "\n" not in str(caught.value)
    assert not within.folder.exists(), "nothing half-written"
    return str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    base = silent_llama()
    run = tmp_path / "run"
    write_data(run)
    bare = write_models(tmp_path / "bare", base, base, template=None)
    assert "has no chat template; give one as models.chat_template" in refused(
        run, ModelError, bare
    )
    models = write_models(tmp_path / "models", base, base)
    text = refused(run, DataError, models, max_tokens=8)
    assert "none of the 16 prompts of the fit split" in text
    assert "(too_long 16)" in text
    write_pairs(run / "data" / "test.jsonl", [])
    assert "(the split is empty)" in refused(run, DataError, models)


def test_figure_is_drawn(tmp_path: Path) -> None:
    base = silent_llama()
    models = write_models(tmp_path / "models", base, base)
    write_data(tmp_path / "run")
    measure(tmp_path / "run", "template", models=models, figures=True, **SMALL)
    figures = tmp_path / "run" / "template" / "figures"
    assert "final_norm" in read_json(figures / "four_way.json")["sites"]
