"""A folder of 590 MB: the memory that a conversion takes, and what one that is killed leaves."""

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
from tests.checkpoints.folders import TINY, large, same_bits, tensors

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
