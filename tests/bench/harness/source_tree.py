"""A source tree to unpack: small files in folders, and a git repository of them. The same one at every call."""

import os
import random
import shutil
from pathlib import Path

from . import programs
from .loads import command

WORDS = "struct impl return match offset length block volume segment index error result buffer checkpoint".split()
FILES_PER_FOLDER = 20
GIT_ENV = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "bench",
    "GIT_AUTHOR_EMAIL": "bench@example.com",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "bench",
    "GIT_COMMITTER_EMAIL": "bench@example.com",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
}


def git(directory: Path, *words) -> str:
    """Runs git in a directory, with no configuration of the machine's."""
    return command([programs.system("git"), "-C", directory, *words], env=os.environ | GIT_ENV)


def archive(directory: Path, files: int) -> Path:
    """An archive of `tree/` with that many files, committed."""
    tree = directory / "tree"
    write_files(tree, files)
    git(tree, "init", "--quiet", "--initial-branch=main")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "A tree")
    git(tree, "repack", "-a", "-d", "--quiet")
    git(tree, "prune-packed", "--quiet")
    path = directory / "tree.tar"
    order = ["--sort=name", "--mtime=2026-01-01", "--owner=0", "--group=0"]
    command([programs.system("tar"), "-C", directory, *order, "-cf", path, "tree"])
    shutil.rmtree(tree)
    return path


def write_files(tree: Path, files: int) -> None:
    """Files of 0 to 64 KiB, half of them below 3 KiB, as in a source tree."""
    randomness = random.Random(files)
    for number in range(files):
        folder = tree / f"module-{number // FILES_PER_FOLDER // 10}" / f"part-{number // FILES_PER_FOLDER % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        len_bytes = min(65536, int(randomness.lognormvariate(8, 1.2)))
        words = " ".join(randomness.choices(WORDS, k=len_bytes // 6 + 1))
        (folder / f"file-{number}.rs").write_text(words[:len_bytes])
