"""A volume's life on an S3 that refuses what AWS S3 refuses, over http and over https with a private authority."""

import json
import re

import nbd
import pytest

from support.model import pattern
from support.process import check, wait_for
from support.server import KI, MI, Volume, create_volume
from support.stores import REGION, S3Store
from support.strict import Rules, StrictProxy

pytestmark = pytest.mark.s3_only

# Of a store older than the checksums that uploads carry.
CHECKSUMS_UNKNOWN = "x-amz-checksum-(crc64nvme|algorithm|type)"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> dict[str, str]:
    """A certificate authority of our own, and a certificate for the loopback address that it signed."""
    directory = tmp_path_factory.mktemp("authority")
    paths = {name: str(directory / name) for name in ("ca.pem", "ca.key", "tls.pem", "tls.key", "tls.csr", "extensions")}
    (directory / "extensions").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    check("openssl", "req", "-x509", *new_key, "-days", "2", "-subj", "/CN=test authority",
          "-keyout", paths["ca.key"], "-out", paths["ca.pem"])  # fmt: skip
    check("openssl", "req", *new_key, "-subj", "/CN=127.0.0.1", "-keyout", paths["tls.key"], "-out", paths["tls.csr"])
    check("openssl", "x509", "-req", "-in", paths["tls.csr"], "-CA", paths["ca.pem"], "-CAkey", paths["ca.key"],
          "-CAcreateserial", "-days", "2", "-extfile", paths["extensions"], "-out", paths["tls.pem"])  # fmt: skip
    return paths


@pytest.fixture
def strict(minio, authority):
    """Makes stores behind a strict proxy: `strict(Rules(…), tls=True)`."""
    made = []

    def make(rules: Rules | None = None, tls: bool = False) -> S3Store:
        pair = (authority["tls.pem"], authority["tls.key"]) if tls else None
        proxy = StrictProxy(minio.direct, rules, pair)
        store = S3Store(minio)
        store.proxy = proxy
        store.parameters = {**store.parameters, "endpoint_url": proxy.endpoint}
        store.cli_options = ["--endpoint-url", proxy.endpoint, "--region", REGION]
        # Set and empty is not set, whatever the machine of the test has.
        store.env |= {"SSL_CERT_FILE": "", "AWS_CA_BUNDLE": authority["ca.pem"] if tls else ""}
        made.append(store)
        return store

    yield make
    for store in made:
        store.proxy.close()
        store.clear()


def absent_volume(store) -> Volume:
    """A volume that is not made."""
    return Volume(store.url("volume"), store, 64 * MI, 64 * KI)


def probe(store, *words, **more):
    """What `hypernbd probe` makes of a store."""
    volume = absent_volume(store)
    return volume.cli("probe", volume.url, *words, **more)


def live(store, make_server, **parameters) -> None:
    """Creates a volume, writes pieces small and large, flushes, serves again, grows, deletes."""
    volume = create_volume(store, 64 * MI, 64 * KI, "life")
    large, small = pattern(40 * MI, 1), pattern(64 * KI, 2)
    server = make_server(volume, **parameters).start()
    with server.connect() as client:
        for at in range(0, len(large), 8 * MI):
            client.pwrite(large[at : at + 8 * MI], at)
        client.flush()
        client.pwrite(small, 50 * MI)
        client.flush()
        client.trim(64 * KI, 1 * MI)
    assert server.terminate() == 0, server.log_text()
    server = make_server(volume, **parameters).start()
    with server.connect() as client:
        assert client.pread(1 * MI, 0) == large[: 1 * MI]
        assert client.pread(30 * MI, 10 * MI) == large[10 * MI :]
        assert client.pread(64 * KI, 50 * MI) == small
    assert server.terminate() == 0, server.log_text()
    for words in (["info", volume.url], ["resize", volume.url, "--size", "128M"], ["delete", volume.url, "--yes"]):
        done = volume.cli(*words)
        assert done.returncode == 0, done.stderr
    assert not store.objects(), "deleted"


@pytest.mark.parametrize("variant", ["plain", "locked", "tls", "slow"])
def test_a_life_breaks_no_rule_of_s3(strict, make_server, variant):
    rules = {"locked": Rules(locked=True), "slow": Rules(slow_down=1)}.get(variant, Rules())
    store = strict(rules, tls=variant == "tls")
    log = {"backend_wal_url": store.url("log")} if variant == "locked" else {}
    live(store, make_server, **log)
    allowed = ("SlowDown", "ConditionalRequestConflict")
    mine = [refusal for refusal in store.proxy.refusals if not refusal.startswith(allowed)]
    assert not mine, mine
    assert any("uploads" in line for line in store.proxy.requests), "no upload in parts: the test shows nothing of them"
    if variant == "slow":
        assert store.proxy.refusals, "nothing was slowed down"


def killed_in_an_upload(store, make_server):
    """A server killed while it uploads a checkpoint in parts."""
    server = make_server(create_volume(store, 64 * MI, 64 * KI, "volume"), checkpoint_interval="1h").start()
    client = server.handle()
    for at in range(0, 40 * MI, 8 * MI):
        client.pwrite(pattern(8 * MI, at), at)
    store.proxy.hangs = re.compile(r"^PUT \S+partNumber=")
    command = client.aio_flush()
    wait_for(lambda: client.poll(0) < 0 or store.proxy.is_hanging.is_set(), "an upload to hang")
    assert not client.aio_command_completed(command)
    server.kill()
    store.proxy.hangs = None
    assert store.proxy.unfinished, "no upload was begun"
    return server


def is_there(store, upload: str, key: str) -> bool:
    try:
        store.minio.client().list_parts(Bucket="hypernbd-e2e", Key=key, UploadId=upload)
        return True
    except store.minio.client().exceptions.NoSuchUpload:
        return False


def test_uploads_that_a_killed_server_left_are_aborted_by_the_next(strict, make_server):
    store = strict()
    server = killed_in_an_upload(store, make_server)
    left = dict(store.proxy.unfinished)
    # One of the same age at a place that is not a container's.
    client = store.minio.client()
    foreign_key = store.url("volume").removeprefix("s3://hypernbd-e2e/") + "somebody.bin"
    foreign = client.create_multipart_upload(Bucket="hypernbd-e2e", Key=foreign_key)["UploadId"]
    store.proxy.unfinished[foreign] = foreign_key
    server.start()
    with server.connect() as connected:
        assert connected.pread(64 * KI, 0) == bytes(64 * KI)
    assert server.terminate() == 0
    assert all(is_there(store, upload, key) for upload, key in left.items()), "too young to be a dead server's"
    store.proxy.unfinished_age_s = 2 * 3600
    server.start()
    wait_for(lambda: not set(left) & set(store.proxy.unfinished), "the uploads to be aborted")
    assert not any(is_there(store, upload, key) for upload, key in left.items())
    assert is_there(store, foreign, foreign_key)
    client.abort_multipart_upload(Bucket="hypernbd-e2e", Key=foreign_key, UploadId=foreign)
    assert server.terminate() == 0


def test_a_deletion_aborts_the_uploads_of_its_volume(strict, make_server):
    store = strict()
    server = killed_in_an_upload(store, make_server)
    left = dict(store.proxy.unfinished)
    deleted = server.volume.cli("delete", server.volume.url, "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert not any(is_there(store, upload, key) for upload, key in left.items())


def test_a_deletion_removes_a_thousand_objects_a_request(strict):
    store = strict()
    volume = create_volume(store, 64 * MI, 64 * KI, "volume")
    # Of a long life: entries of the checkpoint list.
    root = volume.url.removeprefix("s3://hypernbd-e2e/").rstrip("/")
    client = store.minio.client()
    for number in range(1100):
        client.put_object(Bucket="hypernbd-e2e", Key=f"{root}.meta/checkpoints/{number + 1000:010}", Body=b"{}")
    before = len(store.proxy.requests)
    deleted = volume.cli("delete", volume.url, "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert not store.objects()
    lines = store.proxy.requests[before:]
    # One of them may be of a probe.
    assert len([line for line in lines if line.startswith("POST") and "delete" in line]) <= 3, lines
    assert len([line for line in lines if line.startswith("DELETE")]) < 10, lines


def test_a_store_that_knows_no_checksums_is_named_so_and_can_be_used(strict, make_server):
    store = strict(Rules(unknown=CHECKSUMS_UNKNOWN))
    refused = probe(store)
    assert refused.returncode != 0
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in refused.stderr, refused.stderr
    assert "not safe" not in refused.stderr, "a promise that was not broken"
    assert not store.objects(), "left behind"
    store.env["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"
    live(store, make_server)


def test_without_the_authority_the_error_names_where_to_put_it(strict):
    store = strict(tls=True)
    store.env["AWS_CA_BUNDLE"] = ""
    done = probe(store)
    assert done.returncode != 0
    assert "AWS_CA_BUNDLE" in done.stderr and "SSL_CERT_FILE" in done.stderr, done.stderr


def test_a_profile_names_the_authority(strict, authority, tmp_path):
    store = strict(tls=True)
    store.env["AWS_CA_BUNDLE"] = ""
    config = tmp_path / "config"
    config.write_text(f"[profile private]\nca_bundle = {authority['ca.pem']}\nregion = {REGION}\n")
    store.env |= {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "private"}
    done = probe(store)
    assert done.returncode == 0, done.stderr


def test_empty_variables_are_unset_and_wrong_ones_are_named(strict):
    store = strict()
    empty = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_MAX_ATTEMPTS"]
    done = probe(store, "--json", env=dict.fromkeys(empty, ""))
    assert done.returncode == 0, done.stderr
    assert not [check["name"] for check in json.loads(done.stdout) if check["failure"]]
    for name, value in [
        ("AWS_ENDPOINT_URL", "minio:9000"),
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_PROFILE", "absent"),
        ("AWS_CA_BUNDLE", "/nonexistent"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "sometimes"),
    ]:
        done = probe(store, env={name: value})
        assert done.returncode != 0
        assert f'{name} is "{value}"' in done.stderr and "panicked" not in done.stderr, done.stderr


def test_a_profile_that_is_missing_is_named_with_the_files(strict, tmp_path):
    """The one of AWS_PROFILE, and the one that is named for a replica."""
    store = strict()
    files = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
    (tmp_path / "config").write_text("[profile work]\nregion = eu-west-1\n")
    store.env |= files
    done = probe(store, env={"AWS_PROFILE": "wrok"})
    volume = create_volume(store, 1 * MI, 4 * KI, "volume")
    replicated = volume.cli("replicate", volume.url, store.url("replica"), "--dest-profile", "wrok")
    for done in (done, replicated):
        assert done.returncode != 0
        for part in ('"wrok"', *files.values()):
            assert part in done.stderr, done.stderr


def test_an_empty_variable_hides_no_address(strict, tmp_path):
    """The address stands in the other variable, or in the profile; of the profile's, the one for S3 counts."""
    store = strict()
    address, elsewhere = store.proxy.endpoint, "http://127.0.0.1:1"
    store.cli_options = ["--region", REGION]
    done = probe(store, env={"AWS_ENDPOINT_URL_S3": "", "AWS_ENDPOINT_URL": address})
    assert done.returncode == 0, done.stderr
    config = tmp_path / "config"
    services = f"services = own\n[services own]\ns3 =\n  endpoint_url = {address}\n"
    for profile in (f"endpoint_url = {address}\n", f"endpoint_url = {elsewhere}\n{services}"):
        config.write_text(f"[default]\n{profile}")
        for empty in ({}, {"AWS_ENDPOINT_URL": ""}, {"AWS_ENDPOINT_URL_S3": "", "AWS_ENDPOINT_URL": ""}):
            done = probe(store, env={"AWS_CONFIG_FILE": str(config), **empty})
            assert done.returncode == 0, (profile, empty, done.stderr)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["signed for another", "address of another"])
def test_a_wrong_region_is_told_with_the_right_one(strict, elsewhere):
    store = strict(Rules(region="eu-central-1", elsewhere=elsewhere))
    done = probe(store)
    assert done.returncode != 0
    assert "region=eu-central-1" in done.stderr, done.stderr


def test_a_bucket_in_the_endpoints_path_is_pointed_at(strict):
    store = strict()
    store.cli_options[1] += "/hypernbd-e2e"
    done = probe(store)
    assert done.returncode != 0
    assert "endpoint_url ends in the path /hypernbd-e2e" in done.stderr, done.stderr
