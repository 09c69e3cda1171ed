"""tpu_vm.sh and worker.sh, whole, against a cloud of one folder (gcloud.py)."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.launch.scripts import AWKWARD, LAUNCH, ROOT, TPU, call


@pytest.fixture
def cloud(tmp_path: Path) -> dict[str, str]:
    """The environment in which `gcloud` is gcloud.py, and workers have what install needs, doing nothing."""
    tools = tmp_path / "tools"
    for folder in ("tools", "bucket"):
        (tmp_path / folder).mkdir()
    uv = "mkdir -p ~/.local/bin && printf '#!/bin/sh\\n' >~/.local/bin/uv && chmod +x ~/.local/bin/uv"
    bodies = {
        "gcloud": f'exec {sys.executable} -S {Path(__file__).with_name("gcloud.py")} "$@"',
        "git": f'for word; do case $word in --output=*) tar -czf "${{word#--output=}}" -C {ROOT} launch ;; esac; done',
        "python3": uv,
        "sudo": "",
        "curl": "echo 0",
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CLOUD": str(tmp_path)}
    return {**environment, "TMPDIR": str(tmp_path)}


def calls_of(cloud: dict[str, str]) -> list[str]:
    """The names of gcloud's commands that ran, without looks at the state."""
    names = [line.split(" [")[0] for line in (Path(cloud["CLOUD"]) / "calls").read_text().splitlines()]
    return [name for name in names if not name.endswith("describe")]


def test_a_whole_run(cloud: dict[str, str]) -> None:
    """From nothing to nothing: the job's words, output and exit code arrive, and the machine is gone."""
    folder = Path(cloud["CLOUD"])
    job = ("bash", "-c", 'echo "$1" | tee out/answer; exit 3', "_", AWKWARD[3])
    options = (f"--to={folder}/results", "--poll=0", "--bucket=gs://mine")
    done = call("tpu_vm.sh", "all", *TPU, *options, "--", *job, env=cloud)
    assert done.returncode == 3, done.stderr
    assert done.stdout == AWKWARD[3] + "\n"
    with tarfile.open(folder / "bucket" / "mine-worker-0.tar") as saved:
        saved.extractall(folder, filter="data")
    for place in (folder, folder / "results"):
        assert (place / "out" / "answer").read_text() == AWKWARD[3] + "\n"
    assert calls_of(cloud)[0] == "queued-resources create"
    assert calls_of(cloud)[-2:] == ["tpu-vm scp", "queued-resources delete"]
    assert not (folder / "machine").exists()
    assert "still there" not in done.stderr


def test_a_spot_machine_that_is_taken_away(cloud: dict[str, str]) -> None:
    """The second machine has what the first one wrote, and ends the job."""
    folder = Path(cloud["CLOUD"])
    job = """
if [ -e out/part ]; then cat out/part && echo resumed >>out/part && exit; fi
echo from the first >out/part
while [ ! -e $CLOUD/bucket/mine-run-worker-0.tar ]; do sleep .1; done
printf SUSPENDED >$CLOUD/state
"""
    options = ("--spot", "--bucket=gs://mine/run", "--every=1", "--poll=0", f"--to={folder}")
    done = call("tpu_vm.sh", "all", *TPU, *options, "--", "bash", "-c", job, env=cloud)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "from the first"
    assert (folder / "out" / "part").read_text() == "from the first\nresumed\n"
    assert [calls_of(cloud).count(f"queued-resources {verb}") for verb in ("create", "delete")] == [2, 2]


@pytest.mark.slow
def test_a_decode_goes_on_on_another_spot_machine(cloud: dict[str, str]) -> None:
    """Killed between two batches of the first machine; the answers are those of an undisturbed run."""
    folder = Path(cloud["CLOUD"])
    lines = (ROOT / "dllm_jax" / "assets" / "tasks_eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(lines[:60]))
    options = ("--config.decode.batch_size=2", f"--config.input.path={folder}/prompts.jsonl")
    decode = ["python", "-m", "decode.run", "--config=threshold", *options]
    again = shlex.join([*decode, "--config.output.path=out/a.jsonl"])
    job = f"""
if [ -e $CLOUD/lost ]; then cp out/a.jsonl.partial $CLOUD/found; exec {again}; fi
{again} &
saved() {{ tar -xOf $CLOUD/bucket/mine-worker-0.tar out/a.jsonl.partial 2>/dev/null | wc -l; }}
while [ $(saved) -lt 4 ]; do sleep .1; done
kill -9 $! && touch $CLOUD/lost && printf SUSPENDED >$CLOUD/state
"""
    path = f"{Path(sys.executable).parent}:{cloud['PATH'].split(':', 1)[1]}"
    env = {**cloud, "PATH": f"{folder}/tools:{path}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    spot = ("--spot", "--bucket=gs://mine", "--every=1", "--poll=0", f"--to={folder}")
    done = call("tpu_vm.sh", "all", *TPU, *spot, "--", "bash", "-c", job, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = (folder / "found").read_text().splitlines()
    assert 3 < len(found) < 1 + 60  # with a first line for the job itself
    command = [*decode, f"--config.output.path={folder}/undisturbed.jsonl"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert (folder / "out" / "a.jsonl").read_bytes() == (folder / "undisturbed.jsonl").read_bytes()


def test_a_machine_that_is_lost_without_a_bucket(cloud: dict[str, str]) -> None:
    """`run` says so with a code of its own."""
    call("tpu_vm.sh", "create", *TPU, env=cloud)
    call("tpu_vm.sh", "install", *TPU, env=cloud)
    done = call("tpu_vm.sh", "run", *TPU, "--poll=0", "--", "bash", "-c", "printf SUSPENDED >$CLOUD/state", env=cloud)
    assert done.returncode == 75, done.stderr
    assert "was taken away" in done.stderr


def test_create_again_changes_nothing_and_failures_end(cloud: dict[str, str]) -> None:
    folder = Path(cloud["CLOUD"])
    assert call("tpu_vm.sh", "create", *TPU, env=cloud).returncode == 0
    assert call("tpu_vm.sh", "create", *TPU, env=cloud).returncode == 0
    assert calls_of(cloud) == ["queued-resources create"]
    (folder / "state").write_text("FAILED")
    done = call("tpu_vm.sh", "all", *TPU, "--keep", "--", "true", env=cloud)
    assert done.returncode == 1
    assert "apd is FAILED" in done.stderr
    assert "perhaps still there, and paid for: launch/tpu_vm.sh delete --name=apd --zone=us-west4-a" in done.stderr
    done = call("tpu_vm.sh", "all", *TPU, "--spot", "--bucket=gs://b", "--", "true", env=cloud)
    assert (done.returncode, done.stderr) == (1, "apd is FAILED: delete it, then create it\n")
    assert calls_of(cloud) == ["queued-resources create", "queued-resources delete"]


def test_one_job_on_a_machine_that_can_be_stopped(cloud: dict[str, str]) -> None:
    folder = Path(cloud["CLOUD"])
    clone = folder / "dllm_jax"
    shutil.copytree(LAUNCH, clone / "launch")

    def worker(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(clone / "launch" / "worker.sh"), *arguments]
        return subprocess.run(command, env=cloud, capture_output=True, text=True, timeout=120)

    assert worker("status").stdout == "none\n"
    job = ("bash", "-c", 'trap "echo stopped; exit 0" TERM; echo ready; while :; do sleep .1; done')
    assert worker("start", "--", *job).returncode == 0
    while "ready" not in (clone / "out" / "job.log").read_text():
        assert worker("status").stdout == "running\n"
    assert worker("start", "--", *job).returncode == 0  # the same: it goes on
    assert "error: start: expected no job, got bash -c " in worker("start", "--", "true").stderr
    assert worker("stop").returncode == 0
    assert worker("wait").returncode == 0
    assert worker("follow").stdout == "ready\nstopped\n"
    assert worker("status").stdout == "ended 143\n"
    assert worker("start", "--", "echo", "again").returncode == 0
    assert worker("follow").stdout == "again\n"  # from its own start on
    assert worker("status").stdout == "ended 0\n"


def test_what_is_in_the_bucket_is_not_overwritten(cloud: dict[str, str]) -> None:
    """A bucket that cannot be read ends the start; only an empty one begins anew."""
    folder = Path(cloud["CLOUD"])
    clone = folder / "dllm_jax"
    shutil.copytree(LAUNCH, clone / "launch")
    (folder / "tools" / "gcloud").write_text("#!/bin/sh\necho 'ERROR: 403' >&2\nexit 1\n")
    command = ["bash", str(clone / "launch" / "worker.sh"), "start", "--bucket=gs://mine", "--", "true"]
    done = subprocess.run(command, env=cloud, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "ERROR: 403\n")
    assert not (clone / ".job" / "pid").exists()
