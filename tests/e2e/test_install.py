"""What `make install` puts where, that it is found there, and that `make uninstall` leaves nothing of it."""

import os
import shutil
from pathlib import Path

import pytest

from support.model import pattern
from support.process import check, run, spawn, wait_for
from support.server import CLI, MI, PLUGIN, PROJECT, Server

PLUGIN_DIR = "/opt/nbdkit/plugins"
SHARE = "/opt/hypernbd/share"
HERE = {"HYPERNBD_CLI": str(CLI), "HYPERNBD_PLUGIN": str(PLUGIN)}


def files_below(directory: Path) -> set[str]:
    return {"/" + str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


class Installed:
    """An installation in a directory of its own."""

    def __init__(self, root: Path, nbdkit: str):
        self.root = root
        self.env = HERE | {
            "NBDKIT": nbdkit,
            "DESTDIR": str(root),
            "PREFIX": "/opt/hypernbd",
            "NBDKIT_PLUGIN_DIR": PLUGIN_DIR,
        }
        self.make("install")

    def make(self, target: str, **options):
        return check("make", "--no-print-directory", "-C", PROJECT, target, env=self.env, **options)

    @property
    def cli(self) -> Path:
        return self.root / "opt/hypernbd/bin/hypernbd"

    @property
    def plugin(self) -> Path:
        return self.root / PLUGIN_DIR[1:] / "nbdkit-hypernbd-plugin.so"


@pytest.fixture
def installed(tmp_path, nbdkit) -> Installed:
    return Installed(tmp_path / "root", nbdkit)


@pytest.fixture
def nbdkit_there(installed, nbdkit, tmp_path) -> Path:
    """An nbdkit whose directory of plugins is that of the installation."""
    program = tmp_path / "nbdkit"
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --dump-config ]; then echo plugindir={installed.plugin.parent}; exit; fi\n'
        f'exec "{nbdkit}" "$@"\n'
    )
    program.chmod(0o755)
    return program


def test_everything_is_there(installed):
    found = files_below(installed.root)
    verbs = check(CLI, "completions", "fish")
    for verb in ("create", "serve", "snapshot-list", "file-create-opt", "control-flush"):
        assert verb.split("-")[0] in verbs
        assert f"{SHARE}/man/man1/hypernbd-{verb}.1" in found
    for path in (
        "/opt/hypernbd/bin/hypernbd",
        f"{PLUGIN_DIR}/nbdkit-hypernbd-plugin.so",
        f"{SHARE}/man/man1/hypernbd.1",
        f"{SHARE}/man/man1/nbdkit-hypernbd-plugin.1",
        f"{SHARE}/bash-completion/completions/hypernbd",
        f"{SHARE}/zsh/site-functions/_hypernbd",
        f"{SHARE}/fish/vendor_completions.d/hypernbd.fish",
        "/opt/hypernbd/lib/systemd/system/hypernbd@.service",
        "/opt/hypernbd/lib/systemd/system/hypernbd@.socket",
        "/opt/hypernbd/lib/systemd/system/hypernbd-attach@.service",
        "/opt/hypernbd/lib/udev/rules.d/60-hypernbd.rules",
        f"{SHARE}/doc/hypernbd/copyright",
        f"{SHARE}/doc/hypernbd/GPL-3",
    ):
        assert path in found, path
    assert "GPL-3.0-or-later" in (installed.root / SHARE[1:] / "doc/hypernbd/copyright").read_text()
    check("bash", "-n", installed.root / SHARE[1:] / "bash-completion/completions/hypernbd")


@pytest.mark.skipif(not shutil.which("man"), reason="there is no man")
def test_the_pages_are_well_formed(installed):
    pages = sorted((installed.root / SHARE[1:] / "man/man1").iterdir())
    assert len(pages) > 30
    for page in pages:
        done = run("man", "--warnings=w", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page, env={"MANROFFSEQ": ""})
        assert done.returncode == 0 and not done.stderr, f"{page}: {done.stderr}"


def test_the_plugin_is_one(installed, nbdkit):
    assert "name=hypernbd\n" in check(nbdkit, "--dump-plugin", installed.plugin)


@pytest.mark.file_only
def test_serve_finds_the_plugin_where_nbdkit_looks(installed, nbdkit_there, make_volume, make_server):
    server: Server = make_server(make_volume())
    # None beside the command line, and none named: a variable that is set to nothing names nothing.
    program = ["env", "--unset=HYPERNBD_PLUGIN", str(installed.cli)]
    server.command = lambda: [*program, "serve", server.volume.url, "--socket", str(server.socket)]
    server.env["NBDKIT"] = str(nbdkit_there)
    with server.start().connect() as client:
        client.pwrite(pattern(1 * MI, 3), 0)
        client.flush()
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 3)
    assert server.terminate() == 0, server.log_text()


@pytest.mark.file_only
def test_serve_says_where_it_looked(installed, nbdkit_there, make_volume):
    installed.plugin.unlink()
    volume = make_volume()
    done = run("env", "--unset=HYPERNBD_PLUGIN", installed.cli, "serve", volume.url, env={"NBDKIT": str(nbdkit_there)})
    assert done.returncode == 1
    for word in (str(installed.plugin), str(installed.cli.parent), "make install", "HYPERNBD_PLUGIN"):
        assert word in done.stderr, done.stderr


def test_uninstall_takes_what_was_installed_and_nothing_else(installed):
    theirs = installed.plugin.with_name("nbdkit-theirs-plugin.so")
    theirs.write_text("not ours")
    installed.make("uninstall")
    assert files_below(installed.root) == {f"{PLUGIN_DIR}/nbdkit-theirs-plugin.so"}
    done = run("make", "-C", PROJECT, "uninstall", env=installed.env)
    assert done.returncode != 0 and "PREFIX" in done.stderr


def test_a_later_installation_takes_what_is_no_longer_of_it(installed):
    """A file of an earlier release goes, and a server that runs keeps the file that it runs on."""
    manifest = installed.root / SHARE[1:] / "hypernbd/installed"
    old = installed.root / SHARE[1:] / "man/man1/hypernbd-outdated.1"
    old.write_text("of an earlier release")
    lines = sorted([*manifest.read_text().splitlines(), f"{SHARE}/man/man1/hypernbd-outdated.1"])
    manifest.write_text("\n".join(lines) + "\n")
    with open(installed.plugin, "rb") as running:
        before = os.fstat(running.fileno()).st_ino
        installed.make("install")
        assert os.fstat(running.fileno()).st_size > 0
    assert not old.exists()
    assert installed.plugin.stat().st_ino != before


@pytest.mark.parametrize("missing", ["HYPERNBD_CLI", "HYPERNBD_PLUGIN"])
def test_nothing_is_installed_of_half_a_build(tmp_path, nbdkit, missing):
    env = HERE | {"NBDKIT": nbdkit, "DESTDIR": str(tmp_path / "root"), missing: str(tmp_path / "absent")}
    done = run("make", "-C", PROJECT, "install", env=env)
    assert done.returncode != 0 and "make build" in done.stderr
    assert not (tmp_path / "root").exists()


class Serving:
    """`make serve` of a build that the test made up, on a machine where nothing can be compiled."""

    def __init__(self, directory: Path, volume, socket: Path, nbdkit: str):
        self.volume, self.socket, self.nbdkit = volume, socket, nbdkit
        self.log, self.target, self.programs = directory / "log", directory / "target", directory / "bin"
        self.built = self.target / "release"
        self.built.mkdir(parents=True)
        self.programs.mkdir()
        shutil.copy(PLUGIN, self.built / "libhypernbd.so")
        shutil.copy(CLI, self.built / "hypernbd")
        self.note = self.built / "hypernbd.sources"
        self.note.write_text(check(PROJECT / "scripts/sources.sh"))
        make = self.programs / "make"
        make.write_text("#!/bin/sh\necho compiled: $@\nexit 1\n")
        make.chmod(0o755)

    def start(self):
        env = {
            "CARGO_TARGET_DIR": str(self.target),
            "NBDKIT": self.nbdkit,
            "PATH": f"{self.programs}:{os.environ['PATH']}",
        }
        command = ["env", "--unset=HYPERNBD_PLUGIN", str(PROJECT / "scripts/serve.sh")]
        return spawn([*command, self.volume.url, "--socket", str(self.socket)], self.log, env=env, limit_s=120)


@pytest.fixture
def serving(tmp_path, make_volume, make_server, nbdkit) -> Serving:
    volume = make_volume()
    return Serving(tmp_path, volume, make_server(volume).directory / "socket", nbdkit)


@pytest.mark.file_only
def test_make_serve_does_not_build_what_is_built(serving):
    process = serving.start()
    wait_for(lambda: "Serving" in serving.log.read_text() or process.poll() is not None, "the announcement")
    assert process.poll() is None, serving.log.read_text()
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert "compiled" not in serving.log.read_text()


@pytest.mark.file_only
@pytest.mark.parametrize("why", ["of other sources", "younger than the note", "half of it missing"])
def test_make_serve_builds_what_is_not_of_this_tree(serving, why):
    match why:
        case "of other sources":
            serving.note.write_text("0" * 64 + "\n")
        case "younger than the note":
            os.utime(serving.note, (1, 1))
        case _:
            (serving.built / "libhypernbd.so").unlink()
    assert serving.start().wait(timeout=60) != 0
    assert "compiled" in serving.log.read_text() and "build" in serving.log.read_text()
