"""Trains a verifier for a diffusion model: a small causal language model over the same token ids."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dllm_jax import hosts
from dllm_jax.checkpoints import files, hf
from dllm_jax.checkpoints.load import resolve
from dllm_jax.data import text
from dllm_jax.data.outputs import IDENTITY
from dllm_jax.data.packing import training_batches
from dllm_jax.data.samples import Sample
from dllm_jax.decoding.end_tokens import end_of_turn
from dllm_jax.identity import basis, digest, sources
from dllm_jax.metrics import environment
from dllm_jax.models import qwen2
from dllm_jax.models.model import Model, computing
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.opening import open_text_model
from dllm_jax.training import distill
from dllm_jax.training.corpus import Corpus
from dllm_jax.training.loop import fit
from dllm_jax.training.losses import NextTokens
from dllm_jax.training.run import METRICS, RunFolder, opened
from dllm_jax.training.trainer import Trainer, training_mesh
from dllm_jax.training.verifier.acceptance import HeldOut
from dllm_jax.training.verifier.config import NetworkSettings, VerifierTraining

NORM_EPS = 1e-6
PATHS = ("path", "eval_path", "distill_path")  # of data: their content counts, not their names


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The diffusion model whose drafts will be verified."""

    model: Model
    codec: text.TextCodec
    tokenizer: Path  # its folder
    end_ids: tuple[int, ...]  # the tokens that end a text, EoS first


def train(config: VerifierTraining) -> dict[str, Any]:
    """Trains, measures and exports a verifier, or finishes what an interrupted run began.

    Args:
        config: all settings.

    Returns:
        The metrics, which are in the exported folder's metrics.json too: measurements on the held-out samples, seconds
        of this run, counts, versions and settings.

    Raises:
        UsageError: output, data, model, tokenizer or mesh do not work out.
    """
    with opened(config.output, _reads(config)) as run:
        mesh = training_mesh(config.mesh, config.train)
        corpus = Corpus(config.data, seed=config.train.seed)
        identity = _identity(config, corpus, mesh)
        if metrics := run.begin(identity | distill.digest(config.data.distill_path), reported={}):
            return metrics
        return _train(config, corpus, mesh, run=run, identity=identity)


def _train(
    config: VerifierTraining, corpus: Corpus, mesh: Mesh, *, run: RunFolder, identity: Mapping[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    teacher, training, held_out = read(config, corpus, mesh)
    trainer = Trainer(
        verifier_shape(config.network, teacher.model.config, end_ids=teacher.end_ids),
        config.train,
        mesh=mesh,
        dtype=teacher.model.dtype,
        objective=NextTokens(),
    )
    evaluate = HeldOut(
        trainer,
        held_out,
        model=teacher.model,
        config=config.acceptance(),
        codec=teacher.codec,
        end_ids=teacher.end_ids,
        length=config.data.length,
    )
    batches = training_batches(
        [sample.example for sample in training],
        length=config.data.length,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
    )
    identity = {**identity, **distill.digest(config.data.distill_path)}
    hosts.meet()
    run.open(identity)
    with computing(mesh, precision=config.model.matmul_precision):
        state, measured = fit(trainer, batches, run=run, evaluate=evaluate, first=trainer.init)
    metrics = {
        **measured,
        "seconds": time.perf_counter() - start,
        "training_samples": len(training),
        "held_out_samples": len(held_out),
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(trainer.abstract.params)),
        **environment(config=config, model=teacher.model),
        IDENTITY: identity,
    }
    export(trainer.model(state), run.target, tokenizer=teacher.tokenizer, metrics=metrics, settings=config)
    run.finish()
    return metrics


def read(config: VerifierTraining, corpus: Corpus, mesh: Mesh) -> tuple[Teacher, list[Sample], list[Sample]]:
    """The diffusion model, what is learnt, and what is held out; decodes the model's own answers if they are wanted.

    Raises:
        UsageError: data, model or tokenizer do not work out.
    """
    answers = distill.wanted_answers(
        corpus.prompts, config.distillation(), data=config.data, overwrite=config.output.overwrite
    )
    teacher = open_teacher(config, mesh)
    end_id = end_of_turn(teacher.end_ids, teacher.codec, setting=config.model.eot_token_id)
    return teacher, *corpus.encode(teacher.codec, answers=answers, end_id=end_id)


def open_teacher(config: VerifierTraining, mesh: Mesh) -> Teacher:
    """Loads the diffusion model and its tokenizer.

    Raises:
        UsageError: one of them is missing or broken.
    """
    model, codec, end_ids = open_text_model(config.distillation(), mesh)
    return Teacher(model, codec, resolve(config.tokenizer.path or model.path, field="tokenizer.path"), end_ids)


def verifier_shape(
    network: NetworkSettings, teacher: TransformerConfig, *, end_ids: tuple[int, ...]
) -> TransformerConfig:
    """A Qwen2 model with the vocabulary, the special tokens and the longest context of the diffusion model."""
    return TransformerConfig(
        family="qwen2",
        **dataclasses.asdict(network),
        head_dim=network.embed_dim // network.num_heads,
        vocab_size=teacher.vocab_size,
        norm_eps=NORM_EPS,
        max_length=teacher.max_length,
        qkv_bias=True,
        causal_block=1,
        eos_id=teacher.eos_id,
        other_end_ids=end_ids[1:],
    )


def export(
    model: Model, target: Path, *, tokenizer: Path, metrics: Mapping[str, Any], settings: VerifierTraining
) -> None:
    """Writes the verifier as a Hugging Face folder, with metrics.json; it appears when it is complete.

    Args:
        model: the verifier.
        target: the folder.
        tokenizer: the folder whose tokenizer files are copied.
        metrics: what metrics.json says.
        settings: whether an existing folder is replaced.
    """
    fields = qwen2.config_fields(model.config) | {"torch_dtype": model.dtype.name}
    with files.new_folder(target, overwrite=settings.output.overwrite) as folder:
        hf.write_tensors(model, folder)
        if hosts.is_first():
            files.copy_companions(tokenizer, folder, patterns=files.TOKENIZER)
            for name, content in (("config.json", fields), (METRICS, metrics)):
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _reads(config: VerifierTraining) -> dict[str, Path]:
    """Setting -> file or folder that the training reads."""
    named = {f"data.{name}": Path(getattr(config.data, name)) for name in PATHS if getattr(config.data, name)}
    return sources(config.distillation()) | named


def _identity(config: VerifierTraining, corpus: Corpus, mesh: Mesh) -> dict[str, Any]:
    """What decides the parameters, and the measurements on the way."""
    own = ("data", "network", "train", "decode", "threshold", "apd")
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in own}
    for name in PATHS:
        del settings["data"][name]
    return {
        **basis(config.distillation(), mesh, sections=("model", "tokenizer")),
        **settings,
        "mesh": dict(mesh.shape),
        "prompts": digest(corpus.prompts, with_answers=not config.data.distill_path),
        "held_out": digest(corpus.held_out, with_answers=True),
    }
