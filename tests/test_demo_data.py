"""The data sets of the shipped zones are what their catalogs say."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from ray_gpu import demo_data
from zones.config import load_zone, zone_names

SHIPPED = Path(__file__).parents[1] / "policies"


@pytest.mark.parametrize("zone", zone_names(SHIPPED))
def test_as_the_catalog_says(zone: str, tmp_path: Path) -> None:
    """Each data set of a zone that is not derived is where its catalog says, with these columns in this order."""
    # 300 MB of another one's rows: what is there is not written again.
    (tmp_path / "breast_cancer_resampled.arrow").touch()
    demo_data.write(zone, tmp_path)

    for name, dataset in load_zone(SHIPPED, zone).datasets.items():
        if name != "breast_cancer_resampled" and dataset.derived is None:
            table = pa.ipc.open_file(pa.memory_map(str(tmp_path / dataset.path))).read_all()
            assert table.column_names == list(dataset.columns)
            assert table.num_rows > 100
    assert demo_data.resampled(demo_data.breast_cancer(), 10).num_rows == 10
