"""Networks that one job leaves to the next of the same process, so that a sweep loads them once."""

from collections.abc import Callable
from typing import Any


class Kept:
    """What was loaded last under every name."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def get(self, name: str, wanted: Any, load: Callable[[], Any]) -> Any:
        """What is wanted, loaded unless the last under this name was the same; another one is let go before.

        Args:
            name: of the network.
            wanted: everything that decides it, comparable.
            load: makes it.
        """
        if name in self._kept and self._kept[name][0] != wanted:
            del self._kept[name]
        if name not in self._kept:
            self._kept[name] = wanted, load()
        return self._kept[name][1]
