"""Every link of the pages leads somewhere, and every page can be reached."""

import re
from pathlib import Path

import pytest

from pages import PAGES, ROOT

FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
SOURCES = [
    path
    for folder in ("hipexp", "kernels", "tests", "conf")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".md", ".sh")
]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    made = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        made.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return made


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead, but for those to other hosts."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for pair in LINK.findall(text) for target in pair if target and "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: there is no {there}"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading among {sorted(anchors(there))}"


def test_anchors_are_those_of_github(tmp_path):
    (tmp_path / "page.md").write_text(
        "# A better InfiniteHiP: `3stage_plus`\n## Does it fit?\n```\n# no heading\n```\n## ∞Bench (`x`)\n## Does it fit?\n"
    )
    assert anchors(tmp_path / "page.md") == {"a-better-infinitehip-3stage_plus", "does-it-fit", "bench-x", "does-it-fit-1"}


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    named = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert named >= {page for page in PAGES if page != index}


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(ROOT / "docs")], ids=lambda page: page.name)
def test_every_page_leads_back_to_the_index(page):
    index = ROOT / "docs" / "README.md"
    assert page == index or index in {(page.parent / target.partition("#")[0]).resolve() for target in links(page)}


def test_pages_that_sources_name_exist():
    named = {(path, page) for path in SOURCES for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8"))}
    assert len(named) > 10
    assert not [(str(path.relative_to(ROOT)), page) for path, page in named if not (ROOT / page).exists()]


def test_pictures_are_shown():
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    assert {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg")} <= shown
