r"""Trains a verifier for the policy apd: a small causal language model over the tokens of a diffusion model.

usage: python -m train.verifier [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m train.verifier --config=train_verifier
  python -m train.verifier --config.data.path=chats.jsonl --config.output.path=out/mine
  python -m train.verifier --config.model.path=LLaDA-8B-Instruct --config.data.path=questions.jsonl \
      --config.data.distill_path=out/answers.jsonl

The verifier learns the answers of data.path, of the built-in tasks, or, with data.distill_path, the diffusion model's
own. output.path becomes a Hugging Face folder for the setting verifier.path of decode.run; checkpoints, metrics.jsonl
and TensorBoard's files are beside it in PATH.training. A run that was cut off continues where it stopped when it is
started again.
"""

from dllm_jax import cli
from dllm_jax.training.verifier.config import VerifierTraining


def main(config: VerifierTraining) -> None:
    """Trains, and says what the verifier can do."""
    cli.require("grain", "tensorboardX", extra="train")
    from dllm_jax.training.verifier import train as training  # imports JAX: only after the flags are parsed

    metrics = training.train(config)
    print(
        f"token accuracy {metrics['token_accuracy']:.3f} on {metrics['held_out_samples']} held-out samples; with apd "
        f"{metrics['accepted_per_forward']:.2f} tokens accepted per forward"
        + (f", accuracy {metrics['accuracy']:.3f}" if "accuracy" in metrics else "")
    )
    print(f"{metrics['parameters']:,} parameters, {metrics['seconds']:.0f} s; verifier in {config.output.path}")


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="train_verifier", schema=VerifierTraining)
