"""Hooks of MkDocs: links from the pages of docs/ to other files of the repository work in the site, too.

A page may link to `../../benchmarks/results/memory.json`, as a reader of the repository expects. In the site, such a
file is in the folder `repository/`, and the link points there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
FOLDER = "repository"

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_ADDRESS = re.compile(r"[a-z]+:|/", re.IGNORECASE)


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that a page links to, and those that these link to."""
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for match in _LINK.finditer(page.content_string):
            path = _in_repository(page.src_uri, match[2])
            if path is None or _in_site(path) in files.src_uris or not (ROOT / path).is_file():
                continue
            file = File.generated(
                config, _in_site(path), abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(file)
            if path.endswith(".md"):
                waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links point into the site."""

    def change(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        target = posixpath.relpath(_in_site(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    return _LINK.sub(change, markdown)


def _in_repository(src_uri: str, link: str) -> str | None:
    """Return the path that a page links to, from the root of the repository; None for an address elsewhere."""
    if _ADDRESS.match(link):
        return None
    own = src_uri.removeprefix(f"{FOLDER}/") if src_uri.startswith(f"{FOLDER}/") else f"docs/{src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(own), link))


def _in_site(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{FOLDER}/{path}"
