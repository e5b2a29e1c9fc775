import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in ROOT.glob("*.py"))
CONCEPTS = [name for name in FILES if name != "train"]
FLOOR_0 = {"vit", "mixer", "resnet", "masking", "sam", "geometry", "supcon", "robust", "shapes", "checkpoints"}
FLOOR_1 = {"mae", "mirl", "mixmim", "detect", "data"}
FLOOR_2 = {"segment", "coco", "semantic"}  # coco takes check_target from detect, both sets the draws of data
NO_PAPER = {"shapes", "data", "checkpoints"}  # ours; they may name no paper

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
SNIPPETS = [code for language, code in FENCES if language == "python"]
COMMANDS = [line.strip() for language, code in FENCES if language in ("", "sh", "bash", "shell", "console")
            for line in re.sub(r"\\\n\s*", " ", code).splitlines() if re.match(r"\s*(\$ )?(\w+=\S+ )*(python|torchrun) ", line)]


def source(name):
    return (ROOT / f"{name}.py").read_text()


def docstring(name):
    return ast.get_docstring(ast.parse(source(name))) or ""


def needed(name):
    """The files that the docstring's "Needs:" names."""
    needs = re.search(r"Needs:(.*?)(?=Demo:|\Z)", docstring(name), re.S)
    return {found for found in re.findall(r"(\w+)\.py", needs[1] if needs else "") if found != name}


def imports(name):
    """Our files that a file imports: at the top, and anywhere (in functions, under the main guard)."""
    top, anywhere = set(), set()
    tree = ast.parse(source(name))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        ours = {n.split(".")[0] for n in names if n} & set(FILES)
        anywhere |= ours
        if node in tree.body:
            top |= ours
    return top, anywhere


def copy(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file in {name} | needed(name):
        shutil.copy(ROOT / f"{file}.py", folder)
    return folder


def environment(**more):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    return {**clean, "OMP_NUM_THREADS": "1", **more}


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
    """Run {name: (folder, code)}, each in a process of its own in which none of our files is loaded yet; name: error text."""
    done = subprocess.run([sys.executable, "-c", FORK], input=json.dumps(jobs), cwd=cwd, env=environment(), capture_output=True, text=True,
                          timeout=limit)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IMPORT = """import warnings
warnings.simplefilter("error", DeprecationWarning); warnings.simplefilter("error", FutureWarning)
import {0}
assert {0}.__file__.startswith({1!r}), {0}.__file__"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Imports, quick demos and README blocks, all from one interpreter that has loaded torch: starting it is what takes the time."""
    folder = tmp_path_factory.mktemp("house")
    jobs = {f"import {name}": (str(ROOT), IMPORT.format(name, str(ROOT))) for name in FILES}
    for name in CONCEPTS:
        alone = str(copy(name, folder / name))
        jobs[f"alone {name}"] = alone, IMPORT.format(name, alone)
    for name in ("masking", "checkpoints"):
        jobs[f"demo {name}"] = str(folder / name), f"import runpy; runpy.run_path('{name}.py', run_name='__main__')"
    for i, code in enumerate(SNIPPETS):
        (folder / str(i)).mkdir()
        jobs[f"README {i}"] = str(folder / str(i)), f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
    return run_each(jobs, folder)


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", FILES)
def test_every_file_imports_without_a_deprecation_warning(outcomes, name):
    assert f"import {name}" not in outcomes, outcomes[f"import {name}"]


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_file_copied_with_what_it_needs_imports_in_an_empty_folder(outcomes, name):
    assert f"alone {name}" not in outcomes, outcomes[f"alone {name}"]


@pytest.mark.parametrize("name", CONCEPTS)
def test_needs_names_what_is_imported_and_nothing_else(name):
    below = imports(name)[1]
    for other in set(below):
        below |= imports(other)[0]  # what is needed by what is needed
    assert needed(name) == below


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_upward(name):
    top, anywhere = imports(name)
    assert "train" not in anywhere
    if name in FLOOR_0:
        assert not top
    if name in FLOOR_1:
        assert top <= FLOOR_0
    if name in FLOOR_2:
        assert top <= FLOOR_0 | FLOOR_1


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is_where_it_comes_from_and_what_it_needs(name):
    text = docstring(name)
    assert len(text.splitlines()) >= 5 and "Needs: torch" in text
    assert name in NO_PAPER or re.search(r"arXiv \d{4}\.\d{4,5}", text)
    assert name == "train" or f"python {name}.py" in text
    assert name == "train" or '__name__ == "__main__"' in source(name)


def run_demo(name, folder):
    done = subprocess.run([sys.executable, f"{name}.py"], cwd=copy(name, folder), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    return done.stdout


@pytest.mark.parametrize("name", ["masking", "checkpoints"])
def test_the_quick_demos_run_in_an_empty_folder(outcomes, name):
    assert f"demo {name}" not in outcomes, outcomes[f"demo {name}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONCEPTS)
def test_every_demo_runs_in_an_empty_folder_and_saves_what_it_says(tmp_path, name):
    out = run_demo(name, tmp_path)
    pictures = set(re.findall(r"\b\w+\.png", docstring(name)))
    assert pictures <= {path.name for path in tmp_path.glob("*.png")}, out


# ---------------------------------------------------------------------------- what no file may hold


def tracked():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def texts():
    for path in tracked():
        if path.name != Path(__file__).name:  # it holds the forbidden words
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                pass


@pytest.mark.parametrize("pattern", [r"\.cuda\(\)", r"weights_only=False", r"\bpickle\.load", r"(?<![\w.])eval\(", r"\bexec\(", r"os\.system\(",
                                     r"(?<![\w.])/(work|root|home)/"])
def test_no_file_holds(pattern):
    found = [f"{path.relative_to(ROOT)}:{n}: {line.strip()[:100]}" for path, text in texts() if "tests" not in path.parts or "work" in pattern
             for n, line in enumerate(text.splitlines(), start=1) if re.search(pattern, line)]
    assert not found, "\n".join(found)


def test_nothing_large_or_left_over_is_tracked():
    assert not [path for path in tracked() if path.stat().st_size > 2e6 or path.suffix in (".pt", ".pth", ".pyc", ".tmp")]
    assert not [path for path in tracked() if path.relative_to(ROOT).parts[0] in ("runs", "data")]


def test_there_is_no_utils_file():
    assert not [path for path in ROOT.rglob("util*.py") if ".git" not in path.parts and "site-packages" not in path.parts]


def test_the_licence_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert "MIT License" in text and "WITHOUT WARRANTY OF ANY KIND" in text and re.search(r"Copyright \(c\) \d{4}", text)


def test_the_requirements_are_the_four_packages_without_exact_pins():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert {re.match(r"[\w-]+", line)[0] for line in lines} == {"torch", "torchvision", "einops", "tqdm"}
    assert not [line for line in lines if "==" in line]


# ---------------------------------------------------------------------------- README

NONE = [pytest.param(None, marks=pytest.mark.skip("README.md has none"))]


@pytest.mark.parametrize("number", range(len(SNIPPETS)) or NONE)
def test_every_python_block_of_the_readme_runs(outcomes, number):
    assert f"README {number}" not in outcomes, outcomes[f"README {number}"]


def arguments(line):
    """The flags of a README line that starts train.py, or None."""
    words = shlex.split(line, comments=True)
    at = next((i for i, word in enumerate(words) if Path(word).name == "train.py"), None)
    return None if at is None else words[at + 1:]


def is_template(line):
    return bool(re.search(r"\.\.\.|<\w+>", line))


@pytest.mark.parametrize("line", [line for line in COMMANDS if arguments(line) is not None and not is_template(line)] or NONE)
def test_every_training_command_of_the_readme_passes_a_dry_run(line, tmp_path, monkeypatch, capsys):
    import train
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    flags = arguments(line)
    train.main(flags if {"--dry-run", "--check"} & set(flags) else [*flags, "--dry-run"])
    assert capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["recipes"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if arguments(line) is None and not is_template(line)] or NONE)
def test_every_other_command_of_the_readme_starts_a_file_that_exists(line):
    file = next(word for word in shlex.split(line, comments=True) if word.endswith(".py"))
    assert (ROOT / file).is_file()


def test_the_readme_names_every_file_and_links_to_nothing_missing():
    if not README:
        pytest.skip("no README.md yet")
    assert not [name for name in FILES if f"`{name}.py`" not in README]
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in target]
    assert not [target for target in links if not (ROOT / target).exists()]


def test_the_readme_shows_the_two_lines_that_do_everything():
    if not README:
        pytest.skip("no README.md yet")
    assert "pip install -r requirements.txt && python train.py" in README
    assert "pip install -r requirements-dev.txt && pytest" in README
