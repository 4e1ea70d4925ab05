"""The documents keep their word: the README's examples run, and no link leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blocklib.options.tables import CREATE, OPEN

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_library_example_of_the_readme_prints_what_it_says(tmp_path: Path) -> None:
    (example,) = _blocks("python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (promised,) = re.findall(r"print\(disk\)\s+# (.*)", example)
    assert done.stdout.splitlines()[0] == promised


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    (commands,) = [block for block in _blocks("sh") if block.startswith("blocklib")]
    script = f'set -eu\nblocklib() {{ "{sys.executable}" -m blocklib "$@"; }}\n{commands}'
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    lost = [link for link in links if "://" not in link and not os.path.lexists((ROOT / page).parent / link)]
    assert not lost


def test_every_test_that_a_support_table_names_is_where_it_says() -> None:
    page = ROOT / "docs" / "qcow2-support.md"
    named = re.findall(r"\[`(test_\w+)`\]\(([^)#\s]+)\)", page.read_text())
    lost = [(test, path) for test, path in named if f"def {test}(" not in (page.parent / path).read_text()]
    assert len(named) > 80
    assert not lost


def test_every_option_of_qcow2_stands_in_the_support_table() -> None:
    page = (ROOT / "docs" / "qcow2-support.md").read_text()
    names = {option.name for table in (OPEN, CREATE) for option in table["qcow2"]}
    families = {name if "." not in name else name.split(".")[0] for name in names}
    missing = [name for name in sorted(families) if f"`{name}" not in page]
    assert not missing
