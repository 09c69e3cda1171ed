"""The decodes of docs/programs.md compile for TPUs at full size with the automatic mesh, fit and copy no weight.

Compiling does not depend on the number of layers, so nothing is extrapolated.
"""

import importlib.util
import itertools
from pathlib import Path

import pytest

from dllm_jax.models.presets import PRESETS
from docs.plan_tables import DECODES, MODELS, OTHER_MACHINES, Decode, plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)"),
]
CASES = [
    *((model, decode, "v5e:2x4") for model, decode in zip(itertools.cycle(MODELS), DECODES, strict=False)),
    (MODELS[0], DECODES[0], OTHER_MACHINES[-1]),  # v5p, whose automatic mesh has data alone
]
CODE = 24 * 2**20  # bytes; with a list of layers the dual program of LLaDA-8B has 183 MiB
BATCH, LOOKAHEAD = 8, 64  # of plan_tables and of configs/apd.py
LAYERS = {"llada_8b": 32, "dream_7b": 28}


@pytest.mark.parametrize(("model", "decode", "machine"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_program(tmp_path: Path, model: str, decode: Decode, machine: str) -> None:
    made = plan(tmp_path, model, decode, machine)
    assert made["fits"] is True
    (program,) = made["programs"]
    assert program["code_bytes"] < CODE * len(program["loops"])
    for step, loop in program["loops"].items():
        sliced = LAYERS[model] if (machine, step) == ("v5p:2x2x1", "full") else 0  # qkv, out of its stack
        assert loop["weight_copies"] == sliced
        assert loop["cache_copies"] == 0
        if made["mesh"]["tensor"] > 1 and decode.config != "apd":  # whose verifier sums as well
            assert loop["collectives"]["all-reduce"]["count"] >= 2 * LAYERS[model] + 1
        rest = [entry for kind, entry in loop["collectives"].items() if kind != "all-reduce"]
        sizes = made["mesh"]
        # Logits of a verifier with another vocabulary are split at other places: what lies between them moves.
        apart = abs(PRESETS[model].vocab_size - PRESETS["qwen2_0_5b"].vocab_size) // sizes["tensor"]
        logits = 4 * BATCH // sizes["data"] * LOOKAHEAD * apart if decode.config == "apd" else 0
        assert logits <= sum(entry["bytes"] for entry in rest) < logits + 2**20  # and a few numbers per position
