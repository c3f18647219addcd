"""plan: what the TPU compiler's text says, work counted from shapes, jobs as shapes, kept results, changes that make a job fit.

Nothing here compiles for a TPU but the slow test at the end; the snippet is cut from a real program for v5e.
"""

import importlib.metadata
import importlib.util
import json
import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import verb
from full_size import SD_15, SDXL, VAE
from test_house import imports

from configs.digits import get_config
from proreflow_jax import RunFailed
from proreflow_jax.models import network
from proreflow_jax.models.layers import Compute
from proreflow_jax.perf import chips, estimate, flops, hlo_cost, make_it_fit, plan_report, program_text, resident, tpu_compile
from proreflow_jax.perf import jobs as perf_jobs
from proreflow_jax.perf.jobs import Job, frozen_shapes, jobs, prompt_shapes, record_shapes, storage
from proreflow_jax.run import check_config, dataset, experiment, open
from proreflow_jax.runtime import mesh, programs

CHIP = chips.CHIPS["v5e"]
NOTHING = tpu_compile.Compiled(tpu_compile.Memory(0, 0, 0, 0), hlo_cost.Cost({"linears": 1.503e6}, {}, {}, 0.0, 0.0, 0), 1.0)
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
CONVOLVED, ATTENTION = "jit(f)/conv_general_dilated", "jit(f)/vmap(BTNH,BSNH->BNTS)/dot_general"
PROGRAM = f"""HloModule jit_f, is_scheduled=true

%fused_computation.1 (p: bf16[4,32,32,128]) -> bf16[4,32,32,64] {{
  %p = bf16[4,32,32,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %convolution.9 = bf16[4,32,32,64]{{3,2,1,0}} convolution(%p, %p), metadata={{op_name="{CONVOLVED}"}}
}}

%fused_computation.2 (p.2: f32[64]) -> f32[4,64] {{
  %p.2 = f32[64]{{0}} parameter(0)
  ROOT %all-gather.1 = f32[4,64]{{1,0}} all-gather(%p.2), channel_id=7, dimensions={{0}}
}}

%body (b: (s32[], bf16[4,32,32,128])) -> (s32[], bf16[4,32,32,128]) {{
  %b = (s32[]{{:T(128)}}, bf16[4,32,32,128]{{3,2,1,0:T(8,128)(2,1)S(1)}}) parameter(0)
  %fusion.1 = bf16[4,32,32,64]{{3,2,1,0}} fusion(%b), kind=kOutput, calls=%fused_computation.1, {CYCLES % 100}
  ROOT %tuple.1 = (s32[]{{:T(128)}}, bf16[4,32,32,128]{{3,2,1,0}}) tuple(%b, %b)
}}

%condition (c: (s32[], bf16[4,32,32,128])) -> pred[] {{
  %constant.5 = s32[]{{:T(128)}} constant(5)
  %c = (s32[]{{:T(128)}}, bf16[4,32,32,128]{{3,2,1,0}}) parameter(0)
  ROOT %lt.16 = pred[]{{:T(512)}} compare(%c, %constant.5), direction=LT
}}

ENTRY %main.8_spmd (q: bf16[3,2,1024,40], x: f32[64]) -> f32[] {{
  %q.1 = bf16[3,2,1024,40]{{3,2,1,0:T(8,128)(2,1)}} parameter(0)
  %x = f32[64]{{0}} parameter(1)
  %while.1 = (s32[], bf16[4,32,32,128]{{3,2,1,0}}) while(%q.1), condition=%condition, body=%body
  %fusion.3 = f32[4,64]{{1,0}} fusion(%x), kind=kCustom, calls=%fused_computation.2
  %fusion.4 = f32[4,64]{{1,0}} fusion(%x), kind=kCustom, calls=%fused_computation.2
  %copy.1 = bf16[3,2,1024,40]{{3,2,1,0}} copy(%q.1), {CYCLES % 7}
  %dot.1 = bf16[3,2,1024,1024]{{3,2,1,0}} convolution(%q.1, %q.1), metadata={{op_name="{ATTENTION}"}}, {CYCLES % 11}
  %splash_mha_fwd_residuals.1 = (f32[3,512,128]{{2,1,0}}, bf16[3,2,1024,40]{{3,2,1,0}}) custom-call(%x, %q.1, %q.1, %q.1), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 512, \\"use_fused_bwd_kernel\\": false}}"
}}}}, metadata={{op_name="jit(f)/splash_mha_fwd_residuals/pallas_call"}}
  %my_kernel.2 = f32[4,1024]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %sum = f32[] constant(0)
}}
"""


def test_cycles_are_summed_by_kind_and_loops_run_as_often_as_they_say():
    cost = hlo_cost.cost(PROGRAM, CHIP)
    assert cost.cycles["convolutions"] == 5 * 100
    assert (cost.cycles["copies"], cost.cycles["attention"]) == (7, 11)
    assert cost.unread_loops == 0
    unread = hlo_cost.cost(PROGRAM.replace("constant(5)", "parameter(1)"), CHIP)
    assert (unread.cycles["convolutions"], unread.unread_loops) == (100, 1)


def test_a_number_that_is_none_is_no_estimate():
    """The compiler writes 2^63 - 1 beside a small sum that a SparseCore works out."""
    offloaded = f"  %offloaded = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%add, {CYCLES % (2**63 - 1)}\n  ROOT %sum"
    assert hlo_cost.cost(PROGRAM.replace("  ROOT %sum", offloaded), CHIP) == hlo_cost.cost(PROGRAM, CHIP)


def test_a_transfer_that_is_spread_over_the_program_is_counted_once():
    assert hlo_cost.cost(PROGRAM, CHIP).communication == 4 * 64 * 4
    summed = "  %sums = (f32[8]{0}, bf16[100]{0}) all-reduce(%x, %x), channel_id=8, to_apply=%add\n  ROOT %sum"
    permuted = "  %moved = (f32[9]{0}, f32[9]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9\n" + summed
    assert hlo_cost.cost(PROGRAM.replace("  ROOT %sum", permuted), CHIP).communication == 4 * 64 * 4 + (4 * 8 + 200) + 4 * 9


def test_a_transfer_that_a_sparse_core_carries_out_is_a_transfer_and_hides():
    gathers = """%elsewhere (p.5: f32[64]) -> f32[8,64] {
  %p.5 = f32[64]{0} parameter(0)
  ROOT %all-gather.5 = f32[8,64]{1,0} all-gather(%p.5), channel_id=11, dimensions={0}
}, execution_thread="sparsecore"

%apart (p.6: f32[64]) -> f32[8,64] {
  %p.6 = f32[64]{0} parameter(0)
  ROOT %call.6 = f32[8,64]{1,0} custom-call(%p.6), custom_call_target="TODO(b/1)", called_computations={%elsewhere}
}, execution_thread="sparsecore"

ENTRY"""
    begun = "  %begun = ((f32[64]{0}), f32[8,64]{1,0}) async-start(%x), calls=%apart\n  ROOT %sum"
    plain = hlo_cost.cost(PROGRAM, CHIP)
    cost = hlo_cost.cost(PROGRAM.replace("ENTRY", gathers).replace("  ROOT %sum", begun), CHIP)
    assert cost.communication == plain.communication + 4 * 8 * 64
    assert (cost.waited, cost.unknown, cost.cycles) == (0, plain.unknown, plain.cycles)


def test_flags_of_cpus_are_kept_from_the_tpu_compiler_which_knows_none():
    assert tpu_compile.without_cpu("--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=8") == (
        "--xla_force_host_platform_device_count=8"
    )
    assert tpu_compile.without_cpu("") == ""


def test_the_chip_waits_for_transfers_that_nothing_hides():
    """Neither for one that is spread over the program nor for one that starts and ends apart."""
    plain = hlo_cost.cost(PROGRAM, CHIP)
    assert plain.waited == 0 < plain.communication
    summed = "  %sums = (f32[8]{0}, bf16[100]{0}) all-reduce(%x, %x), channel_id=8, to_apply=%add\n  ROOT %sum"
    permuted = "  %moved = (f32[9]{0}, f32[9]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9\n" + summed
    cost = hlo_cost.cost(PROGRAM.replace("  ROOT %sum", permuted), CHIP)
    assert cost.waited == 4 * 8 + 200
    for mine, without in zip(cost.seconds(CHIP), plain.seconds(CHIP), strict=True):
        assert mine - without == pytest.approx(232 / CHIP.links)
    working = summed.replace("to_apply=%add", "to_apply=%add, " + CYCLES % 3)
    assert hlo_cost.cost(PROGRAM.replace("  ROOT %sum", working), CHIP).waited == 0


def test_splash_attention_has_its_floor_and_any_other_kernel_its_name():
    cost = hlo_cost.cost(PROGRAM, CHIP)
    flop = 2 * 2 * 3 * 2 * 1024 * 1024 * 128  # forward: 2 products, 6 heads, 40 filled up to 128
    assert cost.cycles["kernels"] == pytest.approx(flop / 197e12 * 1.503e9)
    assert cost.kernels == {"splash_mha_fwd_residuals": 1} and cost.unknown == {"my_kernel": 1}
    gradients = lambda count: ", ".join(["f32[3,512,128]{2,1,0}", *["bf16[3,2,1024,40]{3,2,1,0}"] * count])
    for count, products in ((2, 4), (3, 5)):  # of k and v, and of q too
        text = PROGRAM.replace("fwd_residuals", "dkv_no_residuals").replace(gradients(1), gradients(count))
        assert hlo_cost.cost(text, CHIP).cycles["kernels"] == pytest.approx(products / 2 * cost.cycles["kernels"])


BOTH = ("fwd", "bwd")


def test_the_kernel_of_narrow_heads_costs_what_its_schedule_says():
    kernel, rest = "%my_kernel.2 = f32[4,1024]{1,0} custom-call(%x)", "  ROOT %sum"
    sides = {"image": (4096,), "text": (80,), "both": (4096, 128)}
    made = [f"  %{side}{s} = bf16[3,24,64,{s}]{{3,2,1,0}} constant(0)\n" for side, tokens in sides.items() for s in tokens]
    program = PROGRAM.replace(rest, "".join([*made, "  %w = f32[24,64,1]{2,1,0} constant(0)\n", rest]))

    def text(name: str, queries: str, keys: str, *columns: str) -> str:
        out = ", ".join(f"bf16[3,24,64,{s}]{{3,2,1,0}}, f32[3,24,1,{s}]{{3,2,1,0}}" for s in sides[queries])
        given = ", ".join([*(f"%{side}{s}" for side in (queries, keys, keys) for s in sides[side]), *columns])
        return program.replace(kernel, f"%narrow_mha_{name}.2 = ({out}) custom-call({given})")

    kinds = {("image", "image"): CHIP.narrow[64], ("image", "text"): CHIP.cross[64], ("both", "both", "%w"): CHIP.joint}
    splash, *found = (hlo_cost.cost(t, CHIP) for t in (program, *(text(name, *kind) for kind in kinds for name in BOTH)))
    assert (found[0].kernels["narrow_mha_fwd"], found[0].unknown) == (1, {})
    added = [cost.cycles["kernels"] - splash.cycles["kernels"] for cost in found]
    scores = [s for s in (4.096**2, 4.096 * 0.08, 4.224**2) for _ in BOTH]
    assert added == pytest.approx([3 * 24 * s * cycles for s, cycles in zip(scores, sum(kinds.values(), ()), strict=True)])
    unknown = hlo_cost.cost(text("fwd", "image", "image").replace("3,24,64,", "3,24,56,"), CHIP)
    assert unknown.unknown == {"narrow_mha_fwd": 1}  # a width whose schedule nobody read


def test_seconds_are_cycles_by_the_clock_and_only_streaming_is_thought_faster():
    cost = hlo_cost.Cost({"convolutions": 1.503e9, "copies": 2.2 * 1.503e9}, {}, {}, 0.0, 0.0, 0)
    assert cost.seconds(CHIP) == pytest.approx((3.2, 2.0))


class Program:
    """Stands in for a compiled program: a text, or jaxlib's error for a text that it can't read, and sizes."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def as_text(self) -> str:
        if not self.text:
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands")
        return self.text

    def memory_analysis(self) -> SimpleNamespace:
        sizes = dict(argument_size_in_bytes=5, temp_size_in_bytes=3, output_size_in_bytes=7, alias_size_in_bytes=5)
        return SimpleNamespace(**sizes, generated_code_size_in_bytes=1)


DOCTORED = {  # a text as another libtpu might write it -> why it is not read
    "entry": (PROGRAM.replace("ENTRY ", ""), "no ENTRY"),
    "cycles": (
        PROGRAM.replace("estimated_cycles", "cycle_estimate").replace("splash", "flash"),
        "no operation has an estimate",
    ),
    "loops": (PROGRAM.replace("condition=%condition, ", ""), "KeyError: 'condition'"),
    "types": (PROGRAM.replace("bf16[3,2,1024,40]", "bf16<3x2x1024x40>"), "Error"),
    "empty": ("<binary>", "no ENTRY"),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_text_of_unknown_format_is_one_error_that_names_libtpu_and_memory_is_known(tmp_path, monkeypatch, name):
    text, reason = DOCTORED[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "9.9.9")
    with pytest.raises(program_text.UnknownText, match=f"libtpu 9.9.9 .*only that of libtpu==0.0.51.*{reason}") as error:
        program_text.read_cost(text, CHIP)
    assert "\n" not in str(error.value)
    compiled = tpu_compile.describe(Program(text), tmp_path, CHIP, 1.0)
    assert (compiled.cost, compiled.no_cost, compiled.too_large) == (None, str(error.value), False)
    assert compiled.memory == tpu_compile.Memory(arguments=5, temporaries=3, outputs=2, code=1)


def shape(*sides: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, jnp.float32)


@pytest.mark.parametrize(
    ("config", "side", "wide", "counted"),
    [
        (SD_15, 64, 768, {"convolutions": 406, "linears": 233, "attention": 126}),
        pytest.param(SDXL, 128, 2048, {}, marks=pytest.mark.slow),
    ],
)
def test_the_published_forwards_are_counted(config, side, wide, counted):
    """GFLOP of one image: 38 of SD 1.5's published 803 and 134 of SDXL's 6,761 are upsamplers', and not needed.

    A CPU computes some of them all the same (tests/test_models_on_cpu.py).
    """
    net = network.make_unet(config, Compute(platform="gpu"))
    added = (shape(1, 1280), shape(1, 6)) if config is SDXL else ()
    found = flops.count(net.apply, net.shapes, shape(1, side, side, 4), shape(1), shape(1, 77, wide), *added)
    assert round(flops.total(found) / 1e9) == (6627 if config is SDXL else 766)
    assert {name: round(found[name] / 1e9) for name in counted} == counted


def test_the_published_autoencoder_is_counted():
    vae = network.make_vae(VAE)
    cost = lambda method, x: round(flops.total(flops.count(partial(vae.apply, method=method), vae.shapes, x)) / 1e9)
    assert (cost("decode", shape(1, 64, 64, 4)), cost("encode", shape(1, 512, 512, 3))) == (2128, 1117)  # 2515 as published


def test_work_in_loops_and_branches_is_counted_as_it_runs():
    a = shape(8, 8)
    body = lambda x, _: (x @ x, None)
    assert flops.count(lambda x: jax.lax.scan(body, x, None, length=7)[0], a) == {"linears": 7 * 2 * 8**3}
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x)
    assert flops.count(branches, a) == {"linears": 2 * 2 * 8**3}
    assert flops.count(jax.grad(lambda x: jax.checkpoint(jnp.sum)(x @ x)), a)["linears"] == 3 * 2 * 8**3
    endless = flops.count(lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x), a)
    assert endless["unknown loop"] == 1 and flops.total(endless) == 2 * 8**3


def test_slices_are_counted_and_an_unknown_one_lists_the_known():
    assert [chips.chip_count(name) for name in ("v5e:4x4", "v6e:2x4", "v5p:2x2x2", "v5e:1x1")] == [16, 8, 8, 1]
    for wrong in ("v5e:3x3", "v5e", "v9:1x1", "4x4"):
        with pytest.raises(ValueError, match=r"--slice=.*known.*v5e: 1x1.*v5p: 2x2x1.*v6e: 1x1"):
            chips.slice_chip(wrong)


def test_a_compiler_that_finds_a_program_too_large_says_by_how_much():
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the total memory required for HLO temporaries (134.18G) exceeds "
    assert tpu_compile.too_large(f"{said}available HBM (15.75G).") == int(134.18 * 2**30)
    assert tpu_compile.too_large("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.") == int(20.5 * 2**30)
    assert tpu_compile.too_large("INTERNAL: something else") is None


def test_a_programs_memory_is_known_as_soon_as_the_dump_has_it(tmp_path):
    """Of the program, not of its parts for SparseCores, and not of a report that is half written."""
    report = "module_{}.after_optimizations-memory-usage-report.txt"
    text = (
        "Memory Space: default (color=0)\nTotal bytes: 9305588736 (8.67GiB)\nMemory Space: vmem (color=1)\nTotal bytes: 5 (5B)"
    )
    assert tpu_compile.early_size(tmp_path) is None
    (tmp_path / report.format("0004.extracted.cl_1")).write_text(text.replace("9305588736", "7"))
    (tmp_path / report.format("0000.jit_step.cl_1")).write_text(text[:40])
    assert tpu_compile.early_size(tmp_path) is None
    (tmp_path / report.format("0000.jit_step.cl_1")).write_text(text)
    assert tpu_compile.early_size(tmp_path) == 9305588736


def test_the_compilers_dump_is_read_and_without_one_jaxlibs_text(tmp_path):
    """Which prints a C++ trace and raises where libtpu's format is newer than jaxlib's."""
    with pytest.raises(program_text.UnknownText, match="no text: INTERNAL.*async-update"):
        program_text.program_cost(Program(), tmp_path, CHIP)
    for name, text in (("f.after_codegen", PROGRAM), ("small.after_codegen", ""), ("f.after_optimizations", "x")):
        (tmp_path / f"module_1.{name}.txt").write_text(text)
    assert program_text.program_cost(Program(), tmp_path, CHIP) == hlo_cost.cost(PROGRAM, CHIP)


# --- jobs of a tiny model, on the eight fake devices --------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("quick")


def described(tree: object) -> list[tuple]:
    """What is compiled of arrays or shapes: where in the tree, shape, dtype, sharding where it is no default one."""
    spec = lambda leaf: leaf.sharding.spec if hasattr(leaf.sharding, "spec") else None
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype, spec(leaf)) for path, leaf in leaves]


@pytest.mark.parametrize("fields", [{}, {"pairs__mode": "online", "student__lora__rank": 2}])
def test_shapes_are_those_of_the_arrays_that_the_verbs_hand_over(tmp_path, model, outline_only, fields):
    fields |= {"mesh__data": 2, "mesh__fsdp": 4}
    real = open.open_experiment(verb.tiny_config(tmp_path, model, **fields))
    shapes = open.open_outline(verb.tiny_config(tmp_path, outline_only, **fields), jax.devices())
    stage, online = real.stages[0], "pairs__mode" in fields
    teacher = real.denoiser.params() if online else {}
    arrays = experiment.frozen_arrays(real, stage, teacher, online)._replace(key=None)
    made = frozen_shapes(shapes, stage, online, online)._replace(key=None)
    assert described(made) == described(arrays)

    rows = dataset.read_rows(real.config, real.base.tokenizer, dataset.open_source(real.config, real.base), np.arange(16))
    assert described(prompt_shapes(shapes, 16)) == described(mesh.put_batch(real.mesh, rows, 16))


def test_records_are_what_the_pairs_job_makes(tmp_path, outline_only):
    shapes = open.open_outline(verb.tiny_config(tmp_path, outline_only), jax.devices())
    stage = shapes.stages[0]
    job = jobs(shapes, stage)["pairs"]
    made, kept = jax.eval_shape(job.jitted, *job.arguments), record_shapes(shapes, stage)
    states = ("finite", "fits")  # of each record: whether it may be written
    assert [made.pop(name).shape for name in states] == [made["ids"].shape[:1]] * 2
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in kept.items()}
    assert storage(shapes, stage)["pairs"] == 32 * (4 * 5 * 4 * 4 * 4 + 4 + 4 * 8)


def test_one_program_trains_all_stages(tmp_path, outline_only):
    shapes = open.open_outline(verb.tiny_config(tmp_path, outline_only), jax.devices())
    found = [jobs(shapes, stage)["train"] for stage in shapes.stages]
    first, second = (job.jitted.lower(*job.arguments).as_text() for job in found)
    assert first == second and len(first) > 10_000


def test_a_job_needs_the_work_of_its_forwards(tmp_path, outline_only):
    """A training step: the student three times (forward, and a backward of two); a trajectory of 4 windows: 4 forwards."""
    shapes = open.open_outline(verb.tiny_config(tmp_path, outline_only), jax.devices())
    unet, text = shapes.base.networks["unet"], shapes.base.networks["text_encoder"]
    forward = flops.total(flops.count(unet.apply, unet.shapes, shape(16, 4, 4, 4), shape(16), shape(16, 8, 8)))
    told = flops.total(flops.count(text.apply, text.shapes, jax.ShapeDtypeStruct((16, 8), jnp.int32)))
    found = jobs(shapes, shapes.stages[0])
    assert found["train"].useful() == pytest.approx(3 * forward + told, rel=0.01)
    assert found["pairs"].useful() == pytest.approx(4 * forward + told, rel=0.01)
    assert (found["pairs"].calls, found["train"].calls, found["train"].at_once) == (2, 6, 2)


def test_a_state_must_fit_twice_since_it_is_saved_by_torch_names_beside_its_stacks(tmp_path, outline_only):
    shapes = open.open_outline(verb.tiny_config(tmp_path, outline_only), jax.devices())
    job = jobs(shapes, shapes.stages[0])["train"]._replace(useful=lambda: 1e9)
    sizes = resident.sum_classes(job.classes, job.beside)
    compiled = NOTHING._replace(memory=tpu_compile.Memory(resident.bytes_on_device(job.arguments), 0, 0, 0))
    place, needed = estimate.target("v5e:2x4", ""), sum(sizes.values()) + sizes["state"]
    for room, fits in ((needed, True), (needed - 1, False)):
        found = estimate.measured(job, compiled, place._replace(chip=place.chip._replace(memory=room)))
        assert found["fits"] is fits and f"{needed / chips.GIB:.2f} when it is saved" in plan_report.job(found)


# --- results, kept ones, and the verb -------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the TPU compiler, 1 GiB of temporaries an image at once; a list of the images at once it was asked for."""
    asked: list[int] = []
    real = estimate.measured

    def measured(job: Job, compiled: tpu_compile.Compiled, place: estimate.Target) -> dict:
        asked.append(job.at_once)
        memory = tpu_compile.Memory(resident.bytes_on_device(job.arguments), job.at_once * chips.GIB, 0, 0)
        return real(job, compiled._replace(memory=memory), place)

    monkeypatch.setattr(estimate, "measured", measured)
    monkeypatch.setattr(tpu_compile, "compile_for", lambda *job: NOTHING)
    monkeypatch.setattr(tpu_compile, "devices", lambda name, slices: jax.devices())
    monkeypatch.setattr(tpu_compile, "prepare_compiler", lambda: None)
    monkeypatch.setattr(perf_jobs, "_counted", lambda *job: 1e9)
    return asked


def test_a_result_is_kept_until_something_it_depends_on_changes(tmp_path, outline_only, compiler):
    config = verb.tiny_config(tmp_path, outline_only)
    place = estimate.target("v5e:2x4", str(tmp_path / "cache"))
    ask = lambda config, windows=4: estimate.estimate(config, place, estimate.opener(config, place), windows, "train")
    first = ask(config)
    assert (
        first["fits"]
        and sum(first["memory"][part] for part in first["memory"].keys() - {"total", "available"}) == (first["memory"]["total"])
    )
    assert first["seconds"] == pytest.approx(1e-3) and len(compiler) == 1
    assert ask(config) == first and len(compiler) == 1
    assert ask(check_config.changed(config, {"name": "other", "data.path": "x", "train.log_every": 9})) == first
    assert len(compiler) == 1
    for changed in (
        {"train.batch": 32},
        {"model.dtype": "bfloat16"},
        {"mesh.fsdp": 8, "mesh.data": 1},
        {"data.kind": "cached"},
    ):
        ask(check_config.changed(config, changed))
    ask(config, windows=2)
    assert len(compiler) == 6  # a cache hands over latents in place of images


def test_without_a_readable_text_memory_and_the_verdict_are_printed_and_time_is_unknown(
    tmp_path, outline_only, compiler, monkeypatch
):
    monkeypatch.setattr(tpu_compile, "compile_for", lambda *job: NOTHING._replace(cost=None, no_cost="of another format"))
    words = verb.tiny_flags(tmp_path, outline_only, train__batch=256)
    words += ["--slice=v5e:2x4", "--stage=4", "--jobs=train", "--cache=", f"--json={tmp_path / 'plan.json'}"]
    ended = verb.run("plan", *words, "--config.train.accumulation=4")
    assert ended.code == 0 and "8.00 of 15.75 GiB a chip" in ended.out and "fits, 7.75 free" in ended.out
    assert "time     unknown, because of another format" in ended.out and "1 jobs of unknown time" in ended.out
    ended = verb.run("plan", *words, "--search")
    assert ended.code == 1 and "accumulation=4 fits with 7.75 GiB free (was compiled too: its time is unknown)" in ended.out
    (job,) = json.loads((tmp_path / "plan.json").read_text())["jobs"]
    assert job["no_time"] == "of another format" and "seconds" not in job


READERS = ("captions", "coco", "images", "loader", "record_file", "record_plan", "records")
UNPLANNED = {  # files that perf/ imports without making a program from them -> why an edit of one voids no result
    "storage/": "files and locks, no jax",
    **dict.fromkeys((f"data/{name}.py" for name in READERS), "reads data, no jax; programs' shapes come from kinds"),
    "evaluation/classifier.py": "digits are judged on the host",
    "evaluation/fid.py": "features are judged in a program of their own, which is not planned",
    "evaluation/frechet.py": "a formula on the host",
    "evaluation/moments.py": "sums on the host",
    "evaluation/report.py": "tables and pages",
    "evaluation/page/": "the page of a run, no jax",
}


def reachable(*starts: str) -> set[str]:
    """Files of the package, by paths below it, that some of its files import, each way through others counted."""
    folder = estimate.PACKAGE.parent
    files, waiting = set(), [estimate.PACKAGE / start for start in starts]
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        for name in imports(path, ".".join(path.parent.relative_to(folder).parts)):
            both = [folder.joinpath(*name.split(".")[:cut]).with_suffix(".py") for cut in (None, -1)]
            waiting += [file for file in both if file.is_file() and file.is_relative_to(estimate.PACKAGE)]
    return {str(path.relative_to(estimate.PACKAGE)) for path in files}


def uncounted(patterns: tuple[str, ...]) -> set[str]:
    """Files that perf/ reaches, whose edit voids no kept result, and which are not excused."""
    counted = {str(path.relative_to(estimate.PACKAGE)) for pattern in patterns for path in estimate.PACKAGE.glob(pattern)}
    left = reachable("perf/jobs.py", "perf/estimate.py") - counted
    return {name for name in left if not name.startswith(tuple(UNPLANNED))}


def test_an_edit_of_any_file_that_makes_programs_voids_kept_results():
    assert uncounted(estimate.PROGRAMS) == set()
    assert len(reachable("perf/jobs.py", "perf/estimate.py")) > 60  # the walk sees the package
    without = tuple(pattern for pattern in estimate.PROGRAMS if "protocols" not in pattern and "kinds" not in pattern)
    assert uncounted(without) == {"evaluation/protocols.py", "data/kinds.py"}
    used = {start for start in UNPLANNED for name in reachable("perf/jobs.py") if name.startswith(start)}
    assert used == set(UNPLANNED)


def test_a_pattern_that_matches_no_file_is_an_error(monkeypatch):
    assert len(estimate._code()) == 64
    monkeypatch.setattr(estimate, "PROGRAMS", (*estimate.PROGRAMS, "no_such_room/*.py"))
    with pytest.raises(RunFailed, match=r"no_such_room/\*\.py in perf/estimate.py matches no file"):
        estimate._code()


def test_a_config_that_does_not_fit_says_by_how_much_and_which_change_does(tmp_path, outline_only, compiler):
    words = verb.tiny_flags(tmp_path, outline_only, train__batch=256)  # 32 images at once on a chip
    words += ["--slice=v5e:2x4", "--stage=4", "--jobs=train", f"--cache={tmp_path / 'c'}", f"--json={tmp_path / 'plan.json'}"]
    ended = verb.run("plan", *words)
    assert ended.code == 1 and "1 of 1 jobs do not fit v5e:2x4" in ended.err
    assert "DOES NOT FIT, 16.25 too many" in ended.out
    assert "--config.train.accumulation=4 fits with 7.75 GiB free" in ended.out
    (job,) = json.loads((tmp_path / "plan.json").read_text())["jobs"]
    assert compiler == [32, 8] == [job["at_once"], job["change"]["at_once"]]

    ended = verb.run("plan", *words, "--config.train.accumulation=4", "--search")
    assert ended.code == 0, ended.err
    assert "largest  8 images at once on a chip (7.75 GiB free): --config.train.accumulation=4" in ended.out
    assert compiler == [32, 8, 16]  # what had been compiled was read again; 16 images are too many


def test_fewer_images_at_once_come_first_and_those_without_hope_are_left_out(tmp_path, outline_only):
    config = verb.tiny_config(tmp_path, outline_only, train__batch=64)
    found = {"memory": {"total": 34, "temporaries": 32, "available": 16}}  # 8 images at once
    offered = list(make_it_fit.smaller(config, "train", 8, found))
    assert offered[0] == {"train.accumulation": 4}
    assert offered[2] == {"mesh.data": -1, "mesh.fsdp": -1}
    assert list(offered[-1]) == ["train.ema", "mesh.data", "mesh.fsdp", "train.accumulation"]
    assert list(make_it_fit.smaller(config, "pairs", 8, found)) == [{"pairs.batch": 8}]


@pytest.mark.parametrize(("temporaries", "images"), [(1, 64), (15, 8), (16, 4), (200, 1)])
def test_the_outlook_is_a_power_of_two_times_the_images_that_there_is_room_for(temporaries, images):
    found = {"at_once": 8, "memory": {"total": temporaries, "temporaries": temporaries, "available": 16}}
    assert make_it_fit.outlook(found) == images


def test_wrong_words_end_in_one_line(tmp_path, outline_only, compiler, monkeypatch):
    words = verb.tiny_flags(tmp_path, outline_only)
    for wrong, said in {
        "--slice=v5e:5x5": "--slice=v5e:5x5 is not a slice",
        "--stage=3": "--stage=3 is not a stage",
        "--json=/dev/null/plan.json": "--json=/dev/null/plan.json: the folder /dev/null can't be made",
        "--jobs=train,all": "--jobs='all' must be one of pairs, train, sample",
    }.items():
        ended = verb.run("plan", *words, wrong)
        assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install libtpu"):
        tpu_compile.prepare_compiler()


@pytest.mark.slow
def test_the_digits_compile_for_a_real_slice_and_their_memory_adds_up(caplog, tmp_path):
    """Minutes: libtpu's compiler, four v5e chips, the training step of the first stage."""
    pytest.importorskip("libtpu")
    tpu_compile.prepare_compiler()
    place = estimate.target("v5e:2x2", "")
    config = check_config.changed(get_config(), {"mesh.data": 1, "mesh.fsdp": 4})
    programs.keep_programs(str(tmp_path))
    with caplog.at_level("INFO"):
        found = estimate.estimate(config, place, estimate.opener(config, place), 8, "train")
    early = re.search(r"stage 8, train: at most (\S+) of 15\.75 GiB a chip, fits; the time", caplog.text)
    assert 2 > float(early[1]) > found["memory"]["total"] / 2**30 - 0.01
    assert list(tmp_path.glob("jit_step-*-cache"))  # the compiled program, for whoever has the TPU
    parts = {name: size for name, size in found["memory"].items() if name not in ("total", "available")}
    assert sum(parts.values()) == found["memory"]["total"] and min(parts.values()) >= 0
    weights = sum(math.prod(s.shape) for s in open.open_outline(config, jax.devices()[:4]).networks.denoiser.shapes.values())
    assert parts["state"] == pytest.approx(4 * 4 * weights / 4, rel=0.1)  # weights, average, two moments, over four chips
    assert found["fits"] and 0 < found["utilisation"] < 1 and found["not_estimated"] == {}
    assert found["unscheduled_seconds"] == 0 < found["scheduled_seconds"] < found["seconds"]
