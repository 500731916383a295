"""What the site does beyond mkdocs: links to the source tree, notebooks as pages, and nothing from another host.

mkdocs calls the functions `on_…`; griffe, which reads docstrings, calls `JoinedNames`. Warnings end a strict build.
"""

from __future__ import annotations

import logging
import pathlib
import re
from typing import Any

import griffe
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOG = logging.getLogger("mkdocs.hooks")
LINK = re.compile(r"(!?\[[^\]\n]*\])\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```[ \t]*$", re.DOTALL | re.MULTILINE)
OTHER_HOST = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"' >]+[^>]*>")
IS_NO_LOAD = re.compile(r"rel=[\"']?(?:canonical|prev|next|alternate|edit)")


def on_files(files: Files, config: Any) -> Files:
    """Make a page of every notebook under tutorials/, with the outputs that stand in it."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        body, resources = MarkdownExporter().from_filename(notebook.abs_src_path)
        files.remove(notebook)
        stem = pathlib.PurePosixPath(notebook.src_uri).with_suffix("")
        for name, data in resources.get("outputs", {}).items():
            body = body.replace(f"]({name})", f"]({stem.name}-{name})")
            files.append(File.generated(config, f"{stem}-{name}", content=data))
        link = f"[Open it as a notebook]({config.repo_url}/blob/main/docs/{notebook.src_uri})."
        head, _, rest = body.partition("\n\n")
        files.append(File.generated(config, f"{stem}.md", content=f"{head}\n\n{link}\n\n{rest}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave docs/ into links to the source tree, and let Markdown stand inside <details>."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        there = (folder / path).resolve()
        inside = there.is_relative_to(ROOT / "docs") and not there.is_dir()
        if inside and there.suffix == ".ipynb":
            return f"{text}({path.removesuffix('.ipynb')}.md{hash_}{anchor})"
        if inside and there.suffix not in (".py", ".jsonl"):
            return found[0]
        if not there.exists() or not there.is_relative_to(ROOT):
            LOG.warning("%s: the link to %s leads to no file of the repository", page.file.src_uri, target)
        kind = "tree" if there.is_dir() else "blob"
        return f"{text}({config.repo_url}/{kind}/main/{there.relative_to(ROOT).as_posix()}{hash_}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    text = "".join([*parts, LINK.sub(link, markdown[end:])])
    return text.replace("<details>", '<details markdown="1">')


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn of a script, style, font or picture that a reader's browser would fetch from another host."""
    for tag in OTHER_HOST.findall(output):
        if not IS_NO_LOAD.search(tag):
            LOG.warning("%s: loads from another host: %s", page.file.src_uri, tag)
    return output


class JoinedNames(griffe.Extension):
    """Read `base, key, names: not used.` under Args as one line for each name."""

    LINE = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*)$", re.MULTILINE)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            text = func.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            func.docstring.value = self.LINE.sub(self._apart, text)

    @staticmethod
    def _apart(found: re.Match[str]) -> str:
        return "\n".join(f"{found['indent']}{name}: {found['text']}" for name in found["names"].split(", "))
