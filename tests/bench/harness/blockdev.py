"""A served volume as a disk of this machine: nbdfuse makes it a file, a loop device makes that a disk."""

import contextlib
import os
import subprocess
from pathlib import Path

from . import programs
from .loads import command
from .processes import Process


def check_available() -> None:
    """Fails when this machine cannot do it."""
    if os.geteuid() != 0:
        raise programs.Unavailable("mounting a file system needs root")
    for node in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(node):
            raise programs.Unavailable(f"mounting a file system needs {node}, which this machine does not have")
    for program in ("nbdfuse", "losetup", "mkfs.ext4"):
        programs.system(program)


class Disk:
    """The disk of one server, with at most one file system mounted from it. Leaving it undoes all of it."""

    def __init__(self, uri: str, directory: Path):
        self._uri = uri
        self._fuse = directory / "fuse"
        self._log = directory / "nbdfuse.log"
        self.mountpoint = directory / "mnt"
        self._undo = contextlib.ExitStack()
        self.device = ""

    def __enter__(self):
        self._fuse.mkdir()
        self.mountpoint.mkdir()
        file = self._fuse / "disk"
        with contextlib.ExitStack() as undo:
            undo.callback(self.mountpoint.rmdir)
            undo.callback(self._fuse.rmdir)
            process = Process("nbdfuse", [programs.system("nbdfuse"), file, self._uri], self._log)
            undo.callback(self._end_fuse, process)
            process.wait_until(file.exists)
            self.device = command(["losetup", "--show", "--find", "--direct-io=on", file]).strip()
            undo.callback(command, ["losetup", "--detach", self.device])
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_):
        self._undo.close()

    @contextlib.contextmanager
    def mounted(self):
        """The file system, mounted; unmounting writes everything out and flushes."""
        command(["mount", self.device, self.mountpoint])
        try:
            yield self.mountpoint
        except BaseException:
            subprocess.run(["umount", "--lazy", self.mountpoint], capture_output=True)
            raise
        command(["umount", self.mountpoint])

    def _end_fuse(self, process: Process) -> None:
        """Unmounts nbdfuse's file, which ends nbdfuse; by force when it does not let go."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not subprocess.run(["fusermount3", "-u", self._fuse], capture_output=True).returncode:
                process.popen.wait(30)
        process.stop()
        if os.path.ismount(self._fuse):
            subprocess.run(["umount", "--lazy", self._fuse], capture_output=True)
