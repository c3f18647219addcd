"""The same few images and captions in every layout that data/ reads."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

SIDE = 16
CAPTIONS = ("a dog", "größe 日本", 'two, "quoted" words', "four", "five", "six", "seven")


def encode(i: int, kind: str = "PNG") -> bytes:
    """An image of noise as a file."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE + i, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def originals(bad: dict[int, bytes] | None = None) -> list[tuple[bytes, str | bytes | None]]:
    """(encoded image, caption) of each example; `bad` replaces images."""
    kinds = ("PNG", "JPEG", "WEBP")
    return [((bad or {}).get(i, encode(i, kinds[i % 3])), caption) for i, caption in enumerate(CAPTIONS)]


def text(caption: str | bytes) -> bytes:
    """A caption as the bytes of a file."""
    return caption if isinstance(caption, bytes) else caption.encode()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, held in members:
            member = tarfile.TarInfo(name)
            member.size = len(held)
            tar.addfile(member, io.BytesIO(held))
    return path


def members(rows: list[tuple], start: int = 0, ending: str = "txt") -> list[tuple[str, bytes]]:
    """webdataset's members of rows: an image and, where there is a caption, its file."""
    found = []
    for i, (image, caption) in enumerate(rows, start):
        found.append((f"{i:04d}.jpg", image))
        if caption is not None:
            found.append((f"{i:04d}.{ending}", json.dumps({"text": caption}).encode() if ending == "json" else text(caption)))
    return found


def webdataset(folder: Path, rows: list[tuple], ending: str = "txt") -> dict[str, Any]:
    """Two shards. This and what follows return fields of the block `data`."""
    write_tar(folder / "a-000.tar", members(rows[:3], 0, ending))
    write_tar(folder / "a-001.tar", members(rows[3:], 3, ending))
    key = "json/text" if ending == "json" else "txt"
    return {"kind": "webdataset", "path": str(folder / "a-{000..001}.tar"), "caption_key": key}


def parquet(folder: Path, rows: list[tuple], plain: bool = False) -> dict[str, Any]:
    """Two files, row groups of two, as Hugging Face writes them; `plain`: bytes without a struct, captions as lists."""
    for part, some in enumerate((rows[:3], rows[3:])):
        images = [image if plain else {"bytes": image, "path": "../../etc/passwd"} for image, _ in some]
        captions = [[c, "another"] if plain and c is not None else c for _, c in some]
        table = pyarrow.table({"image": images, "label": list(range(len(some))), "text": captions})
        pyarrow.parquet.write_table(table, folder / f"train-0000{part}-of-00002.parquet", row_group_size=2)
    return {"kind": "parquet", "path": str(folder), "image_key": "image", "caption_key": "text"}


def beside(folder: Path, rows: list[tuple]) -> dict[str, Any]:
    """A folder with a .txt beside each image, some in a folder below."""
    (folder / "b").mkdir()
    for i, (image, caption) in enumerate(rows):
        stem = folder / ("b" if i > 4 else ".") / f"a{i}"
        stem.with_suffix(".jpg").write_bytes(image)
        if caption is not None:
            stem.with_suffix(".txt").write_bytes(text(caption))
    return {"kind": "folder", "path": str(folder), "caption_key": "txt"}


def jsonl(folder: Path, rows: list[tuple]) -> dict[str, Any]:
    """Hugging Face's imagefolder with metadata.jsonl."""
    (folder / "b").mkdir()
    lines = []
    for i, (image, caption) in enumerate(rows):
        name = f"b/z{9 - i}.jpg"
        (folder / name).write_bytes(image)
        lines.append(json.dumps({"file_name": name} | ({} if caption is None else {"text": caption})))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"kind": "folder", "path": str(folder), "caption_key": "text"}


def table(folder: Path, rows: list[tuple]) -> dict[str, Any]:
    """The same with metadata.csv."""
    lines = ["file_name,text"]
    for i, (image, caption) in enumerate(rows):
        (folder / f"{9 - i}.jpg").write_bytes(image)
        quoted = (caption or "").replace('"', '""')
        lines.append(f'{9 - i}.jpg,"{quoted}"')
    (folder / "metadata.csv").write_text("\r\n".join(lines), encoding="utf-8")
    return {"kind": "folder", "path": str(folder), "caption_key": "text"}


LAYOUTS = {
    "webdataset": webdataset,
    "webdataset-json": lambda folder, rows: webdataset(folder, rows, "json"),
    "parquet": parquet,
    "parquet-plain": lambda folder, rows: parquet(folder, rows, plain=True),
    "beside": beside,
    "jsonl": jsonl,
    "csv": table,
}


def block(folder: Path, **fields: Any) -> SimpleNamespace:
    """The block `data` of a config."""
    whole = {"split": "val", "image_key": "image", "caption_key": "txt", "resolution": SIDE, "max_bad": 0.0, "threads": 2}
    return SimpleNamespace(**(whole | {"cache": str(folder / "index")} | fields))
