"""Random requests against the flat-array model, over flushes and restarts."""

import random

import nbd
import pytest

from support.model import Model, pattern, random_range, read_all
from support.server import KI, MI

SIZE = 4 * MI
OPERATIONS = 500


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
@pytest.mark.parametrize("checkpoint_interval", ["5s", "100ms"])
def test_random_requests(make_volume, make_server, seed, block_bytes, checkpoint_interval):
    """After each request its own range is right; after each restart everything is."""
    rng = random.Random(seed)
    server = make_server(make_volume(SIZE, block_bytes), checkpoint_interval=checkpoint_interval).start()
    model = Model(SIZE, block_bytes)
    client = server.handle()
    for step in range(OPERATIONS):
        operation = rng.choices(
            ["write", "zero", "trim", "read", "cache", "flush", "restart"], [40, 12, 8, 25, 5, 8, 1]
        )[0]
        offset, length = random_range(rng, SIZE, block_bytes, 512 * KI)
        fua = nbd.CMD_FLAG_FUA if rng.random() < 0.05 else 0
        what = f"step {step}: {operation} {length}@{offset}"
        if operation == "write":
            data = pattern(length, step)
            client.pwrite(data, offset, fua)
            model.write(offset, data)
        elif operation == "zero":
            client.zero(length, offset, fua | rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            model.zero(offset, length)
        elif operation == "trim":
            client.trim(length, offset, fua)
            model.trim(offset, length)
        elif operation == "cache":
            client.cache(length, offset)
        elif operation == "flush":
            client.flush()
        elif operation == "restart":
            client.shutdown()
            if rng.random() < 0.5:
                server.terminate()
            else:
                with server.connect() as last:
                    last.flush()
                server.kill()
            server.start()
            client = server.handle()
            model.assert_same(read_all(client, SIZE), what=what)
        # A little more than was asked for: what lies beside a change must not have moved.
        before, after = min(offset, 70), min(SIZE - offset - length, 70)
        model.assert_same(client.pread(before + length + after, offset - before), offset - before, what)
    model.assert_same(read_all(client, SIZE), what="at the end")
    client.shutdown()


def test_many_requests_in_flight(server, seed):
    """Requests in flight together write different bytes of shared blocks, among flushes."""
    rng = random.Random(seed)
    lanes, lane_bytes = 16, 1 * MI + 13
    model = Model(64 * MI, 64 * KI)
    with server.connect() as client:
        for round_number in range(12):
            cookies = []
            for lane in range(lanes):
                length = rng.randint(1, lane_bytes)
                offset = lane * lane_bytes + rng.randint(0, lane_bytes - length)
                data = pattern(length, round_number * lanes + lane)
                cookies.append(client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset))
                model.write(offset, data)
                if rng.random() < 0.2:
                    cookies.append(client.aio_flush())
            while cookies:
                client.poll(-1)
                cookies = [cookie for cookie in cookies if not client.aio_command_completed(cookie)]
            model.assert_same(client.pread(lanes * lane_bytes, 0), what=f"round {round_number}")
        client.flush()
        model.assert_same(read_all(client, 64 * MI), what="at the end")
