"""The terminal of ``dsteer steer --chat``: lines in, answers out as they are written."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dsteer.cli.text import columns, printable
from dsteer.errors import DsteerError

if TYPE_CHECKING:
    from dsteer.steering.chat import Chat, Exchange


def converse(chat: Chat) -> None:
    """Read messages and commands until ``/quit`` or the end of the input.

    In a terminal there is a prompt, and what is compared stands in two columns; elsewhere all is
    plain lines.
    """
    console = Console(highlight=False)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history and a cursor
        _note(console, f"{chat.status}; /help lists the commands")
    while not chat.over:
        try:
            line = input("you › " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()  # noqa: T201  # what follows begins on a line of its own
            break
        except KeyboardInterrupt:
            _note(console, "\nCtrl-D or /quit leaves")
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                if said := chat.command(line):
                    _note(console, said)
            else:
                _answer(chat, line, console)
        except KeyboardInterrupt:  # a second one, in the middle of a token
            _note(console, "(broken off; the message is forgotten)")
        except DsteerError as error:
            _note(console, str(error), style="red")


def _answer(chat: Chat, line: str, console: Console) -> None:
    dropped = chat.dropped
    with _stoppable() as stopped:
        show = _side_by_side if chat.compare else _in_line
        exchange = show(chat, line, stopped, console)
    if exchange.dropped > dropped:
        _note(
            console,
            f"(the model's limit is reached: the oldest {exchange.dropped} messages are left out)",
        )
    ends = {answer.finish for answer in exchange.answers}
    if "cancelled" in ends:
        _note(console, "(stopped)")
    elif "length" in ends:
        _note(console, "(cut off at --max-new-tokens)")


def _in_line(chat: Chat, line: str, stopped: Callable[[], bool], _console: Console) -> Exchange:
    begun = False

    def tell(_row: int, piece: str) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()  # a transcript's answer begins with a space
        begun = begun or bool(piece)
        print(printable(piece), end="", flush=True)  # noqa: T201

    if sys.stdout.isatty():
        print("model › ", end="", flush=True)  # noqa: T201
    try:
        return chat.ask(line, tell=tell, cancelled=stopped)
    finally:
        print(flush=True)  # noqa: T201


def _side_by_side(chat: Chat, line: str, stopped: Callable[[], bool], console: Console) -> Exchange:
    texts = ["", ""]
    if not console.is_terminal:
        exchange = chat.ask(line, cancelled=stopped)
        for name, answer in zip(("plain", "steered"), exchange.answers, strict=True):
            print(f"{name}: {answer.text.strip()}")  # noqa: T201
        return exchange
    with Live(columns(*texts), console=console, refresh_per_second=12) as live:

        def tell(row: int, piece: str) -> None:
            texts[row] += piece
            live.update(columns(*(printable(text.strip()) for text in texts)))

        return chat.ask(line, tell=tell, cancelled=stopped)


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C end an answer at its next token while the block runs; a second one breaks it."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def once(_number: int, _frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _note(console: Console, text: str, style: str = "dim") -> None:
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)
