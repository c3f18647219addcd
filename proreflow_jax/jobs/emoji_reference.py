"""What emoji pictures are held against: the real ones, their features and judges; and the numbers of a set of pictures."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from proreflow_jax.data import emoji, emoji_pairs
from proreflow_jax.data.emoji_pairs import Labels, Pairs
from proreflow_jax.evaluation import concepts, frechet, kernel
from proreflow_jax.evaluation.picture_features import PictureFeatures
from proreflow_jax.evaluation.protocols import FRECHET_LEAST
from proreflow_jax.jobs.emoji_pictures import SHOWN, PromptRows, read_prompts
from proreflow_jax.pretrained import weights as weight_files
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pretraining import to_float
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import atomic, lock, paths

log = logging.getLogger(__name__)
IMAGES = "--config.evaluate.images"
TOP = 5  # verdicts of the judge among which a prompt's concept counts as seen
NOISE = {emoji_pairs.SEEN: 0, emoji_pairs.HELD_OUT: 1_000_000}  # number of a side's first noise: no two pictures share one
Numbers = dict[str, float]


class Real(NamedTuple):
    """The real pictures: what they show, their features, and the judge of each family of styles."""

    dataset: emoji.Emoji
    labels: Labels
    group_of: Int[np.ndarray, " c"]  # of each concept
    features: np.ndarray  # (n, 1280)
    judges: dict[int, concepts.ConceptJudge]


class Side(NamedTuple):
    """Seen or held-out pairs, with their prompts, and what the autoencoder leaves of their pictures."""

    name: str
    pairs: Pairs
    prompts: PromptRows
    decoded: np.ndarray  # features (n, 1280) of the real pictures behind the autoencoder
    pictures: np.ndarray  # the first SHOWN of these


def read_real(experiment: Experiment, judge: PictureFeatures) -> Real:
    """The dataset with its features, which are computed once for all runs below the same root."""
    folder = paths.parse_local(experiment.config.evaluate.images, IMAGES)
    dataset = emoji.load_emoji(folder, experiment.base.resolution, IMAGES)
    labels = emoji_pairs.labels_of(dataset.pictures)
    features = _features(experiment, dataset, judge)
    fitted = {f: concepts.fit_judge(features, labels.concept, labels.family, f) for f in np.unique(labels.family).tolist()}
    group_of = np.zeros(labels.concept.max() + 1, int)
    group_of[labels.concept] = labels.group
    return Real(dataset, labels, group_of, features, fitted)


def _features(experiment: Experiment, dataset: emoji.Emoji, judge: PictureFeatures) -> np.ndarray:
    pictures = hashlib.sha256(np.ascontiguousarray(dataset.images)).hexdigest()
    folder = paths.parse_path(experiment.config.root) / "reference"
    path = folder / f"emoji-{atomic.json_digest({'pictures': pictures, 'judge': judge.digest})[:16]}.safetensors"
    with lock.lock_folder(folder):
        if not path.is_file():
            log.info("features of %d real pictures, kept in %s", len(dataset.images), path)
            features = judge.of(dataset.images)
            with atomic.drafted(path) as draft:
                weight_files.save_tensors(draft, {"features": features})
        return np.asarray(weight_files.Tensors([paths.local_copy(path)])["features"])


def make_side(experiment: Experiment, real: Real, name: str, pairs: Pairs, judge: PictureFeatures) -> Side:
    """The pairs with their prompts and reconstructions."""
    images = reconstructions(experiment, real.dataset.images[pairs.rows])
    return Side(name, pairs, _prompts(experiment, real, name, pairs), judge.of(images), images[:SHOWN])


def shorten_side(experiment: Experiment, real: Real, side: Side, count: int) -> Side:
    """The first `count` pairs alone."""
    pairs = Pairs(side.pairs.rows[:count], side.pairs.others[:count])
    prompts = _prompts(experiment, real, side.name, pairs)
    return side._replace(pairs=pairs, prompts=prompts, decoded=side.decoded[:count])


def _prompts(experiment: Experiment, real: Real, name: str, pairs: Pairs) -> PromptRows:
    return read_prompts(experiment, name, prompt_texts(experiment, real, pairs.rows), NOISE[name])


def prompt_texts(experiment: Experiment, real: Real, rows: Sequence[int]) -> list[str]:
    """The plainest captions of pictures, with their style or, by the config, without."""
    styled = experiment.config.evaluate.gate.styled
    return [emoji.prompt(real.dataset.pictures[row], styled) for row in rows]


def compare_pictures(real: Real, side: Side, features: np.ndarray, teacher: np.ndarray | None = None) -> Numbers:
    """Numbers of pictures for a side's prompts, by their features.

    kernel, and frechet from FRECHET_LEAST pictures on: to the real pictures of the same prompts; decoded: to these behind the
    autoencoder, which no sampler can do without; teacher_kernel: to other pictures of the same prompts; top1, top5, group,
    score: of `fidelity`.
    """
    own = real.features[side.pairs.rows]
    numbers = {"kernel": kernel.kernel_distance(features, own, paired=True)} | fidelity(real, side.pairs.rows, features)
    numbers["decoded"] = kernel.kernel_distance(features, side.decoded, paired=True)
    if len(own) >= FRECHET_LEAST:
        numbers["frechet"] = frechet.frechet_distance(frechet.moments(features), frechet.moments(own))
    if teacher is not None:
        numbers["teacher_kernel"] = kernel.kernel_distance(features, teacher, paired=True)
    return numbers


def fidelity(real: Real, rows: Int[np.ndarray, " n"], features: np.ndarray) -> Numbers:
    """Shares of pictures whose prompt's concept is the judge's verdict (top1), is among its first TOP (top5), and whose
    verdict is of the prompt's group (group); and their mean concept score (score). rows: of the pictures whose prompts they
    were drawn by.
    """
    labels = real.labels
    place, group, score = np.zeros(len(rows), int), np.zeros(len(rows), int), np.zeros(len(rows))
    for family, judge in real.judges.items():
        of = np.flatnonzero(labels.family[rows] == family)
        if len(of):
            values = concepts.discriminants(judge, features[of])
            place[of] = concepts.ranks(judge, values, labels.concept[rows[of]])
            score[of] = concepts.concept_scores(judge, values, labels.concept[rows[of]])
            group[of] = real.group_of[judge.concepts[values.argmax(axis=1)]]
    shares = {"top1": place == 0, "top5": place < TOP, "group": group == labels.group[rows], "score": score}
    return {name: float(each.mean()) for name, each in shares.items()}


def baselines(real: Real, sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Rows of a table for what no model draws: ceiling and floors. Kernel distances have a standard error over parts."""
    results = [{"method": name, "sides": {}, "pictures": {}} for name in ("real pictures", "shuffled prompts", "autoencoder")]
    for side in sides:
        rows, own = side.pairs.rows, real.features[side.pairs.rows]
        other = real.features[side.pairs.others]
        apart = kernel.estimate_distance(own, other)._asdict() if min(len(own), len(other)) >= kernel.LEAST else {}
        results[0]["sides"][side.name] = {"kernel": apart} | fidelity(real, rows, own)
        results[1]["sides"][side.name] = fidelity(real, rows, own[_moved(real.labels.family[rows])])
        error = kernel.estimate_distance(side.decoded, own, paired=True)._asdict()
        results[2]["sides"][side.name] = {"kernel": error} | fidelity(real, rows, side.decoded)
        results[0]["pictures"][side.name], results[2]["pictures"][side.name] = real.dataset.images[rows[:SHOWN]], side.pictures
    return results


def _moved(families: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Each picture's place taken by another of its family, where there is one: prompts shuffled, styles kept."""
    places = np.arange(len(families))
    for family in np.unique(families):
        own = np.flatnonzero(families == family)
        places[own] = np.roll(own, 1)
    return places


def reconstructions(experiment: Experiment, images: np.ndarray) -> np.ndarray:
    """Pictures through the autoencoder, by the mean of their latents: the nearest to real ones that any sampler comes."""
    n, batch = experiment.networks, experiment.config.evaluate.batch
    place, dtype = mesh.replicated(experiment.mesh), experiment.config.model.sampling_dtype

    @jax.jit
    def run(params: Any, images: jax.Array) -> jax.Array:
        mean, _ = n.vae.apply(params, to_float(images), method="encode")
        return sampler.decode(n.vae, params, mean * n.scaling, n.scaling, dtype)

    params, parts = jax.device_put(experiment.base.params["vae"], place), []
    for i in range(0, len(images), batch):
        part = images[i : i + batch]
        rows = {"images": np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])}
        parts.append(np.asarray(run(params, mesh.put_batch(experiment.mesh, rows, batch)["images"]))[: len(part)])
    return np.concatenate(parts)
