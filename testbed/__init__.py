"""Several hosts on one machine, for tests: namespaces, routed links, firewalls, and an sshd where ``ray up`` needs one.

Not part of the wheel. See docs/testbed.md; begin with :class:`Testbed`.
"""

from __future__ import annotations

from testbed.bed import Testbed, lacking
from testbed.host import Host, HostProcess

__all__ = ["Testbed", "Host", "HostProcess", "lacking"]
