"""The repository as a whole: layers of imports, files that can be carried away, what no file may hold."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IDEAS = """vit masking mae mirl hierarchical mixmim mixer resnet sam geometry supcon robust pyramid detect
    segment""".split()
DATA = "shapes files schema augment data coco semantic formats checkpoints".split()
ENTRY = [name for name in ("train", "predict") if (ROOT / f"{name}.py").exists()]
PACKAGES = ("tasks", "training")
OURS = {"shapes", "files", "schema", "data", "formats", "checkpoints", "train", "predict"}  # they implement no paper

CONCEPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ENTRY)
MODULES = [*CONCEPTS, *ENTRY]
for package in PACKAGES:
    MODULES += sorted(f"{package}.{path.stem}".removesuffix(".__init__") for path in (ROOT / package).glob("*.py"))


def file_of(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def source(module):
    return file_of(module).read_text()


def docstring(module):
    return ast.get_docstring(ast.parse(source(module))) or ""


def needed(name):
    """The files that the docstring's "Needs:" names."""
    needs = re.search(r"Needs:(.*?)(?=Demo:|\Z)", docstring(name), re.S)
    return set(re.findall(r"(\w+)\.py", needs[1] if needs else "")) - {name}


def imports(module):
    """What of ours a file imports: at the top, and anywhere (in functions, under the main guard)."""
    top, anywhere = set(), set()
    tree = ast.parse(source(module))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        ours = {name.split(".")[0] for name in names} & {*CONCEPTS, *ENTRY, *PACKAGES}
        anywhere |= ours
        if node in tree.body:
            top |= ours
    return top, anywhere


def copy(name, folder):
    """A file and what it needs, alone in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in {name} | needed(name):
        shutil.copy(ROOT / f"{file}.py", folder)
    return folder


def environment():
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    return {**clean, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------------- many scripts from one interpreter

FORK = """
import json, os, runpy, sys, traceback
import torch, torchvision, einops, tqdm, torchvision.transforms.v2, torch.utils.flop_counter  # loaded once for all
torch.set_num_threads(1)
sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
failed = {}
for name, (folder, code) in json.load(sys.stdin).items():
    sys.stdout.flush()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        error = ""
        try:
            os.chdir(folder)
            sys.path.insert(0, folder)
            exec(code, {})
        except BaseException:
            error = traceback.format_exc()[-2000:]
        os.write(write, error.encode())
        os._exit(0)
    os.close(write)
    error = os.fdopen(read).read()
    if error or os.waitpid(child, 0)[1]:
        failed[name] = error
print()
print(json.dumps(failed))
"""


def run_each(jobs, cwd, limit=300):
    """Run {name: (folder, code)}, each in a process in which none of our files is loaded yet -> {name: error}"""
    options = dict(input=json.dumps(jobs), capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", FORK], cwd=cwd, env=environment(), timeout=limit, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IMPORT = """import warnings
warnings.simplefilter("error", DeprecationWarning); warnings.simplefilter("error", FutureWarning)
import {0}
import sys
assert sys.modules["{0}"].__file__.startswith({1!r}), sys.modules["{0}"].__file__"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Imports and quick demos, all from one interpreter: starting it is what takes the time."""
    folder = tmp_path_factory.mktemp("repository")
    jobs = {}
    for module in MODULES:
        jobs[f"import {module}"] = str(ROOT), IMPORT.format(module, str(ROOT))
    for name in CONCEPTS:
        alone = str(copy(name, folder / name))
        jobs[f"alone {name}"] = alone, IMPORT.format(name, alone)
    for name in ("masking", "checkpoints"):
        jobs[f"demo {name}"] = str(folder / name), f"import runpy; runpy.run_path('{name}.py', run_name='__main__')"
    return run_each(jobs, folder)


# ---------------------------------------------------------------------------- files


def test_every_file_has_its_place_in_a_layer():
    assert set(CONCEPTS) == {*IDEAS, *DATA}


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_every_file_imports_without_a_deprecation_warning(outcomes, module):
    assert f"import {module}" not in outcomes, outcomes[f"import {module}"]


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_file_copied_with_what_it_needs_imports_in_an_empty_folder(outcomes, name):
    assert f"alone {name}" not in outcomes, outcomes[f"alone {name}"]


@pytest.mark.parametrize("name", CONCEPTS)
def test_needs_names_what_is_imported_and_nothing_else(name):
    imported = imports(name)[1]
    before = set()
    while before != imported:  # what is needed by what is needed
        before = set(imported)
        for other in before:
            imported |= imports(other)[0]
    assert needed(name) == imported - {name}


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_imports_only_ideas_before_it_and_its_demo_only_ideas_and_shapes(name):
    top, anywhere = imports(name)
    assert top <= set(IDEAS[:IDEAS.index(name)])
    assert anywhere <= {*IDEAS, "shapes"}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in IDEAS])
def test_imports_point_one_way(module):
    layer = module.split(".")[0]
    below = {*IDEAS, *DATA}
    if layer in ("training", "tasks", *ENTRY):
        below |= {"training"}
    if layer in ("tasks", *ENTRY):
        below |= {"tasks"}
    assert imports(module)[1] <= below


@pytest.mark.parametrize("name", [*CONCEPTS, *ENTRY])
def test_every_file_says_where_it_comes_from_what_it_needs_and_how_to_run_it(name):
    text = docstring(name)
    assert "Needs: " in text
    assert name in OURS or re.search(r"arXiv \d{4}\.\d{4,5}", text)
    assert f"python {name}.py" in text and '__name__ == "__main__"' in source(name)


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] in PACKAGES])
def test_every_module_of_a_package_begins_with_what_it_is(module):
    assert docstring(module)


@pytest.mark.parametrize("name", ["masking", "checkpoints"])
def test_the_quick_demos_run_in_an_empty_folder(outcomes, name):
    assert f"demo {name}" not in outcomes, outcomes[f"demo {name}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONCEPTS)
def test_every_demo_runs_in_an_empty_folder_and_saves_the_pictures_it_names(tmp_path, name):
    words = [sys.executable, f"{name}.py"]
    options = dict(env=environment(), capture_output=True, text=True, timeout=300)
    done = subprocess.run(words, cwd=copy(name, tmp_path), **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    pictures = set(re.findall(r"\b\w+\.png", docstring(name)))
    assert pictures <= {path.name for path in tmp_path.glob("*.png")}, done.stdout


# ---------------------------------------------------------------------------- what no file may hold


def tracked():
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def texts():
    for path in tracked():
        if path.name == Path(__file__).name:  # it holds the forbidden words
            continue
        try:
            yield path, path.read_text()
        except UnicodeDecodeError:
            pass


def lines_with(pattern, with_tests):
    for path, text in texts():
        if "tests" in path.parts and not with_tests:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(pattern, line):
                yield f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"


@pytest.mark.parametrize("pattern", [
    r"\.cuda\(\)", r"weights_only=False", r"\bpickle\.load", r"(?<![\w.])eval\(", r"\bexec\(", r"os\.system\("])
def test_no_file_outside_the_tests_holds(pattern):
    assert not list(lines_with(pattern, with_tests=False))


def test_no_file_holds_a_path_of_one_machine():
    assert not list(lines_with(r"(?<![\w.])/(work|root|home)/", with_tests=True))


def test_nothing_large_or_left_over_is_tracked():
    for path in tracked():
        assert path.stat().st_size < 2e6 and path.suffix not in (".pt", ".pth", ".pyc", ".tmp"), path
        assert path.relative_to(ROOT).parts[0] not in ("runs", "data"), path


def test_there_is_no_utils_file():
    assert not [path for path in tracked() if path.stem.startswith("util")]


def test_the_license_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert "MIT License" in text and "WITHOUT WARRANTY OF ANY KIND" in text
    assert re.search(r"Copyright \(c\) \d{4}", text)


def test_the_requirements_are_the_four_packages_without_exact_pins():
    text = (ROOT / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {re.match(r"[\w-]+", line)[0] for line in lines} == {"torch", "torchvision", "einops", "tqdm"}
    assert "==" not in text
