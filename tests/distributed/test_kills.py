"""A job of 200 lines by real processes that are killed, or asked to end, while it runs: it ends with the same bytes."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dllm_jax.checkpoints.load import ASSETS
from tests.distributed.processes import LIMIT, LOST, ended_well, finished, run, started

pytestmark = pytest.mark.slow
LINES = 200
KILLS = 5
JOB = ("--config=threshold", "decode.gen_length=32", "decode.block_length=32", "decode.batch_size=4", "mesh.data=2")
WAYS = [
    ("decode.refill=0",),
    ("decode.refill=0.25", "output.shard_lines=64", "output.shards=merge"),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out tasks, some of which take many forwards."""
    path = tmp_path_factory.mktemp("asked") / "in.jsonl"
    lines = (ASSETS / "tasks_eval.jsonl").read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in lines[::2][:LINES]))
    assert path.read_text().count("\n") == LINES
    return path


@pytest.fixture(scope="module")
def undisturbed(asked: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process writes that is left alone."""
    path = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    ended_well(run("decode.run", *JOB, f"input.path={asked}", f"output.path={path}"))
    assert path.read_bytes().count(b"\n") == LINES
    return path.read_bytes()


def done_lines(out: Path) -> int:
    """Lines that a job has written whole: those of the partial file, and of the finished shards that it names."""
    try:
        content = Path(f"{out}.partial").read_bytes()
    except FileNotFoundError:
        return 0
    _, *rows = content[: content.rfind(b"\n") + 1].splitlines() or [b""]
    records = [json.loads(row) for row in rows]
    return sum(record["tally"][0][1]["rows"] if "part" in record else 1 for record in records)


def wait_for(out: Path, lines: int, processes: list[subprocess.Popen[str]]) -> None:
    """Waits until a job has done so many lines."""
    for _ in range(100 * LIMIT):
        if done_lines(out) >= lines:
            return
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.01)
    raise AssertionError("it takes too long")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_killed_at_five_random_moments(asked: Path, undisturbed: bytes, tmp_path: Path, way: tuple[str, ...]) -> None:
    out = tmp_path / "out.jsonl"
    job = (*JOB, *way, f"input.path={asked}", f"output.path={out}")
    seed = random.randrange(10**6)
    moments = sorted(random.Random(seed).sample(range(1, LINES - 20), KILLS))
    print(f"seed {seed}: killed behind {moments} lines")
    before = 0
    for moment in moments:
        with started("decode.run", *job) as processes:
            wait_for(out, max(moment, before + 1), processes)
            processes[0].kill()
            assert processes[0].wait() == -signal.SIGKILL
        lines = done_lines(out)
        print(f"{lines} lines were done")
        assert 0 < before + 1 <= lines < LINES
        assert not out.exists()
        before = lines
    last = ended_well(run("decode.run", *job))
    assert f"seconds and rates cover the {LINES - before} samples decoded in this run" in last.out
    assert out.read_bytes() == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.metrics.json"}


def test_one_of_two_is_killed_and_two_go_on(asked: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    job = (*JOB, f"input.path={asked}", f"output.path={out}")
    with started("decode.run", *job, count=2, devices=1) as processes:
        wait_for(out, random.randrange(1, LINES // 2), processes)
        processes[1].kill()
        begin = time.monotonic()
        other = finished(processes[0])
        assert time.monotonic() - begin < 6 * LOST
    assert 0 < done_lines(out) < LINES
    assert other.code == 1
    assert len(other.errors) == 1, other.err
    ended_well(run("decode.run", *job, count=2, devices=1))
    assert out.read_bytes() == undisturbed


def test_sigterm_to_one_ends_both_with_0_and_the_job_goes_on(asked: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    job = (*JOB, f"input.path={asked}", f"output.path={out}")
    with started("decode.run", *job, count=2, devices=1) as processes:
        wait_for(out, random.randrange(1, LINES // 2), processes)
        for _ in range(2):
            processes[1].send_signal(signal.SIGTERM)
        ended = [finished(process) for process in processes]
    lines = done_lines(out)
    assert 0 < lines < LINES
    assert [each.code for each in ended] == [0, 0]
    told = f"stopped: {lines} of {LINES} lines are done; start the same command again to go on"
    assert ended[0].err.splitlines()[-1] == told
    assert ended[0].err.count("\n") == 2  # and the end tokens
    assert ended[1].err == ""
    ended_well(run("decode.run", *job))
    assert out.read_bytes() == undisturbed
