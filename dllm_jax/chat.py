"""A conversation with a diffusion language model: turns, settings that change, and what is told of a turn.

`Session` has no terminal and prints nothing; `talk` is the loop of the command.
"""

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_jax import cli, hosts, jobs, opening
from dllm_jax.config import Config
from dllm_jax.data.prompts import Prompt
from dllm_jax.data.rows import Row
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import Timing
from dllm_jax.errors import UsageError
from dllm_jax.kept import Kept
from dllm_jax.placement import decode_mesh
from dllm_jax.questions import Question
from dllm_jax.viewer import terminal
from dllm_jax.viewer.layout import printable
from dllm_jax.viewer.trace import Trace, from_row

FIXED = ("model", "tokenizer", "mesh", "input", "distributed", "bench", "plan")  # sections that /set does not change
SPEED = 12.0  # forwards per second of a replay
LONGEST_REPLAY = 6.0  # seconds: longer ones are faster
HELP = """\
/set                 the settings of this decoder
/set FIELD=VALUE ... change settings, as --config.FIELD=VALUE does (not of model, tokenizer and mesh)
/speed N             forwards per second of a replay (0: no replay)
/turns N             earlier turns that the model sees (default: all that fit; a model that knows no turns: 0)
/reset               forget the conversation
/help                this
/quit                end (so does the end of the input)
everything else is a message to the model"""


@dataclasses.dataclass(frozen=True)
class Turn:
    """An answer."""

    text: str
    row: Row  # its output line, as decode.run has it
    timing: Timing
    forgotten: int  # messages of the conversation that had to go, for the prompt to fit

    @property
    def trace(self) -> Trace | None:
        """What a replay shows; None without output.trace."""
        return from_row(self.row) if "pieces" in self.row else None

    def told(self) -> str:
        """Tokens, forwards and seconds, in a line."""
        tokens, forwards, seconds = self.row["num_tokens"], self.row["nfe"], self.timing.decode_seconds
        compiled = f", compiled in {self.timing.compile_seconds:.1f} s" if self.timing.compilations else ""
        return (
            f"{tokens} tokens in {forwards} forwards: {tokens / forwards:.2f} tokens per forward, "
            f"{tokens / seconds:.1f} tokens/s{compiled} ({self.row['finish_reason']})"
        )


class Session:
    """A model, the settings of the moment, and what was said.

    Args:
        config: all settings; prompts are decoded one by one, whatever decode.batch_size says.

    Raises:
        UsageError: model, tokenizer, companions or settings do not work out.
    """

    def __init__(self, config: Config) -> None:
        self.config = _for_one(dataclasses.replace(config, output=dataclasses.replace(config.output, trace=True)))
        self._mesh = decode_mesh(self.config, prompt_length=self.config.decode.gen_length)
        self._model, self.codec, self._end_ids = opening.open_text_model(self.config, self._mesh)
        self._kept = Kept()
        self.decoder = self._decoder(self.config)
        self.messages: list[dict[str, str]] = []
        self.turns: int | None = None  # of the past that the model sees; None: all
        self._asked = 0

    @property
    def remembers(self) -> bool:
        """Whether the model sees earlier turns: it needs a chat template for that."""
        return self.codec.tokenizer.chat_template is not None and self.codec.chat_template != "off"

    def ask(self, text: str) -> Turn:
        """Decodes the answer to a message, with what was said before as far as it fits.

        Raises:
            UsageError: the message alone is too long, or the template refuses it.
        """
        kept = self.messages if self.turns is None else self.messages[max(len(self.messages) - 2 * self.turns, 0) :]
        said = [*(kept if self.remembers else []), {"role": "user", "content": text}]
        forgotten = 0
        while len(tokens := self._encode(said)) > self.decoder.longest_prompt and len(said) > 2:
            said, forgotten = said[2:], forgotten + 2
        self.decoder.check(tokens)
        result = self.decoder([tokens], rows=[self._asked])
        question = Question(Prompt(index=self._asked, line=0, id=self._asked), tokens)
        row = jobs.output_line(question, result, 0, decoder=self.decoder, codec=self.codec)
        self._asked += 1
        self.messages = [*said, {"role": "assistant", "content": row["text"]}]
        return Turn(row["text"], row, result.timing, forgotten)

    def set(self, assignments: Sequence[str]) -> None:
        """Changes settings; nothing changes if one of them is wrong.

        Args:
            assignments: `section.field=value`.

        Raises:
            UsageError: one cannot be changed, is wrong or does not go together with the others.
        """
        for assignment in assignments:
            if "=" not in assignment or assignment.partition(".")[0] in FIXED:
                raise UsageError(
                    f"/set: expected settings like threshold.value=0.8, none of {', '.join(FIXED)}, got {assignment!r}"
                )
        config = _for_one(cli.changed(self.config, assignments))
        self.decoder, self.config = self._decoder(config), config

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages = []

    def settings(self) -> dict[str, Any]:
        """The settings of the decoder, by their full names."""
        found: dict[str, Any] = {}
        for name in ("decode", self.config.decode.policy):
            if section := getattr(self.config, name, None):
                found |= {f"{name}.{field}": value for field, value in dataclasses.asdict(section).items()}
        return found

    def _decoder(self, config: Config) -> Decoder:
        """Of settings; networks that were opened before are not loaded again."""
        companions = self._kept.companions(config, self._mesh)
        opening.check_tokens(self._model, companions, config=config, codec=self.codec)
        return Decoder(self._model, config, end_ids=self._end_ids, **companions)

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.remembers:
            return self.codec.encode(Prompt(index=0, line=0, id=0, text=messages[-1]["content"]))
        return self.codec.encode(Prompt(index=0, line=0, id=0, messages=tuple(messages)))


def talk(config: Config, *, read: Callable[[str], str] = input) -> int:
    """Reads messages and commands, answers, until the input or the user ends it.

    Args:
        config: all settings.
        read: shows a prompt and reads a line; raises EOFError at the end.

    Returns:
        The exit code.

    Raises:
        UsageError: model or settings do not work out.
    """
    if hosts.several():
        raise UsageError("distributed: expected one process for a chat, got several")
    console = Console(highlight=False)
    with console.status("loading"):
        session = Session(config)
    if sys.stdin.isatty():
        _enable_editing()
        console.print(Text(_greeting(session), style="dim"))
    loop = _Loop(session, console)
    while True:
        try:
            line = read("> " if sys.stdin.isatty() else "").strip()
            if line and not loop.take(line):
                return 0
        except EOFError:
            return 0
        except KeyboardInterrupt:
            console.print(Text("interrupted (/quit ends)", style="dim"))
        except UsageError as error:
            console.print(Text(f"error: {error}", style="red"), soft_wrap=True)


class _Loop:
    """What a line of the user does."""

    def __init__(self, session: Session, console: Console) -> None:
        self._session, self._console, self._speed = session, console, SPEED

    def take(self, line: str) -> bool:
        """Does it; False ends the conversation.

        Raises:
            UsageError: it cannot be done.
        """
        if not line.startswith("/"):
            self._answer(line)
            return True
        command, *arguments = line.split()
        if command == "/quit":
            return False
        if command == "/help":
            self._say(HELP)
        elif command == "/reset":
            self._session.reset()
            self._say("a new conversation")
        elif command == "/speed":
            self._speed = _number(command, arguments)
            self._say(f"replays at {self._speed:g} forwards per second" if self._speed else "no replays")
        elif command == "/turns":
            self._session.turns = int(_number(command, arguments))
            self._say(f"the model sees {self._session.turns} earlier turns")
        elif command == "/set":
            self._session.set(arguments)
            shown = self._session.settings().items() if not arguments else [a.split("=", 1) for a in arguments]
            self._say("\n".join(f"{name} = {value}" for name, value in shown))
        else:
            raise UsageError(f"{command}: expected one of /set, /speed, /turns, /reset, /help, /quit, or a message")
        return True

    def _answer(self, message: str) -> None:
        with self._console.status("decoding"):
            turn = self._session.ask(message)
        if turn.forgotten:
            self._say(f"the oldest {turn.forgotten} messages do not fit any more and are forgotten")
        if self._console.is_terminal and turn.trace and self._speed:
            self._replay(turn.trace)
        self._console.print(Text("\n".join(map(printable, turn.text.split("\n")))), soft_wrap=True)
        self._say(turn.told())

    def _replay(self, trace: Trace) -> None:
        """Fills the canvas in place, and takes it away again."""
        size = self._console.size

        def frame(step: int) -> Text:
            text = terminal.canvas(trace, step, width=size.width, height=max(size.height - 4, 1))
            return text.append(f"\nreplay: forward {step} of {trace.nfe}", style="dim")

        with Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
            frames = [functools.partial(frame, step) for step in range(trace.nfe + 1)]
            terminal.replay(live, frames, speed=max(self._speed, trace.nfe / LONGEST_REPLAY))

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)


def _number(command: str, arguments: Sequence[str]) -> float:
    """The one argument of a command, a number from 0.

    Raises:
        UsageError: it is none.
    """
    try:
        (number,) = map(float, arguments)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise UsageError(f"{command}: expected a number from 0, got {' '.join(arguments) or 'none'}")
    return number


def _greeting(session: Session) -> str:
    """The model, its decoder and what to know, in a line."""
    config = session.decoder.config
    label = f"{config.model.preset or config.model.path} by {config.decode.policy}, cache {config.decode.cache}"
    memory = "" if session.remembers else "; without a chat template it does not see earlier turns"
    return f"{label}, {config.decode.gen_length} tokens{memory}; /help lists commands"


def _for_one(config: Config) -> Config:
    """The settings for one prompt at a time."""
    return dataclasses.replace(config, decode=dataclasses.replace(config.decode, batch_size=1))


def _enable_editing() -> None:
    """Arrow keys and history in the line that is typed, where the platform has that."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # `input` uses it from then on
