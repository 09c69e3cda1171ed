r"""Says what a decode will take before anything is loaded: compiles its programs from the model's shape alone.

usage: python -m decode.plan [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m decode.plan --config=threshold --config.model.preset=llada_8b --config.decode.gen_length=256 \
      --config.plan.topology=v5e:2x4
  python -m decode.plan --config=threshold --config.plan.prompt_length=64,256 --config.output.path=plan.json
  python -m decode.plan --config=sft_llada --config.model.preset=llada_8b --config.mesh.fsdp=64 \
      --config.plan.topology=v5e:8x8

For the devices here, or for TPUs that are not (plan.topology): memory on every device; for the full and the cached step
what moves between devices and how often weights and caches are copied; the least time that the chip can take (floor)
and what bounds it. Of model.path only config.json is read. An experiment of train.diffusion is planned as a training:
its step on every length of its canvases. Everything goes to output.path (of a training: PATH.plan.json) as JSON. The
exit code is 1 if it does not fit, and a line says what would.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from dllm_jax import cli, hosts
from dllm_jax.chips import GPUS
from dllm_jax.config import Config
from dllm_jax.data.outputs import check_writable, replace_file
from dllm_jax.errors import UsageError
from dllm_jax.training.diffusion.config import DiffusionTraining

# libtpu only compiles: it need not look for TPUs, nor keep other processes from them.
_COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def main(config: Config | DiffusionTraining) -> int:
    """Plans, prints tables and writes the numbers; returns 1 if it does not fit."""
    of_training = isinstance(config, DiffusionTraining)
    if config.plan.program == "train" and not of_training:
        raise UsageError("plan.program: expected decode with this experiment, got train (which --config=sft_llada has)")
    if config.plan.topology:
        if config.plan.topology not in GPUS:
            cli.require("libtpu", extra="tpu")
        for name, value in _COMPILE_ONLY.items():
            os.environ.setdefault(name, value)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile seconds are those of compiling
    file = config.output.path + (".plan.json" if config.output.path and of_training else "")
    if of_training and hosts.is_first():
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # as the training makes it
    path = check_writable(file, ("",))[0] if file and hosts.is_first() else None
    results, tables, obstacle = _of_training(config) if isinstance(config, DiffusionTraining) else _of_decode(config)
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, 160)
    console.print(*tables)
    if path:
        replace_file(path, json.dumps(results, indent=2) + "\n")
        print(f"all numbers in {file}")
    if obstacle:
        print(obstacle, file=sys.stderr)
        return 1
    return 0


def _of_decode(config: Config) -> tuple[dict[str, Any], list[Any], str]:
    """The plan of a decode, for a reader, and what is in its way."""
    from dllm_jax.bench import plan  # imports JAX: only after the flags are parsed

    results = plan.plan(config)
    obstacle = plan.obstacle(config, results) if results["fits"] is False else ""
    return results, [*plan.tables(results), plan.summary(results)], obstacle


def _of_training(config: DiffusionTraining) -> tuple[dict[str, Any], list[Any], str]:
    """The plan of a training or, if that is asked for, of its decode; as `_of_decode`."""
    if config.plan.program == "decode":
        return _of_decode(dataclasses.replace(config.decoding(), plan=config.plan))
    cli.require("grain", "tensorboardX", extra="train")
    from dllm_jax.bench.plan import summary, tables
    from dllm_jax.training.diffusion import plan

    results = plan.plan(config)
    obstacle = plan.obstacle(results) if results["fits"] is False else ""
    return results, [*tables(results, length=plan.LENGTH), summary(results)], obstacle


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="vanilla", others=[DiffusionTraining])
