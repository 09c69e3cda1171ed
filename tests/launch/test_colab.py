"""`launch/colab_ablation.ipynb`, executed from start to end as a CPU runtime would."""

import csv
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.numpy import load_file

from configs.ablations import all as every
from dllm_jax.decoding.policies.build import RECIPES

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab_ablation.ipynb"
PER_CELL_SECONDS = 1200


def cells() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_is_committed_without_outputs() -> None:
    notebook = cells()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert not [word for word in ("/home/", "/root/", str(NOTEBOOK.parent), "/tmp/") if word in NOTEBOOK.read_text()]
    assert sum("\nON=false\n$ON || exit 0\n" in cell.source for cell in code) == 2


@pytest.mark.slow
def test_runs_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on Colab
    notebook = cells()
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=PER_CELL_SECONDS, kernel_name="python3", resources=resources).execute()

    assert '"duck, fern, oak."' in (tmp_path / "first.jsonl").read_text()
    rows = list(csv.DictReader((tmp_path / "methods" / "samples.csv").open(newline="")))
    policies = {every.get_config(row["variant"]).decode.policy for row in rows}
    assert policies == set(RECIPES)
    assert len(rows) == 4 * len(policies)
    table = (tmp_path / "numbers" / "table.md").read_text().splitlines()
    assert len(table) == 2 + 8
    accuracy = {line.split("|")[1].strip(): float(line.split("|")[7]) for line in table[2:]}
    assert accuracy["threshold_0.9"] > accuracy["apd_R1.0_W32"]  # drafts that nobody checks
    assert "<svg" in (tmp_path / "numbers" / "report.html").read_text()
    frames = [
        str(output.get("data", {}).get("text/html")) for cell in notebook.cells for output in cell.get("outputs", ())
    ]
    assert sum("<iframe srcdoc=" in frame for frame in frames) == 2
    assert "APD" in (tmp_path / "race.html").read_text() or "apd" in (tmp_path / "race.html").read_text()
    assert load_file(next((tmp_path / "filter").glob("*.safetensors")))
    filtered = json.loads((tmp_path / "filtered.jsonl.metrics.json").read_text())
    assert filtered["num_samples"] == 10
    assert filtered["accuracy"] > 0.5
    assert not list(tmp_path.glob("*pu.jsonl"))  # real weights are off
