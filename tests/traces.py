"""Reading recorded traces of the reference implementations, and rebuilding ours in the same form."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dllm_jax.decoding import stepping
from dllm_jax.decoding.engine import Carry, Engine
from dllm_jax.decoding.state import DecodeResult, DecodeState
from dllm_jax.models.cache import widened

GOLDENS = Path(__file__).parent / "goldens"
EOS, EOT, MASK = 300, 301, 310


class Case(NamedTuple):
    """One recorded run: its arguments and arrays."""

    name: str
    section: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def args(self) -> dict[str, Any]:
        return self.meta["args"]

    @property
    def checkpoint(self) -> Path:
        return GOLDENS / "checkpoints" / self.meta["checkpoint"]


def cases(section: str) -> list[Case]:
    """All recorded runs of a section; an empty folder is an error, so that nothing is skipped silently."""
    found = [
        Case(path.stem, section, json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz"))))
        for path in sorted((GOLDENS / section).glob("*.json"))
    ]
    assert found, f"no recorded runs in {section}"
    return found


def rebuilt_trace(result: DecodeResult, prompt: np.ndarray, row: int) -> np.ndarray:
    """The canvas after every forward of a row, [nfe, P + G], from its tokens and commit steps."""
    steps_S1 = np.arange(1, result.nfe_B[row] + 1)[:, None]
    committed = (result.commit_step_BG[row] > 0) & (result.commit_step_BG[row] <= steps_S1)
    generated = np.where(committed, result.tokens_BG[row], MASK)
    return np.concatenate([np.broadcast_to(prompt, (len(generated), len(prompt))), generated], axis=1)


def assert_trace(
    result: DecodeResult, prompt: np.ndarray, row: int, *, wanted: np.ndarray, tau: float | None = None
) -> None:
    """The canvases of a row are those of the reference; else says where they part, and how sure the model was there.

    Args:
        result: ours.
        prompt: of the row.
        row: of the batch.
        wanted: the canvas after every forward, [nfe, P + G].
        tau: the threshold or factor of the policy, for the message.
    """
    ours = rebuilt_trace(result, prompt, row)
    if np.array_equal(ours, wanted):
        return
    steps = min(len(ours), len(wanted))
    differs_S = (ours[:steps] != wanted[:steps]).any(axis=1)
    step = int(differs_S.argmax()) if differs_S.any() else steps
    told = [f"row {row}: {len(ours)} forwards, the reference {len(wanted)}; they part at forward {step + 1}"]
    if step < steps:
        places = np.flatnonzero(ours[step] != wanted[step]) - len(prompt)
        told += [
            f"{place}: {ours[step, len(prompt) + place]} instead of {wanted[step, len(prompt) + place]}, committed in "
            f"forward {result.commit_step_BG[row, place]} at confidence {result.confidence_BG[row, place]:.9g}"
            for place in places
        ]
    raise AssertionError("; ".join(told) + f" (tau {tau})")


FULL_STEP = jax.jit(stepping.full_step, static_argnames="length")
CACHED_STEP = jax.jit(stepping.cached_step, static_argnames="width")


def carries(engine: Engine, state: DecodeState) -> Iterator[Carry]:
    """What `driver.decode` carries after every iteration, from a loop in Python around the same steps."""
    geometry = engine.geometry
    widths = engine.cache.widths(geometry)
    carry = engine.start(state)
    while carry.state.live_B.any():
        carry, cache = FULL_STEP(engine, carry, length=engine.cache.full_columns(geometry))
        yield carry
        if not widths:
            continue
        fresh = cache = widened(cache, columns=geometry.columns)
        last = None
        while engine.served(carry.state).any():
            width = widths[int(engine.narrowest(carry.state, widths))]
            if width != last and not engine.cache.keeps_writes:
                cache = fresh
            carry, cache = CACHED_STEP(engine, carry, cache, width=width)
            last = width
            yield carry


@struct.dataclass
class RecordedNoise:
    """Feeds recorded uniform numbers to the decoder: draws indexed by forward, row and canvas position."""

    gumbel_SBLV: jax.Array
    uniform_SBL: jax.Array
    prompt_length: int = struct.field(pytree_node=False)

    @classmethod
    def from_case(cls, case: Case) -> "RecordedNoise":
        uniform = case.arrays.get("uniform_noise", np.full((1, 1, 1, 1), 0.5))
        return cls(
            gumbel_SBLV=jnp.asarray(-np.log(-np.log(uniform.astype(np.float64))), jnp.float32),
            uniform_SBL=jnp.asarray(case.arrays.get("random_confidence", np.zeros((1, 1, 1)))),
            prompt_length=case.arrays["prompt"].shape[1],
        )

    def gumbel(self, row_B: jax.Array, nfe_B: jax.Array, position_BQ: jax.Array, *, vocab_size: int) -> jax.Array:
        return self.gumbel_SBLV[nfe_B[:, None], row_B[:, None], self.prompt_length + position_BQ]

    def uniform(self, row_B: jax.Array, nfe_B: jax.Array, position_BQ: jax.Array) -> jax.Array:
        return self.uniform_SBL[nfe_B[:, None], row_B[:, None], self.prompt_length + position_BQ]
