"""Checkpoints: a file of weights becomes the weights of a model, or an error that says why not.

The same 12 blocks come in many layouts and sizes. Four steps bring a file into a model:

    read      tensors only; a file that would run code on loading, or whose checksums differ, is refused
    check     a flat dict of dense, finite tensors, whatever the file nests them in
    convert   names and axes of vit.py: see formats.py
    adapt     to the model's sizes: position tables and relative biases are images of offsets, so they are
              resampled like images (bicubic, align_corners=False, no antialias, as MAE and DeiT)

Then it prints what was loaded, resized, skipped and missing, because load_state_dict(strict=False) says
nothing when no name matched. Less than 90 % of the encoder is an error, and so is a file with parts that the
model lacks (relative bias, layer scale, register tokens, attention pooling). No file shows the number of
heads, and the wrong one loads without an error but computes something else: see FORMATS.

We differ: BEiT's own code resamples its bias at geometrically spaced offsets, here it is plain bicubic.
Needs: torch, torchvision, einops; formats.py and vit.py.
Demo: python checkpoints.py (5 s on a CPU) loads a MAE and a BEiT file into ViTs of other sizes.
"""

import argparse
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from formats import (FORMATS, INDEX, convert, convert_official, flat_tensors, has, is_pickle, numpy_globals,
                     read_npz, read_pickle, shorten)
from vit import resample, resize_pos_embed

__all__ = ["FORMATS", "Report", "convert_official", "encoder_options", "load_pretrained", "read_checkpoint"]


class Report(NamedTuple):
    format: str  # a key of FORMATS
    loaded: list  # names in the model
    resized: list  # those of them that were resampled or changed their class-token row
    skipped: list  # encoder and classifier tensors of the file that do not fit the model
    missing: list  # names of the model that the file does not fill; they keep their values


def load_pretrained(model, path, verbose=True, grid=None, name=None):
    """Load a published checkpoint, or one of ours, into a model; print and return a Report.

    path  a file, or a state dict (or a checkpoint's whole dict) already read; name: its name in messages
    grid  (gh, gw) rows and columns of patches the file was trained with; only their ratio counts. By default
          the shape of args["img_size"] in our own checkpoints, else square, as all published files are

    A head with another number of classes is not loaded, nor is fc_norm where the model pools the mean and the
    file has norm: both are reported. The position table is the file's, resampled; never rebuild it, since
    MoCo v3 and MAE order the sin-cos channels differently. No shape shows the number of heads:
    create_vit("vit_s16", num_heads=12) for MoCo v3 and MIRL, 6 for DeiT and timm.
    """
    # read
    file, where = path, name or "the state dict"
    if not isinstance(path, dict):
        file, where = read_checkpoint(path), str(path)
    # check
    tensors = flat_tensors(file, where)

    # convert
    kind, state, dropped = convert(tensors)
    own_aspect = source_aspect(file)
    kind = "ours" if own_aspect else kind
    where = f"{where} [{kind}]"
    target = model.state_dict()
    for name in list(target):
        if name.endswith(INDEX):
            del target[name]
    check_parts(state, target, where)
    copy_shared_bias(state, target)

    # adapt
    adapted, resized, skipped = adapt(model, state, target, grid or own_aspect, where)
    check_match(state, adapted, target, skipped, where)
    model.load_state_dict(adapted, strict=False)

    # report
    missing = [name for name in target if name not in adapted]
    if verbose:
        millions = sum(value.numel() for value in adapted.values()) / 1e6
        print(f"loaded {len(adapted)} tensors ({millions:.3g} M parameters) from {where}; "
              f"resized: {shorten(resized.values())}; "
              f"skipped: {shorten(skipped)}; "
              f"missing: {shorten(missing)}; "
              f"not of the encoder: {shorten(dropped, 2)}")
        print(f"  {kind}: {FORMATS[kind]}")
    return Report(kind, list(adapted), list(resized), skipped, missing)


SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"
BLOCK_BIAS = r"blocks\.\d+\.attn\.relative_position_bias_table"


def copy_shared_bias(state, target):
    """BEiT pre-trains one relative bias and fine-tunes a copy in every block."""
    if SHARED_BIAS in state and SHARED_BIAS not in target:
        copies = [name for name in target if re.match(BLOCK_BIAS, name)]
        state |= dict.fromkeys(copies, state.pop(SHARED_BIAS))


def adapt(model, state, target, aspect, where):
    """The file's tensors in the model's sizes -> (adapted, what was resized by name, names skipped)."""
    adapted, resized, skipped = {}, {}, []
    for name, value in state.items():
        wanted = target.get(name)
        if wanted is None or name.startswith("head.") and value.shape != wanted.shape:
            skipped.append(name)
            continue
        table = name.endswith(("pos_embed", "relative_position_bias_table"))
        if table and value.shape[-1] == wanted.shape[-1]:
            grids = find_grids(model, state, name, aspect)
            value, change = resize_table(name, value, wanted, grids, aspect, where)
            if change:
                resized[name] = change
        adapted[name] = value
    return adapted, resized, skipped


def find_grids(model, state, name, aspect):
    """Grids of a table in the file and in the model, each (class-token rows, (gh, gw)) or None."""
    aspect = aspect or (1, 1)
    module = model.get_submodule(name.rpartition(".")[0])
    if "pos_embed" in name or not hasattr(module, "window"):
        wanted = find_grid(name, model.state_dict()[name], getattr(model, "grid_size", (1, 1)))
        return find_grid(name, state[name], aspect), wanted
    # MixMIM: windows are cut to the map of their stage
    source = None
    first = None
    if "absolute_pos_embed" in state:
        first = find_grid("pos_embed", state["absolute_pos_embed"], aspect)
    if first is not None:
        _, (height, width) = first
        stage = int(name.split(".")[1])  # layers.STAGE.blocks...
        source = find_window(len(state[name]), height >> stage, width >> stage)
    return source, (0, module.window)


def count_offsets(height, width):
    return (2 * height - 1) * (2 * width - 1)


def find_grid(name, table, aspect):
    """The grid that a table covers: (class-token rows, (gh, gw)), or None; aspect makes the answer unique."""
    divisor = math.gcd(*aspect)
    p, q = aspect[0] // divisor, aspect[1] // divisor
    if "pos_embed" in name:  # (1, gh gw, D), one row more with a class token
        for prefix in (0, 1):
            patches = table.shape[1] - prefix
            k = math.isqrt(patches // (p * q))
            grid = (k * p, k * q)
            if k and math.prod(grid) == patches:
                return prefix, grid
        return None
    # BEiT: one row per offset, then cls-token, token-cls, cls-cls
    rows = len(table) - 3
    for k in range(1, math.isqrt(len(table)) + 1):
        grid = (k * p, k * q)
        if count_offsets(*grid) == rows:
            return 3, grid
    return None


def find_window(rows, height, width):
    """MixMIM's windows are k x k, cut to the map: the (0, (wh, ww)) with this many rows, or None."""
    for k in range(1, max(height, width) + 1):
        window = (min(k, height), min(k, width))
        if count_offsets(*window) == rows:
            return 0, window
    return None


def resize_table(name, table, target, grids, aspect, where):
    """A position or bias table in the target's size -> (table, what was changed, or None)."""
    source, wanted = grids
    axis = 1 if "pos_embed" in name else 0
    rows, new_rows = table.shape[axis], target.shape[axis]
    unknown = wanted is None or source is None and aspect is None
    same = source is not None and source == wanted
    if same or unknown and rows == new_rows:
        return table, None  # the same grid, or an unknown one with the right number of rows
    if source is None or wanted is None:
        raise ValueError(f"{name} has {rows} rows in {where}, {new_rows} in the model, and one fits no grid; "
                         "pass grid=(gh, gw), the patches the file was trained with")
    (extra, old), (new_extra, new) = source, wanted
    change = f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    if rows == new_rows and aspect is None:
        raise ValueError(f"{change} in {where} is a guess from the number of rows alone; pass grid={old} or "
                         f"grid={new}, whichever the file was trained with")

    table = table.float()
    if axis == 0:  # one row per offset, then extra
        offsets = rows - extra
        old = (2 * old[0] - 1, 2 * old[1] - 1)
        new = (2 * new[0] - 1, 2 * new[1] - 1)
        resampled = resample(table[:offsets], old, new)
        return torch.cat([resampled, table[offsets:]]), change
    # (1, extra + gh gw, D)
    if new_extra > extra:
        table = F.pad(table, (0, 0, 1, 0))
        change += ", class row added as zeros"
    elif new_extra < extra:
        table = table[:, 1:]
        change += ", class row dropped"
    return resize_pos_embed(table, old, new, new_extra), change


NO_MODEL_HAS = {
    "a norm before the blocks": r"norm_pre\.",
    "attention pooling": r"attn_pool\.|MAPHead_0\.",
    "register tokens": r"(.*\.)?reg(ister)?_tokens?$",
    "norms of queries and keys": r"blocks\.\d+\.attn\.[qk]_norm\.",
}
PARTS = {
    "relative position bias": rf"rel_pos_bias\.|{BLOCK_BIAS}",
    "layer scale": r"blocks\.\d+\.gamma_",
    "position table": "pos_embed$",
}


def check_parts(state, target, where):
    """A part on one side only would change what is computed."""
    for part, pattern in NO_MODEL_HAS.items():
        names = [name for name in state if re.match(pattern, name)]
        if names and not has(target, pattern):
            raise ValueError(f"{where} was trained with {part} ({names[0]}), and the model has none, so it "
                             "would compute something else; use a file without")
    if not has(target, r"blocks\.0\."):
        return

    # parts that a ViT has or not
    bias, scale, pos = (has(state, pattern) for pattern in PARTS.values())
    lacking = [part for part, pattern in PARTS.items() if has(state, pattern) and not has(target, pattern)]
    faults = [f"the model has no {part}" for part in lacking]
    if bias and not pos and has(target, "pos_embed$"):
        faults.append("the file has no position table")
    if has(state, BLOCK_BIAS) and has(target, r"rel_pos_bias\."):
        faults.append("the file has one relative position bias per block, the model shares one")
    no_class_token = has(target, "cls_token$") and not has(state, "cls_token$")
    if no_class_token and has(state, r"blocks\.0\."):
        faults.append("the file has no class token")
    if not faults:
        return

    # the way out
    options = []
    if bias:
        options.append('rel_pos_bias="block"' + ("" if has(state, BLOCK_BIAS) else ' (or "shared")'))
    if scale:
        options.append("layer_scale=0.1")
    options.append('pos_embed="learned"' if pos else "pos_embed=None")
    if no_class_token:
        options.append('class_token=False, pool="mean"')
    raise ValueError(f"{where} does not fit: {', '.join(faults)}; build the model with {', '.join(options)}")


QKV_BIAS = r"blocks\.\d+\.attn\.qkv\.bias"


def check_match(state, adapted, target, skipped, where):
    """Most of the encoder must be there, in the same shapes, and no part of a block may be left over."""
    encoder = [name for name in target if not name.startswith(("head.", "fc_norm.", "norm."))]
    absent = [name for name in encoder if name not in adapted]
    if len(absent) > 0.1 * len(encoder):
        raise ValueError(f"{where} lacks {len(absent)} of the model's {len(encoder)} encoder tensors, as "
                         f"{', '.join(absent[:5])}; the file has {shorten(skipped, 5)}; rename its keys, or "
                         "build the model in its size")
    if has(target, QKV_BIAS) and not has(adapted, QKV_BIAS):
        raise ValueError(f"{where} has no biases of q, k and v, as files with norms after attention and MLP; "
                         "if nothing else differs, add zeros under blocks.N.attn.qkv.bias")
    for name, value in adapted.items():
        wanted = target[name]
        if value.is_floating_point() != wanted.is_floating_point():
            raise ValueError(f"{name} is {value.dtype} in {where}, {wanted.dtype} in the model; save it as "
                             "floating-point numbers")
        if value.shape != wanted.shape:
            shape, new_shape = tuple(value.shape), tuple(wanted.shape)
            raise ValueError(f"{name} is {shape} in {where}, {new_shape} in the model; build it with the "
                             "file's embed_dim, in_chans, patch_size, mlp_ratio and num_heads")
    extra = [name for name in skipped if re.match(r"(layers\.\d+\.)?blocks\.", name)]
    if extra:
        raise ValueError(f"{where} has parts of blocks that the model lacks ({shorten(extra)}); build it "
                         "with the file's depth, or delete them from the dict to load the first blocks only")


def source_aspect(file):
    """(height, width) of the images that one of our own checkpoints was trained with, else None."""
    args = file.get("args")  # other codes save a Namespace
    size = args.get("img_size") if isinstance(args, dict) else None
    if size is None:
        return None
    sides = size if isinstance(size, (list, tuple)) else [size]
    numbers = [side for side in sides if isinstance(side, int) and side > 0]
    if len(sides) not in (1, 2) or len(numbers) < len(sides):
        raise ValueError(f"args.img_size {size!r} of the checkpoint must be one or two whole numbers above "
                         "0; is the file damaged?")
    return sides[0], sides[-1]


def encoder_options(file):
    """Keyword arguments for a ViT with the parts and tables of a file, as read_checkpoint returns it."""
    state = convert(flat_tensors(file))[1]
    options = {}
    first_bias = "blocks.0.attn.relative_position_bias_table"
    if SHARED_BIAS in state:
        options["rel_pos_bias"] = "shared"
    elif first_bias in state:
        options["rel_pos_bias"] = "block"
    if options and "pos_embed" not in state:
        options["pos_embed"] = None
    if "blocks.0.gamma_1" in state:
        options["layer_scale"] = 0.1  # loading replaces it by the file's values
    patch = state.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4 and patch.shape[2] == patch.shape[3] > 0:
        options["patch_size"] = patch.shape[2]
        for name in ("pos_embed", SHARED_BIAS, first_bias):
            grid = find_grid(name, state[name], source_aspect(file) or (1, 1)) if name in state else None
            if grid:
                options["img_size"] = tuple(side * patch.shape[2] for side in grid[1])
    return options


def read_checkpoint(path):
    """The dict in a file, as it was saved; tensors on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is a directory; pass a file, nothing is downloaded")
    try:
        file = read(path)
    except Exception as error:  # junk bytes can raise nearly anything
        raise ValueError(f"{path} {explain(path, error)}") from error
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, not a dict; save model.state_dict()")
    if not file:
        raise ValueError(f"{path} holds an empty dict; save model.state_dict()")
    return file


def read(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return load_file(path)
    if path.suffix == ".npz":
        return read_npz(path)
    if is_pickle(path):
        return read_pickle(path)
    if zipfile.is_zipfile(path):
        compare_checksums(path)
    # argparse.Namespace: plain data of MAE and DeiT
    with torch.serialization.safe_globals([argparse.Namespace, *numpy_globals()]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols and sparse tensors; what matters is an error
        return torch.load(path, map_location="cpu", weights_only=True)


def compare_checksums(path):
    """torch.load does not; a flipped bit would load as another number. About 1 s per GB."""
    with zipfile.ZipFile(path) as archive:
        written = any(record.CRC for record in archive.infolist())  # all 0: torch was told to write none
        damaged = archive.testzip() if written else None
    if damaged:
        raise zipfile.BadZipFile(f"checksum of {damaged}")


def explain(path, error):
    """Why a file could not be read, and what to do."""
    if isinstance(error, ImportError):
        return "needs the safetensors package; pip install safetensors"
    if path.stat().st_size == 0:
        return "is empty; download or copy it again"
    if isinstance(error, zipfile.BadZipFile) and "checksum" in str(error):
        return f"is damaged ({error} differs); copy or download it again"
    if re.search("GLOBAL|allow_pickle", str(error)):
        return ("holds Python objects that could run code on loading, so it was not loaded; if you trust its "
                "source, save its tensors alone to a new file")
    return f"is not a readable checkpoint ({type(error).__name__}), perhaps cut short; copy it again"


if __name__ == "__main__":
    import tempfile

    from vit import ViT

    small = dict(patch_size=4, embed_dim=32, depth=2, num_heads=2)
    beit = dict(pos_embed=None, layer_scale=0.1, num_classes=0, **small)
    trained = ViT(img_size=16, num_classes=0, **small).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_pred.weight": torch.zeros(48, 16)}
    published = ViT(img_size=16, rel_pos_bias="shared", **beit).state_dict()
    for i in range(2):
        q, _, v = published.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        published |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}

    print("a MAE file into a classifier of another size that pools the mean: fc_norm and head are not loaded")
    model = ViT(img_size=(8, 24), num_classes=10, pool="mean", **small)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": trained | decoder}, f"{folder}/mae.pth")
        load_pretrained(model, f"{folder}/mae.pth")
    print(f"  1 + 16 positions became {model.pos_embed.shape[1]} (expect 1 + 2 x 6 = 13)\n")

    print("a BEiT file: q and v biases joined, the shared relative bias copied to each block and resampled")
    model = ViT(img_size=24, rel_pos_bias="block", **beit)
    load_pretrained(model, published)
    rows = len(model.blocks[0].attn.relative_position_bias_table)
    print(f"  bias table of 7 x 7 + 3 rows -> {rows} (expect 11 x 11 + 3 = 124)")
