"""Every command and every snippet of README and docs is carried out, with small stand-ins for what cannot be had."""

import os
import re
import shutil
from collections import Counter

import huggingface_hub
import pytest
from docs.page_blocks import (
    PAGES,
    SCRIPTS,
    Step,
    carry_out,
    check_extras,
    how,
    outputs_of,
    parse,
    run_script,
    split_command,
    steps_of,
    taken_for_granted,
)
from docs.stand_ins import EARLIER, HUB, NOT_CODE, NOT_RUN, ROOT, TEXTS, furnish, hub_cache

from imagedex.commands import PARSERS

STEPS = {page: steps_of(page) for page in PAGES}
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_clip, tiny_siglip):
    """Every name of the Hub that the pages use has been downloaded, and the network is gone."""
    folder = hub_cache(tmp_path_factory.mktemp("hub"), {"tiny_clip": tiny_clip, "tiny_siglip": tiny_siglip})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, hub, flickr_folder):
    """make(name): the folder of a run that a page takes from another page; made once."""
    folder = tmp_path_factory.mktemp("workshop")

    def make(name, write_shard):
        if not (folder / "recipes").exists():
            furnish(folder, flickr_folder, write_shard)
        if not (folder / name).exists():
            before = os.getcwd()
            os.chdir(folder)
            try:
                for command in EARLIER[name]:
                    run_script(command)
            finally:
                os.chdir(before)
        return folder / name

    return make


@pytest.mark.parametrize("page", [page for page in PAGES if STEPS[page]])
def test_a_page_does_what_it_says(page, workshop, flickr_folder, write_shard, tmp_path, monkeypatch):
    """In one folder, in the page's order: later commands find what earlier ones made."""
    folder = tmp_path / "reader"
    folder.mkdir()
    furnish(folder, flickr_folder, write_shard)
    monkeypatch.chdir(folder)
    namespace = {"__name__": "snippet"}
    for step in STEPS[page]:
        print(f"== {step}")
        for name in taken_for_granted(step.text):
            if not (folder / name).exists():
                shutil.copytree(workshop(name, write_shard), folder / name)
        carry_out(step, namespace)
        if how(step) == "script" and (written := outputs_of(step.text)):
            assert any(written.iterdir()), step


def test_nothing_is_forgotten_and_no_entry_of_a_table_is_idle():
    kinds = Counter(how(step) for steps in STEPS.values() for step in steps)
    assert set(NOT_RUN) | set(NOT_CODE) <= set(kinds)
    assert kinds["script"] > 20 and kinds["snippet"] >= 8
    everything = "\n".join(TEXT.values()) + "\n".join(p.read_text() for p in (ROOT / "recipes").rglob("*.yaml"))
    assert [name for name in (*HUB, *TEXTS, *EARLIER) if name not in everything] == []


def test_what_nobody_thought_of_fails():
    for text in ("rm -r runs", "python train.py --x 1", "makefile"):
        with pytest.raises(AssertionError, match="neither run nor listed"):
            how(Step("page.md", 1, "bash", text))
    with pytest.raises(AssertionError, match="bash, python or in no language"):
        how(Step("page.md", 1, "sh", "make test"))


def test_steps_are_found_where_they_stand():
    """Continued lines are one command; a comment of a line of its own is none."""
    steps = STEPS["docs/search.md"]
    assert steps[0].text.startswith(
        "python run_retrieval.py --model_name_or_path runs/mine --image_dir my_photos/images --queries"
    )
    lines = TEXT["docs/search.md"].splitlines()
    assert all(lines[step.line - 1].split()[:2] == step.text.split()[:2] for step in steps)


def inline(page: str) -> list[str]:
    """Inline code, fenced blocks left out."""
    text = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_are_read_by_the_scripts_parsers(page):
    """Whole ones (with what a run needs) are parsed; of all others the flags are known."""
    for command in inline(page):
        found = re.search(r"\b(run_\w+)\.py .*--", command)
        if not found or "…" in command or "launch" in command:
            continue
        script, argv = split_command(command.removeprefix("python "))
        needed = {"run_retrieval": ["--model_name_or_path", "m", "--queries", "q", "--output_dir", "o"]}
        parse(script, [*argv, *needed.get(script, ["--use_cpu"])])
    check_extras(" ".join(inline(page)))


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z]\w*", text))


# Flags that other programs have, where a page names them outside a fenced block.
FOREIGN = {
    "README.md": {"--help", "--help_all"},
    "docs/training.md": {"--help", "--help_all"},
    "docs/from_the_originals.md": {"--config_file", "--num_machines", "--machine_rank"},
}


@pytest.fixture(scope="module")
def known_flags():
    """Of all scripts together."""
    import importlib

    from imagedex.command_line import Parser

    parsers = [Parser(importlib.import_module(f"imagedex.{script}").ARGUMENTS) for script in SCRIPTS]
    parsers += [make() for make in PARSERS.values()]
    return set().union(*(parser._option_string_actions for parser in parsers))


@pytest.mark.parametrize("page", PAGES)
def test_flags_named_in_sentences_and_tables_exist(page, known_flags):
    """In the tables of the originals, only our column counts."""
    text = "\n".join(inline(page))
    if page == "docs/from_the_originals.md":
        rows = [line.split(" | ") for line in TEXT[page].splitlines() if line.startswith("| ")]
        text = "\n".join(cell for row in rows for cell in row[1:])
    assert flags(text) - known_flags - FOREIGN.get(page, set()) == set()


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_commands_at_the_head_of_a_recipe_are_read_by_the_parsers(recipe):
    head = [line[1:] for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(head).replace("\\\n", " ")
    for line in re.findall(r"^ +((?:python run_|accelerate launch).*)$", text, flags=re.MULTILINE):
        step = Step(recipe.name, 1, "bash", " ".join(line.split()))
        if how(step) == "script":
            script, argv = split_command(step.text)
            assert recipe == ROOT / argv[0] or recipe.parent == (ROOT / argv[0]).parent
            parse(script, [*argv, *([] if script == "run_retrieval" else ["--use_cpu"])])
        else:
            carry_out(step, {})
    assert [path for path in re.findall(r"imagedex/[\w/]+\.py|docs/\w+\.md", text) if not (ROOT / path).exists()] == []
