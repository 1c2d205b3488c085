"""Steps of zone "clinic": reviewed functions that make one data set out of others.

`ray-gpu data derive clinic` runs them, and catalog.yaml says on what. Raise a step's version when you change it.
"""

import pyarrow as pa
import pyarrow.compute as pc

from zones.steps import step

#: More visits than this in a year are many.
MANY_VISITS = 5


@step(version=1)
def clean(years: pa.Table) -> pa.Table:
    """Leave out years whose physical limitations are a mean that was filled in, and cap visits at 30."""
    known = years.filter(pc.field("physlm").isin([0.0, 1.0]))
    visits = pc.min_element_wise(known["mdvis"], pa.scalar(30.0))
    return known.set_column(known.column_names.index("mdvis"), "mdvis", visits)


@step(version=1)
def label(years: pa.Table) -> pa.Table:
    """Say of each year whether there were many visits."""
    many = pc.greater(years["mdvis"], MANY_VISITS).cast(pa.int64())
    return years.drop_columns(["mdvis"]).append_column("many_visits", many)


@step(version=1)
def features(years: pa.Table) -> pa.Table:
    """Scale each feature to mean 0 and deviation 1."""
    for place, name in enumerate(years.column_names):
        if name not in {"many_visits", "row"}:
            column = years[name]
            scaled = pc.divide(pc.subtract(column, pc.mean(column)), pc.stddev(column))
            years = years.set_column(place, name, scaled)
    return years
