"""A served volume as a block device of this machine: nbdfuse makes it a file, a loop device makes that a disk."""

import contextlib
import os
import subprocess
from pathlib import Path

from .process import check, run, spawn, wait_for

LIMIT_S = 900


def why_not() -> str | None:
    """Why this machine cannot do it, or None."""
    if os.geteuid() != 0:
        return "mounting needs root"
    for node in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(node):
            return f"the machine has no {node}"
    return None


class BlockDevice:
    """The device of one server, with at most one file system mounted from it. `close` undoes all of it."""

    def __init__(self, uri: str, directory: Path):
        self.directory = directory
        self.fuse = directory / "fuse"
        self.mountpoint = directory / "mnt"
        self.fuse.mkdir(parents=True)
        self.mountpoint.mkdir()
        self.undo = contextlib.ExitStack()
        self.log = directory / "nbdfuse.log"
        file = self.fuse / "disk"
        try:
            process = spawn(["nbdfuse", str(file), uri], self.log, env={}, limit_s=LIMIT_S)
            self.undo.callback(self._end_fuse, process)
            wait_for(lambda: self._is_there(file, process), "nbdfuse to show its file")
            self.path = check("losetup", "--show", "--find", "--direct-io=on", file).strip()
            self.undo.callback(check, "losetup", "--detach", self.path)
        except BaseException:
            self.undo.close()
            raise

    def _is_there(self, file: Path, process: subprocess.Popen) -> bool:
        assert process.poll() is None, self.log.read_text()
        return file.exists()

    def _end_fuse(self, process: subprocess.Popen) -> None:
        def unmounted() -> bool:
            if not os.path.ismount(self.fuse):
                return True
            run("fusermount3", "-u", self.fuse)
            return not os.path.ismount(self.fuse)

        try:
            wait_for(unmounted, "nbdfuse to let go", limit_s=120)
        finally:
            run("umount", "--lazy", self.fuse)
            try:
                process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def mount(self, *options: str) -> Path:
        """Mounts the file system on the device; returns where."""
        check("mount", *options, self.path, self.mountpoint)
        self.undo.callback(self._unmount)
        return self.mountpoint

    def _unmount(self) -> None:
        if os.path.ismount(self.mountpoint):
            check("umount", self.mountpoint)

    def unmount(self) -> None:
        """Unmounts, which writes everything out and flushes."""
        check("umount", self.mountpoint)

    def close(self) -> None:
        """Unmounts, detaches and ends nbdfuse."""
        self.undo.close()
