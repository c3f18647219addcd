"""Five train steps of the tiny model on a mesh, by the functions that the verb `train` calls; also as a process of a job.

python tests/mesh_steps.py OUT MODEL DATA,FSDP,TENSOR[,SLICES] ACCUMULATION: process k writes its losses and the digest of
the last weights to OUT/k.json.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import verb
from ml_collections import ConfigDict

from configs.digits import get_config
from proreflow_jax.jobs import train
from proreflow_jax.run import dataset, experiment, open, train_state
from proreflow_jax.run.check_config import changed
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.checkpoint import digest, fold

STEPS = 5


class Trained(NamedTuple):
    """What is left of a few steps."""

    losses: list[float]
    state: Any  # the last
    opened: experiment.Experiment


def tiny_config(folder: Path, model: Path, axes: tuple[int, ...], accumulation: int = 1) -> ConfigDict:
    """The tiny chain of verb.py, its teacher inside the train step; prompts lie in `folder`."""
    (folder / "prompts.txt").write_text("\n".join(verb.PROMPTS), encoding="utf-8")
    read = lambda value: ast.literal_eval(value) if isinstance(value, str) and value[0] == "(" else value
    fields = {name: read(value) for name, value in verb.TINY.items()}
    fields |= {"root": str(folder / "runs"), "model.path": str(model), "data.path": str(folder / "prompts.txt")}
    fields |= {f"mesh.{name}": size for name, size in zip((*mesh.AXES, "slices"), axes, strict=False)}
    return changed(get_config(), fields | {"pairs.mode": "online", "train.accumulation": accumulation})


def trained(config: ConfigDict, steps: int = STEPS) -> Trained:
    """The first stage's losses and state after some steps, on as many of the devices as the mesh has."""
    opened = open.open_experiment(config)
    stage = opened.stages[0]
    parent, layout = experiment.load_weights(opened, None), opened.layout
    step = train.make_train_step(opened, stage, parent)
    state = train_state.stacked(layout, train_state.fresh_state(layout, experiment.first_weights(opened, parent)))
    losses = []
    with train.batches_from(opened, stage, dataset.open_source(config, opened.base), 0) as batches:
        for _, (_, batch) in zip(range(steps), batches, strict=False):
            state, numbers = step(state, batch)
            losses.append(float(numbers["loss"]))
    return Trained(losses, train_state.unstacked(layout, state), opened)


def main(out: str, model: str, axes: str, accumulation: str) -> None:
    """One process of a job."""
    mesh.initialize_distributed()
    folder = Path(out) / str(jax.process_index())
    folder.mkdir()
    config = tiny_config(folder, Path(model), tuple(map(int, axes.split(","))), int(accumulation))
    done = trained(config)
    told = {"losses": done.losses, "digest": fold(digest(done.state.params))}
    Path(out, f"{jax.process_index()}.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
