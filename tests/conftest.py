"""Eight fake CPU devices, exact matrix products, no silent broadcasting; what a failure tells."""

import gc
import hashlib
import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

# Most of a test's time is compiling small programs: LLVM optimises them less here, and where XLA still has its older
# emitters for CPUs, which take half of the time, these are used. What is computed stays the same.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis
import jax
import jaxtyping
import pytest

import tests.annotations

if os.environ.get("CHECK_SHAPES") == "1":  # annotated shapes and dtypes are checked wherever they are run
    jaxtyping.install_import_hook(["dllm_jax.decoding", "dllm_jax.models"], f"{tests.annotations.__name__}.checked")

import dllm_jax
from tests.traces import Case

gc.freeze()  # what was imported stays; and tracing makes many objects that no collection frees
gc.set_threshold(200_000, 20, 20)
hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is no property of it
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


def source_digest() -> str:
    """Of the package's source on disk: two processes of a run, or two moments of one, may not differ in it."""
    files = sorted(Path(dllm_jax.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


SOURCE = source_digest()  # when this process imported it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Says with a failure which source the process ran."""
    report = yield
    if report.failed:
        told = f"{dllm_jax.__file__}, {SOURCE} when imported, {source_digest()} now, jax {jax.__version__}"
        report.sections.append(("source", told))
    return report


@pytest.fixture(scope="module", autouse=True)
def released() -> Iterator[None]:
    """Programs leave memory behind the module that compiled them: XLA crashed in processes that kept a thousand."""
    yield
    jax.clear_caches()


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
