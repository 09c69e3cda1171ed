"""The benchmark from settings to numbers, as JSON and as tables."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from dllm_jax.bench.ceilings import Ceilings, measure_ceilings
from dllm_jax.bench.ending import with_eos_logit
from dllm_jax.bench.measure import DecodeTiming, StepTiming, memory_source, time_decode, time_steps
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.build import open_companions
from dllm_jax.errors import UsageError
from dllm_jax.mesh import own_device
from dllm_jax.metrics import environment
from dllm_jax.models.model import Model, computing
from dllm_jax.opening import open_model
from dllm_jax.placement import decode_mesh
from dllm_jax.settings import numbers


def measure(config: Config) -> dict[str, Any]:
    """Measures steps and whole decodes of a configuration for every batch size, then the ceilings of the device.

    Args:
        config: what to decode with; `bench` says what to measure.

    Returns:
        `steps` and `decodes` (one entry per measurement), `ceilings`, `peak_memory_source`, and what they were measured
        with. Seconds, bytes, FLOPs; all per device where there are several.

    Raises:
        UsageError: model, mesh or settings do not work out.
    """
    sizes = numbers("bench.batch_sizes", config.bench.batch_sizes)
    largest = dataclasses.replace(config, decode=dataclasses.replace(config.decode, batch_size=max(sizes)))
    mesh = decode_mesh(largest, prompt_length=config.bench.prompt_length, batch_multiple=math.gcd(*sizes))
    model = open_model(config, mesh)
    if config.bench.eos_logit:
        model = with_eos_logit(model, config.bench.eos_logit, gen_length=config.decode.gen_length)
    companions = open_companions(config, mesh)
    decoders = [_decoder(model, config, size, companions=companions) for size in sizes]
    steps: list[StepTiming] = []
    decodes: list[DecodeTiming] = []
    for size, decoder in zip(sizes, decoders, strict=True):
        prompts = random_prompts(model, rows=size, length=config.bench.prompt_length, seed=config.decode.seed)
        steps += time_steps(decoder, prompts, bench=config.bench)
        decodes.append(time_decode(decoder, prompts, repeats=config.bench.repeats))
    source = memory_source()  # and peaks before the ceilings, which take memory of their own
    own = own_device(mesh)
    with computing(own, precision=config.model.matmul_precision):
        ceilings = measure_ceilings(own.devices.flat[0], model.dtype, repeats=config.bench.repeats)
    return {
        "steps": [_step_entry(timing, ceilings) for timing in steps],
        "decodes": [_decode_entry(timing) for timing in decodes],
        "ceilings": dataclasses.asdict(ceilings),
        "peak_memory_source": source,
        **environment(config=config, model=model),
    }


def _decoder(model: Model, config: Config, batch_size: int, *, companions: Mapping[str, Any]) -> Decoder:
    decode = dataclasses.replace(config.decode, batch_size=batch_size)
    decoder = Decoder(model, dataclasses.replace(config, decode=decode), **companions)
    try:
        decoder.check([0] * config.bench.prompt_length)
    except UsageError as error:
        raise UsageError(f"bench.prompt_length: {error}") from None
    return decoder


def random_prompts(model: Model, *, rows: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of ordinary tokens."""
    config = model.config
    ordinary = np.setdiff1d(np.arange(config.vocab_size), [config.mask_id, *config.end_ids])
    return np.random.default_rng(seed).choice(ordinary, (rows, length)).tolist()


def _step_entry(timing: StepTiming, ceilings: Ceilings) -> dict[str, Any]:
    floor = ceilings.floor_seconds(timing.cost)
    return dataclasses.asdict(timing) | {
        "cost": timing.cost._asdict(),
        "steps_per_second": 1 / timing.seconds,
        "flops_per_second": timing.cost.flops / timing.seconds,
        "bytes_per_second": timing.cost.bytes / timing.seconds,
        "floor_seconds": floor,
        "seconds_over_floor": timing.seconds / floor,
    }


def _decode_entry(timing: DecodeTiming) -> dict[str, Any]:
    return dataclasses.asdict(timing) | {
        "tokens_per_second": timing.num_tokens / timing.seconds,
        "canvas_tokens_per_second": timing.canvas_tokens / timing.seconds,
    }


def step_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Steps for a reader."""
    table = markdown_table(
        "batch",
        "canvas",
        "step",
        "columns",
        "ms",
        "steps/s",
        "floor ms",
        "ms/floor",
        "GB/s",
        "GFLOP/s",
        "compile s",
        "peak MB",
    )
    for entry in entries:
        table.add_row(
            str(entry["batch_size"]),
            str(entry["canvas_length"]),
            entry["step"],
            str(entry["columns"]),
            f"{entry['seconds'] * 1e3:.2f}",
            f"{entry['steps_per_second']:.1f}",
            f"{entry['floor_seconds'] * 1e3:.2f}",
            f"{entry['seconds_over_floor']:.2f}",
            f"{entry['bytes_per_second'] / 1e9:.1f}",
            f"{entry['flops_per_second'] / 1e9:.1f}",
            f"{entry['compile_seconds']:.1f}",
            f"{entry['peak_memory_bytes'] / 1e6:.0f}",
        )
    return table


def decode_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Whole decodes for a reader."""
    table = markdown_table(
        "batch", "canvas", "tokens/s", "canvas tokens/s", "NFE", "columns", "seconds", "compile s", "peak MB"
    )
    for entry in entries:
        table.add_row(
            str(entry["batch_size"]),
            str(entry["canvas_length"]),
            f"{entry['tokens_per_second']:.1f}",
            f"{entry['canvas_tokens_per_second']:.1f}",
            f"{entry['nfe_mean']:.1f}",
            str(entry["columns"]),
            f"{entry['seconds']:.3f}",
            f"{entry['compile_seconds']:.1f}",
            f"{entry['peak_memory_bytes'] / 1e6:.0f}",
        )
    return table


def markdown_table(*titles: str) -> Table:
    """An empty table that can be pasted into Markdown."""
    table = Table(box=box.MARKDOWN)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def summary(results: Mapping[str, Any]) -> str:
    """The ceilings and what was measured, in a few lines."""
    ceilings, device, config = results["ceilings"], results["device"], results["config"]
    decode, versions, used = config["decode"], results["versions"], math.prod(results["mesh"].values())
    return "\n".join(
        [
            f"{config['model']['preset'] or config['model']['path']} in {results['dtype']}, policy {decode['policy']}, "
            f"cache {decode['cache']}, on {used} of {device['count']} {device['kind']} devices, "
            f"jax {versions['jax']}, python {versions['python']}",
            f"ceilings: read {ceilings['read_bytes_per_second'] / 1e9:.1f} GB/s, copy "
            f"{ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix product "
            f"{ceilings['matmul_flops_per_second'] / 1e9:.1f} GFLOP/s",
            f"peak memory from {results['peak_memory_source']}",
        ]
    )
