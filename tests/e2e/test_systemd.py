"""The systemd units of contrib/: systemd understands them, and their command line serves from a socket handed over."""

import os
import shlex
import shutil

import pytest

from support.model import pattern
from support.process import run
from support.server import CLI, MI, PLUGIN, PROJECT

UNITS = PROJECT / "contrib" / "systemd"
SERVICE = "hypernbd@.service"


@pytest.fixture
def units(nbdkit, tmp_path):
    """The units with this machine's paths."""
    for unit in UNITS.iterdir():
        text = unit.read_text()
        text = text.replace("=nbdkit ", f"={nbdkit} ").replace(" hypernbd backend_url", f" {PLUGIN} backend_url")
        text = text.replace("=hypernbd ", f"={CLI} ")
        (tmp_path / unit.name).write_text(text)
    return tmp_path


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_understands_the_units(units):
    # A name, because a template alone is not looked into.
    names = ("hypernbd@disk.service", "hypernbd@disk.socket", "hypernbd-attach@disk.service")
    for unit in names:
        shutil.copy(units / unit.replace("disk", ""), units / unit)
    done = run("systemd-analyze", "verify", "--man=no", *(units / unit for unit in names))
    complaints = [line for line in done.stderr.splitlines() if "hypernbd" in line]
    assert done.returncode == 0 and not complaints, done.stderr


def test_a_device_goes_before_the_server_that_is_below_it():
    """systemd stops in the reverse order of `After=`."""
    unit = (UNITS / "hypernbd-attach@.service").read_text()
    after = [word for line in unit.splitlines() if line.startswith("After=") for word in line[6:].split()]
    assert {"hypernbd@%i.socket", "hypernbd@%i.service"} <= set(after)


@pytest.mark.file_only
@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="there is no systemd-socket-activate")
def test_the_services_command_line_takes_the_socket_over(units, make_volume, make_server):
    server = make_server(make_volume(16 * MI))
    (line,) = [l for l in (units / SERVICE).read_text().splitlines() if l.startswith("ExecStart=")]
    options = "checkpoint_interval=1h io_timeout=2m"
    line = line.removeprefix("ExecStart=").replace("${URL}", server.volume.url).replace("$OPTIONS", options)
    (wal,) = [l for l in (units / SERVICE).read_text().splitlines() if l.startswith("Environment=WAL=")]
    line = line.replace("${WAL}", wal.removeprefix("Environment=WAL="))
    line = line.replace("/run/hypernbd-control/%i/socket", str(server.directory / "control"))
    server.command = lambda: [
        "systemd-socket-activate",
        f"--listen={server.socket}",
        *(f"--setenv={name}" for name in ("RUST_LOG", "PATH", *os.environ.keys() & {"LD_LIBRARY_PATH"})),
        *shlex.split(line),
    ]
    with server.start().connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
    assert server.terminate() == 0, server.log_text()
    with server.start().connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
