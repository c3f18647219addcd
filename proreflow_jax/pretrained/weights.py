"""safetensors <-> parameters, total in both directions: every name and shape fits, or one error lists those that do not.

Torch keeps convolutions as (out, in, h, w) and linear weights as (out, in); ours are (h, w, in, out) and (in, out).
Embedding tables and buffers are the same in both. Files are read tensor by tensor, so a model never lies in memory twice.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proreflow_jax import MissingFile, RunFailed, UserError
from proreflow_jax.pretrained.config_fields import DAMAGED, MEND, text_layers

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Index = tuple[slice, ...]
Part = Callable[[Index], np.ndarray]  # a slice of one tensor, both in torch's layout

TABLE = re.compile(r"((token|position)_embedding|(^|\.)shared|\.relative_attention_bias)\.weight$")
TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # T5's one table under two names; files have either, or both
IGNORED = re.compile(r"(^|\.)position_ids$")  # a constant that old text encoders stored
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # so in SD 1.5's VAE on the Hub
OLD_NAME = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16", ".bf16")  # the exact numbers first
HALF = re.compile(r"\.(fp16|bf16)(?=[.-])")  # in the name of a file, of a shard, and of an index
FLOATS = ("F16", "BF16", "F32", "F64")
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
CONVERT = (
    "convert it where you trust it: "
    """python -c "from diffusers import DiffusionPipeline as P; P.from_pretrained('FOLDER').save_pretrained('NEW_FOLDER')\""""
)
TWO_MODELS = "they are of two models"
LISTED = 4  # names printed of each kind of mismatch


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of some safetensors files. Names are read at once, values on access, whole or in part.

    A file is opened anew for every tensor: the pages of an open file stay mapped in memory.
    Raises ValueError, one line, for a file that is missing or broken, or a tensor that is not of one of the `kinds`: by
    default no integers, and nothing in eight bits.
    """

    def __init__(self, paths: Iterable[Path], kinds: tuple[str, ...] = FLOATS) -> None:
        self._kinds = kinds
        self._where: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}  # of the files' headers
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with _opened(path) as file:
                self.metadata |= file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 - no mapping
                    self._where[name], self._shapes[name] = path, tuple(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, (slice(None),) * len(self._shapes[name]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Torch's shape of a tensor; nothing is read."""
        return self._shapes[name]

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The entries of a tensor at one slice for each of torch's axes; only they are read."""
        with _opened(path := self._where[name]) as file:
            stored = file.get_slice(name)
            if (kind := stored.get_dtype()) not in self._kinds:
                raise UserError(f"{path} keeps {name} in {kind}, no weights to distil: name a float16 or float32 file of it")
            return stored[index] if index else stored[...]

    def __contains__(self, name: object) -> bool:
        return name in self._where  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}: {DAMAGED}") from None


def file_name(component: str) -> str:
    """The file name of a component's weights in diffusers (in transformers for text encoders)."""
    return f"{STEMS[component.startswith('text_encoder')]}.safetensors"


def _files(folder: Path) -> list[Path]:
    for variant in VARIANTS:
        for stem in STEMS:
            if (folder / f"{stem}{variant}.safetensors").is_file():
                return [folder / f"{stem}{variant}.safetensors"]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                return _shards(index)
    missing = f"{folder} holds no {' or '.join(f'{stem}.safetensors' for stem in STEMS)}"
    if pickled := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise UserError(f"{missing}, only {pickled[0]}, a pickle, which may run code and is never opened: {CONVERT}")
    raise MissingFile(missing)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors files (JSON with a weight_map)") from None
    if bad := [name for name in names if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", str(name))]:
        raise UserError(f"{index}: {bad[0]!r} is not a plain file name that ends in .safetensors")
    return [index.parent / name for name in names]


def read_tensors(folder: Path) -> Tensors:
    """All tensors of one component, torch names and layout, as they lie on disk: one file or sharded, any precision.

    Of several precisions the first there is taken: full, fp16, bf16. Raises FileNotFoundError or ValueError, one line.
    Pickled weights are refused; the error says how to convert them.
    """
    return Tensors(_files(folder))


def order(name: str, axes: int) -> tuple[int, ...]:
    """Torch's axes in the order of ours: axis i of our layout is axis `order[i]` of torch's."""
    if axes == 4:
        return (2, 3, 1, 0)
    return (1, 0) if axes == 2 and not TABLE.search(name) else tuple(range(axes))


def listing(kind: str, rows: Iterable[str]) -> list[str]:
    """["3 missing: a, b, c"] for an error's line, long lists cut and counted; [] for no rows."""
    rows = sorted(rows)
    more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    return [f"{len(rows)} {kind}: {', '.join(rows[:LISTED])}{more}"] if rows else []


def from_torch(
    tensors: Mapping[str, np.ndarray], shapes: Shapes, origin: str, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Torch tensors -> parameters in our layout.

    Args:
      tensors: {torch name: array in torch's layout}. Text encoders may lack the `text_model.` prefix, VAEs may have the
        attention names of old diffusers.
      shapes: of the network, from `Network.shapes`.
      origin: where the tensors come from, for the error.
      dtype: of the result.

    Raises:
      ValueError: one line with every kind of mismatch: missing, unexpected, of another shape, not finite.
    """
    stored, misshapen, not_finite, params = names_today(tensors, shapes), {}, [], {}
    for name in [name for name in shapes if name in stored]:
        tensor = tensors[stored[name]]
        tensor = tensor.transpose(order(name, tensor.ndim))
        if tensor.shape != shapes[name].shape:
            misshapen[name] = tensor.shape
        elif not finite(tensor):
            not_finite.append(name)
        params[name] = np.ascontiguousarray(tensor, dtype)
    check_tensors(origin, shapes, stored, misshapen, not_finite)
    return params


def place(
    tensors: Mapping[str, np.ndarray],
    shapes: Shapes,
    shardings: Mapping[str, jax.sharding.Sharding],
    origin: str,
    dtype: Any = np.float32,
) -> dict[str, jax.Array]:
    """`from_torch` onto a mesh: each process reads its own shards and nothing else.

    A slice of a parameter, its axes in torch's order, is a slice of the file. So a model that lies over four machines is read
    once in all, and no host holds more than its part and one tensor. Devices that hold the same slice share one reading.

    Args:
      tensors, shapes, origin, dtype: see `from_torch`. Mappings other than `Tensors` are read whole, one tensor at a time.
      shardings: {our name: where it lies}.

    Raises:
      ValueError: as `from_torch`. Names, and shapes that stand in the file, are compared before anything is read. Only the
        processes that read a number see that it is not finite.
    """
    stored = names_today(tensors, shapes)
    listed = [name for name in shapes if name in stored] if isinstance(tensors, Tensors) else []
    in_file = {name: _ours(name, tensors.shape(stored[name])) for name in listed}
    check_tensors(origin, shapes, stored, {name: shape for name, shape in in_file.items() if shape != shapes[name].shape}, ())
    placed, misshapen, not_finite = {}, {}, []
    for name, expected in shapes.items():
        shape, part = _source(tensors, stored[name])
        if _ours(name, shape) != expected.shape:
            misshapen[name] = _ours(name, shape)
            continue
        read = _reader(name, part, dtype, not_finite)
        placed[name] = jax.make_array_from_callback(expected.shape, shardings[name], read, dtype=dtype)
    check_tensors(origin, shapes, stored, misshapen, not_finite)
    return placed


def _ours(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in order(name, len(shape)))


def _source(tensors: Mapping[str, np.ndarray], name: str) -> tuple[tuple[int, ...], Part]:
    """(shape, how to read a part) of one tensor."""
    if isinstance(tensors, Tensors):
        return tensors.shape(name), lambda index: tensors.part(name, index)
    whole = tensors[name]
    return whole.shape, whole.__getitem__


def _reader(name: str, part: Part, dtype: Any, not_finite: list[str]) -> Callable[[Index], np.ndarray]:
    """The callback of one array: a slice of ours -> its numbers, read once."""
    read: dict[tuple, np.ndarray] = {}

    def callback(index: Index) -> np.ndarray:
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in read:
            axes = order(name, len(index))
            values = part(tuple(index[axes.index(axis)] for axis in range(len(axes)))).transpose(axes)
            if not finite(values) and name not in not_finite:
                not_finite.append(name)
            read[key] = np.ascontiguousarray(values, dtype)
        return read[key]

    return callback


def names_today(tensors: Iterable[str], shapes: Shapes) -> dict[str, str]:
    """{name as in `shapes`: name as in the file}, for names of today and of old files; constants are left out.

    So is one layer of a text encoder behind the last that its config counts, as in transformers: a model for "clip skip".
    """
    stored = {OLD_NAME.sub(lambda match: OLD[match[0]], name): name for name in tensors if not IGNORED.search(name)}
    if "text_model.final_layer_norm.weight" in shapes and "final_layer_norm.weight" in stored:
        stored = {name if name.startswith("text_") else f"text_model.{name}": torch for name, torch in stored.items()}
    for name in [name for name in TIED if name in stored and TIED[name] in shapes]:
        stored.setdefault(TIED[name], stored.pop(name))
    counted = text_layers(shapes)
    return {name: torch for name, torch in stored.items() if not counted or text_layers([name]) != counted + 1}


def check_tensors(
    origin: str, shapes: Shapes, stored: Iterable[str], misshapen: Mapping[str, tuple[int, ...]], not_finite: Iterable[str]
) -> None:
    """Raises ValueError, one line with every kind of mismatch between a file and the `shapes` that a network expects.

    `origin` names the file, `stored` its names (see `names_today`), `misshapen` its shapes, in our layout, that do not fit.
    """
    shape_rows = [f"{name} {shape} instead of {shapes[name].shape}" for name, shape in misshapen.items()]
    kinds = [
        *listing("missing", set(shapes).difference(stored)),
        *listing("unexpected", set(stored).difference(shapes)),
        *listing("of another shape (ours)", shape_rows),
        *listing("not finite", not_finite),
    ]
    if kinds:
        why = f"{TWO_MODELS}, {MEND}" if misshapen or set(stored) != set(shapes) else MEND
        raise UserError(f"{origin}: weights do not fit its config.json: {'; '.join(kinds)}: {why}")


def finite(tensor: np.ndarray) -> bool:
    """Whether all numbers of a tensor are finite."""
    return bool(np.isfinite(tensor if tensor.dtype in (np.float32, np.float64) else tensor.astype(np.float32)).all())


def to_torch(params: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Parameters -> torch's layout, ready for `save_tensors`; the inverse of `from_torch`."""
    back = lambda name, tensor: np.ascontiguousarray(tensor.transpose(np.argsort(order(name, tensor.ndim))))
    return {name: back(name, np.asarray(value, dtype)) for name, value in sorted(params.items())}


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one .safetensors file as diffusers and transformers expect it; `metadata` goes into its header.

    Raises FloatingPointError for numbers that are not finite, before the file is there; RunFailed for a full disk.
    """
    if bad := [name for name, tensor in tensors.items() if not finite(tensor)]:
        half = " (float16 ends at 65504: take --dtype=float32 or bfloat16)" if tensors[bad[0]].dtype == np.float16 else ""
        raise FloatingPointError(f"{path.name} is not written: {listing('not finite', bad)[0]}{half}")
    path.touch()
    mode = path.stat().st_mode  # by the user's umask; safetensors (0.8) writes files for their owner alone
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # a full disk is one, no OSError
        raise RunFailed(f"{path} could not be written: {error}") from error
    path.chmod(mode)
