"""Imitates gcloud on a folder, $CLOUD: `machine` is the home of the only worker, `state` its state, and a `bucket`.

A machine that is not ACTIVE can neither be reached nor reach the bucket.
"""

import os
import pathlib
import shutil
import subprocess
import sys

cloud = pathlib.Path(os.environ["CLOUD"])
state, machine = cloud / "state", cloud / "machine"
words = sys.argv[1:]
name = " ".join(words[2:4] if words[0] == "compute" else words[:2])
with open(cloud / "calls", "a") as calls:
    print(name, words[4:], file=calls)
positional = [word for word in words[4:] if not word.startswith("--")]


def place(path: str) -> pathlib.Path:
    """Where an object or a file of the worker lies."""
    if path.startswith("gs://"):
        return cloud / "bucket" / path.removeprefix("gs://").replace("/", "-")
    return machine / path.split(":", 1)[1] if ":" in path else pathlib.Path(path)


if name == "queued-resources describe":
    print(state.read_text() if state.exists() else sys.exit(1))
elif name == "queued-resources create":
    machine.mkdir()
    state.write_text("ACTIVE")
elif name == "queued-resources delete":
    state.unlink()
    shutil.rmtree(machine)
elif name == "storage cp":
    source, target = map(place, words[2:4])
    if state.exists() and state.read_text() != "ACTIVE":
        sys.exit("this machine is gone")
    if not source.exists():
        sys.exit("ERROR: The following URLs matched no objects or files:")
    shutil.copy(source, target)
elif state.read_text() != "ACTIVE":
    sys.exit("ERROR: [/usr/bin/ssh] exited with return code [255].")
elif name == "tpu-vm ssh":
    [command] = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    sys.exit(subprocess.run(["bash", "-c", command], cwd=machine, env={**os.environ, "HOME": str(machine)}).returncode)
elif name == "tpu-vm scp":
    source, target = map(place, positional)
    shutil.copytree(source, target / source.name) if source.is_dir() else shutil.copy(source, target)
