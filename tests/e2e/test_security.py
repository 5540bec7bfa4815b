"""What docs/security.md says: no credential gets out, the least policy is enough, encryption on either side works."""

import base64
import contextlib
import json
import re
import shlex
import uuid
from pathlib import Path

import pytest

from support.model import pattern, read_all
from support.process import check, run, wait_for
from support.s3_servers import ENCRYPTION
from support.server import KI, MI, PLUGIN, PROJECT
from support.stores import BUCKET, FileStore, Minio, S3Store

SECURITY = PROJECT / "docs" / "security.md"


@pytest.mark.s3_only
def test_no_credential_gets_out(make_volume, make_server, minio, nbdkit):
    """Not at the most talkative log level, in errors, in the command line, or in --dump-plugin."""
    volume = make_volume()
    secrets = [minio.secret_key, "wrong-secret-of-a-test"]
    server = make_server(volume, env={"RUST_LOG": "trace"}).start()
    with server.connect() as client:
        client.pwrite(pattern(9 * MI, 1), 0)
        client.flush()
        client.pread(1 * MI, 30 * MI)
    command_line = Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert server.terminate() == 0
    refused = make_server(volume, env={"RUST_LOG": "trace", "AWS_SECRET_ACCESS_KEY": secrets[1]})
    refused.spawn()
    assert refused.wait() != 0
    texts = {
        "log": server.log_text(),
        "command line": command_line,
        "log of a refusal": refused.log_text(),
        "--dump-plugin": check(nbdkit, PLUGIN, "--dump-plugin", env=volume.store.env),
        "--help": check(nbdkit, PLUGIN, "--help", env=volume.store.env),
    }
    for words in (["info", volume.url], ["probe", volume.url], ["delete", volume.url, "--yes"]):
        done = volume.cli(*words, env={"RUST_LOG": "trace"})
        texts[words[0]] = done.stdout + done.stderr
        failed = volume.cli(*words, env={"RUST_LOG": "trace", "AWS_SECRET_ACCESS_KEY": secrets[1]})
        assert failed.returncode != 0
        texts[f"failed {words[0]}"] = failed.stdout + failed.stderr
    assert len(texts["log"]) > 10_000, "the log says nothing, so the test shows nothing"
    for name, text in texts.items():
        for secret in secrets:
            assert secret not in text, f"a secret is in {name}"


def least_policy(volume) -> str:
    """The policy of the documentation, for this volume."""
    (policy,) = re.findall(r"```json\n(.*?)```", SECURITY.read_text(), re.DOTALL)
    prefix = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    return policy.replace("BUCKET", BUCKET).replace("PREFIX", prefix)


@pytest.mark.s3_only
def test_the_least_policy_is_enough_to_serve(make_volume, make_server, minio, tmp_path):
    volume = make_volume()
    env = minio.credentials_with(least_policy(volume))
    server = make_server(volume, env=env)
    for life in range(2):
        with server.start().connect() as client:
            client.pwrite(pattern(20 * MI, life), life * 20 * MI)
            client.flush()
            client.trim(1 * MI, life * 20 * MI)
            for earlier in range(life):
                assert client.pread(1 * MI, earlier * 20 * MI + 5 * MI) == pattern(20 * MI, earlier)[5 * MI : 6 * MI]
            if life == 0:
                server.kill()
    assert server.terminate() == 0
    assert not any(".meta/probe-" in key for key in volume.store.objects()), "the probe can clean up"
    assert "AccessDenied" not in server.log_text()
    resized = volume.cli("resize", volume.url, "--size", "100M", env=env)
    assert resized.returncode == 0, resized.stderr
    (tmp_path / "image").write_bytes(pattern(1 * MI, 5))
    for words in (("import", tmp_path / "image", volume.url, "--overwrite"), ("export", volume.url, tmp_path / "copy")):
        moved = volume.cli(*words, env=env)
        assert moved.returncode == 0, moved.stderr
    # And no more than that.
    other = make_volume()
    assert volume.cli("info", other.url, env=env).returncode != 0
    assert volume.cli("delete", volume.url, "--yes", env=env).returncode != 0
    assert volume.cli("info", volume.url, env=env).returncode == 0, "the volume is still there"


@pytest.mark.s3_only
@pytest.mark.parametrize("removes", [True, False])
def test_a_log_beside_the_volume_with_the_least_policy(make_volume, make_server, minio, removes):
    """Killed, it opens again. Keys that remove nothing but what a probe leaves keep the records, and serve as well."""
    volume = make_volume()
    policy = json.loads(least_policy(volume))
    if not removes:
        for statement in policy["Statement"]:
            if statement["Action"] == "s3:DeleteObject":
                statement["Resource"] = [of for of in statement["Resource"] if "probe-" in of]
    env = minio.credentials_with(json.dumps(policy))
    server = make_server(volume, env=env, backend_wal_url="auto")
    for life in range(3):
        with server.start().connect() as client:
            for earlier in range(life):
                assert client.pread(64 * KI, earlier * MI) == pattern(64 * KI, earlier)
            client.pwrite(pattern(64 * KI, life), life * MI)
            client.flush()
            server.kill()
    with server.start().connect() as client:
        assert client.pread(64 * KI, 2 * MI) == pattern(64 * KI, 2)
    assert server.terminate() == 0, server.log_text()
    assert ("make its next opening slower" in server.log_text()) == (not removes)


@pytest.mark.s3_only
def test_encryption_by_the_store_is_asked_for(make_volume, make_server, minio_program, tmp_path):
    """MinIO encrypts where it has a key, and says of each object that it did."""
    key = base64.b64encode(bytes(range(32))).decode()
    minio = Minio(minio_program, tmp_path / "kms", {"MINIO_KMS_SECRET_KEY": f"test-key:{key}"})
    minio.needs(ENCRYPTION)
    minio.start()
    try:
        volume = make_volume(in_store=S3Store(minio))
        make_server(volume, sse="AES256").start().terminate()
        before = set(volume.store.objects())
        for sse, expected in (("AES256", {"AES256"}), ("aws:kms", {"aws:kms"})):
            server = make_server(volume, sse=sse).start()
            with server.connect() as client:
                client.pwrite(pattern(20 * MI, 3), 0)
                client.flush()
            assert server.terminate() == 0
            written = set(volume.store.objects()) - before
            before |= written
            heads = {minio.client().head_object(Bucket=BUCKET, Key=key).get("ServerSideEncryption") for key in written}
            assert len(written) >= 2 and heads == expected, (sse, written, heads)
        with make_server(volume).start().connect() as client:
            assert client.pread(20 * MI, 0) == pattern(20 * MI, 3)
    finally:
        minio.kill()


@pytest.mark.file_only
def test_luks_by_nbdkits_filter(make_volume, make_server, nbdkit, tmp_path, monkeypatch):
    """The lines of the documentation: formatted by qemu-img, served through the filter; the volume holds no plain text."""
    monkeypatch.chdir(tmp_path)
    volume = make_volume(64 * MI, 4096)
    (tmp_path / "passphrase").write_text("open sesame")
    (block,) = re.findall(r"```\n( *nbdkit .*?)```", SECURITY.read_text(), re.DOTALL)
    meanings = {"9G": "48M", "nbdkit -": f"{nbdkit} -", " hypernbd ": f" {PLUGIN} ", "s3://bucket/disk/": volume.url}
    for word, meant in meanings.items():
        assert word in block
        block = block.replace(word, meant)
    formats, serves = (line.strip() for line in block.replace("\\\n", "").strip().splitlines())
    # It measures its own speed, and gives up at once where a virtual machine's clocks are coarse.
    wait_for(lambda: run("sh", "-c", formats).returncode == 0, "qemu-img to format the volume")
    plain, locked = make_server(volume), make_server(volume)
    program, *words = shlex.split(serves)
    locked.command = lambda: [program, "-f", "--log=stderr", "-U", str(locked.socket), *words]
    locked.start()
    data = pattern(2 * MI, 7)
    with locked.connect() as client:
        assert client.get_size() >= 40 * MI
        client.pwrite(data, 1 * MI)
        client.flush()
    assert locked.terminate() == 0
    with plain.start().connect() as client:
        stored = read_all(client, 64 * MI)
    assert stored.startswith(b"LUKS") and data[:4096] not in stored
    assert plain.terminate() == 0
    with locked.start().connect() as client:
        assert client.pread(2 * MI, 1 * MI) == data


@pytest.mark.file_only
def test_what_is_kept_on_this_machine_is_private(make_volume, make_server, tmp_path):
    """A local volume, the caches and a journal, all made by the server, below a directory that is open to all."""
    local = tmp_path / "local"
    local.mkdir(mode=0o755)
    parameters = {
        "backend_wal_url": f"file://{local}/journal/",
        "cache_dir": str(local / "data"),
        "cache_disk": "64M",
        "node_cache_config": f"LocalDisk,{local}/nodes,32M,ReuseCache",
    }
    volume = make_volume(in_store=FileStore(local))
    server = make_server(volume, **parameters).start()
    with server.connect() as client:
        client.pwrite(pattern(8 * MI, 1), 0)
        client.flush()
        client.pwrite(pattern(8 * KI, 1), 0)
        client.flush()
        for kind in ("journal", "data", "nodes", "volume-1"):
            files = [path for path in (local / kind).rglob("*") if path.is_file()]
            assert files, f"there is nothing in {kind}, so the test shows nothing"
            for file in files:
                ways = [file, *(parent for parent in file.parents if local in parent.parents)]
                with contextlib.suppress(FileNotFoundError):  # the server lives, and removes what it needs no more
                    assert any(way.stat().st_mode & 0o077 == 0 for way in ways), f"{file} can be read by others"
    assert server.terminate() == 0


def put_beside(volume, name: str, body: bytes) -> None:
    """Replaces an object that lies beside the volume's container, as anybody can who may write to the store."""
    if isinstance(volume.store, S3Store):
        key = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/") + f".meta/{name}"
        volume.store.minio.client().put_object(Bucket=BUCKET, Key=key, Body=body)
        return
    header = json.dumps({"etag": "0" * 32, "modified_ms": 0, "data_len_bytes": len(body)}).encode()
    file = Path(volume.url.removeprefix("file://")) / "objects" / f"volume.meta%2F{name}"
    assert file.exists()
    file.write_bytes(body + header + len(header).to_bytes(4, "little") + b"HNBDOBJ1")


@pytest.mark.parametrize("kind", ["relative", "empty", "absolute"])
def test_a_label_names_no_directory_of_ours(make_volume, make_server, tmp_path, kind):
    """Whoever can write one object of the store must not get at the files of the server's user."""
    local = tmp_path / "local"
    victims = [local / "x", local / "caches" / "nodes", local / "caches" / "data"]
    for victim in victims:
        victim.mkdir(parents=True)
        (victim / "thesis.tex").write_text("mine")
    wrong = {"relative": "../../x", "empty": "", "absolute": str(local / "x")}[kind]
    parameters = {
        "cache_dir": str(local / "caches" / "data"),
        "cache_disk": "64M",
        "node_cache_config": f"LocalDisk,{local}/caches/nodes,32M,Recreate",
    }
    volume = make_volume()
    put_beside(volume, "volume.json", json.dumps({"volume_id": wrong, "created_ms": 1}).encode())
    stored = volume.store.objects()
    for options in ([], ["-r"]):
        server = make_server(volume, nbdkit_options=options, **parameters)
        server.spawn()
        assert server.wait() != 0
        for part in (f'"{wrong[:40]}" is no volume id', "volume.json"):
            assert part in server.log_text(), server.log_text()
    for words in (["info", volume.url], ["delete", volume.url, "--yes"], ["resize", volume.url, "--size", "128M"]):
        done = volume.cli(*words)
        assert done.returncode != 0 and "is no volume id" in done.stderr, (words, done.stderr)
    # What a command remembers of the store itself is no part of the volume.
    assert {key: tag for key, tag in volume.store.objects().items() if not key.endswith(".meta/probe")} == stored
    left = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    assert left == sorted(str(victim.relative_to(local) / "thesis.tex") for victim in victims)
    # The same, where the label is one, makes caches there: the test would see them.
    put_beside(volume, "volume.json", json.dumps({"volume_id": str(uuid.uuid4()), "created_ms": 1}).encode())
    served = make_server(volume, **parameters).start()
    assert served.terminate() == 0
    assert len([path for path in local.rglob("*") if path.is_file()]) > len(left)
    assert all((victim / "thesis.tex").read_text() == "mine" for victim in victims)
