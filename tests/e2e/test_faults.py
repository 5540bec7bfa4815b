"""A store, and a way to it, that fail in every manner known: what the client sees, and that nothing is lost."""

import json
import os
import re
import subprocess

import nbd
import pytest

from support.faulty import Fault
from support.model import Model, pattern, read_all
from support.process import COMMAND_LIMIT_S, wait_for
from support.server import CLI, KI, MI, Volume, flush_until_it_succeeds, read_until_it_succeeds

EIO = 5
SIZE = 8 * MI
SEGMENT = r"^PUT \S+/\d{10}\.\d+[? ]"
# The container's own objects; the lease is another matter (test_lease.py).
WRITES = r"^(PUT|POST) \S+/(inode|\d{10}\.\d+)[? ]"
READS = r"^GET \S+/\d{10}\.\d+[? ]"

REFUSALS = ["500", "slow-down", "429", "expired"]
FOREIGN = ["html-404", "bare-404", "html-412", "portal"]
BROKEN = ["reset_before", "reset_after", "hang", "outage"]
# Of a write's answer only the headers count: one whose body is cut off, changed or slow is an answer.
ANSWERS = ["truncate", "trickle", "corrupt"]

# Publishing only when told, and reading everything from the store.
BY_HAND = {"checkpoint_interval": "1h", "cache_memory": "0", "lease_duration": "1h"}

pytestmark = pytest.mark.s3_only


@pytest.fixture
def served(make_volume, make_server, proxy):
    """A server behind the proxy, and impatient: even of a store that is well it may say EIO where the machine is slow."""
    return make_server(make_volume(SIZE), endpoint_url=proxy.endpoint, io_timeout="2s", **BY_HAND).start()


@pytest.fixture
def patient(make_volume, make_server, proxy):
    """As `served`, for tests in which no request waits for its time to be up."""
    return make_server(make_volume(SIZE), endpoint_url=proxy.endpoint, **BY_HAND).start()


def last_checkpoint(volume) -> int:
    """By the store itself, past the proxy."""
    return json.loads(volume.cli("info", volume.url, "--json").stdout)["last_checkpoint"]


def write(client, model, offset: int, length: int, tag: int) -> None:
    client.pwrite(pattern(length, tag), offset)
    model.write(offset, pattern(length, tag))


@pytest.mark.parametrize("kind", REFUSALS + FOREIGN + BROKEN)
def test_a_storm_costs_nothing_that_was_flushed_or_written(served, proxy, kind):
    """As long as it lasts: EIO in time, and the buffer is served. Afterwards all is published, unasked."""
    model = Model(SIZE, 64 * KI)
    with served.connect() as client:
        write(client, model, 0, 1 * MI, 1)
        flush_until_it_succeeds(client)
        before = last_checkpoint(served.volume)

        storm = proxy.fail(Fault(kind))
        write(client, model, 512 * KI + 7, 1 * MI, 2)
        with pytest.raises(nbd.Error) as caught:
            client.flush()
        assert caught.value.errnum == EIO
        with pytest.raises(nbd.Error) as caught:
            client.pread(64 * KI, 0)  # published, so it must come from the store
        assert caught.value.errnum == EIO
        write(client, model, 4 * MI, 100_000, 3)
        model.assert_same(client.pread(1 * MI, 512 * KI + 7), 512 * KI + 7, "what is unpublished is read in a storm")
        assert storm.hits
        served.assert_running()

        proxy.heal()
        wait_for(lambda: last_checkpoint(served.volume) > before, "what a flush asked for to be published")
        flush_until_it_succeeds(client)
        served.kill()
    served.parameters["io_timeout"] = "60s"
    served.start()
    with served.connect() as client:
        model.assert_same(read_all(client, SIZE), what="after the storm and a kill")


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_lease_outlives_answers_that_are_not_the_stores(make_volume, make_server, proxy, kind):
    """A proxy that says 404 for all says nothing of the lease: the server keeps the volume, and its writes."""
    parameters = {"io_timeout": "60s", "checkpoint_interval": "1h", "lease_duration": "2s"}
    server = make_server(make_volume(SIZE), endpoint_url=proxy.endpoint, **parameters).start()
    model = Model(SIZE, 64 * KI)
    with server.connect() as client:
        write(client, model, 0, 1 * MI, 1)
        storm = proxy.fail(Fault(kind))
        wait_for(lambda: sum("/lease" in line for line in storm.hits) > 6, "the lease to be asked for again and again")
        write(client, model, 2 * MI, 1 * MI, 2)
        proxy.heal()
        client.flush()
        server.assert_running()
    server.kill()
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE), what="after answers of others")


@pytest.mark.parametrize("kind", ["500", "503", "slow-down", "reset_before", "reset_after", "hang", *ANSWERS])
def test_a_fault_that_passes_is_not_seen(make_volume, make_server, proxy, kind):
    """One write and one read go wrong: both are sent again where that is needed, and the client learns nothing."""
    server = make_server(make_volume(SIZE), endpoint_url=proxy.endpoint, checkpoint_interval="1h", cache_memory="0").start()
    model = Model(SIZE, 64 * KI)
    with server.connect() as client:
        write(client, model, 0, 1 * MI, 1)
        client.flush()
        fault = proxy.fail(Fault(kind, WRITES, times_max=1))
        write(client, model, 100_000, 1 * MI, 2)
        client.flush()
        assert len(fault.hits) == 1
        if kind != "corrupt":  # changed data over plain http is another test
            fault = proxy.fail(Fault(kind, READS, times_max=1))
            model.assert_same(client.pread(2 * MI, 0))
            assert len(fault.hits) == 1
            if kind != "trickle":
                again = [line for line in proxy.requests if line.split()[1] == fault.hits[0].split()[1]]
                assert len(again) >= 2, "the read was not sent again"
        proxy.heal()
        server.kill()
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE), what="after a kill")


def test_a_long_outage(make_volume, make_server, proxy):
    """An hour, scaled down: with an io_timeout of 1 s, one of 8 s. Writes go on; each flush fails in time."""
    parameters = {"io_timeout": "1s", "checkpoint_interval": "100ms", "lease_duration": "2s"}
    server = make_server(make_volume(SIZE), endpoint_url=proxy.endpoint, **parameters).start()
    model = Model(SIZE, 64 * KI)
    with server.connect() as client:
        write(client, model, 0, 1 * MI, 1)
        flush_until_it_succeeds(client)
        outage = proxy.fail(Fault("outage"))
        for number in range(8):
            write(client, model, number * 900_000, 300_000, 10 + number)
            with pytest.raises(nbd.Error):
                client.flush()
        assert len(outage.hits) > 8
        model.assert_same(client.pread(300_000, 900_000), 900_000)
        proxy.heal()
        flush_until_it_succeeds(client)
        server.kill()
    server.parameters["io_timeout"] = "60s"
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE), what="after the outage and a kill")


def test_expired_credentials_are_named(served, proxy):
    """Whoever looks at the log learns what to renew; the server goes on by itself when they are back."""
    with served.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        proxy.fail(Fault("expired"))
        with pytest.raises(nbd.Error):
            client.flush()
        wait_for(lambda: "ExpiredToken" in served.log_text(), "the log to name them")
        proxy.heal()
        flush_until_it_succeeds(client)


def test_a_read_that_the_store_does_not_permit_fails_at_once(patient, proxy):
    """Waiting changes nothing: after four attempts the client has its error, and the log says who refused what."""
    data = pattern(1 * MI, 1)
    with patient.connect() as client:
        client.pwrite(data, 0)
        client.flush()
        fault = proxy.fail(Fault("denied", READS))
        with pytest.raises(nbd.Error) as caught:
            client.pread(64 * KI, 0)
        assert caught.value.errnum == EIO
        # Four attempts; a slow one may have been sent twice.
        assert 4 <= len(fault.hits) <= 8
        assert re.search(r"a read at 0 failed: .*AccessDenied.*policy", patient.log_text())
        proxy.heal()
        assert client.pread(1 * MI, 0) == data


def test_a_read_waits_for_credentials_that_have_expired(patient, proxy):
    """Others may be there a moment later, and nothing is wrong with the volume."""
    data = pattern(1 * MI, 1)
    with patient.connect() as client:
        client.pwrite(data, 0)
        client.flush()
        fault = proxy.fail(Fault("expired", READS, times_max=6))
        assert client.pread(64 * KI, 0) == data[: 64 * KI]
        assert len(fault.hits) == 6


@pytest.mark.parametrize("kind", ["corrupt", "truncate"])
def test_a_damaged_answer_about_the_index_is_asked_for_again(patient, proxy, kind):
    """The index is read by its check values: one damaged answer is replaced, and if all are, the read fails."""
    data = pattern(6 * MI, 1)
    with patient.connect() as client:
        # 4 MiB and less at a time, so that objects are put in one piece and carry check values.
        for at in (0, 2 * MI, 4 * MI):
            client.pwrite(data[at : at + 2 * MI], at)
            client.flush()
        # More blocks than an inode's root has room for.
        assert re.search(SEGMENT, "\n".join(proxy.requests), re.MULTILINE)
    patient.kill()
    patient.start()
    index = r"^GET \S+/\d{10}\.0[? ]"
    with patient.connect() as client:
        fault = proxy.fail(Fault(kind, index, times_max=1))
        assert client.pread(1 * MI, 1 * MI) == data[1 * MI : 2 * MI]
        assert len(fault.hits) == 1
    patient.kill()
    if kind == "truncate":
        # What breaks off is asked for again until then.
        patient.parameters["io_timeout"] = "10s"
    patient.start()
    with patient.connect() as client:
        fault = proxy.fail(Fault(kind, index))
        with pytest.raises(nbd.Error) as caught:
            client.pread(1 * MI, 1 * MI)
        assert caught.value.errnum == EIO
        assert len(fault.hits) >= 2
        proxy.heal()
        assert read_until_it_succeeds(client, 6 * MI, 0) == data


@pytest.mark.parametrize("name", ["inode", "volume.json", "lease"])
def test_a_damaged_answer_about_the_volume_is_never_used(make_volume, make_server, proxy, name):
    """What says what a volume is, and whose: asked for again, and refused when it stays damaged."""
    volume = make_volume(SIZE)
    make_server(volume).start().terminate()  # makes the label and the lease
    fault = proxy.fail(Fault("corrupt", rf"^GET \S+/{name}[? ]", times_max=1))
    done = volume.cli("info", volume.url, "--json", "--endpoint-url", proxy.endpoint)
    assert done.returncode == 0, done.stderr
    assert len(fault.hits) == 1 and json.loads(done.stdout)["size_bytes"] == SIZE
    proxy.fail(Fault("corrupt", rf"^GET \S+/{name}[? ]"))
    done = volume.cli("info", volume.url, "--endpoint-url", proxy.endpoint)
    assert done.returncode != 0
    assert "damaged" in done.stderr and name in done.stderr, done.stderr


def test_changed_data_on_a_plain_line_is_asked_for_again(patient, proxy):
    """Every read of data is compared with check values of 16 KiB each, whatever its size."""
    data = pattern(1 * MI, 1)
    with patient.connect() as client:
        client.pwrite(data, 0)
        client.flush()
        assert client.pread(1 * MI, 0) == data  # the index is known from here on
        fault = proxy.fail(Fault("corrupt", READS, times_max=1))
        assert client.pread(4 * KI, 64 * KI) == data[64 * KI : 68 * KI]
        assert len(fault.hits) == 1


def test_a_pipes_import_that_cannot_be_verified_is_kept(proxy, store, make_server):
    """Nobody has what a pipe brought but the volume."""
    volume, data = Volume(store.url("from-a-pipe"), store, MI, 64 * KI), pattern(MI, 8)
    proxy.fail(Fault("denied", READS))
    words = ["import", "-", volume.url, "--size", "1M", "--endpoint-url", proxy.endpoint, *store.cli_options[2:]]
    done = subprocess.run([CLI, *words], input=data, capture_output=True, env={**os.environ, **store.env}, timeout=COMMAND_LIMIT_S)
    assert done.returncode == 1 and b"is whole, and was not verified" in done.stderr, done.stderr
    proxy.heal()
    told = json.loads(volume.cli("info", volume.url, "--json").stdout)
    assert "import" not in told, told
    with make_server(volume).start().connect() as client:
        assert client.pread(MI, 0) == data
