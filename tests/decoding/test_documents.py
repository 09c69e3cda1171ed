"""What the documents say about decoders is what the code does."""

import re
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.settings import (
    BLOCK_STOPS,
    BLOCKS,
    CACHES,
    POLICIES,
    POLICY_FITS,
    STOPS,
    DecodeSettings,
    blocks_table,
    policy_table,
)
from tests.traces import GOLDENS

ROOT = Path(__file__).parents[2]


def test_the_worked_example_decodes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text[text.index("## Adding a decoder") :], re.DOTALL)
    assert len(source.splitlines()) <= 30
    module = ModuleType("lead")
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    decode = DecodeSettings(gen_length=16, block_length=8, batch_size=2)
    decoder = Decoder(load_model(GOLDENS / "checkpoints" / "llada-tiny"), Config(decode=decode))
    prompts = [[5, 7, 11], [13, 17]]
    forwards = []
    for least in (1e9, 1.0, 0.0):
        decoder.policy = module.Lead(least=jnp.float32(least))
        result = decoder(prompts)
        assert result.timing.compilations == (1 if least == 1e9 else 0)
        assert not result.masks_left_B.any()
        forwards.append(int(result.nfe_B.sum()))
    assert forwards[0] == 32  # one token per forward
    assert forwards[0] > forwards[1] > forwards[2] == 4  # one forward per block
    np.testing.assert_array_equal(result.commit_step_BG, np.repeat([[1, 2]], 8, axis=1).repeat(2, axis=0))


def test_the_tables_are_those_of_the_settings() -> None:
    text = (ROOT / "docs" / "decoders.md").read_text()

    def lines(rows: list[tuple[str, ...]]) -> str:
        return "".join("| " + " | ".join(row) + " |\n" for row in rows)

    assert lines(policy_table()) in text
    assert lines(blocks_table()) in text


def test_everything_has_its_section() -> None:
    text, _ = (ROOT / "docs" / "decoders.md").read_text().split("## Models that are causal by blocks\n")
    titles = {name for title in re.findall(r"^### (.*)$", text, re.MULTILINE) for name in title.split(", ")}
    assert titles == {*POLICIES, *BLOCKS, *STOPS} - {"none", "eot+settled"}
    assert {name for name in re.findall(r"^\| (\w+) \|", text, re.MULTILINE)} >= set(CACHES)
    refused = ", ".join(policy for policy, fits in POLICY_FITS.items() if not fits.block_causal)
    uncached = [policy for policy, fits in POLICY_FITS.items() if fits.block_causal and "block" not in fits.caches]
    told = f"all but {refused} | block, none; only none for {', '.join(uncached)} | none, {', '.join(BLOCK_STOPS)};"
    assert told in (ROOT / "docs" / "models.md").read_text()
