r"""Says what a decode will take before anything is loaded: compiles its programs from the model's shape alone.

usage: python -m decode.plan [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m decode.plan --config=threshold --config.model.preset=llada_8b --config.decode.gen_length=256 \
      --config.plan.topology=v5e:2x4
  python -m decode.plan --config=threshold --config.plan.prompt_length=64,256 --config.output.path=plan.json

For the devices here, or for TPUs that are not (plan.topology): memory on every device; for the full and the cached step
what moves between devices and how often weights and caches are copied; the least time that the chip can take (floor)
and what bounds it. Of model.path only config.json is read. Everything goes to output.path as JSON. The exit code is 1
if it does not fit, and a line says what would.
"""

import json
import os
import sys

from rich.console import Console

from dllm_jax import cli, hosts
from dllm_jax.chips import GPUS
from dllm_jax.config import Config
from dllm_jax.data.outputs import check_writable, replace_file

# libtpu only compiles: it need not look for TPUs, nor keep other processes from them.
_COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def main(config: Config) -> int:
    """Plans, prints tables and writes the numbers; returns 1 if the decode does not fit."""
    if config.plan.topology:
        if config.plan.topology not in GPUS:
            cli.require("libtpu", extra="tpu")
        for name, value in _COMPILE_ONLY.items():
            os.environ.setdefault(name, value)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile seconds are those of compiling
    from dllm_jax.bench import plan  # imports JAX: only after the flags are parsed

    path = check_writable(config.output.path, ("",))[0] if config.output.path and hosts.is_first() else None
    results = plan.plan(config)
    console = Console(highlight=False)
    console.width = max(console.width, 160)
    console.print(*plan.tables(results))
    print(plan.summary(results))
    if path:
        replace_file(path, json.dumps(results, indent=2) + "\n")
        print(f"all numbers in {config.output.path}")
    if results["fits"] is False:
        print(plan.obstacle(config, results), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="vanilla")
