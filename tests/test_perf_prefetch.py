"""What travels to a chip's VMEM while it works: hidden as far as the work is long enough, waited for otherwise."""

import pytest

from proreflow_jax.perf import chips, hlo_cost, hlo_text, prefetch

CHIP = chips.CHIPS["v5e"]
RATE = CHIP.bandwidth / CHIP.clock  # bytes a cycle
NEAR = "{1,0:T(8,128)(2,1)S(1)}"
FAR = "{1,0:T(8,128)(2,1)}"
WHOLE, PART = 2 * 1024 * 1280, 2 * 256 * 1280  # bytes


def program(cycles: int, loop: bool = False) -> str:
    """A part and a whole are sent for, an operation works, both are taken; at once or three times in a loop."""
    body = f"""
  %w = bf16[1024,1280]{FAR} parameter(0)
  %part-start = ((bf16[1024,1280]{FAR}), bf16[256,1280]{NEAR}, s32[]{{:S(2)}}) async-start(%w), calls=%sliced
  %whole-start = (bf16[1024,1280]{NEAR}, bf16[1024,1280]{FAR}, u32[]{{:S(2)}}) copy-start(%w)
  %part-update = ((bf16[1024,1280]{FAR}), bf16[256,1280]{NEAR}, s32[]{{:S(2)}}) async-update(%part-start)
  %x = f32[8,128]{NEAR} parameter(1)
  %work = f32[8,128]{NEAR} multiply(%x, %x), backend_config={{"estimated_cycles":"{cycles}"}}
  %part = bf16[256,1280]{NEAR} async-done(%part-update)
  ROOT %whole = bf16[1024,1280]{NEAR} copy-done(%whole-start)
"""
    main = """
ENTRY %main (s: s32[]) -> s32[] {
  %s = s32[] parameter(0)
  ROOT %loop = s32[] while(%s), condition=%condition, body=%body
}
%condition (s: s32[]) -> pred[] {
  %three = s32[] constant(3)
  %i = s32[] parameter(0)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}
"""
    head = "%body (w: s32[]) -> s32[] {" if loop else "ENTRY %main (w: s32[]) -> s32[] {"
    sliced = f"""
%sliced (p: bf16[1024,1280]) -> bf16[256,1280] {{
  %p = bf16[1024,1280]{FAR} parameter(0)
  ROOT %piece = bf16[256,1280]{NEAR} slice(%p), slice={{[256:512], [0:1280]}}
}}
"""
    return sliced + head + body + "}\n" + (main if loop else "")


@pytest.mark.parametrize("loop", [False, True])
def test_what_the_work_does_not_hide_is_waited_for(loop):
    """Both by the estimates and, where the operation's schedule is not known, by the schedule."""
    turns = 3 if loop else 1
    for cycles in (1000, 4000, 10_000):
        cost = hlo_cost.cost(program(cycles, loop), CHIP, {"other": 1})
        late = max(0.0, (WHOLE + PART) / RATE - cycles)
        assert cost.cycles == pytest.approx({"elementwise": turns * cycles, "prefetches": turns * late})
        assert cost.scheduled == pytest.approx(cost.cycles)
        assert cost.unknown == {}


def test_an_operations_own_arrays_go_first():
    """Of 100 cycles of work, 60 cycles' bytes are its own."""
    queue = prefetch.Queue(rate=10.0)
    queue.send("a", 500)
    queue.send("b", 300)
    queue.work(100, moved=600)
    taken = lambda name: queue.wait(hlo_text.Op("x", "copy-done", "", (name,), None, "", {}, "", "", ""))
    assert (taken("a"), taken("b"), taken("a")) == (10.0, 30.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "result", "operands", "found"),
    [
        ("slice", f"bf16[256,1280]{NEAR}", "%p", PART),  # to VMEM: read
        ("slice", f"bf16[256,1280]{FAR}", "%p", 2 * PART),  # read and written
        ("dynamic-update-slice", f"bf16[1024,1280]{FAR}", "%p, %u", 2 * PART),  # the update alone
        ("all-gather", f"bf16[1024,1280]{FAR}", "%p", 0),  # between chips: not the memory's
    ],
)
def test_bytes_of_what_an_asynchronous_operation_moves(kind, result, operands, found):
    text = f"""
%moved (p: bf16[1024,1280], u: bf16[256,1280]) -> bf16[256,1280] {{
  %p = bf16[1024,1280]{FAR} parameter(0)
  %u = bf16[256,1280]{NEAR} parameter(1)
  ROOT %r = {result} {kind}({operands})
}}
ENTRY %main (w: s32[]) -> s32[] {{
  %w = bf16[1024,1280]{FAR} parameter(0)
  %o = f32[8]{{0}} multiply(%w, %w), backend_config={{"estimated_cycles":"1"}}
  ROOT %start = (bf16[1024,1280]{FAR}, {result}) async-start(%w), calls=%moved
}}
"""
    computations, entry = hlo_text.parse(text)
    assert prefetch.traffic(computations[entry][-1], computations) == found
