"""dllm_jax: fast parallel decoding of diffusion language models in JAX.

The three functions of the Python API are imported on first use, so that `import dllm_jax` stays light and a command can
set XLA's flags before JAX starts.
"""

from typing import TYPE_CHECKING, Any

from dllm_jax.version import __version__

__all__ = ["__version__", "decode", "load_model", "logits"]

if TYPE_CHECKING:
    from dllm_jax.api import decode, load_model, logits


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dllm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'dllm_jax' has no attribute {name!r}")
