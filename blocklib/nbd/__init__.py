"""Network Block Device: the protocol as published in ``doc/proto.md``, client and server."""

from __future__ import annotations
