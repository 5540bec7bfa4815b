"""Two servers on one volume: of both, one at most is told that its data is durable."""

import nbd
import pytest

from support.model import pattern
from support.server import MI


def test_a_foreign_publish_stops_the_other_server(make_volume, make_server):
    """The second to publish is refused, for good, and says EIO; the first one's data is never overwritten."""
    volume = make_volume()
    one, other = (make_server(volume, checkpoint_interval="1h").start() for _ in range(2))
    with one.connect() as first, other.connect() as second:
        first.pwrite(pattern(1 * MI, 1), 0)
        second.pwrite(pattern(1 * MI, 2), 0)
        first.flush()
        for _ in range(3):
            with pytest.raises(nbd.Error) as caught:
                second.flush()
            assert caught.value.errnum == 5  # EIO
        first.pwrite(pattern(1 * MI, 3), 2 * MI)
        first.flush()
        with pytest.raises(nbd.Error):
            second.flush()
    one.kill()
    other.kill()
    one.start()
    with one.connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
        assert client.pread(1 * MI, 2 * MI) == pattern(1 * MI, 3)
