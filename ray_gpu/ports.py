"""Every flow between hosts, as data. Pure."""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """What a host is. A zone is of one of two kinds, which zone.yaml calls its carrier."""

    OPERATOR = "operator"
    HEAD = "head"
    GPU = "gpu"
    EDGE_ZONE = "edge-zone"
    CLIENT_ZONE = "client-zone"
    VAULT = "vault"
