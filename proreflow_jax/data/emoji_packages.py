"""The emoji dataset from the npm packages that publish the pictures: fetched by the ordinary npm client, drawn on white.

Packages are read as the archives that npm fetched, in memory: nothing of them is installed or run. Skin-tone copies are left
out, and sets whose licence does not allow a model to be passed on (share-alike, or none).
"""

import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.data import emoji
from proreflow_jax.storage import atomic

CAPTIONS = ("emojibase-data", "17.0.0")  # names, keywords and groups; MIT, Miles Johnson
SHORTCODES = ("emojibase", "emojibase-legacy", "iamcal", "joypixels")  # files of other names of a concept, tried in this order
FINER = 2  # SVGs are drawn so many times larger, then averaged


class Style(NamedTuple):
    """One set of pictures: where it comes from, and whose it is."""

    name: str
    package: str
    version: str
    licence: str
    author: str
    source: str


STYLES = (
    Style("noto", "emoji-datasource-google", "16.0.0", "Apache-2.0", "Google", "https://github.com/googlefonts/noto-emoji"),
    Style("twemoji", "emoji-datasource-twitter", "16.0.0", "CC-BY-4.0", "Twitter", "https://github.com/jdecked/twemoji"),
    Style("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft", "https://github.com/microsoft/fluentui-emoji"),
    Style(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Microsoft",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Style("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google", "https://github.com/googlefonts/noto-emoji"),
    Style("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla", "https://github.com/mozilla/fxemoji"),
    Style("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One", "https://github.com/EmojiTwo/emojitwo"),
)
EXCEPTIONS: dict[str, dict[str, str]] = {  # style -> code points -> icon whose name the rules do not give; "": the rules err
    "noto-v1": {"002a-20e3": "asterisk", "1f199": "up-exclamation-button", "1f1f4-1f1f2": "", "1f4c6": ""},
    "fxemoji": {
        "1f325": "whitesunbehindcloud",
        "1f366": "icecream",
        "1f444": "lips",
        "1f48f": "couplekiss",
        "1f576": "darksunglasses",
        **dict.fromkeys(
            ("1f199", "1f368", "1f3f9", "1f42d", "1f42f", "1f431", "1f433", "1f436", "1f437", "1f608", "1f60e"), ""
        ),
    },
    "emojione": {"0023-20e3": "keycap-pound", "2763": "heavy-heart-exclamation", "1f1f4-1f1f2": ""},
}


def credits_table() -> str:
    """Whose pictures these are, as a table in Markdown."""
    rows = [f"| {s.name} | {s.author} ({s.source}) | {s.licence} | {s.package} {s.version} |" for s in STYLES]
    return "\n".join(["| style | pictures by | licence | npm package |", "|---|---|---|---|", *rows])


def make(folder: Path, cache: Path, size: int, groups: Sequence[str] = ()) -> int:
    """Writes the dataset's two files into `folder`, from packages fetched into `cache` where they are not there yet.

    groups: keys of `emoji.GROUPS` whose concepts are taken; (): all.

    Returns: the number of pictures.

    Raises:
        ValueError: npm or resvg-py is missing, a package cannot be fetched, or one is damaged.
    """
    packages = [CAPTIONS, *((one.package, one.version) for one in STYLES)]
    archives = {package: fetch(cache, *package) for package in packages}
    concepts, names = read_concepts(archives[CAPTIONS], archives[STYLES[0][1:3]])
    concepts = [one for one in concepts if not groups or one["group"] in groups]
    images, style, concept = [], [], []
    for number, one in enumerate(STYLES):
        for row, image in style_pictures(one, archives[one.package, one.version], concepts, names, size):
            images.append(image)
            style.append(number)
            concept.append(row)
    arrays, table = emoji.paths(folder, size)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.drafted(arrays) as draft, open(draft, "wb") as file:
        np.savez_compressed(file, images=np.stack(images), style=np.array(style, np.uint8), concept=np.array(concept, np.int32))
    credits = [one._asdict() for one in STYLES]
    atomic.write_json(table, {"styles": [one.name for one in STYLES], "credits": credits, "concepts": concepts})
    return len(images)


def fetch(cache: Path, package: str, version: str) -> Path:
    """The archive of a package, by `npm pack` where the cache has none. Raises ValueError if npm cannot."""
    archive = cache / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", f"--pack-destination={cache}", f"{package}@{version}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise UserError("npm is not installed: it fetches the packages with the pictures") from None
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or error
        raise UserError(f"npm could not fetch {package} {version}: {atomic.one_line(str(said))}") from None
    if not archive.is_file():
        raise UserError(f"npm fetched {package} {version} but wrote no {archive}")
    return archive


def read_members(archive: Path, accept: Callable[[str], bool]) -> dict[str, bytes]:
    """{path inside the package: bytes} of the files of a package whose path is accepted. Raises ValueError if it is damaged."""
    try:
        with tarfile.open(archive) as tar:
            members = [(item, item.name.partition("/")[2]) for item in tar if item.isfile()]
            return {path: tar.extractfile(item).read() for item, path in members if accept(path)}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} is damaged ({atomic.one_line(error)}): delete it and run again") from error


def read_concepts(captions: Path, listed: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The concepts that both packages know, in the order of the captions, and {code points: other names}."""
    shortcodes = [f"en/shortcodes/{name}.json" for name in SHORTCODES]
    texts = read_members(captions, {"en/data.json", "meta/groups.json", *shortcodes}.__contains__)
    tables = {path: json.loads(text) for path, text in texts.items()}
    groups = tables["meta/groups.json"]["groups"]
    known = {bare(row["unified"]) for row in json.loads(read_members(listed, "emoji.json".__eq__)["emoji.json"])}
    concepts = [
        {"hex": row["hexcode"].lower(), "label": row["label"], "tags": row.get("tags", []), "group": groups[str(row["group"])]}
        for row in tables["en/data.json"]
        if "group" in row and bare(row["hexcode"]) in known
    ]
    names: dict[str, list[str]] = {}
    for path in shortcodes:
        for code, words in tables[path].items():
            names.setdefault(bare(code), []).extend([words] if isinstance(words, str) else words)
    return concepts, names


def bare(code: str) -> str:
    """Code points in lower case, without the selector that says "as a picture"."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def style_pictures(
    style: Style, archive: Path, concepts: list[dict[str, Any]], names: Mapping[str, list[str]], size: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "size size 3"]]]:
    """(row of the concept, picture) of all concepts that a style has, in their order."""
    if style.package.startswith("@iconify-json/"):
        texts = read_members(archive, ("icons.json", "chars.json").__contains__)
        icons, chars = json.loads(texts["icons.json"]), json.loads(texts["chars.json"])
        choose = choose_by_code(chars) if chars else choose_by_name(icons, names, EXCEPTIONS.get(style.name, {}))
        chosen = ((row, choose(one)) for row, one in enumerate(concepts))
        yield from ((row, draw_icon(icons, icon, size)) for row, icon in chosen if icon)
        return
    pictures = read_members(archive, re.compile(r"(img/\w+/64/[^/]+\.png|assets/[^/]+\.webp)").fullmatch)
    by_code = {bare(Path(path).stem): data for path, data in pictures.items()}
    coded = ((row, by_code.get(bare(one["hex"]))) for row, one in enumerate(concepts))
    yield from ((row, on_white(Image.open(io.BytesIO(data)), size)) for row, data in coded if data)


def choose_by_code(chars: Mapping[str, str]) -> Callable[[Mapping[str, Any]], str]:
    """concept -> name of its icon, by the package's own table of code points; "": none."""
    by_code = {bare(code): icon for code, icon in chars.items()}
    return lambda concept: by_code.get(bare(concept["hex"]), "")


def choose_by_name(
    icons: Mapping[str, Any], names: Mapping[str, list[str]], exceptions: Mapping[str, str]
) -> Callable[[Mapping[str, Any]], str]:
    """concept -> name of its icon, by the concept's label, then its other names; "": none."""
    by_slug = {slug(icon): icon for icon in sorted([*icons["icons"], *icons.get("aliases", {})])}

    def choose(concept: Mapping[str, Any]) -> str:
        code = bare(concept["hex"])
        if code in exceptions:
            return exceptions[code]
        slugs = (slug(name) for name in (concept["label"], *names.get(code, ())))
        return next((by_slug[name] for name in slugs if name in by_slug), "")

    return choose


def slug(name: str) -> str:
    """A name's letters and digits: "Côte d'Ivoire" -> "cotedivoire"."""
    plain = unicodedata.normalize("NFKD", name.replace("&", "and")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", plain)


def draw_icon(icons: Mapping[str, Any], name: str, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An icon of an Iconify set, in the middle of a white square."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError("pictures in SVG need resvg-py: pip install resvg-py (the extra `emoji`)") from error
    icon = icons["icons"][name if name in icons["icons"] else icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{width}" height="{height}"'
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    data = bytes(svg_to_bytes(svg_string=f"<svg {space} {box}>{icon['body']}</svg>", width=FINER * size, height=FINER * size))
    return on_white(Image.open(io.BytesIO(data)), size, Image.Resampling.BOX, FINER)


def on_white(
    image: Image.Image, size: int, resampling: Image.Resampling = Image.Resampling.LANCZOS, finer: int = 0
) -> UInt8[np.ndarray, "size size 3"]:
    """A picture in the middle of a white square, which has the picture's longer side, or `finer` sizes; then resized."""
    side = finer * size or max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGB").resize((size, size), resampling))
