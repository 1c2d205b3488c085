"""Real data for the embedded zones: ships inside scikit-learn and statsmodels. Writes files.

Run as a program, since both libraries are slow to import and needed only once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

#: Rows of the volume data set, drawn from the 569 real ones with replacement: about 300 MB.
RESAMPLED_ROWS = 1_250_000
_SEED = 20_190


def randhie() -> pa.Table:
    """Return the RAND Health Insurance Experiment's 20,190 person-years, with a made-up ``record_number``."""
    from statsmodels.datasets import randhie as data  # noqa: PLC0415 - slow, optional

    frame = data.load_pandas().data
    table = pa.table({name: np.ascontiguousarray(frame[name], dtype=np.float64) for name in frame.columns})
    numbers = np.random.default_rng(_SEED).permutation(len(frame)) + 1_000_000
    return table.append_column("record_number", pa.array(numbers, pa.int64()))


def breast_cancer() -> pa.Table:
    """Return the Wisconsin diagnostic data: 569 real rows, 30 features and the target."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415 - slow, optional

    data = load_breast_cancer()
    columns = {str(name).replace(" ", "_"): data.data[:, i].copy() for i, name in enumerate(data.feature_names)}
    return pa.table({**columns, "target": data.target.astype(np.int64)})


def resampled(table: pa.Table, rows: int = RESAMPLED_ROWS) -> pa.Table:
    """Return *rows* rows drawn from *table* with replacement, always the same ones."""
    return table.take(np.random.default_rng(_SEED).integers(0, table.num_rows, rows)).combine_chunks()


def digits() -> pa.Table:
    """Return scikit-learn's 1,797 handwritten digits: 64 grey values from 0 to 16 each, and the label."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow, optional

    data = load_digits()
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(data.data.astype(np.float32).reshape(-1)), 64)
    return pa.table({"pixels": pixels, "label": pa.array(data.target.astype(np.int64))})


def macrodata() -> pa.Table:
    """Return statsmodels' United States macroeconomic series, 203 quarters."""
    from statsmodels.datasets import macrodata as data  # noqa: PLC0415 - slow, optional

    frame = data.load_pandas().data
    return pa.table({name: np.ascontiguousarray(frame[name], dtype=np.float64) for name in frame.columns})


def diabetes() -> pa.Table:
    """Return scikit-learn's diabetes data: 442 patients, ten scaled measurements and the target."""
    from sklearn.datasets import load_diabetes  # noqa: PLC0415 - slow, optional

    data = load_diabetes()
    columns = {str(name): data.data[:, i].copy() for i, name in enumerate(data.feature_names)}
    return pa.table({**columns, "target": data.target})


def fair() -> pa.Table:
    """Return statsmodels' survey of 6,366 people about their marriages."""
    from statsmodels.datasets import fair as data  # noqa: PLC0415 - slow, optional

    frame = data.load_pandas().data
    return pa.table({name: np.ascontiguousarray(frame[name], dtype=np.float64) for name in frame.columns})


def write(zone: str, directory: Path) -> None:
    """Write the data sets of an embedded zone that are not there yet."""
    makers: dict[str, dict[str, Callable[[], pa.Table]]] = {
        "clinic": {
            "randhie": randhie,
            "breast_cancer": breast_cancer,
            "breast_cancer_resampled": lambda: resampled(breast_cancer()),
        },
        "trading": {"macrodata": macrodata},
        "openlab": {"diabetes": diabetes, "digits": digits, "fair": fair},
    }
    for name, make in makers.get(zone, {}).items():
        path = directory / f"{name}.arrow"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        table: pa.Table = make()
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        os.replace(partial, path)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
