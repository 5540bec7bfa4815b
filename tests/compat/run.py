#!/usr/bin/env python3
"""Fills the table of docs/s3-compatibility.md: runs `hypernbd probe` against every store that can be started here.

    tests/compat/run.py [--check]

Servers are found as the end-to-end tests find them (MINIO), or in PATH; those that are not there keep the column that
they have in the document. With --check nothing is written, and the status says whether a store of this run fails.
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


def minio(program: str, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    command = [program, "server", "--quiet", "--address", f"127.0.0.1:{port}", str(directory)]
    return command, {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_BROWSER": "off"}


def rustfs(program: str, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    command = [program, "--address", f"127.0.0.1:{port}", "--access-key", KEY, "--secret-key", SECRET, str(directory)]
    return command, {}


def s3s_fs(program: str, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    command = [program, "--host", "127.0.0.1", "--port", str(port), "--access-key", KEY, "--secret-key", SECRET]
    return [*command, str(directory)], {}


def seaweedfs(program: str, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    ports = ["-master.port", str(free_port()), "-volume.port", str(free_port()), "-filer.port", str(free_port())]
    command = [program, "server", "-ip", "127.0.0.1", "-dir", str(directory), *ports, "-s3", "-s3.port", str(port)]
    return [*command, "-s3.config", str(config)], {}


def versitygw(program: str, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    command = [program, "--port", f"127.0.0.1:{port}", "--access", KEY, "--secret", SECRET, "posix", str(directory)]
    return command, {}


def moto(program: str, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    return [program, "-H", "127.0.0.1", "-p", str(port)], {}


def gofakes3(program: str, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    return [program, "-backend", "memory", "-host", f"127.0.0.1:{port}"], {}


# Name, program, where else to look for it, how it is started, how it tells its version.
SERVERS = [
    ("MinIO", "minio", os.environ.get("MINIO"), minio, ["--version"]),
    ("RustFS", "rustfs", None, rustfs, ["--version"]),
    ("s3s-fs", "s3s-fs", None, s3s_fs, ["--version"]),
    ("SeaweedFS", "weed", None, seaweedfs, ["version"]),
    ("Versity Gateway", "versitygw", None, versitygw, ["--version"]),
    ("Moto", "moto_server", None, moto, None),
    ("GoFakeS3", "gofakes3", None, gofakes3, None),
]


def version_of(program: str, arguments: list[str] | None) -> str:
    """A release's name, as the program prints it; one built from source is named by its directory, `NAME-VERSION`. A program
    that has no way to say it is asked for as what it is: a Python distribution beside it, or a Go module."""
    if arguments is None:
        distribution = Path(program).name.partition("_")[0]
        ask = f"import importlib.metadata; print(importlib.metadata.version({distribution!r}))"
        python = Path(program).parent / "python"
        command = [str(python), "-c", ask] if python.exists() else ["go", "version", "-m", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        found = re.search(r"^\s*mod\s+\S+\s+v(\S+)|^(\d\S*)$", done.stdout, re.MULTILINE)
        return (found[1] or found[2]) if found else "of unknown version"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    first_line = done.stdout.split("\n", 1)[0]
    found = re.search(r"RELEASE\.\S+|\d+\.\d[\w.-]*", first_line)
    if found:
        return found.group()
    return Path(program).resolve().parent.name.partition("-")[2] or "of unknown version"


def probe(url: str, options: list[str], env: dict[str, str]) -> dict[str, str]:
    """What the probe says: check to "yes" or to what is broken."""
    command = [str(CLI), "probe", url, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
    if not done.stdout:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
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


def probe_server(program: str, start, directory: Path) -> dict[str, str]:
    """Starts a server on an empty directory, makes a bucket and probes it."""
    port = free_port()
    command, env = start(program, directory, port)
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
        for name, program, given, start, version in SERVERS:
            path = given or shutil.which(program)
            if not path:
                print(f"{name}: not here")
                continue
            directory = Path(root) / program / "data"
            directory.mkdir(parents=True)
            columns = {store: checks for store, checks in columns.items() if not store.startswith(name)}
            probed[f"{name} {version_of(path, version)}"] = probe_server(path, start, directory)
    columns |= probed
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    if not arguments.check:
        DOCUMENT.write_text(f"{before}{MARKS[0]}\n{table_of(columns)}\n{MARKS[1]}{after}")
    print(table_of(probed))
    return int(any(result != "yes" for checks in probed.values() for result in checks.values()))


if __name__ == "__main__":
    sys.exit(main())
