"""`configs/paper/*.py` and docs/paper_rows.md: every row has its settings, and every command can be given."""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from decode import lm_eval, sweep
from dllm_jax import cli
from dllm_jax.config import Config, from_config_dict
from dllm_jax.settings import block_schedule
from dllm_jax.training.filter.config import FilterTraining

PAGE = (Path(__file__).parents[1] / "docs" / "paper_rows.md").read_text()
EVAL = "python -m decode.eval "
CONFIGS = {
    f"{name}:{variant}": from_config_dict(module.get_config(variant))  # which validates them
    for name in cli.experiments()
    if name.startswith("paper/")
    for module in [cli.config_module(name)]
    for variant in module.VARIANTS
}
FILES = sorted({experiment.partition(":")[0] for experiment in CONFIGS})


class Row(NamedTuple):
    """A line of a table with a command."""

    sizes: str
    argv: list[str]

    @property
    def experiment(self) -> str:
        return cli.split(self.argv, "none")[0].config


def rows() -> list[Row]:
    cells = [line.strip("|").split("|") for line in PAGE.splitlines() if f"`{EVAL}" in line]
    assert all(len(row) == 5 for row in cells)
    return [Row(sizes.strip(), shlex.split(command.strip().strip("`"))[2:]) for _, sizes, command, _, _ in cells]


def blocks() -> list[list[str]]:
    """The commands outside the tables, program name first."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[line.index("-m") + 1 :] for line in words if line]


def parsed(argv: list[str], schema: type[Any] = Config) -> Any:
    seen: list[Any] = []
    assert cli.execute(seen.append, argv, description="", default_config="none", schema=schema) == 0
    return seen[0]


def test_every_variant_has_one_row() -> None:
    assert sorted(row.experiment for row in rows()) == sorted(CONFIGS)


@pytest.mark.parametrize("name", FILES)
def test_without_a_variant_a_file_is_one_of_its_rows(name: str) -> None:
    configs = [config for experiment, config in CONFIGS.items() if experiment.startswith(f"{name}:")]
    assert from_config_dict(cli.config_module(name).get_config()) in configs
    assert all(config not in configs[:index] for index, config in enumerate(configs))  # no row is another one


def test_rows_say_what_their_settings_are() -> None:
    for row in rows():
        config = CONFIGS[row.experiment]
        assert row.sizes == f"{config.decode.gen_length}, {block_schedule(config.decode)[0]}"
        assert config.decode.batch_size == 1
        assert f"`{config.input.path}`" in PAGE
        code = config.input.path.startswith(("HumanEval", "mbpp"))
        assert row.argv[2:] == ["--config.eval.run_code=true"] * code


def test_commands_can_be_given() -> None:
    assert parsed(next(row.argv for row in rows() if len(row.argv) > 2)).eval.run_code
    seen = set()
    for program, *arguments in blocks():
        seen.add(program)
        if program == "train.filter":
            assert parsed([program, *arguments], FilterTraining).decode.gen_length == 256
        elif program == "decode.lm_eval":
            given, rest = lm_eval.flags().parse_known_args(arguments)
            assert given.tasks == "gsm8k"
            assert parsed([program, *rest]) == CONFIGS["paper/dico:gsm8k_b256_dico"]
        else:
            assert set(sweep.variants(cli.split([program, *arguments], "none")[0].config)) <= set(CONFIGS)
            assert parsed([program, *arguments]).output.path
    assert seen == {"train.filter", "decode.lm_eval", "decode.sweep"}
