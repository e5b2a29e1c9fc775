"""Checkpoints: published weights differ in names and sizes, hardly in content; translate, then report.

The same 12 blocks come as MAE's flat dict, under MoCo v3's `module.base_encoder.`, or with BEiT's q and v
biases apart. Three steps bring a file into a model, and none of them is silent:

    read       tensors only; a file that wants to run code is refused, not run
    convert    recognise the layout by its keys, keep encoder and classifier, use the names of vit.py
    adapt      to the model's sizes: position tables and relative biases are images of offsets, so they
               are resampled like images (bicubic, align_corners=False, no antialias, as MAE and DeiT);
               class-token rows are no part of the image and stay

Then it prints what was loaded, resized, skipped and missing, because load_state_dict(strict=False) says
nothing when no name matched. Under 90 % of the encoder found is an error, and so is a file that was trained
with parts the model lacks (BEiT's relative bias and layer scale).

What no file shows: the number of heads. ViT-S has 12 heads in MoCo v3 and MIRL, 6 in DeiT and timm; all
shapes are equal, and the wrong choice loads without complaint and computes something else. See FORMATS.

We differ: BEiT's own code resamples its bias at geometrically spaced offsets, here plain bicubic.
Written from the papers and published files' key lists; parameter names of BEiT and MixMIM were checked in
unilm's beit/modeling_pretrain.py, modeling_finetune.py and in models_mixmim.py.
Needs: torch, einops; vit.py for the demo.
Demo: python checkpoints.py (5 s on a CPU) loads a MAE, a MoCo v3 and a BEiT file into ViTs of other sizes.
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

FORMATS = {  # what each source was trained with; nothing of this can be read from the tensors
    "MAE": "input ImageNet mean/std; heads B 12, L 16, H 16; fixed sin-cos positions, column first",
    "MAE or timm": "keys do not tell which: MAE and DeiT take ImageNet mean/std, timm's augreg weights mean/std 0.5; "
                   "heads Ti 3, S 6 (MoCo v3 and MIRL: 12), B 12, L 16",
    "timm": "layer scale as ls1, ls2; input mean/std differs by model, see its timm config",
    "DeiT distilled": "input ImageNet mean/std; heads Ti 3, S 6, B 12; the distillation token is left out",
    "MoCo v3": "input ImageNet mean/std; heads S 12, B 12; fixed sin-cos positions, row first",
    "BEiT": "input mean/std 0.5 by default in its code (a flag chose ImageNet's); heads B 12, L 16",
    "MIRL": "input ImageNet mean/std; heads S 12, B 12; fixed sin-cos positions, column first",
    "MixMIM": "input ImageNet mean/std; layer norm eps 1e-5",
    "torchvision": "a ResNet; input ImageNet mean/std",
    "ours": "input and heads as in the run's args.json",
}
CONTAINERS = ("model", "state_dict", "module", "model_ema")  # the first one found is read
NOT_ENCODER = (r"(decoder|mask_token|lm_head\.|norm_low\.|norm\d+\.|dist_token$|head_dist\.|momentum_encoder\.|predictor\.)"
               r"|.*(relative_position_index|attn_mask)$")
INDEX = ("relative_position_index", "attn_mask")  # tables of constants, rebuilt by the model


class Report(NamedTuple):
    format: str  # a key of FORMATS
    loaded: list  # names in the model
    resized: list  # those of them that were resampled or changed their class-token row
    skipped: list  # encoder and classifier tensors of the file that the model has no place for
    missing: list  # names of the model that the file does not fill; they keep their values


def read_checkpoint(path):
    """The dict in a file, as it was saved; tensors on the CPU. Any file that cannot be read: ValueError, one sentence."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; pass the checkpoint file inside it")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; check the path, nothing is downloaded")
    if path.suffix in (".npz", ".npy"):
        raise ValueError(f"{path} is a Flax / NumPy file; load it with timm (create_model(..., checkpoint_path=...)) and "
                         "torch.save the model's state_dict()")
    paddle = (f"{path} is a Paddle pickle; load it in Paddle, turn each array into a torch tensor, transpose the Linear "
              "weights to [out, in], and torch.save the dict")
    if path.suffix in (".pdparams", ".pdopt"):
        raise ValueError(paddle)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; download or copy it again")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ValueError(f"{path} needs the safetensors package; pip install safetensors") from error
    try:
        if path.suffix == ".safetensors":
            file = load_file(path)
        else:
            # MAE and DeiT save their argparse.Namespace beside the weights; it is plain data, so let it pass here
            with torch.serialization.safe_globals([argparse.Namespace]):
                file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # junk bytes can raise nearly anything
        with path.open("rb") as stream:
            head = stream.read(4096)
        plain_pickle = re.match(rb"\x80[\x02-\x05](?!\x8a\x0a)", head)  # torch.save's begin with a magic number, or are zips
        if plain_pickle and re.search(b"numpy|paddle", head):
            raise ValueError(paddle) from error
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign or plain_pickle:
            raise ValueError(f"{path} holds Python objects ({foreign[1] if foreign else 'a plain pickle'}) that could run code on "
                             "loading, so it was not loaded; if you trust its source, save its tensors alone to a new "
                             "file") from error
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}), perhaps cut short; download or "
                         "copy it again") from error
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, not a dict of tensors; save model.state_dict()")
    return file


def find_tensors(file):
    """The state dict in a checkpoint's dict, out of its container if it has one."""
    for key in CONTAINERS:
        if isinstance(file.get(key), dict):
            return find_tensors(file[key])
    return {key: value for key, value in file.items() if isinstance(key, str) and torch.is_tensor(value)}


def convert(state_dict):
    """-> (format, state dict under our names, names left out because they are no part of encoder or classifier)"""
    state = {re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", "")): value for key, value in state_dict.items()}

    def has(pattern):
        return any(re.match(pattern, key) for key in state)

    if has(r"(backbone\.)?pyramid\."):
        raise ValueError("the checkpoint is of a detector or a segmentation network, whose tables were resized and shared; start from the encoder's "
                         "checkpoint that it started from")
    if has(r"base_encoder\."):
        kind, inner = "MoCo v3", "base_encoder."
    elif has(r"encoder\."):  # our pre-training wrappers: MAE, MIRL, MixMIM around an encoder
        kind, inner = "ours", "encoder."
    else:
        kind, inner = next((name for name, pattern in (
            ("MixMIM", r"layers\.\d+\.blocks\."),
            ("BEiT", r"blocks\.\d+\.attn\.(q_bias|relative_position_bias_table)|rel_pos_bias\."),
            ("MIRL", r"norm_low\.|decoder_embed0_1\.|mask_token\d"),
            ("DeiT distilled", r"dist_token$"),
            ("timm", r"blocks\.\d+\.ls1\."),
            ("MAE", r"decoder_pred\."),
            ("torchvision", r"layer1\.0\.conv1\."),
        ) if has(pattern)), "MAE or timm"), ""

    converted, dropped = {}, []
    for full, value in state.items():
        key = re.sub(r"^(module\.)+", "", full.removeprefix(inner))
        # base_encoder.head is MoCo's three-layer projection, not a classifier
        if not full.startswith(inner) or re.match(NOT_ENCODER, key) or (kind == "MoCo v3" and key.startswith("head")):
            dropped.append(full)
        elif key.endswith("attn.q_bias"):  # BEiT: a bias on the keys cancels in the softmax, so it has none
            v_bias = state.get(full.replace("q_bias", "v_bias"))
            if v_bias is None:
                raise ValueError(f"the checkpoint has {full} without its v_bias; is the file complete?")
            converted[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif key == "pos_embed" and "dist_token" in state:  # rows: class, distillation, patches
            converted[key] = torch.cat([value[:, :1], value[:, 2:]], dim=1)
        elif not key.endswith("attn.v_bias"):
            converted[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key)] = value
    return kind, converted, dropped


def convert_official(state_dict):
    """Encoder and classifier of any layout in FORMATS, under the names of vit.py (MixMIM: its own names).

    Decoders, mask tokens, momentum encoders, projection heads and index buffers are left out. Sizes stay as
    they are: load_pretrained adapts them to a model. Our own classifiers come back unchanged.
    """
    return convert(state_dict)[1]


def find_grid(name, rows, aspect):
    """Which grid a table with this many rows covers: (class-token rows, (gh, gw)), or None if none fits.

    aspect (height, width) is the image's shape up to scale; it makes the answer unique.
    """
    p, q = (side // math.gcd(*aspect) for side in aspect)
    if "pos_embed" in name:  # gh gw rows, one more with a class token
        for prefix in (0, 1):
            k = math.isqrt((rows - prefix) // (p * q))
            if k and k * k * p * q == rows - prefix:
                return prefix, (k * p, k * q)
        return None
    # BEiT: (2 gh - 1)(2 gw - 1) offsets, then cls-token, token-cls, cls-cls
    for k in range(1, rows + 1):
        if (2 * k * p - 1) * (2 * k * q - 1) == rows - 3:
            return 3, (k * p, k * q)
    return None


def find_window(rows, height, width):
    """MixMIM's windows are k x k, cut to the stage's map (height, width): (0, (wh, ww)) with this many rows, or None."""
    for k in range(1, max(height, width) + 1):
        wh, ww = min(k, height), min(k, width)
        if (2 * wh - 1) * (2 * ww - 1) == rows:
            return 0, (wh, ww)
    return None


def resample(rows, old, new):
    """(h w, D) on the grid old = (h, w) -> the grid new, bicubic. Equal grids: the same bits."""
    if old == new:
        return rows
    image = rearrange(rows.float(), "(h w) d -> 1 d h w", h=old[0])
    return rearrange(F.interpolate(image, size=new, mode="bicubic", align_corners=False), "1 d h w -> (h w) d")


def resize_table(name, table, target, source_aspect, target_aspect, where, windows=None):
    """A position or bias table in the target's size -> (table, what was done, or None if nothing).

    windows: for a window's bias table, the file's window as of find_window and the model's (wh, ww)
    """
    axis = 1 if "pos_embed" in name else 0
    rows, new_rows = table.shape[axis], target.shape[axis]
    if windows:
        source, wanted = windows[0], (0, windows[1])
    else:
        source, wanted = find_grid(name, rows, source_aspect or (1, 1)), find_grid(name, new_rows, target_aspect)
    if rows == new_rows and (wanted is None or source is None and source_aspect is None):
        return table, None  # nothing tells the grid, but the size is right
    if source is None or wanted is None:
        raise ValueError(f"{name} has {rows} rows in {where} and {new_rows} in the model, and no grid fits the "
                         f"{'file' if source is None else 'model'}'s; pass grid=(gh, gw), the rows and columns of patches "
                         "the file was trained with")
    (extra, old), (new_extra, new) = source, wanted
    if source == wanted:
        return table, None
    if source_aspect is None and rows == new_rows:
        raise ValueError(f"{name} of {where} fits both a {old[0]}x{old[1]} and the model's {new[0]}x{new[1]} patches; pass "
                         f"grid={old} or grid={new}, whichever the file was trained with")
    if axis == 1:  # (1, prefix + gh gw, D)
        prefix = torch.zeros_like(table[0, :new_extra]) if new_extra > extra else table[0, :new_extra]
        resized = torch.cat([prefix.float(), resample(table[0, extra:], old, new)])[None]
    else:  # ((2 gh - 1)(2 gw - 1) + extra, heads)
        offsets = [(2 * gh - 1, 2 * gw - 1) for gh, gw in (old, new)]
        last = rows - extra
        resized = torch.cat([resample(table[:last], *offsets), table[last:].float()[:new_extra]])
    done = f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    if extra != new_extra:
        done += ", class row " + ("dropped" if extra > new_extra else "added as zeros")
    return resized, done


def check_parts(state, target, where):
    """A position table, relative bias or layer scale on one side only would change what the network computes."""
    def has(names, part):
        return any(re.match(part, name) for name in names)

    shared, per_block = r"rel_pos_bias\.", r"blocks\.\d+\.attn\.relative_position_bias_table"
    parts = {"relative position bias": f"{shared}|{per_block}", "layer scale": r"blocks\.\d+\.gamma_",
             "position table": "pos_embed$"}
    bias, scale, pos = (has(state, part) for part in parts.values())
    faults = ["the model has no " + name for name, part in parts.items() if has(state, part) and not has(target, part)]
    if bias and not pos and has(target, "pos_embed$"):
        faults.append("the file has no position table")
    if has(state, per_block) and has(target, shared):
        faults.append("the file has one relative position bias per block, the model shares one")
    if faults and has(target, r"blocks\.0\."):
        way_out = ['rel_pos_bias="block"' + ("" if has(state, per_block) else ' (or "shared")')] * bias
        way_out += ["layer_scale=0.1"] * scale + ['pos_embed="learned"' if pos else "pos_embed=None"]
        raise ValueError(f"{where} does not fit: {', '.join(faults)}; build the model with {', '.join(way_out)}")


def check_match(state, adapted, target, skipped, where):
    """Most of the encoder must be there, in the same shapes, and nothing inside the blocks may be left over."""
    encoder = [name for name in target if not name.startswith(("head.", "fc_norm.", "norm."))]
    absent = [name for name in encoder if name not in adapted]
    if len(absent) > 0.1 * len(encoder):
        raise ValueError(f"{where} has only {len(encoder) - len(absent)} of the model's {len(encoder)} encoder tensors: the model "
                         f"wants {', '.join(absent[:5])}, the file has {some(skipped, 5) or 'nothing else'}; build the model "
                         "in the file's size, or rename the file's keys")
    for name, value in adapted.items():
        if value.shape != target[name].shape:
            patch = state.get("patch_embed.proj.weight", torch.empty(0))
            sizes = "embed_dim={}, in_chans={}, patch_size={}, ".format(*patch.shape[:3]) if patch.ndim == 4 else ""
            raise ValueError(f"{name} is {tuple(value.shape)} in {where} but {tuple(target[name].shape)} in the model; build "
                             f"the model in the file's sizes: {sizes}and its mlp_ratio and num_heads")
    if extra := [name for name in skipped if re.match(r"(layers\.\d+\.)?blocks\.", name)]:
        raise ValueError(f"{where} has parts of blocks that the model lacks ({some(extra)}); build the model with the file's "
                         "depth, or delete them from the state dict if you want the first blocks only")


def some(names, limit=4):
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def source_aspect(file):
    """(height, width) of the images that one of our own checkpoints was trained with, else None."""
    size = file["args"].get("img_size") if isinstance(file.get("args"), dict) else None
    return (size, size) if isinstance(size, int) else size and tuple(size)


def encoder_options(file):
    """Keyword arguments that a ViT needs to take a file in as it is: patch_size, img_size, pos_embed, rel_pos_bias, layer_scale, where known.

    file: what read_checkpoint returns. Heads, depth and width are not among them: they are the preset's.
    """
    state = convert(find_tensors(file))[1]
    shared, block = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    options = {"rel_pos_bias": "shared"} if shared in state else {"rel_pos_bias": "block"} if block in state else {}
    if "blocks.0.gamma_1" in state:
        options["layer_scale"] = 0.1  # the file's own values come by loading
    if options.get("rel_pos_bias") and "pos_embed" not in state:
        options["pos_embed"] = None
    name = next((name for name in ("pos_embed", shared, block) if name in state), None)
    patch = state.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4 and patch.shape[2] == patch.shape[3]:
        options["patch_size"] = patch.shape[2]
    if name and "patch_size" in options:
        rows = state[name].shape[1] if name == "pos_embed" else state[name].shape[0]
        found = find_grid(name, rows, source_aspect(file) or (1, 1))
        if found:
            options["img_size"] = tuple(side * options["patch_size"] for side in found[1])
    return options


def load_pretrained(model, path, verbose=True, grid=None, name=None):
    """Load a published checkpoint, or one of ours, into a model; print and return a Report.

    path  a file, or a state dict (or a checkpoint's whole dict) already read; name: what to call that in messages
    grid  (gh, gw) rows and columns of patches the file was trained with; only their ratio counts. By default
          the shape of args["img_size"] if it is our own checkpoint, else square, as all published files are

    The model's grid is model.grid_size. A head with another number of classes stays new, and so does fc_norm
    where the model pools the mean and the file has norm: both are reported. The position table is the file's,
    resampled; never rebuild it, since MoCo v3 and MAE order the sin-cos channels differently. Heads are not
    in any shape: create_vit("vit_s16", num_heads=12) for MoCo v3 and MIRL, 6 for DeiT and timm.

    ValueError, before the model is touched, if the file is unreadable or does not fit.
    """
    file, where = (path, name or "the state dict") if isinstance(path, dict) else (read_checkpoint(path), str(path))
    tensors = find_tensors(file)
    if not tensors:
        raise ValueError(f"{where} holds no tensors under {', '.join(CONTAINERS)} or at its top; keys: {some(map(str, file))}")
    kind, state, dropped = convert(tensors)
    aspect = source_aspect(file)
    if aspect:  # our train.py saves args as a plain dict; others save a Namespace
        kind = "ours"
    aspect = grid or aspect
    target_aspect = getattr(model, "grid_size", (1, 1))
    windows = {f"{name}.relative_position_bias_table": module.window for name, module in model.named_modules() if hasattr(module, "window")}
    positions = state.get("absolute_pos_embed")
    first_map = find_grid("pos_embed", positions.shape[1], aspect or (1, 1)) if positions is not None and positions.ndim == 3 else None
    where = f"{where} [{kind}]"

    target = {name: value for name, value in model.state_dict().items() if not name.endswith(INDEX)}
    check_parts(state, target, where)
    shared = "rel_pos_bias.relative_position_bias_table"
    if shared in state and shared not in target:  # BEiT pre-trains one table and fine-tunes a copy in every block
        table = state.pop(shared)
        state |= {name: table for name in target if name.endswith("attn.relative_position_bias_table")}

    adapted, resized, skipped = {}, {}, []
    for name, value in state.items():
        if name not in target or (name.startswith("head.") and value.shape != target[name].shape):
            skipped.append(name)
            continue
        is_table = ("pos_embed" in name and value.ndim == 3) or name.endswith("relative_position_bias_table")
        pair = None
        if name in windows:
            stage = int(name.split(".")[1])  # layers.STAGE.blocks...
            source = find_window(value.shape[0], *(side // 2**stage for side in first_map[1])) if first_map else None
            pair = source, windows[name]
        if is_table and value.shape[-1] == target[name].shape[-1]:
            value, done = resize_table(name, value, target[name], aspect, target_aspect, where, pair)
            if done:
                resized[name] = done
        adapted[name] = value
    check_match(state, adapted, target, skipped, where)
    model.load_state_dict(adapted, strict=False)

    missing = [name for name in target if name not in adapted]
    if verbose:
        count = sum(value.numel() for value in adapted.values())
        print(f"loaded {len(adapted)} tensors ({count / 1e6:.3g} M parameters) from {where}; "
              f"resized: {some(resized.values()) or 'none'}; skipped: {some(skipped) or 'none'}; "
              f"missing: {some(missing) or 'none'}" + (f"; not of the encoder: {some(dropped, 2)}" if dropped else ""))
        print(f"  {kind}: {FORMATS[kind]}")
    return Report(kind, list(adapted), list(resized), skipped, missing)


if __name__ == "__main__":
    import tempfile

    from vit import ViT

    torch.manual_seed(0)
    small = dict(patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    trained = ViT(img_size=16, **small).state_dict()
    mae = {"model": trained | {"mask_token": torch.zeros(1, 1, 16), "decoder_pred.weight": torch.zeros(48, 16)},
           "args": argparse.Namespace(model="mae_demo")}
    moco = {"state_dict": {f"module.{part}.{name}": value for name, value in trained.items()
                           for part in ("base_encoder", "momentum_encoder")}}
    beit = ViT(img_size=16, pos_embed=None, rel_pos_bias="shared", layer_scale=0.1, **small).state_dict()
    for i in range(2):
        del beit[f"blocks.{i}.attn.qkv.bias"]
        beit |= {f"blocks.{i}.attn.{name}_bias": torch.randn(32) for name in "qv"}

    with tempfile.TemporaryDirectory() as folder:
        for name, file in (("mae.pth", mae), ("moco.pth.tar", moco), ("beit.pth", beit)):
            torch.save(file, Path(folder, name))

        print("a MAE file into a classifier of another size that pools the mean: fc_norm and head stay new")
        model = ViT(img_size=(8, 24), **small | dict(num_classes=10), pool="mean")
        load_pretrained(model, Path(folder, "mae.pth"))
        same = torch.equal(model.pos_embed[:, 0], trained["pos_embed"][:, 0])
        print(f"  1 + 16 positions became {model.pos_embed.shape[1]} (expect 1 + 2 x 6 = 13), class row untouched: {same}\n")

        print("a MoCo v3 file into a ViT of its own size: every tensor bit for bit")
        model = ViT(img_size=16, **small)
        load_pretrained(model, Path(folder, "moco.pth.tar"))
        print(f"  equal: {all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())}\n")

        print("a BEiT file: q and v biases joined, the shared relative bias copied to each block and resampled")
        model = ViT(img_size=24, pos_embed=None, rel_pos_bias="block", layer_scale=0.1, **small)
        load_pretrained(model, Path(folder, "beit.pth"))
        q, k, v = model.blocks[1].attn.qkv.bias.chunk(3)
        print(f"  q bias kept: {torch.equal(q, beit['blocks.1.attn.q_bias'])}, k bias zero: {not k.any()}; bias table of "
              f"7 x 7 + 3 rows -> {len(model.blocks[0].attn.relative_position_bias_table)} (expect 11 x 11 + 3 = 124)\n")

        print("the same file into a plain ViT is refused:")
        try:
            load_pretrained(ViT(img_size=16, **small), Path(folder, "beit.pth"))
        except ValueError as error:
            print(f"  ValueError: {error}")
