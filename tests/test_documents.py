"""README, Makefile and the pages beside them say what is there: tree, links, targets, flags."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "accelerate_configs/README.md"]
SCRIPTS = ["run_xmatching.py", "run_image_indexing.py", "run_dsi.py", "run_retrieval.py"]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(script: str) -> list[str]:
    """The README's command lines that run `script`, from code blocks (continued lines joined) and from inline code."""
    blocks = [block.replace("\\\n", " ") for block in code_blocks(README)]
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    return [text for text in lines + re.findall(r"`([^`\n]+)`", README) if f"{script} " in text and "--" in text]


def test_the_tree_is_the_repository():
    """Every top-level entry that git would keep is in the README's tree, and nothing else is."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    existing = {path.split("/")[0] for path in done.stdout.splitlines() if (ROOT / path).exists()}
    tree = next(block for block in code_blocks(README) if "run_xmatching.py  " in block)
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    assert shown == existing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith(("http", "#"))]
    assert [target for target in targets if not ((ROOT / page).parent / target.split("#")[0]).exists()] == []


def test_make_lists_every_target_and_the_pages_name_no_other():
    phony = set(re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, flags=re.MULTILINE))
    command = ["make", "-C", str(ROOT), "--no-print-directory"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  (\S+) {2,}\S", listed.stdout, flags=re.MULTILINE)) == phony
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?:^|`)make ((?:[a-z][a-z-]* ?)+)", text, flags=re.MULTILINE)
        assert {target for targets in named for target in targets.split()} <= phony, page


def test_files_that_targets_use_exist():
    used = set(re.findall(r"(?<![\w/$)])((?:run_\w+\.py)|(?:recipes/\S+\.ya?ml)|(?:requirements\S*\.txt))", MAKEFILE))
    assert {"run_xmatching.py", "run_retrieval.py", "requirements.txt"} <= used
    assert [path for path in sorted(used) if not (ROOT / path).exists()] == []


@functools.cache
def flags_of(script: str) -> set[str]:
    """Every flag that --help knows."""
    shown = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][\w@-]*", shown.stdout))


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_in_the_readme_exist(script):
    """Flags of command lines and of the table of the originals' flags; --help knows every one."""
    known = flags_of(script)
    text = " ".join(command.split(script, 1)[1] for command in commands(script))
    if script == "run_xmatching.py":
        table = README.split("The flags of `xmatching/main.py`:")[1].split("###")[0]
        rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ")]
        text += " ".join(ours for ours in rows if "accelerate launch" not in ours)
    flags = set(re.findall(r"--[a-z]\w*", text))
    assert len(flags) >= 5
    assert sorted(flags - known) == []


def test_flags_named_beside_commands_exist():
    """Of the section on generative models: every flag in inline code is one of some script's."""
    section = README.split("## Generative retrieval\n")[1].split("\n## ")[0]
    named = re.findall(r"--[a-z]\w*", " ".join(re.findall(r"`([^`\n]+)`", section)))
    assert len(named) > 10
    assert set(named) <= set().union(*map(flags_of, SCRIPTS))


def test_recipes_in_the_pages_exist():
    for page in PAGES:
        named = re.findall(r"(?<![\w/])recipes/[\w/.-]*\w", (ROOT / page).read_text(encoding="utf-8"))
        assert [name for name in named if not (ROOT / name).exists()] == [], page
