"""
A hook of MkDocs: relative links to files outside `docs/`, such as programs, work on GitHub as they stand. For the
site, each such file or folder gets a page that shows it, and the links lead there.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()[^)#\s:]+(?=[)#])")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".toml": "toml"}
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def page_of(path: str) -> str:
    """Where on the site a file is, of which `path` is the path in the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def path_of(page: str) -> str:
    """The inverse of `page_of`."""
    return page.removeprefix("source/").removesuffix(".md") if page.startswith("source/") else f"docs/{page}"


def linked_path(link: str, page: str) -> str:
    """The path in the repository of what a page links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path_of(page)), link))


def show(path: Path) -> str:
    """A page with a Markdown file, another file's text, or the texts of a folder's files."""
    if path.suffix == ".md":
        return NOT_SEARCHED + path.read_text(encoding="utf-8")
    files = [file for file in sorted(path.iterdir()) if file.is_file()] if path.is_dir() else [path]
    parts = [f"{NOT_SEARCHED}# {path.relative_to(ROOT).as_posix()}\n"]
    for file in files:
        heading = f"## {file.name}\n\n" if path.is_dir() else ""
        language = LANGUAGES.get(file.suffix, "text")
        parts.append(f"{heading}`````{language}\n{file.read_text(encoding='utf-8').rstrip()}\n`````\n")
    return "\n".join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = list(files.documentation_pages())
    for page in pages:
        if not path_of(page.src_uri).endswith(".md"):
            continue
        for link in LINK.findall(page.content_string):
            path = linked_path(link, page.src_uri)
            if path.startswith(("docs/", "..", "/")) or files.get_file_from_path(page_of(path)):
                continue
            if not (ROOT / path).exists():
                raise PluginError(f"{path_of(page.src_uri)} links to {link}, and there is no {path}.")
            pages.append(File.generated(config, page_of(path), content=show(ROOT / path)))
            files.append(pages[-1])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri
    if not path_of(name).endswith(".md"):
        return markdown
    folder = posixpath.dirname(name) or "."
    return LINK.sub(lambda match: posixpath.relpath(page_of(linked_path(match[0], name)), folder), markdown)
