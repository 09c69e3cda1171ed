"""The page as a file: what is in it, and that nothing in a text can become part of it."""

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path

import pytest

from decode import view
from dllm_jax.viewer.choice import put_together
from dllm_jax.viewer.page import page
from dllm_jax.viewer.trace import from_row
from tests.viewer import rows

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>"


class Elements(html.parser.HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def elements(text: str) -> Elements:
    parser = Elements()
    parser.feed(text)
    return parser


def made(*lines: dict) -> str:
    races, left_out = put_together(
        [[from_row(line)] for line in lines], names=[str(i) for i in range(len(lines))], ids=[], most=5
    )
    return page(races, left_out=left_out)


def test_no_text_becomes_markup() -> None:
    hostile = rows.line(
        id=HOSTILE,
        prompt_text=HOSTILE,
        pieces=[HOSTILE] * 8,
        piece_by_id={"1": HOSTILE},
        finish_reason=HOSTILE,
        decoder={"policy": HOSTILE, "cache": HOSTILE},
    )
    text, plain = made(hostile), made(rows.line())
    assert [tag for tag, _ in elements(text).found] == [tag for tag, _ in elements(plain).found]
    assert 'onerror="' not in text
    data = json.loads(elements(text).scripts[0])
    trace = data["races"][0]["traces"][0]
    assert trace["pieces"] == [HOSTILE] * 8
    assert trace["pieceById"] == {"1": HOSTILE}
    assert data["races"][0]["prompt"] == data["races"][0]["id"] == HOSTILE
    assert (
        "\ud800"
        in json.loads(elements(made(rows.line(pieces=["\ud800"] * 8))).scripts[0])["races"][0]["traces"][0]["pieces"][0]
    )


def test_the_page_needs_nothing_else_and_runs_nothing_else() -> None:
    parser = elements(made(rows.line(), rows.apd()))
    assert not {name for _, given in parser.found for name in given} & {"src", "href", "srcset", "onclick", "onload"}
    policy = next(given["content"] for tag, given in parser.found if given.get("http-equiv"))
    script = parser.scripts[1]
    style = re.search(r"<style>(.*?)</style>", made(rows.line()), re.DOTALL)[1]
    assert "url(" not in style
    for content in (script, style):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("):
        assert markup not in script


def write(path: Path, *lines: dict) -> str:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def test_the_command_makes_each_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", rows.line(), rows.line(id="b"))
    two = write(tmp_path / "two.jsonl", rows.apd(), rows.apd() | {"id": "b"})
    target = tmp_path / "race.html"
    assert view.main(["view", one, two, f"--output={target}", "--most=1"]) == 0
    assert capsys.readouterr().out == f"prompt a in {target}\n"
    data = json.loads(elements(target.read_text()).scripts[0])
    assert [len(race["traces"]) for race in data["races"]] == [2]
    assert data["note"].startswith("1 more prompts")
    assert view.main(["view", one, two, f"--output={tmp_path / 'race.gif'}", "--format=gif", "--ids=b"]) == 0
    assert (tmp_path / "race.gif").read_bytes()[:6] == b"GIF89a"
    capsys.readouterr()
    assert view.main(["view", one, "--format=terminal", "--step=1"]) == 0
    assert "forward 1/4, 6 masks" in capsys.readouterr().out
    assert view.main(["view", one, "--format=terminal"]) == 0  # no terminal: the last step
    assert "done, forward 4/4, 0 masks" in capsys.readouterr().out


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", rows.line())
    for flags, expected in [
        ([], "--output: expected a file that can be written, got ''"),
        ([f"--output={one}"], "--output: expected a place apart from the outputs"),
        (["--format=terminal", "--output=x"], "--output: expected none with --format=terminal"),
        (["--format=pdf", "--output=x"], "pdf"),
        ([f"--output={tmp_path / 'no' / 'x.html'}"], "no folder"),
    ]:
        assert view.main(["view", one, *flags]) == 2
        out, err = capsys.readouterr()
        assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
        assert expected in err
    assert view.main(["view", "--help"]) == 0
    assert "--columns" in capsys.readouterr().out
