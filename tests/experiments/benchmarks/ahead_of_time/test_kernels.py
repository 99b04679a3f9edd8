import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.ahead_of_time.costs import costs
from experiments.benchmarks.ahead_of_time.kernels import kernels
from experiments.benchmarks.ahead_of_time.targets import gpu, tpu

LOOP = """
%fused_dot (p0: f32[64,64], p1: f32[5,64,64], p2: s32[]) -> f32[64,64] {
  %p0 = f32[64,64]{1,0} parameter(0)
  %p1 = f32[5,64,64]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64,64]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %matrix = f32[64,64]{1,0} bitcast(%row)
  %dot = f32[64,64]{1,0} dot(%p0, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tanh = f32[64,64]{1,0} tanh(%dot)
}

%body (state: (s32[])) -> (s32[]) {
  %state = (s32[], f32[64,64]{1,0}, f32[5,64,64]{2,1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64,64]{1,0} get-tuple-element(%state), index=1
  %w = f32[5,64,64]{2,1,0} get-tuple-element(%state), index=2
  %limit = s32[] get-tuple-element(%state), index=3
  %one = s32[] constant(1)
  %copied = s32[] bitcast(%i)
  %next = s32[] add(%copied, %one)
  %y = f32[64,64]{1,0} fusion(%x, %w, %i), kind=kOutput, calls=%fused_dot, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  ROOT %out = (s32[], f32[64,64]{1,0}, f32[5,64,64]{2,1,0}, s32[]) tuple(%next, %y, %w, %limit)
}

%condition (state.1: (s32[])) -> pred[] {
  %state.1 = (s32[], f32[64,64]{1,0}, f32[5,64,64]{2,1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  LIMIT
  ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (a: f32[64,64], ws: f32[5,64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  %ws = f32[5,64,64]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %five = s32[] constant(5)
  %tuple = (s32[], f32[64,64]{1,0}, f32[5,64,64]{2,1,0}, s32[]) tuple(%start, %a, %ws, %five)
  %while = (s32[], f32[64,64]{1,0}, f32[5,64,64]{2,1,0}, s32[]) while(%tuple), \
condition=%condition, body=%body
  ROOT %result = f32[64,64]{1,0} get-tuple-element(%while), index=1
}
"""
LIMITS = {
    "a constant": "%limit.1 = s32[] constant(5)",
    "in the state": "%limit.1 = s32[] get-tuple-element(%state.1), index=3",
}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_what_a_loop_holds_counts_as_often_as_it_runs(limit):
    found = {kernel.name: kernel for kernel in kernels(LOOP.replace("LIMIT", limit))}
    assert set(found) == {"next", "y", "less"}  # tuples, their elements and bitcasts are free
    assert found["y"].runs == 5
    assert found["y"].products == {"float32": 2 * 64**3}
    assert found["y"].elementwise == 64**2
    # Of the five matrices a run reads the one that it slices.
    assert found["y"].memory_bytes == 3 * 4 * 64**2 + 4
    total = costs(list(found.values()), tpu("v5e:1x1"))
    assert total.flops == 5 * (2 * 64**3 + 64**2)
    assert (total.seconds - total.modelled_seconds) * 1.5e9 == pytest.approx(5 * 1000)


def test_a_loop_whose_trips_are_unknown_raises():
    limit = "%limit.1 = s32[] custom-call(%i.1)"
    with pytest.raises(ValueError, match=r"trips of loop while are not constants"):
        kernels(LOOP.replace("LIMIT", limit))


def test_the_trips_that_the_compiler_knows_are_believed():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    found = kernels(
        LOOP.replace("LIMIT", LIMITS["a constant"]).replace("body=%body\n", known + "\n")
    )
    assert {kernel.runs for kernel in found} == {7}


def test_padding_of_tiles_and_memory_beside_the_units_are_told_apart():
    (kernel,) = kernels("""
ENTRY %main (a: f32[10,1]) -> f32[10,1] {
  %a = f32[10,1]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[10,1]{1,0:T(8,128)S(1)} negate(%a)
}""")
    assert (kernel.memory_bytes, kernel.nearby_bytes, kernel.flops) == (8192, 8192, 10)


def test_what_a_nested_fusion_passes_on_is_read():
    (kernel,) = kernels("""
%view (q: f32[4,8]) -> f32[32] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %flat = f32[32]{0} bitcast(%q)
}

%fused (p: f32[4,8]) -> f32[32] {
  %p = f32[4,8]{1,0} parameter(0)
  %v = f32[32]{0} fusion(%p), kind=kLoop, calls=%view
  ROOT %n = f32[32]{0} negate(%v)
}

ENTRY %main (a: f32[4,8]) -> f32[32] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %f = f32[32]{0} fusion(%a), kind=kLoop, calls=%fused
}""")
    assert kernel.memory_bytes == 2 * 128


def test_a_fusion_that_updates_in_place_writes_the_update_alone():
    (kernel,) = kernels("""
%fused (p0: f32[100,32], p1: f32[1,32], p2: s32[]) -> f32[100,32] {
  %p0 = f32[100,32]{1,0} parameter(0)
  %p1 = f32[1,32]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[100,32]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

ENTRY %main (a: f32[100,32], b: f32[1,32], i: s32[]) -> f32[100,32] {
  %a = f32[100,32]{1,0} parameter(0)
  %b = f32[1,32]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[100,32]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%fused
}""")
    assert kernel.memory_bytes == 128 + 128 + 4


def test_collectives_are_counted_by_kind():
    found = kernels("""
%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%p), to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %mine = f32[16]{0} dynamic-slice(%r, %zero), dynamic_slice_sizes={16}
}

ENTRY %main (a: f32[64], b: bf16[8]) -> f32[16] {
  %a = f32[64]{0} parameter(0)
  %b = bf16[8]{0} parameter(1)
  %g = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%b), dimensions={0}
  %gathered = bf16[32]{0} all-gather-done(%g)
  %reduced = f32[64]{0} all-reduce(%a), channel_id=1, to_apply=%sum
  %again = f32[64]{0} all-reduce(%reduced), channel_id=1, to_apply=%sum
  %scattered = f32[16]{0} reduce-scatter(%a), dimensions={0}, to_apply=%sum
  ROOT %fused = f32[16]{0} fusion(%again), kind=kCustom, calls=%all-reduce-scatter.1
}""")
    total = costs(found, tpu("v5e:2x2"))
    assert total.collective_bytes == {
        "all-gather": 64,
        "all-reduce": 2 * 256,
        "reduce-scatter": 256 + 256,
    }


def test_a_collective_spread_over_fusions_counts_once_and_their_products_take_their_time():
    found = kernels("""
%part (p: bf16[8], q: f32[4,4]) -> (bf16[32], f32[4,4]) {
  %p = bf16[8]{0} parameter(0)
  %q = f32[4,4]{1,0} parameter(1)
  %g = bf16[32]{0} all-gather(%p), channel_id=3, dimensions={0}, \
frontend_attributes={chain_id="1"}
  %d = f32[4,4]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (bf16[32]{0}, f32[4,4]{1,0}) tuple(%g, %d)
}

ENTRY %main (a: bf16[8], b: f32[4,4]) -> f32[4,4] {
  %a = bf16[8]{0} parameter(0)
  %b = f32[4,4]{1,0} parameter(1)
  %f = (bf16[32]{0}, f32[4,4]{1,0}) fusion(%a, %b), kind=kCustom, calls=%part, \
backend_config={"estimated_cycles":"70"}
  %c = f32[4,4]{1,0} get-tuple-element(%f), index=1
  %h = (bf16[32]{0}, f32[4,4]{1,0}) fusion(%a, %c), kind=kCustom, calls=%part, \
backend_config={"estimated_cycles":"80"}
  ROOT %e = f32[4,4]{1,0} get-tuple-element(%h), index=1
}""")
    total = costs(found, tpu("v5e:2x2"))
    assert total.collective_bytes == {"all-gather": 64}
    assert total.seconds * 1.5e9 == pytest.approx(150)
    assert total.memory_bytes == 2 * 2 * 64  # what the products read and write


@pytest.mark.parametrize(
    ("attributes", "image", "kernel", "result", "products"),
    [
        # Three by three taps of four features, a border of zeros around eight by eight.
        (
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            "2,8,8,4", "3,3,4,5", "2,8,8,5", 2 * 5 * 4 * 22**2,
        ),
        # A batched product as a TPU writes it: a window as long as the batch, dilated.
        (
            "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            "6,7,8", "6,8,9", "6,7,9", 6 * 7 * 8 * 9,
        ),
    ],
)  # fmt: skip
def test_a_convolution_costs_the_products_that_are_not_with_zeros(
    attributes, image, kernel, result, products
):
    (found,) = kernels(f"""
ENTRY %main (a: f32[{image}], b: f32[{kernel}]) -> f32[{result}] {{
  %a = f32[{image}] parameter(0)
  %b = f32[{kernel}] parameter(1)
  ROOT %c = f32[{result}] convolution(%a, %b), {attributes}
}}""")
    assert found.flops == 2 * products


def test_a_compiled_scan_costs_its_length_times_its_body():
    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]

    shapes = jax.ShapeDtypeStruct((32, 48), "float32"), jax.ShapeDtypeStruct((6, 48, 48), "float32")
    found = kernels(jax.jit(scanned).lower(*shapes).compile().as_text())
    total = costs(found, gpu("h100"))
    products = sum(k.runs * sum(k.products.values()) for k in found)
    assert products == 6 * 2 * 32 * 48 * 48
    assert products <= total.flops < 1.1 * products


def test_a_gpu_kernel_takes_its_launch_and_the_longer_of_moving_and_computing():
    (kernel,) = kernels("""
ENTRY %main (a: f32[1024,1024], b: f32[1024,1024]) -> f32[1024,1024] {
  %a = f32[1024,1024]{1,0} parameter(0)
  %b = f32[1024,1024]{1,0} parameter(1)
  ROOT %c = f32[1024,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, operand_precision={highest,highest}
}""")
    assert kernel.products == {"float32-highest": 2 * 1024**3}
    assert costs([kernel], gpu("h100")).seconds == pytest.approx(2e-6 + 2 * 1024**3 / 67e12)
    cheap = kernel._replace(products={"bfloat16": 1})
    assert costs([cheap], gpu("h100")).seconds == pytest.approx(2e-6 + 12 * 2**20 / 3.35e12)


def test_a_pallas_kernel_costs_what_it_says_of_itself():
    (kernel,) = kernels(
        """
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %b = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"elementwise":"300",
"memory":"9000",
"products":"70"
}}, metadata={op_name="jit(f)/kernel"}
}"""
    )
    assert kernel.products == {"float32": 70}
    assert kernel.elementwise == 300
    assert (kernel.memory_bytes, kernel.nearby_bytes) == (9000 - 4096, 4096)
    assert kernel.estimated_cycles is None
