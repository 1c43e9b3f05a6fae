"""What a request of OpenAI's API asks for, and the shapes of its answers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsteer.data.types import Message
from dsteer.errors import ConfigError, DsteerError, did_you_mean
from dsteer.steering.answer import Answer
from dsteer.steering.decode import Decoding
from dsteer.steering.dials import Dials

Kind = Literal["chat", "text"]

MAX_CHOICES = 8
"""Answers to one prompt at most; they share a batch, so each takes memory."""

_UNDERSTOOD = {
    "max_tokens", "model", "n", "seed", "steering", "stop", "stream", "stream_options",
    "temperature", "top_p",
}  # fmt: skip
_OF_KIND = {"chat": {"messages", "max_completion_tokens"}, "text": {"prompt"}}
_IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier",
    "store", "user",
}  # fmt: skip
"""What changes no text."""

_LACKING: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
}
"""What can't be asked for, and the values beside null that ask for nothing."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refusal(Exception):  # noqa: N818  # it is an answer, not a failure
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: what was met, what was expected, the remedy.
        param: the field that is to blame.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = _sendable(message), param and _sendable(param)
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def _sendable(text: str) -> str:
    """Text that UTF-8 can hold: half a character, which JSON may carry, is spelt out."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Defaults:
    """What a request leaves open.

    Attributes:
        max_new_tokens: at most so many; fewer where the model's limit is nearer.
        temperature: of sampling.
        top_p: of sampling.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        kind: a conversation, or texts to go on from.
        prompts: one conversation; or texts, or ids as they stand.
        n: answers a prompt.
        strengths: a strength a name.
        decoding: how tokens are chosen.
        bounded: whether the request set its own ``max_tokens``.
        stream: whether it wants pieces.
        usage: whether it wants counts behind the pieces.
    """

    kind: Kind
    prompts: tuple[list[Message] | str | tuple[int, ...], ...]
    n: int
    strengths: dict[str, float]
    decoding: Decoding
    bounded: bool
    stream: bool
    usage: bool


def read_request(body: Any, kind: Kind, name: str, dials: Dials, defaults: Defaults) -> Asked:
    """Read the body of a request.

    A field that can't be followed is refused, not passed over: a misspelt ``steering`` would give
    plain answers that look steered.

    Args:
        body: what the JSON held.
        kind: of the endpoint.
        name: of the model that is served.
        dials: whose names ``steering`` holds.
        defaults: what the request leaves open.

    Raises:
        Refusal: 400, or 404 for another model.
    """
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is {_kind(body)}; expected a JSON object")
    _require_known(body, kind)
    fields = {key: value for key, value in body.items() if value is not None}
    if fields.get("model", name) != name:
        raise Refusal(
            404,
            f"model {fields['model']!r} is not served here; expected {name!r}",
            param="model",
            code="model_not_found",
        )
    bound = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    options = _of(fields, "stream_options", dict, {})
    n = _of(fields, "n", int, 1)
    if not 1 <= n <= MAX_CHOICES:
        raise Refusal(400, f"n {n}: expected 1 to {MAX_CHOICES}", param="n")
    try:
        decoding = Decoding(
            max_new_tokens=_of(fields, bound, int, defaults.max_new_tokens),
            temperature=_real(fields, "temperature", defaults.temperature),
            top_p=_real(fields, "top_p", defaults.top_p),
            seed=_of(fields, "seed", int, secrets.randbelow(2**63)),
            stop=_stop(fields.get("stop", ())),
        )
    except DsteerError as error:
        raise Refusal(400, str(error)) from None
    try:
        strengths = dials.turned(_of(fields, "steering", dict, {}))
    except ConfigError as error:
        raise Refusal(400, f"steering: {error}", param="steering") from None
    return Asked(
        kind=kind,
        prompts=(_messages(fields),) if kind == "chat" else _texts(fields.get("prompt")),
        n=n,
        strengths=strengths,
        decoding=decoding,
        bounded=bound in fields,
        stream=_of(fields, "stream", bool, False),
        usage=_of(options, "include_usage", bool, False),
    )


def _require_known(body: Mapping[str, Any], kind: Kind) -> None:
    known = _UNDERSTOOD | _OF_KIND[kind] | _IGNORED | _LACKING.keys()
    for key, value in body.items():
        if key not in known:
            near = did_you_mean(key, _UNDERSTOOD | _OF_KIND[kind])
            raise Refusal(400, f"{key}: no such field{near}", param=key)
        neutral = _LACKING.get(key)
        if neutral is None or value is None:
            continue
        if not any(type(value) is type(other) and value == other for other in neutral):
            raise Refusal(400, f"{key} {value!r}: not supported here; leave it out", param=key)


def _of(fields: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = fields.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "a whole number", bool: "true or false", dict: "an object"}
        raise Refusal(400, f"{key} {value!r}: expected {words.get(kind, 'a number')}", param=key)
    return value


def _real(fields: Mapping[str, Any], key: str, default: float) -> float:
    try:
        return float(_of(fields, key, int | float, default))
    except OverflowError:
        raise Refusal(400, f"{key}: expected a number of usual size", param=key) from None


def _stop(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(item, str) for item in stops):
        raise Refusal(400, f"stop {stop!r}: expected a text or a list of texts", param="stop")
    return tuple(stops)


def _messages(fields: Mapping[str, Any]) -> list[Message]:
    given = fields.get("messages")
    if not isinstance(given, list) or not given:
        raise Refusal(400, f"messages is {_kind(given)}; expected a list of them", param="messages")
    return [_message(item, number) for number, item in enumerate(given)]


def _message(item: Any, number: int) -> Message:
    param = f"messages[{number}]"
    role = item.get("role") if isinstance(item, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise Refusal(
            400, f"{param} has the role {role!r}; expected system, user or assistant", param=param
        )
    content = item.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise Refusal(400, f"{param} has a content that is no text; expected one", param=param)
    return Message(role=_ROLES[role], content=content)  # type: ignore[typeddict-item]


def _texts(prompt: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, several, a list of ids, or several such lists."""

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)

    items = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    if not isinstance(items, list) or not items:
        raise Refusal(400, f"prompt is {_kind(prompt)}; expected a text or several", param="prompt")
    if not all(isinstance(item, str) or is_ids(item) for item in items):
        raise Refusal(400, "prompt: expected texts or lists of token ids", param="prompt")
    return tuple(item if isinstance(item, str) else tuple(item) for item in items)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.40}"


# ---------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Shapes:
    """The shapes of all that answers one request.

    Attributes:
        kind: of the endpoint.
        model: the name that is served.
        strengths: by which it was steered.
        number: of the request, for its id.
        created: Unix seconds.
    """

    kind: Kind
    model: str
    strengths: Mapping[str, float]
    number: str
    created: int

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, answer in enumerate(answers):
            said: dict[str, Any] = {"text": answer.text}
            if self.kind == "chat":
                said = {"message": {"role": "assistant", "content": answer.text}}
            choices.append(self._choice(index, said, answer.finish))
        return {**self._head(chunk=False), "choices": choices, **_usage(answers, prompt_tokens)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What goes before a choice's pieces: in a conversation, whose turn it is."""
        if self.kind == "text":
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A piece of a choice."""
        return self._chunk(index, {"delta": {"content": text}} if self._chat else {"text": text})

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """Why a choice ended."""
        return self._chunk(index, {"delta": {}} if self._chat else {"text": ""}, answer.finish)

    def counts(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The counts, where a stream wants them."""
        return {**self._head(chunk=True), "choices": [], **_usage(answers, prompt_tokens)}

    @property
    def _chat(self) -> bool:
        return self.kind == "chat"

    def _chunk(self, index: int, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**self._head(chunk=True), "choices": [self._choice(index, said, finish)]}

    def _choice(self, index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        chat = f"chat.completion{'.chunk' if chunk else ''}"
        return {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{self.number}",
            "object": chat if self._chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "steering": dict(self.strengths),
        }


def _usage(answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
    written = sum(len(answer.tokens) for answer in answers)
    return {
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": written,
            "total_tokens": prompt_tokens + written,
        }
    }
