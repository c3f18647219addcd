"""Protocols of FID, CLIP score and kernel distance by name, and the sentence that states a number with what it rests on.

An FID without its protocol says nothing: the count, the resize, the crop and the reference each move it by more than methods
differ. So a protocol is a row of a table, and where a measurement departs from its row, the sentence says so.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from proreflow_jax import UserError
from proreflow_jax.evaluation.classifier import FEATURES
from proreflow_jax.models import efficientnet
from proreflow_jax.models.inception import NAME

DIGITS = "digits"
EMOJI = ("emoji", "emoji-2500")  # kernel distance; with a Frechet distance too, for which FRECHET_LEAST pictures are needed
FRECHET_LEAST = 2500  # pictures a side from which a Frechet distance over 1,280 features is stated


class Protocol(NamedTuple):
    """What the numbers depend on beside the model. Both sets are cropped and scaled alike, then resized for the networks."""

    name: str
    prompts: str  # which captions, one image each
    choice: str  # the same as a rule: "first" caption of each image, "drawn" from all captions by a seed
    reference: str  # the real images
    real: int  # how many these are
    year: int  # of the COCO release that both are from; 0: not COCO
    count: int  # generated images
    size: int  # pixels that both sets are scaled to; 0: left as they are
    crop: str  # "centre": the largest square in the middle; "none"
    scale: str  # PIL's filter from there to `size`: "lanczos", "bicubic" or "none"
    file: str  # how generated images are kept before they are judged
    features: str  # the feature network
    resize: str  # into the feature network: a name of models.inception.RESIZES, or "none"
    clip: str  # the network of the CLIP score, a `model` of clip_score.NAMED, or "none"
    guidance: float
    seeds: tuple[int, ...]
    steps: tuple[int, ...]


PROTOCOLS = {
    row.name: row
    for row in (
        Protocol(
            name="coco2014-30k",
            prompts="30,000 captions of val2014, drawn without replacement by seed 0",  # standard; the draw is our choice
            choice="drawn",
            reference="val2014, all 40,504 images",  # GigaGAN's evaluation
            real=40_504,
            year=2014,
            count=30_000,  # standard
            size=256,  # standard, also for models that draw 512; the CLIP score sees these images too, as in GigaGAN's
            crop="centre",  # GigaGAN's evaluation
            scale="lanczos",  # GigaGAN's evaluation
            file="png",  # standard; JPEG alone moves an FID
            features=NAME,  # standard
            resize="clean",  # GigaGAN's evaluation (it runs clean-fid); others use "tf1" or "torch": compare like with like
            clip="ViT-g/14",  # GigaGAN's evaluation; it also puts "A photo depicts" before each prompt, which is not done here
            guidance=4.0,  # our choice: the paper sweeps 2 to 7 and names 4 in its ablation only
            seeds=(0, 1, 2),  # our choice: the paper names none
            steps=(2, 4),  # the paper's table
        ),
        Protocol(
            name="coco2017-5k",
            prompts="the first caption of each image of val2017, by image id",  # our choice: the paper does not say which of 5
            choice="first",
            reference="val2017, all 5,000 images",  # standard
            real=5_000,
            year=2017,
            count=5_000,  # standard
            size=512,  # our choice: what SD 1.5 draws
            crop="centre",  # our choice
            scale="lanczos",  # our choice
            file="png",  # our choice
            features=NAME,  # standard
            resize="torch",  # our choice: pytorch-fid's
            clip="ViT-g/14",  # our choice: as for the other
            guidance=4.0,  # the paper's ablation
            seeds=(0, 1, 2),  # our choice: effects below one FID need several
            steps=(2, 4),  # the paper's table
        ),
        Protocol(
            name=DIGITS,
            prompts="ten captions in turn, ten wordings",  # all of it is our choice
            choice="none",
            reference="scikit-learn's digits, all 1,797",
            real=1_797,
            year=0,
            count=1_000,
            size=0,
            crop="none",
            scale="none",
            file="none",
            features=FEATURES,  # not Inception: digits are no photographs
            resize="none",  # to 8x8 by the mean of cells, see data/digits.py
            clip="none",
            guidance=1.0,
            seeds=(0, 1, 2),
            steps=(1, 2, 4, 8),
        ),
        *(
            Protocol(
                name=name,
                prompts=f"the plain captions of {count:,} pictures that training saw, and of as many held out",  # our choice
                choice="none",
                reference="these pictures themselves",  # our choice: what prompts show falls out of the difference
                real=count,
                year=0,
                count=count,  # of each kind; there are 993 held out
                size=128,  # what the feature network sees: twice the pictures' 64
                crop="none",
                scale="bicubic",  # in float, by the feature network itself
                file="none",
                features=efficientnet.NAME,  # not Inception, whose weights are too many to come with the package
                resize="none",
                clip="none",
                guidance=3.0,  # our choice; the gate sweeps 1 to 5
                seeds=(0, 1, 2),
                steps=(2, 4, 8, 16, 32, 64),
            )
            for name, count in zip(EMOJI, (500, FRECHET_LEAST), strict=True)
        ),
    )
}


class Conditions(NamedTuple):
    """Conditions of a measurement, to be compared with the protocol's."""

    steps: int
    seeds: tuple[int, ...]
    count: int  # generated images of each seed
    real: int  # images of the reference
    guidance: float
    clip: str  # the network of the CLIP score; "": not measured
    dtype: str = "float32"  # of the UNet's computation


def find_protocol(name: str) -> Protocol:
    """The row of that name. Raises ValueError, which lists them."""
    if name not in PROTOCOLS:
        raise UserError(f"--config.evaluate.protocol={name} is none of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def mean_and_spread(values: Mapping[int, float]) -> tuple[float, float | None]:
    """Mean over seeds and its sample deviation, None of one seed. Raises ValueError without a score."""
    if not values:
        raise UserError("no seed was measured: set --config.evaluate.seeds")
    scores = np.array(list(values.values()), np.float64)
    return float(scores.mean()), float(scores.std(ddof=1)) if len(scores) > 1 else None


def departures(protocol: Protocol, under: Conditions) -> list[str]:
    """Each departure from the protocol in words; [] if there is none."""
    values = {
        "images": (f"{under.count:,}", f"{protocol.count:,}"),
        "real images": (f"{under.real:,}", f"{protocol.real:,}"),
        "guidance": (f"{under.guidance:g}", f"{protocol.guidance:g}"),
        "seeds": (_listed(under.seeds), _listed(protocol.seeds)),
        "CLIP": (under.clip or "none", protocol.clip),
    }
    odd = [f"{what} {value} instead of {rule}" for what, (value, rule) in values.items() if value != rule]
    few = " or ".join(map(str, protocol.steps))
    return odd + ([] if under.steps in protocol.steps else [f"steps {under.steps} instead of {few}"])


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))


def statement(protocol: Protocol, fid: Mapping[int, float], clip: Mapping[int, float], under: Conditions) -> str:
    """The numbers in one sentence with their protocol, seeds and spread, and where the protocol was not kept.

    Args:
      protocol: by which they were measured.
      fid: {seed: FID}.
      clip: {seed: CLIP score}; {} where none was measured.
      under: what was done.

    Raises ValueError without a score.
    """
    scores = [f"FID {said(fid)}"] + ([f"CLIP score {said(clip)} by {under.clip}"] if clip else [])
    return sentence(protocol, scores, tuple(fid), under)


def sentence(protocol: Protocol, scores: Sequence[str], seeds: tuple[int, ...], under: Conditions) -> str:
    """Scores in words, each already with its spread, with all that they rest on."""
    of = f"seeds {_listed(seeds)}" if len(seeds) > 1 else f"seed {_listed(seeds)} only, spread unknown"
    rest = f"{under.steps} steps, {under.count:,} images, guidance {under.guidance:g}, {under.dtype}, {protocol.features}"
    odd = [f"not the protocol's: {', '.join(lines)}" for lines in [departures(protocol, under)] if lines]
    return "; ".join([", ".join(scores), of, f"{protocol.name}, {rest}", *odd])


def said(values: Mapping[int, float]) -> str:
    """Mean over seeds, and the spread where there are several: "1.23 +- 0.04"."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f}" + ("" if spread is None else f" +- {spread:.2f}")
