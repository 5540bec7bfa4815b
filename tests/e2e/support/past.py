"""Verbs on a volume, and clients of its earlier checkpoints."""

import nbd

from .model import read_all
from .server import leave


def verb(volume, *words: str, status: int = 0) -> str:
    """The output of a verb on a volume."""
    done = volume.cli(*words)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def at(server, name: str) -> nbd.NBD:
    """A connection to an export of a server."""
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.set_export_name(name)
    client.connect_unix(str(server.socket))
    return client


def read_at(server, name: str, size_bytes: int) -> bytes:
    """The first bytes of an export."""
    client = at(server, name)
    try:
        return read_all(client, size_bytes)
    finally:
        leave(client)
