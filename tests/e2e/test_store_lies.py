"""A store that does not keep what a volume rests on is refused by name and reason, before anything is written to it."""

import json

import pytest

from support.liar import LyingProxy
from support.model import pattern
from support.s3_servers import UNSIGNED
from support.server import MI
from support.stores import BUCKET, S3Store

pytestmark = pytest.mark.s3_only

# What is taken out of requests, and the promises that are broken by it.
LIES = {
    "if-none-match": ["If-None-Match: * on PUT", "of racing creations one wins"],
    "if-match": ["If-Match on PUT", "of racing replacements one wins"],
    "x-amz-meta-.*": ["user metadata comes back with HEAD"],
    "range": ["range reads answer exactly"],
    "nothing": [],
}


@pytest.fixture
def open_store(own_minio):
    """A store in a bucket that takes unsigned requests."""
    own_minio.needs(UNSIGNED)
    statement = {"Effect": "Allow", "Principal": "*", "Action": "s3:*"}
    resources = [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]
    policy = {"Version": "2012-10-17", "Statement": [statement | {"Resource": resources}]}
    own_minio.client().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(policy))
    return S3Store(own_minio)


@pytest.fixture(params=LIES)
def lie(request, open_store):
    """A proxy that lies in one way, and what should be found broken."""
    proxy = LyingProxy(open_store.minio.endpoint, request.param)
    yield proxy, LIES[request.param]
    proxy.close()


def test_a_store_that_lies_is_refused_by_name_and_reason(open_store, make_volume, make_server, lie):
    proxy, broken = lie
    volume = make_volume(in_store=open_store)
    before = open_store.objects()
    server = make_server(volume, endpoint_url=proxy.endpoint)
    if not broken:
        with server.start().connect() as client:
            client.pwrite(pattern(1 * MI, 1), 0)
            client.flush()
        assert any(key.endswith(".meta/probe") for key in open_store.objects()), "a pass is remembered"
        return
    server.spawn()
    assert server.wait() != 0
    text = server.log_text()
    assert "is not safe for volumes" in text and proxy.endpoint in text and "allow_unsafe_store=yes" in text, text
    for name in broken:
        assert name in text, text
    assert open_store.objects() == before, "something was written, or left behind"

    done = volume.cli("probe", volume.url, "--json", "--endpoint-url", proxy.endpoint)
    assert done.returncode != 0
    failed = {check["name"] for check in json.loads(done.stdout) if check["failure"]}
    assert failed >= set(broken), done.stdout


def test_a_store_that_lies_can_be_used_on_demand_with_a_loud_warning(open_store, make_volume, make_server):
    proxy = LyingProxy(open_store.minio.endpoint, "if-match")
    server = make_server(make_volume(in_store=open_store), endpoint_url=proxy.endpoint, allow_unsafe_store="yes")
    with server.start().connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
    assert server.log_text().count("USED ALL THE SAME") == 1
    proxy.close()


def test_an_honest_store_is_probed_once(make_volume, make_server):
    volume = make_volume()
    make_server(volume).start().terminate()
    probe = {key: tag for key, tag in volume.store.objects().items() if ".meta/probe" in key}
    assert len(probe) == 1
    make_server(volume).start().terminate()
    assert {key: tag for key, tag in volume.store.objects().items() if ".meta/probe" in key} == probe
