"""JSON over HTTP with retries: what the judge and the Perspective API share."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

LONGEST_PAUSE = 60.0
"""Seconds: a server that asks for a longer pause gets this one."""

_TEMPORARY = {408, 425, 429}


class HttpError(Exception):
    """A request that gave no JSON object.

    Attributes:
        status: HTTP status; None where no answer came at all.
        temporary: whether it was still failing after all retries, rather than refused for good.
    """

    def __init__(self, message: str, *, status: int | None = None, temporary: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.temporary = temporary


def post_json(
    client: httpx2.Client, url: str, body: object, *, retries: int, pause: float
) -> dict[str, Any]:
    """Post a JSON body and return the JSON object that comes back.

    Lost connections, timeouts, and the statuses 408, 425, 429 and 5xx are tried again, after
    ``pause``, 2 ``pause``, 4 ``pause`` … seconds, or after what the server's Retry-After says.

    Args:
        client: with its headers, query and timeout set; several threads may share it.
        url: the endpoint.
        body: anything that JSON can hold.
        retries: how often to try again.
        pause: seconds before the first retry.

    Raises:
        HttpError: no object came. Its text names no URL, so no key that a query holds.
    """
    for attempt in range(retries + 1):
        wait = pause * 2**attempt
        try:
            response = client.post(url, json=body)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise HttpError(f"not a web address: {error}") from None
        except httpx2.TransportError as error:
            failure = HttpError(_words(str(error)) or type(error).__name__, temporary=True)
        else:
            if response.is_success:
                return _object(response)
            temporary = response.status_code in _TEMPORARY or response.status_code >= 500
            failure = HttpError(
                f"{response.status_code} {_explanation(response)}".rstrip(),
                status=response.status_code,
                temporary=temporary,
            )
            if not temporary:
                raise failure
            asked = _retry_after(response.headers.get("retry-after", ""))
            wait = wait if asked is None else asked
        if attempt < retries:
            time.sleep(min(wait, LONGEST_PAUSE))
    raise failure


def _object(response: httpx2.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        status = response.status_code
        raise HttpError("the answer is no JSON object", status=status)
    return value


def _explanation(response: httpx2.Response) -> str:
    """What the server says went wrong: the message of its JSON, else the start of its text."""
    try:
        value = response.json()
    except ValueError:
        return _words(response.text)
    error = value.get("error", value) if isinstance(value, dict) else value
    return _words(str(error.get("message", error) if isinstance(error, dict) else error))


def _words(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(".")


def _retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for; it holds seconds or a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
