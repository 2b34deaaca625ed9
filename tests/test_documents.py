"""README, docs, Makefile and the pages beside them say what is there: tree, links, targets, recipes, lengths.

That their commands and snippets work is tests/docs/test_pages.py's.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", *DOCS, "CONTRIBUTING.md", "CHANGELOG.md", "accelerate_configs/README.md", "benchmarks/README.md"]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links, as the usual renderers make it."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tree_is_the_repository():
    """Every top-level entry that git would keep is in the README's tree, and nothing else is."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [path for path in done.stdout.splitlines() if (ROOT / path).exists()]
    tree = next(block for block in code_blocks(README) if "run_xmatching.py  " in block).splitlines()
    shown = {line.split()[0].rstrip("/") for line in tree if line and not line.startswith(" ")}
    assert shown == {path.split("/")[0] for path in paths}
    floors = {line.split()[0].rstrip("/") for line in tree if re.match(r"  \w+/ ", line)}
    assert floors == {path.split("/")[1] for path in paths if re.match(r"imagedex/\w+/", path)}


def test_the_readme_is_short_and_so_is_every_page():
    assert len(README.splitlines()) <= 180
    assert {page: len(TEXT[page].splitlines()) for page in DOCS if len(TEXT[page].splitlines()) > 150} == {}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]) if not target.startswith("http")]
    for target in targets:
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


def test_every_page_of_docs_can_be_reached_from_the_readme():
    assert [page for page in DOCS if f"]({page})" not in README] == []


def test_make_lists_every_target_and_the_pages_name_no_other():
    phony = set(re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, flags=re.MULTILINE))
    command = ["make", "-C", str(ROOT), "--no-print-directory"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  (\S+) {2,}\S", listed.stdout, flags=re.MULTILINE)) == phony
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ((?:[a-z][a-z-]* ?)+)", TEXT[page], flags=re.MULTILINE)
        assert {target for targets in named for target in targets.split()} <= phony, page


def test_files_that_targets_use_exist():
    used = set(re.findall(r"(?<![\w/$)])((?:run_\w+\.py)|(?:recipes/\S+\.ya?ml)|(?:requirements\S*\.txt))", MAKEFILE))
    assert {"run_xmatching.py", "run_retrieval.py", "requirements.txt"} <= used
    assert [path for path in sorted(used) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    """Recipes, tests, benchmarks and modules, as paths from the root or as dotted names of modules."""
    paths = re.findall(
        r"(?<![\w/.-])((?:recipes|tests|benchmarks|imagedex|modeling|configuration)/[\w/.-]*\w)", TEXT[page]
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = re.findall(r"\bimagedex(?:\.\w+)+", TEXT[page])
    assert [name for name in modules if not module_exists(name.split(".")[1:])] == []


def module_exists(parts: list[str]) -> bool:
    """A module, or a name within one."""
    for start in (ROOT / "imagedex", ROOT):
        for end in (len(parts), len(parts) - 1):
            path = start.joinpath(*parts[:end])
            if end and (path.is_dir() or path.with_suffix(".py").is_file()):
                return True
    return False


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("benchmarks/*.py"))]
)
def test_pages_name_no_folder_outside_the_repository(page):
    assert re.findall(r"\.\./shared\S*", (ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("command", ["compare_identifiers.py", "compare_losses.py --corpus photos", "word_search.py"])
def test_a_benchmark_that_wants_photographs_says_so_in_one_line(command):
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "--dataset_name" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
