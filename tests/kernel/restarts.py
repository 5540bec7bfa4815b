#!/usr/bin/python3
"""`hypernbd attach` under a real kernel: busy file systems, while their server is killed and started again.

Boots a virtual machine with Debian's kernel (guest/init is what runs in it), which attaches a server on this host; the server
is killed, or told to stop, whenever the machine asks for it. Passes if no request failed, every file is right and every file
system is whole. Prints the closing line of a test runner.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", PROJECT / "target"))
SIZE = 1 << 30


class Server:
    """An nbdkit that may be killed and started again on the same port."""

    def __init__(self, command: list[str], port: int, log: Path):
        self.command = [command[0], "--foreground", "--ipaddr=127.0.0.1", f"--port={port}", *command[1:]]
        self.log, self.process = log, None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self, how: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def initrd(machine: Path, cli: Path, work: Path) -> Path:
    """The root directory with the command line to be tried, as the kernel wants it."""
    root, image = work / "root", work / "initrd"
    subprocess.run(["cp", "-a", machine / "root", root], check=True)
    subprocess.run([HERE / "guest" / "put.sh", root, cli, "hypernbd"], check=True)
    (root / "init").write_bytes((HERE / "guest" / "init").read_bytes())
    (root / "init").chmod(0o755)
    rules = root / "lib" / "udev" / "rules.d"
    rules.mkdir(parents=True, exist_ok=True)
    (rules / "60-hypernbd.rules").write_bytes((PROJECT / "contrib" / "udev" / "60-hypernbd.rules").read_bytes())
    with open(image, "wb") as out:
        pack = "find . | cpio --create --format=newc --quiet | gzip -1"
        subprocess.run(["bash", "-c", pack], cwd=root, stdout=out, check=True)
    return image


def served(plugin: Path | None, cli: Path, work: Path) -> list[str]:
    """What nbdkit is to serve: the plugin with a volume, or a file by nbdkit's own plugin."""
    if not plugin:
        image = work / "image"
        image.touch()
        os.truncate(image, SIZE)
        return ["file", str(image)]
    url = f"file://{work}/volume/"
    subprocess.run([cli, "create", url, f"--size={SIZE}"], check=True)
    return [str(plugin), f"backend_url={url}"]


def grow(plugin: Path | None, cli: Path, work: Path) -> None:
    """Makes that twice as large."""
    if plugin:
        subprocess.run([cli, "resize", f"file://{work}/volume/", f"--size={2 * SIZE}"], check=True)
    else:
        os.truncate(work / "image", 2 * SIZE)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--rounds", type=int, default=6, help="kills of the server a file system; every third is SIGTERM")
    arguments.add_argument("--fs", default="ext4,xfs")
    arguments.add_argument("--file", action="store_true", help="serve a file by nbdkit's own plugin, not a volume")
    arguments.add_argument("-o", dest="parameters", action="append", default=[], help="a parameter of the plugin")
    arguments.add_argument("--options", default="", help="options of attach, with commas between them")
    arguments.add_argument("--memory", default="2G", help="what the machine has")
    arguments.add_argument("--big", type=int, default=0, help="MiB to be written at once at the end, with a kill under it")
    arguments.add_argument("--away", type=float, help="seconds between two servers, up to one if it is not given")
    arguments.add_argument("--limit", type=int, default=900, help="seconds after which the machine is given up")
    given = arguments.parse_args()

    full = Path(os.environ.get("HYPERNBD_CLI", TARGET / "release" / "hypernbd"))
    cli = Path(os.environ.get("HYPERNBD_ATTACH", full))
    plugin = None if given.file else Path(os.environ.get("HYPERNBD_PLUGIN", TARGET / "release" / "libhypernbd.so"))
    for needed in filter(None, (cli, plugin)):
        assert needed.exists(), f"{needed} is missing: run 'make build' first"
    nbdkit = os.environ.get("NBDKIT", "nbdkit")
    machine = Path(subprocess.run([HERE / "guest" / "build.sh"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip())

    with tempfile.TemporaryDirectory(prefix="hypernbd-kernel-") as directory:
        work = Path(directory)
        port = free_port()
        server = Server([nbdkit, *served(plugin, full, work), *given.parameters], port, work / "server.log")
        words = f"console=ttyS0 quiet panic=-1 FS={given.fs} ROUNDS={given.rounds} PORT={port} OPTIONS={given.options} BIG={given.big}"
        # Emulated unless told otherwise: a /dev/kvm inside of a virtual machine need not be a whole one.
        accelerator = os.environ.get("HYPERNBD_ACCEL", "tcg,thread=multi")
        command = ["timeout", str(given.limit), "qemu-system-x86_64", "-M", "q35", "-accel", accelerator, "-cpu", "max"]
        command += ["-smp", "2", "-m", given.memory, "-nographic", "-no-reboot", "-kernel", str(machine / "vmlinuz")]
        command += ["-initrd", str(initrd(machine, cli, work)), "-append", words]
        command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        server.start()
        guest = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        result, ends, began = "the machine said nothing", 0, time.monotonic()
        try:
            for line in guest.stdout:
                line = line.strip()
                if line in ("ASK pause", "ASK resume"):
                    server.process.send_signal(signal.SIGSTOP if line == "ASK pause" else signal.SIGCONT)
                elif line == "ASK grow":
                    grow(plugin, full, work)
                elif line.startswith("ASK "):
                    server.end(signal.SIGTERM if line == "ASK term" else signal.SIGKILL)
                    time.sleep(random.choice([0, 0.2, 1]) if given.away is None else given.away)
                    server.start()
                    ends += 1
                elif line.startswith("RESULT "):
                    result = line.removeprefix("RESULT ")
                print(f"{time.monotonic() - began:6.1f} {line}", flush=True)
        finally:
            guest.kill()
            guest.wait()
            server.end(signal.SIGKILL)
        is_passed = result == "ok"
        if not is_passed:
            print(server.log.read_text(errors="replace")[-4000:])
        print(f"the server was ended {ends} times in {time.monotonic() - began:.0f} s: {result}")
        print(f"{int(is_passed)} passed, {int(not is_passed)} failed")
        return 0 if is_passed else 1


if __name__ == "__main__":
    sys.exit(main())
