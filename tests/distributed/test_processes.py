"""Real processes on this machine with CPU devices: they give what one process gives, byte for byte, and end alike."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dllm_jax.checkpoints.load import ASSETS
from tests.checkpoints.folders import one_layer
from tests.checkpoints.peft import drawn, named, written
from tests.distributed.processes import LIMIT, LOST, ended_well, finished, run, started
from tests.training.commands import FROM_FOLDER, lines, weights

pytestmark = pytest.mark.slow
SHORT = ("--config=threshold", "decode.gen_length=32", "decode.batch_size=4")
TRAINED = (
    "network.num_layers=1",
    "network.embed_dim=16",
    "network.mlp_dim=32",
    "data.samples=100",
    "data.eval_samples=5",
    "decode.gen_length=16",
    "decode.block_length=16",
    "decode.batch_size=8",
    "train.steps=6",
    "train.batch_size=4",
    "train.warmup_steps=1",
    "train.log_every=2",
    "train.eval_every=4",
    "train.checkpoint_every=2",
)
DIFFUSION = (*FROM_FOLDER, *(setting for setting in TRAINED if not setting.startswith("network.")))
FITTED = (
    "data.prompts=9",
    "data.eval_prompts=4",
    "decode.gen_length=16",
    "decode.block_length=8",
    "decode.batch_size=4",
    "fit.epochs=40",
    "fit.checkpoint_every=10",
    "report.thresholds=0.5",
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of one process."""
    path = tmp_path_factory.mktemp("one") / "out.jsonl"
    ended_well(run("decode.run", *SHORT, "mesh.data=1", f"output.path={path}"))
    return path.read_bytes()


@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_a_mesh_over_two_processes(axis: str, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    ended_well(run("decode.run", *SHORT, f"mesh.{axis}=4", f"output.path={path}", count=2))
    assert path.read_bytes() == expected
    assert not [file.name for file in tmp_path.iterdir() if file.name not in ("out.jsonl", "out.jsonl.metrics.json")]


def test_slots_are_refilled_over_two_processes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    job = (*SHORT, "decode.cache=none")
    ended_well(run("decode.run", *job, "mesh.data=1", "decode.refill=0", f"output.path={one}"))
    ended_well(run("decode.run", *job, "mesh.data=4", "decode.refill=0.25", f"output.path={two}", count=2))
    assert two.read_bytes() == one.read_bytes()


def test_an_adapter_over_two_processes(tmp_path: Path) -> None:
    """On some of the devices, half of them of each process."""
    one, two, folder = tmp_path / "one.jsonl", tmp_path / "two.jsonl", ASSETS / "llada-tiny"
    adapter = written(tmp_path / "adapter", named(drawn(folder, ("q_proj", "v_proj", "attn_out", "ff_out"))))
    job = (*SHORT, f"model.adapter={adapter}")
    ended_well(run("decode.run", *job, "mesh.data=1", f"output.path={one}"))
    ended_well(run("decode.run", *job, "mesh.tensor=2", f"output.path={two}", count=2))
    assert two.read_bytes() == one.read_bytes()


def test_evaluation_by_four_processes_on_all_axes(tmp_path: Path) -> None:
    one, four, tasks = tmp_path / "one.jsonl", tmp_path / "four.jsonl", tmp_path / "tasks.jsonl"
    tasks.write_text("\n".join((ASSETS / "tasks_eval.jsonl").read_text().splitlines()[::40]))
    job = (*SHORT, f"input.path={tasks}")
    ended_well(run("decode.eval", *job, "mesh.data=1", f"output.path={one}"))
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    ended_well(run("decode.eval", *job, *mesh, f"output.path={four}", count=4))
    assert four.read_bytes() == one.read_bytes()
    metrics = [json.loads(Path(f"{path}.metrics.json").read_text()) for path in (one, four)]
    assert metrics[0]["accuracy_by_task"] == metrics[1]["accuracy_by_task"]


def test_results_on_the_standard_output_are_those_of_process_0(expected: bytes) -> None:
    assert ended_well(run("decode.run", *SHORT, "mesh.data=2", count=2)).out.encode() == expected


def test_a_mistake_of_all_is_told_once() -> None:
    first, second = run("decode.run", *SHORT, "mesh.data=4", "input.path=/no/such/file", count=2)
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("\n") == 1, first.err
    assert first.err.startswith("error: input.path: expected a readable file")
    assert (first.out, second.out, second.err) == ("", "", "")


def test_a_mistake_of_another_process_is_told_by_process_0(tmp_path: Path) -> None:
    inputs = [f"input.path={ASSETS / 'prompts.jsonl'}", "input.path=/no/such/file"]
    path = tmp_path / "out.jsonl"
    first, second = run("decode.run", *SHORT, "mesh.data=4", inputs, f"output.path={path}", count=2)
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("\n") == 1, first.err
    assert first.err.startswith("error: process 1: input.path: expected a readable file")
    assert (first.out, second.out, second.err) == ("", "", "")
    assert {file.name for file in tmp_path.iterdir()} <= {"out.jsonl.lock"}  # nothing but what a killed job may leave


def test_other_prompts_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text((ASSETS / "prompts.jsonl").read_text().partition("\n")[0])
    inputs = [f"input.path={ASSETS / 'prompts.jsonl'}", f"input.path={tmp_path / 'few.jsonl'}"]
    first, second = run("decode.run", *SHORT, "mesh.data=4", inputs, count=2)
    assert (first.code, second.code) == (2, 2)
    assert first.errors == [
        "error: process 1: distributed: expected the settings, files and prompts of process 0 in all processes, got "
        "other prompts"
    ]


def test_when_process_0_is_killed_the_other_ends_and_the_job_can_go_on(tmp_path: Path) -> None:
    lines = (ASSETS / "tasks_eval.jsonl").read_text().splitlines()[::40]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    path, undisturbed = tmp_path / "out.jsonl", tmp_path / "undisturbed.jsonl"
    job = ("--config=vanilla", "decode.gen_length=64", "decode.batch_size=2", f"input.path={tmp_path / 'in.jsonl'}")
    partial = Path(f"{path}.partial")
    with started("decode.run", *job, "mesh.tensor=2", f"output.path={path}", count=2) as processes:
        wait_for(partial, processes)
        processes[0].kill()
        begin = time.monotonic()
        done = finished(processes[1])
        assert time.monotonic() - begin < 6 * LOST
    assert done.code == 1
    assert len(done.errors) == 1, done.err
    assert done.err.count("\n") == 1, done.err
    assert done.errors[0].startswith("error: process 0 ")
    assert 0 < partial.read_bytes().count(b"\n") - 1 < len(lines)
    for output in (path, undisturbed):  # one process goes on with what two began
        ended_well(run("decode.run", *job, "mesh.tensor=2", f"output.path={output}"))
    assert path.read_bytes() == undisturbed.read_bytes()


def wait_for(partial: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Waits for the first rows."""
    for _ in range(LIMIT * 20):
        if partial.exists() and partial.read_bytes().count(b"\n") > 2:
            return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    raise AssertionError("no rows")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.path={one_layer(ASSETS / 'llada-tiny', tmp_path_factory.mktemp('teacher'))}"


def test_a_verifier_of_two_processes(teacher: str, tmp_path: Path) -> None:
    for name, count, devices in (("one", 1, 2), ("two", 2, 1)):
        output = f"output.path={tmp_path / name}"
        ended_well(run("train.verifier", *TRAINED, teacher, "mesh.fsdp=2", output, count=count, devices=devices))
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()
    assert {path.name for path in (tmp_path / "two.training").iterdir()} == {"metrics.jsonl", "tensorboard"}


@pytest.mark.parametrize(
    "way", [("train.microbatches=2", "train.ema=0.5"), ("lora.rank=2", "train.optimizer=adamw")], ids=str
)
def test_a_diffusion_model_of_two_processes(teacher: str, tmp_path: Path, way: tuple[str, ...]) -> None:
    for name, count, devices in (("one", 1, 2), ("two", 2, 1)):
        job = (*DIFFUSION, *way, teacher, "mesh.fsdp=2", f"output.path={tmp_path / name}")
        ended_well(run("train.diffusion", *job, count=count, devices=devices))
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    assert lines(tmp_path / "two.training") == lines(tmp_path / "one.training")


def test_a_training_that_is_asked_to_end_goes_on(teacher: str, tmp_path: Path) -> None:
    job = (
        *DIFFUSION,
        teacher,
        "train.log_every=1",
        "mesh.fsdp=2",
        "train.steps=60",
        "train.eval_every=60",
        "train.checkpoint_every=50",
    )
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    metrics = tmp_path / "cut.training" / "metrics.jsonl"
    with started("train.diffusion", *job, f"output.path={cut}", count=2, devices=1) as processes:
        while not (metrics.exists() and metrics.read_text()):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)
        ended = [finished(process) for process in processes]
    assert [each.code for each in ended] == [0, 0], ended
    told = re.fullmatch(r"stopped after step (\d+) of 60; .* to go on", ended[0].err.splitlines()[-1])
    assert told, ended[0].err
    assert lines(tmp_path / "cut.training")[-1]["step"] == int(told[1]) < 60
    assert not cut.exists()
    ended_well(run("train.diffusion", *job, f"output.path={cut}", count=2, devices=1))
    ended_well(run("train.diffusion", *job, f"output.path={whole}"))
    assert weights(cut) == weights(whole)


def test_a_filter_of_two_and_of_four_processes(teacher: str, tmp_path: Path) -> None:
    for name, count, devices in (("one", 1, 2), ("two", 2, 1)):
        output = f"output.path={tmp_path / name}"
        ended_well(run("train.filter", *FITTED, teacher, "mesh.data=2", output, count=count, devices=devices))
    unreported = ("data.eval_prompts=0", teacher, "mesh.data=4", f"output.path={tmp_path / 'four'}")
    ended_well(run("train.filter", *FITTED, *unreported, count=4, devices=1))
    one, two, four = (
        {path.name: path.read_bytes() for path in (tmp_path / f"{name}.training" / "records").iterdir()}
        for name in ("one", "two", "four")
    )
    assert len(one) == 4  # of three batches, and what they are of
    assert two == one
    assert {**four, "records.json": one["records.json"]} == one  # which names the mesh
    fitted = [(tmp_path / name / "filter.safetensors").read_bytes() for name in ("one", "two", "four")]
    assert fitted == fitted[:1] * 3


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process converted."""
    target = tmp_path_factory.mktemp("converted") / "model"
    ended_well(run("dllm_jax.checkpoints.convert", f"--source={ASSETS / 'llada-tiny'}", f"--target={target}"))
    return target


def test_what_one_process_converted_is_restored_by_several(converted: Path, expected: bytes, tmp_path: Path) -> None:
    settings = (*SHORT, f"model.path={converted}", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    ended_well(run("decode.run", *settings, f"output.path={tmp_path / 'out.jsonl'}", count=4))
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_what_two_processes_saved_is_restored_by_one_and_by_four(expected: bytes, tmp_path: Path) -> None:
    model = tmp_path / "model"
    source = f"model.path={ASSETS / 'llada-tiny'}"
    ended_well(run("tests.distributed.save", source, "mesh.fsdp=2", "mesh.tensor=2", f"output.path={model}", count=2))
    for count, mesh in ((1, "mesh.tensor=2"), (4, "mesh.data=4")):
        path = tmp_path / f"{count}.jsonl"
        ended_well(run("decode.run", *SHORT, f"model.path={model}", mesh, f"output.path={path}", count=count))
        assert path.read_bytes() == expected


def test_a_training_of_two_processes_is_continued_by_one(teacher: str, tmp_path: Path) -> None:
    job = (*TRAINED, teacher, "mesh.fsdp=2", "train.steps=60", "train.eval_every=60")
    with started("train.verifier", *job, f"output.path={tmp_path / 'cut'}", count=2, devices=1) as processes:
        while not list((tmp_path / "cut.training" / "checkpoints").glob("[0-9]*")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        for process in processes:
            process.kill()
    assert not (tmp_path / "cut").exists()
    for name in ("cut", "whole"):
        ended_well(run("train.verifier", *job, f"output.path={tmp_path / name}"))
    cut, whole = (tmp_path / name / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()
