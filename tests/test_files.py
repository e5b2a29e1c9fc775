import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import make_pipe

from files import read_image, shown

ROOT = Path(__file__).resolve().parents[1]


def test_a_path_is_shown_as_one_printable_line():
    assert shown("K\u00e4tzchen \u732b/a b.jpg") == "K\u00e4tzchen \u732b/a b.jpg"
    assert shown("a\nb\udcff.jpg") == "a\\nb\\udcff.jpg"


def quarters(height=24, width=32):
    """White, with a black top left quarter."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_turns_a_picture_upright(tmp_path, orientation, suffix):
    """The eight orientations are the eight corners that the black quarter may lie in, on its side or not."""
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    undo |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}
    undo |= {8: Image.Transpose.ROTATE_270}
    picture = quarters()
    stored = picture.transpose(undo[orientation]) if orientation > 1 else picture
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    image = read_image(tmp_path / f"a.{suffix}").float()
    assert image.shape == (3, 24, 32)
    assert image[:, :10, :14].mean() < 10 and image[:, 14:].mean() > 245 and image[:, :, 18:].mean() > 245


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        indices = Image.new("P", (8, 8), 1)
        indices.putpalette([0, 0, 0, 0, 0, 255])
        indices.paste(0, (0, 0, 4, 8))
        indices.save(tmp_path / "a.png", transparency=1)
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert (image[:, :, :4] == 0).all() and (image[:, :, 4:] == 255).all()


def test_half_transparent_black_is_gray(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 255 - 51).all()


@pytest.mark.parametrize(
    "pixels, expected",
    [
        (np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32), lambda x: x >> 8),
        (np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32), lambda x: np.rint(255 * x)),
        (np.linspace(0, 255, 1024, dtype=np.float32).reshape(32, 32), np.rint),
        (np.arange(0, 65536, 64, dtype=np.int32).reshape(32, 32), lambda x: x >> 8),
    ],
)
def test_gray_of_more_than_8_bits_keeps_its_content(tmp_path, pixels, expected):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert image.shape == (3, 32, 32) and len(image.unique()) == 256
    for channel in image:
        assert (channel.numpy() == expected(pixels)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e6])
def test_floats_of_unknown_scale_are_refused(tmp_path, value):
    Image.fromarray(np.full((4, 4), value, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif .*rescale"):
        read_image(tmp_path / "a.tif")


def postscript(file):
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")


@pytest.mark.parametrize("make, reason", [
    (make_pipe, "no regular file"),
    (lambda file: file.mkdir(), "no regular file"),
    (postscript, "cannot identify"),
    (lambda file: file.write_bytes(b""), "cannot identify"),
])
def test_what_is_no_image_file_is_named_and_does_not_hang(tmp_path, make, reason):
    make(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=f"a.jpg .*{reason}") as error:
        read_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_warnings_of_pil_do_not_stand_beside_the_sentence(tmp_path):
    quarters(30, 30).save(tmp_path / "a.png")
    code = "import sys; from files import Image, read_image; Image.MAX_IMAGE_PIXELS = 600; read_image(sys.argv[1])"
    words = [sys.executable, "-W", "always::Warning:PIL", "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "DecompressionBomb" not in done.stderr  # a warning above 600, an error above 1200
