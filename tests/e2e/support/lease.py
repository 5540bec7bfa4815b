"""The lease of a volume, as `hypernbd info` shows it, and leases as other machines would write them."""

import json

from .stores import BUCKET


def lease_of(volume) -> dict | None:
    """The lease, if there ever was one."""
    done = volume.cli("info", volume.url, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["lease"]


def put_lease_from_elsewhere(volume, duration_ms: int, **changes) -> dict:
    """Makes the lease of a volume on S3 that of a holder on another machine, which will renew it no more."""
    lease = lease_of(volume)
    lease |= {"state": "held", "token": "theirs", "duration_ms": duration_ms} | changes
    lease["holder"] |= {"host": "far-away", "boot_id": "another boot"}
    root = volume.url.removeprefix(f"s3://{BUCKET}/").strip("/")
    volume.store.minio.client().put_object(Bucket=BUCKET, Key=f"{root}.meta/lease", Body=json.dumps(lease).encode())
    return lease
