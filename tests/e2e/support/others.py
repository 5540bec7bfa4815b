"""What other tools do to a volume: they copy its objects, put old ones back, remove some, or change one."""

import json
import secrets
import time
from pathlib import Path
from urllib.parse import quote, unquote

from .process import check
from .server import Volume
from .stores import BUCKET

MAGIC = b"HNBDOBJ1"


class S3Objects:
    """The objects of a volume in a bucket, by their names below its prefix; `.meta/…` are those beside it."""

    def __init__(self, volume: Volume):
        self.client = volume.store.minio.client()
        self.root = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")

    def _key(self, name: str) -> str:
        return self.root + name if name.startswith(".meta/") else f"{self.root}/{name}"

    def names(self) -> list[str]:
        found = []
        for prefix, skipped in ((f"{self.root}/", len(self.root) + 1), (f"{self.root}.meta/", len(self.root))):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
            found += [item["Key"][skipped:] for page in pages for item in page.get("Contents", [])]
        return found

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=self._key(name))["Body"].read()

    def put(self, name: str, body: bytes) -> None:
        """As a tool does that knows of no check values."""
        self.client.put_object(Bucket=BUCKET, Key=self._key(name), Body=body)

    def flip(self, name: str, at: int) -> None:
        """Changes a bit of an object, and nothing of what is stored with it."""
        got = self.client.get_object(Bucket=BUCKET, Key=self._key(name))
        body = bytearray(got["Body"].read())
        body[at] ^= 1
        self.client.put_object(Bucket=BUCKET, Key=self._key(name), Body=bytes(body), Metadata=got["Metadata"])

    def remove(self, names) -> None:
        for name in names:
            self.client.delete_object(Bucket=BUCKET, Key=self._key(name))

    def keep(self) -> dict:
        """All of it, for `put_back`."""
        kept = {}
        for name in self.names():
            got = self.client.get_object(Bucket=BUCKET, Key=self._key(name))
            kept[name] = (got["Body"].read(), got["Metadata"])
        return kept

    def put_back(self, kept: dict, names=lambda _: True) -> None:
        """Makes those of the objects that `names` chooses what they were."""
        self.remove(filter(names, self.names()))
        for name, (body, metadata) in kept.items():
            if names(name):
                self.client.put_object(Bucket=BUCKET, Key=self._key(name), Body=body, Metadata=metadata)


class FileObjects:
    """The same of a volume in a directory, which itself stays."""

    def __init__(self, volume: Volume):
        self.directory = Path(volume.url.removeprefix("file://")) / "objects"

    def _path(self, name: str) -> Path:
        key = "volume" + name if name.startswith(".meta/") else f"volume/{name}"
        return self.directory / quote(key, safe="")

    def names(self) -> list[str]:
        keys = [unquote(path.name) for path in self.directory.iterdir() if path.name.startswith("volume")]
        return [key.removeprefix("volume").removeprefix("/") for key in keys]

    def get(self, name: str) -> bytes:
        file = self._path(name).read_bytes()
        header_len = int.from_bytes(file[-12:-8], "little")
        return file[: -12 - header_len]

    def put(self, name: str, body: bytes) -> None:
        """As a tool does that knows of no check values."""
        header = {"etag": secrets.token_hex(16), "modified_ms": int(time.time() * 1000), "data_len_bytes": len(body)}
        header = json.dumps(header).encode()
        new = self.directory.parent / "new"
        new.write_bytes(body + header + len(header).to_bytes(4, "little") + MAGIC)
        new.rename(self._path(name))

    def flip(self, name: str, at: int) -> None:
        """Changes a bit of an object, and nothing of what is stored with it."""
        with open(self._path(name), "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    def remove(self, names) -> None:
        for name in names:
            self._path(name).unlink()

    def keep(self) -> dict:
        """All of it, for `put_back`."""
        return {name: self._path(name).read_bytes() for name in self.names()}

    def put_back(self, kept: dict, names=lambda _: True) -> None:
        """Makes those of the objects that `names` chooses what they were."""
        self.remove(list(filter(names, self.names())))
        for name, file in kept.items():
            if names(name):
                self._path(name).write_bytes(file)


def objects_of(volume: Volume) -> S3Objects | FileObjects:
    """The stored objects of a volume."""
    return S3Objects(volume) if volume.store.kind == "s3" else FileObjects(volume)


def is_container(name: str) -> bool:
    """Whether an object is the container's own, and so known to Hyperfile's own tools."""
    return not name.startswith(".meta/")


def copy_of(volume: Volume, name: str) -> Volume:
    """Copies everything stored for a volume, as `aws s3 sync` and `cp -a` do."""
    copy = Volume(volume.store.url(name), volume.store, volume.size_bytes, volume.block_bytes)
    if volume.store.kind == "s3":
        objects_of(copy).put_back(objects_of(volume).keep())
    else:
        check("cp", "-a", volume.url.removeprefix("file://").rstrip("/"), copy.url.removeprefix("file://").rstrip("/"))
    return copy


def stored_label(volume: Volume) -> dict:
    """What the volume calls itself."""
    return json.loads(objects_of(volume).get(".meta/volume.json"))
