"""README and docs: their code runs, their commands parse, what they name exists."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments" / "README.md"]
# appended to a command; the last value of a flag counts
TINY = shlex.split("--data-size 16 --epochs 1 --batch-size 4 --device cpu")
LESSONS = ROOT / "docs" / "lessons.md"
SHORTER = {  # of the demos
    "range(401)": "range(2)", "range(600)": "range(2)", "steps = 150": "steps = 5", "steps = 200": "steps = 5",
    "steps=400": "steps=5", "Shapes(1024,": "Shapes(64,"}


def blocks(page, *languages):
    """The text of the fenced code blocks of a page."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [code for language, code in fences if language in languages]


def commands(*pages):
    """The lines that start a Python program, in their order."""
    lines = []
    for page in pages:
        for block in blocks(page, ""):
            lines += [line for line in block.splitlines() if re.match(r"(\w+=\S+ )?(python|torchrun) ", line)]
    return lines


def program(line):
    """What a command starts, and its arguments."""
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[start], words[start + 1:]


def training(*pages):
    """The arguments of the commands that start train.py."""
    return [arguments for name, arguments in map(program, commands(*pages)) if name == "train.py"]


def parsed(*pages):
    """The same, as test cases.

    Without --check, which needs no parser, and without --init, whose file an earlier command writes.
    """
    cases = []
    for arguments in training(*pages):
        if "--check" in arguments:
            continue
        if "--init" in arguments:
            at = arguments.index("--init")
            arguments = arguments[:at] + arguments[at + 2:]
        cases.append(pytest.param(arguments, id=" ".join(arguments)[:60] or "no flags"))
    return cases


def snippets(*, after_training):
    """Python blocks; those that load a run can run only after the README's commands."""
    cases = []
    for page in PAGES:
        for number, code in enumerate(blocks(page, "python")):
            if ("load_run" in code) == after_training:
                cases.append(pytest.param(code, id=f"{page.stem}-{number}"))
    return cases


def run_snippet(code):
    with torch.random.fork_rng():
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def run_in_order(argument_lists, more=()):
    import train
    for arguments in argument_lists:
        with torch.random.fork_rng():
            train.main([*arguments, *more])


def first_commands():
    """The README's commands that build on each other: those that name a folder under runs/."""
    text = README.read_text().split("\n## How to train\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("python train.py") and "runs/" in line]
    return [program(line)[1] for line in lines]


# ---------------------------------------------------------------------------- code and commands


@pytest.mark.parametrize("code", snippets(after_training=False))
def test_every_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippet(code)


@pytest.mark.parametrize("arguments", parsed(*PAGES))
def test_every_training_command_parses(arguments, monkeypatch):
    import train
    monkeypatch.chdir(ROOT)  # recipes are found from here
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stopped:
            train.parse(arguments)
        assert stopped.value.code == 0
    else:
        train.parse(arguments)


@pytest.mark.parametrize("line", [line for line in commands(*PAGES) if program(line)[0] != "train.py"])
def test_every_other_command_starts_a_file_that_exists(line):
    assert (ROOT / program(line)[0]).is_file()


def test_the_training_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    sequence = first_commands()
    assert [arguments[1] for arguments in sequence] == ["pretrain", "probe", "classify", "detect", "segment"]
    run_in_order(sequence, TINY)
    for case in snippets(after_training=True):
        run_snippet(case.values[0])


def test_the_training_commands_of_the_lessons_run(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    sequence = training(LESSONS)
    assert len(sequence) >= 5
    run_in_order(sequence, TINY)


@pytest.mark.parametrize("name", sorted({program(line)[0] for line in commands(LESSONS)} - {"train.py"}))
def test_the_demos_of_the_lessons_run_in_a_tiny_form(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = (ROOT / name).read_text()
    shorter = code
    for long, short in SHORTER.items():
        shorter = shorter.replace(long, short)
    assert shorter != code or name == "masking.py"
    with torch.random.fork_rng():
        exec(compile(shorter, name, "exec"), {"__name__": "__main__"})
    assert len(capsys.readouterr().out) > 100


def test_the_lines_that_the_lessons_change_are_those_of_the_demos():
    changed = [line for block in blocks(LESSONS, "") for line in block.splitlines() if "MixMIM(" in line]
    assert changed[0].replace(", masked_attention=False", "") in (ROOT / "mixmim.py").read_text().splitlines()
    assert "set `rho = 0.05` instead of 0.3" in LESSONS.read_text()
    assert "    rho = 0.3" in (ROOT / "sam.py").read_text().splitlines()


@pytest.mark.slow
def test_the_training_commands_of_the_readme_run_literally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_in_order(first_commands())


# ---------------------------------------------------------------------------- size, links, names


def test_the_readme_fits():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 120]


def anchors(page):
    """The anchors that GitHub gives to the titles of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def exists(name, page):
    return any((folder / name).exists() for folder in (ROOT, page.parent, ROOT / "experiments"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_is_named_exists(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    names = re.findall(r"`((?:recipes/|tests/|experiments/|docs/)?\w+\.(?:py|md|bib))`", prose)
    names += re.findall(r"`((?:recipes|tests|tasks|training|experiments|assets)/[\w/.]*)`", prose)
    assert not [name for name in names if not exists(name, page)]


def test_the_readme_names_every_file():
    text = README.read_text()
    assert not [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in text]


def test_every_page_of_docs_is_linked_from_the_readme():
    text = README.read_text()
    assert not [page.name for page in PAGES[1:-1] if f"(docs/{page.name})" not in text]


def test_the_readme_shows_the_two_lines_that_do_everything():
    text = README.read_text()
    assert "pip install -r requirements.txt && python train.py" in text
    assert "pip install -r requirements-dev.txt && pytest" in text


def test_no_table_cell_of_the_readme_is_a_sentence():
    rows = [line for line in README.read_text().splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\.( |$)", row)]


def test_every_paper_that_the_code_names_is_cited():
    cited = set(re.findall(r"eprint = \{(\d{4}\.\d{4,5})\}", (ROOT / "CITATIONS.bib").read_text()))
    for path in [*ROOT.glob("*.py"), *PAGES]:
        assert set(re.findall(r"\b\d{4}\.\d{5}\b", path.read_text())) <= cited, path.name


def test_the_tables_of_flags_are_those_of_the_parsers():
    flags = runpy.run_path(str(ROOT / "docs" / "flags.py"))
    assert flags["page"]() == flags["PAGE"].read_text(), "run python docs/flags.py"
