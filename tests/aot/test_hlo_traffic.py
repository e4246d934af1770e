"""What a loop launches and moves, against the same counted by hand."""

import pytest

from esolm_jax.aot import chips, hlo_traffic
from esolm_jax.aot.hlo_traffic import Launch

LOOP = """HloModule jit_loop, is_scheduled=true

%slice_and_add (table: f32[100,8], at: s32[], h: f32[8]) -> f32[8] {
  %table = f32[100,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %h = f32[8]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%table, %at, %zero), dynamic_slice_sizes={1,8}
  %flat = f32[8]{0} bitcast(%row)
  ROOT %sum = f32[8]{0} add(%flat, %h)
}

%put (cache: f32[100,8], new: f32[8], at: s32[]) -> f32[100,8] {
  %cache = f32[100,8]{1,0} parameter(0)
  %new = f32[8]{0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %wide = f32[1,8]{1,0} bitcast(%new)
  ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%cache, %wide, %at, %zero)
}

%dear (h: f32[8]) -> f32[8] {
  %h = f32[8]{0} parameter(0)
  %a = f32[8]{0} copy(%h)
  ROOT %b = f32[8]{0} copy(%a)
}

%cheap (h: f32[8]) -> f32[8] {
  ROOT %h = f32[8]{0} parameter(0)
}

%body (state: (s32[], f32[100,8], f32[8], f32[100,8])) -> (s32[], f32[100,8], f32[8], f32[100,8]) {
  %state = (s32[], f32[100,8]{1,0}, f32[8]{0}, f32[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[100,8]{1,0} get-tuple-element(%state), index=1
  %h = f32[8]{0} get-tuple-element(%state), index=2
  %cache = f32[100,8]{1,0} get-tuple-element(%state), index=3
  %next = f32[8]{0} fusion(%table, %i, %h), kind=kLoop, calls=%slice_and_add
  %kernel = f32[8]{0} custom-call(%next, %cache), custom_call_target="some_kernel", metadata={op_name="jit(loop)/while/body/attention/pallas_call"}
  %chosen = f32[8]{0} conditional(%i, %kernel, %kernel), branch_computations={%dear, %cheap}
  %written = f32[100,8]{1,0} fusion(%cache, %chosen, %i), kind=kLoop, calls=%put
  %told = (f32[8]{0}, token[]) outfeed(%chosen)
  ROOT %out = (s32[], f32[100,8]{1,0}, f32[8]{0}, f32[100,8]{1,0}) tuple(%i, %table, %chosen, %written)
}

%condition (state: (s32[], f32[100,8], f32[8], f32[100,8])) -> pred[] {
  %state = (s32[], f32[100,8]{1,0}, f32[8]{0}, f32[100,8]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[100,8], f32[8], f32[100,8])) -> (s32[], f32[100,8], f32[8], f32[100,8]) {
  %start = (s32[], f32[100,8]{1,0}, f32[8]{0}, f32[100,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[100,8]{1,0}, f32[8]{0}, f32[100,8]{1,0}) while(%start), condition=%condition, body=%body
}
"""  # noqa: E501
ROW, TABLE, INDEX = 8 * 4, 100 * 8 * 4, 4


def sizes_of(text: str, *options) -> dict[str, float]:
    """Bytes of each kernel of the largest loop."""
    return {k.name: k.bytes for k in hlo_traffic.largest_loop(text, *options).launches}


def test_one_iteration():
    found = hlo_traffic.largest_loop(LOOP)
    assert (found.conditionals, found.host_transfers) == (1, 1)
    assert found.kernels == 3 + 2 + 1  # the dearest branch has two, and the outfeed counts
    sizes = {kernel.name: kernel.bytes for kernel in found.launches}
    assert sizes["next"] == ROW + INDEX + ROW + ROW  # one row of the table, not the table
    assert sizes["kernel"] == ROW + TABLE + ROW
    assert sizes["written"] == ROW + INDEX + ROW  # in place: only what is written
    assert found.bytes == sum(sizes.values())


def test_bytes_of_a_kernel_that_reads_a_part():
    def half(operands):
        assert [shape.sizes for shape in operands] == [(8,), (100, 8)]
        return TABLE / 2

    assert sizes_of(LOOP, {"attention": half})["kernel"] == TABLE / 2


def test_tiles_and_on_chip_arrays_of_a_tpu():
    tiled = LOOP.replace("%a = f32[8]{0} copy", "%a = f32[8]{0:T(128)S(1)} copy")
    tiled = tiled.replace("%h = f32[8]{0} get-tuple", "%h = f32[8]{0:T(128)} get-tuple")
    before, found = sizes_of(LOOP), sizes_of(tiled)
    assert before["a"] - found["a"] == ROW  # its result stays on the chip
    assert found["next"] - before["next"] == 128 * 4 - ROW  # a padded tile


def test_a_program_with_its_loop_and_the_usual_branch():
    one = hlo_traffic.largest_loop(LOOP)
    assert hlo_traffic.program(LOOP).bytes == one.bytes  # its trip count is unknown
    found = hlo_traffic.program(LOOP, trip_counts={"loop": 2.5}, branches={"chosen": 1})
    copies = 2 * 2 * ROW  # of the dearest branch
    assert found.kernels == 2.5 * (one.kernels - 2)
    assert found.bytes == 2.5 * (one.bytes - copies)


def test_slices_and_updates_in_a_fusion_of_a_fusion():
    """The compiler for TPUs fuses fusions: what the inner one reads and writes counts."""

    def wrap(text, name, parameters, calls):
        inner = f"%inner_{name}"
        text = text.replace(f"%{name} (", f"{inner} (")
        names = ", ".join(f"%{p}" for p in parameters)
        lines = [
            f"  %{p} = {kind} parameter({n})" for n, (p, kind) in enumerate(parameters.items())
        ]
        root = f"  ROOT %r = {calls} fusion({names}), kind=kLoop, calls={inner}"
        outer = "\n".join([f"%{name} () -> {calls} {{", *lines, root, "}"])
        return text.replace("%dear (", f"{outer}\n\n%dear (", 1)

    table, row, index = "f32[100,8]{1,0}", "f32[8]{0}", "s32[]"
    nested = wrap(LOOP, "slice_and_add", {"table": table, "at": index, "h": row}, row)
    nested = wrap(nested, "put", {"cache": table, "new": row, "at": index}, table)
    assert nested.count("calls=%inner_") == 2
    assert hlo_traffic.largest_loop(nested) == hlo_traffic.largest_loop(LOOP)


def test_a_view_that_leaves_a_fusion_of_a_fusion():
    """The compiler for TPUs fuses a bitcast of weights, alone, into the product that reads them."""
    view = "\n".join(
        [
            "%view (table: f32[100,8]) -> f32[800] {",
            "  %table = f32[100,8]{1,0} parameter(0)",
            "  ROOT %flat = f32[800]{0} bitcast(%table)",
            "}",
            "",
            "%slice_and_add (table: f32[100,8], at: s32[], h: f32[8]) -> f32[8] {",
            "  %table = f32[100,8]{1,0} parameter(0)",
            "  %at = s32[] parameter(1)",
            "  %h = f32[8]{0} parameter(2)",
            "  %seen = f32[800]{0} fusion(%table), kind=kLoop, calls=%view",
            "  ROOT %sum = f32[8]{0} dot(%h, %seen)",
            "}",
        ]
    )
    start, stop = LOOP.index("%slice_and_add ("), LOOP.index("%put (")
    assert sizes_of(f"{LOOP[:start]}{view}\n\n{LOOP[stop:]}")["next"] == TABLE + ROW + ROW


def test_seconds_of_kernels_one_after_another():
    """Each takes the longer of its FLOPs and bytes; an asynchronous copy overlaps with others."""
    chip = chips.Chip("gpu", 1.0, flops=2.0, hbm_bandwidth=10.0, link_bandwidth=1.0)
    bound_by_flops = Launch("product", bytes=50.0, flops=20.0)
    bound_by_bytes = Launch("norm", bytes=30.0)
    fetched = Launch("copy", bytes=60.0, is_prefetch=True)
    two = hlo_traffic.Traffic(launches=(bound_by_flops, bound_by_bytes)).times(2)
    assert two.seconds(chip) == 2 * (10 + 3)
    assert (two + hlo_traffic.Traffic(launches=(fetched,))).seconds(chip) == 26
    often = hlo_traffic.Traffic(launches=(fetched,)).times(10)
    assert (two + often).seconds(chip) == 16 + 60


def test_flops_of_kernels():
    text = LOOP.replace("%sum = f32[8]{0} add(%flat, %h)", "%sum = f32[8]{0} dot(%flat, %h)")
    text = text.replace('"some_kernel"', '"tpu_custom_call"')
    found = hlo_traffic.program(text, trip_counts={"loop": 3}, kernel_flops={"kernel": 7.0})
    flops = {kernel.name: kernel.flops for kernel in found.launches}
    assert flops["kernel"] == 3 * 7 and flops["next"] == 3 * 2 * 8 and flops["written"] == 0


def test_text_without_a_loop():
    with pytest.raises(ValueError, match="must have a loop"):
        hlo_traffic.largest_loop(LOOP.replace(" while(%start)", " custom-call(%start)"))


def test_several_reductions_in_a_tuple_of_results():
    """A fusion may return a tuple inside a tuple; the parser lists the shapes of both in order."""
    text = """HloModule jit_f, is_scheduled=true

%pairs (a: f32[], b: f32[], c: f32[], d: f32[]) -> (f32[], f32[]) {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  %c = f32[] parameter(2)
  %d = f32[] parameter(3)
  ROOT %r = (f32[], f32[]) tuple(%a, %b)
}

%fused (x: f32[64,32]) -> ((f32[64], f32[64]), f32[64,32]) {
  %x = f32[64,32]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %twice = f32[64,32]{1,0} add(%x, %x)
  %both = (f32[64]{0}, f32[64]{0}) reduce(%x, %twice, %zero, %zero), dimensions={1}, to_apply=%pairs
  ROOT %out = ((f32[64]{0}, f32[64]{0}), f32[64,32]{1,0}) tuple(%both, %twice)
}

ENTRY %main (x: f32[64,32]) -> ((f32[64], f32[64]), f32[64,32]) {
  %x = f32[64,32]{1,0} parameter(0)
  ROOT %f = ((f32[64]{0}, f32[64]{0}), f32[64,32]{1,0}) fusion(%x), kind=kInput, calls=%fused
}
"""
    assert hlo_traffic.program(text).bytes == 4 * (64 * 32 + 2 * 64 + 64 * 32)
