#!/usr/bin/env python3
"""Fills the table of docs/s3-compatibility.md: runs `hypernbd probe` against every store that can be started here.

    tests/compat/run.py [--check]

Servers are found in the variable of their program's name (MINIO, as for the end-to-end tests), or in PATH; those that are not
there keep the column that they have in the document. With --check nothing is written, and the status says whether a store of
this run fails.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "tests" / "e2e"))
from support.s3_servers import SERVERS, S3Server, Start  # noqa: E402, found by the path above

CLI = Path(os.environ.get("HYPERNBD_CLI", PROJECT / "target" / "release" / "hypernbd"))
DOCUMENT = PROJECT / "docs" / "s3-compatibility.md"
MARKS = ("<!-- table: made by tests/compat/run.py -->", "<!-- end of table -->")
BUCKET = "compat"
START_LIMIT_S = 60
KEY, SECRET = "compat-user", "compat-secret-0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def version_of(program: str, arguments: tuple[str, ...] | None) -> str:
    """A release's name, as the program prints it; what was built from source prints none, and is asked for as what it is: a Python
    distribution beside it, or a Go module; or it is named by its directory, `NAME-VERSION`."""
    found = None
    if arguments:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
        found = re.search(r"RELEASE\.\S+|\d+\.\d[\w.-]*", done.stdout.split("\n", 1)[0])
    if found:
        return found.group()
    name = Path(program).resolve().parent.name.partition("-")[2]
    return name or _version_built(program) or "of unknown version"


def _version_built(program: str) -> str | None:
    distribution = Path(program).name.partition("_")[0]
    ask = f"import importlib.metadata; print(importlib.metadata.version({distribution!r}))"
    python = Path(program).parent / "python"
    command = [str(python), "-c", ask] if python.exists() else ["go", "version", "-m", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    found = re.search(r"^\s*mod\s+\S+\s+v(\S+)|^(\d\S*)$", done.stdout, re.MULTILINE)
    return found and (found[1] or found[2])


def probe(url: str, options: list[str], env: dict[str, str]) -> dict[str, str]:
    """What the probe says: check to "yes" or to what is broken. Nothing, with a line of why, where it does not come to its end."""
    command = [str(CLI), "probe", url, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
    if not done.stdout:
        print(f"{' '.join(command)}: {done.stderr}")
        return {}
    # The address is another one each time.
    said = re.sub(r"http://127\.0\.0\.1:\d+", "it", done.stdout)
    return {check["name"]: check["failure"] or "yes" for check in json.loads(said)}


def client_of(port: int):
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
    )


def probe_server(kind: S3Server, program: str, directory: Path) -> dict[str, str]:
    """Starts a server on an empty directory, makes a bucket and probes it."""
    port = free_port()
    command, env = kind.command(Start(program, port, KEY, SECRET, directory, free_port))
    with open(directory.parent / "log", "ab") as log:
        server = subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_LIMIT_S
        while True:
            try:
                client_of(port).create_bucket(Bucket=BUCKET)
                break
            except (BotoCoreError, ClientError):
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{program} does not serve:\n{(directory.parent / 'log').read_text()[-2000:]}")
                time.sleep(0.1)
        options = ["--endpoint-url", f"http://127.0.0.1:{port}", "--region", "us-east-1"]
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        return probe(f"s3://{BUCKET}/probed/", options, keys)
    finally:
        server.kill()
        server.wait()


def columns_in(text: str) -> dict[str, dict[str, str]]:
    """The table as it stands: store to its checks."""
    table = text.split(MARKS[0])[1].split(MARKS[1])[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    if len(rows) < 2:
        return {}
    head, _, *checks = rows
    return {store: {row[0]: row[at] for row in checks} for at, store in enumerate(head) if at > 0}


def table_of(columns: dict[str, dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for checks in columns.values() for name in checks))
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(checks.get(name, "not tried") for checks in columns.values())] for name in names]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    text = DOCUMENT.read_text()
    columns = columns_in(text)
    probed = {}
    with tempfile.TemporaryDirectory() as root:
        probed["file://"] = probe(f"file://{root}/local/", [], {})
        for kind in SERVERS:
            path = os.environ.get(kind.program.upper()) or shutil.which(kind.program)
            if not path:
                print(f"{kind.name}: not here")
                continue
            directory = Path(root) / kind.program / "data"
            directory.mkdir(parents=True)
            columns = {store: checks for store, checks in columns.items() if not store.startswith(kind.name)}
            probed[f"{kind.name} {version_of(path, kind.version)}"] = probe_server(kind, path, directory)
    # One that the probe could not judge has no column.
    columns |= {store: checks for store, checks in probed.items() if checks}
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    if not arguments.check:
        DOCUMENT.write_text(f"{before}{MARKS[0]}\n{table_of(columns)}\n{MARKS[1]}{after}")
    print(table_of(probed))
    return int(any(not checks or set(checks.values()) != {"yes"} for checks in probed.values()))


if __name__ == "__main__":
    sys.exit(main())
