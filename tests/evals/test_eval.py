"""`python -m decode.eval` from a file of tasks to a table, scored lines and metrics, with the bundled model."""

import json
import sys
from pathlib import Path

import pytest

from decode import eval as command
from dllm_jax import cli
from dllm_jax.data import tasks

ROOT = Path(__file__).parents[2]
FAST = ("--config.decode.gen_length=32", "--config.decode.batch_size=4", "--config.mesh.data=1")


def execute(*flags):
    config_file = str(ROOT / "configs" / "vanilla.py")
    return cli.execute(command.main, ["eval", *flags], description="", default_config=config_file)


def write(path, samples):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return f"--config.input.path={path}"


def samples(task, count):
    return [sample for sample in tasks.read(tasks.HELD_OUT_SMALL) if sample["task"] == task][:count]


def test_scored_lines_metrics_and_table(tmp_path, capsys):
    copies, sorts = samples("copy", 2), samples("sort", 1)
    wrong = copies[1] | {"id": "wrong", "answer": "tea."}
    given, output = write(tmp_path / "tasks.jsonl", [*copies, *sorts, wrong]), tmp_path / "out.jsonl"
    assert execute(given, *FAST, f"--config.output.path={output}") == 0

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["copy-001", "copy-006", "sort-001", "wrong"]
    assert [row["task"] for row in rows] == ["copy", "copy", "sort", "copy"]
    assert [row["correct"] for row in rows] == [True, True, True, False]
    assert rows[0]["text"] == copies[0]["answer"]

    metrics = json.loads(Path(f"{output}.metrics.json").read_text())
    assert metrics["accuracy"] == 0.75
    assert metrics["accuracy_by_task"] == {"copy": pytest.approx(2 / 3), "sort": 1.0}
    assert metrics["accuracy_macro"] == pytest.approx(5 / 6)
    assert metrics["num_samples"] == 4
    assert metrics["nfe_mean"] == 32
    assert metrics["tokens_per_forward"] == sum(row["num_tokens"] for row in rows) / 128
    assert metrics["config"]["decode"]["gen_length"] == 32

    table = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split() for line in table if line.strip()}
    assert cells["copy"][1:3] == ["3", "0.667"]
    assert cells["all"][2:4] == ["4", "0.750"]
    assert cells["mean"][3] == "0.833"


def test_bad_lines_can_be_left_out(tmp_path, capsys):
    lines = [{"task": "copy", "prompt": "Copy the list: tea."}, *samples("copy", 1), {"prompt": "hello"}]
    output = tmp_path / "out.jsonl"
    given = write(tmp_path / "tasks.jsonl", lines)
    assert execute(given, *FAST, "--config.input.on_error=skip", f"--config.output.path={output}") == 0
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["copy-001"]
    message = "tasks.jsonl:1: answer: expected the text of a copy answer, got None"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "hi"},
            "tasks.jsonl:2: task: expected one of word_problem, copy, reverse, sort, shuffle, latin_square, paired_c",
        ),
        ({"prompt": "hi", "task": "poetry", "answer": "a"}, "tasks.jsonl:2: task: expected one of word_problem,"),
        ({"prompt": "hi", "task": "sort"}, "tasks.jsonl:2: answer: expected the text of a sort answer, got None"),
        (
            {"prompt": "hi", "task": "word_problem", "answer": "5"},
            "tasks.jsonl:2: answer: expected the text of a w",
        ),
        (
            {"prompt": "hi", "task": 5, "answer": "5"},
            "gsm8k, math500, humaneval, mbpp, got 5",
        ),
    ],
)
def test_lines_that_cannot_be_scored_are_refused(tmp_path, capsys, line, message):
    assert execute(write(tmp_path / "tasks.jsonl", [*samples("copy", 1), line]), "--config.model.path=bad") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_single_prompt_is_refused(capsys):
    assert execute("--config.input.prompt=hi") == 2
    assert capsys.readouterr().err.startswith("error: input.prompt: expected a file of tasks in input.path instead")


@pytest.mark.slow
def test_accuracy_of_the_bundled_model(tmp_path):
    output = tmp_path / "out.jsonl"
    assert (
        execute("--config.decode.policy=threshold", "--config.decode.batch_size=20", f"--config.output.path={output}")
        == 0
    )
    metrics = json.loads(Path(f"{output}.metrics.json").read_text())
    assert metrics["num_samples_by_task"] == dict.fromkeys(tasks.TASKS, 20)
    assert metrics["accuracy"] >= 0.93  # 0.97 measured; two answers more or less are rounding


@pytest.mark.parametrize(
    ("flags", "file"), [((), tasks.HELD_OUT_SMALL), (("--config.eval.full=true",), tasks.HELD_OUT)]
)
def test_all_bundled_tasks_on_request(flags, file, monkeypatch):
    asked = []
    monkeypatch.setattr("dllm_jax.jobs.run", lambda config, **_: asked.append(config.input.path) or sys.exit(0))
    with pytest.raises(SystemExit):
        execute(*flags)
    assert asked == [str(file)]


def test_all_bundled_tasks_or_a_file(tmp_path, capsys):
    given = write(tmp_path / "tasks.jsonl", samples("copy", 1))
    assert execute(given, "--config.eval.full=true") == 2
    assert capsys.readouterr().err.startswith("error: eval.full: expected false with input.path, got true with")


def test_public_lines_are_asked_cut_and_scored(tmp_path, capsys):
    number = {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}
    program = {"task_id": "HumanEval/9", "prompt": "def f():\n", "test": "def check(f): pass\n", "entry_point": "f"}
    output = tmp_path / "out.jsonl"
    copy = samples("copy", 1)[0]
    given = [write(tmp_path / "lines.jsonl", [number, program, copy]), *FAST, f"--config.output.path={output}"]
    given += ["--config.eval.shots=0", '--config.output.stop=[",", ";"]']
    assert execute(*given) == 2
    assert "lines.jsonl:2: eval.run_code: expected true, as humaneval runs the code" in capsys.readouterr().err
    assert execute(*given, "--config.eval.run_code=true") == 0

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, "HumanEval/9", "copy-001"]
    assert [row["task"] for row in rows] == ["gsm8k", "humaneval", "copy"]
    assert [row.get("correct_strict") for row in rows] == [False, None, None]
    assert (rows[2]["text"], rows[2]["finish_reason"]) == (copy["answer"].partition(",")[0], "stop")
    assert 0 < rows[2]["num_tokens"] < 10
    metrics = json.loads(Path(f"{output}.metrics.json").read_text())
    assert metrics["accuracy_strict_by_task"] == {"gsm8k": 0.0}
    assert metrics["num_tokens"] == sum(row["num_tokens"] for row in rows)
    assert "gsm8k, strict" in capsys.readouterr().out
    assert execute(*given, "--config.eval.run_code=true", "--config.eval.code_seconds=3") == 2  # other scores
    assert "eval.code_seconds 10.0 instead of 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.input.task=poetry", "input.task: expected one of word_problem, "),
        ('--config.output.stop=["x",', "output.stop: expected a text or a list of texts in JSON, got "),
        ('--config.output.stop=["x", ""]', "output.stop: expected texts that are not empty, got "),
        ("--config.eval.mc_num=7", "eval.mc_num: expected a multiple of 8, got 7"),
        ("--config.eval.shots=-2", "eval.shots: expected at least -1, got -2"),
    ],
)
def test_settings_of_evaluations_are_checked(capsys, flag, message):
    assert execute(flag, "--config.model.path=bad") == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
