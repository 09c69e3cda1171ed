"""`python -m decode.report` on small results: what the page says, and that nothing in it is taken for markup."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from decode import report as command
from dllm_jax import evals
from dllm_jax.evals.report import Report
from dllm_jax.evals.results import read_folder, tidy
from tests.evals.sweeps import row, write

HOSTILE = '</pre></script><img src=x onerror="alert(1)"> | `x` $\\frac{1}{0}$ & \u202e'
SAMPLES = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One token per forward, all right; four per forward, a third wrong; a threshold between, traced."""
    target = tmp_path / "sweep"
    slow = [row(i, steps=range(1, 9), tokens=8, correct=True) for i in range(SAMPLES)]
    fast = [row(i, steps=[1] * 4 + [2] * 4, tokens=8, correct=i % 3 > 0, text=HOSTILE) for i in range(SAMPLES)]
    write(target, "slow", slow, settings={})
    write(target, "fast", fast, settings={"decode.policy": "dico"}, forwards_by_phase={"divide": 12, "<b>": 12})
    middle = [row(i, steps=[1, 1, 2, 2, 3, 3, 4, 4], tokens=6, correct=i > 0, confidence=[0.9] * 8) for i in range(12)]
    write(target, "middle", middle, settings={"decode.policy": "threshold", "decode.cache": "dual"})
    (target / "late.jsonl.partial").write_text("{}\n")
    return target


class Page(HTMLParser):
    """Elements with their attributes, and the text of table cells by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.in_row = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
            self.in_row = True
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_row &= tag != "tr"

    def handle_data(self, data: str) -> None:
        if self.in_row and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"3 variants: {folder / 'report.html'}, {folder / 'report.md'}\n"
    text, markdown = ((folder / name).read_text() for name in ("report.html", "report.md"))
    page = Page(text)
    by_name = [cells for cells in page.rows if cells and cells[0] in ("slow", "middle", "fast")]
    first = {cells[0]: cells for cells in by_name[:3]}
    assert list(first) == ["slow", "middle", "fast"]  # by tokens per forward
    assert first["fast"][1:5] == ["12", "0.67 (0.39 to 0.86)", "0.67", "0.67"]
    assert first["middle"][5].startswith("1.50 (")
    assert first["middle"][-1] == "decode.policy=threshold, decode.cache=dual"
    assert by_name[4][:4] == ["fast", "12", "0", "4"]  # against slow: none gained, four lost
    assert by_name[4][5:] == ["0.125", "0.250", "4.00 (4.00 to 4.00)"]
    assert "not in this report:</strong> late" in text
    assert "| slow | ★ | 12 | 1.00 (0.76 to 1.00) |" in markdown
    assert "| threshold, dual cache | 138 (" in markdown  # 1.5 * 11 / 12 * 100

    tags = {tag for tag, _ in page.elements}
    assert {"svg", "title", "pre"} <= tags
    assert not tags & {"script", "img", "link", "iframe", "object", "b"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        links = [value for name, value in attributes.items() if name in ("href", "src", "xlink:href") and value]
        assert all(value.startswith("#") for value in links)
    assert "<img" not in markdown
    assert "onerror" in text  # it is there, as text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert "point" not in ids

    assert command.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == text


def test_what_is_compared_and_shown_can_be_chosen(folder: Path) -> None:
    assert command.main(["report", str(folder), "--baseline=fast", "--show=middle", "--svg"]) == 0
    svgs = sorted(folder.glob("report_*.svg"))
    assert [path.stem.removeprefix("report_") for path in svgs] == [
        "acceptance",
        "aup",
        "calibration",
        "committed",
        "kinds",
        "plane",
        "planes",
    ]
    points = ElementTree.parse(folder / "report_plane.svg").iter("{http://www.w3.org/2000/svg}title")
    assert [point.text for point in points] == ["slow", "middle", "fast"]
    text = (folder / "report.html").read_text()
    assert "<h2>Against fast</h2>" in text
    assert "Nowhere: the variants above" in text
    variants, unfinished = read_folder(folder)
    assert unfinished == ["late"]
    made = Report(variants)
    assert made.baseline.name == "slow"
    assert made.line == ["slow", "middle", "fast"]
    assert made.methods == ["dico", "low_confidence", "threshold, dual cache"]
    assert list(made.calibrations) == ["middle"]
    assert made.phases == {"fast": {"divide": 1, "<b>": 1}}
    assert [example["id"] for example in made.examples] == [0, 3, 6, 9]


def test_variants_of_other_samples_are_compared_on_those_of_both(folder: Path) -> None:
    few = [row(i, steps=[1], tokens=1, correct=True) for i in (7, 3, 40)]
    write(folder, "few", few, settings={"decode.policy": "eb"})
    write(folder, "none", few[2:], settings={"decode.policy": "klass"})
    compared = Report(read_folder(folder)[0]).compared
    assert (compared["few"][0].samples, compared["fast"][0].samples) == (2, 12)
    assert "none" not in compared


def test_results_in_several_files(folder: Path) -> None:
    lines = (folder / "fast.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("fast-0.jsonl", lines[:5]), ("fast-1.jsonl", lines[5:])):
        (folder / name).write_text("".join(some))
    (folder / "fast.jsonl").unlink()
    metrics = folder / "fast.jsonl.metrics.json"
    shards = [{"name": "fast-0.jsonl"}, {"name": "fast-1.jsonl"}]
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"shards": shards}))
    variants, _ = read_folder(folder)
    assert [(variant.name, len(variant.rows)) for variant in variants] == [("slow", 12), ("middle", 12), ("fast", 12)]


def test_the_rows_of_the_table_of_samples(folder: Path) -> None:
    rows = [sample for variant in read_folder(folder)[0] for sample in tidy(variant)]
    assert len(rows) == 3 * SAMPLES
    assert len({tuple(sample) for sample in rows}) == 1
    traced = next(sample for sample in rows if sample["variant"] == "middle")
    assert json.loads(traced["settings"]) == {"decode.policy": "threshold", "decode.cache": "dual"}
    assert (traced["policy"], traced["cache"], traced["stop"]) == ("threshold", "dual", "none")
    assert (traced["tokens_per_forward"], traced["committed"]) == (1.5, 8)
    assert traced["mean_confidence"] == pytest.approx(0.9)
    assert rows[0]["least_confidence"] is None


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(evals, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "dllm_jax.evals.plots", None)
    assert command.main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: report: expected Matplotlib (pip install 'dllm_jax[report]')")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected one folder of a sweep, got none"),
        (["{folder}", "{folder}"], "expected one folder of a sweep"),
        (["{folder}/nowhere"], "expected the folder of a sweep"),
        (["{folder}/empty"], "expected the results of decode.sweep, got no finished variant"),
        (["{folder}", "--baseline=best"], "--baseline: expected a variant of the sweep, one of slow, middle, fast"),
        (["{folder}", "--show=slow,best"], "--show: expected a variant of the sweep"),
        (["{folder}/unscored"], "expected scored results of decode.eval"),
        (["{folder}/torn"], "expected results with .metrics.json beside them"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("empty", None), ("unscored", "{}"), ("torn", "{")):
        (folder / name).mkdir()
        if text:
            (folder / name / "a.jsonl").write_text("{}\n")
            (folder / name / "a.jsonl.metrics.json").write_text(text)
    assert command.main(["report", *(argument.format(folder=folder) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert told in err
