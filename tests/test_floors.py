"""The house in order: what modeling/ may import, and files and functions that can be read in one sitting.

Which floor may import which is in pyproject.toml; `make lint` checks it.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = [
    path
    for folder in ("imagedex", "modeling", "configuration", "metrics", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + sorted(ROOT.glob("run_*.py"))
ON_THE_HUB = [path for path in PRODUCT if path.parts[len(ROOT.parts)] in ("modeling", "configuration")]
ALLOWED = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "PIL", *sys.stdlib_module_names}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", ON_THE_HUB, ids=name_of)
def test_what_travels_with_a_model_imports_nothing_of_ours(path):
    """They run alone on the Hub: relative imports, and libraries that whoever loads a model has. The one-line shims alone name
    `imagedex.configuration`, and are replaced by the real file when a model is saved."""
    shim = path.parent.name == "modeling" and path.name.startswith("configuration_")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        for name in names:
            if shim:
                assert name == f"imagedex.configuration.{path.stem}"
            else:
                assert name.split(".")[0] in ALLOWED, name


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_files_and_functions_can_be_read_in_one_sitting(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
