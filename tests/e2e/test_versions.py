"""A bucket that keeps versions: what stays there is told, and the rule of the documents that removes it is one."""

import json
import re

import pytest

from support.s3_servers import LIFECYCLE
from support.server import KI, MI, PROJECT, create_volume
from support.stores import BUCKET, S3Store

pytestmark = pytest.mark.s3_only
DOCUMENT = PROJECT / "docs" / "s3-compatibility.md"


def test_a_deletion_says_what_stays(own_minio):
    store = S3Store(own_minio)
    told = []
    for keeps in (False, True):
        if keeps:
            own_minio.client().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
        volume = create_volume(store, 1 * MI, 4 * KI, "volume")
        done = volume.cli("delete", volume.url, "--yes")
        assert done.returncode == 0, done.stderr
        assert not store.objects()
        told.append("the bucket keeps versions" in done.stdout)
    versions = own_minio.client().list_object_versions(Bucket=BUCKET, Prefix=store.prefix)
    assert versions["Versions"], "nothing stays: the test shows nothing"
    assert told == [False, True]


def test_the_lifecycle_rule_of_the_documents_is_one(own_minio):
    own_minio.needs(LIFECYCLE)
    (text,) = re.findall(r"<!-- lifecycle.json -->\n```\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    own_minio.client().put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=json.loads(text))
    (rule,) = own_minio.client().get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == 7
    assert "Days" not in rule.get("Expiration", {}), "it would remove objects that are in use"
