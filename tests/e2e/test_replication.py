"""Replicas: in another bucket, store or directory, beside a busy writer, killed at any moment, and what ends them."""

import json
import os
import random
import re
import shlex
import signal
import threading

import pytest

from support.faulty import Fault, FaultyProxy
from support.interrupted import interrupted, requests
from support.lives import begin, refused
from support.model import Model, pattern, random_change, read_all
from support.past import read_at, verb
from support.process import run, spawn, wait_for
from support.server import CLI, KI, MI, PROJECT, Volume
from support.stores import FileStore, S3Store, profile

SIZE = 4 * MI
BLOCK = 64 * KI
DOCUMENT = PROJECT / "docs" / "replication.md"
KILLS = 6
PAUSE_S = 0.1


class Both:
    """A volume and the place of its replica, in stores of any two kinds."""

    def __init__(self, volume: Volume, replica: Volume, more=(), env=None):
        self.volume, self.replica = volume, replica
        self.store = next((one.store for one in (volume, replica) if one.store.kind == "s3"), volume.store)
        self.more, self.env = list(more), dict(env or {})

    def words(self, *more: str) -> list[str]:
        return ["replicate", self.volume.url, self.replica.url, *self.more, *more]

    def run(self, *more: str):
        return run(CLI, *self.words(*more), *self.store.cli_options, env={**self.store.env, **self.env})

    def must(self, *more: str) -> dict:
        done = self.run("--json", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, *more: str) -> str:
        done = self.run(*more)
        assert done.returncode == 1, done.stdout
        return done.stderr

    def begin(self, log, *more: str):
        env = {**self.store.env, **self.env}
        return spawn([str(CLI), *self.words(*more), *self.store.cli_options], log, env=env, limit_s=300)


def place(store, tmp_path, kind: str, minio) -> Volume:
    """Where a replica is to be: in another bucket, or in a directory."""
    if kind == "file":
        return Volume(f"file://{tmp_path}/replica/", FileStore(tmp_path), SIZE, BLOCK)
    bucket = f"hypernbd-replica-{os.urandom(4).hex()}"
    minio.client().create_bucket(Bucket=bucket)
    s3 = store if store.kind == "s3" else S3Store(minio)
    return Volume(f"s3://{bucket}/replica/", s3, SIZE, BLOCK)


@pytest.fixture(params=["file", "s3"])
def both(request, make_volume, store, tmp_path, minio):
    yield Both(make_volume(SIZE, BLOCK), place(store, tmp_path, request.param, minio))


def info(volume: Volume) -> dict:
    return json.loads(verb(volume, "info", volume.url, "--json"))


def numbers(volume: Volume) -> list[int]:
    return [one["cno"] for one in json.loads(verb(volume, "checkpoints", volume.url, "--json"))]


def entered(volume: Volume) -> None:
    """Waits until the list has all checkpoints, of which none was removed: their entries come behind the answers to flushes, and one
    that is not there yet is not replicated unless it is the newest."""
    wait_for(lambda: numbers(volume) == list(range(1, info(volume)["last_checkpoint"] + 1)), "the entries of all checkpoints")


def assert_whole(volume: Volume) -> None:
    verb(volume, "check", volume.url, "--data")


def assert_same_past(reading, server, checkpoints: list[int]) -> None:
    """A server of the replica reads at each checkpoint as one of the original does."""
    for number in checkpoints:
        assert read_at(reading, f"@{number}", SIZE) == read_at(server, f"@{number}", SIZE), number


def test_a_replica_has_what_its_original_has(both, make_server, seed):
    """Each checkpoint, with its names; and what comes later, without what is there."""
    rng = random.Random(seed)
    server = make_server(both.volume, checkpoint_interval="1h").start()
    model = Model(SIZE, BLOCK)

    def change(times: int) -> None:
        with server.connect() as client:
            for _ in range(times):
                for _ in range(4):
                    random_change(rng, client, model, 300 * KI)
                client.flush()

    with server.connect() as client:
        # An object that is uploaded in parts, with its check values apart.
        client.pwrite(pattern(SIZE, 1), 0)
        model.write(0, pattern(SIZE, 1))
        client.flush()
    change(3)
    verb(both.volume, "snapshot", "create", both.volume.url, "monday")
    change(3)
    entered(both.volume)
    first = both.must()
    assert first["behind_checkpoints"] == 0 and first["unverified_bytes"] == 0, first
    in_store = both.volume.store.kind == both.replica.store.kind == "s3"
    assert first["bytes"] == first["copied_by_store_bytes" if in_store else "verified_bytes"] >= SIZE, first
    assert numbers(both.replica) == numbers(both.volume)
    assert_whole(both.replica)
    told = info(both.replica)
    assert told["replica_of"]["url"] == both.volume.url and told["volume_id"] != info(both.volume)["volume_id"]
    reading = make_server(both.replica, nbdkit_options=["-r"]).start()
    assert_same_past(reading, server, numbers(both.replica))
    assert read_at(reading, "@monday", SIZE) == read_at(server, "@monday", SIZE)
    assert reading.terminate() == 0
    nothing = both.must()
    assert nothing["objects"] == nothing["checkpoints"] == 0, nothing
    change(2)
    entered(both.volume)
    more = both.must()
    assert more["checkpoints"] == 2 and more["bytes"] < first["bytes"], more
    assert "replica of" in verb(both.replica, "info", both.replica.url)
    reading.start()
    with reading.connect() as client:
        model.assert_same(read_all(client, SIZE))
    assert_same_past(reading, server, numbers(both.replica))


def test_what_the_original_removed_stays(both, make_server):
    """The replica has rules of its own; what it removes by them does not come back."""
    server = make_server(both.volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in range(25):
            client.pwrite(pattern(BLOCK, tag), 0)
            client.flush()
    assert server.terminate() == 0
    both.must()
    verb(both.volume, "retention", "set", both.volume.url, "--keep-last", "1")
    verb(both.volume, "prune", both.volume.url)
    assert len(numbers(both.volume)) <= 17
    both.must()
    assert numbers(both.replica) == list(range(1, 26))
    assert_whole(both.replica)
    verb(both.replica, "retention", "set", both.replica.url, "--keep-last", "1")
    verb(both.replica, "prune", both.replica.url)
    left = numbers(both.replica)
    assert len(left) <= 17
    assert "replica_of" in info(both.replica)
    assert both.must()["checkpoints"] == 0
    assert numbers(both.replica) == left
    assert_whole(both.replica)


class Writer:
    """Writes and flushes until it is told to stop."""

    def __init__(self, server, seed: int):
        self.server, self.rng = server, random.Random(seed)
        self.is_over, self.failures = threading.Event(), []
        self.thread = threading.Thread(target=self._write)
        self.thread.start()

    def _write(self) -> None:
        try:
            with self.server.connect() as client:
                while not self.is_over.is_set():
                    for _ in range(4):
                        client.pwrite(self.rng.randbytes(BLOCK), self.rng.randrange(0, SIZE, BLOCK))
                    client.flush()
                    # Thousands of checkpoints would only make the test long.
                    self.is_over.wait(PAUSE_S)
        except Exception as failure:  # told to the test, which is in another thread
            self.failures.append(failure)

    def stop(self) -> None:
        self.is_over.set()
        self.thread.join()
        assert not self.failures, self.failures


def test_killed_again_and_again_beside_a_busy_writer(both, make_server, tmp_path, seed):
    """At each end the replica is whole, and reads as the original at that checkpoint."""
    rng = random.Random(seed)
    server = make_server(both.volume, checkpoint_interval="200ms").start()
    reading = make_server(both.replica, nbdkit_options=["-r"])
    writer = Writer(server, seed)
    seen = set()
    try:
        # What has none would be replicated as it is, and there is no checkpoint 0 to compare it with.
        wait_for(lambda: info(both.volume)["last_checkpoint"], "the writer's first checkpoint")
        for number in range(KILLS):
            process = both.begin(tmp_path / f"log-{number}", "--follow", "--interval", "1s")
            # Any moment will do; each is another one.
            with pytest.raises(Exception):
                process.wait(timeout=rng.uniform(0.3, 2.5))
            process.kill()
            process.wait()
            if both.replica.cli("info", both.replica.url).returncode:
                continue
            assert_whole(both.replica)
            at = info(both.replica)["last_checkpoint"]
            seen.add(at)
            reading.start()
            with reading.connect() as client:
                found = read_all(client, SIZE)
            assert reading.terminate() == 0
            # What the killed one had sent to the store may have been carried out since.
            now = info(both.replica)["last_checkpoint"]
            assert any(found == read_at(server, f"@{one}", SIZE) for one in sorted({at, now})), (at, now)
    finally:
        writer.stop()
    assert both.must()["behind_checkpoints"] == 0
    assert_whole(both.replica)
    reading.start()
    assert_same_past(reading, server, numbers(both.replica)[-10:])


def test_follows_until_it_is_stopped(both, make_server, tmp_path):
    server = make_server(both.volume, checkpoint_interval="1h").start()
    log = tmp_path / "log"
    with server.connect() as client:
        client.pwrite(pattern(BLOCK, 1), 0)
        client.flush()
        process = both.begin(log, "--follow", "--interval", "1s", "--json")
        for tag in range(2, 5):
            client.pwrite(pattern(BLOCK, tag), 0)
            client.flush()
            newest = info(both.volume)["last_checkpoint"]

            def is_there(newest=newest) -> bool:
                return any(f'"checkpoint":{newest},' in line for line in log.read_text().splitlines())

            wait_for(is_there, "the replica to be as new")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, log.read_text()
    last = json.loads([line for line in log.read_text().splitlines() if line.startswith("{")][-1])
    assert last["behind_checkpoints"] == 0 and last["behind_seconds"] == 0, last
    assert info(both.replica)["lease"]["state"] == "released"


def test_a_replica_that_is_written_to_is_a_volume_of_its_own(both, make_server, tmp_path, seed):
    """It is told in the replica's store alone; whoever still copies to it is shut out."""
    server = make_server(both.volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(SIZE, 1), 0)
        client.flush()
    log = tmp_path / "log"
    process = both.begin(log, "--follow", "--interval", "1s")
    wait_for(lambda: "is at checkpoint 1" in log.read_text(), "the replica to be made")
    assert "is held by" in refused(make_server(both.replica, lease_duration="2s"))
    assert "replica_of" in info(both.replica), "a server that was refused changes nothing"
    # It sleeps through the takeover, with whatever it was about to send.
    process.send_signal(signal.SIGSTOP)
    other = make_server(both.replica, takeover="yes", checkpoint_interval="1h").start()
    with other.connect() as client:
        assert read_all(client, SIZE) == pattern(SIZE, 1)
        client.pwrite(pattern(MI, 2), 0)
        client.flush()
    with server.connect() as client:
        client.pwrite(pattern(MI, 3), MI)
        client.flush()
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 1, log.read_text()
    assert "replica_of" not in info(both.replica)
    assert "a volume of its own" in both.refused()
    with other.connect() as client:
        client.pwrite(pattern(MI, 4), 2 * MI)
        client.flush()
    assert other.terminate() == 0, other.log_text()
    other.start()
    expected = bytearray(pattern(SIZE, 1))
    expected[:MI], expected[2 * MI : 3 * MI] = pattern(MI, 2), pattern(MI, 4)
    with other.connect() as client:
        assert read_all(client, SIZE) == expected
    assert other.terminate() == 0
    assert_whole(both.replica)
    assert_whole(both.volume)


@pytest.mark.s3_only
def test_damage_is_named_and_not_copied(make_volume, make_server, store, tmp_path, minio):
    both = Both(make_volume(SIZE, BLOCK), place(store, tmp_path, "file", minio))
    server = make_server(both.volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in (1, 2):
            client.pwrite(pattern(MI, tag), 0)
            client.flush()
            if tag == 1:
                both.must()
    assert server.terminate() == 0
    bucket, key = re.fullmatch(r"s3://([^/]*)/(.*)/", both.volume.url).groups()
    key += "/0000000002.0"
    client = minio.client()
    got = client.get_object(Bucket=bucket, Key=key)
    body = bytearray(got["Body"].read())
    good = bytes(body)
    body[len(body) // 2] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(body), Metadata=got["Metadata"])
    assert "0000000002.0" in both.refused()
    assert info(both.replica)["last_checkpoint"] == 1
    assert_whole(both.replica)
    client.put_object(Bucket=bucket, Key=key, Body=good, Metadata=got["Metadata"])
    assert both.must()["checkpoint"] == 2
    assert_whole(both.replica)


@pytest.mark.s3_only
def test_what_is_being_copied_is_not_removed_from_the_original(make_volume, make_server, store, tmp_path, minio):
    """While a copy stands still, retention removes all but the newest checkpoints, and what the copy is of stays."""
    volume = make_volume(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in range(30):
            client.pwrite(pattern(SIZE // 2, tag), 0)
            client.flush()
    assert server.terminate() == 0
    proxy = FaultyProxy(minio.endpoint)
    replica = Volume(store.url("replica"), store, SIZE, BLOCK)
    # The copy of an object of the first checkpoint is about to be asked for.
    fault = proxy.fail(Fault("hang", where=r"PUT \S*/replica/0000000001\.0", times_max=1))
    log = tmp_path / "log"
    process = begin(volume, proxy, log, "replicate", volume.url, replica.url)
    wait_for(lambda: fault.hits, "the copy to begin")
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    assert not verb(volume, "prune", volume.url).startswith("removed 0")
    assert 1 in numbers(volume)
    proxy.heal()
    assert process.wait(timeout=60) == 0, log.read_text()
    proxy.close()
    assert numbers(replica) == numbers(volume) and numbers(replica)[0] == 1
    assert_whole(replica)
    verb(volume, "prune", volume.url)
    assert 1 not in numbers(volume), "the pin is gone"


@pytest.mark.s3_only
@pytest.mark.parametrize("how", ["killed", "refused"])
@pytest.mark.parametrize("what", ["made", "brought up to date"])
def test_every_request(make_volume, make_server, store, tmp_path, minio, how, what):
    """Killed or refused at its requests: there is nothing, or a replica that is whole, and the same command finishes it."""
    volume = make_volume(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h")
    written: dict[int, bytes] = {}

    def publish(times: int) -> None:
        server.start()
        with server.connect() as client:
            for _ in range(times):
                written[len(written) + 1] = pattern(MI, len(written) + 1)
                client.pwrite(written[len(written)], 0)
                client.flush()
        assert server.terminate() == 0, server.log_text()

    publish(3)
    proxy = FaultyProxy(minio.endpoint)
    numbers = requests(how)
    for number in numbers:
        replica = Volume(store.url(f"replica-{number if what == 'made' else 0}"), store, SIZE, BLOCK)
        words = ["replicate", volume.url, replica.url]
        if what != "made":
            publish(2)
            if number == numbers[0]:
                verb(volume, *words)
                publish(2)
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        if replica.cli("info", replica.url).returncode == 0:
            assert_whole(replica)
            newest = info(replica)["last_checkpoint"]
            reading = make_server(replica, nbdkit_options=["-r"]).start()
            with reading.connect() as client:
                assert client.pread(MI, 0) == written[newest], at
            reading.kill()
        else:
            assert what == "made", at
        verb(volume, *words)
        assert info(replica)["last_checkpoint"] == len(written), at
        assert_whole(replica)
    assert number > 20, "the verb was not interrupted where it matters"
    proxy.close()


@pytest.mark.s3_only
def test_in_another_store_with_keys_of_its_own(make_volume, make_server, own_minio, tmp_path):
    """The original's keys are those of the environment, and the other store knows only those of the profile."""
    far = S3Store(own_minio)
    replica = Volume(far.url("replica"), far, SIZE, BLOCK)
    both = Both(make_volume(SIZE, BLOCK), replica, ["--dest-profile", "faraway"], profile(tmp_path, own_minio))
    both.store = both.volume.store
    server = make_server(both.volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in (1, 2):
            client.pwrite(pattern(SIZE, tag), 0)
            client.flush()
    done = both.must()
    assert done["bytes"] == done["verified_bytes"] > SIZE, done
    assert_whole(replica)
    reading = make_server(replica, nbdkit_options=["-r"]).start()
    assert_same_past(reading, server, numbers(replica))
    both.more = ["--dest-profile", "nowhere"]
    assert "no such profile" in both.refused()


def test_what_cannot_be_is_refused(both, make_volume, make_server, tmp_path):
    other = make_volume(SIZE, BLOCK)
    server = make_server(both.volume).start()
    with server.connect() as client:
        client.pwrite(pattern(BLOCK, 1), 0)
        client.flush()
    assert server.terminate() == 0
    before = both.volume.store.objects_of_volumes()
    for place_of_other, why in [
        (both.volume.url, "its own replica"),
        (f"{both.volume.url}inside/", "inside the other"),
        (other.url, "is another volume"),
    ]:
        assert why in Both(both.volume, Volume(place_of_other, both.volume.store)).refused()
    assert both.volume.store.objects_of_volumes() - before == set()
    both.must()
    assert "replica of another volume" in Both(other, both.replica).refused()
    nothing = Volume(both.volume.store.url("nothing"), both.volume.store)
    assert re.search("no volume|does not exist", Both(nothing, Volume(both.volume.store.url("to"), both.volume.store)).refused())


def test_every_command_of_the_document_does_what_it_says(make_volume, make_server, store, minio, own_minio, tmp_path):
    """In their order; what goes on until it is stopped is stopped once it does its work."""
    volume = make_volume(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(SIZE, 1), 0)
        client.flush()
    near = store if store.kind == "s3" else S3Store(minio)
    far = S3Store(own_minio)
    places = {
        "s3://mybucket/disk1/": volume.url,
        "s3://mybucket/disk1-again/": store.url("again"),
        "s3://otherbucket/disk1/": place(store, tmp_path, "s3", minio).url,
        "file:///srv/replica/disk1/": f"file://{tmp_path}/replica/",
        "s3://faraway/disk1/": far.url("disk1"),
    }
    commands = [line for block in re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.S) for line in block.splitlines()]
    assert len(commands) >= 11
    env = {**near.env, **profile(tmp_path, own_minio)}
    for number, line in enumerate(commands):
        words = shlex.split(line)
        assert words[0] == "hypernbd"
        words = [str(CLI), *(places.get(word, word) for word in words[1:]), *near.cli_options]
        log = tmp_path / f"log-{number}"
        if "serve" not in words and "--follow" not in words:
            done = run(*words, env=env)
            assert done.returncode == 0, (line, done.stderr)
            continue
        sign = "is at checkpoint"
        if "serve" in words:
            socket = tmp_path / f"socket-{number}"
            words += ["--socket", str(socket)]
            environment = {**env, "PATH": f"{os.path.dirname(server.nbdkit)}:{os.environ['PATH']}"}
            process = spawn(words, log, env=environment, limit_s=300)
            wait_for(lambda s=socket, p=process: s.exists() or p.poll() is not None, line)
        else:
            process = spawn(words, log, env=env, limit_s=300)
            wait_for(lambda at=log, p=process: sign in at.read_text() or p.poll() is not None, line)
        assert process.poll() is None, (line, log.read_text())
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    # The original was taken from its server, and the replica is a volume of its own.
    with server.connect() as client:
        # It may have seen by itself that it was shut out, and then refuses the write already.
        with pytest.raises(Exception):
            client.pwrite(pattern(BLOCK, 9), 0)
            client.flush()
    again = Volume(places["s3://mybucket/disk1-again/"], store, SIZE, BLOCK)
    assert_whole(again)
    assert info(again)["replica_of"]["url"] == places["s3://otherbucket/disk1/"]
