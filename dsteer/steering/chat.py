"""A conversation with a steered model, and the commands that turn its dials; no terminal here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dsteer.data.tokens import Encoded, Tokenizer, encode, has_template
from dsteer.data.transcript import ASSISTANT, HUMAN
from dsteer.data.types import Message
from dsteer.errors import ConfigError, DataError
from dsteer.models.anatomy import max_positions
from dsteer.models.load import Model
from dsteer.models.seq2seq import is_encoder_decoder
from dsteer.steering.answer import Answer, Tell, answer, require_room
from dsteer.steering.decode import Decoding
from dsteer.steering.dials import Dials
from dsteer.steering.intervene import Number

HELP = """\
/strength X         turn all vectors to X; /strength NAME X turns one
/layer K            let all vectors act behind block K, or at a site; /layer NAME K moves one
/compare            plain and steered answers side by side, on or off
/vectors            the vectors, their sites, norms and strengths
/system TEXT        set the system message; without TEXT: remove it
/reset              forget the conversation
/help               this
/quit               leave (Ctrl-D too); Ctrl-C stops an answer"""

STOPS = (HUMAN, ASSISTANT)
"""Where an answer in a transcript ends: a model that learned transcripts plays both parts."""


@dataclass(frozen=True)
class Exchange:
    """What came of one message.

    Attributes:
        answers: the steered one; where plain and steered are compared, the plain one first.
        dropped: messages that no longer fitted the model and were left out, so far.
    """

    answers: tuple[Answer, ...]
    dropped: int


class Chat:
    """A conversation.

    Messages go through the tokenizer's chat template, without one as an hh-style transcript. The
    oldest turns go where the model's limit is reached. While plain and steered are compared, both
    answer the same conversation, in which the steered answers stand.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        dials: what it is steered by.
        decoding: how tokens are chosen; each message has its own draws.
        guidance: see :func:`dsteer.steering.answer.answer`.
        system: a system message.
        compare: begin with plain and steered side by side.

    Attributes:
        messages: what is still in the conversation.
        dropped: how many messages were left out because they no longer fitted.
        over: whether ``/quit`` was given.

    Raises:
        ConfigError: a system message, and the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        dials: Dials,
        decoding: Decoding,
        *,
        guidance: Number | None = None,
        system: str | None = None,
        compare: bool = False,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.dials = dials
        self._decoding = replace(decoding, stop=stops_for(tokenizer, decoding.stop))
        self._templated = has_template(tokenizer)
        self._guidance = guidance
        self.compare = compare
        self.messages: list[Message] = []
        self.over = False
        self._system: str | None = None
        self._turn = 0
        self.dropped = 0
        self._set_system(system or "")

    def ask(
        self, text: str, *, tell: Tell | None = None, cancelled: Callable[[], bool] | None = None
    ) -> Exchange:
        """Send a message and return what the model answers.

        Args:
            text: the message.
            tell: told the pieces of row 0, the steered answer; where both are compared row 0 is
                the plain one and row 1 the steered.
            cancelled: see :func:`dsteer.steering.answer.answer`; what was written is kept.

        Raises:
            DataError: the message alone is too long for the model, or no message of a transcript.
        """
        asked = [*self.messages, Message(role="user", content=text)]
        prompt, dropped = self._fit(asked)
        strengths = [*([self.dials.plain] if self.compare else []), self.dials.strengths]
        found = answer(
            self._model,
            self._tokenizer,
            prompt,
            self.dials.interventions(strengths),
            self._decoding,
            draws=[self._turn] * len(strengths),
            tell=tell,
            cancelled=cancelled,
            guidance=self._guidance,
        )
        reply = Message(role="assistant", content=found[-1].text.strip())
        self.messages = [*asked[dropped:], reply]
        self._turn += 1
        self.dropped += dropped
        return Exchange(tuple(found), self.dropped)

    def command(self, line: str) -> str:
        """Follow a line that begins with ``/``; return what there is to say.

        Raises:
            ConfigError: an unknown command, or one that can't be followed.
        """
        name, *words = line.split()
        match name, words:
            case "/strength", [value]:
                self.dials.turn(dict.fromkeys(self.dials, _number(value)))
                return self.status
            case "/strength", [dial, value]:
                self.dials.turn({dial: _number(value)})
                return self.status
            case "/layer", [site]:
                self.dials.move(site)
                return self.status
            case "/layer", [dial, site]:
                self.dials.move(site, dial)
                return self.status
            case "/compare", []:
                self.compare = not self.compare
                return f"plain and steered side by side: {'on' if self.compare else 'off'}"
            case "/vectors", []:
                return "\n".join(
                    f"{dial.name}  {dial.site}  norm {dial.vector.norm:.4g}  "
                    f"strength {dial.strength:g}  sites: {', '.join(dial.vectors)}"
                    for dial in self.dials.values()
                )
            case "/system", _:
                self._set_system(line.removeprefix("/system").strip())
                return "system message removed" if self._system is None else "system message set"
            case "/reset", []:
                self.messages, self.dropped = [], 0
                return "the conversation is forgotten"
            case "/help", []:
                return HELP
            case "/quit", []:
                self.over = True
                return ""
        raise ConfigError(f"{line}: no such command; /help lists them")

    @property
    def status(self) -> str:
        """The vectors, their sites and strengths, in one line."""
        return ", ".join(
            f"{dial.name} {dial.strength:g} at {dial.site}" for dial in self.dials.values()
        )

    def _set_system(self, text: str) -> None:
        if text and not self._templated:
            raise ConfigError(
                "a system message needs a chat template, which this tokenizer lacks; say it in the "
                "first message"
            )
        self._system = text or None

    def _fit(self, messages: list[Message]) -> tuple[Encoded, int]:
        """The prompt without the oldest turns that leave no room, and how many messages those are.

        A message that is too long alone raises.
        """
        limit, new = max_positions(self._model.config), self._decoding.max_new_tokens
        dropped = 0
        while True:
            prompt = self._encode(messages[dropped:])
            fits = limit is None or len(prompt.ids) + new <= limit
            if fits or dropped + 2 >= len(messages):
                break
            dropped += 2
        require_room(self._model, prompt, new)
        return prompt, dropped

    def _encode(self, messages: list[Message]) -> Encoded:
        return encode_chat(self._model, self._tokenizer, messages, system=self._system)


def encode_chat(
    model: Model, tokenizer: Tokenizer, messages: list[Message], *, system: str | None = None
) -> Encoded:
    """The ids of a conversation, up to where the answer begins.

    Raises:
        DataError: messages that the chat template, or a transcript, refuses.
    """
    if not messages:
        raise DataError("a conversation without messages; give at least one of the user's")
    first = [] if system is None else [Message(role="system", content=system)]
    seq2seq = is_encoder_decoder(model.config)
    return encode(tokenizer, [[*first, *messages]], encoder_decoder=seq2seq)[0]


def stops_for(tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Stop strings of an answer in a conversation: those given, and what ends a transcript's."""
    return stop if has_template(tokenizer) else (*stop, *STOPS)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"strength {text!r}: expected a number") from None
