"""Files: what the data sets read, text and pictures, is opened here and nowhere else.

A folder of photographs holds surprises: a pipe named x.jpg that blocks for ever, a PostScript program named
x.jpg that PIL would hand to Ghostscript, pictures that lie on their side until EXIF turns them, transparent
ones, gray of 16 bits. Whatever it is, the reader gives

    read_image(path) -> uint8 (3, H, W), upright, on white                                                (1)

or a ValueError: one printable line that names the file and says what is wrong.

Needs: torch, torchvision.
Demo: python files.py (at once) reads a few odd files.
"""

import os
import struct
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps  # comes with torchvision
from torchvision.transforms import v2

# PIL knows more, and would run Ghostscript on a PostScript file
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
# what PIL raises on broken files
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata in files that are read all the same


# ---------------------------------------------------------------------------- text


def shown(path):
    """A path as one line that any terminal can print: line breaks and bytes that are not UTF-8 are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(path))


def check_regular(path):
    """ValueError for what would block when it is opened (a pipe, a socket) or never end (a device)."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{shown(path)} is no regular file")


def read_text(file):
    """The text of a file in UTF-8."""
    check_regular(file)
    try:
        return Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(file)} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read {shown(file)} ({error.strerror})") from None


# ---------------------------------------------------------------------------- pictures


@contextmanager
def open_picture(path):
    """A PIL image of a regular file in one of FORMATS, decoded; ValueError names the file and the fault."""
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            yield picture
    except BROKEN as error:
        reason = shown(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise ValueError(f"cannot read image {shown(path)} ({reason}); repair or remove it") from None


def read_image(path):
    """(1) An image file -> uint8 (3, H, W): upright as EXIF says, transparent parts on white, gray as RGB."""
    with open_picture(path) as picture:
        return to_rgb(picture)


def to_rgb(picture):
    """The same of an opened PIL image."""
    turn_upright(picture)
    if picture.mode.startswith(("I", "F")):
        return to_bytes(picture).expand(3, -1, -1)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, "white")
        page.alpha_composite(picture)
        picture = page
    return v2.functional.pil_to_tensor(picture.convert("RGB"))


def turn_upright(picture):
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # broken EXIF raises anything; the pixels are whole
        pass


def to_bytes(picture):
    """Gray of more than 8 bits -> uint8 (1, H, W); PIL would cut off what is above 255."""
    if picture.mode != "F":
        picture = picture.convert("I")
    gray = v2.functional.pil_to_tensor(picture)
    low, high = gray.min().item(), gray.max().item()

    # 16 bits: the upper eight
    if picture.mode == "I" and 0 <= low <= high < 1 << 16:
        return (gray >> 8).to(torch.uint8)
    # floats: 0..1, or 0..255 as they are
    if picture.mode == "F" and 0 <= low <= high <= 255:
        return (gray * (255 if high <= 1 else 1)).round().to(torch.uint8)
    raise ValueError(
        f"its values lie in {low:g}..{high:g}; rescale them to 0..1 (floats) or 0..65535 (integers)"
    )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        # a picture on its side, one without a background, gray of 16 bits, a program
        lying = Image.new("RGB", (30, 20), "navy")
        exif = lying.getexif()
        exif[0x0112] = 6  # turn by 90 degrees
        lying.save(f"{folder}/lying.jpg", exif=exif)
        Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(f"{folder}/transparent.png")
        Image.new("I;16", (30, 20), 0x8000).save(f"{folder}/sixteen.png")
        Path(folder, "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        for name in sorted(os.listdir(folder)):
            try:
                image = read_image(f"{folder}/{name}")
                print(f"{name:16} {tuple(image.shape)}, mean {image.float().mean():.0f}")
            except ValueError as error:
                print(str(error).replace(f"{folder}/", ""))
    print("(expect 30 rows of lying.jpg, 255 for transparent.png, 128 for sixteen.png, and no program)")
