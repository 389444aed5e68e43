"""
What the pages take from elsewhere, so that nothing is written twice: measured results and changes from their own files, the
commands from their parsers. A hook of MkDocs.
"""

import contextlib
import io
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Page -> the file of the repository that it is.
TAKEN = {
    "results.md": "benchmarks/RESULTS.md",
    "reproductions.md": "benchmarks/reproduce/RESULTS.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are taken from elsewhere."""
    for page, source in TAKEN.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / "benchmarks").rglob("*.png")):
        place = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository lead to the pages that its files are; those to files that are no page become their names."""
    path = page.file.src_uri
    place = TAKEN.get(path, f"docs/{path}")
    folder = Path(place).parent
    pages = {source: name for name, source in TAKEN.items()}

    def lead(match: re.Match) -> str:
        start, target, anchor, end = match[1], match[2], match[3] or "", match[4]
        found = os.path.normpath(folder / target)
        if found in pages:
            return f"{start}{os.path.relpath(pages[found], Path(path).parent)}{anchor}{end}"
        if found.startswith("docs/") or (path in TAKEN and files.get_file_from_path(found) is not None):
            new = found.removeprefix("docs/")
            return f"{start}{os.path.relpath(new, Path(path).parent)}{anchor}{end}"
        if not (ROOT / found).exists():
            raise FileNotFoundError(f"{place} links to {target!r}, but there is no {found}.")
        return f"`{found}`"

    return _LINK.sub(lead, markdown)


def commands_page() -> str:
    """What `--help` says of every command."""
    from hf_doge.cli import COMMANDS

    os.environ["COLUMNS"] = "90"
    lines = ["# Commands", "", "```text", help_of().rstrip(), "```", ""]
    for command, purpose in COMMANDS.items():
        lines += [f"## hf-doge {command}", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
        lines += ["```text", help_of(command).rstrip(), "```", ""]
    return "\n".join(lines)


def help_of(*words: str) -> str:
    """What a command prints for `--help`, as one that calls it reads it."""
    from hf_doge.cli import main

    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        code = main([*words, "--help"])
    if code != 0:
        raise RuntimeError(f"`hf-doge {' '.join(words)} --help` must succeed, but its exit status is {code}.")
    return written.getvalue()
