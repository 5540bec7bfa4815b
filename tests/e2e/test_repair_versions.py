"""`hypernbd repair --from-versions`: what is damaged or deleted comes back from what the bucket keeps of it."""

import json

import pytest

from support.model import pattern
from support.server import KI, MI, create_volume
from support.stores import BUCKET, S3Store

from test_repair import damage

pytestmark = pytest.mark.s3_only

SIZE = 32 * MI
WRITES = ((0, 10 * MI), (12 * MI, MI), (14 * MI, MI))


def fill(make_server, volume, tag: int) -> None:
    """Three checkpoints, each with an object of its own."""
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for number, (at, length) in enumerate(WRITES):
            client.pwrite(pattern(length, tag + number), at)
            client.flush()
    assert server.terminate() == 0


def test_from_the_versions_of_a_bucket(own_minio, make_server, tmp_path):
    client = own_minio.client()
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    store = S3Store(own_minio)
    # Another volume was there before: the bucket keeps its objects, which have the same names.
    former = create_volume(store, SIZE, 4 * KI, "volume")
    fill(make_server, former, 11)
    done = former.cli("delete", former.url, "--yes")
    assert done.returncode == 0, done.stderr
    volume = create_volume(store, SIZE, 4 * KI, "volume")
    fill(make_server, volume, 1)

    root = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    large, gone, lost = (f"{root}/000000000{number}.0" for number in (1, 2, 3))
    entry = f"{root}.meta/checkpoints/0000000002"
    written = client.get_object(Bucket=BUCKET, Key=entry)["Body"].read()
    damage(store, large)
    damage(store, entry)
    client.delete_object(Bucket=BUCKET, Key=gone)
    # Of this one nothing is left but what the volume before had.
    version = client.head_object(Bucket=BUCKET, Key=lost)["VersionId"]
    client.delete_object(Bucket=BUCKET, Key=lost, VersionId=version)

    words = ["repair", volume.url, "--from-versions", "--data", "--json"]
    before = store.objects()
    looked = volume.cli(*words)
    assert looked.returncode == 1, looked.stdout + looked.stderr
    found = {one["problem"]["object"]: one["outcome"] for one in json.loads(looked.stdout)["found"]}
    assert "of another volume" in found.pop(lost)["left"]
    # The entry is proved by its checkpoint's object, which is gone yet.
    assert "agrees with the container" in found.pop(entry)["left"]
    assert found == {large: "possible", gone: "possible"}
    assert store.objects() == before, "something was changed"

    mended = volume.cli(*words, "--write")
    assert mended.returncode == 1, mended.stdout + mended.stderr
    told = json.loads(mended.stdout)
    found = {one["problem"]["object"]: one["outcome"] for one in told["found"]}
    assert "of another volume" in found.pop(lost)["left"]
    assert found == {large: "mended", gone: "mended", entry: "mended"}
    assert {problem["object"] for problem in told["left"]} == {lost}
    assert lost not in store.objects()
    assert client.get_object(Bucket=BUCKET, Key=entry)["Body"].read() == written
    # What the newest checkpoint needs is lost; the one before is whole again.
    out = tmp_path / "second.raw"
    exported = volume.cli("export", volume.url, "@2", str(out))
    assert exported.returncode == 0, exported.stdout + exported.stderr
    expected = bytearray(SIZE)
    for number, (at, length) in enumerate(WRITES[:2]):
        expected[at : at + length] = pattern(length, 1 + number)
    assert out.read_bytes() == expected


def test_a_bucket_that_keeps_no_versions_has_none_to_give(store, make_volume, make_server):
    volume = make_volume(SIZE, 4 * KI)
    fill(make_server, volume, 1)
    root = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    key = f"{root}/0000000002.0"
    damage(store, key)
    left = volume.cli("repair", volume.url, "--from-versions", "--data", "--write", "--json")
    assert left.returncode == 1, left.stdout + left.stderr
    (found,) = json.loads(left.stdout)["found"]
    assert found["problem"]["object"] == key and "no other version" in found["outcome"]["left"], found
