"""Trains a masked diffusion model, from scratch or from a checkpoint: all of its weights, or an adapter (LoRA)."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from dllm_jax import hosts
from dllm_jax.checkpoints import files, hf
from dllm_jax.checkpoints.load import resolve
from dllm_jax.data.canvases import Canvases, canvas_batches, packed_canvases
from dllm_jax.data.outputs import IDENTITY
from dllm_jax.data.samples import Sample
from dllm_jax.data.text import TextCodec
from dllm_jax.decoding.end_tokens import end_of_turn, end_tokens
from dllm_jax.errors import UsageError
from dllm_jax.identity import basis, digest, sources
from dllm_jax.metrics import environment
from dllm_jax.models import registry
from dllm_jax.models.model import Model, computing, shape_model
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.opening import load_codec, open_text_model
from dllm_jax.placement import model_shape
from dllm_jax.training import distill, lora
from dllm_jax.training.corpus import Corpus, Texts
from dllm_jax.training.diffusion.config import DataSettings, DiffusionTraining, NetworkSettings
from dllm_jax.training.diffusion.held_out import HeldOut
from dllm_jax.training.diffusion.objective import MaskedTokens
from dllm_jax.training.loop import fit
from dllm_jax.training.run import METRICS, RunFolder, opened
from dllm_jax.training.trainer import Trainer, TrainState, training_mesh

PATHS = ("path", "texts", "eval_path", "distill_path")  # of data: their content counts, not their names


@dataclasses.dataclass(frozen=True)
class Start:
    """What the training begins with, besides the model."""

    codec: TextCodec
    folder: Path  # of the tokenizer
    end_ids: tuple[int, ...]  # the tokens that end a text, EoS first


def train(config: DiffusionTraining) -> dict[str, Any]:
    """Trains, measures and exports a model, or finishes what an interrupted run began.

    Args:
        config: all settings.

    Returns:
        The metrics, which are in the exported folder's metrics.json too: measurements on the held-out samples, seconds
        of this run, counts, versions and settings.

    Raises:
        UsageError: output, data, model, tokenizer or mesh do not work out.
        Stopped: the process was asked to end.
    """
    with opened(config.output, _reads(config)) as run:
        mesh = training_mesh(config.mesh, config.train)
        data = config.data
        corpus = Texts(data.texts, data) if data.texts else Corpus(data, seed=config.train.seed)
        identity = _identity(config, corpus, mesh)
        if metrics := run.begin(identity | distill.digest(config.data.distill_path), reported={}):
            return metrics
        return _train(config, corpus, mesh, run=run, identity=identity)


def _train(
    config: DiffusionTraining, corpus: Corpus | Texts, mesh: Mesh, *, run: RunFolder, identity: Mapping[str, Any]
) -> dict[str, Any]:
    begun = time.perf_counter()
    if config.data.distill_path:
        make_trainer(config, shape_of(config, mesh))  # what would be refused after hours of decoding is refused before
    answers = distill.wanted_answers(
        corpus.prompts, config.decoding(), data=config.data, overwrite=config.output.overwrite
    )
    model, start = open_start(config, mesh)
    end_id = end_of_turn(start.end_ids, start.codec, setting=config.model.eot_token_id)
    kept = None if answers is None else distill.ended(answers, config.data.distill_path)
    training, held_out = corpus.encode(start.codec, answers=kept, end_id=end_id)
    longest = max(len(sample.example.tokens) for sample in training)
    if longest > model.config.max_length:
        raise UsageError(
            f"network.max_length: expected at least the {longest} tokens of the longest sample, "
            f"got {model.config.max_length}"
        )
    trainer = make_trainer(config, model)
    evaluate = HeldOut(
        trainer,
        held_out,
        lengths=config.data.lengths,
        config=config.decoding(),
        codec=start.codec,
        end_ids=start.end_ids,
    )
    identity = {**identity, **distill.digest(config.data.distill_path)}
    hosts.meet()
    run.open(identity)
    with computing(mesh, precision=config.model.matmul_precision):
        batches = training_batches(config, training, eos_id=trainer.config.eos_id)
        first = [first_state(config, trainer, model)]
        del model  # or its weights would lie beside those that are trained
        state, measured = fit(trainer, batches, run=run, evaluate=evaluate, first=first.pop())
    metrics = {
        **measured,
        "seconds": time.perf_counter() - begun,
        "training_samples": len(training),
        "held_out_samples": len(held_out),
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(trainer.abstract.params)),
        **environment(config=config, model=trainer.model(state)),
        IDENTITY: identity,
    }
    export(config, trainer, state, start, target=run.target, metrics=metrics)
    run.finish()
    return metrics


def shape_of(config: DiffusionTraining, mesh: Mesh) -> Model:
    """The model that will be trained, as shapes.

    Raises:
        UsageError: it is missing, or cannot be trained.
    """
    shape, dtype = model_shape(config.decoding(), platform=mesh.devices.flat[0].platform)
    model = shape_model(changed(shape, config.network), dtype=dtype, mesh=mesh)
    check_trainable(model, config.data)
    return model


def open_start(config: DiffusionTraining, mesh: Mesh) -> tuple[Model, Start]:
    """The model to begin with, of which network.scratch has only shapes, and its tokenizer.

    Raises:
        UsageError: one of them is missing or broken, or cannot be trained.
    """
    settings = config.decoding()
    if settings.model.preset:
        raise UsageError(
            f"model.preset: expected none, since a training begins from files, got {settings.model.preset}"
        )
    if config.network.scratch:
        model = dataclasses.replace(shape_of(config, mesh), path=str(resolve(settings.model.path)))
        codec = load_codec(settings, model)
        if codec is None:
            raise UsageError(f"tokenizer.path: expected a tokenizer, got none in {settings.model.path!r}")
        end_ids = end_tokens(model.config, codec, setting=settings.model.eot_token_id)
    else:
        model, codec, end_ids = open_text_model(settings, mesh)
        model = dataclasses.replace(model, config=changed(model.config, config.network))
    check_trainable(model, config.data)
    folder = resolve(config.tokenizer.path or settings.model.path, field="tokenizer.path")
    return model, Start(codec, folder, end_ids)


def check_trainable(model: Model, data: DataSettings) -> None:
    """Refuses what has no masks, weights that would have to stay copies of each other or in 8 bits, and long canvases.

    Raises:
        UsageError: the model is causal, also by blocks, has experts, is in 8 bits or shorter than a canvas, or its
            key/value heads have copies.
    """
    if model.config.mask_id is None:
        raise UsageError(f"model.path: expected a diffusion model, got a {model.config.family} model without [MASK]")
    if model.config.block_causal or model.config.experts:
        kind = "is causal by blocks" if model.config.block_causal else "has experts, whose load would need a loss"
        raise UsageError(
            f"model.path: expected a bidirectional model without experts for training, got a {model.config.family} "
            f"model, which {kind}"
        )
    if model.config.kv_copies > 1:
        raise UsageError(
            f"mesh.tensor: expected a divisor of the {model.config.num_kv_heads} key/value heads for training, "
            f"got {model.mesh.shape['tensor']}"
        )
    if model.config.quantize:
        raise UsageError(f"model.path: expected weights that are not quantized, got {model.config.quantize}")
    if data.texts and model.config.logit_shift:
        raise UsageError(
            "data.texts: expected a model that predicts tokens in their own places, since nothing stands before a "
            f"text, got a {model.config.family} model"
        )
    if data.length > model.config.max_length and not data.packed:
        raise UsageError(
            f"data.length: expected at most the {model.config.max_length} tokens of the model (network.max_length), "
            f"got {data.length}"
        )


def changed(config: TransformerConfig, network: NetworkSettings) -> TransformerConfig:
    """The shape of a model with what the settings want otherwise.

    Raises:
        UsageError: the heads do not divide the width evenly.
    """
    heads = network.num_heads or config.num_heads
    wanted = dataclasses.replace(
        config,
        num_layers=network.num_layers or config.num_layers,
        embed_dim=network.embed_dim or config.embed_dim,
        num_heads=heads,
        num_kv_heads=heads if network.num_heads else config.num_kv_heads,
        mlp_dim=network.mlp_dim or config.mlp_dim,
        max_length=network.max_length or config.max_length,
    )
    if not (network.embed_dim or network.num_heads):
        return wanted
    if wanted.embed_dim % (2 * heads):
        raise UsageError(f"network.embed_dim: expected an even multiple of num_heads {heads}, got {wanted.embed_dim}")
    return dataclasses.replace(wanted, head_dim=wanted.embed_dim // heads)


def make_trainer(config: DiffusionTraining, model: Model) -> Trainer:
    """The compiled step for a model, whose weights may be shapes."""
    assert model.config.mask_id is not None, "see check_trainable"
    adapter = lora.Lora(model.config, config.lora, seed=config.train.seed) if config.lora.rank else None
    return Trainer(
        model.config,
        config.train,
        mesh=model.mesh,
        dtype=model.dtype,
        objective=MaskedTokens(config.objective, model.config.mask_id),
        frozen=model.params if adapter else None,
        adapter=adapter,
    )


def first_state(config: DiffusionTraining, trainer: Trainer, model: Model) -> Callable[[], TrainState]:
    """What makes the state before the first step; it may hold the weights of the model."""
    if config.network.scratch or config.lora.rank:
        return trainer.init
    return lambda: trainer.init_from(model.params)


def training_batches(
    config: DiffusionTraining, training: Sequence[Sample], *, eos_id: int
) -> grain.DatasetIterator[Canvases]:
    """The training data as the settings lay it out."""
    data = config.data
    examples = [sample.example for sample in training]
    if data.packed:
        return packed_canvases(
            examples,
            length=data.length,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            eos_id=eos_id,
            most_padding=data.most_padding,
        )
    return canvas_batches(
        examples,
        buckets=data.lengths,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        eos_id=eos_id,
        spread=data.spread,
        full_share=data.full_share,
        shortest=data.shortest,
    )


def export(
    config: DiffusionTraining,
    trainer: Trainer,
    state: TrainState,
    start: Start,
    *,
    target: Path,
    metrics: Mapping[str, Any],
) -> None:
    """Writes a Hugging Face folder, or the adapter as PEFT does, with metrics.json; it appears when it is complete.

    Args:
        config: all settings.
        trainer: of the state.
        state: the last one.
        start: what it began with.
        target: the folder.
        metrics: what metrics.json says.
    """
    source = resolve(config.model.path)
    with files.new_folder(target, overwrite=config.output.overwrite) as folder:
        if config.lora.rank and not config.lora.merge:
            factors = trainer.exported(state)
            lora.save(folder, factors, trainer.config, alpha=config.lora.alpha, rslora=False, base=str(source))
        else:
            model = trainer.model(state)
            hf.write_tensors(model, folder)
            if hosts.is_first():
                files.write_config(
                    source, folder, dtype=model.dtype.name, changes=registry.shape_fields(trainer.config)
                )
                files.copy_companions(source, folder, patterns=files.CODE)
                files.copy_companions(start.folder, folder, patterns=files.TOKENIZER)
        if hosts.is_first():
            (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _reads(config: DiffusionTraining) -> dict[str, Path]:
    """Setting -> file or folder that the training reads."""
    named = {f"data.{name}": Path(getattr(config.data, name)) for name in PATHS if getattr(config.data, name)}
    return sources(config.decoding()) | named


def _identity(config: DiffusionTraining, corpus: Corpus | Texts, mesh: Mesh) -> dict[str, Any]:
    """What decides the parameters, and the measurements on the way."""
    own = ("data", "network", "lora", "objective", "train", "decode", "threshold")
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in own}
    for name in PATHS:
        del settings["data"][name]
    return {
        **basis(config.decoding(), mesh, sections=("model", "tokenizer")),
        **settings,
        "mesh": dict(mesh.shape),
        "prompts": digest(corpus.prompts, with_answers=not config.data.distill_path),
        "held_out": digest(corpus.held_out, with_answers=True),
        **distill.digest(config.data.texts, name="texts"),
    }
