"""What the documents name exists."""

import re

import pytest

from support.server import PROJECT

OPERATIONS = PROJECT / "docs" / "operations.md"
ATTACHING = PROJECT / "docs" / "attaching.md"
CHECKING = PROJECT / "docs" / "checking.md"
PLACES = {".py": PROJECT / "tests" / "e2e", ".rs": PROJECT / "crates"}
RECIPES = sorted((PROJECT / "docs" / "recipes").glob("*.md"))
STANDING_BY = PROJECT / "docs" / "high-availability.md"
TEXTS = "".join(path.read_text() for path in [OPERATIONS, ATTACHING, CHECKING, STANDING_BY, *RECIPES])
NAMED = sorted(set(re.findall(r"`(\w+\.(?:py|rs))::(\w+)`", TEXTS)))


@pytest.mark.parametrize("file, name", NAMED)
def test_every_test_that_the_documents_name_exists(file, name):
    texts = [path.read_text() for path in PLACES[file[-3:]].rglob(file)]
    found = [text for text in texts if re.search(rf"^ *(async )?(def|fn) {name}\(", text, re.MULTILINE)]
    assert len(found) == 1, f"there is no {name} in {file}, or more than one"


def test_every_failure_is_shown_by_a_test():
    rows = [line for line in OPERATIONS.read_text().splitlines() if line.startswith("|")]
    failures = [row for row in rows if not row.startswith("|---") and "shown by" not in row]
    assert len(failures) > 20 and len(NAMED) > 20
    for row in failures:
        last = row.strip("| ").rsplit("|", 1)[-1]
        assert "::" in last or "durability.md" in last, f"nothing shows this: {row}"
