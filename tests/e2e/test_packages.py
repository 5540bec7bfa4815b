"""What packages and images are made of. They are made and tried by `make package`; no container is run here."""

import fnmatch
import os
import re
import shlex
import tomllib

import pytest
import yaml

from support.process import check, run, spawn, wait_for
from support.server import CLI, PLUGIN, PROJECT
from support.stores import REGION, free_port

CARGO = tomllib.loads((PROJECT / "Cargo.toml").read_text())
METADATA = CARGO["package"]["metadata"]
CONTAINERFILE = PROJECT / "contrib/Containerfile"
COMPOSE = yaml.safe_load((PROJECT / "contrib/compose.yaml").read_text())


@pytest.mark.parametrize(
    "kind, plugins", [("deb", "/usr/lib/x86_64-linux-gnu/nbdkit/plugins"), ("rpm", "/usr/lib64/nbdkit/plugins")]
)
def test_a_package_has_every_file_that_is_installed(tmp_path, nbdkit, kind, plugins):
    env = {"HYPERNBD_CLI": str(CLI), "HYPERNBD_PLUGIN": str(PLUGIN), "NBDKIT": nbdkit, "PREFIX": "/usr"}
    check(PROJECT / "scripts/install.sh", "install", env=env | {"DESTDIR": str(tmp_path), "NBDKIT_PLUGIN_DIR": plugins})
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert f"{plugins[1:]}/nbdkit-hypernbd-plugin.so" in found
    if kind == "deb":
        assets = METADATA["deb"]["assets"]
    else:
        assets = [(asset["source"], asset["dest"], asset["mode"]) for asset in METADATA["generate-rpm"]["assets"]]
    for source, destination, _ in assets:
        inside = source.removeprefix(f"target/package/{kind}")
        assert inside != source and inside.startswith("/" + destination.lstrip("/")), f"{source} goes to another place"
    for file in found:
        globs = [source for source, _, _ in assets if fnmatch.fnmatch(f"target/package/{kind}/{file}", source)]
        assert len(globs) == 1, f"{file}: {globs}"


def test_packages_say_what_they_need_and_under_which_licence_they_are():
    assert "nbdkit (>= 1.32)" in METADATA["deb"]["depends"]
    assert METADATA["generate-rpm"]["requires"]["nbdkit-server"] == ">= 1.32"
    assert METADATA["generate-rpm"]["license"] == "GPL-3.0-or-later"


def instructions() -> list[tuple[str, str]]:
    """The lines of the Containerfile, continued ones joined, comments left out."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_image_is_small_and_not_roots():
    lines = instructions()
    known = "FROM RUN COPY WORKDIR USER ENV VOLUME EXPOSE HEALTHCHECK STOPSIGNAL ENTRYPOINT CMD".split()
    assert {word for word, _ in lines} <= set(known)
    starts = [number for number, (word, _) in enumerate(lines) if word == "FROM"]
    assert len(starts) == 2, "it is built in one stage and run in another"
    build = lines[: starts[1]]
    image = lines[starts[1] :]
    assert build[0][1].endswith(" AS build") and f"rust:{CARGO['workspace']['package']['rust-version']}-" in build[0][1]
    assert [rest for word, rest in image if word == "COPY"] == ["--from=build /installed/ /"]
    users = [rest for word, rest in image if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert not any("cargo" in rest or "build-essential" in rest for _, rest in image)
    install = [rest for word, rest in build if word == "RUN" and "install.sh" in rest]
    assert install and "--profile dist" in install[0] and "dist" in CARGO["profile"]


def test_the_set_holds_together():
    services = COMPOSE["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}"
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to other machines"
        if "build" in service:
            directory = (PROJECT / "contrib" / service["build"]["context"]).resolve()
            assert (directory / service["build"]["dockerfile"]) == CONTAINERFILE
    assert services["server"]["environment"] == services["volume"]["environment"]


@pytest.mark.s3_only
def test_the_sets_commands_serve_a_healthy_volume(store, nbdkit, tmp_path):
    """What the containers run, run here: with this test's store, and ports that are free."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "hypernbd").symlink_to(CLI)
    env = {
        **store.env,
        "AWS_ENDPOINT_URL": store.minio.endpoint,
        "AWS_REGION": REGION,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NBDKIT": nbdkit,
        "HYPERNBD_PLUGIN": str(PLUGIN),
    }
    assert set(COMPOSE["services"]["volume"]["environment"]) <= set(env)
    metrics, nbd = f"127.0.0.1:{free_port()}", free_port()

    def adapted(words: list[str]) -> list[str]:
        return [word.replace("s3://volumes/disk/", store.url("disk")).replace("127.0.0.1:9100", metrics) for word in words]

    made = COMPOSE["services"]["volume"]
    for _ in range(2):  # the second time the volume is there
        check(*made["entrypoint"], *adapted(made["command"]), env=env)
    (entrypoint,) = [rest for word, rest in instructions() if word == "ENTRYPOINT"]
    command = [*yaml.safe_load(entrypoint), *adapted(COMPOSE["services"]["server"]["command"])]
    server = spawn([*command[:2], "--port", str(nbd), *command[2:]], tmp_path / "log", env=env, limit_s=120)
    try:
        (health,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
        health = adapted(yaml.safe_load(health.split("CMD", 1)[1]))

        def is_healthy() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()
            return run(*health, env=env).returncode == 0

        wait_for(is_healthy, f"`{shlex.join(health)}` to succeed")
        assert check("nbdinfo", "--size", f"nbd://127.0.0.1:{nbd}").strip() == str(10 << 30)
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    assert run(*health, env=env).returncode != 0, "healthy without a server"
