"""train.diffusion from its flags to its folder: what it exports, that it can be cut off, what it refuses."""

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import decode.run
import dllm_jax
from dllm_jax import cli
from dllm_jax.checkpoints import files
from dllm_jax.data import text
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model, shape_model
from dllm_jax.settings import TokenizerSettings
from dllm_jax.training import distill
from dllm_jax.training.corpus import Corpus
from dllm_jax.training.diffusion import held_out
from dllm_jax.training.diffusion import train as module
from dllm_jax.training.diffusion.config import DataSettings, DiffusionTraining
from dllm_jax.training.trainer import Trainer, TrainState
from tests.checkpoints.folders import GQA, same_bits, tensors
from tests.traces import GOLDENS
from tests.training.commands import ROOT, Execute, Refused, lines, weights, written
from train.diffusion import main

TOKENS = np.arange(1, 21).reshape(2, 10)
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.batch_size=8")
SLOW = pytest.mark.slow
SMALL = ("network.scratch=true", "network.num_layers=2", "network.embed_dim=32", "network.num_heads=2")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """The models that were trained, as they are written."""
    models: list[Model] = []

    def export(config: Any, trainer: Trainer, state: TrainState, *args: Any, **rest: Any) -> None:
        models.append(trainer.model(state))
        original(config, trainer, state, *args, **rest)

    original = module.export
    monkeypatch.setattr(module, "export", export)
    return models


@pytest.fixture
def cut_at_three(execute: Execute, stop_after: Callable[[int | None], None]) -> Callable[..., None]:
    """Call it with settings: a run that fails behind its third step, and goes on when it is started again."""

    def run(*settings: str) -> None:
        stop_after(3)
        with pytest.raises(RuntimeError, match="power cut"):
            execute(*settings)
        stop_after(None)
        assert execute(*settings) == 0

    return run


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of two turns."""
    turns = (("user", "Sort the list: {}, oak."), ("assistant", "oak"), ("user", "{}?"), ("assistant", "{}."))
    return [
        {"messages": [{"role": role, "content": text.format(chr(97 + i))} for role, text in turns]}
        for i in range(count)
    ]


@pytest.mark.usefixtures("no_decoding")
def test_it_exports_what_it_trained(execute: Execute, exported: list[Model], teacher: Path, tmp_path: Path) -> None:
    assert execute("network.max_length=700", "train.learning_rate=0.1") == 0
    loaded = dllm_jax.load_model(tmp_path / "out")
    assert loaded.config == dataclasses.replace(dllm_jax.load_model(teacher).config, max_length=700)
    logits = dllm_jax.logits(loaded, TOKENS)
    assert np.array_equal(logits, dllm_jax.logits(exported[0], TOKENS))
    assert not np.allclose(logits, dllm_jax.logits(dllm_jax.load_model(teacher), TOKENS), atol=0.1)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in teacher.iterdir() if path.suffix != ".md"} | {"metrics.json"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["config"]["train"]["steps"], metrics["held_out_samples"]) == (6, 5)
    assert {path.name for path in (tmp_path / "out.training").iterdir()} == {"metrics.jsonl", "tensorboard"}
    told = [(line["step"], line["group"]) for line in lines(tmp_path / "out.training")]
    assert told == [(2, "train"), (4, "train"), (4, "held_out"), (6, "train"), (6, "held_out")]
    assert lines(tmp_path / "out.training")[-1]["loss"] == metrics["loss"]


@pytest.mark.usefixtures("no_decoding")
def test_a_shape_of_its_own(execute: Execute, exported: list[Model], tmp_path: Path) -> None:
    assert execute(*SMALL, "network.mlp_dim=48", "network.max_length=200", "train.steps=2") == 0
    loaded = dllm_jax.load_model(tmp_path / "out")
    shape = loaded.config
    sizes = (shape.num_layers, shape.embed_dim, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.mlp_dim)
    assert (*sizes, shape.max_length) == (2, 32, 2, 2, 16, 48, 200)
    assert np.array_equal(dllm_jax.logits(loaded, TOKENS), dllm_jax.logits(exported[0], TOKENS))


@pytest.mark.slow
def test_what_it_measures_is_what_decode_run_does(execute: Execute, tmp_path: Path) -> None:
    assert execute("data.eval_samples=4", "output.overwrite=true") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"loss", "token_accuracy", "tokens_per_forward", "accuracy", "accuracy_sort"} <= set(metrics)
    job = ("decode.gen_length=16", "decode.block_length=16", f"output.path={tmp_path / 'answers.jsonl'}")
    flags = [f"--config.{setting}" for setting in (f"model.path={tmp_path / 'out'}", *job)]
    assert (
        cli.execute(decode.run.main, ["decode.run", *flags], description="", default_config="configs/threshold.py") == 0
    )
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 8


WAYS = {
    "plain": ("train.microbatches=2", "train.ema=0.9", "train.remat=true", "data.buckets=100,128"),
    "mesh": (*MESH, "train.microbatches=2", "train.ema=0.9", "train.remat=true", "data.buckets=128"),
}
OTHERS = {
    "adapter": ("lora.rank=2", "lora.targets=q_proj,ff_out", "train.ema=0.5"),
    "packed": ("data.packed=true", "data.length=192"),
    "muon on a mesh": (*MESH, "train.optimizer=muon"),
    "adapter on a mesh": (*MESH, "lora.rank=2"),
}


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=SLOW) for way in OTHERS)])
def test_an_interrupted_run_ends_with_the_same_bits(
    execute: Execute, cut_at_three: Callable[..., None], tmp_path: Path, way: str
) -> None:
    assert execute(*(WAYS | OTHERS)[way], f"output.path={tmp_path / 'whole'}") == 0
    cut_at_three(*(WAYS | OTHERS)[way])
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert lines(tmp_path / "out.training") == lines(tmp_path / "whole.training")


def test_a_measurement_that_was_cut_off_is_made_when_the_run_goes_on(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(held_out.HeldOut, "__call__", lambda *_: dict.fromkeys(("loss", "token_accuracy"), 1.0))
    assert execute("train.checkpoint_every=5", f"output.path={tmp_path / 'whole'}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(held_out.HeldOut, "__call__", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            execute("train.checkpoint_every=5")
    assert execute("train.checkpoint_every=5") == 0
    assert lines(tmp_path / "out.training") == lines(tmp_path / "whole.training")


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("mesh", [(), pytest.param(MESH, marks=SLOW)], ids=["one device", "mesh"])
def test_an_adapter_is_what_the_base_model_lacks(
    execute: Execute, exported: list[Model], teacher: Path, tmp_path: Path, mesh: tuple[str, ...]
) -> None:
    before = tensors(teacher)
    settings = (*mesh, "lora.rank=4", "lora.alpha=8", "train.learning_rate=0.1", "train.steps=3")
    assert execute(*settings) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "metrics.json"}
    trained = dllm_jax.logits(exported[0], TOKENS)
    adapted = dllm_jax.logits(dllm_jax.load_model(teacher, adapter=tmp_path / "out"), TOKENS)
    np.testing.assert_allclose(adapted, trained, rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - dllm_jax.logits(dllm_jax.load_model(teacher), TOKENS)).max() > 0.05
    assert same_bits(tensors(teacher), before)
    assert execute(*settings, "lora.merge=true", f"output.path={tmp_path / 'merged'}") == 0
    merged = dllm_jax.logits(dllm_jax.load_model(tmp_path / "merged"), TOKENS)
    np.testing.assert_allclose(merged, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_decoding")
def test_the_weights_it_began_with_are_let_go(execute: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would lie beside the ones that are trained: of a new run, and of one that goes on."""
    opened: list[weakref.ref[Any]] = []

    def open_text_model(*args: Any, open_text_model: Any = module.open_text_model) -> Any:
        found = open_text_model(*args)
        opened.append(weakref.ref(jax.tree.leaves(found[0].params)[0]))
        return found

    def step(self: Trainer, *args: Any, step: Any = Trainer.step) -> Any:
        alive.append(opened[-1]() is not None)
        if len(alive) == 4:
            raise RuntimeError("power cut")
        return step(self, *args)

    alive: list[bool] = []
    monkeypatch.setattr(module, "open_text_model", open_text_model)
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="power cut"):
        execute()
    assert execute() == 0
    assert (len(opened), len(alive)) == (2, 8)  # from the checkpoint of step 2 on
    assert not any(alive)


@pytest.mark.usefixtures("no_decoding")
def test_a_run_is_finished_continued_or_refused(
    execute: Execute,
    refused: Refused,
    stop_after: Callable[[int | None], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(3)
    with pytest.raises(RuntimeError):
        execute()
    stop_after(None)
    expected = "the interrupted run in out.training to have the same settings, got objective.padding_weight 1.0 instead"
    assert expected in refused("objective.padding_weight=0")
    assert "got lora.rank 0 instead of 2" in refused("lora.rank=2")
    assert execute() == 0
    first = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_start", lambda *args: pytest.fail("the model was loaded"))
        assert execute() == 0
        assert capsys.readouterr() == (first, f"finished already: {tmp_path / 'out'}\n")
        assert "got data.spread True instead of False (output.overwrite=true replaces" in refused("data.spread=false")
    before = weights(tmp_path / "out")
    assert execute("data.spread=false", "data.full_share=0", "output.overwrite=true") == 0
    assert weights(tmp_path / "out") != before


@pytest.mark.usefixtures("no_decoding")
def test_it_learns_chats_and_leaves_bad_lines_out(
    execute: Execute, refused: Refused, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad: list[dict[str, Any]] = [{"prompt": "hi"}, {"prompt": "oak " * 99, "answer": "oak " * 99}]
    path = written(tmp_path, [*chats(20), *bad])
    assert "own.jsonl:21: answer: expected a string that is not empty" in refused(f"data.path={path}")
    assert execute(f"data.path={path}", "data.on_error=skip", "train.steps=2") == 0
    assert "left out 2 bad input line(s)" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["held_out_samples"], metrics["training_samples"]) == (2, 18)
    assert "accuracy" not in metrics


def test_it_learns_bare_texts(execute: Execute, refused: Refused, tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "The moon is red. " * (2 + 2 * i)} for i in range(12)])
    settings = (f"data.texts={path}", "data.length=32", "data.packed=true", "train.steps=2")
    assert execute(*settings) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pieces = metrics["held_out_samples"] + metrics["training_samples"]
    assert metrics["held_out_samples"] == pieces // 10 > 1
    assert "tokens_per_forward" not in metrics
    assert metrics["loss"] > 0
    path.write_text(path.read_text().replace("red", "blue"))
    assert "output.path" in refused(*settings)
    assert "data.eval_path: expected none with data.texts" in refused(*settings, "data.eval_path=x.jsonl")
    assert "own.jsonl:1: text: expected none of prompt, messages" in refused(
        f"data.texts={written(tmp_path, [{'text': 'a', 'prompt': 'b'}])}", f"output.path={tmp_path / 'other'}"
    )


@pytest.mark.usefixtures("no_decoding")
def test_it_learns_its_own_answers_in_the_order_of_their_commits(
    execute: Execute, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, [{"id": i, "prompt": f"{i} plus 1?"} for i in range(9)])
    answers = tmp_path / "answers.jsonl"
    learnt: list[Any] = []
    monkeypatch.setattr(  # one layer never ends a text
        module.distill,
        "wanted_answers",
        lambda *given, answers=module.distill.wanted_answers, **rest: [
            row | {"finish_reason": "eos"} for row in answers(*given, **rest)
        ],
    )
    monkeypatch.setattr(
        module,
        "training_batches",
        lambda config, samples, batches=module.training_batches, **rest: (
            learnt.extend(samples),
            batches(config, samples, **rest),
        )[1],
    )
    objective = ("objective.order=trajectory", "objective.weighting=none", "objective.block_length=8")
    settings = [f"data.path={path}", f"data.distill_path={answers}", "data.eval_samples=1", *objective]
    assert execute(*settings, "objective.certainty=1.0", "train.steps=2") == 0
    rows = {row["id"]: row for row in map(json.loads, answers.read_text().splitlines())}
    assert len(rows) == 9
    assert len(learnt) == 8
    for sample in learnt:
        length = len(sample.example.answer)
        row = rows[sample.prompt.id]
        assert sample.example.answer.tolist() == row["output_ids"][:length]
        assert sample.example.order[-length:].tolist() == row["commit_step"][:length]
        assert min(row["commit_step"][:length]) >= 1
    assert "got threshold.value 0.9 instead of 0.8" in refused(
        *settings, "threshold.value=0.8", f"output.path={tmp_path / 'other'}"
    )


def test_own_answers_that_were_cut_off_are_left_out(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Corpus(DataSettings(samples=3, distill_path="own.jsonl"), seed=0)
    rows = [
        {"num_tokens": 2, "output_ids": [70 + i, 71, 5, 0], "commit_step": [1, 2, 3, 1], "finish_reason": reason}
        for i, reason in enumerate(("eot_id", "length", "eos"))
    ]
    codec = text.load(teacher, TokenizerSettings())
    assert codec
    whole, _ = corpus.encode(codec, answers=distill.ended(rows, "own.jsonl"), end_id=5)
    assert [sample.example.answer.tolist() for sample in whole] == [[70, 71, 5], [72, 71, 5]]
    assert capsys.readouterr().err == "own.jsonl: 1 of 3 own answers fill decode.gen_length and are left out\n"
    assert len(corpus.encode(codec, answers=rows, end_id=5)[0]) == 3
    with pytest.raises(UsageError, match=r"data\.distill_path: expected answers that end before decode\.gen_length"):
        distill.ended(rows[1:2], "own.jsonl")


REFUSALS = [
    (["train.microbatches=3"], "train.microbatches: expected a divisor of train.batch_size 2, got 3"),
    (["train.ema=1"], "train.ema: expected at least 0 and below 1, got 1.0"),
    (["mesh.data=2", "train.microbatches=2"], "mesh.data * mesh.fsdp * train.microbatches = 2 * 2, got 2"),
    (["decode.policy=apd"], "decode.policy: expected one without a network of its own, got 'apd'"),
    (["data.buckets=128,96"], "data.buckets: expected lengths in ascending order below data.length 160, got 128,96"),
    (["data.buckets=160"], "data.buckets: expected lengths in ascending order below data.length 160, got 160"),
    (["data.buckets=x"], "data.buckets: expected"),
    (["data.length=1"], "data.length: expected at least 2, got 1"),
    (["data.buckets=96", "data.packed=true"], "data.buckets: expected none with data.packed, got 96"),
    (["data.full_share=1.5"], "data.full_share: expected"),
    (["data.length=2000"], "data.length: expected at most the 1152 tokens of the model (network.max_length), got 2000"),
    (["data.length=20"], "built-in tasks:1: prompt and answer: expected at most 20 tokens (data.length), got "),
    (["model.quantize=int8"], "model.quantize: expected none for training, got int8"),
    (["model.preset=llada-8b"], "model.preset: expected none, since a training begins from files, got llada-8b"),
    (["network.num_layers=2"], "network.num_layers: expected 0 (as in model.path) without network.scratch, got 2"),
    (["network.scratch=true", "lora.rank=2"], "lora.rank: expected 0 with network.scratch, got 2"),
    (["network.scratch=true", "model.adapter=x"], "model.adapter: expected none with network.scratch, got x"),
    (["lora.rank=2", "train.optimizer=muon"], "train.optimizer: expected adamw with lora.rank, got 'muon'"),
    (["lora.rank=2", "model.adapter=x"], "lora.merge: expected true with model.adapter"),
    (["lora.rank=2", "network.max_length=9"], "network.max_length: expected 0 for an adapter without lora.merge"),
    (["lora.rank=2", "lora.targets=wte"], "lora.targets: expected all, or some of q_proj, "),
    ([*SMALL, "network.num_heads=3"], "network.embed_dim: expected an even multiple of num_heads 3, got 32"),
    (["objective.order=trajectory"], "objective.order: expected data.distill_path with trajectory, got none"),
    (
        ["objective.order=trajectory", "data.distill_path=x.jsonl"],
        "objective.weighting: expected none with objective.order trajectory",
    ),
    (["objective.order=first"], "objective.order: expected"),
    (["output.path="], "output.path: expected the folder to write the model to, got none"),
    (["data.path=/no/such.jsonl"], "data.path: expected a readable file, got '/no/such.jsonl'"),
    (["data.eval_path=/no/such.jsonl"], "data.eval_path: expected a readable file"),
    (
        ["network.max_length=200", "decode.gen_length=180", "decode.block_length=0"],
        "of the longest held-out prompt, got one that leaves 20",
    ),
    (
        ["data.packed=true", "network.max_length=60", "decode.gen_length=4", "decode.block_length=0"],
        "network.max_length: expected at least the ",
    ),
    (["model.path=/no/such"], "model.path: expected a folder or one of"),
    (["train.stesp=3"], "unknown config field, close to --config.train.steps"),
]


@pytest.mark.parametrize(("settings", "expected"), REFUSALS)
def test_mistakes_are_one_line(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*settings)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("folder", "changes", "expected"),
    [
        (GOLDENS / "checkpoints" / "qwen2-tiny", {}, "model.path: expected a diffusion model, got a qwen2 model"),
        (GQA, {"kv_copies": 2}, "mesh.tensor: expected a divisor of the 2 key/value heads for training, got 4"),
        (GQA, {"quantize": "int8"}, "model.path: expected weights that are not quantized, got int8"),
        (
            GOLDENS / "checkpoints" / "sdar-tiny-b",
            {},
            "training, got a sdar model, which is causal by blocks",
        ),
        (GOLDENS / "checkpoints" / "lladamoe-tiny", {"mask_id": 310}, "got a llada_moe model, which has experts"),
        (GOLDENS / "checkpoints" / "dream-tiny", {}, "data.texts: expected a model that predicts tokens in their own"),
    ],
)
def test_models_that_cannot_be_trained(folder: Path, changes: dict[str, Any], expected: str) -> None:
    mesh = make_mesh(tensor=4 if "kv_copies" in changes else 1)
    shape = dataclasses.replace(files.read_config(folder), **changes)
    with pytest.raises(UsageError, match=expected):
        module.check_trainable(shape_model(shape, dtype=np.dtype("f4"), mesh=mesh), DataSettings(texts="x"))


@pytest.mark.slow
def test_the_config_for_a_laptop_learns(tmp_path: Path) -> None:
    """The first minute of it."""
    short = (
        "data.samples=2000",
        "data.eval_samples=5",
        "decode.batch_size=8",
        "train.steps=80",
        "train.warmup_steps=10",
        "train.log_every=10",
        "train.eval_every=10",
        f"output.path={tmp_path / 'out'}",
    )
    flags = [f"--config.{setting}" for setting in short]
    config = str(ROOT / "configs" / "train_tiny_cpu.py")
    assert cli.execute(main, ["x", *flags], description="", default_config=config, schema=DiffusionTraining) == 0
    first, *_, last = (line for line in lines(tmp_path / "out.training") if line["group"] == "held_out")
    assert (first["step"], last["step"]) == (10, 80)
    assert last["loss"] < 0.75 * first["loss"]
    assert last["token_accuracy"] > first["token_accuracy"] + 0.05
