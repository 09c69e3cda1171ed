"""The networks of a job, kept for the next one of the same process: a sweep loads them once."""

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from dllm_jax.config import Config
from dllm_jax.decoding.policies.build import companions_of
from dllm_jax.models.model import Model
from dllm_jax.opening import open_model


class Kept:
    """What was loaded last under every name."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def open(self, config: Config, mesh: Mesh) -> tuple[Model, dict[str, Any]]:
        """The model, and the networks of the policy by the names of their companions.

        Raises:
            UsageError: one is not named, or there is no such checkpoint.
        """
        companions = self.companions(config, mesh)
        return self._get("model", _model_of(config, mesh), lambda: open_model(config, mesh)), companions

    def companions(self, config: Config, mesh: Mesh) -> dict[str, Any]:
        """The networks of the policy by the names of their companions.

        Raises:
            UsageError: one is not named, or there is no such checkpoint.
        """
        shared = _model_of(config, mesh)
        return {
            each.name: self._get(
                each.name, (getattr(config, each.name), *shared), functools.partial(each.open, config, mesh)
            )
            for each in companions_of(config)
        }

    def _get(self, name: str, wanted: Any, load: Callable[[], Any]) -> Any:
        """What is kept under a name if it is what is wanted; else it is let go, and the other is loaded."""
        if name in self._kept and self._kept[name][0] != wanted:
            del self._kept[name]
        if name not in self._kept:
            self._kept[name] = wanted, load()
        return self._kept[name][1]


def _model_of(config: Config, mesh: Mesh) -> tuple[Any, ...]:
    """What decides the model, and the tokens that its companions must share."""
    return config.model, config.decode.seed if config.model.preset else 0, mesh
