"""Pictures as text inside a page, bounded in size: small ones exactly, as PNG; large ones reduced, as JPEG."""

import base64
import io
from functools import lru_cache

from PIL import Image

from proreflow_jax.storage.paths import Location

EXACT = 1 << 16  # bytes of a PNG that goes into the page as it is
SIDES = (768, 1100)  # pixels, width and height, that a reduced picture fits into
WIDE = (1280, 1600)  # the same of a table's picture
QUALITY = 85  # of a JPEG


@lru_cache(maxsize=32)
def whole(path: Location, size: int, wide: bool = False) -> str:
    """A picture file as data:. size: its bytes, so that another picture of this name is read anew."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return as_data(image.convert("RGB"), WIDE if wide else SIDES)


@lru_cache(maxsize=32)
def halves(path: Location, size: int, width: int, gap: int) -> tuple[str, str]:
    """(left, right) half of a picture as data:, each `width` pixels wide with `gap` between; ("", whole) if it is not so."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image = image.convert("RGB")
        if image.width != 2 * width + gap:
            return "", as_data(image, SIDES)
        left, right = (image.crop((x, 0, x + width, image.height)) for x in (0, width + gap))
        return as_data(left, SIDES), as_data(right, SIDES)


def as_data(image: Image.Image, sides: tuple[int, int]) -> str:
    """An image as a data: address."""
    if image.width <= sides[0] and image.height <= sides[1]:
        data = _encoded(image, "PNG")
        if len(data) <= EXACT:
            return f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = image.copy()
    image.thumbnail(sides, Image.Resampling.LANCZOS, reducing_gap=2.0)
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(image, 'JPEG', quality=QUALITY)).decode()}"


def _encoded(image: Image.Image, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
