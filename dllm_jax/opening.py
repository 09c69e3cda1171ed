"""Opens what a decode needs: the model, its tokenizer, and whether they go with a policy's own networks."""

import functools
from collections.abc import Mapping
from typing import Any

import rich.progress
from jax.sharding import Mesh

from dllm_jax.checkpoints.load import load_model, resolve
from dllm_jax.config import Config
from dllm_jax.data import text
from dllm_jax.decoding import end_tokens
from dllm_jax.decoding.policies.build import companions_of
from dllm_jax.errors import UsageError
from dllm_jax.memory import bytes_per_device, check_fits
from dllm_jax.mesh import weight_shardings
from dllm_jax.models.model import Model, abstract_model, random_model
from dllm_jax.placement import model_shape
from dllm_jax.progress import for_people
from dllm_jax.settings import TokenizerSettings


def open_model(config: Config, mesh: Mesh) -> Model:
    """The checkpoint of model.path, or random weights with the shape of model.preset."""
    settings = config.model
    if not settings.preset:
        track = functools.partial(rich.progress.track, description="loading", **for_people())
        return load_model(
            settings.path,
            dtype=settings.dtype,
            quantize=settings.quantize,
            adapter=settings.adapter,
            mesh=mesh,
            verify=settings.verify,
            track=track,
        )
    shape, dtype = model_shape(config, platform=mesh.devices.flat[0].platform)
    _, abstract = abstract_model(shape, dtype=dtype)
    check_fits(
        bytes_per_device(abstract, weight_shardings(abstract, mesh)), mesh, field="model.preset", got=settings.preset
    )
    return random_model(shape, dtype=dtype, mesh=mesh, seed=config.decode.seed)


def check_tokens(model: Model, networks: Mapping[str, Any], *, config: Config, codec: text.TextCodec | None) -> None:
    """Compares the tokens of the model with those of the policy's own networks."""
    for companion in companions_of(config):
        theirs = text.load(companion.place(config), TokenizerSettings(chat_template="off"))
        companion.check_tokens(
            networks[companion.name],
            model,
            model_tokens=codec.tokenizer.get_vocab() if codec else None,
            tokens=theirs.tokenizer.get_vocab() if theirs else None,
        )


def load_codec(config: Config, model: Model) -> text.TextCodec | None:
    """The tokenizer of tokenizer.path, else of the model's folder; None if that has none.

    Raises:
        UsageError: it cannot be read, or belongs to another model.
    """
    path = config.tokenizer.path or model.path
    if not path:
        return None
    codec = text.load(resolve(path, field="tokenizer.path"), config.tokenizer)
    if codec:
        text.check_vocabulary(codec, model.config.vocab_size)
    elif config.tokenizer.path:
        raise UsageError(
            f"tokenizer.path: expected tokenizer.json or vocab.json and merges.txt in {path!r}, got neither"
        )
    return codec


def open_text_model(config: Config, mesh: Mesh) -> tuple[Model, text.TextCodec, tuple[int, ...]]:
    """The model, its tokenizer and the tokens that end a text, for commands that cannot do without text.

    Raises:
        UsageError: one of them is missing or broken.
    """
    model = open_model(config, mesh)
    codec = load_codec(config, model)
    if codec is None:
        raise UsageError(f"tokenizer.path: expected a tokenizer, to read text, got none in {model.path!r}")
    return model, codec, end_tokens.end_tokens(model.config, codec, setting=config.model.eot_token_id)
