"""Laws of models/bounds/hlo.py, on programs compiled here for eight CPU devices and on text as a TPU's compiler writes it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from models.bounds import hlo
from models.bounds.hlo import Shape
from models.sharding import TRAIN, make_mesh, spec

WHOLE = spec("..", TRAIN)
FLOAT = 4  # bytes


def compile_module(function, *sizes: tuple[int, ...], tp: int = 8, donate: tuple[int, ...] = ()) -> hlo.Module:
    """`function` of float32 arrays of these sizes, rows cut over eight devices."""
    mesh = make_mesh(tp)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, spec("B.", TRAIN))
        arrays = [jax.ShapeDtypeStruct(size, jnp.float32, sharding=rows) for size in sizes]
        return hlo.parse(jax.jit(function, donate_argnums=donate).lower(*arrays).compile().as_text())


def multiply_whole(x):  # BB -> BB, x gathered
    return jnp.tanh(x @ jax.sharding.reshard(x, WHOLE))


def test_a_collective_in_a_loop_counts_once_a_trip():
    def function(x):
        return lax.scan(lambda x, _: (multiply_whole(x), None), x, None, length=5)[0]

    module = compile_module(function, (16, 16))
    (loop,) = hlo.loops(module)
    assert loop.trips == 5 and hlo.open_loops(module) == []
    (collective,) = hlo.collectives(module)
    assert (collective.kind, collective.group, collective.times) == ("all-gather", 8, 5)
    assert collective.shapes == (Shape("f32", (16, 16)),)
    assert collective.bytes == 5 * 7 / 8 * 16 * 16 * FLOAT


def test_an_open_loop_counts_as_one_trip_and_its_inner_loop_as_all_of_its_own():
    def inner(x):
        return lax.fori_loop(0, 3, lambda _, x: multiply_whole(x), x)

    def function(x):
        return lax.while_loop(lambda c: (c[0] < 10) & jnp.any(c[1] > 0), lambda c: (c[0] + 1, inner(c[1])), (0, x))

    module = compile_module(function, (16, 16))
    outer, within = hlo.loops(module)
    assert (outer.trips, within.trips) == (None, 3)
    assert hlo.open_loops(module) == [outer]
    assert hlo.loops(module, outer.body) == [within]
    (gathered,) = hlo.collectives(module, outer.body)
    assert (gathered.kind, gathered.times) == ("all-gather", 3)
    (ended,) = hlo.collectives(module, outer.condition)
    assert ended.kind == "all-reduce" and ended.times == 1
    assert {c.kind for c in hlo.collectives(module)} == {"all-gather", "all-reduce"}


@pytest.mark.parametrize(
    ("kind", "run", "received"),
    [
        ("all-reduce", lambda x: lax.psum(x, "tp"), 2 * 3 / 4),
        ("all-gather", lambda x: lax.all_gather(x, "tp", axis=0, tiled=True), 3),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True), 3 / 4),
        ("all-to-all", lambda x: lax.all_to_all(x, "tp", 1, 1, tiled=True), 3 / 4),
        ("collective-permute", lambda x: lax.ppermute(x, "tp", [(i, (i + 1) % 4) for i in range(4)]), 1),
    ],
)
def test_bytes_received_by_each_collective(kind, run, received):
    """In groups of four, of an operand of 2 x 64 numbers a device; `received` in operands."""

    def function(x):
        placed = spec("B.", TRAIN)
        return jax.shard_map(lambda x: x + jnp.sin(run(x)).sum(), in_specs=placed, out_specs=placed, check_vma=False)(x)

    module = compile_module(function, (16, 64), tp=4)
    (collective,) = hlo.collectives(module)
    assert collective.kind == kind
    assert collective.bytes == received * 2 * 64 * FLOAT
    assert module.devices == 8


def test_a_program_of_one_device_has_no_collective():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        module = hlo.parse(jax.jit(multiply_whole).lower(jnp.ones((4, 4))).compile().as_text())
    assert hlo.collectives(module) == [] and module.aliases == {}


def test_donated_inputs_are_reused():
    module = compile_module(lambda x, y: (x + y, y.sum()), (16, 8), (16, 8), donate=(0,))
    assert module.aliases == {(0,): 0}


TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter (p: f32[64,32]) -> f32[8,32] {
  %p = f32[64,32]{1,0:T(8,128)} parameter(0)
  %reduced = f32[64,32]{1,0:T(8,128)} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %part = f32[8,32]{1,0:T(8,128)} dynamic-slice(%reduced, %id, %id), dynamic_slice_sizes={8,32}
}

%chain.1 (q: bf16[1,8,256]) -> bf16[1,64,256] {
  %q = bf16[1,8,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[1,64,256]{2,1,0} all-gather(%q), channel_id=3, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, \
dimensions={1}, frontend_attributes={chain_id="0"}
}

%chain.2 (r: bf16[1,8,256]) -> bf16[1,64,256] {
  %r = bf16[1,8,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.2 = bf16[1,64,256]{2,1,0} all-gather(%r), channel_id=3, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, \
dimensions={1}, frontend_attributes={chain_id="0"}
}

%relayout (s: f32[64,32], i: s32[]) -> f32[32,64] {
  %s = f32[64,32]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %turned = f32[32,64]{1,0:T(8,128)} transpose(%s), dimensions={1,0}
}

%body (carry: (s32[], bf16[1,8,256], f32[64,32])) -> (s32[], bf16[1,8,256], f32[64,32]) {
  %carry = (s32[]{:T(128)}, bf16[1,8,256]{2,1,0}, /*index=2*/f32[64,32]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%count, %two)
  %shard = bf16[1,8,256]{2,1,0} get-tuple-element(%carry), index=1
  %start = bf16[1,64,256]{2,1,0} fusion(%shard), kind=kOutput, calls=%chain.1
  %done = bf16[1,64,256]{2,1,0} fusion(%shard), kind=kOutput, calls=%chain.2
  %full = f32[64,32]{1,0} get-tuple-element(%carry), index=2
  %scattered = f32[8,32]{1,0} fusion(%full), kind=kCustom, calls=%all-reduce-scatter
  %other = f32[32,64]{1,0:T(8,128)} fusion(%full, %count), kind=kLoop, calls=%relayout
  %near = (f32[64,32]{1,0:T(8,128)S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) copy-start(%full)
  %copied = f32[64,32]{0,1:T(8,128)} copy(%full)
  %fast = f32[64,32]{1,0:T(8,128)S(1)} copy(%full)
  %pair = (bf16[1,8,256]{2,1,0}, bf16[1,8,256]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%shard), \
channel_id=4, source_target_pairs={{0,1},{1,0}}
  %arrived = bf16[1,8,256]{2,1,0} collective-permute-done(%pair)
  ROOT %out = (s32[]{:T(128)}, bf16[1,8,256]{2,1,0}, f32[64,32]{1,0}) tuple(%next, %arrived, %copied)
}

%condition (carry.1: (s32[], bf16[1,8,256], f32[64,32])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[1,8,256]{2,1,0}, f32[64,32]{1,0}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %limit = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

ENTRY %main (x: bf16[1,8,256], y: f32[64,32]) -> f32[64,32] {
  %x = bf16[1,8,256]{2,1,0} parameter(0)
  %y = f32[64,32]{1,0} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %init = (s32[]{:T(128)}, bf16[1,8,256]{2,1,0}, f32[64,32]{1,0}) tuple(%first, %x, %y)
  %loop = (s32[]{:T(128)}, bf16[1,8,256]{2,1,0}, f32[64,32]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[64,32]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_a_loop_that_the_compiler_left_uncounted_is_counted():
    """for (i = 1; i < 8; i += 2): 1, 3, 5, 7."""
    (loop,) = hlo.loops(hlo.parse(TPU))
    assert loop == hlo.Loop("body", "condition", 4)
    (loop,) = hlo.loops(hlo.parse(TPU.replace("direction=LT", "direction=NE")))
    assert loop.trips is None


def test_a_gather_in_a_chain_of_fusions_counts_once_and_a_reduce_that_is_only_sliced_is_a_scatter():
    found = {c.kind: c for c in hlo.collectives(hlo.parse(TPU))}
    assert len(hlo.collectives(hlo.parse(TPU))) == len(found) == 3
    assert found["all-gather"].bytes == 4 * 7 * 8 * 256 * 2
    assert found["all-gather"].shapes == (Shape("bf16", (1, 64, 256)),)
    assert found["reduce-scatter"].bytes == 4 * 7 / 8 * 64 * 32 * FLOAT
    assert found["collective-permute"].bytes == 4 * 8 * 256 * 2
    kept = TPU.replace("dynamic-slice(%reduced, %id, %id)", "negate(%reduced)")
    assert "all-reduce" in {c.kind for c in hlo.collectives(hlo.parse(kept))}


def test_copies_are_those_from_main_memory_to_main_memory():
    """Not those into VMEM, S(1); a fusion that only turns its operand is one."""
    module, size = hlo.parse(TPU), 64 * 32 * FLOAT
    found = hlo.copies(module, "body", least=size)
    assert [(operation.name, times) for operation, times in found] == [("other", 1), ("copied", 1)]
    assert hlo.copied_bytes(found) == 2 * size
    assert hlo.copied_bytes(hlo.copies(module, module.entry, least=size)) == 4 * 2 * size
    assert hlo.copies(module, "body", least=size + 1) == []


def test_a_fusion_writes_all_of_its_results_and_an_asynchronous_copy_one():
    """The result of `copy-start` names its operand too, and a flag."""
    lines = (
        "%both = (f32[64,32]{1,0}, f32[64,32]{1,0}) fusion(%x), kind=kLoop, calls=%moves",
        "%start = (f32[64,32]{1,0}, f32[64,32]{1,0}, u32[]) copy-start(%x)",
    )
    both, start = (hlo.parse_operation(line) for line in lines)
    assert both and start and hlo.copied_bytes([(both, 3), (start, 5)]) == (3 * 2 + 5) * 64 * 32 * FLOAT


CYCLES = """HloModule jit_step, is_scheduled=true, num_partitions=8

%inner (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %part = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%innermost, backend_config={"estimated_cycles":"70000"}
}

%innermost (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %turned = f32[8,128]{1,0:T(8,128)} copy(%q), backend_config={"flag_configs":[],"estimated_cycles":"900000"}
}

%reduce.async (r: f32[8,128]) -> f32[1,128] {
  %r = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %scattered = f32[1,128]{1,0} reduce-scatter(%r), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%body (carry: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %carry = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%count, %one)
  %x = f32[8,128]{1,0} get-tuple-element(%carry), index=1
  %y = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%inner, metadata={op_name="jit(step)/mul"}, \
backend_config={"flag_configs":[],"estimated_cycles":"1000","iteration_bounds":[]}
  %near = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%y)
  %near.done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%near)
  %among = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near.done)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0}) tuple(%next, %y)
}

%condition (carry.1: (s32[], f32[8,128])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,128]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0}) while(%init), condition=%condition, body=%body
  %result = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  %away = (f32[8,128]{1,0}, f32[8,128]{0,1}, u32[]{:S(2)}) copy-start(%result)
  %away.done = f32[8,128]{1,0} copy-done(%away)
  %cut = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%away.done), slice={[0:2], [0:128]}
  %cut.done = f32[2,128]{1,0:S(1)} slice-done(%cut)
  %put = ((f32[8,128]{1,0}, f32[2,128]{1,0:S(1)}, s32[], s32[]), f32[8,128]{1,0}, u32[]{:S(2)}) \
dynamic-update-slice-start(%away.done, %cut.done, %zero, %zero)
  %sent = ((f32[8,128]{1,0}), f32[1,128]{1,0}, u32[]{:S(2)}) async-start(%result), calls=%reduce.async
  ROOT %last = f32[8,128]{1,0} copy(%result), backend_config={"estimated_cycles":"300"}
}
"""


def total_cycles(module: hlo.Module, *computations: str) -> int:
    return sum(cost.cycles * cost.times for cost in hlo.costs(module, *computations))


def test_cycles_are_those_of_fusions_times_trips_and_not_again_of_what_they_contain():
    module = hlo.parse(CYCLES)
    assert [(cost.label, cost.cycles, cost.times) for cost in hlo.costs(module)] == [
        ("jit(step)/mul", 1000, 5),
        ("last", 300, 1),
    ]
    assert total_cycles(module) == 5 * 1000 + 300
    assert total_cycles(module, "condition", "body") == 1000
    assert hlo.costs(hlo.parse(TPU)) == []  # as a CPU's compiler, which writes none


def test_an_open_loop_runs_as_often_as_the_caller_says():
    module = hlo.parse(CYCLES.replace("direction=LT", "direction=NE"))
    assert total_cycles(module) == 1000 + 300
    assert total_cycles(replace(module, trips={"body": 7})) == 7 * 1000 + 300
    assert total_cycles(replace(hlo.parse(CYCLES), trips={"body": 7})) == 5 * 1000 + 300  # it counts its own trips


SWITCH = """HloModule jit_step, is_scheduled=true, num_partitions=1

%first (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %narrow = f32[8,128]{1,0} fusion(%p), kind=kLoop, calls=%sum, backend_config={"estimated_cycles":"100"}
}

%second (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %wide = f32[8,128]{1,0} fusion(%q), kind=kLoop, calls=%sum, backend_config={"estimated_cycles":"700"}
}

%sum (r: f32[8,128]) -> f32[8,128] {
  %r = f32[8,128]{1,0} parameter(0)
  ROOT %twice = f32[8,128]{1,0} add(%r, %r)
}

ENTRY %main (x: f32[8,128], i: s32[]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %chosen = f32[8,128]{1,0} conditional(%i, %x, %x), branch_computations={%first, %second}
}
"""


def test_of_a_switch_the_branch_counts_that_the_caller_names():
    module = hlo.parse(SWITCH)
    found = {branch: total_cycles(replace(module, branch=branch)) for branch in (None, 0, 1, 2)}
    assert found == {None: 800, 0: 100, 1: 700, 2: 700}  # it has two: a later one is its last


def test_asynchronous_copies_count_once_into_vmem_and_twice_within_hbm():
    """Five copies into VMEM, one within HBM, a slice of two rows into VMEM and back; not within VMEM, and no collective."""
    row = 128 * FLOAT
    assert hlo.moved_bytes(hlo.parse(CYCLES)) == 5 * 8 * row + 2 * 8 * row + 2 * row + 2 * row
    assert hlo.moved_bytes(hlo.parse(CYCLES), "body") == 8 * row
    (collective,) = hlo.collectives(hlo.parse(CYCLES))
    assert collective.bytes == 7 / 8 * 8 * row


def test_the_outermost_loops_contain_no_other():
    def inner(x):
        return lax.while_loop(lambda x: jnp.any(x > 1), jnp.sin, x)

    def function(x):
        return lax.while_loop(lambda x: jnp.any(x > 0), inner, lax.while_loop(lambda x: jnp.any(x > 2), jnp.cos, x))

    found = hlo.open_loops(module := compile_module(function, (8, 8)))
    assert len(found) == 3 and hlo.outermost(module, found) == found[:2]


def test_bytes_of_a_shape():
    assert Shape("bf16", (3, 5)).bytes == 30 and Shape("pred", (7,)).bytes == 7 and Shape("s4", (3,)).bytes == 2
    assert Shape("f8e4m3fn", (4,)).bytes == 4 and Shape("f32", ()).bytes == 4 and Shape("token", ()).bytes == 0


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups={}", 8),
    ],
)
def test_groups_are_read_in_every_spelling(groups, size):
    operation = hlo.parse_operation(f"  %r = f32[2]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add")
    assert operation and hlo.group_size(operation, devices=8) == size


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")
