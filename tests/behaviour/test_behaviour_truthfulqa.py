"""TruthfulQA: two questions worked by hand, the ids that are scored, and the real file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
from planted import byte_tokenizer, planted_pair, tiny_llama
from pyarrow import parquet
from torch import Tensor

from dsteer.behaviour.truthfulqa import Question, multiple_choice, read_questions
from dsteer.errors import DataError, MeasurementError
from dsteer.training.evaluate import Continuation, log_likelihoods

SKY = Question("Why is the sky blue?", "Scattering", ("Scattering", "Light"), ("The sea", "Paint"))
COWS = Question("Do cows lie down for rain?", "No", ("No",), ("Yes", "Always"))

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"


def saying(probabilities: dict[str, float]) -> Callable[[list[Continuation]], Tensor]:
    """A scorer that knows the probability of each answer."""
    tokenizer = byte_tokenizer()

    def score(items: list[Continuation]) -> Tensor:
        answers = [tokenizer.decode(item.tokens) for item in items]
        assert all(answer.startswith(" ") for answer in answers)
        return torch.tensor([math.log(probabilities[answer[1:]]) for answer in answers])

    return score


def test_hand_worked() -> None:
    score = saying({
        "Scattering": 0.2, "Light": 0.4, "The sea": 0.1, "Paint": 0.1,
        "No": 0.15, "Yes": 0.25, "Always": 0.1,
    })  # fmt: skip
    got = multiple_choice([SKY, COWS], byte_tokenizer(), score)
    # Sky: the best, 0.2, beats both false answers (another true one may beat it): 0.6 of 0.8.
    # Cows: "Yes" beats the best: 0.15 of 0.5.
    assert got.mc1.tolist() == [1.0, 0.0]
    assert got.mc2.tolist() == pytest.approx([0.75, 0.3], abs=1e-6)


def test_a_tie_with_a_false_answer_is_no_win() -> None:
    score = saying({"No": 0.25, "Yes": 0.25, "Always": 0.1})
    assert multiple_choice([COWS], byte_tokenizer(), score).mc1.tolist() == [0.0]


def test_tiny_probabilities_do_not_vanish() -> None:
    def score(items: list[Continuation]) -> Tensor:
        return torch.tensor([-2000.0, -2001.0, -2002.0], dtype=torch.float64)

    (mc2,) = multiple_choice([COWS], byte_tokenizer(), score).mc2.tolist()
    assert mc2 == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)), abs=1e-12)


def test_what_a_model_is_asked() -> None:
    seen: list[Continuation] = []

    def score(items: list[Continuation]) -> Tensor:
        seen.extend(items)
        return torch.zeros(len(items))

    multiple_choice([COWS], byte_tokenizer(), score)
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(item.tokens) for item in seen] == [" No", " Yes", " Always"]
    assert {tokenizer.decode(item.context) for item in seen} == {
        "<s>Q: Do cows lie down for rain?\nA:"
    }


def test_a_model_and_the_model_that_was_tuned_from_it() -> None:
    pair = planted_pair(2, size=8.0)
    before, after = (
        multiple_choice(
            [SKY, COWS], pair.tokenizer, lambda items, m=model: log_likelihoods(m, items)
        )
        for model in (pair.base, pair.tuned)
    )
    assert ((before.mc2 > 0) & (before.mc2 < 1)).all()
    assert (before.mc2 - after.mc2).abs().max() > 1e-3
    # By hand, one answer at a time, with no batch and no padding.
    log_p = []
    for answer in COWS.true + COWS.false:
        context = pair.tokenizer("Q: Do cows lie down for rain?\nA:")["input_ids"]
        tokens = pair.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = pair.base(torch.tensor([context + tokens])).logits[0].double()
        steps = logits.log_softmax(1)[len(context) - 1 : -1]
        log_p.append(sum(steps[i, token].item() for i, token in enumerate(tokens)))
    weights = [math.exp(value) for value in log_p]
    assert before.mc2[1].item() == pytest.approx(weights[0] / sum(weights), rel=1e-4)
    assert before.mc1[1].item() == float(log_p[0] > max(log_p[1:]))


def test_a_model_that_gives_no_numbers() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(MeasurementError, match="3 of 3 log-likelihoods"):
        multiple_choice([COWS], byte_tokenizer(), lambda items: log_likelihoods(model, items))


def test_reads_the_csv(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "\ufeff" + HEADER
        + "A,B,Do cows lie down for rain? ,No,No; Rarely;,Yes; Always; ,http://x\n"
        + 'A,B,"Who, me?",You,Nobody,Me,http://x\n',
        encoding="utf-8",
    )  # fmt: skip
    first, second = read_questions(str(file))
    assert first == Question(
        "Do cows lie down for rain?", "No", ("No", "Rarely"), ("Yes", "Always")
    )
    assert second == Question("Who, me?", "You", ("You", "Nobody"), ("Me",))
    assert read_questions(str(file), limit=1) == [first]


def test_reads_the_hubs_columns(tmp_path: Path) -> None:
    # The columns of truthfulqa/truthful_qa, configuration multiple_choice, in a local copy of it.
    row = {
        "question": "Do cows lie down for rain?",
        "mc1_targets": {"choices": ["No", "Yes", "Always"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["No", "Rarely", "Yes", "Always"], "labels": [1, 1, 0, 0]},
    }
    folder = tmp_path / "multiple_choice"
    folder.mkdir()
    parquet.write_table(
        pyarrow.Table.from_pylist([row]), folder / "validation-00000-of-00001.parquet"
    )
    expected = Question("Do cows lie down for rain?", "No", ("No", "Rarely"), ("Yes", "Always"))
    assert read_questions(str(tmp_path)) == [expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Question,Best Answer\nq,a\n", "line 2: no column 'Correct Answers'"),
        (HEADER + "A,B,q,a,a,;,x\n", "line 2: expected a question with a best answer and false"),
        (HEADER + "A,B,q,,a,b,x\n", "line 2: expected a question with a best answer and false"),
    ],
)
def test_rows_that_are_no_question(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        read_questions(str(file))


@pytest.mark.shared_data
def test_the_real_file_reads_and_is_scored(shared_data: Path) -> None:
    questions = read_questions(str(shared_data / "truthfulqa.csv"))
    assert len(questions) == 813
    assert questions[0].text == "Why do veins appear blue?"
    assert questions[0].best.startswith("Veins appear blue because blue light does not penetrate")
    assert (len(questions[0].true), len(questions[0].false)) == (5, 4)
    for question in questions:
        assert question.best in question.true
        assert all((*question.true, *question.false))
        assert ";" not in question.best
    # A scorer that knows no answer: MC1 never, MC2 the share of true answers.
    got = multiple_choice(questions, byte_tokenizer(), lambda items: torch.zeros(len(items)))
    assert got.mc1.sum() == 0
    shares = [len(q.true) / (len(q.true) + len(q.false)) for q in questions]
    assert got.mc2.tolist() == pytest.approx(shares, abs=1e-12)
