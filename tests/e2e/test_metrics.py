"""A served volume says what it does: /metrics, /status, /healthz, /readyz."""

import contextlib
import json
import re
import shutil
import socket
import stat
from pathlib import Path

import nbd
import pytest
import yaml

from support.faulty import Fault, FaultyProxy
from support.model import pattern
from support.process import run, wait_for
from support.server import KI, MI, PROJECT, flush_until_it_succeeds
from support.stores import free_port
from support.endpoints import Page, ask, page

SIZE = 64 * MI
SEGMENT = r"^PUT \S+/\d{10}\.\d+[? ]"
NAME = re.compile(r"\bhypernbd_\w+")
RULES = PROJECT / "contrib" / "prometheus" / "hypernbd.rules.yml"
DASHBOARD = PROJECT / "contrib" / "grafana" / "hypernbd.json"
DOCUMENT = PROJECT / "docs" / "monitoring.md"
# Kept from publishing by itself, so that what is counted is what the test did.
BY_HAND = {"checkpoint_interval": "1h"}


@pytest.fixture
def tell(make_server):
    """Starts a server that tells of itself: `tell(volume, parameter=value…)`; gives the server and its address."""

    def start(volume, **parameters):
        address = f"127.0.0.1:{free_port()}"
        server = make_server(volume, metrics=address, **{**BY_HAND, **parameters}).start()
        return server, address

    return start


def requests(numbers: Page, kind: str) -> tuple[float, float, float]:
    """How many of a kind there were, their bytes, and how many failed."""
    return (
        numbers.value("request_duration_seconds_count", kind=kind),
        numbers.value("request_bytes_total", kind=kind),
        numbers.value("request_failures_total", kind=kind),
    )


def test_the_numbers_are_what_was_done(make_volume, tell):
    volume = make_volume(SIZE)
    server, address = tell(volume)
    with server.connect(extents=True) as client:
        for at in range(5):
            client.pwrite(pattern(64 * KI, at), at * MI)
        before = page(address)
        assert before.value("write_buffer_bytes", state="active") >= 5 * 64 * KI
        for age in ("unpublished_age_seconds", "undurable_age_seconds"):
            wait_for(lambda: page(address).value(age) > 0, "the writes to age")
        client.flush()
        client.pwrite(b"\1" * 4096, 8 * MI, nbd.CMD_FLAG_FUA)
        client.zero(64 * KI, 0)
        client.trim(128 * KI, 1 * MI)
        client.pread(3 * KI, 0)
        client.pread(1 * KI, 32 * MI)
        client.cache(256 * KI, 0)
        client.block_status(1 * MI, 0, lambda *_: 0)
        client.flush()
        after = page(address)
        assert requests(after, "write") == (5, 5 * 64 * KI, 0)
        assert requests(after, "fua") == (1, 4096, 0)
        assert requests(after, "flush") == (2, 0, 0)
        assert requests(after, "zero") == (1, 64 * KI, 0)
        assert requests(after, "trim") == (1, 128 * KI, 0)
        assert requests(after, "cache") == (1, 256 * KI, 0)
        assert requests(after, "extents")[::2] == (1, 0)
        assert requests(after, "read") == (2, 4 * KI, 0)
        assert after.value("volume_size_bytes") == SIZE
        # The client that tried whether the server serves may not have left yet.
        wait_for(lambda: page(address).value("connections") == 1, "no other client to be there")
        # Each flush, and the write that was to be durable.
        assert after.value("publish_duration_seconds_count") == 3
        assert after.value("publish_phase_duration_seconds_count", phase="store") == 3
        assert after.value("publish_phase_duration_seconds_sum", phase="store") > 0
        assert after.value("publish_bytes_total") >= 5 * 64 * KI
        for age in ("unpublished_age_seconds", "undurable_age_seconds"):
            wait_for(lambda: page(address).value(age) == 0, "nothing to age")
        info = json.loads(volume.cli("info", volume.url, "--json").stdout)
        assert after.value("checkpoint") == info["last_checkpoint"] == 3
        assert after.value("lease_epoch") == info["lease"]["epoch"] and after.value("lease_held") == 1
        assert after.value("store_sent_bytes_total") >= 5 * 64 * KI
        assert after.value("store_request_duration_seconds_count", operation="put") > 3
        assert after.value("last_publish_timestamp_seconds") > after.value("start_timestamp_seconds")
        for bad in ("publish_failures_total", "publish_retries_total", "fenced"):
            assert after.value(bad) == 0
        assert after.sum("damage_found_total") == 0
    status = ask(address, "/status").json
    assert status["requests"]["write"]["count"] == 5 and status["requests"]["write"]["bytes"] == 5 * 64 * KI
    assert status["url"] == volume.url and status["state"] == "open" and status["problems"] == []
    assert status["volume"]["checkpoint"] == 3 and status["volume"]["log"] is None


def test_histograms_are_those_of_prometheus(make_volume, tell):
    server, address = tell(make_volume(SIZE))
    with server.connect() as client:
        for at in range(20):
            client.pwrite(b"x" * 4096, at * 4096)
        numbers = page(address)
    classes = [
        (float(dict(labels)["le"]), value)
        for (name, labels), value in numbers.samples.items()
        if name == "hypernbd_request_duration_seconds_bucket" and ("kind", "write") in labels
    ]
    classes.sort()
    counts = [count for _, count in classes]
    assert counts == sorted(counts), "each class has those below it"
    assert classes[-1] == (float("inf"), numbers.value("request_duration_seconds_count", kind="write")) == (
        float("inf"),
        20,
    )
    for name, kind in numbers.types.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert numbers.helps[name], name


@pytest.mark.s3_only
def test_requests_to_the_store_are_those_that_it_saw(minio, make_volume, tell):
    """Counted by a proxy, too; what only one of them could see is left out."""
    proxy = FaultyProxy(minio.endpoint)
    server, address = tell(make_volume(SIZE), endpoint_url=proxy.endpoint, lease_duration="24h", cache_memory="0")
    with server.connect() as client:
        client.pwrite(pattern(4 * MI, 1), 0)
        client.flush()
        client.pread(1 * MI, 0)

        def agree() -> bool:
            with proxy.lock:
                seen = [line.split(" ")[0] for line in proxy.requests]
            numbers = page(address)
            with proxy.lock:
                is_quiet = len(proxy.requests) == len(seen)
            told = {
                operation: numbers.value("store_request_duration_seconds_count", operation=operation)
                for operation in ("put", "part", "get", "list", "head", "delete", "multipart", "copy", "other")
            }
            puts = told["put"] + told["part"] + told["copy"]
            # The look before the fork is another process's, of the same parameters: counted before that.
            return is_quiet and seen.count("PUT") == puts and seen.count("HEAD") == told["head"]

        wait_for(agree, "proxy and server to agree")
        assert page(address).value("store_cost_dollars_total") > 0
    proxy.close()


@pytest.mark.s3_only
def test_a_store_that_fails_is_told_of(minio, make_volume, tell):
    proxy = FaultyProxy(minio.endpoint)
    env = {"AWS_MAX_ATTEMPTS": "1"}
    volume = make_volume(SIZE)
    volume.store.env.update(env)
    server, address = tell(volume, endpoint_url=proxy.endpoint, io_timeout="2s")
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        proxy.fail(Fault("503", SEGMENT))
        with pytest.raises(nbd.Error):
            client.flush()
        # A slow machine may not have come to the refusal before the flush's time was up.
        wait_for(lambda: page(address).value("publish_failures_total") >= 1, "the failure to be told of")
        failing = page(address)
        assert failing.value("store_request_failures_total", operation="put", failure="throttled") >= 1
        assert failing.value("undurable_age_seconds") > 1
        assert requests(failing, "flush") == (1, 0, 1)
        problems = ask(address, "/status").json["problems"]
        assert any("cannot be published" in problem for problem in problems), problems
        assert ask(address, "/readyz").status == 200, "reads and writes are served"
        proxy.heal()
        flush_until_it_succeeds(client)
        well = page(address)
        assert well.value("publish_retries_total") >= 1
        wait_for(lambda: page(address).value("undurable_age_seconds") == 0, "the write to be durable")
        assert ask(address, "/status").json["problems"] == []
    proxy.close()


def test_a_log_is_told_of(make_volume, tell, tmp_path):
    server, address = tell(make_volume(SIZE), backend_wal_url=f"file://{tmp_path}/log/")
    with server.connect() as client:
        for at in range(3):
            client.pwrite(pattern(8 * KI, at), at * MI)
            client.flush()
        wait_for(lambda: page(address).value("wal_records") == 3, "the records to be told of")
        numbers = page(address)
        assert numbers.value("wal_size_bytes") >= 24 * KI
        assert numbers.value("wal_age_seconds") > 0
        assert numbers.value("wal_append_duration_seconds_count") == 3
        assert numbers.value("wal_append_bytes_total") >= 24 * KI
        # Durable, and not published. The reply goes out a moment before that is told.
        wait_for(lambda: page(address).value("undurable_age_seconds") == 0, "the writes to be durable")
        assert page(address).value("unpublished_age_seconds") > 0
        client.pwrite(b"x", 0)
        wait_for(lambda: page(address).value("undurable_age_seconds") > 0, "the write to age")


def test_caches_and_read_ahead_are_told_of(make_volume, tell, tmp_path):
    volume = make_volume(SIZE)
    caches = {"cache_dir": str(tmp_path / "cache"), "cache_disk": "64M"}
    server, address = tell(volume, **caches)
    with server.connect() as client:
        for at in range(0, 32, 4):
            client.pwrite(pattern(4 * MI, at), at * MI)
        client.flush()
    assert server.terminate() == 0
    server, address = tell(volume, **caches)
    with server.connect() as client:
        client.pread(16 * KI, 1 * MI)
        cold = page(address)
        assert cold.value("cache_misses_total", cache="data") > 0
        client.pread(16 * KI, 1 * MI)
        warm = page(address)
        assert warm.value("cache_misses_total", cache="data") == cold.value("cache_misses_total", cache="data")
        memory = {"cache": "data", "tier": "memory"}
        assert warm.value("cache_hits_total", **memory) > cold.value("cache_hits_total", **memory)
        for at in range(64):
            client.pread(128 * KI, 1 * MI + at * 128 * KI)
        streamed = page(address)
        asked, useful = streamed.value("read_ahead_bytes_total"), streamed.value("read_ahead_useful_bytes_total")
        assert 0 < useful <= asked and streamed.value("read_ahead_wasted_bytes_total") == 0
    assert server.terminate() == 0
    server, address = tell(volume, **caches)
    with server.connect() as client:
        client.pread(16 * KI, 1 * MI)
        assert page(address).value("cache_hits_total", cache="data", tier="disk") > 0


@pytest.mark.s3_only
def test_damage_is_told_of(minio, make_volume, tell):
    proxy = FaultyProxy(minio.endpoint)
    server, address = tell(make_volume(SIZE), endpoint_url=proxy.endpoint, cache_memory="0")
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
        proxy.fail(Fault("corrupt", r"^GET \S+/\d{10}\.\d+[? ]"))
        with pytest.raises(nbd.Error):
            client.pread(256 * KI, 0)
        assert page(address).value("damage_found_total", by="read") == 1
        assert "damaged" in ask(address, "/status").json["problems"][0]
    proxy.close()


def test_space_is_told_of(make_volume, tell):
    """As of the last round of the retention, and the same as `hypernbd space`."""
    volume = make_volume(SIZE)
    server, address = tell(volume, retention_interval="1s", retention_grace="1s")
    with server.connect() as client:
        # More than are kept whatever the policy says.
        for at in range(24):
            client.pwrite(pattern(256 * KI, at), 0)
            client.flush()
        assert volume.cli("retention", "set", volume.url, "--keep-last", "1").returncode == 0
        wait_for(lambda: page(address).value("retention_removed_checkpoints_total") > 0, "checkpoints to be removed")
        wait_for(lambda: "hypernbd_space_bytes" in page(address).names(), "the space to be counted")
        numbers, removed = page(address), json.loads(volume.cli("space", volume.url, "--json").stdout)
        assert numbers.value("space_bytes", kind="live") == removed["live_bytes"] >= 256 * KI
        assert numbers.value("retention_removed_bytes_total") >= 256 * KI
        assert numbers.value("space_timestamp_seconds") > numbers.value("start_timestamp_seconds")


def test_readiness(make_volume, make_server, tell):
    volume = make_volume(SIZE)
    address = f"127.0.0.1:{free_port()}"
    server = make_server(volume, metrics=address, lease_duration="2s")
    server.spawn()
    wait_for(lambda: answers(address), "the server to tell of itself")
    assert ask(address, "/status").json["state"] == "waiting"
    assert page(address).value("volume_open") == 0
    assert ask(address, "/readyz").status == 200, "the first client is waited for"
    with server.connect():
        wait_for(lambda: ask(address, "/status").json["state"] == "open", "the volume to be open")
    other = make_server(volume, takeover="yes").start()
    wait_for(lambda: ask(address, "/readyz").status == 503, "the server to know that it was taken over", limit_s=60)
    assert "took the volume over" in ask(address, "/readyz").text
    assert page(address).value("fenced") == 1 and page(address).value("lease_held") == 0
    assert ask(address, "/healthz").status == 200, "it lives, and reads go on"
    other.terminate()


def answers(address) -> bool:
    try:
        return ask(address, "/healthz").status == 200
    except OSError:
        return False


@pytest.mark.file_only
def test_an_opening_that_fails_is_told_of(make_volume, make_server):
    volume = make_volume(SIZE)
    address = f"127.0.0.1:{free_port()}"
    server = make_server(volume, metrics=address)
    server.spawn()
    wait_for(lambda: answers(address), "the server to tell of itself")
    moved = Path(volume.url.removeprefix("file://").rstrip("/"))
    moved.rename(moved.with_name("away"))
    with pytest.raises(nbd.Error):
        server.handle()
    answer = ask(address, "/readyz")
    assert answer.status == 503 and "could not be opened" in answer.text
    moved.with_name("away").rename(moved)
    with server.connect():
        assert ask(address, "/readyz").status == 200
        assert ask(address, "/status").json["problems"] == []


@pytest.mark.file_only
def test_nothing_listens_unless_asked(make_volume, make_server):
    server = make_server(make_volume(SIZE)).start()
    table = Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()[1:]
    listening = {row.split()[9] for row in table if row.split()[3] == "0A"}
    own = set()
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        # Those of a client that is just leaving are closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            own.add(str(link.readlink()))
    assert not {inode for inode in listening if f"socket:[{inode}]" in own}


@pytest.mark.file_only
def test_a_unix_socket(make_volume, make_server, tmp_path):
    volume = make_volume(SIZE)
    directory = make_server(volume).directory
    path = directory / "telling"
    server = make_server(volume, metrics=f"unix:{path}").start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert page(path).value("volume_open") == 1
    server.kill()
    assert path.exists(), "a killed server removes nothing"
    server = make_server(volume, metrics=f"unix:{path}").start()
    assert page(path).value("volume_open") == 1
    assert server.terminate() == 0
    assert not path.exists()


@pytest.mark.file_only
@pytest.mark.parametrize("wrong", ["busy", "file", "words"])
def test_an_address_that_cannot_be_had(make_volume, make_server, tmp_path, wrong):
    """Said on the terminal, before anything is served."""
    volume = make_volume(SIZE)
    before = volume.store.objects()
    listener = socket.create_server(("127.0.0.1", 0))
    mine = tmp_path / "mine"
    mine.write_text("mine")
    address = {"busy": f"127.0.0.1:{listener.getsockname()[1]}", "file": f"unix:{mine}", "words": "localhost:1"}[wrong]
    server = make_server(volume, metrics=address)
    server.spawn()
    assert server.wait() != 0
    assert "metrics" in server.log_text()
    assert volume.store.objects() == before and mine.read_text() == "mine"
    listener.close()


@pytest.mark.file_only
def test_who_reaches_it_can_only_look(make_volume, tell):
    server, address = tell(make_volume(SIZE))
    host, port = address.split(":")
    for method in ("POST", "PUT", "DELETE", "BREW"):
        assert ask(address, "/status", method).status == 405
    assert ask(address, "/../etc/passwd").status == 404
    assert ask(address, "/metrics", "HEAD").body == b""
    for junk in (b"\0" * 4096, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * (1 << 20), b"X: y\r\n" * 100_000):
        with socket.create_connection((host, int(port)), timeout=30) as hostile:
            try:
                hostile.sendall(junk)
                hostile.recv(4096)
            except OSError:
                pass  # it hung up on us
    # More connections that say nothing than it takes: they are given up in time, and others wait for that.
    silent = [socket.create_connection((host, int(port))) for _ in range(40)]
    assert page(address).value("volume_open") == 1
    with server.connect() as client:
        client.pread(4096, 0)
    for connection in silent:
        connection.close()


@pytest.mark.s3_only
def test_no_credential_is_told(make_volume, tell):
    volume = make_volume(SIZE)
    server, address = tell(volume)
    with server.connect() as client:
        client.pwrite(b"x" * 4096, 0)
        client.flush()
        told = ask(address, "/metrics").text + ask(address, "/status").text
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert volume.store.env[name] not in told
    assert volume.url in told


def names_in(text: str) -> set[str]:
    return set(NAME.findall(text))


@pytest.mark.file_only
def test_rules_dashboard_and_document_name_what_is_there(make_volume, tell):
    server, address = tell(make_volume(SIZE))
    with server.connect():
        numbers = page(address)
    # Without a retention nothing has counted its space.
    there = numbers.names() | set(numbers.types)
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}
        named = names_in(rule["expr"])
        assert named <= there, (rule["alert"], named - there)
        assert named or rule["expr"].startswith("up{")
    promtool = shutil.which("promtool")
    if promtool:
        checked = run(promtool, "check", "rules", RULES)
        assert checked.returncode == 0, checked.stdout + checked.stderr

    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len(panels) > 10
    for panel in panels:
        for target in panel["targets"]:
            named = names_in(target["expr"])
            assert named and named <= there, (panel["title"], named - there)
    rows = re.findall(r"^\| `(hypernbd_\w+)` \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert dict(rows) == numbers.types and len(rows) == len(numbers.types)


@pytest.mark.file_only
def test_every_alert_can_be_seen_to_fire(make_volume, tell):
    """The comparison of each rule is one that some value satisfies and a healthy server's does not."""
    server, address = tell(make_volume(SIZE))
    with server.connect() as client:
        client.pwrite(b"x" * 4096, 0)
        client.flush()
        numbers = page(address)
    for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]:
        plain = re.fullmatch(r"(hypernbd_\w+) (==|>) (\d+)", rule["expr"])
        if not plain:
            continue
        name, compare, bound = plain.groups()
        value = numbers.samples[name, frozenset()]
        assert not (value == float(bound) if compare == "==" else value > float(bound)), rule["alert"]
