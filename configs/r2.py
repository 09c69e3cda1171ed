"""R2-dLLM (github.com/GATECH-EIC/R2-dLLM): windows, runs and patience beside the threshold, over a dual cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "r2"
    config.decode.cache = "dual"
    config.r2.threshold = 0.9
    config.r2.window = 3
    config.r2.window_mean = 0.8
    config.r2.window_known = 1
    config.r2.patience = 3
    config.r2.stable = 0.8
    return config
