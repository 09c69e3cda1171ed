"""Settings that a script got wrong: empty ones, bytes that are no text, numbers that do not fit; and float16 on CPU."""

import json

import pytest

from tests.cases.conftest import Run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["input.prompt="], "input.prompt: expected text that is not empty, got --config.input.prompt="),
        (["input.path="], "input.path: expected text that is not empty, got --config.input.path="),
        (["input.prompt=", "input.path=x.jsonl"], "input.prompt: expected text that is not empty"),
        (["input.prompt=  "], "input.prompt: expected a string that is not empty or blank"),
        (["input.prompt=caf\udce9"], r"input.prompt: expected UTF-8 text, got 'caf\udce9'"),
        (["input.path=caf\udce9"], r"input.path: expected UTF-8 text, got 'caf\udce9'"),
        (["output.path=caf\udce9"], r"output.path: expected UTF-8 text, got 'caf\udce9'"),
        (["decode.seed=99999999999999999999"], "decode.seed: expected 0 to 4294967295, got 99999999999999999999"),
        (["decode.seed=4294967296"], "decode.seed: expected 0 to 4294967295, got 4294967296"),
        (["decode.seed=-1"], "decode.seed: expected 0 to 4294967295, got -1"),
    ],
)
def test_a_mistake_is_one_line(run: Run, settings: list[str], message: str) -> None:
    assert message in run(*settings).error


def test_an_empty_path_is_no_wish_for_the_built_in_tasks(run: Run) -> None:
    assert "input.path: expected text that is not empty" in run("input.path=", command="eval").error


def test_float16_computes_on_cpu(run: Run) -> None:
    ran = run(
        "model.dtype=float16",
        "input.prompt=Sort the list: oak, fern, duck.",
        "decode.gen_length=8",
        "decode.block_length=8",
        "decode.seed=4294967295",
        config="threshold",
    )
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["text"] == "duck, fern, oak."
