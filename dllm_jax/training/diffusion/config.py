"""The settings of `train.diffusion`. This module imports no JAX, as `dllm_jax/config.py`."""

import dataclasses

from dllm_jax.config import Config, check_values, validate
from dllm_jax.errors import UsageError
from dllm_jax.settings import (
    DecodeSettings,
    DistributedSettings,
    MeshSettings,
    ModelSettings,
    PlanSettings,
    ThresholdSettings,
    TokenizerSettings,
    numbers,
    setting,
)
from dllm_jax.training.settings import CorpusSettings, LoraSettings, TrainingOutput, TrainSettings, validate_train


@dataclasses.dataclass(frozen=True)
class DataSettings(CorpusSettings):
    """What is learnt from, how it is laid out on canvases, and what is held out."""

    texts: str = setting(
        "", 'JSONL file of bare texts, {"text": ...}, to learn instead: all of each, in pieces of data.length tokens'
    )
    samples: int = setting(400_000, "samples to draw of the built-in tasks, none of them held out", least=1)
    shares: str = setting(
        "bundled",
        "of each built-in task: as the bundled models saw them (65% word problems), equal parts, or of lists alone",
        choices=("bundled", "equal", "lists"),
    )
    length: int = setting(
        160,
        "tokens of the longest canvas (prompt and generation), or of a packed row; a longer sample is an error",
        least=2,
    )
    buckets: str = setting(
        "", "shorter canvases besides, in ascending order, separated by commas: every batch is of one length"
    )
    spread: bool = setting(
        True, "a sample goes to any bucket that holds it, for short answers on long canvases (else to the least)"
    )
    full_share: float = setting(
        0.5, "share of the canvases that are filled with EoS to their end; others end earlier", least=0, most=1
    )
    shortest: int = setting(2, "tokens of the shortest canvas among those others", least=1)
    packed: bool = setting(False, "several samples in every row of data.length tokens, instead of one canvas")
    most_padding: int = setting(16, "with packed rows, the most EoS behind an answer", least=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of canvases, in ascending order."""
        return (*(numbers("data.buckets", self.buckets) if self.buckets else ()), self.length)


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """The model that is trained, where it differs from model.path."""

    scratch: bool = setting(False, "begin with random weights; without it these have to be those of model.path")
    num_layers: int = setting(0, "layers (0, here and below: as in model.path)", least=0)
    embed_dim: int = setting(0, "width", least=0)
    num_heads: int = setting(0, "attention heads", least=0)
    mlp_dim: int = setting(0, "width of the MLP", least=0)
    max_length: int = setting(0, "longest prompt + generation; may change without network.scratch", least=0)


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """The masks and the loss."""

    least_noise: float = setting(1e-3, "lowest share of masks that is drawn (LLaDA's eps)", above=0, below=1)
    padding_weight: float = setting(
        1.0, "of the EoS behind an answer beside its own tokens: 1 as in LLaDA's loss, 0: left out", least=0, most=1
    )
    weighting: str = setting(
        "linear", "of the masked tokens: 1 / level as in LLaDA's bound, or none", choices=("linear", "none")
    )
    order: str = setting(
        "random",
        "which tokens are masked: any, or (trajectory) those that the model itself committed last (data.distill_path)",
        choices=("random", "trajectory"),
    )
    block_length: int = setting(
        0, "tokens of the blocks of which one is noised, those behind it masked (0: the whole answer)", least=0
    )
    block_share: float = setting(
        1.0, "with blocks, the share of the samples that are masked so; of the others the whole answer", least=0, most=1
    )
    certainty: float = setting(0.0, "weight of the entropy of tokens that are predicted right already", least=0)
    certainty_temperature: float = setting(0.5, "of the distribution that this entropy is of", above=0)


def _decode_defaults() -> DecodeSettings:
    return DecodeSettings(policy="threshold", batch_size=32)


@dataclasses.dataclass(frozen=True)
class DiffusionTraining:
    """All settings of `train.diffusion`."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings = dataclasses.field(default_factory=TokenizerSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    network: NetworkSettings = dataclasses.field(default_factory=NetworkSettings)
    lora: LoraSettings = dataclasses.field(default_factory=LoraSettings)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    output: TrainingOutput = dataclasses.field(default_factory=lambda: TrainingOutput(path="out/diffusion"))
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    distributed: DistributedSettings = dataclasses.field(default_factory=DistributedSettings)
    decode: DecodeSettings = dataclasses.field(default_factory=_decode_defaults)
    threshold: ThresholdSettings = dataclasses.field(default_factory=ThresholdSettings)
    plan: PlanSettings = dataclasses.field(default_factory=PlanSettings)

    def validate(self) -> None:
        """Checks values and their combinations.

        Raises:
            UsageError: naming the field, what was expected and what came.
        """
        check_values(self)
        if self.decode.policy in ("learn2pd", "apd"):
            raise UsageError(f"decode.policy: expected one without a network of its own, got {self.decode.policy!r}")
        validate(self.decoding())
        validate_train(self.train)
        lengths = self.data.lengths
        if list(lengths) != sorted(set(lengths)) or lengths[0] < 2:
            raise UsageError(
                f"data.buckets: expected lengths in ascending order below data.length {self.data.length}, "
                f"got {self.data.buckets}"
            )
        if self.data.packed and self.data.buckets:
            raise UsageError(f"data.buckets: expected none with data.packed, got {self.data.buckets}")
        beside = [name for name in ("path", "distill_path", "eval_path") if getattr(self.data, name)]
        if self.data.texts and beside:
            raise UsageError(
                f"data.{beside[0]}: expected none with data.texts, of which some are held out, "
                f"got {getattr(self.data, beside[0])}"
            )
        self._check_model()
        self._check_objective()
        if not self.output.path:
            raise UsageError("output.path: expected the folder to write the model to, got none")

    def _check_model(self) -> None:
        if self.model.quantize:
            raise UsageError(f"model.quantize: expected none for training, got {self.model.quantize}")
        shape = [name for name in ("num_layers", "embed_dim", "num_heads", "mlp_dim") if getattr(self.network, name)]
        if shape and not self.network.scratch:
            raise UsageError(
                f"network.{shape[0]}: expected 0 (as in model.path) without network.scratch, "
                f"got {getattr(self.network, shape[0])}"
            )
        if self.network.scratch and self.lora.rank:
            raise UsageError(f"lora.rank: expected 0 with network.scratch, got {self.lora.rank}")
        if self.network.scratch and self.model.adapter:
            raise UsageError(f"model.adapter: expected none with network.scratch, got {self.model.adapter}")
        if self.lora.rank and self.train.optimizer != "adamw":
            raise UsageError(f"train.optimizer: expected adamw with lora.rank, got {self.train.optimizer!r}")
        if self.lora.rank and self.model.adapter and not self.lora.merge:
            raise UsageError(
                "lora.merge: expected true with model.adapter, since the new adapter is of weights with the old one in "
                "them, got false"
            )
        if self.lora.rank and self.network.max_length and not self.lora.merge:
            raise UsageError(
                f"network.max_length: expected 0 for an adapter without lora.merge, got {self.network.max_length}"
            )

    def _check_objective(self) -> None:
        if self.objective.order != "trajectory":
            return
        if not self.data.distill_path:
            raise UsageError("objective.order: expected data.distill_path with trajectory, got none")
        if self.objective.weighting != "none":
            raise UsageError(
                "objective.weighting: expected none with objective.order trajectory (whole steps are masked, not a "
                f"share), got {self.objective.weighting}"
            )

    def decoding(self) -> Config:
        """How the model is measured, and how it decodes its own answers."""
        return Config(
            model=self.model, tokenizer=self.tokenizer, mesh=self.mesh, decode=self.decode, threshold=self.threshold
        )
