"""Verbs and starts that are killed, refused or not answered in time at one of their requests.

A request that is not answered in time is carried out, and the client hears nothing of it and asks again.
"""

import os
import re
import threading
from dataclasses import dataclass

import nbd

from .faulty import Fault
from .lives import begin, listens
from .process import wait_for

REQUESTS_MAX = 160  # no verb has as many: a loop that goes on is a defect of the test


HOW = ("killed", "refused", "unanswered")


def some_requests() -> range:
    """The numbers of requests to interrupt: every seventh, or each of them with HYPERNBD_EVERY_REQUEST=1."""
    return range(1, REQUESTS_MAX, 1 if os.environ.get("HYPERNBD_EVERY_REQUEST") else 7)


def requests(how: str, few: bool = False) -> range:
    """The numbers of requests to interrupt: every second one, each in one of the ways. All of them, in each way, where a verb has a few
    alone, or with HYPERNBD_EVERY_REQUEST=1."""
    if few or os.environ.get("HYPERNBD_EVERY_REQUEST"):
        return range(1, REQUESTS_MAX)
    return range(1 + 2 * HOW.index(how), REQUESTS_MAX, 2 * len(HOW))


@dataclass
class Nth(Fault):
    """A fault of one request, by its number. What a probe does at places of its own is not counted."""

    number: int = 1
    seen: int = 0

    def applies(self, line: str) -> bool:
        if re.search(r"\.meta(/|%2F)probe-", line):
            return False
        self.seen += 1
        if self.seen != self.number:
            # A refusal is not tried again, and what hangs is killed.
            return False
        self.hits.append(line)
        return True


def nth(how: str, number: int) -> Nth:
    """The fault by which what gives this request is killed, once that hangs, is refused, or hears nothing of what was done."""
    return Nth({"killed": "hang", "refused": "expired", "unanswered": "reset_after"}[how], number=number)


def interrupted(volume, proxy, how: str, number: int, log, *words) -> str | None:
    """Gives a verb that is interrupted at this request; what the request was, or None if there are fewer."""
    fault = proxy.fail(nth(how, number))
    process = begin(volume, proxy, log, *words)
    wait_for(lambda: fault.hits or process.poll() is not None, "the verb to come to the request")
    if not fault.hits:
        assert process.wait() == 0, log.read_text()
        return None
    if how == "killed":
        process.kill()
    status = process.wait()
    proxy.heal()
    # What it had sent at the same time may be carried out after its end, and what is left is looked at next.
    proxy.settle()
    assert how != "unanswered" or status == 0, (fault.hits[0], log.read_text())
    assert "panicked" not in log.read_text(), log.read_text()
    return fault.hits[0]


def again(volume, *words) -> str:
    """The same verb without a fault, which must succeed."""
    done = volume.cli(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def interrupted_start(server, how: str, fault: Nth) -> None:
    """Starts a server through a proxy that has this fault, and lets it come to its first client or to its end; then kills it."""
    server.spawn()
    is_listening = False

    def has_begun() -> bool:
        nonlocal is_listening
        is_listening = listens(server.socket)
        return is_listening or bool(fault.hits) or not server.is_running()

    wait_for(has_begun, "the server to listen")
    if is_listening:
        client = begin_to_connect(server)
        wait_for(lambda: fault.hits or not client.is_alive(), "the client to be served, or the server to come to the request")
        if how != "killed":
            client.join()
        assert how != "unanswered" or server.is_running(), (fault.hits, server.log_text())
        server.kill()
        client.join()
    elif server.is_running():
        server.kill()
