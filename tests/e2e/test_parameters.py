"""A wrong parameter, URL or bucket stops nbdkit at once, with a sentence; a typo never creates anything."""

import pytest

from support.process import run
from support.server import MI, Volume
from support.stores import BUCKET, free_port


def refusal(server, *extra: str) -> str:
    """Starts a server that must refuse, and returns what it says on the terminal."""
    before = server.volume.store.objects()
    # In the foreground, as -f does: but errors before the fork must come without it, too.
    command = [part for part in server.command() if part != "--log=stderr"] + list(extra)
    done = run(*command, env=server.environment())
    assert done.returncode != 0, f"nbdkit served {command}"
    assert done.returncode > 0, f"nbdkit died of signal {-done.returncode}:\n{done.stderr}"
    assert "panicked" not in done.stderr
    assert server.volume.store.objects() == before, "a refused start changed the store"
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert errors, f"no error line:\n{done.stderr}"
    return "\n".join(errors)


@pytest.mark.file_only
@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("write_bufer=64M", "write_bufer"),
        ("no_such_key=1", "no_such_key"),
        ("write_buffer=lots", "write_buffer"),
        ("write_buffer=1K", "write_buffer"),
        ("write_buffer=-1", "write_buffer"),
        ("checkpoint_interval=soon", "checkpoint_interval"),
        ("checkpoint-interval=0", "checkpoint_interval"),
        ("io_timeout=never", "io_timeout"),
        ("runtime_threads=0", "runtime_threads"),
        ("runtime_threads=many", "runtime_threads"),
        ("path_style=perhaps", "path_style"),
        ("payload_signing=sometimes", "payload_signing"),
        ("thread_model=all", "thread_model"),
        ("endpoint_url=127.0.0.1:9000", "endpoint_url"),
        ("node_cache_config=LocalDisk", "node_cache_config"),
        ("node_cache_config=Tape,/tmp/x,64M,Recreate", "node_cache_config"),
        ("backend_wal_url=ftp://bucket/wal/", "backend_wal_url"),
        ("backend_wal_uri=relative/path/", "backend_wal_url"),
        ("discard_wal=perhaps", "discard_wal"),
        ("backend_url=file:///tmp/another/", "backend_url"),
        ("backend-uri=file:///tmp/another/", "backend_uri"),
    ],
)
def test_bad_parameter(make_volume, make_server, parameter, named):
    text = refusal(make_server(make_volume()), parameter)
    assert named in text


@pytest.mark.file_only
def test_repeated_parameter(make_volume, make_server):
    text = refusal(make_server(make_volume()), "write_buffer=64M", "write-buffer=64M")
    assert "write_buffer" in text


@pytest.mark.file_only
@pytest.mark.parametrize(
    "url",
    [
        "http://bucket/volume/",
        "s3://",
        "s3:/bucket/volume",
        f"s3://{BUCKET}/",
        "s3://Not_A_Bucket/volume/",
        f"s3://{BUCKET}/../volume/",
        f"s3://{BUCKET}/volume.meta/",
        f"s3://{BUCKET}/volume?x=1",
        "file://relative/path/",
        "file:///",
        "volume",
    ],
)
def test_bad_url(store, make_server, url):
    assert url in refusal(make_server(Volume(url, store)))


def test_missing_volume_beside_an_existing_one(make_volume, make_server):
    """A typo in the URL is refused and makes nothing, though the bucket or directory is fine."""
    volume = make_volume()
    typo = Volume(volume.url.replace("volume-1", "volume-l"), volume.store)
    assert typo.url in refusal(make_server(typo))


@pytest.mark.file_only
def test_a_directory_that_is_no_volume(store, make_server):
    (store.directory / "photos").mkdir()
    (store.directory / "photos" / "cat.jpeg").write_text("not a volume")
    volume = Volume(store.url("photos"), store)
    assert volume.url in refusal(make_server(volume))


@pytest.mark.s3_only
def test_missing_bucket(store, make_server):
    volume = Volume("s3://no-such-bucket-here/volume/", store)
    assert "no-such-bucket-here" in refusal(make_server(volume))


@pytest.mark.s3_only
@pytest.mark.parametrize("key", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(make_volume, make_server, key):
    volume = make_volume()
    text = refusal(make_server(volume, env={key: "wrong-wrong-wrong"}))
    assert volume.url in text
    assert "wrong-wrong-wrong" not in text


@pytest.mark.s3_only
def test_no_credentials(make_volume, make_server):
    volume = make_volume()
    missing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert volume.url in refusal(make_server(volume, env=missing))


@pytest.mark.s3_only
def test_nobody_at_the_endpoint(make_volume, make_server):
    endpoint = f"http://127.0.0.1:{free_port()}"
    text = refusal(make_server(make_volume(), endpoint_url=endpoint))
    assert endpoint in text


@pytest.mark.file_only
def test_every_parameter_in_either_spelling(make_volume, make_server, tmp_path):
    """All keys at once, hyphens and underscores mixed; the seed's cache size is raised with one warning."""
    server = make_server(
        make_volume(),
        **{
            "write-buffer": "64M",
            "checkpoint_interval": "500ms",
            "region": "eu-west-1",
            "path-style": "yes",
            "payload_signing": "always",
            "runtime-threads": "2",
            "io_timeout": "20s",
            "thread-model": "parallel",
            "node-cache-config": f"LocalDisk,{tmp_path}/nodes/,16777216,Recreate",
        },
    ).start()
    with server.connect() as client:
        client.pwrite(b"served", 0)
        client.flush()
        assert client.pread(6, 0) == b"served"
    warnings = [line for line in server.log_text().splitlines() if "16777216" in line and "WARN" in line]
    assert len(warnings) == 1, server.log_text()


@pytest.mark.parametrize("key", ["backend_url", "backend_uri", "backend-url", None])
def test_the_volume_by_every_key(make_volume, make_server, key):
    """`backend_url=`, its alias, and the bare URL as the magic parameter."""
    server = make_server(make_volume())
    original = server.command()

    def command():
        return [
            part.replace("backend_url=", f"{key}=" if key else "") if part.startswith("backend_url=") else part
            for part in original
        ]

    server.command = command
    server.start()
    with server.connect() as client:
        assert client.get_size() == 64 * MI


@pytest.mark.file_only
def test_rust_log_is_honoured(make_volume, make_server):
    loud = make_server(make_volume(), env={"RUST_LOG": "debug"}).start()
    silent = make_server(make_volume(), env={"RUST_LOG": "off"}).start()
    for server in (loud, silent):
        with server.connect() as client:
            client.pwrite(b"x", 0)
            client.flush()
        server.terminate()
    assert "DEBUG" in loud.log_text()
    assert not any(level in silent.log_text() for level in ("DEBUG", "INFO"))


@pytest.mark.file_only
def test_the_log_states_the_durability(server):
    """At start the server says what a flush is worth."""
    assert "durab" in server.log_text() or "flush" in server.log_text()
