"""SIGTERM and SIGKILL, with idle and with busy clients, and what is there afterwards."""

import json
import random

import nbd
import pytest

from support.model import pattern, read_all
from support.process import wait_for
from support.server import KI, MI, leave

BLOCK = 64 * KI


@pytest.mark.old_nbdkit_too
def test_sigterm_keeps_everything(server):
    """An orderly end publishes what no flush had covered."""
    data = pattern(3 * MI, 1)
    with server.connect() as client:
        client.pwrite(data, 100)
    assert server.terminate() == 0, server.log_text()
    server.start()
    with server.connect() as client:
        assert client.pread(3 * MI, 100) == data


def test_sigterm_with_an_idle_client(server):
    """nbdkit waits for a client to go, and then the final checkpoint is made all the same."""
    data = pattern(1 * MI, 2)
    client = server.handle()
    client.pwrite(data, 0)
    server.process.terminate()
    leave(client)
    assert server.wait() == 0, server.log_text()
    server.start()
    with server.connect() as again:
        assert again.pread(1 * MI, 0) == data


def test_sigterm_with_a_busy_client(server):
    """Every write that was answered before the end is there after it."""
    acknowledged = {}
    client = server.handle()
    pending = {}
    asked_to_stop = False
    number = 0
    while not client.aio_is_dead() and not client.aio_is_closed():
        while len(pending) < 8 and number < 2000:
            data = bytearray(pattern(20_000, number))
            try:
                cookie = client.aio_pwrite(nbd.Buffer.from_bytearray(data), number * 20_000 % (60 * MI))
            except nbd.Error:
                break
            pending[cookie] = number
            number += 1
        if number > 100 and not asked_to_stop:
            server.process.terminate()
            asked_to_stop = True
        if not pending:
            break
        try:
            client.poll(1000)
        except nbd.Error:
            break
        for cookie in list(pending):
            try:
                done = client.aio_command_completed(cookie)
            except nbd.Error:
                del pending[cookie]
                continue
            if done:
                acknowledged[pending.pop(cookie)] = True
    leave(client)
    assert asked_to_stop and acknowledged
    assert server.wait() == 0, server.log_text()
    server.start()
    with server.connect() as again:
        for number in acknowledged:
            assert again.pread(20_000, number * 20_000 % (60 * MI)) == pattern(20_000, number), number


def test_sigkill_keeps_what_was_flushed(server):
    flushed = pattern(5 * MI + 11, 3)
    with server.connect() as client:
        client.pwrite(flushed, 1)
        client.flush()
        client.pwrite(pattern(1 * MI, 4), 20 * MI)
        server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(len(flushed), 1) == flushed


def test_sigkill_leaves_each_unflushed_block_old_or_new(make_volume, make_server, seed):
    """What no flush covered may be lost, each block whole: never a mix, never something else."""
    rng = random.Random(seed)
    server = make_server(make_volume(8 * MI), checkpoint_interval="100ms").start()
    blocks = 8 * MI // BLOCK
    for round_number in range(4):
        old, new = round_number * 2 + 1, round_number * 2 + 2
        with server.connect() as client:
            for block in range(blocks):
                client.pwrite(pattern(BLOCK, old), block * BLOCK)
            client.flush()
            for block in rng.sample(range(blocks), blocks):
                client.pwrite(pattern(BLOCK, new), block * BLOCK)
            server.kill()
        server.start()
        with server.connect() as client:
            for block in range(blocks):
                actual = client.pread(BLOCK, block * BLOCK)
                assert actual in (pattern(BLOCK, old), pattern(BLOCK, new)), f"round {round_number}, block {block}"


def test_a_volume_can_be_served_again_and_again(server):
    """Ten lives of a server, ended in turn by SIGTERM and SIGKILL; each sees all the lives before."""
    for life in range(10):
        with server.connect() as client:
            for earlier in range(life):
                assert client.pread(1000, earlier * 100_000) == pattern(1000, earlier)
            client.pwrite(pattern(1000, life), life * 100_000)
            client.flush()
        if life % 2:
            server.kill()
        else:
            assert server.terminate() == 0
        server.start()


def test_reads_and_empty_flushes_change_nothing_on_the_store(make_volume, make_server):
    volume = make_volume()
    # Renewals of the lease are the one thing that is written all the time.
    server = make_server(volume, checkpoint_interval="100ms", lease_duration="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 5), 0)
    server.terminate()  # after which nothing is left to do in the background
    server.start()
    with server.connect() as client:
        before = volume.store.objects()
        for _ in range(5):
            read_all(client, 64 * MI)
            client.flush()
        assert volume.store.objects() == before


def test_a_write_is_published_without_a_flush(make_volume, make_server):
    """The checkpoint interval bounds what a killed server loses."""

    def last_checkpoint() -> int:
        return json.loads(volume.cli("info", volume.url, "--json").stdout)["last_checkpoint"]

    volume = make_volume()
    before = last_checkpoint()
    server = make_server(volume, checkpoint_interval="200ms").start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 6), 0)
        wait_for(lambda: last_checkpoint() > before, "a checkpoint by age")
        server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 6)
