"""A database on ext4 on the volume: committed transactions a second with a journal, with an S3 log, and without a log.

nbdfuse and a loop device make a disk of the served volume (as in `filesystem`). The load is PostgreSQL's pgbench with
four clients where PostgreSQL is installed, else SQLite in its WAL mode with `synchronous=FULL` and one client.
"""

import shutil
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path

from harness import blockdev
from harness.loads import MIB, Sample, command
from harness.report import Row

SIZE_BYTES = 1024 * MIB
CLIENTS = 4
SCALE = 2  # 30 MB of tables
ROWS = 10_000


def run(bench):
    blockdev.check_available()
    bench.directory.chmod(0o711)  # PostgreSQL runs as a user of its own
    load = pgbench if postgresql() else sqlite
    seconds = bench.seconds(15)

    def measured(server):
        with blockdev.Disk(server.uri, bench.scratch()) as disk:
            command(["mkfs.ext4", "-q", disk.device])
            with disk.mounted() as root:
                return load(root, seconds)

    def ceiling():
        with bench.memory(SIZE_BYTES) as server:
            return measured(server)

    memory = bench.once("database in memory", ceiling)
    rows = []
    configurations = {kind: {"backend_wal_url": url} for kind, url in bench.wal_urls().items()} | {"no log": {}}
    for kind, parameters in configurations.items():
        with bench.volume(SIZE_BYTES) as volume, volume.serve(**parameters) as server:
            before = bench.traffic()
            result = measured(server)
            cost = bench.cost_since(before, server, 0)
        rows.append(Row(f"{load.__name__} on ext4", result, memory, cost=cost, variant=kind))
    return rows


def postgresql() -> Path | None:
    """PostgreSQL's programs, where Debian puts them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))
    return found[-1].parent if found else None


def pgbench(root: Path, seconds: float) -> Sample:
    """PostgreSQL's own TPC-B-like load; the server refuses to run as root, so all of it runs as its own user."""
    data = root / "pg"
    data.mkdir()
    shutil.chown(data, "postgres")
    with postgres(postgresql(), data) as client:
        client("pgbench", "--initialize", "--quiet", f"--scale={SCALE}")
        said = client("pgbench", f"--client={CLIENTS}", f"--time={max(1, round(seconds))}", "--no-vacuum")
    figures = dict(line.split(" = ", 1) for line in said.splitlines() if " = " in line)
    return Sample(float(figures["tps"].split()[0]), "tps")


@contextmanager
def postgres(programs: Path, data: Path):
    """A server on a socket in its own directory; gives a function that runs a client program."""

    def as_user(program, *words):
        return command(["runuser", "-u", "postgres", "--", programs / program, *words], cwd="/")

    as_user("initdb", "--auth=trust", "--no-sync", "-D", data)
    options = f"-c listen_addresses= -c unix_socket_directories={data}"
    as_user("pg_ctl", "start", "--wait", "--silent", "-D", data, "-l", data / "log", "-o", options)
    try:
        yield lambda program, *words: as_user(program, f"--host={data}", *words, "postgres")
    finally:
        as_user("pg_ctl", "stop", "--wait", "--silent", "--mode=fast", "-D", data)


def sqlite(root: Path, seconds: float) -> Sample:
    """Updates of one row each, each its own transaction."""
    database = sqlite3.connect(root / "database", isolation_level=None)
    database.executescript("pragma journal_mode=wal; pragma synchronous=full; create table t (id integer primary key, n)")
    with database:
        database.execute("begin")
        database.executemany("insert into t values (?, 0)", ((number,) for number in range(ROWS)))
    committed, start = 0, time.monotonic()
    while time.monotonic() < start + seconds:
        database.execute("update t set n = n + 1 where id = ?", (committed * 7919 % ROWS,))
        committed += 1
    taken_s = time.monotonic() - start
    database.close()
    return Sample(committed / taken_s, "tps")
