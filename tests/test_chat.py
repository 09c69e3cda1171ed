"""decode.chat: turns, settings that change, and the command under a pseudo-terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllm_jax import chat
from dllm_jax.config import Config
from dllm_jax.errors import UsageError
from dllm_jax.settings import DecodeSettings, MeshSettings, TokenizerSettings

ROOT = Path(__file__).parents[1]
QUESTION, HARDER = "Sort the list: oak, fern, duck.", "Shuffle the list: gold, crab, salt."


def config(**given: object) -> Config:
    decode = DecodeSettings(policy="threshold", cache="dual", gen_length=32)
    return Config(decode=decode, mesh=MeshSettings(data=1), **given)


def test_turns_and_settings() -> None:
    session = chat.Session(config())
    first = session.ask(QUESTION)
    assert first.text == "duck, fern, oak."
    assert first.trace
    assert "".join(cell.text for cell in first.trace.cells(first.trace.nfe)).startswith(first.text)
    forwards = first.row["nfe"]
    told = (
        rf"7 tokens in {forwards} forwards: [\d.]+ tokens per forward, [\d.]+ tokens/s, compiled in [\d.]+ s \(eot_id\)"
    )
    assert re.fullmatch(told, first.told())
    assert [message["role"] for message in session.messages] == ["user", "assistant"]

    session.turns = 0  # as in the first turn
    sure = session.ask(HARDER)
    session.set(["threshold.value=0.0"])
    reckless = session.ask(HARDER)
    assert reckless.timing.compilations == 0
    assert reckless.row["nfe"] == 1 < sure.row["nfe"]
    assert "compiled" not in reckless.told()
    assert session.settings()["threshold.value"] == 0.0

    for wrong, expected in [
        (["threshold.value"], "/set: expected settings like"),
        (["model.path=x"], "/set: expected settings like"),
        (["threshold.worth=1"], "threshold.worth: unknown config field"),
        (["threshold.value=much"], "threshold.value: expected float, got 'much'"),
        (["decode.gen_length=64", "decode.policy=apd", "decode.cache=window"], "verifier.path: expected"),
        (["decode.gen_length=64", "decode.block_length=7"], "decode.block_length: expected a divisor"),
    ]:
        with pytest.raises(UsageError) as error:
            session.set(wrong)
        assert expected in str(error.value)
    assert session.settings()["decode.gen_length"] == 32  # a wrong line changes nothing


def test_the_oldest_turns_go_when_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    session = chat.Session(config())
    seen: list[int] = []

    def decoded(tokens: list[list[int]], *, rows: list[int]) -> None:
        seen.append(len(tokens[0]))
        raise KeyboardInterrupt

    long = [{"role": "user", "content": QUESTION * 30}, {"role": "assistant", "content": "oak."}] * 3
    monkeypatch.setattr(type(session.decoder), "__call__", lambda self, *args, **kwargs: decoded(*args, **kwargs))
    session.messages = list(long)
    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTION)
    assert seen[0] <= session.decoder.longest_prompt
    assert session.messages == long  # an interrupted turn was not said
    with pytest.raises(UsageError, match="prompt: expected at most 1120 tokens"):
        session.ask(QUESTION * 100)


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def answer(self: chat.Session, text: str) -> chat.Turn:
        asked.append(text)
        if text == "stop":
            raise KeyboardInterrupt
        row = {"num_tokens": 3, "nfe": 2, "finish_reason": "eos"}
        return chat.Turn("a\x1b[2Jb\n  c", row, chat.Timing(0.0, 0.5, 0, 0), forgotten=2)

    monkeypatch.setattr(chat.Session, "ask", answer)
    typed = iter(
        [
            "/help",
            "hello",
            "stop",
            "/set",
            "/set threshold.value=0.25",
            "/set decode.policy=none",
            "/speed 0",
            "/speed x",
            "/turns 1",
            "/reset",
            "/what",
            "",
            "/quit",
            "not read",
        ]
    )
    without = config(tokenizer=TokenizerSettings(chat_template="off"))
    assert chat.talk(without, read=lambda prompt: next(typed)) == 0
    out = capsys.readouterr().out
    assert asked == ["hello", "stop"]
    assert "a␛[2Jb\n  c\n3 tokens in 2 forwards: 1.50 tokens per forward, 6.0 tokens/s (eos)\n" in out
    for expected in (
        "everything else is a message",
        "the oldest 2 messages do not fit",
        "interrupted",
        "decode.policy = threshold",
        "threshold.value = 0.25",
        "error: decode.policy: expected one of",
        "no replays",
        "error: /speed: expected a number from 0, got x",
        "the model sees 1 earlier turns",
        "a new conversation",
        "error: /what: expected one of",
    ):
        assert expected in out
    assert next(typed) == "not read"


@pytest.fixture
def terminal() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command in a pseudo-terminal of 24 lines."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "decode.chat", "--config=threshold", "--config.decode.gen_length=32"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    yield process, ours
    process.kill()
    process.wait()
    os.close(ours)


@pytest.mark.slow
def test_a_conversation_under_a_pseudo_terminal(terminal: tuple[subprocess.Popen[bytes], int]) -> None:
    process, screen = terminal

    written = bytearray()  # and not looked at yet

    def until(text: str) -> str:
        """What is written up to a text that has to come."""
        deadline = time.monotonic() + 240
        while text.encode() not in written:
            assert time.monotonic() < deadline, bytes(written)
            if select.select([screen], [], [], 1)[0]:
                written.extend(os.read(screen, 1 << 16))
        behind = written.index(text.encode()) + len(text.encode())
        seen = written[:behind].decode(errors="replace")
        del written[:behind]
        return seen

    until("/help lists commands")
    until("> ")
    os.write(screen, f"{QUESTION}\n".encode())
    shown = until("(eot_id)")
    assert "replay: forward 1 of" in shown  # it filled in place ...
    assert "\x1b[1;" in shown  # ... in colours
    assert "duck, fern, oak." in shown
    assert "tokens/s, compiled in" in shown
    os.write(screen, b"/set threshold.value=0.5\n")
    until("threshold.value = 0.5")
    os.write(screen, b"/reset\n")
    until("a new conversation")
    os.write(screen, f"{QUESTION}\n".encode())
    assert "compiled" not in until("(eot_id)")
    os.write(screen, b"/quit\n")
    assert process.wait(timeout=60) == 0
