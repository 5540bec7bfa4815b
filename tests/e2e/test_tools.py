"""The tools people use: nbdcopy, nbdinfo, qemu-img, qemu-io and fio, with a real disk image."""

import hashlib
import json
import os

import pytest

from support.process import check, run
from support.server import KI, MI

IMAGE_BYTES = 64 * MI


@pytest.fixture(scope="session")
def disk_image(tmp_path_factory):
    """A 64 MiB raw image holding an ext4 file system with files in it, half of it holes."""
    directory = tmp_path_factory.mktemp("image")
    content = directory / "content"
    content.mkdir()
    for number in range(200):
        (content / f"small-{number}").write_bytes(os.urandom(number * 37))
    (content / "large").write_bytes(os.urandom(20 * MI))
    (content / "text").write_text("the same line again\n" * 100_000)
    image = directory / "disk.raw"
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    check("mkfs.ext4", "-q", "-d", content, image)
    return image


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@pytest.mark.old_nbdkit_too
def test_nbdcopy_in_and_out(server, disk_image, tmp_path):
    check("nbdcopy", "--flush", disk_image, server.uri)
    server.kill()
    server.start()
    copy = tmp_path / "copy.raw"
    check("nbdcopy", server.uri, copy)
    assert sha256(copy) == sha256(disk_image)
    check("e2fsck", "-fn", copy)


def test_nbdcopy_between_volumes(make_volume, make_server, disk_image, tmp_path):
    source, target = make_server(make_volume()).start(), make_server(make_volume(block_bytes=4 * KI)).start()
    check("nbdcopy", disk_image, source.uri)
    check("nbdcopy", "--flush", source.uri, target.uri)
    copy = tmp_path / "copy.raw"
    check("nbdcopy", target.uri, copy)
    assert sha256(copy) == sha256(disk_image)


def test_nbdinfo(server, disk_image):
    check("nbdcopy", "--flush", disk_image, server.uri)
    (export,) = json.loads(check("nbdinfo", "--json", server.uri))["exports"]
    assert export["export-size"] == IMAGE_BYTES
    assert not export["is_read_only"] and export["can_multi_conn"] and export["can_fua"]
    extents = json.loads(check("nbdinfo", "--map", "--json", server.uri))
    assert sum(extent["length"] for extent in extents) == IMAGE_BYTES
    kinds = {extent["type"] for extent in extents}
    assert 0 in kinds and 3 in kinds, "an image with holes shows data and holes"


def test_qemu_img(server, disk_image, tmp_path):
    qcow = tmp_path / "disk.qcow2"
    check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk_image, qcow)
    check("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, server.uri)
    facts = json.loads(check("qemu-img", "info", "--output=json", server.uri))
    assert facts["virtual-size"] == IMAGE_BYTES
    check("qemu-img", "compare", "-f", "raw", "-F", "raw", disk_image, server.uri)
    server.kill()  # qemu-img ends with a flush
    server.start()
    check("qemu-img", "compare", "-f", "raw", "-F", "qcow2", server.uri, qcow)
    back = tmp_path / "back.raw"
    check("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, back)
    assert sha256(back) == sha256(disk_image)
    regions = json.loads(check("qemu-img", "map", "--output=json", "-f", "raw", server.uri))
    assert any(region["zero"] for region in regions) and any(region["data"] for region in regions)


def test_qemu_io(server):
    commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 -f 513 100001",
        "aio_write -P 0x33 4M 1M",
        "aio_write -P 0x44 8M 2M",
        "aio_flush",
        "write -z 256k 128k",
        "write -z -u 512k 128k",
        "discard 4M 512k",
        "flush",
        "read -P 0x22 513 100001",
        "read -P 0 256k 128k",
        "read -P 0 512k 128k",
        "read -P 0 4M 512k",
        "read -P 0x33 4608k 512k",
        "read -P 0x44 8M 2M",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    # -f raw alone: a mismatch is reported on stdout, and only newer versions exit with 1 as well.
    output = check("qemu-io", "-f", "raw", *arguments, server.uri)
    assert "failed" not in output.lower(), output


def fio(uri: str, *options: str):
    return run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--rw=randwrite",
        "--iodepth=16",
        "--size=48m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--output-format=json",
        *options,
    )


@pytest.mark.parametrize(("block_sizes", "total"), [("4k-128k", "12m"), ("512-512", "1m")])
def test_fio_verifies_before_and_after_a_kill(server, tmp_path, block_sizes, total):
    """fio checks every block it wrote, then once more after the server was killed and started again."""
    bounds = [f"--bsrange={block_sizes}", f"--io_size={total}", f"--aux-path={tmp_path}", "--verify_state_save=0"]
    written = fio(server.uri, *bounds, "--do_verify=1", "--end_fsync=1")
    assert written.returncode == 0, written.stdout + written.stderr
    with server.connect() as client:
        client.flush()
    server.kill()
    server.start()
    verified = fio(server.uri, *bounds, "--verify_only=1")
    assert verified.returncode == 0, verified.stdout + verified.stderr
