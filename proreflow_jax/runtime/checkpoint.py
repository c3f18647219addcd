"""Checkpoints that are never wrong in silence. The only file that imports orbax.

What orbax leaves open is closed here. A flipped bit in an array file comes back as a wrong weight: so a digest of
every leaf, computed on the device before the save, is stored in the same commit and compared after the restore. A
wrong dtype is cast: so dtypes, shapes and names are compared first. A failed background save says nothing until
somebody waits: so `check` looks at every step, and leaving the `with` block raises. A step that was read and is wrong is
named, passed over, and removed by the next save. A step that could not be read ends the job: nothing is passed over or removed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from proreflow_jax import MissingFile, RunFailed, UserError
from proreflow_jax.runtime import host_memory, processes
from proreflow_jax.runtime.damage import Damaged, could_not_read, everywhere, is_folder, line, unreadable, unseen_steps
from proreflow_jax.runtime.digest import (
    check_seal,
    check_target,
    digest,
    fold,
    inventory,
    leaf_path,
    named_leaves,
    wrong_values,
)
from proreflow_jax.runtime.processes import uninterrupted
from proreflow_jax.storage.gcs import SCHEME, client
from proreflow_jax.storage.paths import Location

__all__ = ["Checkpoints", "Restored", "digest", "fold"]

log = logging.getLogger(__name__)
LEAST_PART = 2**20  # bytes; an array whose replicas would write less each is written by one


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives back."""

    step: int
    state: PyTree
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder, newest `keep` kept, saved in the background. Use it as a context manager.

    `every`: steps between saves, for `due` (None: never by count). `read_only`: look without touching, for jobs
    that read the folder of a training run that may be alive. Hold `processes.job_lock` on the run's folder while writing.
    """

    def __init__(self, folder: str | Location, keep: int = 2, every: int | None = None, read_only: bool = False) -> None:
        if keep < 1 or (every is not None and every < 1):
            raise UserError(f"keep={keep} and every={every} must be at least 1: change --config.checkpoint.*")
        if remote := str(folder).startswith(SCHEME):
            client()  # or say what is not installed; orbax needs the same
        self.folder = epath.Path(str(folder)) if remote else epath.Path(folder).absolute()
        if read_only and not is_folder(self.folder):
            raise MissingFile(f"{self.folder} does not exist: run the training job that writes it first")
        self.keep, self.every, self.read_only = keep, every, read_only
        host_memory.keep_nothing()
        self._manager = self._open()
        self._pending: int | None = None
        self._target: PyTree = None
        self._saved: dict[int, dict[str, str]] = {}
        self._bad: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for the save in flight and close. Raises what that save raised, unless an error is on its way.

        The other processes hear of an error first: this wait may be for them.
        """
        failed: Exception | None = None
        if isinstance(error, Exception):
            processes.announce(error)
        for end in (self.wait, self._manager.close):
            try:
                end()
            except Exception as problem:
                failed = failed or problem
        if failed is not None and error is None:
            raise failed
        if failed is not None and failed is not error:
            log.error("%s", line(failed))

    def due(self, step: int) -> bool:
        """True if `step` is a multiple of `every`."""
        return bool(self.every and step % self.every == 0)

    def latest(self) -> int | None:
        """The newest step in the folder, good or bad, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Copy the state off the device, then write it in the background; `meta` is any JSON object.

        Raises RuntimeError naming step and folder if this save, or the one before, fails.
        """
        if self.read_only:  # orbax itself would write
            raise RunFailed(f"{self.folder} was opened read-only: step {step} cannot be saved there")
        self.wait()
        leaves = named_leaves(state)
        digests = digest(leaves)
        record = inventory(step, leaves, digests, meta)
        with uninterrupted():
            with self._loud(step):
                for bad in sorted(self._bad & set(self._manager.all_steps())):
                    self._manager.delete(bad)
                self._bad.clear()
                items = ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(record))
                if not self._manager.save(step, args=items, force=True):
                    raise RunFailed("orbax refused it: does another run write here?")
            self._pending = step
            self._target, self._saved = _abstract(state), {step: digests}

    def check(self) -> None:
        """Raises RuntimeError if the save in flight has failed by now. Never waits: call it every step."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight. Raises RuntimeError naming its step and folder if it failed."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        with self._loud(step):
            self._manager.wait_until_finished()
            self._manager.reload()
            if step not in self._manager.all_steps():
                raise RunFailed("it is not there")
        host_memory.give_back()

    def restore(self, step: int | None, target: PyTree, part: bool = False) -> Restored:
        """The state of `step` (None: the newest good one) in the structure, dtypes and shardings of `target`.

        `target` is a pytree of ShapeDtypeStruct with shardings, or of arrays. With `part` the leaves that it lacks are not
        read, such as the moments of a model that is only sampled. A bad step is named in a warning and, with step None, the
        one before is taken. Raises UserError if names, shapes or dtypes differ from the target's; Damaged if no step is
        good; MissingFile if there is none; RunFailed if one could not be read.
        """
        known = sorted(self._manager.all_steps(), reverse=True)
        steps = known if step is None else [s for s in known if s == step]
        if not steps:
            raise MissingFile(f"{self.folder} holds no checkpoint{'' if step is None else f' of step {step}'}")

        for candidate in steps:
            restored, reason = self._attempt(candidate, target, part)
            if restored is None:  # once more: a mount may have failed in between and be back
                restored, reason = self._attempt(candidate, target, part)
            if restored is not None:
                self._target, self._saved[candidate] = _abstract(target), restored[1]
                return restored[0]
            self._bad.add(candidate)
            log.warning("checkpoint of step %d in %s is damaged and not used: %s", candidate, self.folder, reason)
        if step is not None:
            raise Damaged(f"checkpoint of step {step} in {self.folder} is damaged")
        raise Damaged(
            f"no good checkpoint in {self.folder} (damaged: {steps}): bring one of them back from a copy; with the folder "
            "moved aside the same command starts from step 0"
        )

    def finish(self, step: int, target: PyTree = None) -> dict[str, str]:
        """Wait, open the folder anew, restore `step` and compare it with what was saved: only then is a stage done.

        Returns the digests. `target` is needed only if this object neither saved nor restored. A second copy of the
        state lives on the devices meanwhile: drop the first. Raises RuntimeError or ValueError if anything differs.
        """
        self.wait()
        expected, target = self._saved.get(step), self._target if target is None else target
        self._manager.close()
        self._manager = self._open()
        try:
            self.restore(step, target)
        except Damaged as error:
            raise RunFailed(
                f"{error} right after its save: look at the disk; the same command goes on from the step before"
            ) from None
        digests = self._saved[step]
        if expected is not None and digests != expected:
            raise UserError(f"checkpoint of step {step} in {self.folder} is not what was saved: does another run write?")
        return digests

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(self.keep),
            cleanup_tmp_directories=not self.read_only,
            create=not self.read_only,
            read_only=self.read_only,
            enable_async_checkpointing=True,
        )
        _write_arrays_whole()
        try:
            manager = ocp.CheckpointManager(self.folder, options=options)
            if unseen_steps(self.folder, manager.all_steps()):
                manager.reload()  # a run that is alive may have committed one in between
            if unseen := unseen_steps(self.folder, manager.all_steps()):
                raise OSError(f"step {unseen[-1]} is there, and orbax did not see it")
        except Exception as error:
            if isinstance(error, OSError) or could_not_read(error):
                raise unreadable(f"the checkpoints in {self.folder}", line(error)) from error
            raise
        return manager

    @contextmanager
    def _loud(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            where = f"checkpoint of step {step} was not written to {self.folder / str(step)}"
            raise RunFailed(f"{where}: {line(error)}; mend it and run the same command again") from error

    def _attempt(self, step: int, target: PyTree, part: bool) -> tuple[tuple[Restored, dict[str, str]] | None, str]:
        """((restored, digests), "") or (None, why the step is bad)."""
        place, folder = f"checkpoint of step {step} in {self.folder}", self.folder / str(step)
        record, reason = everywhere(lambda: self._read_record(step), folder, place)
        if reason:
            return None, reason
        shapes = _wanted(target)
        check_target(record, shapes, place, part)

        leaves, reason = everywhere(lambda: self._read_leaves(step, shapes, part), folder, place)
        if reason:
            return None, reason
        digests = digest(leaves)
        wrong = wrong_values(record, digests)
        if wrong:
            return None, f"the values of {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''} are not those saved"
        state = jax.tree.unflatten(jax.tree.structure(target), [leaves[path] for path in shapes])
        return (Restored(step, state, record["meta"]), digests), ""

    def _read_record(self, step: int) -> dict[str, Any]:
        record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        check_seal(record, step)
        return record

    def _read_leaves(self, step: int, shapes: dict[str, jax.ShapeDtypeStruct], part: bool) -> dict[str, jax.Array]:
        where = ocp.checkpoint_utils.construct_restore_args(shapes)
        some = ocp.args.PyTreeRestore(item=shapes, restore_args=where, partial_restore=True)
        items = ocp.args.Composite(state=some if part else ocp.args.StandardRestore(shapes))
        return jax.block_until_ready(self._manager.restore(step, args=items)["state"])


def _write_arrays_whole() -> None:
    """A process writes its copy of an array in one piece; several processes share the writing of large ones.

    Orbax would have every device cut out and write its part: a program for each shape and part, and a thousand slices a save
    on eight devices, which saves a single process nothing.
    """
    several = jax.process_count() > 1
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=several, min_slice_bytes_for_replica_parallel=LEAST_PART)
    ocp.type_handlers.register_type_handler(jax.Array, arrays, override=True)


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(_abstract_leaf, tree)


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _wanted(target: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape, dtype and sharding} in the order of the target's leaves."""
    leaves = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    bare = [path for path, leaf in leaves.items() if getattr(leaf, "sharding", None) is None]
    if bare:
        raise UserError(f"the target of restore has no sharding for {', '.join(bare[:5])}: state where the leaf lives")
    return {path: _abstract_leaf(leaf) for path, leaf in leaves.items()}  # no tree.map: it would sort them
