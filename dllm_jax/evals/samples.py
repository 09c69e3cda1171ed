"""The table of all samples of a sweep, one row per variant and sample, as CSV and Parquet."""

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_jax.data.outputs import TEMPORARY, replace_file

NAME = "samples"


def write_samples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes the table.

    Args:
        folder: of the sweep.
        rows: at least one, all with the same columns.

    Returns:
        The names of the files: Parquet only where pyarrow is installed (the extra `report`).
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    replace_file(folder / f"{NAME}.csv", text.getvalue())
    if importlib.util.find_spec("pyarrow") is None:
        return [f"{NAME}.csv"]
    from pyarrow import Table, float64, parquet, schema

    # A column of nulls alone (no sample was traced) keeps its type, so that tables of several sweeps fit together.
    table = Table.from_pylist(list(rows))
    fields = [field.with_type(float64()) if field.name.endswith("_confidence") else field for field in table.schema]
    temporary = folder / f"{NAME}.parquet{TEMPORARY}"
    parquet.write_table(table.cast(schema(fields)), temporary)
    temporary.replace(folder / f"{NAME}.parquet")
    return [f"{NAME}.csv", f"{NAME}.parquet"]
