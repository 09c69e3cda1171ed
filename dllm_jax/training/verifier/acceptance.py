"""What a verifier is worth: how well it predicts held-out answers, and how many tokens per forward it buys."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dllm_jax.config import Config
from dllm_jax.data.packing import held_out_batches
from dllm_jax.data.samples import Sample
from dllm_jax.data.text import TextCodec
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.models.model import Model
from dllm_jax.training.held_out import HeldOutPrompts
from dllm_jax.training.losses import means
from dllm_jax.training.trainer import Trainer, TrainState


class HeldOut:
    """Measures a verifier on held-out samples; call it with a state of the training.

    Args:
        trainer: of the verifier.
        samples: at least one.
        model: the diffusion model.
        config: of the decoding; decode.policy is apd.
        codec: of the diffusion model, to score answers.
        end_ids: the tokens that end a text, EoS first.
        length: tokens of a row, for the token accuracy.

    Raises:
        UsageError: a prompt is too long to decode, or a reference answer would not pass its own test.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: Sequence[Sample],
        *,
        model: Model,
        config: Config,
        codec: TextCodec,
        end_ids: tuple[int, ...],
        length: int,
    ) -> None:
        self.trainer, self.samples, self.model, self.config = trainer, samples, model, config
        self.end_ids, self.length = end_ids, length
        room = model.config.max_length - config.decode.gen_length
        self.prompts = HeldOutPrompts.of_samples(samples, codec=codec, room=room)

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        """Token accuracy and loss on the reference answers; accuracy and tokens per forward of decoding with apd."""
        return self._predict(state) | self._decode(self.trainer.model(state))

    def _predict(self, state: TrainState) -> dict[str, float]:
        batches = held_out_batches(
            [sample.example for sample in self.samples],
            length=self.length,
            batch_size=self.trainer.settings.rows,
        )
        sums = jax.device_get([self.trainer.sums(state, batch) for batch in batches])
        return means(sums)

    def _decode(self, verifier: Model) -> dict[str, float]:
        decoder = Decoder(self.model, self.config, verifier=verifier, end_ids=self.end_ids)
        result = decode_all(decoder, self.prompts.tokens)
        accepted = int(np.count_nonzero(result.commit_step_BG)) / int(result.nfe_B.sum())
        return {"accepted_per_forward": accepted} | self.prompts.measured(result)
