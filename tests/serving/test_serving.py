"""The endpoint, asked by the real client: answers, streams, strengths, and what is refused."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
import uvicorn
from planted import byte_tokenizer, tiny_llama

from dsteer.data.tokens import Encoded, encode
from dsteer.errors import ConfigError
from dsteer.serving import engine as engine_module
from dsteer.serving.app import listen, make_app
from dsteer.serving.engine import Engine
from dsteer.serving.protocol import Defaults
from dsteer.steering.answer import Answer, answer
from dsteer.steering.decode import Decoding
from dsteer.steering.dials import Dial, Dials
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

MODEL, TOKENIZER = tiny_llama(), byte_tokenizer()
GENERATOR = torch.Generator().manual_seed(3)
SET = SteeringVectorSet(
    [SteeringVector(torch.randn(32, generator=GENERATOR), f"resid_post.{k}") for k in (1, 2)]
)
HI = [{"role": "user", "content": "Hi"}]


def make_dials(default: float = 0.0) -> Dials:
    return Dials(
        MODEL,
        [Dial("warm", SET, "resid_post.1", default), Dial("brief", SET, "resid_post.2", 0.0)],
    )


@dataclass
class Server:
    url: str
    engine: Engine

    def client(self, **settings: Any) -> openai.OpenAI:
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    @contextlib.contextmanager
    def sent(self, body: dict[str, Any]) -> Iterator[http.client.HTTPConnection]:
        """A connection on which a request was sent; it is closed, whatever was read."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        yield connection
        connection.close()

    def post(self, path: str, content: str) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=60)


@contextlib.contextmanager
def running(
    default: float = 0.0, waiting: int = 8, key: str | None = None, model: Any = MODEL
) -> Iterator[Server]:
    """A server in a thread, on loopback."""
    dials = make_dials(default)
    engine = Engine(model, TOKENIZER, dials, waiting)
    app = make_app(engine, "tiny", defaults=Defaults(12, 0.0), api_key=key)
    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", engine)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as made:
        yield made


def alone(prompt: Encoded, strengths: dict[str, float], decoding: Decoding) -> Answer:
    """What the model answers without a server."""
    dials = make_dials()
    acting = dials.interventions([dials.turned(strengths)])
    return answer(MODEL, TOKENIZER, prompt, acting, decoding)[0]


def hi() -> Encoded:
    ids = TOKENIZER("<s><user>Hi\n<assistant>", add_special_tokens=False)["input_ids"]
    return Encoded(tuple(ids), len(ids))


def ask(client: openai.OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HI, **settings})


def test_models_and_health(server: Server) -> None:
    with server.client() as client:
        (card,) = client.models.list().data
        assert (card.id, card.owned_by) == ("tiny", "dsteer")
        assert card.steering["warm"] == {  # type: ignore[attr-defined]
            "site": "resid_post.1",
            "strength": 0.0,
            "norm": SET["resid_post.1"].norm,
        }
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
            client.models.retrieve("other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "requests": 0}


def test_chat_is_steered_by_request(server: Server) -> None:
    expected = {
        strength: alone(hi(), {"warm": strength}, Decoding(12)) for strength in (0.0, 1.0, -2.0)
    }
    assert len({one.text for one in expected.values()}) == 3
    with server.client() as client:
        for strength, one in expected.items():
            found = ask(client, extra_body={"steering": {"warm": strength}})
            (choice,) = found.choices
            assert choice.message.content == one.text
            assert choice.message.role == "assistant"
            assert choice.finish_reason == one.finish
            assert found.usage.prompt_tokens == len(hi().ids)
            assert found.usage.completion_tokens == len(one.tokens)
            assert found.steering == {"warm": strength, "brief": 0.0}
        assert ask(client).choices[0].message.content == expected[0.0].text


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_stream_joins_to_the_answer(server: Server, strength: float) -> None:
    body = {"steering": {"warm": strength, "brief": 2 * strength}}
    with server.client() as client:
        whole = ask(client, max_tokens=40, extra_body=body)
        chunks = list(
            ask(
                client,
                max_tokens=40,
                extra_body=body,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    *pieces, counts = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(pieces) > 5  # it came in pieces
    assert counts.choices == []
    assert counts.usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_completions(server: Server) -> None:
    """A text as it stands, several, and ids."""
    prompts = ["The river", "a"]
    encoded = encode(TOKENIZER, prompts)
    expected = [alone(item, {"brief": 1.5}, Decoding(10)).text for item in encoded]
    settings = {"model": "tiny", "max_tokens": 10, "extra_body": {"steering": {"brief": 1.5}}}
    with server.client() as client:
        both = client.completions.create(prompt=prompts, **settings)  # type: ignore[call-overload]
        assert [choice.text for choice in both.choices] == expected
        assert [choice.index for choice in both.choices] == [0, 1]
        assert both.usage.prompt_tokens == sum(len(item.ids) for item in encoded)
        ids = client.completions.create(prompt=list(encoded[0].ids), **settings)  # type: ignore[call-overload]
        assert ids.choices[0].text == expected[0]
        stream = client.completions.create(prompt=prompts, stream=True, **settings)  # type: ignore[call-overload]
        texts = ["", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected


def test_choices_draw_each_their_own(server: Server) -> None:
    settings = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 8}
    with server.client() as client:
        found = [choice.message.content for choice in ask(client, **settings).choices]
        again = [choice.message.content for choice in ask(client, **settings).choices]
        assert found == again
        assert len(set(found)) == 3
        texts = ["", "", ""]
        for chunk in ask(client, stream=True, **settings):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == found
        unseeded = {ask(client, temperature=1.0).choices[0].message.content for _ in range(4)}
        assert len(unseeded) > 1


def test_stop_strings(server: Server) -> None:
    plain = alone(hi(), {}, Decoding(12)).text
    stop = plain[4:6]
    with server.client() as client:
        found = ask(client, stop=["\0", stop]).choices[0]
        assert found.message.content == plain[: plain.index(stop)]
        assert found.finish_reason == "stop"


def test_requests_at_once_keep_their_strengths(server: Server) -> None:
    """Twelve requests from four threads, streamed or whole: each is as it is alone."""
    strengths = [0.0, 1.0, -1.0, 2.0] * 3
    expected = {s: alone(hi(), {"warm": s}, Decoding(12)).text for s in set(strengths)}
    assert len(set(expected.values())) == 4

    def one(number: int) -> str:
        body = {"steering": {"warm": strengths[number]}}
        with server.client() as client:
            if number % 2:
                chunks = ask(client, stream=True, extra_body=body)
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            return str(ask(client, extra_body=body).choices[0].message.content)

    # the queue holds eight beside the one that runs, and four threads ask
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(one, range(12)))
    assert found == [expected[s] for s in strengths]


def test_default_strengths() -> None:
    """Of the server; a request changes those that it names."""
    steered = alone(hi(), {"warm": 1.0}, Decoding(12)).text
    both = alone(hi(), {"warm": 1.0, "brief": 1.0}, Decoding(12)).text
    plain = alone(hi(), {}, Decoding(12)).text
    with running(default=1.0) as made, made.client() as client:
        assert ask(client).choices[0].message.content == steered
        found = ask(client, extra_body={"steering": {"brief": 1.0}})
        assert found.choices[0].message.content == both
        found = ask(client, extra_body={"steering": {"warm": 0}})
        assert found.choices[0].message.content == plain
        assert ask(client).choices[0].message.content == steered  # nothing stays


CHAT = {"model": "tiny", "messages": HI}


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"steering": {"wram": 1.0}}, "steering", "no vector of this name; did you mean 'warm'"),
        ({"steering": {"warm": float("nan")}}, "steering", "expected a finite number"),
        ({"steering": {"warm": float("inf")}}, "steering", "expected a finite number"),
        ({"steering": {"warm": "1"}}, "steering", "strength '1' of warm: expected a number"),
        ({"steering": {"warm": True}}, "steering", "strength True of warm: expected a number"),
        ({"steering": [1]}, "steering", "expected an object"),
        ({"stearing": {"warm": 1}}, "stearing", "no such field; did you mean 'steering'"),
        ({"logprobs": True}, "logprobs", "logprobs True: not supported here"),
        ({"tools": [{}]}, "tools", "not supported here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported here"),
        ({"n": 0}, "n", "n 0: expected 1 to 8"),
        ({"n": 9}, "n", "n 9: expected 1 to 8"),
        ({"n": 1.5}, "n", "expected a whole number"),
        ({"temperature": "hot"}, "temperature", "expected a number"),
        ({"temperature": -1}, None, "temperature -1.0: expected 0 or more"),
        ({"top_p": 0}, None, "top_p 0.0: expected a probability above 0"),
        ({"max_tokens": 0}, None, "max_new_tokens 0: expected at least 1"),
        ({"max_tokens": True}, "max_tokens", "expected a whole number"),
        ({"stop": [1]}, "stop", "expected a text or a list of texts"),
        ({"stop": ""}, None, "stop holds an empty string"),
        ({"stream": "yes"}, "stream", "expected true or false"),
        ({"max_tokens": 400}, None, "and 400 new ones exceed the 256"),
        ({"messages": []}, "messages", "expected a list of them"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": ["Hi"]}, "messages[0]", "has the role None"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "has the role 'tool'"),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "messages[0]",
            "has the role ['user']",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0]", "a content that is no text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "not valid Unicode"),
        ({"\ud800": 1}, "\\ud800", "no such field"),
        ({"steering": {"warm": 10**400}}, "steering", "expected a finite number"),
        ({"temperature": 10**400}, "temperature", "expected a number of usual size"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "ends with an answer"),
    ],
)
def test_what_is_refused(
    server: Server, change: dict[str, Any], param: str | None, told: str
) -> None:
    reply = server.post("/v1/chat/completions", json.dumps({**CHAT, **change}))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert told in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_refusals_reach_the_client_as_its_own_errors(server: Server) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError, match="no vector of this name"):
            ask(client, extra_body={"steering": {"cold": 1}})
        with pytest.raises(openai.BadRequestError, match="no vector of this name"):
            ask(client, stream=True, extra_body={"steering": {"cold": 1}})
        with pytest.raises(openai.BadRequestError, match="exceed the 256"):
            ask(client, stream=True, max_tokens=400)
        with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
            ask(client, model="gpt")


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    """Fields that clients send with neutral values, and contents in parts."""
    neutral = {
        "user": "me", "logprobs": False, "tools": [], "presence_penalty": 0, "logit_bias": {},
        "response_format": {"type": "text"}, "top_logprobs": None, "steering": None,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    }  # fmt: skip
    reply = server.post("/v1/chat/completions", json.dumps({**CHAT, **neutral}))
    expected = alone(hi(), {}, Decoding(12)).text
    assert reply.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("content", ["", "{", '"text"', "[1]", "[" * 10**5, "1" * 5000])
def test_bodies_that_are_none(server: Server, content: str) -> None:
    reply = server.post("/v1/chat/completions", content)
    assert reply.status_code == 400
    assert "expected a" in reply.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [None, 3, [], [1, "a"], [[]], [999], [-1]])
def test_prompts_that_are_none(server: Server, prompt: object) -> None:
    reply = server.post("/v1/completions", json.dumps({"model": "tiny", "prompt": prompt}))
    assert reply.status_code == 400
    assert "prompt" in reply.json()["error"]["message"]


def test_other_routes(server: Server) -> None:
    reply = httpx.get(f"{server.url}/v1/embeddings")
    assert (reply.status_code, reply.json()["error"]["message"]) == (404, "Not Found")
    reply = httpx.get(f"{server.url}/v1/completions")
    assert reply.status_code == 405


def test_the_limit_of_the_model_bounds_what_a_request_leaves_open(server: Server) -> None:
    """250 tokens of 256, and a default of 12 new ones: there is room for 6."""
    with server.client() as client:
        found = client.completions.create(model="tiny", prompt="a" * 249)
        assert found.usage is not None
        assert found.usage.prompt_tokens == 250
        assert found.usage.completion_tokens == 6


def test_an_api_key() -> None:
    with running(key="secret") as made:
        with made.client(api_key="secret") as client:
            assert client.models.list().data[0].id == "tiny"
            assert ask(client, max_tokens=1).choices[0].finish_reason == "length"
        with made.client(api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="no key, or a wrong one"):
                client.models.list()
            with pytest.raises(openai.AuthenticationError, match="no key, or a wrong one"):
                ask(client)
        assert httpx.get(f"{made.url}/v1/models").status_code == 401
        assert httpx.get(f"{made.url}/health").status_code == 200


# ------------------------------------------------------------------------------------ the queue


@dataclass
class Gate:
    """Holds the model at each token until it is opened; keeps the answers."""

    open: threading.Event
    begun: threading.Event
    answers: list[Answer]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate(threading.Event(), threading.Event(), [])

    def held(*args: Any, **kwargs: Any) -> list[Answer]:
        cancelled = kwargs["cancelled"]

        def look() -> bool:
            made.begun.set()
            while not made.open.is_set() and not cancelled():
                time.sleep(0.005)
            return bool(cancelled())

        found = answer(*args, **{**kwargs, "cancelled": look})
        made.answers.extend(found)
        return found

    monkeypatch.setattr(engine_module, "answer", held)
    return made


def test_too_many_requests(gate: Gate) -> None:
    """One runs, one waits, a third is refused; then both are answered."""
    with running(waiting=1) as made, ThreadPoolExecutor(2) as threads, made.client() as client:
        both = [threads.submit(ask, client) for _ in range(2)]
        while made.engine.jobs < 2:
            time.sleep(0.005)
        reply = made.post("/v1/chat/completions", json.dumps(CHAT))
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "busy"
        gate.open.set()
        expected = alone(hi(), {}, Decoding(12)).text
        assert [one.result().choices[0].message.content for one in both] == [expected] * 2
        assert made.engine.jobs == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_the_model(gate: Gate, stream: bool) -> None:
    body = {**CHAT, "max_tokens": 200, "stream": stream}
    with running() as made:
        with made.sent(body) as connection:
            gate.begun.wait()  # held at its first token
            if stream:
                assert connection.getresponse().readline().startswith(b"data: ")
        while made.engine._jobs:
            time.sleep(0.005)
        assert [one.finish for one in gate.answers] == ["cancelled"]
        assert len(gate.answers[0].tokens) < 200
        gate.open.set()
        with made.client() as client:  # and the next one gets it
            assert ask(client).choices[0].message.content == alone(hi(), {}, Decoding(12)).text


def test_whoever_waits_and_goes_is_never_run(gate: Gate) -> None:
    with running() as made, ThreadPoolExecutor(1) as threads, made.client() as client:
        first = threads.submit(ask, client)
        gate.begun.wait()
        with made.sent(CHAT):
            while made.engine.jobs < 2:
                time.sleep(0.005)
        while made.engine.jobs > 1:
            time.sleep(0.005)
        gate.open.set()
        assert first.result().choices[0].finish_reason == "length"
        while made.engine._jobs:
            time.sleep(0.005)
        assert len(gate.answers) == 1


def test_a_shutdown_ends_answers(gate: Gate) -> None:
    """The server goes while the model is held at its first token."""
    with ThreadPoolExecutor(1) as threads, running() as made:
        asked = threads.submit(ask, made.client(), max_tokens=200)
        gate.begun.wait()
    with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        asked.result()
    assert gate.answers[0].finish == "cancelled"


def test_a_failure_is_told_without_its_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("of the inside")

    monkeypatch.setattr(engine_module, "answer", fail)
    with running() as made, made.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert caught.value.body["message"] == "the server failed; its log says why"  # type: ignore[index]
        with pytest.raises(openai.APIError, match="the server failed"):
            list(ask(client, stream=True))
        monkeypatch.setattr(engine_module, "answer", answer)
        assert ask(client).choices[0].message.content == alone(hi(), {}, Decoding(12)).text


def test_addresses_that_cant_be_had() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} can't be served on .*choose"):
            listen("127.0.0.1", port)
