"""Measures how fast a configuration decodes, and how far its steps are from what the device allows.

usage: python -m decode.bench [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m decode.bench --config=threshold
  python -m decode.bench --config.decode.cache=prefix --config.bench.batch_sizes=1,4,16 --config.output.path=bench.json
  python -m decode.bench --config.model.preset=llada_8b --config.decode.cache=dual --config.decode.gen_length=256

For every batch size: a step with a forward of the whole canvas, a cached step at its narrowest and widest, and a whole
decode of random prompts. floor is the time that reading weights and cache, or the arithmetic, takes at the rates of the
device, measured in the same run. Everything goes to output.path as JSON.
"""

import json

from rich.console import Console

from dllm_jax import cli, hosts
from dllm_jax.config import Config
from dllm_jax.data.outputs import check_writable, replace_file


def main(config: Config) -> None:
    """Measures, prints tables and writes the numbers."""
    from dllm_jax.bench import report  # imports JAX: only after the flags are parsed
    from dllm_jax.checkpoints.fingerprint import check_apart
    from dllm_jax.identity import sources

    path, *others = check_writable(config.output.path, ("",)) if config.output.path and hosts.is_first() else [None]
    if path:
        check_apart([path, *others], sources(config), field="output.path")
    results = report.measure(config)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(report.step_table(results["steps"]), report.decode_table(results["decodes"]))
    print(report.summary(results))
    if path:
        replace_file(path, json.dumps(results, indent=2) + "\n")
        print(f"all numbers in {config.output.path}")


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="vanilla")
