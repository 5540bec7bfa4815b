"""`hypernbd repair`: what is damaged or missing comes back from a replica, the list from the container, a volume to what is whole."""

import json

import pytest

from support.model import pattern
from support.server import KI, MI, Volume
from support.stores import BUCKET, S3Store, profile

pytestmark = pytest.mark.s3_only

SIZE = 32 * MI


def damage(store, key: str) -> None:
    """Changes a byte of an object in the bucket, with the metadata that it has."""
    client = store.minio.client()
    got = client.get_object(Bucket=BUCKET, Key=key)
    body = bytearray(got["Body"].read())
    body[len(body) * 2 // 3] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body), Metadata=got["Metadata"])


def test_from_a_replica_in_another_store_beside_a_server(store, make_volume, make_server, own_minio, tmp_path):
    volume = make_volume(SIZE, 4 * KI)
    far = S3Store(own_minio)
    env = profile(tmp_path, own_minio)
    replica = Volume(far.url("replica"), far, SIZE, 4 * KI)
    server = make_server(volume, checkpoint_interval="1h", cache_memory="0").start()
    with server.connect() as client:
        for tag, at, length in ((1, 0, 10 * MI), (2, 12 * MI, MI), (3, 14 * MI, MI)):
            client.pwrite(pattern(length, tag), at)
            client.flush()
    assert server.terminate() == 0
    done = volume.cli("replicate", volume.url, replica.url, "--dest-profile", "faraway", env=env)
    assert done.returncode == 0, done.stderr

    root = volume.url.removeprefix(f"s3://{BUCKET}/")
    large, gone = f"{root}0000000001.0", f"{root}0000000002.0"
    server.start()
    with server.connect() as client:
        damage(store, large)
        store.minio.client().delete_object(Bucket=BUCKET, Key=gone)
        before = store.objects()
        words = ["repair", volume.url, "--from", replica.url, "--from-profile", "faraway", "--data"]
        looked = volume.cli(*words, env=env)
        assert looked.returncode == 1, looked.stdout + looked.stderr
        assert "2 of 2 problems can be mended; nothing was changed" in looked.stdout, looked.stdout
        changed = {key for key, tag in store.objects().items() if before.get(key) != tag and ".meta/" not in key}
        assert not changed, changed
        mended = volume.cli(*words, "--write", "--json", env=env)
        assert mended.returncode == 0, mended.stdout + mended.stderr
        told = json.loads(mended.stdout)
        assert {one["problem"]["object"]: one["outcome"] for one in told["found"]} == {large: "mended", gone: "mended"}
        assert told["left"] == []
        # The server that was there all along reads it now.
        assert client.pread(10 * MI, 0) == pattern(10 * MI, 1)
        assert client.pread(MI, 12 * MI) == pattern(MI, 2)
    assert server.terminate() == 0
    checked = volume.cli("check", volume.url, "--data")
    assert checked.returncode == 0, checked.stdout

    other = make_volume(SIZE, 4 * KI)
    refused = other.cli("repair", other.url, "--from", volume.url)
    assert refused.returncode == 2 and "no replica or copy" in refused.stderr, refused.stderr


def test_nothing_is_replaced_by_what_may_be_cut_short_itself(store, make_volume, make_server):
    """Without check values nothing says which of two objects that were cut short is the better one."""
    volume = make_volume(SIZE, 4 * KI)
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(12 * MI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    replica = Volume(store.url("replica"), store, SIZE, 4 * KI)
    done = volume.cli("replicate", volume.url, replica.url)
    assert done.returncode == 0, done.stderr
    client = store.minio.client()

    def cut(of, length: int) -> str:
        root = of.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")
        client.delete_object(Bucket=BUCKET, Key=f"{root}.meta/sums/0000000001.0")
        key = f"{root}/0000000001.0"
        got = client.get_object(Bucket=BUCKET, Key=key)
        client.put_object(Bucket=BUCKET, Key=key, Body=got["Body"].read()[:length], Metadata=got["Metadata"])
        return key

    key = cut(volume, 10 * MI)
    cut(replica, 9 * MI)
    tag = store.objects()[key]
    left = volume.cli("repair", volume.url, "--from", replica.url, "--data", "--write", "--json")
    assert left.returncode == 1, left.stdout + left.stderr
    (found,) = json.loads(left.stdout)["found"]
    assert "no check values" in json.dumps(found["outcome"]), found
    assert store.objects()[key] == tag


def test_the_list_is_rebuilt_and_a_damaged_volume_goes_back(store, make_volume, make_server):
    volume = make_volume(SIZE, 4 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in (1, 2, 3):
            client.pwrite(pattern(MI, tag), tag * MI)
            client.flush()
    assert server.terminate() == 0
    root = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")

    entry = f"{root}.meta/checkpoints/0000000002"
    damage(store, entry)
    words = ["repair", volume.url, "--rebuild-list"]
    looked = volume.cli(*words)
    assert looked.returncode == 1 and f"FOUND {entry}" in looked.stdout, looked.stdout + looked.stderr
    mended = volume.cli(*words, "--write")
    assert mended.returncode == 0 and f"MENDED {entry}" in mended.stdout, mended.stdout + mended.stderr
    assert [key for key in store.objects() if f"{root}.meta/aside/" in key], "what was there is not set aside"
    checked = volume.cli("check", volume.url, "--data")
    assert checked.returncode == 0, checked.stdout

    damage(store, f"{root}/0000000003.0")
    words = ["repair", volume.url, "--to-newest-whole", "--data"]
    looked = volume.cli(*words)
    assert looked.returncode == 1, looked.stdout + looked.stderr
    assert "the newest whole checkpoint of" in looked.stdout and " is 2, published" in looked.stdout, looked.stdout
    went = volume.cli(*words, "--write")
    assert went.returncode == 0, went.stdout + went.stderr
    assert "as checkpoint 4" in went.stdout and "before-repair-" in went.stdout, went.stdout
    server.start()
    with server.connect() as client:
        for tag in (1, 2):
            assert client.pread(MI, tag * MI) == pattern(MI, tag)
        assert client.pread(MI, 3 * MI) == bytes(MI)
    assert server.terminate() == 0
    again = volume.cli(*words)
    assert again.returncode == 0 and "nothing to go back from" in again.stdout, again.stdout + again.stderr


def test_one_way_is_chosen(store, make_volume):
    volume = make_volume(SIZE, 4 * KI)
    for words in ([], ["--rebuild-list", "--to-newest-whole"], ["--from-versions", "--from", volume.url]):
        refused = volume.cli("repair", volume.url, *words)
        assert refused.returncode == 2, refused.stdout + refused.stderr
