"""The settings of `train.verifier`. This module imports no JAX, as `dllm_jax/config.py`."""

import dataclasses

from dllm_jax.config import Config, check_values, validate
from dllm_jax.errors import UsageError
from dllm_jax.settings import (
    ApdSettings,
    DecodeSettings,
    DistributedSettings,
    MeshSettings,
    ModelSettings,
    ThresholdSettings,
    TokenizerSettings,
    at_least,
    setting,
)
from dllm_jax.training.settings import CorpusSettings, TrainingOutput, TrainSettings, validate_train


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """The shape of the verifier, a Qwen2 model over the vocabulary of the diffusion model."""

    num_layers: int = setting(3, "layers")
    embed_dim: int = setting(96, "width")
    num_heads: int = setting(4, "query heads")
    num_kv_heads: int = setting(2, "key/value heads")
    mlp_dim: int = setting(256, "width of the MLP")
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies")
    tied_embeddings: bool = setting(True, "one matrix for embedding and head")


def _decode_defaults() -> DecodeSettings:
    return DecodeSettings(policy="threshold", cache="dual", batch_size=32)


@dataclasses.dataclass(frozen=True)
class VerifierTraining:
    """All settings of `train.verifier`."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings = dataclasses.field(default_factory=TokenizerSettings)
    data: CorpusSettings = dataclasses.field(default_factory=CorpusSettings)
    network: NetworkSettings = dataclasses.field(default_factory=NetworkSettings)
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    output: TrainingOutput = dataclasses.field(default_factory=TrainingOutput)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    distributed: DistributedSettings = dataclasses.field(default_factory=DistributedSettings)
    decode: DecodeSettings = dataclasses.field(default_factory=_decode_defaults)
    threshold: ThresholdSettings = dataclasses.field(default_factory=ThresholdSettings)
    apd: ApdSettings = dataclasses.field(default_factory=ApdSettings)

    def validate(self) -> None:
        """Checks values and their combinations.

        Raises:
            UsageError: naming the field, what was expected and what came.
        """
        check_values(self)
        if self.decode.policy == "learn2pd":
            raise UsageError(
                "decode.policy: expected one without a filter, for the model's own answers, got 'learn2pd'"
            )
        validate(self.distillation())
        validate(self.acceptance())
        validate_train(self.train)
        _validate_network(self.network)
        if not self.output.path:
            raise UsageError("output.path: expected the folder to write the verifier to, got none")

    def distillation(self) -> Config:
        """How the diffusion model decodes its own answers: `decode` and what belongs to its policy."""
        return Config(
            model=self.model, tokenizer=self.tokenizer, mesh=self.mesh, decode=self.decode, threshold=self.threshold
        )

    def acceptance(self) -> Config:
        """How the verifier is measured at work: the same with the policy `apd`."""
        decode = dataclasses.replace(self.decode, policy="apd", cache="window")
        return dataclasses.replace(self.distillation(), decode=decode, apd=self.apd)


def _validate_network(network: NetworkSettings) -> None:
    for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "rope_theta"):
        at_least(f"network.{name}", getattr(network, name), 1)
    if network.embed_dim % (2 * network.num_heads):
        raise UsageError(
            f"network.embed_dim: expected an even multiple of num_heads {network.num_heads}, got {network.embed_dim}"
        )
    if network.num_heads % network.num_kv_heads:
        raise UsageError(
            f"network.num_kv_heads: expected a divisor of num_heads {network.num_heads}, got {network.num_kv_heads}"
        )
