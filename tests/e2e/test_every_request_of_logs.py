"""Starts, and the verbs that end a log, killed, refused or not answered in time at their requests, as in test_every_request.py."""

import re

import pytest

from support.interrupted import HOW, again, interrupted, interrupted_start, nth, some_requests
from support.lives import IN_LOG, NOTE, SIZE, assert_reads, flush_to_log_and_kill, publish
from support.model import pattern
from support.server import KI, MI, create_volume

pytestmark = pytest.mark.s3_only


@pytest.mark.parametrize("place, how", [("beside", "killed"), ("elsewhere", "refused"), ("beside", "unanswered")])
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


@pytest.mark.parametrize("place, how", [("beside", "killed"), ("elsewhere", "refused"), ("beside", "unanswered")])
def test_a_start_over_a_log(store, proxy, make_server, how, place):
    """A server that ends at any request of its start loses nothing that the one before had flushed."""
    for number in some_requests():
        volume = create_volume(store, SIZE, 64 * KI, f"started-{number}")
        log = "auto" if place == "beside" else store.url(f"log-{number}")
        parameters = {"backend_wal_url": log, "checkpoint_interval": "1h", "takeover": "yes"}
        server = make_server(volume, **parameters)
        publish(server, 5)
        flush_to_log_and_kill(server, 6)
        fault = proxy.fail(nth(how, number))
        other = make_server(volume, endpoint_url=proxy.endpoint, **parameters)
        interrupted_start(other, how, fault)
        proxy.heal()
        # What it had sent may be carried out after its end.
        proxy.settle()
        assert_reads(server, {0: pattern(MI, 5), IN_LOG: pattern(NOTE, 6)})
        again(volume, "delete", volume.url, "--yes")
        if not fault.hits:
            break
    assert number > 10, "the start was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_a_plain_start(store, proxy, make_server, how):
    """A server that ends at any request of its start leaves a volume that the next one serves."""
    volume = create_volume(store, SIZE, 64 * KI, "started")
    server = make_server(volume, takeover="yes")
    publish(server, 5)
    for number in some_requests():
        fault = proxy.fail(nth(how, number))
        interrupted_start(make_server(volume, endpoint_url=proxy.endpoint, takeover="yes"), how, fault)
        proxy.heal()
        proxy.settle()
        assert_reads(server, {0: pattern(MI, 5)})
        if not fault.hits:
            break
    assert number > 7, "the start was not interrupted where it matters"
    again(volume, "check", volume.url, "--data")
