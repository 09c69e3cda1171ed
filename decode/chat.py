r"""Talks to a diffusion language model in the terminal; its canvas fills in place, in the colours of decode.view.

usage: python -m decode.chat [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m decode.chat --config=threshold
  python -m decode.chat --config=apd --config.model.path=LLaDA-8B-Instruct --config.verifier.path=out/verifier \
      --config.decode.gen_length=256

A line is a message, or a command: /help lists them, /set decode.policy=factor changes a setting, /reset forgets the
conversation, /quit ends it. An answer is decoded by one compiled program, which shows nothing while it runs; what fills
in place afterwards is a replay of its forwards. Numbers, such as threshold.value, change without compiling again.
tokens/s are those of the decode itself, with the record for the replay (output.trace=false: without record or replay).
"""

from dllm_jax import cli
from dllm_jax.config import Config


def main(config: Config) -> int:
    """Opens the model and talks until the input ends."""
    from dllm_jax import chat  # imports JAX: only after the flags are parsed

    return chat.talk(config)


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="threshold")
