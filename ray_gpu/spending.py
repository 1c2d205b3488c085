"""A budget that is renewed: what leaves on one lease under one decision. Writes to the ledger.

Each intent is durable before the first byte that it covers. When it is spent, it is settled and the next
one written, so a long run of small calls costs one durable write per thousand.
"""

from __future__ import annotations

import threading

from zones.budget import Budget, Egress
from zones.errors import BudgetSpentError
from zones.ledger import Ledger


class Spending:
    """What may leave on one lease under one decision.

    Args:
        ledger: Where intents are written.
        egress: What leaves and where to.
        decision: Number of the entry that allowed it.
        calls: Calls that each intent reserves.
        bytes_: Bytes that each intent reserves, padding included.
    """

    def __init__(self, ledger: Ledger, egress: Egress, *, decision: int, calls: int, bytes_: int) -> None:
        self._ledger = ledger
        self._egress = egress
        self._decision = decision
        self._calls = calls
        self._bytes = bytes_
        self._lock = threading.Lock()
        self._budget: Budget | None = None

    def draw(self, calls: int, bytes_: int) -> None:
        """Take from the budget before anything leaves, writing an intent first where none covers it.

        Raises:
            LedgerUnavailableError: The intent could not be written; nothing may leave.
        """
        with self._lock:
            if self._budget is not None:
                try:
                    self._budget.draw(calls, bytes_)
                    return
                except BudgetSpentError:
                    self._budget.settle(outcome="renewed")
            self._budget = self._ledger.intend(
                self._egress, decision=self._decision, calls=self._calls, bytes_=max(self._bytes, bytes_)
            )
            self._budget.draw(calls, bytes_)

    def settle(self, outcome: str, *, rows: int = 0) -> None:
        """Write down what was drawn since the last intent, if anything was.

        Raises:
            LedgerUnavailableError: It could not be written; the intent stands as "at most".
        """
        with self._lock:
            budget, self._budget = self._budget, None
            if budget is not None:
                budget.settle(outcome=outcome, rows=rows)
