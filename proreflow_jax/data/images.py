"""Bytes from strangers -> pixels and captions, with limits that are checked before anything is decoded.

An image may be a bomb, a caption may be anything. An image is opened with a list of formats and a limit on its pixels before
any of it is decoded. A defect of one example is raised as `Unusable`: another example may take its place (data/skip_bad.py).
Every other error ends the run.
"""

import io
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.storage import atomic

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel; others have no one meaning
EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of images in layouts of files
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # its values; 1 stands already
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    },
}
PIXEL_LIMIT = 64 << 20  # a 8192 x 8192 picture
BYTE_LIMIT = 64 << 20
LINE_LIMIT = 4096  # bytes of a caption; CLIP reads 77 tokens
CAPTION_FILE_LIMIT = 1 << 20  # bytes of a .txt or .json with one caption

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class Unusable(UserError):
    """One example's image or caption is bad. Its bytes decide that, so every process decides alike."""


class Original(NamedTuple):
    """An example as it lies in a dataset."""

    name: str  # for messages: where it lies
    image: bytes  # encoded
    caption: str


class Originals(Protocol):
    """Random access to a dataset's examples; an item that has no image or caption raises Unusable."""

    name: str  # for messages: the folder or pattern

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Original: ...


class Pictures:
    """`source[i] -> {"image": uint8 (res, res, 3), "caption": str}` from originals.

    Raises ValueError at once for a resolution below 8, Unusable (naming the example) where one is taken and is not good.
    """

    def __init__(self, originals: Originals, resolution: int) -> None:
        check_resolution(resolution)
        self.name, self._originals, self._resolution = originals.name, originals, resolution

    def __len__(self) -> int:
        return len(self._originals)

    def __getitem__(self, index: int) -> dict[str, Any]:
        original = self._originals[index]
        try:
            return {"image": decode_image(original.image, self._resolution), "caption": original.caption}
        except Unusable as error:
            raise Unusable(f"{original.name}: {error}") from error


def check_resolution(resolution: int) -> None:
    """Raises ValueError for a resolution below 8 pixels."""
    if resolution < 8:
        raise UserError(f"resolution {resolution} must be at least 8 pixels: set --config.data.resolution")


def check_index(index: int, count: int) -> None:
    """Raises IndexError unless 0 <= index < count."""
    if not 0 <= index < count:
        raise IndexError(f"example {index} is outside 0 .. {count - 1}")


def decode_image(encoded: bytes, resolution: int) -> UInt8[np.ndarray, "{resolution} {resolution} 3"]:
    """Decodes an image: turned as its EXIF says, centre square of the short side, resized bicubically.

    Transparency is laid on white, grey becomes RGB. An image of that size already comes back unchanged.

    Raises:
        Unusable: not an image of FORMATS and MODES, damaged, or larger than the limits (found before decoding).
    """
    if len(encoded) > BYTE_LIMIT:
        raise Unusable(f"an image of {len(encoded)} bytes is over the limit of {BYTE_LIMIT}")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except MemoryError:  # of this machine, not of these bytes; so below
        raise
    except Exception as error:  # Pillow's readers raise many kinds on bytes from strangers; so below
        raise Unusable(f"not an image of {', '.join(FORMATS)} ({atomic.one_line(error)})") from error
    width, height = image.size
    if width * height > PIXEL_LIMIT:
        raise Unusable(f"an image of {width} x {height} is over the limit of {PIXEL_LIMIT} pixels")
    return square(image, resolution)


def square(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "{resolution} {resolution} 3"]:
    """An opened image as `decode_image` has it. Raises Unusable if it is damaged, or has a mode that is not in MODES."""
    if image.mode not in MODES:
        raise Unusable(f"an image of mode {image.mode}: only 8 bits a channel are read ({', '.join(MODES)})")
    try:
        image = _upright(image)
    except MemoryError:
        raise
    except Exception as error:
        raise Unusable(f"a damaged {image.format} image ({atomic.one_line(error)})") from error
    width, height = image.size  # of the picture that stands
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)  # cropping and resizing in one: no huge picture in between
    return np.array(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))


def _upright(image: Image.Image) -> Image.Image:
    """As RGB, turned and mirrored as viewers show it: cameras store the pixels as the sensor lay."""
    image.load()  # a PNG may keep its EXIF behind the pixels
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow's readers raise many kinds on damaged EXIF; the pixels are good
        turn = None
    upright = _rgb(image)
    return upright if turn is None else upright.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), over).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # converting RGB would copy it


# --- captions ---------------------------------------------------------------------------------------------------------


def control_character(text: str) -> bool:
    """Whether a text holds a character that is none to read; a tab is."""
    return _CONTROL.search(text) is not None


def clean_caption(text: bytes | str) -> str:
    """A caption on one line: white space of any kind becomes one blank, ends are stripped.

    Raises Unusable: it is empty, not UTF-8, longer than LINE_LIMIT bytes, or holds control characters.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unusable(f"a caption that is not UTF-8 (byte {error.start + 1})") from error
    text = " ".join(text.removeprefix("\ufeff").split())
    if not text:
        raise Unusable("no caption")
    if len(text.encode("utf-8", "surrogatepass")) > LINE_LIMIT:
        raise Unusable(f"a caption longer than {LINE_LIMIT} bytes")
    if control_character(text) or any("\ud800" <= letter <= "\udfff" for letter in text):  # a JSON escape makes half of a pair
        raise Unusable("a caption with a control character")
    return text


def first_caption(value: Any) -> str:
    """The caption a field holds: a text, or the first of a list of texts. Raises Unusable if it holds none."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = value[0] if value else None
    if value is None:
        raise Unusable("no caption")
    if not isinstance(value, str | bytes):
        raise Unusable(f"a caption that is no text but {type(value).__name__}")
    return clean_caption(value)


def json_caption(text: bytes, field: str) -> str:
    """The caption in a field of a JSON object. Raises Unusable if it is not one, or has no such text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"a caption file that is not JSON ({atomic.one_line(error)})") from error
    if not isinstance(value, dict):
        raise Unusable("a caption file whose JSON is no object")
    return first_caption(value.get(field))


def file_caption(text: bytes, caption_key: str) -> str:
    """The caption in a file of its own, by the key that `caption_file` reads."""
    _, field = caption_file(caption_key)
    return json_caption(text, field) if field else clean_caption(text)


def caption_file(caption_key: str) -> tuple[str, str]:
    """(extension, field) of a caption beside an image: "txt" -> ("txt", ""), "json/text" -> ("json", "text").

    Raises ValueError for any other form.
    """
    extension, _, field = caption_key.partition("/")
    plain = re.fullmatch(r"[A-Za-z0-9_]+", extension)
    if not plain or extension in EXTENSIONS or (extension == "json") != bool(field) or "/" in field:
        raise UserError(f"--config.data.caption_key={caption_key!r} must be txt, or json/FIELD (a file beside each image)")
    return extension.lower(), field
