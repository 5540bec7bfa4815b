"""`hypernbd restart` where the next server cannot start at once."""

import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.faulty import Fault
from support.process import check, wait_for
from support.serve import served_with_buffer
from support.server import MI
from support.stores import REGION


@pytest.mark.s3_only
def test_a_restart_is_over_when_the_next_server_listens(make_volume, nbdkit, proxy):
    """One that cannot start is started again; a store that is away keeps the one that runs from being ended."""
    volume = make_volume(64 * MI)
    volume.store.cli_options = ["--endpoint-url", proxy.endpoint, "--region", REGION]
    data = random.Random(5).randbytes(MI)
    with served_with_buffer(volume, nbdkit, "--lease-duration", "1h") as served:
        client = served.connect()
        client.pwrite(data, 5)
        before = check("pgrep", "-P", str(served.process.pid))
        proxy.fail(Fault("outage"))
        restart = volume.cli("restart", str(served.socket))
        assert restart.returncode == 1 and "was not restarted" in restart.stderr, restart.stderr
        assert check("pgrep", "-P", str(served.process.pid)) == before
        proxy.heal()
        assert client.pread(len(data), 5) == data
        refused = proxy.fail(Fault("denied", r"^PUT \S+\.meta/lease"))
        with ThreadPoolExecutor(1) as pool:
            restarting = pool.submit(volume.cli, "restart", str(served.socket))
            wait_for(lambda: served.log.read_text().count("the next server did not start") > 1, "it to be tried again")
            assert refused.hits
            proxy.heal()
            done = restarting.result()
        # It does not wait for ever.
        assert done.returncode == 0 or "does not listen yet" in done.stderr, done.stderr
        assert served.connect().pread(len(data), 5) == data
        served.process.send_signal(signal.SIGTERM)
        assert served.wait() == 0, served.log.read_text()
