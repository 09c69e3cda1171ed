"""`output.view` of the commands that decode: a page beside their output."""

import dataclasses
from collections.abc import Sequence

from dllm_jax import hosts, remote
from dllm_jax.config import Config
from dllm_jax.data.outputs import check_writable, replace_file
from dllm_jax.data.rows import Row
from dllm_jax.errors import UsageError
from dllm_jax.viewer.choice import put_together
from dllm_jax.viewer.page import page
from dllm_jax.viewer.trace import from_row

MOST_PROMPTS = 20  # in a page; decode.view shows others


def traced(config: Config) -> Config:
    """The settings, with a trace if a page of it is asked for.

    Raises:
        UsageError: the page cannot be written, or would replace the output.
    """
    output = config.output
    if not output.view:
        return config
    if hosts.is_first():
        page_path = check_writable(output.view, ("",), field="output.view")[0]
        local = output.path and not remote.is_remote(output.path)
        if local and page_path in check_writable(output.path, ("", ".metrics.json", ".partial")):
            raise UsageError(f"output.view: expected a place apart from output.path, got {output.view!r}")
    return dataclasses.replace(config, output=dataclasses.replace(output, trace=True))


def write(config: Config, rows: Sequence[Row]) -> None:
    """The page of `output.view`, if one is asked for, and a line that says so.

    Args:
        config: from `traced`.
        rows: output lines with traces.
    """
    if not config.output.view or not rows or not hosts.is_first():
        return
    shown = rows[:MOST_PROMPTS]
    races, _ = put_together([[from_row(row) for row in shown]], names=[""], ids=[], most=MOST_PROMPTS)
    path = check_writable(config.output.view, ("",), field="output.view")[0]
    replace_file(path, page(races, left_out=len(rows) - len(shown)))
