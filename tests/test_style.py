"""Density and length: the limits that keep files readable. What they mean is for a reader to judge."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("tasks/*.py")), *sorted(ROOT.glob("training/*.py"))]
EVERY = list(LIBRARY)
for folder in ("tests", "experiments", "benchmarks"):
    EVERY += sorted((ROOT / folder).glob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def functions(tree):
    """(name, number of lines) of every function."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def docstring_lines(tree):
    """The line numbers of all docstrings."""
    numbers = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) or ast.get_docstring(node) is None:
            continue
        text = node.body[0]
        numbers |= set(range(text.lineno, text.end_lineno + 1))
    return numbers


def density(*paths):
    """Syntax nodes per line of code, without docstrings, comments and blanks."""
    nodes = lines = 0
    for path in paths:
        text = path.read_text()
        tree = ast.parse(text)
        nodes += sum(1 for _ in ast.walk(tree))
        documented = docstring_lines(tree)
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if line and not line.startswith("#") and number not in documented:
                lines += 1
    return nodes / lines


def test_density_counts_nodes_of_code_lines_only(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""Text."""\n\n# a comment\nx = 1\n')
    # Module, Expr and Constant of the docstring, Assign, Name, Store, Constant
    assert density(file) == 7


def test_the_loop_is_no_denser_than_those_people_hold_up_as_models():
    assert density(ROOT / "train.py") <= 11


@pytest.mark.parametrize("folder, limit", [("experiments", 1500), ("benchmarks", 500)])
def test_programs_around_it_stay_small(folder, limit):
    paths = sorted((ROOT / folder).glob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in paths) <= limit
    assert density(*paths) <= 11


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_file_is_longer_than_a_reader_bears(path):
    limit = 380 if path.name == "train.py" else 420
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_function_is_longer_than_a_screen_but_the_loop(path):
    limit = 130 if path == ROOT / "train.py" else 60
    too_long = [(name, lines) for name, lines in functions(ast.parse(path.read_text())) if lines > limit]
    assert not too_long


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_no_line_is_wider_than_120_columns(path):
    wide = [number for number, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 120]
    assert not wide
