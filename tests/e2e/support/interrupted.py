"""Verbs and starts that are killed or refused at one of their requests."""

import os
import re
from dataclasses import dataclass

from .faulty import Fault
from .lives import begin
from .process import wait_for

REQUESTS_MAX = 120  # no verb has as many: a loop that goes on is a defect of the test


def some_requests() -> range:
    """The numbers of requests to interrupt: every seventh, or each of them with HYPERNBD_EVERY_REQUEST=1."""
    return range(1, REQUESTS_MAX, 1 if os.environ.get("HYPERNBD_EVERY_REQUEST") else 7)


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


def interrupted(volume, proxy, how: str, number: int, log, *words) -> str | None:
    """Gives a verb that is interrupted at this request; what the request was, or None if there are fewer."""
    fault = proxy.fail(Nth({"killed": "hang", "refused": "expired"}[how], number=number))
    process = begin(volume, proxy, log, *words)
    wait_for(lambda: fault.hits or process.poll() is not None, "the verb to come to the request")
    if not fault.hits:
        assert process.wait() == 0, log.read_text()
        return None
    if how == "killed":
        process.kill()
    process.wait()
    proxy.heal()
    assert "panicked" not in log.read_text(), log.read_text()
    return fault.hits[0]


def again(volume, *words) -> str:
    """The same verb without a fault, which must succeed."""
    done = volume.cli(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout
