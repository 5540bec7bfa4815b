"""A client that writes all the time, beside what a test looks at."""

import contextlib
import random
import threading

from .server import KI


@contextlib.contextmanager
def busy(server, rng: random.Random, end: int):
    """Writes 64 KiB somewhere and flushes, again and again, as long as the block runs; no write begins at `end` or beyond. The writer may
    not fail."""
    is_over = threading.Event()
    failures = []

    def write() -> None:
        try:
            with server.connect() as client:
                while not is_over.is_set():
                    client.pwrite(rng.randbytes(64 * KI), rng.randrange(0, end, 4 * KI))
                    client.flush()
        except Exception as failure:  # told to the test, which is in another thread
            failures.append(failure)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        is_over.set()
        writer.join()
    assert failures == []
