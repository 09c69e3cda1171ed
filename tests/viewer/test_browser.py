"""The page in headless Chromium, whose path is in the environment variable CHROMIUM (else the one that is found)."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from decode import run, view
from dllm_jax import cli
from dllm_jax.checkpoints.load import ASSETS

pytestmark = pytest.mark.slow
PROMPTS = ["Sort the list: oak, fern, duck.", "Shuffle the list: gold, crab, salt."]
SHORT = ("decode.gen_length=32", "mesh.data=1", "output.trace=true")
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>&lt;"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no Chromium: its path is expected in CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Page]:
    """A page without a network; whatever it complains of, or asks for besides a file, fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    yield page
    context.close()
    assert not wrong


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two prompts by four decoders."""
    folder = tmp_path_factory.mktemp("outputs")
    asked = folder / "in.jsonl"
    asked.write_text("".join(json.dumps({"id": f"p{i}", "prompt": text}) + "\n" for i, text in enumerate(PROMPTS)))
    made = []
    for name, *settings in (
        ("vanilla",),
        ("learn2pd",),
        ("apd", "apd.max_lookahead=16"),
        ("dico", "decode.block_length=32"),
    ):
        path = folder / f"{name}.jsonl"
        decode(name, f"input.path={asked}", f"output.path={path}", *SHORT, *settings)
        made.append(path)
    return made


def decode(config: str, *settings: str) -> None:
    argv = ["run", f"--config={config}", *(f"--config.{setting}" for setting in settings)]
    assert cli.execute(run.main, argv, description="", default_config="vanilla") == 0


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words(row: dict[str, Any], k: int) -> list[tuple[str, str]]:
    """State and text of every position after the k-th forward, from the output line alone; a mask has no text."""
    specials, found = set(row["special_ids"]), []
    step = row["steps"][k - 1] if 1 <= k <= row["nfe"] else {"open": [], "draft": []}
    end = row["steps"][k]["end"] if k < row["nfe"] else row["end"]
    lost = {position: (token, since) for position, token, since in row["lost"]}
    drafts = dict(zip(step["open"], step["draft"], strict=True)) if row["decoder"]["policy"] == "apd" else {}

    def text_of(token: int) -> str:
        return "▫" if token in specials else row["piece_by_id"][str(token)]

    for place, (token, piece, committed) in enumerate(
        zip(row["output_ids"], row["pieces"], row["commit_step"], strict=True)
    ):
        text = "▫" if token in specials else piece
        if place >= end:
            found.append(("cut", text))
        elif 0 < committed <= k:
            found.append(("now" if committed == k else "earlier", text))
        elif place in lost and lost[place][1] <= k:
            token, since = lost[place]
            found.append(("now" if since == k else "earlier", text_of(token)))
        elif place in drafts:
            found.append(("rejected", text_of(drafts[place])))
        else:
            found.append(("masked", ""))
    return found


def shown(page: Page) -> list[list[tuple[str, str]]]:
    """What every panel shows."""
    panels = page.evaluate(
        """() => [...document.querySelectorAll("article")].map((panel) =>
        [...panel.querySelectorAll(".cell")].map((cell) => [cell.dataset.state, cell.textContent]))"""
    )
    return [[(state, "" if state == "masked" else text) for state, text in panel] for panel in panels]


def open_file(page: Page, path: Path, address: str = "") -> None:
    page.goto(f"{path.as_uri()}{address}")
    page.wait_for_selector("article")


@pytest.fixture(scope="module")
def race(outputs: list[Path]) -> Path:
    target = outputs[0].with_name("race.html")
    assert view.main(["view", *map(str, outputs), f"--output={target}"]) == 0
    return target


def test_four_decoders_step_by_step(opened: Page, outputs: list[Path], race: Path) -> None:
    lines = [read(path) for path in outputs]
    for prompt in range(len(PROMPTS)):
        rows = [of_decoder[prompt] for of_decoder in lines]
        last = max(row["nfe"] for row in rows)
        assert last == 32
        open_file(opened, race, f"#{prompt + 1}/0")
        assert PROMPTS[prompt] in opened.text_content("#prompt")
        for k in (0, 1, 2, 3, 17, last):
            opened.evaluate(
                """(k) => {
                    const slider = document.getElementById("slider");
                    slider.value = k;
                    slider.dispatchEvent(new Event("input"));
                }""",
                k,
            )
            assert shown(opened) == [words(row, k) for row in rows]
            counted = opened.eval_on_selector_all(
                "article", "all => all.map((each) => each.querySelector('dd').textContent)"
            )
            assert counted == [f"{min(k, row['nfe'])} / {row['nfe']}" for row in rows]
        assert "".join(text for _, text in shown(opened)[0] if text != "▫") == rows[0]["text"]
    seeds = [step["seeds"] for step in lines[3][0]["forwards"]]
    open_file(opened, race, "#1/1")
    found = opened.eval_on_selector_all(
        ".seed[data-position]", "all => all.map((each) => Number(each.dataset.position))"
    )
    assert sorted(found) == sorted(seeds[0])
    bars = opened.locator("article").nth(1).locator(".filtered[data-position]").count()
    assert bars == len(lines[1][0]["steps"][0]["open"])
    assert {"apd"} == {row["decoder"]["policy"] for row in lines[2]}
    assert any(("rejected" in dict(words(lines[2][1], k))) for k in range(1, lines[2][1]["nfe"] + 1))


def test_it_plays_and_takes_keys(opened: Page, race: Path) -> None:
    open_file(opened, race)
    assert opened.get_attribute("html", "data-step") == "0"
    opened.select_option("#speed", "64")
    opened.click("#play")
    assert opened.text_content("#play") == "Pause"
    opened.wait_for_function("() => document.documentElement.dataset.playing === 'false'", timeout=20_000)
    assert opened.get_attribute("html", "data-step") == "32"
    assert all(text.startswith("done: ") for text in opened.locator(".done").all_text_contents())
    opened.locator("h1").click()
    for key, step in (("Home", "0"), ("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", "32")):
        opened.keyboard.press(key)
        assert opened.get_attribute("html", "data-step") == step
    opened.click("#later")
    assert opened.input_value("#prompts") == "1"
    opened.select_option("#colour", "confidence")
    opened.keyboard.press("End")
    opened.click("#last")
    assert opened.locator(".cell[data-heat]").count() > 32
    opened.locator("article").first.locator(".cell").first.hover()
    assert "committed in forward" in opened.text_content("#hover")
    assert "confidence" in opened.text_content("#hover")


@pytest.mark.parametrize("width", [340, 700, 1000, 1250, 1900])
def test_nothing_sticks_out_at_any_width(opened: Page, race: Path, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 900})
    for step in (0, 1, 32):
        open_file(opened, race, f"#1/{step}")
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        for box in opened.eval_on_selector_all(
            "article", "all => all.map((each) => each.getBoundingClientRect().right)"
        ):
            assert box <= width
    tops = set(opened.eval_on_selector_all("article", "all => all.map((each) => each.getBoundingClientRect().top)"))
    assert len(tops) == {340: 4, 700: 4, 1000: 2, 1250: 2, 1900: 1}[width]


def test_a_model_that_writes_markup(opened: Page, tmp_path: Path) -> None:
    model = Path(shutil.copytree(ASSETS / "llada-tiny", tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    hostile = {"type": "Replace", "pattern": {"String": ","}, "content": HOSTILE}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], hostile]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    page, out = tmp_path / "page.html", tmp_path / "out.jsonl"
    decode(
        "threshold",
        f"model.path={model}",
        f"input.prompt={PROMPTS[0]}",
        f"output.path={out}",
        f"output.view={page}",
        *SHORT[:2],
    )
    (row,) = read(out)
    assert HOSTILE in row["text"]
    open_file(opened, page, "#1/99")
    assert opened.title() == "Decoding, forward by forward"
    assert opened.locator("img").count() == opened.locator("b:has-text('lt')").count() == 0
    texts = [text for state, text in shown(opened)[0] if state != "cut"]
    assert HOSTILE in texts
    assert HOSTILE in opened.text_content("#prompt")
    assert opened.locator("script").count() == 2


def test_other_characters_are_kept(opened: Page, tmp_path: Path) -> None:
    from tests.viewer.rows import line

    pieces = ["\tdef", "  f", "\n\n", "日本", "👩\u200d🚀", "", "\x1b[2J", "\u202eabc"]
    out, target = tmp_path / "out.jsonl", tmp_path / "page.html"
    out.write_text(json.dumps(line(pieces=pieces)) + "\n")
    assert view.main(["view", str(out), f"--output={target}"]) == 0
    open_file(opened, target, "#1/4")
    texts = [text for _, text in shown(opened)[0]]
    assert texts[:5] == pieces[:5]
    assert texts[6:] == ["␛[2J", pieces[7]]
    assert opened.eval_on_selector(".canvas", "each => getComputedStyle(each).whiteSpace") in ("pre-wrap", "preserve")
