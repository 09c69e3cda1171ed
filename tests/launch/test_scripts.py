"""The scripts of launch/: what they say, what they would run, which signals and exit codes they pass on; the pages."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.launch.scripts import AWKWARD, LAUNCH, ROOT, TPU, call

SCRIPTS = ("tpu_vm.sh", "worker.sh", "start.sh", "gke/xpk.sh", "slurm.sbatch")
SHELL = [LAUNCH / name for name in (*SCRIPTS, "common.sh", "flags.env")] + [ROOT / ".ci" / "run"]
PAGES = (LAUNCH / "README.md", LAUNCH / "FILTER.md", LAUNCH / "gke" / "README.md")
XPK = ("--cluster=c", "--zone=us-west4-a", "--project=p", "--workload=w", "--image=i", "--storage=s")


def would_run(script: str, *arguments: str) -> list[list[str]]:
    """The commands that --dry-run prints, as a shell would read them; in an environment without gcloud and the like."""
    tools = ("bash", "dirname", "cat", "env", "mkdir")
    path = ":".join({str(Path(found).parent) for tool in tools if (found := shutil.which(tool))})
    done = call(script, *arguments, env={"PATH": path, "HOME": "/nowhere"})
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def verbs_of(script: str) -> list[str]:
    """What its last `case` tells apart."""
    text = (LAUNCH / script).read_text()
    return re.findall(r"^([a-z-]+)\)(?! # internal)", text, flags=re.MULTILINE)


def ssh_commands(commands: list[list[str]]) -> list[list[str]]:
    """What runs on the workers, behind `cd dllm_jax &&`."""
    texts = [word.removeprefix("--command=") for words in commands for word in words if word.startswith("--command=")]
    return [shlex.split(text.removeprefix("cd dllm_jax && ")) for text in texts]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script: str) -> None:
    done = call(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    options = set(re.findall(r"^    (--[a-z-]+)(?:=\*)?\)", (LAUNCH / script).read_text(), flags=re.MULTILINE))
    assert {"--help", "--dry-run"} <= options
    for option in options:
        assert re.search(rf"{option}\b", done.stdout), option


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_verb_is_in_the_help(script: str) -> None:
    told = call(script, "--help").stdout
    for verb in verbs_of(script):
        assert re.search(rf"^  {verb}\b", told, flags=re.MULTILINE), verb


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_are_one_line(script: str) -> None:
    done = call(script, "--no-such-option")
    assert done.returncode == 2
    assert done.stderr == "error: --no-such-option: unknown option (see --help)\n"
    assert not done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("tpu_vm.sh", ("create", "--zone=z"), "--name: expected the name of the machine, got none"),
        ("tpu_vm.sh", ("create", *TPU, "--type=v9-8"), "--runtime: expected the software of a v9-8, got none"),
        ("tpu_vm.sh", ("run", *TPU), "run: expected arguments behind --, got none"),
        ("tpu_vm.sh", ("create", *TPU, "--", "x"), "create: expected no arguments, got x"),
        ("tpu_vm.sh", ("logs", "stop", *TPU), "expected one verb, got logs and stop (arguments come behind --)"),
        ("tpu_vm.sh", TPU, "expected a verb, got nothing (see --help)"),
        (
            "tpu_vm.sh",
            ("all", "--spot", *TPU, "--", "x"),
            "--bucket: expected where a spot machine's outputs survive it, got none",
        ),
        ("worker.sh", ("start",), "start: expected -- COMMAND"),
        ("start.sh", ("tpu",), "start.sh: expected a platform and a command (see --help)"),
        ("start.sh", ("npu", "true"), "platform: expected tpu or gpu, got npu"),
        ("gke/xpk.sh", ("run", *XPK[:3], "--", "x"), "--workload: needed for run (see --help)"),
        ("slurm.sbatch", (), "slurm.sbatch: expected a command, got none (see --help)"),
    ],
)
def test_other_mistakes(script: str, arguments: tuple[str, ...], told: str) -> None:
    done = call(script, *arguments)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {told}\n", "")


def test_tpu_vm_in_the_order_of_the_work() -> None:
    commands = would_run("tpu_vm.sh", "all", *TPU, "--project=p", "--to=results", "--dry-run", "--", *AWKWARD)
    steps = [" ".join(words[3:5] if words[0] == "gcloud" else words[:1]) for words in commands]
    assert steps == [
        "queued-resources create",
        "queued-resources describe",
        "git",
        *["tpu-vm scp"],
        *["tpu-vm ssh"] * 6,
        "mkdir",
        "tpu-vm scp",
        "queued-resources delete",
    ]
    where = ["--zone=us-west4-a", "--project=p"]
    assert all(words[-2:] == where for words in commands if words[0] == "gcloud")
    create = ["--node-id=apd", "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert commands[0] == ["gcloud", "compute", "tpus", "queued-resources", "create", "apd", *create, *where]
    assert commands[-1][5:8] == ["apd", "--force", "--quiet"]
    start = ssh_commands(commands)[2]
    assert start == ["launch/worker.sh", "start", "--", *AWKWARD]


def test_tpu_vm_spot_with_a_bucket() -> None:
    options = ("--spot", "--bucket=gs://mine/run 1", "--every=60", "--type=v6e-16", "--keep", "--dry-run")
    commands = would_run("tpu_vm.sh", "all", *TPU, *options, "--", *AWKWARD)
    assert {"--spot", "--runtime-version=v2-alpha-tpuv6e"} <= set(commands[0])
    started = ["launch/worker.sh", "start", "--bucket=gs://mine/run 1", "--every=60", "--", *AWKWARD]
    assert started in ssh_commands(commands)
    assert not any("delete" in words for words in commands)


def test_tpu_vm_single_steps() -> None:
    assert ssh_commands(would_run("tpu_vm.sh", "each", *TPU, "--dry-run", "--", *AWKWARD)) == [
        ["launch/start.sh", "tpu", *AWKWARD]
    ]
    [push] = would_run("tpu_vm.sh", "push", *TPU, "--dry-run", "--", "my prompts.jsonl")
    assert push[5:] == ["my prompts.jsonl", "apd:dllm_jax/", "--recurse", "--worker=all", "--zone=us-west4-a"]
    assert ssh_commands(would_run("tpu_vm.sh", "stop", *TPU, "--dry-run")) == [["launch/worker.sh", "stop"]]


def test_other_scripts_keep_arguments_apart() -> None:
    [workload] = would_run("gke/xpk.sh", "run", *XPK, "--dry-run", "--", *AWKWARD)
    assert workload[:3] == ["xpk", "workload", "create"]
    [command] = [word.removeprefix("--command=") for word in workload if word.startswith("--command=")]
    assert shlex.split(command) == ["exec", "launch/start.sh", "tpu", *AWKWARD]
    *_, srun = would_run("slurm.sbatch", "--dry-run", *AWKWARD)
    assert srun == ["srun", "--kill-on-bad-exit=1", "launch/start.sh", "gpu", *AWKWARD]
    [started] = would_run("start.sh", "--dry-run", "gpu", *AWKWARD)
    assert started[0] == "env"
    assert started[-len(AWKWARD) :] == AWKWARD
    assert would_run("worker.sh", "start", "--dry-run", "--", *AWKWARD) == [["launch/start.sh", "tpu", *AWKWARD]]
    assert [words[0] for words in would_run("worker.sh", "install", "--dry-run")][-1] == "sudo"


@pytest.mark.parametrize(
    "verb", re.findall(r"^([a-z-]+)\)", (LAUNCH / "gke" / "xpk.sh").read_text(), flags=re.MULTILINE)
)
def test_xpk_verbs(verb: str) -> None:
    arguments = ("--", "true") if verb == "run" else ()
    [command] = would_run("gke/xpk.sh", verb, *XPK, "--dry-run", *arguments)
    assert command[0] == "xpk"
    assert set(XPK[:3]) <= set(command)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_is_clean(path: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    command = [shellcheck, "-x", str(path.relative_to(ROOT))] if shellcheck else ["bash", "-n", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- start.sh: flags, signals, exit codes


def test_flags_that_are_set_stay() -> None:
    given = {**os.environ, "XLA_FLAGS": "--mine", "JAX_PLATFORMS": "", "XLA_CLIENT_MEM_FRACTION": ".5"}
    printed = call("start.sh", "gpu", "env", env=given).stdout.splitlines()
    assert {"XLA_FLAGS=--mine", "JAX_PLATFORMS=", "XLA_CLIENT_MEM_FRACTION=.5"} <= set(printed)


def test_xla_knows_the_flags() -> None:
    [command] = would_run("start.sh", "--dry-run", "gpu", sys.executable, "-c", "import jax; print(jax.devices())")
    [flags] = [word for word in command if word.startswith("XLA_FLAGS=")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.removeprefix("XLA_FLAGS=")}
    done = subprocess.run(command[command.index(sys.executable) :], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # an unknown flag aborts the process


@pytest.mark.parametrize(("stopped", "ends_with", "code"), [(0, 0, 0), (0, 3, 3), (1, 0, 143), (1, 1, 1)])
def test_start_passes_sigterm_once(stopped: int, ends_with: int, code: int) -> None:
    """Sent to the process group, as Slurm does, and again, as a machine that goes down does."""
    command = f"""
import signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
print("ready", flush=True)
while len(got) < {stopped}:
    time.sleep(.01)
print("go on", flush=True)
sys.stdin.readline()
time.sleep(.3)
print(len(got), flush=True)
sys.exit({ends_with})
"""
    started = ["bash", LAUNCH / "start.sh", "tpu", sys.executable, "-c", command]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(started, **pipes, text=True, start_new_session=True) as process:
        assert process.stdin
        assert process.stdout
        for line in ("ready\n", "go on\n"):
            assert process.stdout.readline() == line
            if stopped:
                os.killpg(process.pid, signal.SIGTERM)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{stopped}\n"
        assert process.wait(60) == code


def test_slurm_requeues_what_stopped_early(tmp_path: Path) -> None:
    for name, body in (("srun", 'exit "$CODE"'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "launch").symlink_to(LAUNCH)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path / "clone")}
    for code, requeued in ((0, ""), (1, ""), (143, "scontrol requeue 7\n")):
        done = call("slurm.sbatch", "true", env={**slurm, "CODE": str(code)})
        assert (done.returncode, done.stdout) == (code, requeued)


def test_slurm_is_submitted_from_the_clone(tmp_path: Path) -> None:
    done = call("slurm.sbatch", "true", env={**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: slurm.sbatch: expected to be submitted from the clone")


# ---- manifests, images, pages


def test_jobset() -> None:
    claim, jobset = yaml.safe_load_all((LAUNCH / "gke" / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == "IMAGE"
    assert container["args"][:3] == ["python", "-m", "decode.run"]
    assert "--config.distributed.auto=true" in container["args"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == rows * columns
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    [volume] = pod["volumes"]
    [mount] = container["volumeMounts"]
    assert (mount["name"], volume["persistentVolumeClaim"]["claimName"]) == (volume["name"], claim["metadata"]["name"])
    outputs = [word for word in container["args"] if word.startswith("--config.output.path=")]
    assert f"/dllm_jax/{outputs[0].split('=')[1]}".startswith(f"{mount['mountPath']}/")


def test_dockerfile() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target, platform in (("cuda", "gpu"), ("tpu", "tpu")):
        stage = re.split(r"^FROM ", text, flags=re.MULTILINE)
        [body] = [part for part in stage if part.splitlines()[0].endswith(f" AS {target}")]
        assert set(re.findall(r"\[(.*?)\]'", body)[0].split(",")) <= set(extras)
        assert target in re.findall(r"\[(.*?)\]'", body)[0].split(",")
        assert f'ENTRYPOINT ["launch/start.sh", "{platform}"]' in body


def commands_of(page: Path) -> list[str]:
    """The commands in a page's blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(LAUNCH)))
def test_pages_name_what_is_there(page: Path) -> None:
    text = page.read_text()
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert modules
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    settings = "".join(path.read_text() for path in (ROOT / "dllm_jax").rglob("*.py"))
    for field in re.findall(r"--config\.\w+\.(\w+)", text):
        assert re.search(rf"^    {field}: \w+ = setting\(", settings, re.MULTILINE), field
    for config in re.findall(r"configs/[\w/]+\.py", text):
        assert (ROOT / config).exists(), config
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(LAUNCH)))
def test_commands_of_the_pages_run_dry(page: Path) -> None:
    """Every command of ours in a page is one that its script takes, and the page ends with the way out."""
    ours = [shlex.split(line, comments=True) for line in commands_of(page) if line.startswith("launch/")]
    for script, verb, *rest in ours:
        would_run(script.removeprefix("launch/"), verb, "--dry-run", *rest)
    if page.name != "README.md" or page.parent == LAUNCH:
        assert [words[1] for words in ours if words[0] == "launch/tpu_vm.sh"].count("delete") == 1
