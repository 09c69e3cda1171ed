r"""Trains a masked diffusion model as LLaDA was: from scratch, or from a checkpoint, all weights or an adapter (LoRA).

usage: python -m train.diffusion [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m train.diffusion --config=train_tiny_cpu
  python -m train.diffusion --config=sft_llada --config.data.path=chats.jsonl --config.output.path=out/mine
  python -m train.diffusion --config=sft_llada --config.lora.rank=16 --config.mesh.fsdp=8
  python -m train.diffusion --config=distill_parallel --config.data.distill_path=out/answers.jsonl

It learns the answers of data.path, of the built-in tasks, or, with data.distill_path, the model's own; or all of the
texts of data.texts. output.path becomes a Hugging Face folder for the setting model.path of decode.run, or with
lora.rank a PEFT folder for model.adapter; checkpoints, metrics.jsonl and TensorBoard's files are beside it in
PATH.training. A run that was cut off, or ended after SIGTERM, continues where it stopped when it is started again.
"""

from dllm_jax import cli
from dllm_jax.training.diffusion.config import DiffusionTraining


def main(config: DiffusionTraining) -> None:
    """Trains, and says what the model can do."""
    cli.require("grain", "tensorboardX", extra="train")
    from dllm_jax.training.diffusion import train as training  # imports JAX: only after the flags are parsed

    metrics = training.train(config)
    told = (
        f"loss {metrics['loss']:.4f}, token accuracy {metrics['token_accuracy']:.3f} on {metrics['held_out_samples']} "
        "held-out samples"
    )
    if "tokens_per_forward" in metrics:
        told += f"; decoded with {config.decode.policy}: {metrics['tokens_per_forward']:.2f} tokens per forward"
    if "accuracy" in metrics:
        told += f", accuracy {metrics['accuracy']:.3f}"
    print(told)
    print(f"{metrics['parameters']:,} parameters trained, {metrics['seconds']:.0f} s; {config.output.path}")


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="train_tiny_cpu", schema=DiffusionTraining)
