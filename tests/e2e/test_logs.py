"""The log as JSON, failures that repeat, and the report for somebody who was not there."""

import json
import re

import nbd
import pytest

from support.faulty import Fault, FaultyProxy
from support.model import pattern
from support.server import KI, MI, flush_until_it_succeeds
from support.stores import free_port

SIZE = 64 * MI


def lines_of(server) -> list[dict]:
    """The lines of the log, which are JSON but for nbdkit's own."""
    return [json.loads(line) for line in server.log_text().splitlines() if line.startswith("{")]


def test_each_line_is_an_object(make_volume, make_server):
    volume = make_volume(SIZE)
    server = make_server(volume, log_format="json").start()
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    others = [l for l in server.log_text().splitlines() if l and not l.startswith(("{", "nbdkit:"))]
    assert not others, others
    lines = lines_of(server)
    assert len(lines) > 2
    for line in lines:
        assert set(line) == {"time", "level", "target", "message", "volume"}
        assert line["volume"] == volume.url and line["level"] in ("info", "warn", "error")
    assert any("holding the lease" in line["message"] for line in lines)


@pytest.mark.s3_only
def test_a_failure_that_repeats_is_summarised(minio, make_volume, make_server):
    proxy = FaultyProxy(minio.endpoint)
    parameters = {"io_timeout": "1s", "cache_memory": "0", "checkpoint_interval": "1h", "log_format": "json"}
    server = make_server(make_volume(SIZE), endpoint_url=proxy.endpoint, **parameters).start()
    with server.connect() as client:
        client.pwrite(pattern(4 * MI, 1), 0)
        flush_until_it_succeeds(client)
        proxy.fail(Fault("corrupt", r"^GET \S+/\d{10}\.\d+[? ]"))
        failed = 16
        # All at once: on a slow machine one after the other would take some periods, each of which has the first ones said again.
        buffers = [nbd.Buffer(256 * KI) for _ in range(failed)]
        reads = [client.aio_pread(buffer, at * 256 * KI) for at, buffer in enumerate(buffers)]
        for read in reads:
            with pytest.raises(nbd.Error):
                while not client.aio_command_completed(read):
                    client.poll(-1)
        # What is said of them, and what is counted, is all of them once another line comes after their period: here at the end.
        proxy.heal()
    said = [line["message"] for line in lines_of(server) if "a read at" in line["message"]]
    counted = [re.search(r"and (\d+) more", text) for text in said]
    own = [text for text in said if not text.startswith("and ")]
    assert 3 <= len(own) < failed, said
    assert sum(int(found.group(1)) for found in counted if found) + len(own) <= failed
    proxy.close()


def test_a_report_has_what_helps_and_no_secret(make_volume, make_server):
    volume = make_volume(SIZE)
    server = make_server(volume, checkpoint_interval="1h", runtime_threads="2").start()
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 0)
        client.flush()
        for named in (volume.url, str(server.socket)):
            done = volume.cli("report", named)
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout)
            told = report["server"]
            assert told["parameters"]["backend_url"] == volume.url
            assert told["parameters"]["runtime_threads"] == "2"
            assert told["status"]["requests"]["write"]["count"] == 1
            assert any("holding the lease" in line["message"] for line in told["log"])
            assert report["version"] == told["status"]["version"] and report["system"]["kernel"]
            for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
                assert volume.store.env.get(name, "not there") not in done.stdout
        assert json.loads(volume.cli("report", volume.url).stdout)["volume"]["lease"]["epoch"] == 1
    server.terminate()
    report = json.loads(volume.cli("report", volume.url).stdout)
    assert "no server holds" in report["server"]["error"], "said in its place"
    nowhere = json.loads(volume.cli("report", f"http://127.0.0.1:{free_port()}").stdout)
    assert "no server answers" in nowhere["server"]["error"]
