"""diffusers' names <-> the single-file layout of Stable Diffusion's first release, which A1111 and ComfyUI read.

One file holds every component under a prefix (`PREFIXES`). Tensors stay in torch's layout and keep their bits; names change
(`original_names`), and four shapes: the VAE's attention is linear here and a 1x1 convolution there, OpenCLIP and SD 3's
transformer stack q, k and v in one tensor, OpenCLIP's text projection is transposed, and two modulations of SD 3's transformer
have their halves the other way round.

SD 3's first CLIP has no projection there: UIs and diffusers take the identity, and so do we.

Not restored: one layer of a text encoder behind those its config.json counts. diffusers keeps 23 of the 24 of SD 2.x and drops
the projection, since only the states before the last are used; so do we. diffusers, A1111 and ComfyUI read such a file.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from proreflow_jax import UserError
from proreflow_jax.pretrained import original_names
from proreflow_jax.pretrained.original_names import PROJECTION, STACKS, UNET_INNER, VAE_LINEAR, Table, parts
from proreflow_jax.pretrained.weights import IGNORED, OLD, OLD_NAME, TIED, listing

UNET, VAE, XL = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders"
SD3 = "text_encoders.{}.transformer."
PREFIXES = {  # family -> component -> prefix of its names
    "v1": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    "v2": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
    "xl": {"unet": UNET, "vae": VAE, "text_encoder": f"{XL}.0.transformer.", "text_encoder_2": f"{XL}.1.model."},
    "sd3": {
        **{"transformer": UNET, "vae": VAE, "text_encoder": SD3.format("clip_l")},
        **{"text_encoder_2": SD3.format("clip_g"), "text_encoder_3": SD3.format("t5xxl")},
    },
}
OPTIONAL = ("text_encoder", "text_encoder_2", "text_encoder_3")  # of SD 3: a file may lack them
JOINT = f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"  # marks SD 3
MARKED = {"xl": "text_encoder_2", "v2": "text_encoder", "v1": "text_encoder"}  # has the token embedding
MARK = re.compile(r"(text_model\.embeddings\.|embeddings\.)?token_embedding\.weight")  # old v1 files lack text_model
LAYER = re.compile(r"(?:transformer\.resblocks|(?:text_model\.)?encoder\.layers)\.(\d+)\.")
REFERENCE = "text_model.final_layer_norm.weight"  # has the width and the precision of an identity in the projection's place
TABLES: dict[str, Callable[[Mapping], Table]] = {
    **{"unet": original_names.unet, "vae": original_names.vae, "transformer": original_names.mmdit},
    "text_encoder_3": original_names.t5,
}


def family(names: Iterable[str]) -> str:
    """The family of a single file: "v1" (SD 1.x), "v2" (SD 2.x) or "xl" (SDXL) by its text encoder, "sd3" by its transformer.

    Raises:
      ValueError: no mark of a family is among the names.
    """
    names = list(names)
    if JOINT in names:
        return "sd3"
    for candidate, component in MARKED.items():
        prefix = PREFIXES[candidate][component]
        if any(name.startswith(prefix) and MARK.fullmatch(name, len(prefix)) for name in names):
            return candidate
    looked = f"{JOINT} (sd3), " + ", ".join(
        f"{PREFIXES[name][last]}*token_embedding.weight ({name})" for name, last in MARKED.items()
    )
    raise UserError(f"not a single file of SD 1.x, 2.x, XL or 3: its {len(names)} names (as {names[:2]}) lack {looked}")


def to_original(component: str, tensors: Mapping[str, np.ndarray], config: Mapping, family: str) -> dict[str, np.ndarray]:
    """One component for a single file.

    Args:
      component: unet or (sd3) transformer, vae, text_encoder, (xl, sd3) text_encoder_2, (sd3) text_encoder_3.
      tensors: {diffusers' name: array in torch's layout}. Text encoders may lack `text_model.`, VAEs may have the attention
        names of old diffusers. `position_ids` is left out.
      config: the component's config.json.
      family: "v1", "v2", "xl" or "sd3".

    Returns:
      {name with the component's prefix: C-contiguous array of the same dtype}. OpenCLIP's `logit_scale` (of its training
      loss) and SD 2.x's last text layer are not written: no reader needs them.

    Raises:
      ValueError: one line with the names that have no place in the original layout; an unknown family or component; a
        projection of SD 3's first CLIP that is not the identity.
    """
    layout = _layout(component, config, family)
    today = _today(component, tensors.keys())
    if layout.identity and PROJECTION in today:
        _check_identity(tensors[today.pop(PROJECTION)])
    groups = _stacks(set(today), layout.table)
    renamed = _renamed(groups, layout.table, f"{component} ({family})")
    return {layout.prefix + renamed[n]: _merge(layout, n, [tensors[today[p]] for p in each]) for n, each in groups.items()}


def from_original(component: str, tensors: Mapping[str, np.ndarray], config: Mapping, family: str) -> "Renamed":
    """One component of a single file; the inverse of `to_original`.

    Args:
      tensors: the whole file, {name: array in torch's layout}. A tensor is read with its part of the result. Tensors of other
        components, EMA weights and schedule buffers are never read.
      component, config, family: as in `to_original`.

    Returns:
      {diffusers' name of today: C-contiguous array of the same dtype}, lazily; `weights.from_torch` sees whether all are there.

    Raises:
      ValueError: one line with the component's names that are unknown; none found; an unknown family or component.
    """
    layout = _layout(component, config, family)
    prefix = layout.prefix
    names = [name.removeprefix(prefix) for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - may be a file
    if not names:
        raise UserError(f"{component} ({family}): the file has no names that begin with {prefix}")
    here = {n: prefix + n for n in names if not (component.startswith("text") and _unused(n, config, family))}
    if component == "text_encoder" and "embeddings.token_embedding.weight" in here:  # some old v1 files
        here = {f"text_model.{n}": source for n, source in here.items()}
    for name in [name for name in TIED if name in here]:
        here.setdefault(TIED[name], here.pop(name))
    if layout.identity:
        here.pop(PROJECTION, None)
    renamed = _renamed(here, {there: here for here, there in layout.table.items()}, f"{component} ({family})")
    where = {part: (here[old], new) for old, new in renamed.items() for part in parts(new)}
    return Renamed(layout, tensors, where | ({PROJECTION: where[REFERENCE]} if layout.identity and REFERENCE in where else {}))


class Renamed(Mapping[str, np.ndarray]):
    """A component of a single file under diffusers' names; tensors are read on access."""

    def __init__(self, layout: "Layout", tensors: Mapping[str, np.ndarray], where: dict[str, tuple[str, str]]) -> None:
        """where: {diffusers' name: (name in the file, diffusers' name of the whole that it is part of)}."""
        self._layout, self._tensors, self._where = layout, tensors, where

    def __getitem__(self, name: str) -> np.ndarray:
        there, here = self._where[name]
        return np.ascontiguousarray(_split(self._layout, here, name, self._tensors[there]))

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class Layout(NamedTuple):
    """How one component lies in a single file of a family."""

    component: str
    prefix: str
    table: Table
    swapped: frozenset[str] = frozenset()  # diffusers' names of tensors whose halves change places
    transposed: bool = False  # the text projection
    identity: bool = False  # the text projection is the identity, and not in the file


def _layout(component: str, config: Mapping, family: str) -> Layout:
    if family not in PREFIXES:
        raise UserError(f"family {family!r} is unknown, known: {', '.join(PREFIXES)}")
    if component not in PREFIXES[family]:
        raise UserError(f"component {component!r} is not part of family {family}, known: {', '.join(PREFIXES[family])}")
    prefix = PREFIXES[family][component]
    if component == "transformer":
        return Layout(component, prefix, original_names.mmdit(config), original_names.mmdit_swapped(config))
    if component in TABLES:
        return Layout(component, prefix, TABLES[component](config))
    if prefix.endswith(".model."):
        return Layout(component, prefix, original_names.open_clip(config), transposed=True)
    if family == "sd3" and component == "text_encoder_2":
        return Layout(component, prefix, original_names.clip_with_projection(config))
    return Layout(component, prefix, original_names.clip(config), identity=family == "sd3")


def _check_identity(projection: np.ndarray) -> None:
    if not np.array_equal(np.asarray(projection, np.float32), np.eye(*projection.shape, dtype=np.float32)):
        raise UserError(
            f"text_encoder: its {PROJECTION} is not the identity, which tools take that read a single file: take another form"
        )


def _unused(name: str, config: Mapping, family: str) -> bool:
    """Names in a text encoder of the file that diffusers' network has no use for."""
    if name in ("text_projection", PROJECTION):
        return family != "sd3" and PROJECTION not in original_names.open_clip(config)
    layer = LAYER.match(name)
    behind = layer is not None and int(layer[1]) == config["num_hidden_layers"]
    return behind or name == "logit_scale" or bool(IGNORED.search(name))


def _today(component: str, names: Iterable[str]) -> dict[str, str]:
    """{diffusers' name of today: the name as given}."""
    names = [name for name in names if not IGNORED.search(name)]
    bare = component.startswith("text") and "final_layer_norm.weight" in names
    today = {f"text_model.{n}" if bare and not n.startswith("text_") else n: n for n in names}
    if component == "vae":
        today = {OLD_NAME.sub(lambda old: OLD[old[0]], name): name for name in names}
    if twice := sorted(set(names) - set(today.values())):
        raise UserError(f"{component}: {twice[0]} is there twice, under its old name and that of today")
    return today


def _stacks(names: set[str], table: Table) -> dict[str, list[str]]:
    """{name of a stack: its q, k, v}; every other name stands alone, and so do those of an incomplete three."""
    stacked = {name: parts(name) for name in table if any(mark in name for mark in STACKS)}
    stacks = {name: each for name, each in stacked.items() if names.issuperset(each)}
    return stacks | {name: [name] for name in sorted(names.difference(*stacks.values()))}


def _renamed(names: Iterable[str], table: Table, origin: str) -> dict[str, str]:
    renamed, left = {}, []
    for name in names:
        inner = UNET_INNER.fullmatch(name)
        if name in table:
            renamed[name] = table[name]
        elif inner and inner["stem"] in table:
            renamed[name] = table[inner["stem"]] + inner["rest"]
        else:
            left.append(name)
    if left:
        raise UserError(f"{origin}: {listing('names left over, which its config.json gives no place', left)[0]}")
    return renamed


def _merge(layout: Layout, name: str, pieces: Sequence[np.ndarray]) -> np.ndarray:
    value = np.concatenate(pieces) if len(pieces) > 1 else np.asarray(pieces[0])
    if layout.component == "vae" and VAE_LINEAR.search(name):
        value = value.reshape(*value.shape, *(1,) * (4 - value.ndim))
    if name in layout.swapped:
        value = np.concatenate(np.split(value, 2)[::-1])
    return np.ascontiguousarray(value.T if layout.transposed and name == PROJECTION else value)


def _split(layout: Layout, whole: str, name: str, value: np.ndarray) -> np.ndarray:
    """The tensor `name` of diffusers from a tensor of the file; `whole` is the name, or that of the stack it is part of."""
    if layout.identity and name == PROJECTION:
        return np.eye(len(value), dtype=value.dtype)
    if len(pieces := parts(whole)) > 1:
        return np.split(np.asarray(value), len(pieces))[pieces.index(name)]
    if layout.component == "vae" and VAE_LINEAR.search(name):
        return value.reshape(value.shape[:2])
    if name in layout.swapped:
        return np.concatenate(np.split(np.asarray(value), 2)[::-1])
    return value.T if layout.transposed and name == PROJECTION else value
