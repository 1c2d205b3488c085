"""``python -m testbed``: build the hosts, say how to enter them, and take them down on Ctrl-C."""

from __future__ import annotations

import signal
import sys

from testbed import Testbed, lacking
from testbed.ssh import LAUNCHER_KEY


def main() -> int:
    """Run a test bed until a signal; return the exit status."""
    reason = lacking()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    try:
        # From the first moment: a signal while building ends the bed as one while waiting does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with Testbed() as bed:
            print(f"A test bed of {len(bed.hosts)} hosts and a router; keys and logs: {bed.path}\n")
            for host in [*bed, bed.router]:
                role = bed.roles[host.name].value if host.name in bed.roles else "router"
                place = f"{host.address}  {host.address6}" if host.name in bed.roles else ""
                print(f"{host.name:14}{role:12} {place}\n  {host.enter_line()}")
            print(f"\nLauncher's key on the operator: {LAUNCHER_KEY}. Ctrl-C takes everything down.", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("down")
    return 0


if __name__ == "__main__":
    sys.exit(main())
