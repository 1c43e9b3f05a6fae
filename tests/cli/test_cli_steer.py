"""``dsteer steer``: prompts, strengths, conversations in a pipe and in a terminal, and mistakes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from planted import PROMPTS, byte_tokenizer, planted_pair
from typer.testing import CliRunner

import dsteer
from dsteer import cli
from dsteer.cli.dials import parse_positions, parse_schedule, read_strengths
from dsteer.cli.text import printable
from dsteer.errors import ConfigError
from dsteer.steering.recommend import recommended_layers
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

PLANTED = planted_pair(1, size=4.0, hidden_size=16, num_hidden_layers=3, intermediate_size=24)
TOKENIZER = byte_tokenizer(template=None)
SITES = ["resid_post.0", "resid_post.1", "resid_post.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template, b at its block, and a set of three sites."""
    made = tmp_path_factory.mktemp("steer")
    PLANTED.save(made)
    (made / "base" / "chat_template.jinja").unlink()
    SteeringVectorSet([SteeringVector(PLANTED.b, "resid_post.1")]).save(made / "b.safetensors")
    generator = torch.Generator().manual_seed(1)
    several = [SteeringVector(torch.randn(16, generator=generator), site) for site in SITES]
    SteeringVectorSet(several).save(made / "set.safetensors")
    return made


def steer(
    folder: Path, *arguments: str, vector: str | None = "b.safetensors", say: str = ""
) -> tuple[int, str, str]:
    given = [] if vector is None else ["--vector", str(folder / vector)]
    command = ["steer", str(folder / "base"), *given, "--device", "cpu", *arguments]
    result = CliRunner().invoke(cli.app, command, input=say)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def swept(strengths: list[float], prompts: tuple[str, ...], new: int) -> list[list[str]]:
    vector = SteeringVector(PLANTED.b, "resid_post.1")
    found = dsteer.sweep(PLANTED.base, TOKENIZER, prompts, vector, strengths, new)
    return [list(texts) for texts in zip(*found.texts, strict=True)]


def test_one_prompt_prints_its_continuation_alone(folder: Path) -> None:
    code, out, err = steer(folder, "--prompt", PROMPTS[1], "--max-new-tokens", "12")
    assert code == 0, err
    assert out == swept([1.0], PROMPTS[1:2], 12)[0][0] + "\n"
    tuned = dsteer.sweep(
        PLANTED.tuned, TOKENIZER, PROMPTS[1:2], SteeringVector(PLANTED.b, "resid_post.1"), [0], 12
    )
    assert out == tuned.texts[0][0] + "\n"  # the base steered by b is the tuned model


def test_json_holds_every_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS[:2]), "utf-8")
    settings = ("--prompts", str(file), "--strength", "0.5,2", "--compare", "--json")
    code, out, err = steer(folder, *settings, "--max-new-tokens", "8")
    assert code == 0, err
    found = json.loads(out)
    assert found["vectors"] == [
        {"name": "b", "site": "resid_post.1", "norm": pytest.approx(4.0, rel=1e-6)}  # float32
    ]
    assert [item["prompt"] for item in found["prompts"]] == list(PROMPTS[:2])
    expected = swept([0.0, 0.5, 2.0], PROMPTS[:2], 8)
    for item, texts in zip(found["prompts"], expected, strict=True):
        assert [one["text"] for one in item["answers"]] == texts
        assert [one["strengths"]["b"] for one in item["answers"]] == [0.0, 0.5, 2.0]
    assert str(folder) not in out


def test_a_set_of_several_sites_acts_at_a_recommended_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no runs are
    (layer,) = recommended_layers(PLANTED.base).layers
    code, out, err = steer(folder, "--prompt", "a", "--json", vector="set.safetensors")
    assert code == 0, err
    assert json.loads(out)["vectors"][0]["site"] == f"resid_post.{layer}"
    assert f"dsteer: set at resid_post.{layer} (guess: " in err


def test_strengths_in_norms_of_the_states(folder: Path) -> None:
    """λ‖v‖ is half the mean norm of the model's own hidden states behind block 1."""
    code, out, err = steer(
        folder, "--prompt", PROMPTS[0], "--strength", "0.5", "--units", "residual", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["units"] == "residual"
    with torch.inference_mode():
        ids = torch.tensor([TOKENIZER(PROMPTS[0])["input_ids"]])
        states = PLANTED.base(ids, output_hidden_states=True).hidden_states[2][0]
    strength = 0.5 * float(states.norm(dim=-1).mean()) / 4.0
    (answer,) = found["prompts"][0]["answers"]
    assert answer["strengths"] == {"b": 0.5}
    assert answer["lambdas"]["b"] == pytest.approx(strength, rel=1e-5)  # float32
    assert answer["text"] == swept([strength], PROMPTS[:1], 64)[0][0]


def test_guidance(folder: Path) -> None:
    """w = 1 is steering, and w = 2 of b's last site is twice b there."""
    last = str(folder / "last.safetensors")
    SteeringVectorSet([SteeringVector(PLANTED.b, "final_norm")]).save(last)
    prompt = ("--prompt", "a", "--max-new-tokens", "8", "--strength", "0.1")

    def said(*more: str) -> str:
        code, out, err = steer(folder, "--vector", last, *prompt, *more, vector=None)
        assert code == 0, err
        return out

    vector = SteeringVector(PLANTED.b, "final_norm")
    # the unembedding is linear, so that mixing logits there is mixing states
    for weight in (0.0, 1.0, 20.0):
        strength = 0.1 * weight
        swept_texts = dsteer.sweep(PLANTED.base, TOKENIZER, ["a"], vector, [strength], 8).texts
        assert said("--guidance", f"{weight:g}") == swept_texts[0][0] + "\n"


def test_several_vectors_in_a_table(folder: Path) -> None:
    extra = ("--vector", f"s={folder / 'set.safetensors'}", "--site", "s=resid_post.2")
    code, out, err = steer(
        folder, *extra, "--prompt", "a", "--strength", "s=0,1", "--strength", "b=2", "--compare"
    )
    assert code == 0, err
    assert "plain" in out
    assert "b 2, s 0" in out
    assert "b 2, s 1" in out


def test_side_by_side(folder: Path) -> None:
    code, out, err = steer(folder, "--prompt", "a", "--compare", "--max-new-tokens", "4")
    assert code == 0, err
    head = next(line for line in out.splitlines() if "plain" in line)
    assert head.split() == ["plain", "steered"]


def test_a_chat_in_a_pipe(folder: Path) -> None:
    """The lines of the plain and the steered answer are those of the base and the tuned model."""
    say = "Hi\n/compare\n\nHi\n/strength 0\n/sing\n/reset\n/quit\nnever said\n"
    code, out, err = steer(folder, "--chat", "--max-new-tokens", "6", say=say)
    assert code == 0, err
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    first = swept([1.0], (prompt,), 6)[0][0]
    talk = f"{prompt} {first.strip()}{prompt}"
    plain, steered = swept([0.0, 1.0], (talk,), 6)[0]
    assert out.startswith(f"{first.lstrip()}\n")
    assert "plain and steered side by side: on\n" in out
    assert f"plain: {plain.strip()}\nsteered: {steered.strip()}\n" in out
    assert "b 0 at resid_post.1\n" in out
    assert "/sing: no such command; /help lists them\n" in out
    assert out.endswith("the conversation is forgotten\n")


class Terminal:
    """A command in a pseudo-terminal, with what it has shown so far."""

    def __init__(self, command: list[str]) -> None:
        self._own, other = pty.openpty()
        environment = {**os.environ, "COLUMNS": "70", "LINES": "24", "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment,
            start_new_session=True, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(other)
        self._bytes = b""

    @property
    def shown(self) -> str:
        return self._bytes.decode("utf-8", "replace")

    def until(self, text: str, after: int = 0, press: str | None = None) -> None:
        """Read until a text is shown, after so many characters; press keys while it is not."""
        for _ in range(600):
            if text in self.shown[after:]:
                return
            if press is not None:
                self.type(press)
            if select.select([self._own], [], [], 0.1 if press is None else 1)[0]:
                self._read()
        raise AssertionError(f"{text!r} was not shown, but {self.shown!r}")

    def type(self, keys: str) -> int:
        """Press keys; return how much was shown before."""
        before = len(self.shown)
        os.write(self._own, keys.encode())
        return before

    def end(self, press: str) -> int:
        """Press keys until the command ends, for one that comes amid a signal may be lost."""
        with contextlib.suppress(OSError):  # the other side is closed
            for _ in range(60):
                self.type(press)
                while select.select([self._own], [], [], 1)[0]:
                    self._read()
                if self.process.poll() is not None:
                    break
        os.close(self._own)
        return self.process.wait(60)

    def _read(self) -> None:
        self._bytes += os.read(self._own, 65536)


def _own_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    base, vector = str(folder / "base"), str(folder / "b.safetensors")
    made = Terminal(
        [sys.executable, "-m", "dsteer", "steer", base, "--vector", vector, "--chat", "--device",
         "cpu", "--max-new-tokens", "120"]
    )  # fmt: skip
    yield made
    if made.process.poll() is None:
        made.process.send_signal(signal.SIGKILL)
        made.process.wait()


def test_a_chat_in_a_terminal(terminal: Terminal) -> None:
    """A prompt, two columns, Ctrl-C between and during answers, and Ctrl-D."""
    terminal.until("/help lists the commands")
    terminal.until("you › ")
    at = terminal.type("/compare\n")
    terminal.until("side by side: on", at)
    terminal.until("you › ", at)
    at = terminal.type("Hi\n")
    terminal.until("steered", at)
    terminal.type("\x03")  # while it writes, or at the prompt if it has ended already
    terminal.until("you › ", at)
    head = next(line for line in terminal.shown[at:].splitlines() if "steered" in line)
    assert head.index("plain") < head.index("steered")
    # a signal between the prompt and the wait for a key is seen with the next one
    at = len(terminal.shown)
    terminal.until("Ctrl-D or /quit leaves", at, press="\x03")
    terminal.until("you › ", at)
    assert terminal.end(press="\x04") == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to answer: expected one of --prompt TEXT"),
        (("--prompt", "a", "--chat"), "--prompt and --chat: expected one of"),
        (("--chat", "--strength", "0,1"), "--chat with 2 strengths: expected one"),
        (("--chat", "--json"), "--json beside --chat"),
        (("--chat", "--units", "kl"), "--units kl beside --chat: give prompts to measure by"),
        (("--prompt", "a", "--units", "nats"), "--units nats: no such units"),
        (("--prompt", "a", "--guidance", "nan"), "weight nan: expected a finite number"),
        (("--chat", "--system", "x"), "a system message needs a chat template"),
        (("--prompt", "a", "--system", "x"), "--system needs a chat template"),
        (("--prompt", "a", "--template"), "has no chat template"),
        (("--prompt", "a", "--strength", "much"), "--strength much: expected finite numbers"),
        (("--prompt", "a", "--strength", "1e300"), "expected finite numbers"),
        (("--prompt", "a", "--strength", "nan"), "--strength nan: expected finite numbers"),
        (("--prompt", "a", "--strength", "c=1"), "--strength c=1: no vector of this name"),
        (("--prompt", "a", "--strength", "1", "--strength", "2"), "given twice for all vectors"),
        (("--prompt", "a", "--layer", "2"), "b: no vector at site 'resid_post.2'"),
        (("--prompt", "a", "--layer", "1", "--site", "x"), "--layer beside --site"),
        (("--prompt", "a", "--positions", "promt"), "no such positions"),
        (("--prompt", "a", "--schedule", "linear:x"), "'x' is no number of steps"),
        (("--prompt", "a", "--schedule", "linear"), "a linear schedule with steps None"),
        (("--prompt", "a", "--max-new-tokens", "400"), "400 new ones exceed the 256"),
        (("--prompt", "a", "--temperature", "-1"), "temperature -1.0: expected 0 or more"),
        (("--prompt", "a\udcff"), "'a\\udcff': not valid Unicode"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens 0: expected at least 1"),
    ],
)
def test_mistakes(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = steer(folder, *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_mistakes_with_files(folder: Path) -> None:
    ends = [SteeringVector([1.0] * 16, site) for site in ("mlp_out.1", "final_norm")]
    SteeringVectorSet(ends).save(folder / "ends.safetensors")
    code, _, err = steer(folder, "--prompt", "a", vector="ends.safetensors")
    assert code == 2
    assert "ends: it holds vectors at 2 sites (mlp_out.1, final_norm), and none at resid" in err
    assert err.endswith("choose one by --site\n")
    code, _, err = steer(folder, "--prompt", "a", vector="none.safetensors")
    assert code == 2
    assert "none.safetensors" in err
    again = str(folder / "b.safetensors")
    code, _, err = steer(folder, "--prompt", "a", "--vector", again)
    assert code == 2
    assert "another one is called 'b'; use NAME=FILE" in err


def test_strengths() -> None:
    names = ["a", "b"]
    assert read_strengths(None, names, 1.0) == [{"a": 1.0, "b": 1.0}]
    assert read_strengths(["0,2"], names, 1.0) == [{"a": 0.0, "b": 0.0}, {"a": 2.0, "b": 2.0}]
    assert read_strengths(["b=3"], names, 1.0) == [{"a": 1.0, "b": 3.0}]
    assert read_strengths(["0.5", "b=3"], names, 1.0) == [{"a": 0.5, "b": 3.0}]
    grid = read_strengths(["a=0,1", "b=-1,2"], names, 1.0)
    assert grid == [{"a": a, "b": b} for a in (0.0, 1.0) for b in (-1.0, 2.0)]


def test_positions_and_schedules() -> None:
    assert parse_positions("generated") == "generated"
    assert parse_positions("2:5") == (2, 5)
    with pytest.raises(ConfigError, match="a window A:B with A < B"):
        parse_positions("5:2")
    assert parse_schedule(None) is None
    linear = parse_schedule("linear:20")
    assert linear is not None
    assert (linear.kind, linear.steps) == ("linear", 20)
    exponential = parse_schedule("exponential:5")
    assert exponential is not None
    assert exponential.half_life == 5
    with pytest.raises(ConfigError, match="a constant schedule has no steps"):
        parse_schedule("constant:3")


def test_control_characters_reach_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[31m\tb\n\x07\x9b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert printable(text) == text  # to a file, as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert printable(text) == "a␛[31m\tb\n␇\ufffd"
