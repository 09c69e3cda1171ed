"""d3LLM's multi-block decoding (github.com/hao-ai-lab/d3LLM): several blocks at once, by entropy."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "entropy_threshold"
    config.decode.blocks = "pipelined"
    config.entropy_threshold.value = 0.5
    config.pipelined.add = 0.1
    config.pipelined.ready = 0.95
    return config
