"""The recipes of docs/recipes, run."""

import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from support import recipes
from support.blockdev import BlockDevice, why_not
from support.lives import listens
from support.model import pattern
from support.process import check, run, spawn, wait_for
from support.recipes import Shell, blocks
from support.server import GI, KI, MI, PROJECT, create_volume

# How many blocks of commands each page has: all of them are run below.
RUN = {
    "backups.md": 3,
    "filesystems.md": 4,
    "migrating.md": 4 + 1,
    "postgresql.md": 2,
    "qemu.md": 1,
    "restarts.md": 0,
    "spark.md": 4,
    "systemd.md": 0,
}
# They need loop devices and mounts, which leave much behind when a run is ended half way.
pytestmark = pytest.mark.skipif(
    not os.environ.get("HYPERNBD_RECIPES"), reason="set HYPERNBD_RECIPES=1 to run the recipes; they mount file systems"
)
no_devices = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture
def shell(store, tmp_path) -> Shell:
    return Shell(store, tmp_path / "shell")


@pytest.fixture
def attach(tmp_path):
    """Makes block devices that are taken away with the test."""
    devices = []

    def make(server) -> BlockDevice:
        device = BlockDevice(server.uri, tmp_path / f"device-{len(devices) + 1}")
        devices.append(device)
        return device

    yield make
    for device in reversed(devices):
        device.close()


@pytest.fixture
def unmounted(shell):
    """The directory below /srv where a recipe mounts; unmounted with the test."""
    made = []

    def make(name: str) -> Path:
        made.append(shell.srv / name)
        made[-1].mkdir()
        return made[-1]

    yield make
    for directory in made:
        if os.path.ismount(directory):
            check("umount", directory)


def image(path: Path, size_bytes: int, seed: int) -> Path:
    """A raw image with data at its begin and at its end."""
    with open(path, "wb") as file:
        file.write(pattern(1 * MI, seed))
        file.seek(size_bytes - 64 * KI)
        file.write(pattern(64 * KI, seed + 1))
    return path


def contents(shell: Shell, name: str) -> Path:
    """A volume as a raw file."""
    path = shell.directory / f"{name}.contents"
    check(shell.directory / "bin/hypernbd", "export", shell.volume(name).url, path, env=shell.env)
    return path


def assert_same(one: Path, other: Path) -> None:
    """Two images read the same, whatever their formats; one may have zeros at its end."""
    check("qemu-img", "compare", one, other)


def test_every_block_is_run():
    assert {page.name for page in recipes.pages()} == set(RUN)
    for page, number in RUN.items():
        assert len(blocks(page, "sh")) == number, f"{page}: run what was added, and count it here"


def test_a_machine_from_a_cloud_image(shell):
    raw = image(shell.directory / "raw", 32 * MI, 1)
    check("qemu-img", "convert", "-O", "qcow2", raw, shell.directory / "debian.qcow2")
    (commands,) = blocks("qemu.md", "sh")
    shell.run(commands)
    assert_same(contents(shell, "web1"), raw)


@pytest.mark.file_only
def test_qemu_takes_the_disk(server):
    """QEMU's own block layer, as the machine has it, takes the disk; libvirt's is the same socket."""
    (commands,) = [text for text in blocks("qemu.md", "") if "-blockdev" in text]
    (disk,) = re.findall(r"-blockdev (\S+)", commands)
    (socket,) = re.findall(r"--socket (\S+)", commands)
    assert socket in disk
    (xml,) = blocks("qemu.md", "xml")
    tree = ElementTree.fromstring(xml)
    assert tree.find("source/host").get("socket") == socket
    assert tree.find("driver").get("discard") == "unmap" and tree.find("driver").get("cache") == "none"
    assert tree.find("source/reconnect").get("delay") == re.search(r"reconnect-delay=(\d+)", disk)[1]
    out = server.directory / "out"
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 4), 0)
    daemon = spawn(
        [
            "qemu-storage-daemon",
            "--blockdev",
            disk.replace(socket, str(server.socket)),
            "--nbd-server",
            f"addr.type=unix,addr.path={out}",
            "--export",
            "nbd,id=e,node-name=web1,name=web1",
        ],
        server.directory / "qemu.log",
        env={},
        limit_s=120,
    )
    try:
        wait_for(lambda: listens(out) or daemon.poll() is not None, "QEMU to listen")
        assert daemon.poll() is None, (server.directory / "qemu.log").read_text()
        read = check("qemu-io", "-r", "-f", "raw", "-c", "read 0 1M", f"nbd+unix:///web1?socket={out}")
        assert "read 1048576/1048576" in read
    finally:
        daemon.terminate()
        daemon.wait(timeout=60)


@no_devices
@pytest.mark.file_only
@pytest.mark.parametrize("number, kind", [(0, "ext4"), (1, "xfs"), (2, "btrfs")])
def test_a_file_system(shell, make_volume, make_server, attach, unmounted, number, kind):
    if not shutil.which(f"mkfs.{kind}", path=shell.env["PATH"]):
        pytest.skip(f"there is no mkfs.{kind}")
    server = make_server(make_volume(2 * GI)).start()
    device = attach(server)
    mounted = unmounted("data")
    shell.run(blocks("filesystems.md", "sh")[number], nbd0=device.path)
    assert check("findmnt", "-no", "FSTYPE", mounted).strip() == kind
    assert "noatime" in check("findmnt", "-no", "OPTIONS", mounted)
    (mounted / "file").write_bytes(pattern(4 * MI, 9))
    check("umount", mounted)
    check("mount", device.path, mounted)
    assert (mounted / "file").read_bytes() == pattern(4 * MI, 9)


@no_devices
@pytest.mark.file_only
def test_a_volume_is_grown(shell, store, make_server, attach, unmounted):
    """By the line of the recipe; the file system then by the one for its kind, which works mounted, too, for who may do that."""
    server = make_server(create_volume(store, 256 * MI, 64 * KI, "disk1")).start()
    device = attach(server)
    check("mkfs.ext4", "-q", device.path)
    device.close()
    assert server.terminate() == 0
    shell.run(blocks("filesystems.md", "sh")[3])
    device = attach(server.start())
    (grow,) = [text for text in blocks("filesystems.md", "") if "resize2fs" in text]
    check("e2fsck", "-fp", device.path)
    shell.run(grow.splitlines()[0], nbd0=device.path)
    mounted = unmounted("data")
    check("mount", device.path, mounted)
    assert int(check("findmnt", "-bno", "SIZE", mounted)) > 900 * MI


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_understands_the_mount(nbdkit, tmp_path):
    service, mount = blocks("systemd.md", "ini")
    # Programs that this machine may lack; what is asked for is whether the units are understood.
    (tmp_path / "nbd-disk1.service").write_text(re.sub(r"=/(usr/)?sbin/[\w-]+", "=/bin/true", service))
    (tmp_path / "srv-data.mount").write_text(mount)
    for unit in (PROJECT / "contrib/systemd").iterdir():
        text = unit.read_text().replace("=nbdkit ", f"={nbdkit} ")
        (tmp_path / unit.name.replace("@", "@disk1")).write_text(text)
    done = run("systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir()))
    complaints = [line for line in done.stderr.splitlines() if "hypernbd" in line or "disk1" in line or "srv-data" in line]
    assert done.returncode == 0 and not complaints, done.stderr


@no_devices
@pytest.mark.file_only
def test_scratch_space(shell, make_server, attach, unmounted):
    create, make, unmount, delete = blocks("spark.md", "sh")
    shell.run(create)
    volume = shell.volume("scratch1")
    (serve,) = [text for text in blocks("spark.md", "") if "hypernbd serve" in text]
    given = dict(re.findall(r"--([a-z-]+) (\S+)", serve.replace("\\\n", "")))
    parameters = {key.replace("-", "_"): value for key, value in given.items() if key not in ("socket", "write-buffer")}
    parameters["cache_dir"] = str(shell.directory / "cache")
    server = make_server(volume, **parameters).start()
    device = attach(server)
    mounted = unmounted("scratch")
    shell.run(make, nbd0=device.path)
    (mounted / "spark" / "shuffle").write_bytes(pattern(8 * MI, 2))
    shell.run(unmount)
    device.close()
    assert server.terminate() == 0
    shell.run(delete)
    assert volume.cli("info", volume.url).returncode != 0


def test_a_backup_and_its_way_back(shell, store, make_server):
    server = make_server(create_volume(store, 64 * MI, 64 * KI, "disk1")).start()
    copy, file, back = blocks("backups.md", "sh")
    (shell.srv / "backup").mkdir()
    for round_ in (1, 2):
        with server.connect() as client:
            client.pwrite(pattern(1 * MI, round_), 3 * MI)
            client.flush()
        # A second one of one day has another name.
        shell.run(copy.replace("%Y%m%d", f"%Y%m%d-{round_}"))
    shell.run(file)
    shell.run(back)
    expected = contents(shell, "disk1")
    for there in (shell.srv / "backup/disk1.qcow2", contents(shell, "restored")):
        assert_same(there, expected)
    backup = f"file://{shell.srv}/backup/disk1/"
    check(shell.directory / "bin/hypernbd", "export", backup, shell.directory / "backup.raw")
    assert_same(shell.directory / "backup.raw", expected)
    names = check(shell.directory / "bin/hypernbd", "snapshot", "list", backup)
    assert len(re.findall(r"backup-\d+-[12]", names)) >= 2


@pytest.mark.file_only
def test_migrating(shell, tmp_path):
    qcow2, s3backer, disk, nbd, back = blocks("migrating.md", "sh")
    raw = image(shell.directory / "raw", 16 * MI, 5)

    def migrates(commands: str) -> None:
        shell.run(commands)
        assert_same(contents(shell, "disk1"), raw)
        shell.run("hypernbd delete --yes s3://mybucket/disk1/")
        (shell.directory / "disk1.contents").unlink()

    check("qemu-img", "convert", "-O", "qcow2", raw, shell.directory / "disk.qcow2")
    migrates(qcow2)
    migrates(s3backer.replace("/mnt/s3backer/file", str(raw)))
    migrates(disk.replace("/dev/vg0/disk", str(raw)))

    socket = shell.directory / "old.sock"
    other = spawn(
        ["qemu-nbd", "--persistent", "--read-only", "-f", "raw", "--socket", str(socket), str(raw)],
        tmp_path / "log",
        env={},
        limit_s=120,
    )
    wait_for(lambda: listens(socket), "the other server")
    try:
        shell.run(nbd.replace("nbd+unix:///?socket=/run/old.sock", f"'nbd+unix:///?socket={socket}'"))
    finally:
        other.terminate()
        other.wait(timeout=60)
    shell.run(back)
    assert_same(shell.directory / "disk.raw", raw)


@no_devices
@pytest.mark.file_only
@pytest.mark.skipif(not shutil.which("initdb") or os.geteuid() != 0, reason="there is no PostgreSQL here")
def test_postgresql_keeps_what_was_committed(shell, make_server, attach, unmounted, tmp_path):
    create, make = blocks("postgresql.md", "sh")
    shell.run(create)
    journal = tmp_path / "journal"
    parameters = {"backend_wal_url": f"file://{journal}/", "checkpoint_interval": "1h"}
    server = make_server(shell.volume("pg", 1 * GI), **parameters).start()
    device = attach(server)
    mounted = unmounted("pg")
    for directory in (shell.srv, *shell.srv.parents):
        if directory.is_relative_to(tmp_path.parents[1]):
            directory.chmod(0o755)
    shell.run(make, nbd0=device.path)
    data, log = mounted / "data", mounted / "log"
    log.touch()
    shutil.chown(log, "postgres")
    postgres = ["runuser", "-u", "postgres", "--", "env", f"PGHOST={mounted}", "PGPORT=5499"]
    start = ["pg_ctl", "-w", "-D", data, "-l", log, "-o", f"-p 5499 -k {mounted} -c listen_addresses=", "start"]
    shutil.chown(mounted, "postgres")

    def sql(text: str) -> str:
        return check(*postgres, "psql", "-XAtq", "-d", "postgres", "-c", text)

    check(*postgres, *start)
    try:
        for line in ("wal_recycle", "wal_init_zero"):
            assert sql(f"show {line}").strip() == "off"
        assert sql("show full_page_writes").strip() == "on"
        sql("create table t (n int primary key, text text)")
        for number in range(50):
            sql(f"insert into t values ({number}, repeat('x', 3000))")
    finally:
        # The volume's server first: PostgreSQL has not shut down, and could not write any more.
        server.kill()
        run(*postgres, "pg_ctl", "-D", data, "-m", "immediate", "stop")
    check("umount", "--lazy", mounted)
    device.close()

    device = attach(server.start())
    check("mount", device.path, mounted)
    check(*postgres, *start)
    try:
        assert sql("select count(*), sum(length(text)) from t").strip() == "50|150000"
    finally:
        check(*postgres, "pg_ctl", "-D", data, "-m", "fast", "stop")
