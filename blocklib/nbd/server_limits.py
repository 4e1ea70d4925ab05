"""What one server may be made to spend by its clients."""

from __future__ import annotations

from blocklib.records import Record


class ServerLimits(Record):
    """Limits of an NBD server; lengths are bytes, times seconds."""

    connections: int = 256
    """Clients in the transmission phase; the next ones wait until one of them leaves."""
    handshakes: int = 64
    """Clients in the handshake; a new one takes the place of the one that has been at it longest."""
    handshake_seconds: float = 20.0
    """From the connection to the end of the handshake, TLS included."""
    options: int = 1000
    """Options of one handshake."""
    request_bytes: int = 32 << 20
    """Payload of one request; a client that sends more is cut off."""
    buffered_bytes: int = 64 << 20
    """Payload in memory for one client: requests that are worked at, replies that it has not taken yet."""
    requests: int = 32
    """Requests of one client that are worked at together; the others wait their turn."""
    threads: int = 16
    """Threads of the whole server that wait for storage."""
    stop_seconds: float = 5.0
    """How long a stopping server waits for clients to take the replies that are due to them."""
