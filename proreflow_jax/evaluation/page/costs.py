"""What a run has cost, from what it wrote down: calls of the network, device hours, disk, and what the host waited for."""

import re
from typing import NamedTuple

from proreflow_jax.evaluation.page.facts import Run, Stage
from proreflow_jax.evaluation.page.markup import amount, large, number, span


class Costs(NamedTuple):
    """(title, value) pairs in words; and of each stage (title, shares of the time: devices, input, own work)."""

    facts: list[tuple[str, str]]
    waits: list[tuple[str, tuple[int | float, int | float, int | float]]]


def costs(run: Run) -> Costs:
    """All that is known."""
    facts = list(run.counted)
    if calls := network_calls(run):
        facts.append(("network calls", f"{large(calls)} forwards on one picture, a backward pass counted as two"))
    if seconds := sum(training_seconds(stage) for stage in run.stages):
        facts.append(("training", span(seconds)))
    pairs = pair_seconds(run)
    if pairs:
        facts.append(("pairs, about", span(pairs)))
    devices, kind = devices_of(run)
    if devices and seconds + pairs:
        facts.append(("device hours", f"{number(devices * (seconds + pairs) / 3600)} on {devices} x {kind}"))
    if run.disk:
        facts.append(("disk", amount(sum(run.disk.values()))))
        facts += [(f"of it {name}", amount(size)) for name, size in sorted(run.disk.items(), key=lambda one: -one[1])]
    waits = [(stage.name, shares) for stage in run.stages if (shares := wait_shares(stage))]
    return Costs(facts, waits)


def network_calls(run: Run) -> int | float:
    """Forwards of the network on one picture, by progress.json's costs of an item; 0: not known."""
    parts = [part for part in run.progress.get("parts", ()) if part["phase"] in ("pairs", "train")]
    return sum(part["done"] * part.get("cost", 0) for part in parts)


def training_seconds(stage: Stage) -> int | float:
    """Seconds of the steps that metrics.jsonl has."""
    return _total(stage, "seconds")


def wait_shares(stage: Stage) -> tuple[int | float, int | float, int | float] | None:
    """Shares of the training's time: waiting for the devices, for the input, and own work; None if nothing is known."""
    whole = training_seconds(stage)
    if not whole:
        return None
    device, source = (min(_total(stage, name) / whole, 1.0) for name in ("wait_device", "wait_input"))
    return device, source, max(1 - device - source, 0.0)


def _total(stage: Stage, name: str) -> int | float:
    """The sum over steps of a number that lines give a step."""
    total, before = 0.0, 0
    for line in stage.lines:
        step, value = line.get("step"), line.get(name)
        if isinstance(step, int) and isinstance(value, float | int):
            total, before = total + value * (step - before), step
    return total


def pair_seconds(run: Run) -> int | float:
    """Seconds of the stored pairs, by this run's own rate; 0: not known."""
    rate = run.progress.get("rates", {}).get("pairs") or 0.0
    return sum(part["done"] * part.get("cost", 0) * rate for part in run.progress.get("parts", ()) if part["phase"] == "pairs")


def devices_of(run: Run) -> tuple[int, str]:
    """(how many, which) of "8 x TPU v5e"; (0, "") if that is not known."""
    match = re.match(r"(\d+) x (.+)", str(run.progress.get("devices", "")))
    return (int(match[1]), match[2]) if match else (0, "")
