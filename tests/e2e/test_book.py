"""The documents as a book: every page is in its table of contents, and every link leads somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

from support.server import PROJECT

DOCS = PROJECT / "docs"
CONTENTS = DOCS / "SUMMARY.md"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path != CONTENTS)
OTHERS = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def links(path: Path) -> list[str]:
    """What a page links to, but for other sites."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text()))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(path: Path) -> set[str]:
    """The names of a page's headings, as GitHub and mdBook make them."""
    names: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        names[kept] = names.get(kept, -1) + 1
    return {name if number == 0 else f"{name}-{number}" for name, last in names.items() for number in range(last + 1)}


def test_every_page_is_in_the_table_of_contents_once():
    listed = [CONTENTS.parent / link for link in links(CONTENTS)]
    assert len(PAGES) > 20
    assert sorted(listed) == PAGES


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"
        if page in PAGES:
            assert target.is_relative_to(DOCS), f"{link} leads out of the book"


def test_there_is_something_to_check():
    assert sum(len(links(page)) for page in PAGES) > 40


def test_the_book_is_made_of_these_pages():
    book = tomllib.loads((DOCS / "book.toml").read_text())
    assert book["book"]["src"] == "." and book["output"]["html"]["search"]
