"""What is easily mistyped or misread on the command line, and what it costs nobody then."""

import json
import os
import subprocess
import time
from datetime import datetime

import pytest

from support.model import pattern
from support.process import run, wait_for
from support.serve import Served
from support.server import CLI, KI, MI, Volume

SIZE = 8 * MI
SERVER_LIMIT_S = 60


def said(volume, *words: str, status: int = 0) -> str:
    """What a command says, on both outputs."""
    done = volume.cli(*words)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def write(client, tag: int) -> None:
    client.pwrite(pattern(64 * KI, tag), tag * MI)
    client.flush()


def milliseconds(text: str) -> int:
    return round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)


@pytest.fixture
def published(make_volume, make_server):
    """A volume with three checkpoints."""
    volume = make_volume(SIZE)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in range(3):
            # Times are told in milliseconds: each checkpoint is to have one of its own, also on a fast machine.
            time.sleep(0.005)
            write(client, tag)
    assert server.terminate() == 0
    return volume


def test_a_checkpoint_alone_is_no_file(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said(published, "snapshot", "create", published.url, "first", "@1")
    for word in ("@first", "@1"):
        assert f"./{word}" in said(published, "export", published.url, word, status=2)
    assert not list(tmp_path.glob("@*"))
    said(published, "export", published.url, "./@first")
    assert (tmp_path / "@first").stat().st_size == SIZE


def test_the_time_of_a_checkpoint_finds_that_checkpoint(published):
    """Wherever it is shown, as it is shown."""
    listed = json.loads(said(published, "checkpoints", published.url, "--json"))
    times = {}
    for number in (1, 2, 3):
        said(published, "snapshot", "create", published.url, f"n{number}", f"@{number}")
        times[number] = next(milliseconds(one["time"]) for one in listed if one["cno"] == number)
    said(published, "snapshot", "create", published.url, "newest")
    of_names = {one["name"]: one for one in json.loads(said(published, "snapshot", "list", published.url, "--json"))}
    assert of_names["newest"]["published_ms"] == times[3]
    for number, ms in times.items():
        assert of_names[f"n{number}"]["published_ms"] == ms
    table = said(published, "checkpoints", published.url)
    for number, ms in times.items():
        shown = next(line for line in table.splitlines() if line.split()[:1] == [str(number)])
        day, clock = next((a, b) for a, b in zip(shown.split(), shown.split()[1:]) if a.count("-") == 2)
        assert f".{ms % 1000:03}" in clock
        found = said(published, "snapshot", "create", published.url, f"t{number}", f"@{day}T{clock}Z")
        assert f"is checkpoint {number}" in found


@pytest.mark.file_only
def test_parameters_behind_the_dashes_count_for_what_is_promised(make_volume, nbdkit, tmp_path):
    volume = make_volume(SIZE)
    served = Served(volume, nbdkit, tmp_path, tmp_path / "socket", "--", "checkpoint_interval=7m", "io_timeout=5m")
    try:
        served.is_announced()
        text = served.log.read_text()
        assert "-t 330" in text, text
    finally:
        assert served.end() == 0
    refused = volume.cli("serve", volume.url, "--io-timeout", "1m", "--", "io_timeout=5m")
    assert refused.returncode == 1 and "io_timeout" in refused.stderr


@pytest.mark.parametrize("words", [(), ("--when-idle",)])
def test_told_to_end_a_server_says_so(make_volume, make_server, words):
    """The answer is there before the server is gone."""
    volume = make_volume(SIZE)
    server = make_server(volume)
    for _ in range(5):
        server.start()
        text = said(volume, "control", "shutdown", volume.url, *words)
        assert "ends" in text, text
        wait_for(lambda: server.process.poll() is not None, "the server to end", limit_s=SERVER_LIMIT_S)
        assert server.process.wait() == 0


@pytest.mark.s3_only
def test_a_clone_of_a_volume_with_an_open_log_says_what_it_lacks(make_volume, make_server):
    volume = make_volume(SIZE)
    server = make_server(volume, checkpoint_interval="1h", backend_wal_url="auto").start()
    with server.connect() as client:
        write(client, 1)
    said(volume, "snapshot", "create", volume.url, "one")
    with server.connect() as client:
        write(client, 2)
        server.kill()
    for words in ((), ("--full",)):
        to = volume.store.url("clone" + "".join(words))
        text = said(volume, "clone", *words, volume.url, to)
        assert "not in the clone" in text and "wal replay" in text, text
    assert "not in the clone" not in said(volume, "clone", volume.url, "@one", volume.store.url("of-name"))


@pytest.mark.parametrize("verb", ["check", "info"])
def test_a_wrong_option_is_no_damage(make_volume, verb):
    volume = make_volume(SIZE)
    assert "path" in said(volume, verb, volume.url, "--path-style", "maybe", status=2)


@pytest.mark.file_only
def test_spellings_of_the_documents(make_volume, nbdkit, tmp_path):
    """Keys with either sign, their other names, and a yes that may be left out."""
    volume = make_volume(SIZE)
    words = ["--write_buffer", "64M", "--backend-wal-uri", "off", "--takeover", "--cache_memory", "16M"]
    served = Served(volume, nbdkit, tmp_path, tmp_path / "socket", *words)
    try:
        served.is_announced()
    finally:
        assert served.end() == 0
    wrong = volume.cli("serve", volume.url, "--takeover", "perhaps")
    assert wrong.returncode != 0 and "yes" in wrong.stderr


def test_what_is_said_never_comes_into_the_data(published):
    done = subprocess.run(
        [CLI, "export", published.url, "/dev/stdout", *published.store.cli_options],
        env={**os.environ, **published.store.env},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == SIZE
    assert b"exported" in done.stderr


@pytest.mark.parametrize("level", ["inof", "garbage[[", "volume=debug", "info,hypernbd_volume=inof"])
def test_a_misspelt_level_silences_nothing(make_volume, make_server, level):
    volume = make_volume(SIZE)
    server = make_server(volume).start()
    assert "RUST_LOG" in said(volume, "control", "set", volume.url, "--log", level, status=1)
    said(volume, "control", "set", volume.url, "--log", "info,hypernbd_volume=debug")
    assert server.terminate() == 0


@pytest.mark.file_only
def test_a_port_of_nobody_is_refused(make_volume):
    volume = make_volume(SIZE)
    assert "0" in said(volume, "serve", volume.url, "--port", "0", status=2)


@pytest.mark.file_only
@pytest.mark.parametrize("words, shows", [("", True), ("inof", True), ("hypernbd_volume=debug", True), ("error", False), ("off", False)])
def test_rust_log_silences_only_what_it_says(store, make_server, words, shows):
    """Of what it does not name there are warnings; a misspelt level is told."""
    volume, env = Volume(store.url("odd"), store), {"RUST_LOG": words}
    made = volume.cli("create", volume.url, "--size", "1000001", env=env)
    assert made.returncode == 0
    server = make_server(volume, backend_wal_url="auto", env=env).start()
    assert server.terminate() == 0
    for text, warning in ((made.stderr, "no multiple of 512"), (server.log_text(), "makes no log for a volume in a directory")):
        assert (warning in text) == shows, text
        assert ("inof is no level" in text) == (words == "inof"), text


@pytest.mark.file_only
def test_a_rust_log_that_cannot_be_read_is_told_in_one_line_of_the_log(store, make_server):
    """As lines of the log look, and with what of it can be read in force."""
    volume, env = Volume(store.url("odd"), store), {"RUST_LOG": "info,hypernbd_volume=inof"}
    made = volume.cli("create", volume.url, "--size", "1M", env=env)
    assert made.returncode == 0, made.stderr
    told = [line for line in made.stderr.splitlines() if "inof" in line]
    assert len(told) == 1 and "WARN" in told[0] and "write it as for RUST_LOG" in told[0], made.stderr
    server = make_server(volume, log_format="json", env=env).start()
    assert server.terminate() == 0
    told = [line for line in server.log_text().splitlines() if "inof" in line]
    assert len(told) == 1 and json.loads(told[0])["level"] == "warn", server.log_text()
    assert "holding the lease" in server.log_text()


def test_wrong_command_lines_are_told_by_their_status(make_volume):
    volume = make_volume(SIZE)
    other = volume.store.url("other")
    for words in (
        ["clone", volume.url],
        ["clone", volume.url, "@1", other, "more"],
        ["clone", volume.url, "1", other],
        ["retention", "set", volume.url],
        ["replicate", volume.url, other, "--follow", "--interval", "0"],
        ["space", volume.url, "--price", "nan"],
        # What one word says is nothing to the other.
        ["serve", volume.url, "-r", "--takeover"],
    ):
        assert "panicked" not in said(volume, *words, status=2)
    for verb in (["attach", "nbd://localhost"], ["detach", "/dev/nbd0"], ["attached"]):
        done = run(CLI, *verb, "--region", "eu-west-1")
        assert done.returncode == 2 and "store" in done.stderr, done.stderr


@pytest.mark.file_only
@pytest.mark.skipif(os.geteuid() != 0, reason="only root attaches devices")
def test_a_devices_own_name_is_no_other_name():
    done = run(CLI, "attach", "nbd://localhost", "--name", "nbd1", "--foreground")
    assert done.returncode == 1 and "a device's own" in done.stderr, done.stderr
