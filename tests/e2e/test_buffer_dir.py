"""write_buffer_dir: what was answered survives a killed server, flushed or not, in its order; and never where another server
has had the volume in between."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import threading
import time

import nbd
import pytest

from support.lossy import LossyProxy, Rule
from support.model import Model, pattern, random_change, random_range, read_all
from support.process import run, wait_for
from support.server import CLI, KI, MI, leave

SIZE = 24 * MI
LENGTH_MAX = 256 * KI
CHANGES_LEAST = 20
"""Of a life, however slow the machine is."""
RECOVERED = re.compile(r"recovered (\d+) changes")
ANY_WRITE = r"^(PUT|POST|DELETE) "


def kept(make_server, volume, tmp_path, **parameters):
    """A server that keeps its write buffer in a directory."""
    parameters = {"write_buffer": "16M", "checkpoint_interval": "1h", **parameters}
    return make_server(volume, write_buffer_dir=str(tmp_path / "buffer"), **parameters)


def live_and_die(server, model: Model, rng: random.Random, seconds: float) -> int:
    """Random changes, now and then a flush, until the server is killed at any moment, once a few were answered. What the one change
    holds that was not answered is taken from the next server. Returns the number of changes answered."""
    client = server.handle()
    are_enough, died = threading.Event(), threading.Event()

    def kill():
        time.sleep(seconds)
        are_enough.wait(90)
        server.process.send_signal(signal.SIGKILL)
        died.set()

    killer = threading.Thread(target=kill)
    killer.start()
    done, state = 0, None
    try:
        while True:
            state = rng.getstate()
            random_change(rng, client, model, LENGTH_MAX)
            done, state = done + 1, None
            if done >= CHANGES_LEAST:
                are_enough.set()
            if rng.randrange(200) == 0:
                client.flush()
    except nbd.Error:
        are_enough.set()
        assert died.wait(60)
    killer.join()
    server.process.wait()
    leave(client)
    in_doubt = None
    if state is not None:
        # The same draw again: where the change was that may be there or not.
        rng.setstate(state)
        in_doubt = random_range(rng, SIZE, model.block_bytes, LENGTH_MAX)
    server.start()
    with server.connect() as client:
        if in_doubt:
            offset, length = in_doubt
            model.write(offset, client.pread(length, offset))
        model.assert_same(read_all(client, SIZE), what=f"after {done} changes")
    return done


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_answered_writes_survive_kill_9(make_volume, make_server, tmp_path, seed, block_bytes):
    """Nothing is published but by a full buffer: publishes overlap, and most of the volume was never flushed."""
    rng = random.Random(seed)
    server = kept(make_server, make_volume(SIZE, block_bytes), tmp_path).start()
    model = Model(SIZE, block_bytes)
    done = sum(live_and_die(server, model, rng, rng.uniform(0.2, 1.5)) for _ in range(6))
    assert done > 100, "next to nothing was tested"
    assert RECOVERED.search(server.log_text())


@pytest.mark.s3_only
@pytest.mark.parametrize("log", ["s3", "journal"])
def test_with_a_log(make_volume, make_server, store, tmp_path, seed, log):
    """The log has what was flushed, the buffer all of it: together they make the newest."""
    rng = random.Random(seed)
    url = store.url("log") if log == "s3" else f"file://{tmp_path}/journal/"
    server = kept(make_server, make_volume(SIZE, 64 * KI), tmp_path, backend_wal_url=url).start()
    model = Model(SIZE, 64 * KI)
    for _ in range(5):
        live_and_die(server, model, rng, rng.uniform(0.2, 1.5))
    assert RECOVERED.search(server.log_text())


@pytest.mark.s3_only
@pytest.mark.parametrize("action", ["lose", "refuse", "delay"])
def test_on_a_store_that_loses_answers(make_volume, make_server, minio, tmp_path, seed, action):
    """Publishes whose answer was lost, or that come after the kill, change nothing of what is recovered."""
    rng = random.Random(seed)
    proxy = LossyProxy(minio.endpoint)
    try:
        server = kept(
            make_server,
            make_volume(SIZE, 64 * KI),
            tmp_path,
            endpoint_url=proxy.endpoint,
            checkpoint_interval="200ms",
        )
        model = Model(SIZE, 64 * KI)
        server.start()
        proxy.rule = Rule(action, ANY_WRITE, probability=0.1, rng=random.Random(seed))
        for _ in range(4):
            live_and_die(server, model, rng, rng.uniform(0.2, 1.5))
    finally:
        proxy.close()


def test_a_second_kill_during_the_recovery(make_volume, make_server, tmp_path, seed):
    """At any moment of it: the lease is taken, a part is published, all of it is."""
    rng = random.Random(seed)
    server = kept(make_server, make_volume(SIZE, 64 * KI), tmp_path).start()
    model = Model(SIZE, 64 * KI)
    with server.connect() as client:
        for _ in range(300):
            random_change(rng, client, model, LENGTH_MAX)
        server.kill()
    for _ in range(12):
        server.spawn()
        wait_for(server.socket.exists, "nbdkit to listen")
        client = nbd.NBD()
        with contextlib.suppress(nbd.Error):  # it listens a moment after its socket is there
            client.aio_connect_unix(str(server.socket))
        time.sleep(rng.uniform(0, 0.15))
        server.kill()
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE))
    assert server.terminate() == 0
    assert not list((tmp_path / "buffer").glob("buffer")), "a clean end leaves nothing"


def test_hot_blocks_do_not_fill_the_file(make_volume, make_server, tmp_path):
    """The same blocks written again and again: many times what the file holds, and what counts is the last."""
    server = kept(make_server, make_volume(SIZE, 64 * KI), tmp_path).start()
    with server.connect() as client:
        for turn in range(600):
            client.pwrite(pattern(MI, turn), 0)
        server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(MI, 0) == pattern(MI, 599)


def test_another_server_in_between(make_volume, make_server, tmp_path):
    """What it published stands; what was answered before is set aside, and can be looked at and given up."""
    volume = make_volume(SIZE, 64 * KI)
    server = kept(make_server, volume, tmp_path).start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        server.kill()
    directory = str(tmp_path / "buffer")
    (left,) = json.loads(run(CLI, "buffer", "show", directory, "--json").stdout)
    assert (left["changes"], left["bytes"], left["is_set_aside"]) == (2, MI, False)

    assert f"hypernbd buffer show {directory}" in volume.cli("info", volume.url).stdout

    other = make_server(volume).start()
    assert f"not applied without write_buffer_dir={directory}" in other.log_text()
    with other.connect() as client:
        client.pwrite(pattern(64 * KI, 2), 64 * KI)
        client.flush()
    assert other.terminate() == 0
    server.start()
    with server.connect() as client:
        assert client.pread(64 * KI, 0) == bytes(64 * KI)
        assert client.pread(64 * KI, 64 * KI) == pattern(64 * KI, 2)
    assert "another server has had the volume" in server.log_text()
    assert server.terminate() == 0
    assert "buffer show" not in volume.cli("info", volume.url).stdout
    (left,) = json.loads(run(CLI, "buffer", "show", directory, "--json").stdout)
    assert left["is_set_aside"] and left["bytes"] == MI
    refused = run(CLI, "buffer", "discard", directory)
    assert refused.returncode != 0 and "--yes" in refused.stderr
    assert run(CLI, "buffer", "discard", directory, "--yes").returncode == 0
    assert "nothing is left" in run(CLI, "buffer", "show", directory).stdout


def test_another_volume_at_the_same_address(make_volume, make_server, tmp_path):
    volume = make_volume(SIZE, 64 * KI)
    server = kept(make_server, volume, tmp_path).start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        server.kill()
    assert volume.cli("delete", volume.url, "--yes").returncode == 0
    assert volume.cli("create", volume.url, "--size", str(SIZE)).returncode == 0
    server.start()
    with server.connect() as client:
        assert client.pread(MI, 0) == bytes(MI)
    assert "set aside" in server.log_text()


def test_files_and_their_modes(make_volume, make_server, tmp_path):
    server = kept(make_server, make_volume(SIZE, 64 * KI), tmp_path).start()
    directory = tmp_path / "buffer"
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in directory.iterdir()} == {0o600}
    # Reserved at the start: a fourth more than the buffer, and 80 MiB.
    assert os.stat(directory / "buffer").st_blocks * 512 >= 100 * MI
    server.assert_running()


@pytest.mark.file_only
def test_too_little_room_is_said_at_the_start(make_volume, make_server, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        server = make_server(make_volume(SIZE, 64 * KI), write_buffer_dir=str(place / "buffer"))
        server.spawn()
        assert server.wait() != 0
        assert "720 MiB are needed" in server.log_text() and "64 MiB free" in server.log_text()
        assert not (place / "buffer").exists()
    finally:
        subprocess.run(["umount", place], check=True)


def test_one_directory_is_one_servers(make_volume, make_server, tmp_path):
    first = kept(make_server, make_volume(SIZE, 64 * KI), tmp_path).start()
    second = kept(make_server, make_volume(SIZE, 64 * KI), tmp_path)
    second.spawn()
    assert second.wait() != 0
    assert "another server uses it" in second.log_text()
    first.assert_running()


@pytest.mark.s3_only
def test_an_end_that_cannot_publish(make_volume, make_server, minio, tmp_path):
    """The store is away, and the server is told to stop: nothing is lost, and the next server has it."""
    proxy = LossyProxy(minio.endpoint)
    try:
        volume = make_volume(SIZE, 64 * KI)
        server = kept(make_server, volume, tmp_path, endpoint_url=proxy.endpoint, io_timeout="2s").start()
        with server.connect() as client:
            client.pwrite(pattern(MI, 1), 0)
            proxy.rule = Rule("refuse", ANY_WRITE)
        assert server.terminate() == 0
        assert "applies it" in server.log_text() and "are lost" not in server.log_text()
        proxy.rule = None
        # Impatient, it may say EIO where the machine is slow.
        server.parameters["io_timeout"] = "60s"
        server.start()
        with server.connect() as client:
            assert client.pread(MI, 0) == pattern(MI, 1)
    finally:
        proxy.close()


@pytest.mark.file_only
def test_a_backup_restored_in_place(make_volume, make_server, tmp_path):
    """The objects of the volume are those of before: what was answered upon later ones is set aside."""
    volume = make_volume(SIZE, 64 * KI)
    server = kept(make_server, volume, tmp_path).start()
    root = tmp_path / "store" / "volume-1" / "objects"
    assert root.is_dir()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        client.flush()
        shutil.copytree(root, tmp_path / "backup")
        client.pwrite(pattern(MI, 2), 0)
        client.flush()
        client.pwrite(pattern(64 * KI, 3), 0)
        server.kill()
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "backup", root)
    server.start()
    with server.connect() as client:
        assert client.pread(MI, 0) == pattern(MI, 1)
    assert "does not have the checkpoint" in server.log_text()


@pytest.mark.file_only
def test_the_volumes_own_directory_is_refused(make_volume, make_server, tmp_path):
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume, write_buffer_dir=str(tmp_path / "store" / "volume-1"))
    server.spawn()
    assert server.wait() != 0
    assert "the directory of backend_url" in server.log_text()
