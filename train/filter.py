r"""Trains a filter for the policy learn2pd: which predicted tokens are final, told by the confidences of their block.

usage: python -m train.filter [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m train.filter --config=train_filter
  python -m train.filter --config.decode.cache=dual --config.data.prompts=1000 --config.output.path=out/mine
  python -m train.filter --config.model.path=LLaDA-8B-Instruct --config.data.path=gsm8k_train.jsonl \
      --config.data.records_path=out/records --config.decode.gen_length=256

The model decodes every prompt twice: one token per forward, then by an oracle that commits whatever already agrees with
that. The second run's records, kept in data.records_path, are what the filter is fitted to. output.path becomes a
folder for the setting filter.path of decode.run, with metrics.json, fit.png and quality.png; checkpoints, metrics.jsonl
and TensorBoard's files are beside it in PATH.training. A run that was cut off continues where it stopped when it is
started again.
"""

from rich.console import Console

from dllm_jax import cli
from dllm_jax.training.filter.config import FilterTraining


def main(config: FilterTraining) -> None:
    """Trains, and says what the filter can do."""
    cli.require("tensorboardX", extra="train")
    cli.require("matplotlib", extra="viz")
    from dllm_jax.training.filter import train as training  # imports JAX: only after the flags are parsed
    from dllm_jax.training.filter.report import table

    metrics = training.train(config)
    if metrics["comparison"]:
        print(f"{metrics['comparison_prompts']} held-out prompts, decode.cache {config.decode.cache}:")
        Console(highlight=False).print(table(metrics["comparison"]))
    seconds = metrics["seconds"]
    print(
        f"{metrics['parameters']:,} parameters, best after {metrics['best_epoch']} of {metrics['epochs']} epochs on "
        f"{metrics['records']:,} records; "
        + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
        + f"; filter in {config.output.path}"
    )


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="train_filter", schema=FilterTraining)
