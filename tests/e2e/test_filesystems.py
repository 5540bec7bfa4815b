"""Real file systems on a served volume: made, filled, trimmed, checked, and found again after a kill."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from support.blockdev import BlockDevice, why_not
from support.process import check
from support.server import MI

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

SIZE = 512 * MI  # mkfs.xfs wants 300 MiB
MAKE = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}


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


def fill(directory: Path, rng: random.Random) -> None:
    """Files of all sizes, some sparse, in a tree."""
    for number in range(120):
        folder = directory / f"folder-{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"file-{number}").write_bytes(rng.randbytes(rng.choice([0, 1, 100, 4096, 70_001])))
    (directory / "large").write_bytes(rng.randbytes(24 * MI))
    with open(directory / "sparse", "wb") as file:
        for at in (0, 10 * MI + 5, 40 * MI):
            file.seek(at)
            file.write(rng.randbytes(5000))


def sums(directory: Path) -> dict[str, str]:
    """The digest of every file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_a_file_system_lives(make_volume, make_server, attach, seed, file_system):
    server = make_server(make_volume(SIZE)).start()
    device = attach(server)
    check(*MAKE[file_system], device.path)
    mounted = device.mount("-o", "discard")
    fill(mounted, random.Random(seed))
    trash = mounted / "trash"
    trash.write_bytes(os.urandom(20 * MI))
    os.sync()
    trash.unlink()
    os.sync()
    expected = sums(mounted)
    assert "trimmed" in check("fstrim", "-v", mounted)
    device.unmount()
    check(*CHECK[file_system], device.path)
    device.close()

    server.kill()  # unmounting has flushed
    server.start()
    device = attach(server)
    check(*CHECK[file_system], device.path)
    mounted = device.mount()
    assert sums(mounted) == expected
    (mounted / "one more").write_text("still writable")
    device.unmount()
    check(*CHECK[file_system], device.path)


def test_kill_9_under_a_mounted_file_system(make_volume, make_server, attach, seed):
    """The journal recovers on the restarted server, and every file that was synced is whole."""
    rng = random.Random(seed)
    server = make_server(make_volume(SIZE)).start()
    device = attach(server)
    check(*MAKE["ext4"], device.path)
    mounted = device.mount()
    synced: dict[str, bytes] = {}
    for number in range(40):
        content = rng.randbytes(rng.randint(1, 200_000))
        with open(mounted / f"synced-{number}", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        synced[f"synced-{number}"] = content
        (mounted / f"unsynced-{number}").write_bytes(rng.randbytes(50_000))
    folder = os.open(mounted, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    server.kill()
    device.close()

    server.start()
    device = attach(server)
    mounted = device.mount()  # replays the journal
    for name, content in synced.items():
        assert (mounted / name).read_bytes() == content, name
    device.unmount()
    check("e2fsck", "-fn", device.path)
