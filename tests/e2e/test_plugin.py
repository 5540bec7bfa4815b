"""What nbdkit tells about the plugin without serving anything."""

import pytest

from support.process import check, run
from support.server import PLUGIN, nbdkit_version

PARAMETERS = [
    "backend_url",
    "node_cache_config",
    "write_buffer",
    "checkpoint_interval",
    "endpoint_url",
    "region",
    "path_style",
    "payload_signing",
    "runtime_threads",
    "io_timeout",
]

pytestmark = pytest.mark.old_nbdkit_too


def dump(nbdkit: str) -> dict[str, str]:
    lines = check(nbdkit, "--dump-plugin", PLUGIN).splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_dump_plugin(nbdkit):
    facts = dump(nbdkit)
    assert facts["name"] == "hypernbd"
    assert facts["magic_config_key"] == "backend_url"
    assert facts["hypernbd_version"]
    for callback in ("open", "close", "pread", "pwrite", "flush", "trim", "zero", "extents", "cache", "block_size"):
        assert facts.get(f"has_{callback}") == "1", f"no {callback} callback: {facts}"


def test_thread_model_follows_nbdkit(nbdkit):
    """An old nbdkit aborts when a client goes with replies pending, unless requests are serialised."""
    expected = "parallel" if nbdkit_version(nbdkit) >= (1, 34) else "serialize_requests"
    assert dump(nbdkit)["thread_model"] == expected


def test_help_names_every_parameter(nbdkit):
    text = check(nbdkit, "--help", PLUGIN)
    for parameter in PARAMETERS:
        assert parameter in text


def test_no_volume_named(nbdkit):
    done = run(nbdkit, "-f", "-U", "-", PLUGIN)
    assert done.returncode != 0
    assert "backend_url" in done.stderr
