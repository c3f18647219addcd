"""The plan of a folder of records: which example lies in which shard. It is fixed at the first start.

Shard s holds the examples [s S, (s + 1) S), on any number of processes. So a shard's bytes depend on the plan alone, and a
folder with one plan refuses another.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.storage import atomic, paths

PLAN = "plan.json"
MEND = (  # of a plan that is damaged
    "put a whole copy in its place, or move it aside and run the job of this folder (make_pairs, train, cache) again with the "
    "same config: the plan is written anew, what lies beside it stays"
)


def fix_plan(folder: Any, plan: Mapping[str, Any], flag: str = "--config.name") -> None:
    """Writes `plan` to folder/plan.json at the first start; later starts must bring the same plan.

    This file reads the fields `examples`, `shard_size` and, for records that are no pairs, their name `records`. The other
    fields (seed, model digest, solver, ...) are opaque. `flag` is the flag that names another folder.

    Raises:
        ValueError: the folder holds another plan (the first differing field is named), or the plan is no plain JSON.
    """
    shard_count(plan)
    folder, plan = paths.parse_path(folder), atomic.plain_json(plan)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).exists():
        atomic.write_json(folder / PLAN, plan, replace=False)
    check_plan(folder, plan, flag)


def check_plan(folder: Any, plan: Mapping[str, Any], flag: str = "--config.name", unknown: Collection[str] = ()) -> None:
    """Raises as `fix_plan` if the folder's plan is another; writes nothing. `unknown` are fields that are not compared."""
    folder, plan = paths.parse_path(folder), atomic.plain_json(plan)
    fixed = read_plan(folder)
    for name in [*(name for name in fixed if name not in plan), *plan]:
        if name in unknown:
            continue
        if name not in fixed or name not in plan or fixed[name] != plan[name]:
            old, new = (json.dumps(p[name]) if name in p else "nothing" for p in (fixed, plan))
            raise UserError(
                f"{folder / PLAN} was fixed with {name} = {old} and this run says {new}: "
                f"take another folder by {flag}, or give the config its old value back"
            )


def read_plan(folder: Any) -> dict[str, Any]:
    """Returns the plan of a folder of records; FileNotFoundError if there is none, ValueError if it is broken."""
    plan = atomic.read_json(paths.parse_path(folder) / PLAN, MEND)
    shard_count(plan)
    return plan


def shard_count(plan: Mapping[str, Any]) -> int:
    """Returns how many shards the plan has: examples / shard_size, rounded up; the last one may be shorter."""
    for name in ("examples", "shard_size"):
        value = plan.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"pairs.{name} = {value!r} is not a whole number of at least 1: set --config.pairs.{name}")
    count = -(-plan["examples"] // plan["shard_size"])
    if count > 99_999:
        raise UserError(f"{count} shards are more than a name's five digits hold: raise --config.pairs.shard_size")
    return count


def shard_range(plan: Mapping[str, Any], shard: int) -> range:
    """Returns the example ids of a shard: [s S, (s + 1) S), cut at the number of examples."""
    if not 0 <= shard < shard_count(plan):
        raise UserError(f"shard {shard} is outside the plan's 0 .. {shard_count(plan) - 1}")
    return range(shard * plan["shard_size"], min((shard + 1) * plan["shard_size"], plan["examples"]))


def check_groups(plan: Mapping[str, Any], batch: int, groups: int, flag: str) -> None:
    """Raises ValueError, one line, unless equal groups of whole shards, and of rows of a batch, can be made."""
    shards, whole = shard_count(plan), plan["examples"] % plan["shard_size"] == 0
    if groups > 1 and (batch % groups or shards % groups or not whole):
        raise UserError(
            f"{flag}={groups} must divide the batch of {batch} and the {shards} shards of {plan['examples']} records, each of "
            f"{plan['shard_size']}: take a smaller one, or 1"
        )


def group_shards(plan: Mapping[str, Any], groups: int, group: int) -> range:
    """Returns the shards of one of equal groups."""
    each = shard_count(plan) // groups
    return range(group * each, (group + 1) * each)


def shard_name(plan: Mapping[str, Any], shard: int) -> str:
    """Returns a shard's file name, pairs-00003-of-00016.array_record."""
    return f"{plan.get('records', 'pairs')}-{shard:05d}-of-{shard_count(plan):05d}.array_record"
