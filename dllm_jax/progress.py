"""How progress is shown: to people, not to log files."""

import sys
from typing import Any

from rich.console import Console


def for_people() -> dict[str, Any]:
    """Settings of a rich progress bar that shows on a terminal only."""
    return {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
