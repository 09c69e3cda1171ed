"""LLaDA-8B fine-tuned on chats (data.path), as its authors did: the answers and the EoS behind them are learnt."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.diffusion.config import DiffusionTraining


def get_config() -> ConfigDict:
    config = to_config_dict(DiffusionTraining())
    config.model.path = "LLaDA-8B-Instruct"
    config.data.update(length=4096, buckets="512,1024,2048", spread=False, full_share=1.0)
    config.train.update(
        steps=3000,
        batch_size=256,
        microbatches=4,
        learning_rate=2.5e-5,
        b2=0.95,
        weight_decay=0.1,
        warmup_steps=50,
        remat=True,
        log_every=10,
        eval_every=500,
        checkpoint_every=250,
    )
    config.decode.update(cache="dual", gen_length=256, batch_size=32)
    config.output.path = "out/sft_llada"
    return config
