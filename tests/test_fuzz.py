"""Fuzzing: whatever is typed, or found in a file, is used as it is meant or refused in one sentence.

No traceback, no hang, nothing silently wrong. The same examples in every run (derandomize), about 15 seconds of
them; with -m slow about ten minutes.
"""

import contextlib
import copy
import io
import json
import math
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import VIT, interrupted_run, inventory

import schema
import train
from checkpoints import load_pretrained, read_checkpoint
from semantic import SemanticFolder
from tasks import classify
from test_schema import content as coco_content
from training import encoders, optim, runs
from training.flags import expand
from training.world import World
from vit import ViT

# words by which a library's own error is known
FOREIGN = re.compile(r"tensor\(|torch\.Size|invalid literal|unpack|codec|NoneType|object is not|unexpected keyword"
                     r"|object has no|Traceback|not supported between|list index|Errno|str, bytes|convert float")
NUMBERS = [0, 1, -1, 2, 3, 0.5, -0.5, 1e-300, 1e300, 1e39, 2**31, 2**63, 2**70, math.nan, math.inf, -math.inf]
VALUES = [None, True, False, "", "x", "-1", "1e3", "nan", [], {}, [[]], [None], {"a": 1}, "\0", "\ud800", *NUMBERS]


def fuzz(check, examples, *strategies):
    """Run check(*drawn) on so many examples, always the same ones."""
    quiet = dict(deadline=None, database=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
    settings(derandomize=True, max_examples=examples, **quiet)(given(*strategies)(check))()


def sizes(default, slow):
    return pytest.mark.parametrize("examples", [default, pytest.param(slow, marks=pytest.mark.slow)])


def sentence(error):
    """A ValueError of ours: one line that no library wrote."""
    text = str(error)
    assert text and "\n" not in text and not FOREIGN.search(text), text
    return text


def places(value, at=()):
    """The path of every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield (*at, key)
        yield from places(entry, (*at, key))


def changed(value, at, new):
    """A copy in which the entry at a path is another, is missing (new: places), or is there twice (new: changed)."""
    value = copy.deepcopy(value)
    holder = value
    for key in at[:-1]:
        holder = holder[key]
    if new is places:
        del holder[at[-1]]
    elif new is changed and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[at[-1]]))
    elif new is not changed:
        holder[at[-1]] = new
    return value


NEW = st.sampled_from([*VALUES, places, changed]) | st.integers(-5, 70) | st.floats(-100, 100)


# ---------------------------------------------------------------------------- the command line


def flag_values(action, draw):
    """Words for a flag: usually of its kind."""
    if action.nargs == 0:
        return []
    if action.choices and draw(st.integers(0, 9)):
        pool = st.sampled_from(list(map(str, action.choices)))
    else:
        pool = st.sampled_from(["1", "2", "4", "8", "0.5", "1e-3", *map(str, NUMBERS), "9" * 400, "", "x", "-x", "a b",
                                "/dev/null", "."])
    number = draw(st.integers(0, 3)) if action.nargs == "+" else action.nargs or 1
    return [draw(pool) for _ in range(number)]


@st.composite
def command_lines(draw):
    task = draw(st.sampled_from(list(train.TASKS)))
    parser = train.parser_for(task)
    words = ["--task", task, *VIT.split()] if draw(st.booleans()) else ["--task", task]
    actions = {action.option_strings[0]: action for action in parser._actions}
    for name in draw(st.lists(st.sampled_from(sorted(actions)), max_size=4)):
        words += [name, *flag_values(actions[name], draw)]
    return words


def run_main(words):
    """-> exit code and what is said on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            train.main(words)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, err.getvalue()


@sizes(40, 900)
def test_any_command_line_is_costed_or_refused_in_one_sentence(tmp_path, monkeypatch, examples):
    monkeypatch.chdir(tmp_path)

    def check(words):
        code, said = run_main([*words, "--dry-run"])
        assert code in (0, 2), words
        assert code == 0 or re.fullmatch(r"train\.py: .+; see --help\n", said), (words, said)
        assert not FOREIGN.search(said), (words, said)
        assert not list(tmp_path.iterdir())

    fuzz(check, examples, command_lines())


TEXT = st.text(st.sampled_from("ab-=#@'\"\\ \t\n\r\0\ufeff\u00fc1"), max_size=40)


@sizes(300, 10_000)
def test_any_recipe_is_read_or_refused_with_its_line(tmp_path, monkeypatch, examples):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r"

    def check(content):
        recipe.write_bytes(content.encode() if isinstance(content, str) else content)
        try:
            words = expand(["@r"])
        except ValueError as error:
            assert re.match(r"(line \d+ of )?recipe ", sentence(error))
        else:
            assert not any(word.startswith("@") for word in words)

    fuzz(check, examples, TEXT | st.binary(max_size=40) | st.just("@r") | TEXT.map(lambda text: f"#{text}\n@r"))


@sizes(200, 3000)
def test_quoted_words_come_back_as_they_were(tmp_path, examples):
    def check(words):
        line = " ".join(shlex.quote(word) for word in words)
        (tmp_path / "r").write_text(line, newline="")
        assert expand([f"@{tmp_path / 'r'}"]) == words

    letters = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="'@")
    fuzz(check, examples, st.lists(st.text(letters, max_size=8), max_size=4))


# ---------------------------------------------------------------------------- annotation files


@sizes(250, 5000)
def test_any_coco_file_is_refused_or_safe_for_pycocotools(tmp_path, examples):
    mask = pytest.importorskip("pycocotools.mask")
    file = tmp_path / "a.json"
    base = coco_content()
    spots = list(places(base))

    def check(changes):
        entries = base
        for at, new in changes:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change removed the place
                entries = changed(entries, at, new)
        file.write_text(json.dumps(entries))
        try:
            read = schema.read_coco(file)
        except ValueError as error:
            assert str(file) in sentence(error)
            return
        sizes_of = {image["id"]: (image["height"], image["width"]) for image in read["images"]}
        assert len(sizes_of) == len(read["images"])
        for entry in read["annotations"]:
            height, width = sizes_of[entry["image_id"]]
            assert all(math.isfinite(number) for number in entry["bbox"]) and min(entry["bbox"][2:]) >= 0
            if height * width > 10_000:
                continue
            code = entry["segmentation"]
            if isinstance(code, dict):
                packed = mask.frPyObjects(dict(code), height, width) if isinstance(code["counts"], list) else code
            else:
                packed = mask.merge(mask.frPyObjects([list(polygon) for polygon in code], height, width))
            assert mask.decode(packed).shape == (height, width)

    fuzz(check, examples, st.lists(st.tuples(st.sampled_from(spots), NEW), min_size=1, max_size=2))


@sizes(150, 4000)
def test_any_bytes_in_place_of_a_coco_file_are_refused_or_json(tmp_path, examples):
    file = tmp_path / "a.json"
    text = json.dumps(coco_content()).encode()

    def check(start, length, junk):
        file.write_bytes(text[:start] + junk + text[start + length:])
        with contextlib.suppress(ValueError):
            schema.read_coco(file)
            return
        try:
            schema.read_coco(file)
        except ValueError as error:
            sentence(error)

    junk = st.binary(max_size=6) | st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b"1e999", b"9" * 5000])
    fuzz(check, examples, st.integers(0, len(text)), st.integers(0, 30), junk)


CATEGORIES = dict(categories=[dict(id=7, name="sky", train_id=1), dict(id=2, name="cat", train_id=0)])


@sizes(150, 4000)
def test_any_table_of_semantic_categories_is_refused_or_complete(tmp_path, examples):
    file = tmp_path / "semantic_categories.json"

    def check(at, new):
        file.write_text(json.dumps(changed(CATEGORIES, at, new)))
        try:
            ids, names = schema.read_categories(file)
        except ValueError as error:
            assert str(file) in sentence(error)
            return
        assert all(type(number) is int and 1 <= number <= 255 for number in ids)
        assert len(ids) == len(set(ids)) and all(type(name) is str for name in names)

    fuzz(check, examples, st.sampled_from(list(places(CATEGORIES))), NEW)


@sizes(100, 3000)
def test_any_mask_is_refused_or_has_labels_of_the_table(tmp_path, examples):
    folders = [tmp_path / name for name in ("train2017", "semantic_train2017", "annotations")]
    for folder in folders:
        folder.mkdir()
    (folders[2] / "semantic_categories.json").write_text(json.dumps(CATEGORIES))
    Image.new("RGB", (12, 9)).save(folders[0] / "a.jpg")
    mask = folders[1] / "a.png"

    def check(mode, size, value, start, junk):
        Image.new(mode, size, value if mode in ("L", "P", "I;16", "1") else None).save(mask)
        whole = mask.read_bytes()
        start = start % len(whole)
        mask.write_bytes(whole[:start] + junk + whole[start + len(junk):])
        source = SemanticFolder("coco", tmp_path)
        try:
            image, labels = source.sample(0)
        except ValueError as error:
            assert str(tmp_path) in sentence(error)
            return
        assert image.shape == (3, 9, 12) and labels.shape == (9, 12)
        assert set(np.unique(labels).tolist()) <= {0, 1, 255}

    modes = st.sampled_from(["L", "P", "1", "I;16", "RGB", "RGBA", "LA"])
    sides = st.sampled_from([(12, 9), (12, 9), (9, 12), (1, 1)])
    fuzz(check, examples, modes, sides, st.sampled_from([0, 2, 7, 3, 255]), st.integers(0, 999), st.binary(max_size=3))


# ---------------------------------------------------------------------------- weights


SMALL = dict(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3)
ODD_TENSORS = {
    "scalar": lambda t: torch.tensor(1.0), "empty": lambda t: torch.zeros(0), "flat": lambda t: t.flatten(),
    "NaN": lambda t: torch.full_like(t, math.nan), "inf": lambda t: t + math.inf, "complex": lambda t: t + 0j,
    "int": lambda t: t.long(), "bool": lambda t: t > 0, "double": lambda t: t.double(), "half": lambda t: t.half(),
    "sparse": lambda t: t.to_sparse(), "meta": lambda t: t.to("meta"), "one more axis": lambda t: t[None],
    "expanded": lambda t: torch.zeros(1).expand(10**9, 2), "longer": lambda t: torch.cat([torch.atleast_1d(t)] * 2),
    "last row": lambda t: torch.atleast_1d(t)[..., :1],
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "array": lambda t: t.numpy()}
ODD_VALUES = {**{f"value {value!r}"[:20]: lambda t, value=value: value for value in VALUES}, "gone": None}
RENAMED = ["module.{}", "model.{}", "encoder.{}", "{}.x", "blocks.9.{}", "{}_1", ""]
OPTIONS = [32, "32", 0, [0, 0], -1, 32.0, [32], [32, 32, 32], [16, 16], None, "x", [16, None], 2**70, math.nan]


def odd_dict(base, changes, wrapped, img_size):
    """A state dict with changes, perhaps inside others."""
    state = dict(base)
    for name, kind in changes:
        value = state.pop(name, None)
        if not isinstance(value, torch.Tensor) or kind == "gone":
            continue
        if kind in ODD_TENSORS:
            state[name] = ODD_TENSORS[kind](value)
        elif kind in ODD_VALUES:
            state[name] = ODD_VALUES[kind](value)
        else:
            state[kind.format(name)] = value
    for key in wrapped:
        state = {key: state}
    if wrapped == ["itself"]:
        state = {"model": {}}
        state["model"]["model"] = state
    if img_size is not places:
        state["args"] = {"img_size": img_size}
    return state


@sizes(150, 4000)
def test_any_state_dict_is_refused_or_loaded_with_finite_weights(examples):
    torch.manual_seed(0)
    base = ViT(**SMALL).state_dict()
    kinds = [*ODD_TENSORS, *ODD_VALUES, *RENAMED]

    def check(changes, wrapped, img_size):
        model = ViT(**SMALL)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            report = load_pretrained(model, odd_dict(base, changes, wrapped, img_size), verbose=False)
        except ValueError as error:
            sentence(error)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            return
        for name, value in model.state_dict().items():
            assert value.isfinite().all() and value.shape == base[name].shape
            if name not in report.loaded:
                assert torch.equal(value, before[name])
            elif name not in report.resized and not any(name in change for change in changes):
                assert torch.equal(value, base[name])

    change = st.tuples(st.sampled_from(sorted(base)), st.sampled_from(kinds))
    changes = st.lists(change, max_size=3, unique_by=lambda pair: pair[0])
    wrappers = st.lists(st.sampled_from(["model", "state_dict", "module", "teacher", "itself"]), max_size=3)
    fuzz(check, examples, changes, wrappers, st.sampled_from([places, *OPTIONS]))


# ---------------------------------------------------------------------------- a run's own files


@sizes(40, 800)
def test_any_flags_in_a_checkpoint_of_ours_are_refused_or_make_its_encoder(interrupted, tmp_path, examples):
    saved = checkpoint_of(interrupted)
    file = tmp_path / "x.pt"
    names = ["model", "method", "img_size", *encoders.SIZES]

    def check(name, new, task):
        args = {**saved["args"], name: new}
        torch.save({**saved, "args": args}, file)
        code, said = run_main(["--task", task, "--init", str(file), "--data-size", "16", "--dry-run"])
        assert code in (0, 2), (args, said)
        assert code == 0 or re.fullmatch(r"train\.py: .+; see --help\n", said), (args, said)
        assert not FOREIGN.search(said), (args, said)

    odd = [new for new in VALUES if new != "\ud800"]  # torch cannot save it
    fuzz(check, examples, st.sampled_from(names), st.sampled_from(odd) | st.integers(-5, 70),
         st.sampled_from(["classify", "probe", "detect", "segment"]))


RUN = f"--task classify {VIT} --batch-size 8 --data-size 24 --epochs 2 --ema 0.9"  # 3 steps an epoch


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of two epochs of which one is trained."""
    return interrupted_run(RUN, tmp_path_factory.mktemp("interrupted"))


@sizes(120, 1000)
def test_any_args_json_is_refused_or_holds_the_same_flags(interrupted, examples):
    file = interrupted / "args.json"
    whole = file.read_text()
    flags = json.loads(whole)
    words = ["--resume", "--output-dir", str(interrupted)]
    first = vars(train.parse(words))

    def check(at, new):
        file.write_text(json.dumps(changed(flags, at, new)))
        try:
            args = train.parse(words)
            saved = read_checkpoint(interrupted / "checkpoint.pt")["args"]
            runs.same_flags(args, saved)
        except ValueError as error:
            sentence(error)
            return
        for name, value in vars(args).items():
            assert name in runs.MAY_DIFFER or value == first[name], name

    try:
        fuzz(check, examples, st.sampled_from(list(places(flags))), NEW)
    finally:
        file.write_text(whole)


class Resumed:
    """What fit builds before it restores a run."""

    def __init__(self, folder):
        self.args = train.parse(["--resume", "--output-dir", str(folder)])
        self.args.resume = False  # the checkpoint comes from elsewhere
        self.world = World("cpu")
        self.data = classify.open_data(self.args, self.world)
        self.plan = optim.plan_steps(self.args, len(self.data.train), 1)

    def restore(self, saved):
        """-> the weights and the position of a run that goes on from this dict."""
        run = runs.Run(self.args, self.world)
        run.folder, run.saved = Path("run"), saved
        model = classify.build(self.args, self.data, self.world)
        ema = torch.optim.swa_utils.AveragedModel(model)
        optimizer = optim.build_optimizer(model, self.args)
        at = run.restore(self.plan, model=model, optimizer=optimizer, ema=ema)
        return model, optimizer, ema, at


@pytest.fixture
def resumed(interrupted, monkeypatch):
    monkeypatch.setattr(World, "say", lambda self, text: None)
    return Resumed(interrupted)


@sizes(60, 1500)
def test_any_checkpoint_is_refused_or_restored_as_it_is(interrupted, resumed, examples):
    saved = checkpoint_of(interrupted)
    read = [at for at in places(saved) if at[0] in ("model", "ema", "optimizer", "at", "log_bytes", "total_steps")]

    def check(at, new, kind):
        value = saved
        for key in at:
            value = value[key]
        if isinstance(value, torch.Tensor):
            new = ODD_TENSORS[kind](value) if value.is_floating_point() else torch.zeros(3)
        edited = changed(saved, at, new)
        try:
            model, optimizer, ema, position = resumed.restore(edited)
        except ValueError as error:
            assert "\n" not in str(error) and "run" in str(error)
            return
        # every number is finite, and of the shape it had
        for part in ("model", "ema"):
            module = model if part == "model" else ema
            for name, tensor in module.state_dict().items():
                assert tensor.isfinite().all() and tensor.shape == saved[part][name].shape
        for index, state in optimizer.state_dict()["state"].items():
            assert state.keys() == saved["optimizer"]["state"][index].keys()
            for name, tensor in state.items():
                assert tensor.isfinite().all() and tensor.shape == saved["optimizer"]["state"][index][name].shape
        for name, entry in vars(position).items():
            assert type(entry) is type(saved["at"][name])
        assert 0 <= position.step <= resumed.plan.total_steps

    fuzz(check, examples, st.sampled_from(read), NEW.filter(lambda new: new is not changed),
         st.sampled_from(sorted(ODD_TENSORS)))


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@sizes(150, 3000)
def test_any_flipped_bit_of_a_checkpoint_is_refused_or_without_effect(interrupted, tmp_path, examples):
    whole = (interrupted / "checkpoint.pt").read_bytes()
    saved = checkpoint_of(interrupted)
    file = tmp_path / "checkpoint.pt"

    def check(at, bit, cut):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        file.write_bytes(damaged[:cut] if cut else damaged)
        try:
            read = read_checkpoint(file)
        except ValueError as error:
            assert str(file) in sentence(error)
            return
        assert list(places(read)) == list(places(saved))
        for name, value in saved["model"].items():
            assert torch.equal(value, read["model"][name])

    bytes_ = st.integers(0, len(whole) - 1)
    fuzz(check, examples, bytes_, st.integers(0, 7), st.none() | st.none() | bytes_)
    assert zipfile.is_zipfile(interrupted / "checkpoint.pt")


def test_the_fuzzed_run_is_left_as_it_was(interrupted):
    names = {Path(name).name for name in inventory(interrupted)}
    assert names == {"args.json", "log.jsonl", "checkpoint.pt", "predictions.png"}
