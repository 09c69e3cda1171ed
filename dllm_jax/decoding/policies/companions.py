"""The contract of a companion: a network that a policy brings along, such as a verifier, a filter or a head.

A policy's file says what its companion is: a section of the settings, how it is opened, what is checked. `build.py`
names it in the policy's line, and everything else follows from that: loading, meshes, memory, plans, vocabularies, the
identity of a job, the commands and the Python functions go through the companions of a policy and know none by name.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dllm_jax.checkpoints import files
from dllm_jax.checkpoints.load import load_model, resolve, tuned
from dllm_jax.config import Config
from dllm_jax.decoding.vocabulary import check_shared
from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model, with_causal_block
from dllm_jax.models.transformer import TransformerConfig


class Companion:
    """A network of a policy's own. The methods below suit one that reads no tokens and is small.

    Attributes:
        name: of the section of settings whose `path` says where it is, and of the network in `Decoder(...)`.
        argument: its name in `dllm_jax.decode`.
        kind: the type of what is given there.
        told: what that is, for errors.
        expected: what is missing where there is none, for errors.
        handed_over: `dllm_jax.decode` takes it as an argument only and does not open its path.
    """

    name: str
    argument: str
    kind: type
    told: str
    expected: str
    handed_over: bool = False

    @property
    def field(self) -> str:
        """The setting that says where it is."""
        return f"{self.name}.path"

    def is_named(self, config: Config) -> bool:
        """Whether the settings say where it is."""
        return bool(getattr(config, self.name).path)

    def wanted(self, config: Config) -> bool:
        """Whether its policy needs it with these settings."""
        return True

    def superfluous(self, config: Config) -> None:
        """It is given, and its policy does not need it with these settings: ignored, or a `UsageError`."""

    def missing(self, field: str) -> UsageError:
        """The error where it is wanted and there is none; `field` is what could name it."""
        return UsageError(f"{field}: expected {self.expected}, got none")

    def path(self, config: Config) -> str:
        """What the settings name.

        Raises:
            UsageError: nothing.
        """
        if not self.is_named(config):
            raise self.missing(self.field)
        return getattr(config, self.name).path

    def place(self, config: Config) -> Path:
        """The file or folder that it is read from, which counts for the identity of a job.

        Raises:
            UsageError: none is named, or there is no such checkpoint.
        """
        return resolve(self.path(config), field=self.field)

    def shape(self, config: Config, *, platform: str) -> TransformerConfig | None:
        """What its config.json says, for plans and estimates of memory; None: it is opened for plans, and small.

        Raises:
            UsageError: see `place`.
        """
        return None

    def open(self, config: Config, mesh: Mesh) -> Any:
        """The network.

        Args:
            config: all settings.
            mesh: of the model.

        Raises:
            UsageError: see `place`; or it is damaged.
        """
        raise NotImplementedError

    def accept(self, value: Any) -> Any:
        """The network, from the argument of `dllm_jax.decode`, which is of the right type.

        Raises:
            UsageError: it is none.
        """
        return value

    def check(self, network: Any, config: Config, *, model: Model) -> None:
        """Refuses a network that does not suit the settings or the model.

        Raises:
            UsageError: naming the setting.
        """

    def check_tokens(
        self, network: Any, model: Model, *, model_tokens: Mapping[str, int] | None, tokens: Mapping[str, int] | None
    ) -> None:
        """Refuses a network for which token ids mean something else than for the model.

        Args:
            network: what was opened or given.
            model: the diffusion model.
            model_tokens: id of every token of the model's tokenizer; None if that is not known.
            tokens: of the network's.

        Raises:
            UsageError: naming the setting.
        """


class LanguageModel(Companion):
    """A causal model over the model's tokens, on its mesh: a checkpoint like the model's own.

    It may be the model itself, if that predicts next tokens (`causal_mode`).

    Attributes:
        advice: where to get one, for errors about its tokens.
    """

    kind, told, handed_over = Model, "a model from load_model", True
    advice: str = ""

    def shape(self, config: Config, *, platform: str) -> TransformerConfig:
        """By its config.json."""
        shape = tuned(files.read_config(self.place(config)), platform=platform)
        return dataclasses.replace(shape, causal_block=1) if causal_mode(shape) else shape

    def open(self, config: Config, mesh: Mesh) -> Model:
        """The checkpoint in the dtype of the model."""
        settings, path = config.model, self.path(config)
        return self.accept(load_model(path, dtype=settings.dtype, mesh=mesh, verify=settings.verify, field=self.field))

    def accept(self, value: Model) -> Model:
        """With a causal mask, if it has one."""
        return with_causal_block(value, 1) if causal_mode(value.config) else value

    def check(self, network: Model, config: Config, *, model: Model) -> None:
        """It is causal, and where the model is."""
        if not network.config.causal or (network.config.block_causal and not causal_mode(network.config)):
            kind = ", which has no causal mode" if network.config.block_causal else ""
            raise UsageError(f"{self.field}: expected a causal model, got the {network.config.family} model{kind}")
        if network.mesh != model.mesh:
            raise UsageError(f"{self.name}: expected it on the model's mesh {model.mesh}, got {network.mesh}")

    def check_tokens(
        self,
        network: Model,
        model: Model,
        *,
        model_tokens: Mapping[str, int] | None,
        tokens: Mapping[str, int] | None,
    ) -> None:
        """See `vocabulary.check_shared`."""
        check_shared(model, network, model_tokens=model_tokens, tokens=tokens, field=self.field, advice=self.advice)


def causal_mode(config: TransformerConfig) -> bool:
    """Whether a model that is causal by blocks can be run token by token, as it was trained.

    Those that read a position from the output at its left still predict next tokens (Fast-dLLM v2 begins every block
    so); the others have only learnt to predict what is masked.
    """
    return config.block_causal and config.logit_shift > 0
