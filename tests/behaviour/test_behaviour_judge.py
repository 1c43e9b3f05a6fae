"""G-Eval against a real OpenAI-compatible server (mlx-lm) with a tiny model, on loopback."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch
from loopback import Reply, Request, serving
from planted import byte_tokenizer, tiny_llama
from pydantic import ValidationError

from dsteer.behaviour.judge import (
    NO_LABEL,
    PREFERENCE,
    REFUSAL,
    SCORE,
    Judge,
    Verdict,
    abstentions,
    verdict_of,
)
from dsteer.config import JudgeConfig
from dsteer.errors import ConfigError
from dsteer.models.load import quiet

TOLERANCE = 1e-5
"""Of scores and masses: two libraries' float32 passes through the same weights."""

ITEMS = [
    ("\n\nHuman: How do I boil an egg?\n\nAssistant:", " Eight minutes."),
    ("\n\nHuman: Name a river.\n\nAssistant:", " The Nile."),
    ("Which bread keeps longest?", "I can't help with that."),
    ([{"role": "user", "content": "Sum 2 and 3."}], "5"),
]


@pytest.fixture(autouse=True)
def _no_proxy_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@dataclass(frozen=True)
class Real:
    """A running mlx-lm server, and the same model here."""

    url: str
    model: object
    tokenizer: object

    def config(self, **changes: object) -> JudgeConfig:
        return JudgeConfig(**{"base_url": self.url, "model": "default_model", **changes})

    def expected(self, question: str, values: dict[str, float], top: int = 10) -> Verdict:
        """The verdict from this process's own softmax, with the cut at ``top`` tokens."""
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        with torch.no_grad():
            p = self.model(ids).logits[0, -1].double().softmax(0)
        kept = p.topk(top).indices.tolist()
        pieces = {index: self.tokenizer.convert_ids_to_tokens(index) for index in kept}
        labels = [
            (p[i].item(), values[s.strip()]) for i, s in pieces.items() if s.strip() in values
        ]
        mass = sum((weight for weight, _ in labels), 0.0)
        value = sum(weight * v for weight, v in labels) / mass if labels else None
        return Verdict(value, 1 - mass, None if labels else NO_LABEL)


def score_question(prompt: object, answer: str, grades: tuple[int, ...] = (1, 2, 3, 4, 5)) -> str:
    return SCORE.format(
        criterion=JudgeConfig.model_fields["criterion"].default,
        prompt=plain(prompt),
        answer=answer.strip(),
        grades=", ".join(map(str, grades)),
        low=grades[0],
        high=grades[-1],
    )


def plain(prompt: object) -> str:
    if isinstance(prompt, str):
        return prompt.strip()
    return "Human: " + prompt[0]["content"]


def agree(got: list[Verdict], expected: list[Verdict]) -> None:
    assert [item.reason for item in got] == [item.reason for item in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.missing == pytest.approx(theirs.missing, abs=TOLERANCE)
        if theirs.value is not None:
            assert mine.value == pytest.approx(theirs.value, abs=TOLERANCE)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("needs mlx-lm, an OpenAI-compatible server: no wheels for this platform")
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["yes", "no", " 4"])
    model = tiny_llama(
        vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.12
    )
    with torch.no_grad():  # labels likely enough to be seen; the grades 7 to 9 never are
        ids = torch.tensor([tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
        )])  # fmt: skip
        state = model.model(ids).last_hidden_state[0, -1]
        for token in ("1", "2", "3", "4", "5", " 4", "yes", "no", "A", "B"):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] += state / state.norm()
        for token in "789":
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 0.0
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield Real(f"http://127.0.0.1:{port}/v1", model, tokenizer)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        print(log.read_text())  # pytest shows it where a test failed


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=5.0):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"mlx-lm's server did not start:\n{log.read_text()}")


# ---------------------------------------------------------------------- the real server


def test_scores_are_the_models_own_probabilities(real: Real) -> None:
    got = Judge(real.config()).scores(ITEMS)
    grades = {str(grade): float(grade) for grade in range(1, 6)}
    expected = [real.expected(score_question(*item), grades) for item in ITEMS]
    agree(got, expected)
    assert all(item.value is not None and 0.01 < item.missing < 0.99 for item in got)
    assert len({item.value for item in got}) == len(ITEMS)


def test_the_cut_of_the_alternatives_goes_to_the_missing_mass(real: Real) -> None:
    got = Judge(real.config(top_logprobs=2)).scores(ITEMS)
    grades = {str(grade): float(grade) for grade in range(1, 6)}
    agree(got, [real.expected(score_question(*item), grades, top=2) for item in ITEMS])
    wide = Judge(real.config()).scores(ITEMS)
    assert any(a.missing > b.missing + 0.01 for a, b in zip(got, wide, strict=True))


def test_preferences_show_both_orders(real: Real) -> None:
    judge = Judge(real.config())
    prompt, a, b = "Name a river.", "The Nile.", "A mountain."
    halves = []
    for first, second in ((a, b), (b, a)):
        question = PREFERENCE.format(
            criterion=judge.config.criterion, prompt=prompt, first=first, second=second
        )
        halves.append(real.expected(question, {"A": 1.0, "B": 0.0}))
    assert halves[0].value is not None
    assert halves[1].value is not None
    # A judge that looked at one order alone would give another number.
    assert abs(halves[0].value - (1 - halves[1].value)) > 1e-3
    got = judge.prefer(prompt, a, b)
    assert got.value == pytest.approx((halves[0].value + 1 - halves[1].value) / 2, abs=TOLERANCE)
    assert got.missing == pytest.approx((halves[0].missing + halves[1].missing) / 2, abs=TOLERANCE)
    assert judge.prefer(prompt, b, a).value == pytest.approx(1 - got.value, abs=1e-12)


def test_refusals_are_the_probability_of_yes(real: Real) -> None:
    got = Judge(real.config(refusal=True)).refusals(ITEMS)
    questions = [REFUSAL.format(prompt=plain(p), answer=a.strip()) for p, a in ITEMS]
    agree(got, [real.expected(question, {"yes": 1.0, "no": 0.0}) for question in questions])
    assert all(item.value is not None and 0.01 < item.value < 0.99 for item in got)


def test_an_abstention_is_counted_and_is_no_zero(real: Real) -> None:
    got = Judge(real.config(scale=(7, 8, 9))).scores(ITEMS)
    grades = {str(grade): float(grade) for grade in (7, 8, 9)}
    agree(got, [real.expected(score_question(*it, grades=(7, 8, 9)), grades) for it in ITEMS])
    assert [item.value for item in got] == [None] * len(ITEMS)
    assert [item.missing for item in got] == [1.0] * len(ITEMS)
    assert abstentions(got) == {NO_LABEL: len(ITEMS)}


def test_a_model_that_the_server_lacks(real: Real) -> None:
    with pytest.raises(ConfigError, match=r"no chat completions of the model 'no/such'") as caught:
        Judge(real.config(model="no/such", retries=0)).scores(ITEMS)
    assert "\n" not in str(caught.value)


def test_a_wrong_path_on_the_server(real: Real) -> None:
    with pytest.raises(ConfigError, match=r"base_url ends as the server wants it, mostly in /v1"):
        Judge(real.config(base_url=real.url + "/v7", retries=0)).scores(ITEMS)


def test_more_alternatives_than_the_server_gives(real: Real) -> None:
    with pytest.raises(ConfigError, match=r"behaviour\.judge\.top_logprobs"):
        Judge(real.config(top_logprobs=20, retries=0)).scores(ITEMS)


# ------------------------------------------------- a flaky proxy before the real server


def forwarded(real: Real, request: Request) -> Reply:
    answer = httpx2.post(real.url + request.path, json=request.body, trust_env=False, timeout=60.0)
    return Reply(answer.status_code, answer.json())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retries_until_the_server_answers(real: Real, status: int) -> None:
    def flaky(number: int, request: Request) -> Reply:
        if number in {0, 1, 3}:
            return Reply(status, {"error": {"message": "busy"}})
        return forwarded(real, request)

    with serving(flaky) as proxy:
        config = real.config(base_url=proxy.url, retries=2, threads=1)
        got = Judge(config, pause=0.01).scores(ITEMS[:2])
        assert len(proxy.requests) == 3 + 3  # three refusals, then the probe and two questions
    agree(got, Judge(real.config()).scores(ITEMS[:2]))


def test_each_pause_is_twice_the_last_and_retry_after_is_honoured(
    real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("dsteer.behaviour.http.time.sleep", pauses.append)
    asked = ["", "", "7", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "100000"]

    def flaky(number: int, request: Request) -> Reply:
        if number < len(asked):
            return Reply(503, {}, {"Retry-After": asked[number]} if asked[number] else {})
        return forwarded(real, request)

    with serving(flaky) as proxy:
        Judge(real.config(base_url=proxy.url, retries=6), pause=0.5).scores(ITEMS[:1])
    assert pauses == [0.5, 1.0, 7.0, 0.0, 8.0, 60.0]


def test_a_text_is_asked_about_once(real: Real) -> None:
    with serving(lambda _, request: forwarded(real, request)) as proxy:
        judge = Judge(real.config(base_url=proxy.url))
        first = judge.scores([*ITEMS, ITEMS[0]])
        assert len(proxy.requests) == 1 + len(ITEMS)  # the probe, then each distinct question
        assert judge.scores(ITEMS) == first[:-1]
        assert first[-1] == first[0]
        assert len(proxy.requests) == 1 + len(ITEMS)


def test_a_server_that_dies_gives_abstentions_with_the_reason(real: Real) -> None:
    def dying(number: int, request: Request) -> Reply:
        return forwarded(real, request) if number < 2 else Reply(500, {"error": "out of memory"})

    with serving(dying) as proxy:
        config = real.config(base_url=proxy.url, threads=1, retries=1)
        got = Judge(config, pause=0.01).scores(ITEMS)
        assert len(proxy.requests) == 2 + 2 * (len(ITEMS) - 1)
    agree(got[:1], Judge(real.config()).scores(ITEMS[:1]))
    assert got[1:] == [Verdict(None, None, "no answer: 500 out of memory")] * (len(ITEMS) - 1)
    assert abstentions(got) == {"no answer: 500 out of memory": len(ITEMS) - 1}


def test_one_order_that_fails_makes_the_pair_an_abstention(real: Real) -> None:
    def dying(number: int, request: Request) -> Reply:
        return forwarded(real, request) if number < 2 else Reply(400, {"error": "too long"})

    with serving(dying) as proxy:
        got = Judge(real.config(base_url=proxy.url, threads=1)).prefer("Hi", "Hello.", "Go away.")
    assert got.value is None
    assert got.missing is not None
    assert got.reason == "no answer: 400 too long"


# ---------------------------------- the protocol alone: handlers of this test, no model


def completion(top: dict[str, float]) -> dict:
    return {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]}


def test_protocol_completions_where_chat_gives_no_probabilities() -> None:
    def old_server(_number: int, request: Request) -> Reply:
        if request.path == "/v1/chat/completions":
            return Reply(200, {"choices": [{"message": {"content": "4"}, "logprobs": None}]})
        assert request.path == "/v1/completions"
        assert request.body["logprobs"] == 10
        assert request.body["prompt"].endswith("\n\nReply:")
        return Reply(200, completion({" 5": -1.0, "▁4": -2.0, "Ġ4": -3.0, "five": -1.5}))

    with serving(old_server) as server:
        config = JudgeConfig(base_url=f"{server.url}/v1/", model="m")
        (got,) = Judge(config).scores(ITEMS[:1])
        paths = [request.path for request in server.requests]
    assert paths == ["/v1/chat/completions", "/v1/completions", "/v1/completions"]
    five, four = 0.36787944117, 0.13533528324 + 0.04978706837
    assert got.value == pytest.approx((5 * five + 4 * four) / (five + four), abs=1e-9)
    assert got.missing == pytest.approx(1 - five - four, abs=1e-9)


def test_protocol_no_probabilities_at_all() -> None:
    silent = {"choices": [{"message": {"content": "4"}, "text": "4", "logprobs": None}]}
    with (
        serving(lambda *_: Reply(200, silent)) as server,
        pytest.raises(ConfigError, match="gives no logprobs, in chat completions or in"),
    ):
        Judge(JudgeConfig(base_url=server.url, model="m")).scores(ITEMS)


def test_protocol_the_key_is_sent_and_its_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    refusal = Reply(401, {"error": {"message": "bad\nkey"}})
    with serving(lambda *_: refusal) as server:
        judge = Judge(JudgeConfig(base_url=server.url, model="m", api_key_env="MY_KEY"))
        with pytest.raises(ConfigError, match=r"401 bad key.*MY_KEY") as caught:
            judge.scores(ITEMS)
        assert [r.headers["Authorization"] for r in server.requests] == ["Bearer s3cret"]
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_protocol_a_key_that_expires_ends_the_run() -> None:
    fine = completion({"5": 0.0})

    def expiring(number: int, _request: Request) -> Reply:
        return Reply(200, fine) if number < 2 else Reply(403, b"expired")

    with serving(expiring) as server:
        judge = Judge(JudgeConfig(base_url=server.url, model="m", threads=1))
        with pytest.raises(ConfigError, match="403 expired"):
            judge.scores([("q", str(number)) for number in range(200)])
        assert len(server.requests) < 20  # the rest was not asked


def test_protocol_a_web_page_is_no_judge() -> None:
    with (
        serving(lambda *_: Reply(200, b"<html>hello</html>")) as server,
        pytest.raises(ConfigError, match="no JSON object"),
    ):
        Judge(JudgeConfig(base_url=server.url, model="m")).scores(ITEMS)


def test_nothing_listens_at_the_url() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    judge = Judge(JudgeConfig(base_url=url, model="m", retries=1), pause=0.01)
    with pytest.raises(ConfigError, match=r"nothing answers there .*start the server") as caught:
        judge.scores(ITEMS)
    assert "\n" not in str(caught.value)


def test_a_url_that_is_none() -> None:
    with pytest.raises(ConfigError, match="not a web address"):
        Judge(JudgeConfig(base_url="localhost:8080/v1", model="m")).scores(ITEMS)


def test_timeouts_are_retried() -> None:
    def slow(number: int, _request: Request) -> Reply:
        if number == 0:
            time.sleep(0.5)
        return Reply(200, completion({"5": 0.0}))

    with serving(slow) as server:
        config = JudgeConfig(base_url=server.url, model="m", timeout=0.2, retries=1)
        assert Judge(config, pause=0.01).scores(ITEMS[:1]) == [Verdict(5.0, 0.0)]
        assert len(server.requests) == 3


# ------------------------------------------------------------------------------ formulas


def test_verdict_of_hand_worked() -> None:
    top = {"1": -torch.inf, "2": torch.log(torch.tensor(0.25, dtype=torch.float64)).item()}
    top["4"] = top["2"]
    assert verdict_of(top, {"1": 1.0, "2": 2.0, "4": 4.0}) == Verdict(3.0, 0.5)
    assert verdict_of(top, {"5": 5.0}) == Verdict(None, 1.0, NO_LABEL)
    assert verdict_of({}, {"5": 5.0}) == Verdict(None, 1.0, NO_LABEL)


@pytest.mark.parametrize(
    "changes", [{"scale": (1, 10)}, {"scale": (5, 1)}, {"scale": (1,)}, {"top_logprobs": 21}]
)
def test_config_refuses(changes: dict) -> None:
    with pytest.raises(ValidationError):
        JudgeConfig(base_url="http://localhost/v1", model="m", **changes)
