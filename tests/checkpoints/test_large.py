"""Folders of 590 MB and 1 GB: the memory that loading and converting take, and what is left by one that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm_jax.checkpoints import verify
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from tests.checkpoints.folders import TINY, large, large_mixture, same_bits, tensors

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LARGEST, TOTAL = 4 * 14_650 * 1024, 590_000_000  # bytes
CODE = """
import sys
from pathlib import Path
from dllm_jax.checkpoints.convert import main
code = main(sys.argv)
print(*(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""
LOAD = """
import sys
from dllm_jax.bench.loading import measure
from dllm_jax.checkpoints import files
from dllm_jax.mesh import make_mesh
files.IN_FLIGHT_BYTES = 10**8
done = measure(sys.argv[1], dtype=sys.argv[3], mesh=make_mesh(tensor=int(sys.argv[2])), verify=True)
print(done.weight_bytes, done.host_bytes)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large(tmp_path_factory.mktemp("large") / "source")


def start(source: Path, target: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, f"--source={source}", f"--target={target}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def peak(source: Path, target: Path, *flags: str) -> int:
    """The most bytes that a process had in use that converts."""
    process = start(source, target, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return int(out.split()[-2]) * 2**10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak")
def test_a_conversion_takes_the_memory_of_a_few_tensors(source: Path, tmp_path: Path) -> None:
    assert sum(file.stat().st_size for file in source.iterdir()) == pytest.approx(TOTAL, rel=0.01)
    before = peak(TINY, tmp_path / "tiny")
    for flags in ((), ("--dtype=bfloat16",), ("--quantize=int8",), ("--to=hf",)):
        taken = peak(source, tmp_path / "large", "--overwrite", *flags) - before
        assert taken < 5 * LARGEST < 0.52 * TOTAL, (flags, taken)
    assert same_bits(tensors(source), tensors(tmp_path / "large"))


def test_a_conversion_that_is_killed_leaves_no_checkpoint(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    process = start(source, target)
    while process.poll() is None and len(list(tmp_path.glob("m.partial-*/params.partial_save/*"))) < 2:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = tmp_path.glob("m.partial-*")
    with pytest.raises(UsageError):
        load_model(left)
    assert verify.main(["verify", str(left)]) == 2
    peak(source, target)
    assert verify.main(["verify", str(target)]) == 0
    peak(target, tmp_path / "back", "--to=hf")
    assert same_bits(tensors(source), tensors(tmp_path / "back"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak")
def test_a_mixture_of_experts_streams(tmp_path: Path) -> None:
    """With the names of all of LLaDA2.0-mini's tensors: beside the weights there is what may be in flight."""
    source = large_mixture(tmp_path / "mixture")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size == pytest.approx(1.03e9, rel=0.02)
    for tensor, dtype in (("8", "keep"), ("1", "float32")):
        command = [sys.executable, "-c", LOAD, str(source), tensor, dtype]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        weights, beside = map(int, done.stdout.split())
        assert weights >= size * (1.99 if dtype == "float32" else 0.99)
        assert beside < 0.3 * size, (tensor, dtype, beside)
