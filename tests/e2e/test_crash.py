"""kill -9 at random moments under four writers; every block is checked against what was acknowledged."""

import pytest

from support.server import KI
from support.stamps import SIZE, kill_and_check


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_flushed_writes_survive_kill_9(make_volume, make_server, seed, block_bytes):
    server = make_server(make_volume(SIZE, block_bytes), checkpoint_interval="100ms").start()
    kill_and_check(server, seed, rounds=8)
