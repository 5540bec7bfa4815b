"""One writer: of two servers on one volume, one is refused, or the other is shut out. Nothing acknowledged is lost."""

import contextlib
import os
import re
import signal
import threading
import time

import nbd
import pytest

from support.lease import lease_of, put_lease_from_elsewhere
from support.lossy import LossyProxy, Rule
from support.model import pattern
from support.process import wait_for
from support.server import MI, flush_until_it_succeeds

EIO = 5


def refused(server) -> str:
    """What a server says that must end before it serves."""
    server.spawn()
    assert server.wait() != 0, server.log_text()
    return server.log_text()


def assert_fenced(client) -> None:
    """Writes and flushes fail for good, with EIO."""
    for request in (client.flush, lambda: client.pwrite(b"x" * 512, 0), client.flush):
        with pytest.raises(nbd.Error) as caught:
            request()
        assert caught.value.errnum == EIO


def test_a_second_server_is_refused_on_the_terminal_naming_the_first(make_volume, make_server):
    volume = make_volume()
    first = make_server(volume).start()
    with first.connect() as client:
        text = refused(make_server(volume))
        assert volume.url in text and f"pid {first.process.pid}" in text and "takeover=yes" in text, text
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
    # Not only while clients are there.
    assert f"pid {first.process.pid}" in refused(make_server(volume))
    assert lease_of(volume)["holder"]["pid"] == first.process.pid
    assert f"(pid {first.process.pid})" in volume.cli("info", volume.url).stdout


@pytest.mark.file_only
def test_of_two_idle_servers_the_one_whose_client_comes_second_refuses_it(make_volume, make_server, tmp_path):
    volume = make_volume()
    pid_files = [tmp_path / "first", tmp_path / "second"]
    first, second = (make_server(volume, nbdkit_options=["-P", str(file)]) for file in pid_files)
    for server, file in zip((first, second), pid_files):
        server.spawn()
        # nbdkit writes it once it takes connections.
        wait_for(lambda: file.exists() and file.read_text().endswith("\n"), "a server without a client to start")
    with second.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
        with pytest.raises(nbd.Error):
            first.handle()
        wait_for(lambda: f"pid {second.process.pid}" in first.log_text(), "the log to name the holder")
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
    assert second.terminate() == 0


@pytest.mark.parametrize("option", ["-r", "-fr", "--readonly", "--read-only"])
@pytest.mark.file_only
def test_a_read_only_server_needs_no_lease(make_volume, make_server, option):
    volume = make_volume()
    writer = make_server(volume).start()
    with writer.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
        with make_server(volume, nbdkit_options=[option]).start().connect() as reader:
            assert reader.pread(1 * MI, 0) == pattern(1 * MI, 1)


def test_a_killed_server_is_followed_at_once(make_volume, make_server):
    """The next one on the same machine sees that the process is gone, however long its lease would last."""
    volume = make_volume()
    server = make_server(volume, lease_duration="1h").start()
    epochs = [lease_of(volume)["epoch"]]
    for life in range(3):
        with server.connect() as client:
            client.pwrite(pattern(1 * MI, life), life * MI)
            client.flush()
            server.kill()
        assert lease_of(volume)["state"] == "held"
        server.start()
        epochs.append(lease_of(volume)["epoch"])
    assert epochs == sorted(set(epochs)), epochs
    assert "and has ended" in server.log_text(), "nobody is told whose lease that was"
    with server.connect() as client:
        for life in range(3):
            assert client.pread(1 * MI, life * MI) == pattern(1 * MI, life)


def test_sigterm_releases_the_lease(make_volume, make_server):
    volume = make_volume()
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
    assert lease_of(volume)["state"] == "held"
    assert server.terminate() == 0
    assert lease_of(volume)["state"] == "released"
    second = make_server(volume).start()
    with second.connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
    assert "holding the lease" in second.log_text() and "has ended" not in second.log_text(), second.log_text()


@pytest.mark.parametrize("second_publishes", [True, False])
def test_a_stopped_server_that_wakes_up_after_a_takeover_is_shut_out(make_volume, make_server, second_publishes):
    volume = make_volume()
    first = make_server(volume, checkpoint_interval="1h").start()
    second = make_server(volume, takeover="yes")
    client = first.handle()
    client.pwrite(pattern(1 * MI, 1), 0)
    client.flush()
    # The checkpoint's entry is written after the answer. A server that is stopped while it writes to a directory may have the lock of
    # it, and nobody could follow.
    entry = re.compile(r"checkpoints(/|%2F)\d+$")
    wait_for(lambda: any(map(entry.search, volume.store.objects())), "the checkpoint to be entered in the list")
    client.pwrite(pattern(1 * MI, 9), 0)  # answered, and covered by no flush
    first.process.send_signal(signal.SIGSTOP)
    second.start()
    with second.connect() as other:
        if second_publishes:
            other.pwrite(pattern(1 * MI, 2), 1 * MI)
            other.flush()
        first.process.send_signal(signal.SIGCONT)
        assert_fenced(client)
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 9), "its reads go on"
        assert client.pread(1 * MI, 8 * MI) == bytes(1 * MI)
        other.pwrite(pattern(1 * MI, 3), 2 * MI)
        other.flush()
        assert other.pread(1 * MI, 0) == pattern(1 * MI, 1)
    lines = [line for line in first.log_text().splitlines() if "fenced:" in line and "ERROR" in line]
    assert len(lines) == 1 and f"pid {second.process.pid}" in lines[0], lines
    client.shutdown()
    first.terminate()
    assert lease_of(volume)["holder"]["pid"] == second.process.pid, "the first gave back what was not its own"
    second.kill()
    third = make_server(volume).start()
    with third.connect() as reader:
        assert reader.pread(1 * MI, 0) == pattern(1 * MI, 1)
        assert reader.pread(1 * MI, 1 * MI) == (pattern(1 * MI, 2) if second_publishes else bytes(1 * MI))
        assert reader.pread(1 * MI, 2 * MI) == pattern(1 * MI, 3)


def test_an_idle_server_notices_the_takeover_by_itself(make_volume, make_server):
    volume = make_volume()
    first = make_server(volume, lease_duration="2s").start()
    second = make_server(volume, takeover="yes").start()
    named = f"pid {second.process.pid}"
    wait_for(lambda: "fenced:" in first.log_text() and named in first.log_text(), "the first to notice")
    with first.connect() as client:
        assert_fenced(client)


@pytest.mark.s3_only
def test_a_holder_that_vanished_elsewhere_is_waited_for_and_said_so(make_volume, make_server):
    volume = make_volume()
    make_server(volume).start().terminate()
    lease = put_lease_from_elsewhere(volume, 3000)
    server = make_server(volume)
    started = time.monotonic()
    server.start()
    assert time.monotonic() - started >= 3
    text = server.log_text()
    assert "far-away" in text and "waiting up to 3 s" in text, text
    assert lease_of(volume)["epoch"] == lease["epoch"] + 1


@pytest.mark.s3_only
def test_a_holder_that_renews_elsewhere_is_respected_and_taken_over_when_told(make_volume, make_server):
    volume = make_volume()
    make_server(volume).start().terminate()
    put_lease_from_elsewhere(volume, 3_600_000)
    is_over = threading.Event()

    def renew() -> None:
        renewals = 1
        while not is_over.wait(0.2):
            put_lease_from_elsewhere(volume, 3_600_000, renewals=renewals)
            renewals += 1

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    text = refused(make_server(volume))
    is_over.set()
    renewing.join()
    assert "far-away" in text and "renewed its lease" in text, text
    make_server(volume, takeover="yes").start()
    assert lease_of(volume)["holder"]["host"] == os.uname().nodename


def test_the_verbs_that_change_a_volume_respect_its_server(make_volume, make_server):
    volume = make_volume(16 * MI)
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
        for verb in (
            ["resize", volume.url, "--size", "8M", "--allow-shrink"],
            ["delete", volume.url, "--yes"],
            ["file", "delete", volume.url, "--yes"],
        ):
            done = volume.cli(*verb)
            assert done.returncode != 0, verb
            assert f"pid {server.process.pid}" in done.stderr and "--takeover" in done.stderr, done.stderr
        client.pwrite(pattern(1 * MI, 2), 1 * MI)
        client.flush()
        done = volume.cli("resize", volume.url, "--size", "32M", "--takeover")
        assert done.returncode == 0, done.stderr
        # A flush with nothing to publish does not look. The server may have seen by itself that it was shut out.
        with contextlib.suppress(nbd.Error):
            client.pwrite(pattern(1 * MI, 9), 0)
        assert_fenced(client)
    server.terminate()
    assert lease_of(volume)["state"] == "released", "the verb gives the lease back"
    server.start()
    with server.connect() as client:
        assert client.get_size() == 32 * MI
        assert client.pread(2 * MI, 0) == pattern(1 * MI, 1) + pattern(1 * MI, 2)


@pytest.fixture
def proxy(minio):
    proxy = LossyProxy(minio.endpoint)
    yield proxy
    proxy.close()


LEASE_WRITE = r"^PUT \S+\.meta/lease[? ]"


@pytest.mark.s3_only
# The client tries three times; when all of them are lost, the lease is read back.
@pytest.mark.parametrize("times", [1, 3])
def test_a_lease_whose_answer_is_lost_is_known_for_ones_own(make_volume, make_server, proxy, times):
    server = make_server(make_volume(), endpoint_url=proxy.endpoint)
    server.start().terminate()  # so that the store has been probed
    rule = proxy.rule = Rule("lose", LEASE_WRITE, times_max=times)
    server.start()
    assert rule.hits == times, "the test has tested nothing"
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    server.start()
    with server.connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)


@pytest.mark.s3_only
def test_a_lease_that_cannot_be_renewed_is_not_lost(make_volume, make_server, proxy):
    """Nobody took the volume over: the server goes on, however long its lease has run out."""
    volume = make_volume()
    server = make_server(volume, endpoint_url=proxy.endpoint, lease_duration="2s").start()
    with server.connect() as client:
        rule = proxy.rule = Rule("refuse", LEASE_WRITE)
        # The renewal before the first refused one may have been under way when the rule came.
        wait_for(lambda: rule.hits, "a renewal to be refused")
        before = lease_of(volume)["renewals"]
        started = time.monotonic()

        def is_long_past() -> bool:
            client.pwrite(pattern(1 * MI, 1), 0)
            client.flush()
            return time.monotonic() - started >= 5 and rule.hits > 2

        wait_for(is_long_past, "more renewals to be refused", limit_s=240)
        assert lease_of(volume)["renewals"] == before
        proxy.rule = None
        wait_for(lambda: lease_of(volume)["renewals"] > before, "the lease to be renewed again")
        client.pwrite(pattern(1 * MI, 2), 0)
        client.flush()
    assert "fenced" not in server.log_text()


@pytest.mark.s3_only
def test_a_volume_deleted_under_its_server_stays_deleted(make_volume, make_server):
    volume = make_volume()
    server = make_server(volume, lease_duration="2s", io_timeout="3s").start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        flush_until_it_succeeds(client)
        # Written after the answer; it must not come after the removal.
        wait_for(lambda: any(".meta/checkpoints/" in key for key in volume.store.objects()), "the checkpoint to be in the list")
        assert volume.cli("delete", volume.url, "--yes", "--takeover").returncode == 0
        # The lease may be looked at before the write, or only before the publish.
        with pytest.raises(nbd.Error):
            client.pwrite(pattern(1 * MI, 2), 0)
            client.flush()
    server.terminate()
    # At most a part of the checkpoint that the server was about to make.
    left = volume.store.objects_of_volumes()
    assert not any(".meta/" in key or key.endswith("/inode") for key in left), left
    assert "there is no volume" in volume.cli("info", volume.url).stderr
