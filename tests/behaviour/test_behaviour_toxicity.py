"""Toxicity: tiny classifiers loaded through the normal path, and Perspective's protocol."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loopback import Reply, Request, serving
from planted import byte_tokenizer, tiny_llama
from tokenizers import processors

from dsteer.behaviour.classifier import Classifier
from dsteer.behaviour.toxicity import (
    Toxicity,
    classifier_toxicity,
    load_toxicity,
    perspective_toxicity,
)
from dsteer.config import ToxicityConfig
from dsteer.errors import ConfigError, ModelError
from dsteer.models.load import quiet

TEXTS = ["You are kind.", "a", "You are a dreadful person, and so is everybody here.", "Hi there"]

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2, "pad_token_id": 2,
}  # fmt: skip


def enclosing_tokenizer() -> Any:
    """Bytes between a token in front and one behind, as encoders have it."""
    tokenizer = byte_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def saved(folder: Path, kind: str = "Bert", tokenizer: Any = None, **changes: object) -> Path:
    """A random classifier in a folder."""
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    with torch.no_grad():  # a random head says nearly the same of every text
        head = model.score if kind == "Llama" else model.classifier
        for weight in (head if kind != "Roberta" else head.out_proj).parameters():
            weight *= 5
    with quiet():
        model.save_pretrained(folder)
    (tokenizer or enclosing_tokenizer()).save_pretrained(folder)
    return folder


def load(folder: Path) -> Classifier:
    return Classifier.load(folder, device="cpu")


def direct(folder: Path, text: str) -> torch.Tensor:
    """Logits of one text, without this package."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]


NAMES = {"id2label": {0: "neutral", 1: "toxic", 2: "rude"}, "num_labels": 3}


@pytest.mark.parametrize("kind", ["Bert", "Llama", "Roberta"])
def test_softmax_of_the_label(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind, **NAMES)
    config = ToxicityConfig(classifier=str(folder), label="toxic")
    got = load_toxicity(config, device="cpu")(TEXTS)
    expected = [direct(folder, text).softmax(0)[1].item() for text in TEXTS]
    assert [item.value for item in got] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01  # texts differ, so a wrong order would show
    assert not any(item.truncated or item.reason for item in got)


@pytest.mark.parametrize(
    ("changes", "multi_label", "sigmoid"),
    [
        ({**NAMES, "problem_type": "multi_label_classification"}, None, True),
        ({**NAMES, "problem_type": "multi_label_classification"}, False, False),
        (NAMES, True, True),
        ({"id2label": {0: "toxic"}, "num_labels": 1}, None, True),
    ],
)
def test_sigmoid_where_labels_are_independent(
    tmp_path: Path, changes: dict, multi_label: bool | None, sigmoid: bool
) -> None:
    folder = saved(tmp_path, **changes)
    config = ToxicityConfig(classifier=str(folder), multi_label=multi_label)
    got = load_toxicity(config, device="cpu")(TEXTS)
    column = 1 if changes["num_labels"] == 3 else 0
    for text, item in zip(TEXTS, got, strict=True):
        logits = direct(folder, text)
        p = logits.sigmoid() if sigmoid else logits.softmax(0)
        assert item.value == pytest.approx(p[column].item(), abs=1e-5)


def test_batches_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load(saved(tmp_path, **NAMES))
    texts = [letter * n for n in range(1, 12) for letter in "ab"]
    together = classifier_toxicity(classifier, "toxic")(texts)
    monkeypatch.setattr("dsteer.behaviour.classifier.BATCH_TOKENS", 1)
    alone = classifier_toxicity(classifier, "toxic")(texts)
    values = [[item.value for item in some] for some in (together, alone)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_long_texts_lose_their_end_and_say_so(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind, max_position_embeddings=20, **NAMES)
    classifier = load(folder)
    limit = {"Bert": 20, "Roberta": 17}[kind]  # RoBERTa's positions begin behind its padding id, 2
    assert classifier.max_tokens == limit
    fits = "x" * (limit - 2)
    got = classifier_toxicity(classifier, "toxic")([fits, fits + "yz"])
    assert [item.truncated for item in got] == [False, True]
    assert got[0].value == pytest.approx(direct(folder, fits).softmax(0)[1].item(), abs=1e-5)
    assert got[1].value == pytest.approx(got[0].value, abs=1e-5)


def test_what_is_cut_off() -> None:
    classifier = Classifier("c", None, enclosing_tokenizer(), ("toxic",), False, max_tokens=4)
    assert classifier.fit([0, 11, 12, 1], keep="start") == [0, 11, 12, 1]
    assert classifier.fit([0, 11, 12, 13, 1], keep="start") == [0, 11, 12, 1]
    assert classifier.fit([0, 11, 12, 13, 1], keep="end") == [0, 12, 13, 1]
    assert classifier.fit([11, 12, 13, 14, 15], keep="end") == [12, 13, 14, 15]


def test_a_text_is_read_once(tmp_path: Path) -> None:
    classifier = load(saved(tmp_path, **NAMES))
    rows: list[int] = []
    classifier.model.register_forward_hook(
        lambda _module, _args, kwargs, _output: rows.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    metric = classifier_toxicity(classifier, "toxic")
    first = metric([*TEXTS, TEXTS[0]])
    assert metric(TEXTS) == first[:-1]
    assert sum(rows) == len(TEXTS)


def test_a_text_without_tokens_has_no_value(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    classifier = load(saved(tmp_path, "Llama", tokenizer, **NAMES))
    got = classifier_toxicity(classifier, "toxic")(["", "a"])
    assert got[0] == Toxicity(None, reason="a text without tokens")
    assert got[1].value is not None


def test_an_unknown_label_lists_the_labels(tmp_path: Path) -> None:
    config = ToxicityConfig(classifier=str(saved(tmp_path, **NAMES)), label="toxicity")
    with pytest.raises(ModelError, match="no label 'toxicity'; it has 'neutral', 'toxic', 'rude'"):
        load_toxicity(config, device="cpu")


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    with quiet():
        tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"weights are missing \(such as score\.weight\)"):
        load(tmp_path)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)


# ------------------------------ Perspective: its protocol, spoken by a handler of this test


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", "s3cret")
    monkeypatch.setenv("NO_PROXY", "*")


def scored(value: float) -> Reply:
    summary = {"value": value, "type": "PROBABILITY"}
    return Reply(200, {"attributeScores": {"TOXICITY": {"summaryScore": summary}}})


def by_length(_number: int, request: Request) -> Reply:
    return scored(len(request.body["comment"]["text"]) / 100)


@pytest.mark.usefixtures("key")
def test_perspective_protocol() -> None:
    with serving(by_length) as server:
        config = ToxicityConfig(perspective=True, perspective_url=f"{server.url}/comments:analyze")
        got = load_toxicity(config)(["abc"])
        (request,) = server.requests
    assert got == [Toxicity(0.03)]
    assert request.path == "/comments:analyze?key=s3cret"
    assert request.body == {
        "comment": {"text": "abc"},
        "requestedAttributes": {"TOXICITY": {}},
        "doNotStore": True,
    }


@pytest.mark.usefixtures("key")
def test_perspective_protocol_retries_and_gaps() -> None:
    def moody(number: int, request: Request) -> Reply:
        text = request.body["comment"]["text"]
        if number == 0:
            return Reply(429, {"error": {"message": "quota"}}, {"Retry-After": "0"})
        if text == "zut":
            return Reply(400, {"error": {"code": 400, "message": "language fr is not supported"}})
        if text == "down":
            return Reply(503, b"")
        return Reply(200, {}) if text == "odd" else by_length(number, request)

    with serving(moody) as server:
        metric = perspective_toxicity(endpoint=server.url, rate=1000.0, retries=1, pause=0.01)
        got = metric(["hello", "zut", "down", "odd", "hello"])
        assert len(server.requests) == 2 + 1 + 2 + 1
    assert got == [
        Toxicity(0.05),
        Toxicity(None, reason="no answer: 400 language fr is not supported"),
        Toxicity(None, reason="no answer: 503"),
        Toxicity(None, reason="an answer without a TOXICITY score"),
        Toxicity(0.05),
    ]


@pytest.mark.usefixtures("key")
def test_perspective_protocol_keeps_to_the_rate() -> None:
    with serving(by_length) as server:
        metric = perspective_toxicity(endpoint=server.url, rate=20.0)
        start = time.monotonic()
        metric(["a", "ab", "abc", "abcd"])
        assert time.monotonic() - start >= 3 / 20


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(403, {"error": {"message": "Forbidden"}}), "the key is refused"),
        (Reply(400, {"error": {"message": "API key not valid. Pass one."}}), "the key is refused"),
        (Reply(404, b"Not Found"), "is no comments:analyze endpoint"),
    ],
)
def test_perspective_protocol_refusals_are_one_line(reply: Reply, words: str) -> None:
    with serving(lambda *_: reply) as server:
        metric = perspective_toxicity(endpoint=server.url, rate=1000.0)
        with pytest.raises(ConfigError, match=words) as caught:
            metric(TEXTS)
        assert len(server.requests) == 1
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_perspective_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="PERSPECTIVE_API_KEY"):
        load_toxicity(ToxicityConfig(perspective=True))
