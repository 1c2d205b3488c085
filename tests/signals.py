"""How tests start programs that shall hear Ctrl-C."""

from __future__ import annotations

import signal


def hear_ctrl_c() -> None:
    """Undo what a shell does to programs that it starts in the background: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
