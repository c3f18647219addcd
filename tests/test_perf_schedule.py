"""libtpu's last schedule: bundles by file, an operation's cycles by bundles and bytes, a program's beside its estimate.

Nothing here compiles for a TPU; files and lines are cut from those that libtpu wrote for a v5e and a v6e.
"""

import importlib.metadata
import os

import pytest

from proreflow_jax.perf import chips, hlo_cost, hlo_text, plan_report, program_text, schedule

CHIP = chips.CHIPS["v5e"]
CLOCKED = CHIP.clock / CHIP.bandwidth  # cycles that a byte takes
WINDOWS = (  # as in a dump; jaxlib's text has the fields in another order
    'backend_config={"window_config":{"buffering_level":"2","cost_model_type":"COST_MODEL_TYPE_INVALID","estimated_cycles":"%d",'
    '"estimated_vmem_bytes":"0","iteration_bounds":[%s],"kernel_window_bounds":["160","10"],"output_window_bounds":["2"]}}'
)
LAYOUT = "{1,0:T(8,128)(2,1)}"
PRODUCT = f"""
%product (p: bf16[8192,1280], w: bf16[1280,1280]) -> bf16[8192,1280] {{
  %p = bf16[8192,1280]{LAYOUT} parameter(0)
  %w = bf16[1280,1280]{LAYOUT} parameter(1)
  ROOT %dot = bf16[8192,1280]{LAYOUT} convolution(%p, %w), dim_labels=bf_io->bf
}}

%loop_body (b: s32[]) -> bf16[10,8,128] {{
  %stack = bf16[10,8,128]{{2,1,0}} parameter(0)
  %new = bf16[1,8,128]{{2,1,0}} parameter(1)
  %at = s32[] parameter(2)
  %one = bf16[1,8,128]{{2,1,0}} dynamic-slice(%stack, %at), dynamic_slice_sizes={{1,8,128}}
  %sum = bf16[1,8,128]{{2,1,0}} add(%one, %new)
  %updated = bf16[10,8,128]{{2,1,0}} dynamic-update-slice(%stack, %sum, %at)
  ROOT %result = bf16[10,8,128]{{2,1,0}} bitcast(%updated)
}}

ENTRY %main (x: bf16[8192,1280], y: bf16[1280,1280]) -> bf16[8192,1280] {{
  %x = bf16[8192,1280]{LAYOUT} parameter(0)
  %y = bf16[1280,1280]{LAYOUT} parameter(1)
  %near = bf16[8192,1280]{LAYOUT[:-1]}S(1)}} copy-done(%x)
  %fusion.1 = bf16[8192,1280]{LAYOUT} fusion(%near, %y), kind=kOutput, calls=%product, {WINDOWS % (93754, '"1","5","1"')}
  %fusion.2 = bf16[8192,1280]{LAYOUT} fusion(%near, %y), kind=kOutput, calls=%product, {WINDOWS % (93754, '"1","5","1"')}
  %stacked = bf16[10,8,128]{{2,1,0}} parameter(2)
  %row = bf16[1,8,128]{{2,1,0}} parameter(3)
  %i = s32[] parameter(4)
  %fusion.3 = bf16[10,8,128]{{2,1,0}} fusion(%stacked, %row, %i), kind=kLoop, calls=%loop_body, {WINDOWS % (9000, '"2"')}
  ROOT %fusion.4 = bf16[8192,1280]{LAYOUT} fusion(%fusion.1, %y), kind=kOutput, calls=%product, {WINDOWS % (250000, '"4"')}
}}
"""
WEIGHT, RESULT = 2 * 1280 * 1280, 2 * 8192 * 1280  # bytes
ROW = 2 * 8 * 128


def written(folder, name: str, count: int, number: int = 7) -> None:
    """A file of libtpu's counts: a head of four lines, then a line a bundle."""
    head = "== CAPACTIY:\nMATMUL, MATPUSH, XLU\n    2     2     2\n== UTILIZATION:\n"
    path = folder / f"1796084914139255269-{name}-{number:02}-final_hlo-static-per-bundle-utilization.txt"
    path.write_text(head + "0 1 0\n" * count)


def test_a_line_is_a_bundle(tmp_path):
    written(tmp_path, "fusion.1", 10510)
    written(tmp_path, "<late-finalization>", 4, 0)
    (tmp_path / "1796-TLP-hlo.txt").write_text("0 1 0\n")
    assert schedule.bundles(tmp_path) == {"fusion.1": 10510, "<late-finalization>": 4}


def test_an_operation_takes_its_bundles_or_its_bytes_and_one_windows_transfer():
    """What lies in VMEM is no transfer; operations that are alike are scheduled once."""
    computations, entry = hlo_text.parse(PRODUCT)
    types = {op.name: op.type for op in computations[entry]}
    op = {op.name: op for op in computations[entry]}
    known = schedule.Schedule({"fusion.1": 10500, "fusion.4": 10}, computations, CHIP)
    moved = (WEIGHT + RESULT) * CLOCKED
    assert known.cycles(op["fusion.1"], types) == pytest.approx(5 * 10500 + moved / 5 + schedule.LATENCY)
    assert known.cycles(op["fusion.2"], types) == known.cycles(op["fusion.1"], types)
    slow = (WEIGHT + 2 * RESULT) * CLOCKED  # 40 cycles of work behind them
    assert known.cycles(op["fusion.4"], types) == pytest.approx(slow + slow / 4 + schedule.LATENCY)
    assert known.cycles(op["fusion.3"], types) is None and known.cycles(op["near"], types) is None


def test_a_slice_of_a_stack_is_read_and_written_not_the_stack():
    """As in a loop over layers, which updates its stack in place."""
    computations, entry = hlo_text.parse(PRODUCT)
    types = {op.name: op.type for op in computations[entry]}
    (op,) = (op for op in computations[entry] if op.name == "fusion.3")
    number = 4  # bytes of the place
    assert schedule.Schedule({}, computations, CHIP).traffic(op, types) == 3 * ROW + number


def test_a_program_by_its_schedule_and_what_is_left_of_the_estimate():
    plain, cost = hlo_cost.cost(PRODUCT, CHIP), hlo_cost.cost(PRODUCT, CHIP, {"fusion.1": 10500, "fusion.4": 90000})
    assert plain.scheduled == {} and plain.scheduled_seconds(CHIP) is None
    assert cost.cycles == plain.cycles and cost.unscheduled == 9000
    one, last = (WEIGHT + RESULT) * CLOCKED, (WEIGHT + 2 * RESULT) * CLOCKED
    expected = 2 * (5 * 10500 + one / 5) + (4 * 90000 + last / 4) + 3 * schedule.LATENCY + 9000
    assert sum(cost.scheduled.values()) == pytest.approx(expected)
    assert cost.scheduled_seconds(CHIP) == pytest.approx(expected / CHIP.clock)


def test_libtpu_is_asked_to_count_only_while_it_is_loaded(monkeypatch):
    """jax's keys of compiled programs take the variable in; another libtpu might end the process over a flag."""
    version = schedule.VERSION
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setenv(schedule.ARGUMENTS, "--mine=1")
    with schedule.counting():
        assert os.environ[schedule.ARGUMENTS].startswith(f"--mine=1 --xla_jf_dump_to={schedule.folder()} ")
    assert os.environ[schedule.ARGUMENTS] == "--mine=1"
    monkeypatch.delenv(schedule.ARGUMENTS)
    with schedule.counting():
        assert "final_hlo" in os.environ[schedule.ARGUMENTS]
    assert schedule.ARGUMENTS not in os.environ
    version = "9.9.9"
    with schedule.counting():
        assert schedule.ARGUMENTS not in os.environ


def test_counts_of_one_program_are_not_taken_for_anothers(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "folder", lambda: tmp_path)
    written(tmp_path, "fusion.1", 3)
    schedule.clear()
    assert schedule.bundles(schedule.folder()) == {}


def test_plan_tells_both_and_what_has_no_schedule():
    times = {"scheduled_seconds": 0.9, "scheduled_utilisation": 0.45, "unscheduled_seconds": 0.001}
    line = plan_report._schedule
    assert line(times) == "900 ms a call by libtpu's last schedule, 45.0 % of the chips' peak"
    assert line(times | {"unscheduled_seconds": 0.1}).endswith("peak, 100 ms of it estimated")
    assert line({}) == f"unknown: only {program_text.LIBTPU} is known to count it"
