"""Hooks of mkdocs: pages from the repository's root, and links that leave docs/.

The documents are read in two ways: in the repository, where a link to a source file works, and as a site, which has no
source files and, since no address of the repository is known, nothing to point to. On the site such a link becomes its
own text. A link to a file that does not exist is an error in both.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add CONTRIBUTING.md and CHANGELOG.md as pages."""
    for name, page in _FROM_ROOT.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Resolve links that leave docs/: to a page made from a root file, or to the link's text alone."""
    source = page.file.src_uri
    from_root = source in _FROM_ROOT.values()

    def resolved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if from_root and (ROOT / "docs" / target).exists():
            return match[0]
        path = posixpath.normpath(posixpath.join("" if from_root else f"docs/{posixpath.dirname(source)}", target))
        if path.startswith("docs/"):
            return match[0]
        if path in _FROM_ROOT:
            to = posixpath.relpath(_FROM_ROOT[path], posixpath.dirname(source) or ".")
            return f"[{text}]({to}{anchor})"
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: the link to {target!r} leads to {path!r}, which does not exist")
        return text

    return _LINK.sub(resolved, markdown)
