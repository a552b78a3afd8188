"""Real English text and code that is at hand without a network.

    cpython-docs       prose of CPython's documentation, in every CPython
    stdlib             CPython's standard library, its source, but for one file in ten
    stdlib-held-out    those files
    fortunes           Debian's package ``fortunes``
    debian-handbook    Debian's package ``debian-handbook``

Any other name is that of a text file.
"""

from __future__ import annotations

import html
import re
import sysconfig
from pathlib import Path

from grinqh_ao import running

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
FORTUNES = Path("/usr/share/games/fortunes")


def load(name: str) -> str:
    if name == "cpython-docs":
        return running.english_prose()
    if name == "fortunes":
        return _fortunes()
    if name == "debian-handbook":
        return _handbook()
    if name in ("stdlib", "stdlib-held-out"):
        return stdlib(held_out=name != "stdlib")
    return Path(name).read_text()


def stdlib(held_out: bool) -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = [
        file
        for file in sorted(folder.rglob("*.py"))
        if not skipped & set(file.relative_to(folder).parts)
    ]
    chosen = [file for i, file in enumerate(files) if (i % 10 == 9) == held_out]
    return "\n\n".join(file.read_text(errors="ignore") for file in chosen)


def _fortunes() -> str:
    files = [f for f in sorted(FORTUNES.glob("*")) if f.is_file() and not f.suffix]
    if not files:
        raise SystemExit(f"nothing in {FORTUNES}: apt-get install fortunes")
    entries = [e.strip() for f in files for e in f.read_text(errors="ignore").split("\n%\n")]
    return "\n\n".join(entry for entry in entries if len(entry.split()) >= 40)


def _handbook() -> str:
    paragraphs = []
    for page in sorted(HANDBOOK.glob("*.html")):
        for found in re.findall(r'<div class="para">(.*?)</div>', page.read_text(), re.DOTALL):
            paragraph = " ".join(html.unescape(re.sub("<[^>]+>", "", found)).split())
            if len(paragraph) > 200:
                paragraphs.append(paragraph)
    if not paragraphs:
        raise SystemExit(f"no page in {HANDBOOK}: apt-get install debian-handbook")
    return "\n\n".join(paragraphs)
