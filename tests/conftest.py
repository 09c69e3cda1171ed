"""Eight fake CPU devices, exact matrix products, no silent broadcasting; and the count of reference runs reproduced."""

import os
from collections import Counter
from collections.abc import Callable, Iterable

# Most of a test's time is compiling small programs: LLVM optimises them less here. What is computed stays the same.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import hypothesis
import jax
import pytest

from tests.traces import Case

hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is no property of it
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Call it with a recorded run that was reproduced; the summary counts them by section."""
    return lambda case: request.node.user_properties.append(("golden", case.section))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many reference runs were reproduced exactly."""
    reports: Iterable[pytest.TestReport] = terminalreporter.stats.get("passed", [])
    counts = Counter(value for report in reports for key, value in report.user_properties if key == "golden")
    if counts:
        told = ", ".join(f"{section} {count}" for section, count in sorted(counts.items()))
        terminalreporter.write_line(f"reference runs reproduced: {told}")
