"""Volumes with a log: the verbs that end it, and the starts that replay it, killed or refused at each of their requests in turn."""

import re
import threading

import nbd
import pytest

from support.interrupted import Nth, again, interrupted, some_requests
from support.lives import IN_LOG, NOTE, SIZE, assert_reads, flush_to_log_and_kill, publish
from support.model import pattern
from support.process import wait_for
from support.server import KI, MI, create_volume

pytestmark = pytest.mark.s3_only


@pytest.mark.parametrize("place, how", [("beside", "killed"), ("elsewhere", "refused")])
@pytest.mark.parametrize("verb", ["replay", "discard"])
def test_wal(store, proxy, make_server, tmp_path, how, place, verb):
    """What was flushed to the log is there until it was given up, and the same verb finishes what was begun."""
    for number in some_requests():
        volume = create_volume(store, SIZE, 64 * KI, f"logged-{number}")
        log = "auto" if place == "beside" else store.url(f"log-{number}")
        server = make_server(volume, backend_wal_url=log, checkpoint_interval="1h")
        publish(server, 5)
        flush_to_log_and_kill(server, 6)
        words = ["wal", verb, volume.url, "--takeover", *(["--yes"] if verb == "discard" else [])]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        if verb == "discard":
            again(volume, *words)
            expected = {0: pattern(MI, 5), IN_LOG: bytes(NOTE)}
        else:
            if number % 2:
                again(volume, *words)
            expected = {0: pattern(MI, 5), IN_LOG: pattern(NOTE, 6)}
        server.parameters["takeover"] = "yes"
        assert_reads(server, expected)
        again(volume, "delete", volume.url, "--yes")
        left = [key for key in store.objects() if re.search(rf"/(logged|log)-{number}[/.]", key)]
        assert not left, (at, left)
    assert number > 8, "the verb was not interrupted where it matters"


def begin_to_connect(server) -> threading.Thread:
    """A client that waits until the server serves or refuses it."""

    def connect() -> None:
        try:
            server.handle().shutdown()
        except nbd.Error:
            pass  # the server was killed, or does not start: the test looks at what it left

    client = threading.Thread(target=connect)
    client.start()
    return client


@pytest.mark.parametrize("place, how", [("beside", "killed"), ("elsewhere", "refused")])
def test_a_start_over_a_log(store, proxy, make_server, how, place):
    """A server that ends at any request of its start loses nothing that the one before had flushed."""
    for number in some_requests():
        volume = create_volume(store, SIZE, 64 * KI, f"started-{number}")
        log = "auto" if place == "beside" else store.url(f"log-{number}")
        parameters = {"backend_wal_url": log, "checkpoint_interval": "1h", "takeover": "yes"}
        server = make_server(volume, **parameters)
        publish(server, 5)
        flush_to_log_and_kill(server, 6)
        fault = proxy.fail(Nth({"killed": "hang", "refused": "expired"}[how], number=number))
        other = make_server(volume, endpoint_url=proxy.endpoint, **parameters)
        other.spawn()
        wait_for(lambda: fault.hits or other.socket.exists() or not other.is_running(), "the server to listen")
        if other.socket.exists():
            client = begin_to_connect(other)
            wait_for(lambda: fault.hits or not client.is_alive(), "the client to be served, or the server to come to the request")
            if how == "refused":
                client.join()
            other.kill()
            client.join()
        elif other.is_running():
            other.kill()
        proxy.heal()
        assert_reads(server, {0: pattern(MI, 5), IN_LOG: pattern(NOTE, 6)})
        again(volume, "delete", volume.url, "--yes")
        if not fault.hits:
            break
    assert number > 10, "the start was not interrupted where it matters"
