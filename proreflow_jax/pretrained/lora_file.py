"""A student as base + delta, and the delta as a LoRA: a truncated SVD of every linear and convolution weight.

A delta D is read as a matrix (out, in) or (out, in*kh*kw). Its best approximation of rank r keeps the r largest singular
values (Eckart & Young 1936); a LoRA (Hu et al. 2021, eq. 3) stores it as D ~ alpha / r * up @ down. Convolutions are split
into one of the same kernel with r outputs (down) and a 1x1 one (up). Everything here is numpy, torch names and layouts.

Of a UNet `to_kohya` serves most tools, though not each takes every layer (`lora_readers`); `to_peft` serves diffusers alone.
Of SD 3's transformer `to_peft` serves both, diffusers and ComfyUI, which reads diffusers' names there.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from proreflow_jax import UserError
from proreflow_jax.pretrained.lora_factors import factor_pairs
from proreflow_jax.pretrained.weights import listing, to_torch

Tensors = Mapping[str, np.ndarray]
DOWN, UP = "lora_down.weight", "lora_up.weight"  # kohya's names
OUTER = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}  # SDXL: as all readers know it
WORST = 5  # layers named in the report


class Factors(NamedTuple):
    """One layer of a LoRA: D = alpha / r * up @ down."""

    up: np.ndarray  # (out, r), of a convolution (out, r, 1, 1)
    down: np.ndarray  # (r, in), of a convolution (r, in, kh, kw)
    alpha: float


def _refuse(title: str, problems: Mapping[str, Iterable[str]]) -> None:
    """One ValueError with every kind of problem, if there is any."""
    if parts := [part for kind, names in problems.items() for part in listing(kind, names)]:
        raise UserError(f"{title}: {'; '.join(parts)}")


def _sum(left: Tensors, right: Tensors, scale: float, names: tuple[str, str], dtype: Any = None) -> dict[str, np.ndarray]:
    """left + scale * right in float32, of `dtype` or left's, in C order (see `_scaled`); each tensor is read once."""
    lefts, rights = set(left), set(right)  # a lazy mapping's own `in` reads the tensor
    total, wrong = {}, []
    for name in sorted(lefts & rights):
        one, other = left[name], right[name]
        if one.shape != other.shape:
            wrong.append(f"{name} {one.shape} against {other.shape}")
        else:
            added = np.asarray(one, np.float32) + np.float32(scale) * np.asarray(other, np.float32)
            total[name] = np.asarray(added, dtype or one.dtype, order="C")
    problems = {
        f"only in the {names[0]}": lefts - rights,
        f"only in the {names[1]}": rights - lefts,
        "of another shape": wrong,
    }
    _refuse(f"{names[0]} and {names[1]} are not of the same network", problems)
    return total


def delta(student: Tensors, base: Tensors) -> dict[str, np.ndarray]:
    """student - base in float32, name by name.

    Raises ValueError, one line that lists them, if names or shapes differ.
    """
    return _sum(student, base, -1.0, ("student", "base"), np.float32)


def merge_delta(base: Tensors, delta: Tensors, scale: float = 1.0) -> dict[str, np.ndarray]:
    """base + scale * delta, computed in float32 and kept in the base's dtypes.

    Raises ValueError, one line that lists them, if names or shapes differ.
    """
    return _sum(base, delta, scale, ("base", "delta"))


def _energy(tensor: np.ndarray) -> float:
    return float(np.sum(np.square(tensor, dtype=np.float64)))


def _matrix(tensor: np.ndarray) -> np.ndarray:
    """(out, in) or (out, in, kh, kw) -> float64 (out, in*kh*kw)."""
    return np.asarray(tensor, np.float64).reshape(tensor.shape[0], -1)


def changed_layers(delta: Tensors) -> list[str]:
    """The names of the linear and convolution weights that changed, which a LoRA carries."""
    return sorted(n for n, v in delta.items() if n.endswith(".weight") and v.ndim in (2, 4) and np.any(v))


def _layers(delta: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Linear and convolution weights that changed, by name. Raises ValueError if none did or one is not finite."""
    _refuse("a delta of these has no LoRA", {"not finite": [n for n, v in delta.items() if not np.isfinite(v).all()]})
    changed = changed_layers(delta)
    if not changed:
        raise UserError("student and base have the same linear and convolution weights: there is no LoRA between them")
    yield from ((name, delta[name]) for name in changed)


def _truncate(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(m, n) -> up (m, r), down (r, n), all squared singular values; up @ down is the best approximation, balanced.

    The singular vectors of the smaller side are eigenvectors of its Gram matrix. float64 there resolves singular values down
    to 1e-8 of the largest, below float32's own rounding. up @ down is an exact projection in any case.
    """
    lying = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, vectors = np.linalg.eigh(lying @ lying.T)
    basis = vectors[:, ::-1][:, :rank]
    rows = basis.T @ lying
    root = np.sqrt(np.linalg.norm(rows, axis=1))
    short, long = basis * root, rows / np.where(root > 0, root, 1)[:, None]
    up, down = (short, long) if lying is matrix else (long.T, short.T)
    return up, down, squares[::-1].clip(min=0)


def _kept(spectra: Collection[np.ndarray], rank: int) -> float:
    """The share of the energy, squared singular values summed, in the `rank` largest of each layer."""
    return min(float(sum(s[:rank].sum() for s in spectra) / sum(s.sum() for s in spectra)), 1.0)


def decompose(
    delta: Tensors, rank: int, ranks: Sequence[int] = (), told: Callable[[], None] = lambda: None
) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The best LoRA of a delta, and a report of the share that it keeps.

    Args:
      delta: {torch name: (out, in) or (out, in, kh, kw) array}; other tensors (biases, norms) cannot be carried.
      rank: of every layer, capped at the layer's full rank min(out, in*kh*kw).
      ranks: other ranks to report energy and error for.
      told: called after each layer.

    Returns:
      factors: by the name of the weight, float32, with alpha = the layer's rank; none for weights that did not change.
      report: rank; layers; parameters in factors; `energy` kept, of linear and convolution weights (squares summed);
        `error` = |delta - LoRA| / |delta| over them; `energies`: (rank, energy, error) for `ranks`; `worst` layers as
        (name, rank, energy kept); `left_out`: the number of changed tensors that no LoRA carries, and the share of the
        whole delta's energy in them.

    Raises:
      ValueError: a rank < 1; nothing to decompose; a value that is not finite.
    """
    for one in (rank, *ranks):
        if one < 1:
            raise UserError(f"rank {one}: a LoRA has a rank of at least 1 (--rank)")
    factors, spectra = {}, {}
    for name, change in _layers(delta):
        up, down, spectra[name] = _truncate(_matrix(change), rank)
        r = down.shape[0]
        shapes = ((-1, r), (r, -1)) if change.ndim == 2 else ((-1, r, 1, 1), (r, *change.shape[1:]))
        up, down = (
            np.ascontiguousarray(part.reshape(shape), np.float32) for part, shape in zip((up, down), shapes, strict=True)
        )
        factors[name] = Factors(up, down, float(r))
        told()
    return factors, _report(delta, factors, spectra, (rank, *ranks))


def _report(
    delta: Tensors, factors: Mapping[str, Factors], spectra: Mapping[str, np.ndarray], ranks: Sequence[int]
) -> dict[str, Any]:
    energies = [_kept(spectra.values(), rank) for rank in ranks]
    (rank, energy, error), *others = [(r, share, float(np.sqrt(1 - share))) for r, share in zip(ranks, energies, strict=True)]
    rest = [value for name, value in delta.items() if name not in factors and np.any(value)]
    lost, carried = sum(map(_energy, rest)), float(sum(s.sum() for s in spectra.values()))
    shares = {name: _kept([s], rank) for name, s in spectra.items()}
    worst = sorted(shares, key=shares.get)[:WORST]
    return {
        "rank": rank,
        "layers": len(factors),
        "parameters": sum(f.up.size + f.down.size for f in factors.values()),
        "energy": energy,
        "error": error,
        "energies": others,
        "worst": [(name, int(factors[name].alpha), shares[name]) for name in worst],
        "left_out": {"tensors": len(rest), "energy": lost / (lost + carried)},
    }


def product(layer: Factors) -> np.ndarray:
    """alpha / r * up @ down in float32: (out, in), or (out, in, kh, kw) of a convolution."""
    up, down = (np.asarray(part, np.float32) for part in (layer.up, layer.down))
    r = down.shape[0]
    return ((layer.alpha / r) * (up.reshape(-1, r) @ down.reshape(r, -1))).reshape(up.shape[0], *down.shape[1:])


def apply_factors(base: Tensors, factors: Mapping[str, Factors], scale: float = 1.0) -> dict[str, np.ndarray]:
    """base + scale * alpha / r * up @ down where there are factors, the base's own weights elsewhere; its dtypes.

    Raises ValueError, one line that lists them, if the base lacks a layer or has it in another shape.
    """
    changes = {name: product(layer) for name, layer in factors.items()}
    changed = _sum({name: base[name] for name in base if name in changes}, changes, scale, ("base", "LoRA"))
    return {name: changed[name] if name in changed else base[name] for name in base}


def _scaled(layer: Factors, alpha: float, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """up and down that mean the same with this alpha, in C order: safetensors writes a strided array's wrong bytes."""
    root = np.float32(np.sqrt(layer.alpha / alpha))
    return tuple(np.ascontiguousarray(root * part, dtype) for part in (layer.up, layer.down))


def to_lora(factors: Mapping[str, Any], scale: float) -> dict[str, Factors]:
    """Trained factors (see `lora_factors`) in torch's layout, exactly: no SVD.

    A file counts alpha / r by each layer's own r. So a layer gets alpha = scale * r, capped or not, as `lora_factors.add`
    with this scale. Raises ValueError, one line, for names that do not come in pairs.
    """
    pairs = factor_pairs(to_torch(factors))
    return {name: Factors(up, down, scale * down.shape[0]) for name, (down, up) in pairs.items()}


def kohya_name(name: str) -> str:
    """`down_blocks.0.resnets.0.conv1.weight` -> `lora_unet_down_blocks_0_resnets_0_conv1`."""
    stem = name.removesuffix(".weight").replace(".", "_")
    return f"lora_unet_{OUTER.get(stem, stem)}"


def to_kohya(factors: Mapping[str, Factors], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A file that diffusers, A1111 and ComfyUI read: `<kohya name>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    All layers get one alpha, that of most of them, and the factors take up the difference. diffusers (0.42) finds a layer's
    rank in its shapes, but loses the alpha of an attention layer if alphas differ.
    """
    alpha = Counter(layer.alpha for layer in factors.values()).most_common(1)[0][0] if factors else 0.0
    tensors = {}
    for name, layer in sorted(factors.items()):
        stem = kohya_name(name)
        tensors[f"{stem}.{UP}"], tensors[f"{stem}.{DOWN}"] = _scaled(layer, alpha, dtype)
        tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
    return tensors


def to_peft(factors: Mapping[str, Factors], dtype: Any = np.float32, component: str = "unet") -> dict[str, np.ndarray]:
    """A file in peft's own names, of which diffusers takes every layer: `unet.X.lora_A.weight`, `unet.X.lora_B.weight`.

    component: "unet" or "transformer", the names' beginning.

    It holds no alpha: every layer counts once. All layers get the largest rank, filled up with zeros: older versions of
    diffusers take one layer's rank for the alpha of all.
    """
    rank = max((layer.down.shape[0] for layer in factors.values()), default=0)
    tensors = {}
    for name, layer in sorted(factors.items()):
        up, down = _scaled(layer, layer.down.shape[0], dtype)
        rest, stem = rank - down.shape[0], f"{component}.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = np.pad(down, [(0, rest), *[(0, 0)] * (down.ndim - 1)])
        tensors[f"{stem}.lora_B.weight"] = np.pad(up, [(0, 0), (0, rest), *[(0, 0)] * (up.ndim - 2)])
    return tensors


def from_peft(tensors: Tensors, names: Iterable[str], component: str = "unet") -> dict[str, Factors]:
    """The inverse of `to_peft`, by the names of the weights that may have factors."""
    stems = {name: f"{component}.{name.removesuffix('.weight')}" for name in names}
    pairs = {n: (f"{s}.lora_B.weight", f"{s}.lora_A.weight") for n, s in stems.items() if f"{s}.lora_A.weight" in tensors}
    return {name: Factors(tensors[up], tensors[down], float(tensors[down].shape[0])) for name, (up, down) in pairs.items()}


def from_kohya(tensors: Tensors, names: Iterable[str]) -> dict[str, Factors]:
    """The inverse of `to_kohya`, by the names of the weights that may have factors, which the file's names do not give back."""
    stems = {name: kohya_name(name) for name in names}
    read = lambda stem: Factors(tensors[f"{stem}.{UP}"], tensors[f"{stem}.{DOWN}"], float(tensors[f"{stem}.alpha"]))
    return {name: read(stem) for name, stem in stems.items() if f"{stem}.alpha" in tensors}
