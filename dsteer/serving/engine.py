"""The one model behind the endpoint: requests wait their turn, and each runs alone.

Hooks are on the model only during a request's own passes, in the one thread that runs the model, so
no strength reaches another request. The tokenizer is used in that thread alone too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from dsteer.data.tokens import Encoded, Tokenizer, encode
from dsteer.data.types import Message
from dsteer.errors import DataError, DsteerError
from dsteer.models.anatomy import max_positions, text_config
from dsteer.models.load import Model
from dsteer.models.seq2seq import is_encoder_decoder
from dsteer.serving.protocol import Asked, Refusal
from dsteer.steering.answer import Answer, answer, require_room
from dsteer.steering.chat import encode_chat, stops_for
from dsteer.steering.dials import Dials


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        asked: what it wants.
        events: what happens: the prompt's tokens (int) once they are read, pieces (index, text),
            and at last all answers, or the error that ended it.
    """

    asked: Asked
    events: asyncio.Queue[int | tuple[int, str] | list[Answer] | BaseException] = field(
        default_factory=asyncio.Queue
    )
    _gone: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """End it at the next token, or before it begins."""
        self._gone.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._gone.is_set()


class Engine:
    """Runs jobs one after another.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        dials: what it can be steered by.
        waiting: so many jobs may wait beside the one that runs.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, dials: Dials, waiting: int) -> None:
        self.model, self.tokenizer, self.dials = model, tokenizer, dials
        self._waiting = waiting
        self._jobs: set[Job] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dsteer-model")

    @property
    def jobs(self) -> int:
        """How many run or wait for a client that is still there."""
        return sum(not job.cancelled for job in self._jobs)

    def submit(self, asked: Asked) -> Job:
        """Take a request; called from the event loop.

        Raises:
            Refusal: 503, too many wait.
        """
        if self.jobs > self._waiting:
            raise Refusal(
                503,
                f"{self.jobs} requests run or wait, the most that are taken; try again later",
                code="busy",
                headers={"Retry-After": "1"},
            )
        job, loop = Job(asked), asyncio.get_running_loop()
        self._jobs.add(job)

        def tell(event: int | tuple[int, str] | list[Answer] | BaseException) -> None:
            if isinstance(event, list | BaseException):
                self._jobs.discard(job)
            job.events.put_nowait(event)

        def work() -> None:
            def send(event: int | tuple[int, str] | list[Answer] | BaseException) -> None:
                loop.call_soon_threadsafe(tell, event)

            try:
                send(self._run(job, send))
            except Exception as error:  # noqa: BLE001  # told to whoever waits, who raises it
                send(error)

        self._thread.submit(work)
        return job

    def close(self) -> None:
        """End all jobs and the thread."""
        for job in list(self._jobs):  # the event loop may still take some away
            job.cancel()
        self._thread.shutdown(wait=True)

    def _run(self, job: Job, send: Callable[[int | tuple[int, str]], None]) -> list[Answer]:
        asked = job.asked
        if job.cancelled:
            return []
        try:
            prompts = [self._encode(prompt) for prompt in asked.prompts]
            rooms = [self._room(asked, prompt) for prompt in prompts]
        except DsteerError as error:
            raise Refusal(400, str(error)) from None
        send(sum(len(prompt.ids) for prompt in prompts))
        stop = asked.decoding.stop
        if asked.kind == "chat":
            stop = stops_for(self.tokenizer, stop)
        answers: list[Answer] = []
        for prompt, room in zip(prompts, rooms, strict=True):
            first = len(answers)
            answers += answer(
                self.model,
                self.tokenizer,
                prompt,
                self.dials.interventions([asked.strengths] * asked.n),
                replace(asked.decoding, max_new_tokens=room, stop=stop),
                draws=range(asked.n),
                tell=lambda row, piece, first=first: send((first + row, piece)),  # type: ignore[misc]
                cancelled=lambda: job.cancelled,
            )
        return answers

    def _encode(self, prompt: list[Message] | str | tuple[int, ...]) -> Encoded:
        if isinstance(prompt, list):
            return encode_chat(self.model, self.tokenizer, prompt)
        if isinstance(prompt, str):
            seq2seq = is_encoder_decoder(self.model.config)
            return encode(self.tokenizer, [prompt], encoder_decoder=seq2seq)[0]
        size = int(text_config(self.model.config).vocab_size)
        if not all(0 <= token < size for token in prompt):
            raise DataError(f"prompt: expected token ids from 0 to {size - 1}")
        return Encoded(prompt, len(prompt))

    def _room(self, asked: Asked, prompt: Encoded) -> int:
        """How many tokens may be written."""
        limit, wanted = max_positions(self.model.config), asked.decoding.max_new_tokens
        if limit is not None and not asked.bounded:
            wanted = max(1, min(wanted, limit - len(prompt.ids)))
        require_room(self.model, prompt, wanted)
        return wanted
