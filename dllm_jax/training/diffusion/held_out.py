"""What a diffusion model in training is worth: its loss on held-out answers, and how well it decodes."""

from collections.abc import Mapping, Sequence

import jax

from dllm_jax.config import Config
from dllm_jax.data.canvases import held_out_canvases
from dllm_jax.data.samples import Sample
from dllm_jax.data.text import TextCodec
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.training.held_out import HeldOutPrompts
from dllm_jax.training.losses import means
from dllm_jax.training.trainer import Trainer, TrainState

DRAWS = 4  # of the masks of every batch: the loss is that of the same masks at every measurement


class HeldOut:
    """Measures a model on held-out samples; call it with a state of the training.

    Args:
        trainer: of the model.
        samples: at least one; those without a prompt are not decoded.
        lengths: of canvases, for the loss.
        config: of the decoding.
        codec: the tokenizer, to score answers.
        end_ids: the tokens that end a text, EoS first.

    Raises:
        UsageError: a prompt is too long to decode, or a reference answer would not pass its own test.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: Sequence[Sample],
        *,
        lengths: Sequence[int],
        config: Config,
        codec: TextCodec,
        end_ids: tuple[int, ...],
    ) -> None:
        self._trainer, self._config, self._end_ids = trainer, config, end_ids
        examples = [sample.example for sample in samples]
        self._batches = list(
            held_out_canvases(
                examples,
                buckets=lengths,
                batch_size=trainer.settings.rows,
                eos_id=trainer.config.eos_id,
            )
        )
        room = trainer.config.max_length - config.decode.gen_length
        self._prompts = HeldOutPrompts.of_samples(samples, codec=codec, room=room)

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        """Loss and token accuracy behind masks; of prompts tokens per forward and, with scorers, accuracy too."""
        drawn = [batch for batch in self._batches for _ in range(DRAWS)]
        sums = [self._trainer.sums(state, batch, number=number) for number, batch in enumerate(drawn)]
        measured = means(jax.device_get(sums))
        if not self._prompts.tokens:
            return measured
        decoder = Decoder(self._trainer.model(state), self._config, end_ids=self._end_ids)
        return measured | self._prompts.measured(decode_all(decoder, self._prompts.tokens))
