"""The callable class for Ray Data's ``map_batches``, on hosts of a zone. Needs no Ray itself.

The private Ray cluster of a zone (docs/howto-ray-data.md) carries tables, or names of parts of a data set, between the
zone's own hosts. What leaves the zone leaves by the gateway of the host that an actor of Ray Data's is on, as from a
notebook there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_gpu.arrays import column_of
from ray_gpu.attaching import attach
from ray_gpu.remote_function import RemoteFunction

#: Column of a result that is an array.
RESULT_COLUMN = "result"
#: Columns of :func:`parts`.
_PART, _OF, _SEED = "part", "parts", "seed"


def parts(count: int, *, seed: int = 0) -> pa.Table:
    """Return names of disjoint random parts of a data set, for :class:`OnGpu` with ``dataset``.

    Args:
        count: How many, at least 1; together they are all rows.
        seed: The same one gives the same parts.

    Returns:
        A table of *count* rows: ``part``, ``parts`` and ``seed``, each ``int64``.

    Raises:
        ValueError: *count* is below 1.
    """
    if count < 1:
        raise ValueError(f"a data set has at least 1 part, not {count}")
    return pa.table(
        {
            _PART: pa.array(range(count), pa.int64()),
            _OF: pa.array([count] * count, pa.int64()),
            _SEED: pa.array([seed] * count, pa.int64()),
        }
    )


class OnGpu:
    """Runs a remote function on the batches of a Ray Data actor, by the gateway of the actor's own host.

    ::

        ds.map_batches(
            ray_gpu.OnGpu,
            fn_constructor_args=[strain],                  # a function with @ray_gpu.gpu_remote above it
            fn_constructor_kwargs={"zone": "clinic", "login": "~/.ray-gpu/login.json"},
            batch_format="pyarrow",
            concurrency=2,
        )

    It attaches once, when it is made, and all of the zone's controls hold as in a notebook. Only the *path* of the
    login is pickled: the file lies on each host.

    Args:
        function: What runs on the GPU nodes, by its ``map``: one row for each row. Its options go along.
        zone: Name of the zone.
        dataset: Data set of the catalog that batches name parts of (:func:`parts`), and the gateway reads; policy goes
            by its columns' classes. Without it batches are the rows themselves, and have the zone's default class.
        keep: Columns that go along with each row *inside the zone*, such as a patient's number: of the data set, or
            of the batch. They do not leave, unless they are among the function's own columns.
        attaching: ``purpose``, ``login`` and ``state_dir`` of :func:`ray_gpu.attach`: paths on each host.

    Raises:
        TypeError: *function* is no remote function, or the login is given as a token.
        UnknownNameError, GatewayUnavailableError, VaultError, ConfigError: As :func:`ray_gpu.attach`.
    """

    def __init__(
        self,
        function: RemoteFunction[Any, Any],
        zone: str,
        *,
        dataset: str | None = None,
        keep: Sequence[str] = (),
        **attaching: Any,
    ) -> None:
        if not isinstance(function, RemoteFunction):
            raise TypeError(f"OnGpu takes a function with @ray_gpu.gpu_remote above it, not {type(function).__name__}")
        if "token" in attaching:
            raise TypeError("OnGpu takes no token, which Ray would write down; name a file on each host, as login=...")
        #: The session with this host's gateway.
        self.session = attach(zone, **attaching)
        self._function = function.options(session=self.session)
        self._dataset, self._keep = dataset, list(keep)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the kept columns and the function's result, one row for each row of the batch or of its parts.

        Args:
            batch: Rows; with ``dataset`` a table as :func:`parts` returns, any of its rows.

        Returns:
            The function's table, or its array as the column ``result``, after the columns to keep.

        Raises:
            EgressDeniedError: Policy refuses; nothing of the batch left the zone.
            ValueError: A kept column has the name of one of the result's, or the batch names no parts.
            Exception: What the function raised.
        """
        if self._dataset is None:
            return self._with(batch.select(self._keep), self._function.map(batch))
        try:
            named = [batch.column(name).to_pylist() for name in (_PART, _OF, _SEED)]
        except KeyError:
            raise ValueError("with `dataset` batches name its parts; begin with ray_gpu.parts(count)") from None
        tables = [self._part(*one) for one in zip(*named, strict=True)]
        return pa.concat_tables(tables) if tables else batch

    def _part(self, part: int, of: int, seed: int) -> pa.Table:
        """Compute on one part of the data set."""
        assert self._dataset is not None
        rows = self.session.read(self._dataset).split(*[1 / of] * of, seed=seed)[part]
        kept = rows.select(self._keep).to_arrow() if self._keep else pa.table({})
        return self._with(kept, self._function.map(rows))

    def _with(self, kept: pa.Table, result: Any) -> pa.Table:
        found = pa.table({RESULT_COLUMN: column_of(result)}) if isinstance(result, np.ndarray) else result
        if both := sorted(set(self._keep) & set(found.column_names)):
            raise ValueError(f"the result has columns of the same names as `keep`: {', '.join(both)}; rename them")
        return pa.table([*kept.columns, *found.columns], names=[*self._keep, *found.column_names])
