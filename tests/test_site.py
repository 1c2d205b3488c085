"""docs/ builds as a site from plain Markdown, with the API reference, and needs nothing from elsewhere."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built so that a warning is an error."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def words(page: Path) -> str:
    """Return a page's text."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_every_document_is_a_page(site: Path) -> None:
    """Each Markdown file is there, and in the menu of all pages."""
    menu = (site / "using.html").read_text(encoding="utf-8")
    for document in (ROOT / "docs").rglob("*.md"):
        name = document.relative_to(ROOT / "docs").with_suffix(".html").as_posix().replace("README", "index")
        assert (site / name).exists()
        assert f'href="{name}"' in menu, name


@pytest.mark.parametrize(
    "text",
    [
        "Open a session with a zone's gateway on this host",
        "return N rows for N rows, in order",
        "Call it once in each of the instance's sandboxes",
        "each lease is sent it once",
        "GPU actors that work at once",
        "Policy refuses; nothing left the zone",
        "A sandbox of a stateful class's instance is gone",
    ],
)
def test_reference_has_the_docstrings(site: Path, text: str) -> None:
    """What docstrings say of sessions, functions, classes, options and errors is in the reference."""
    assert text in words(site / "api.html")


def test_nothing_from_elsewhere(site: Path) -> None:
    """No page loads a script, style or picture from another host."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", page.read_text(encoding="utf-8")
        )
        assert loaded == [], page.name
