"""Counts the programs that XLA makes in this process, from JAX's own monitoring events."""

from typing import NamedTuple

import jax

_PROGRAM, _CACHE_HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
_seen = {_PROGRAM: 0, _CACHE_HIT: 0}


class CompileCount(NamedTuple):
    """Programs made so far."""

    programs: int  # compiled, or read from the persistent compilation cache
    cache_hits: int  # of which read

    @classmethod
    def now(cls) -> "CompileCount":
        """The counts since the process started."""
        return cls(_seen[_PROGRAM], _seen[_CACHE_HIT])

    def __sub__(self, earlier: "CompileCount") -> "CompileCount":
        return CompileCount(self.programs - earlier.programs, self.cache_hits - earlier.cache_hits)


def _count(event: str, *_: object, **__: object) -> None:
    if event in _seen:
        _seen[event] += 1


jax.monitoring.register_event_duration_secs_listener(_count)
jax.monitoring.register_event_listener(_count)
