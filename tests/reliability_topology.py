"""A training state on a mesh: trained and saved by the first job, restored by every later one; then one step.

python tests/reliability_topology.py FOLDER DATA,FSDP OUT: process k writes the leaves' digests, the order of the next samples
and the next loss to OUT/<k>.json. FOLDER holds the model; the checkpoint is FOLDER/saved.
"""

import json
import sys
from pathlib import Path

import jax
import mesh_steps

from proreflow_jax.data import loader
from proreflow_jax.jobs import train
from proreflow_jax.run import dataset, experiment, open, train_state
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.checkpoint import Checkpoints, digest

SAVED = 3  # steps before the checkpoint


def main(folder: str, axes: str, out: str) -> None:
    """One process of a job."""
    mesh.initialize_distributed()
    here = Path(out) / f"of-{jax.process_index()}"
    here.mkdir()
    config = mesh_steps.tiny_config(here, Path(folder) / "model", tuple(map(int, axes.split(","))) + (1,))
    opened = open.open_experiment(config)
    stage, layout = opened.stages[0], opened.layout
    parent = experiment.load_weights(opened, None)
    step = train.make_train_step(opened, stage, parent)
    source = dataset.open_source(config, opened.base)
    with Checkpoints(Path(folder) / "saved") as checkpoints:
        if checkpoints.latest() is None:
            fresh = train_state.fresh_state(layout, experiment.first_weights(opened, parent))
            state = train_state.stacked(layout, fresh)
            with train.batches_from(opened, stage, source, 0) as batches:
                for _, (_, batch) in zip(range(SAVED), batches, strict=False):
                    state, _ = step(state, batch)
            whole = train_state.unstacked(layout, state)
            checkpoints.save(SAVED, whole, {"position": SAVED * config.train.batch})
            checkpoints.wait()
        restored = checkpoints.restore(None, layout.target)
    leaves, state = digest(restored.state), train_state.stacked(layout, restored.state)
    places = [row for row in range(restored.meta["position"], restored.meta["position"] + config.train.batch)]
    order = loader.epoch_places(places, config.seed, len(source))
    with train.batches_from(opened, stage, source, restored.step) as batches:
        _, numbers = step(state, next(batches)[1])
    said = {"leaves": leaves, "order": order, "step": restored.step, "loss": float(numbers["loss"])}
    Path(out, f"{jax.process_index()}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
