"""The commands of docs/recipes, run as they are printed there but for names of buckets, directories and devices."""

import os
import re
from pathlib import Path

from .process import check
from .server import CLI, PROJECT, Volume
from .stores import REGION

RECIPES = PROJECT / "docs" / "recipes"


def pages() -> list[Path]:
    """Every recipe."""
    return sorted(path for path in RECIPES.glob("*.md") if path.name != "README.md")


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in one language, in their order; "" is for those that name none."""
    parts = re.split(r"^```(\w*)\n", (RECIPES / page).read_text(), flags=re.MULTILINE)
    # Text, then by turns: the language, the block, "" for the fence that closes it, and text again.
    return [block for named, block in zip(parts[1::4], parts[2::4]) if named == language]


class Shell:
    """A shell in a directory of the test's own, with `hypernbd` at hand, on the test's store."""

    def __init__(self, store, directory: Path):
        self.store, self.directory = store, directory
        self.srv = directory / "srv"
        self.srv.mkdir(parents=True)
        programs = directory / "bin"
        programs.mkdir()
        (programs / "hypernbd").symlink_to(CLI)
        self.env = {**store.env, "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"}
        if store.kind == "s3":
            self.env |= {"AWS_ENDPOINT_URL": store.minio.endpoint, "AWS_REGION": REGION}

    def volume(self, name: str, size_bytes: int = 0) -> Volume:
        """The volume that the recipes call s3://mybucket/NAME/."""
        return Volume(self.store.url(name), self.store, size_bytes)

    def run(self, commands: str, **names: str | Path) -> str:
        """Runs a block; `names` are what stands for other words of it, as in `nbd0="/dev/loop7"` for /dev/nbd0."""
        commands = re.sub(r"s3://mybucket/(\w+)/", lambda found: self.store.url(found[1]), commands)
        commands = commands.replace("/srv/", f"{self.srv}/")
        for word, meant in names.items():
            commands = re.sub(rf"(/\w+)*/{word}\b", str(meant), commands)
        env = {**self.env, "HOME": str(self.directory)}
        return check("bash", "-euo", "pipefail", "-c", f"cd '{self.directory}'\n{commands}", env=env)
