import pytest

from ppflow_jax.cost.collectives import collectives

# Three devices on one ring, in the notations of the CPU, GPU and TPU compilers.
PROGRAM = """HloModule jit_step

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %gather = f32[12]{0} all-gather(%x), channel_id=1, replica_groups=[1,3]<=[3], dimensions={0}, \
metadata={op_name="jit(step)/while/body/weights"}
  %scatter = bf16[4]{0} reduce-scatter(%gather), channel_id=2, replica_groups={{0,1,2}}
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %x)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]{0}) parameter(0)
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%part (r: f32[4]) -> f32[4] {
  %r = f32[4]{0} parameter(0)
  ROOT %sum.1 = f32[4]{0} all-reduce(%r), channel_id=3, replica_groups=mesh['a'=1,'b'=3] {'b'}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %loop = (s32[], f32[4]{0}) while(%a), condition=%condition, body=%body
  %one = f32[4]{0} fusion(%a), kind=kCustom, calls=%part
  %two = f32[4]{0} fusion(%a), kind=kCustom, calls=%part
  %alone = f32[4]{0} all-reduce(%a), channel_id=4, replica_groups={{0},{1},{2}}
  %start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=5, \
source_target_pairs={{0,1},{1,2},{2,0}}
  ROOT %done = f32[4]{0} collective-permute-done(%start)
}
"""


def test_collectives_count_as_often_as_they_run():
    found = {c.kind: c for c in collectives(PROGRAM)}
    assert len(collectives(PROGRAM)) == 4  # one spread over two fusions; one of single devices
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.times, gather.size, gather.group) == (5, 48, (0, 1, 2))
    assert gather.elements == (12,) and gather.op_name == "jit(step)/while/body/weights"
    assert gather.sent == pytest.approx(5 * 48 * 2 / 3)
    assert (scatter.times, scatter.size) == (5, 24)  # bfloat16, the whole of three shards
    permute, reduce = found["collective-permute"], found["all-reduce"]
    assert (permute.times, permute.size, permute.sent) == (1, 16, 16)
    assert reduce.group == (0, 1, 2) and reduce.sent == pytest.approx(2 * 16 * 2 / 3 * reduce.times)


def test_transposed_groups():
    line = "ROOT %sum.1 = f32[4]{0} all-reduce(%r), channel_id=3, replica_groups="
    other = PROGRAM.replace("mesh['a'=1,'b'=3] {'b'}", "[2,4]<=[4,2]T(1,0)")
    assert line + "[2,4]" in other
    groups = {c.group for c in collectives(other) if c.kind == "all-reduce"}
    assert groups == {(0, 2, 4, 6)}
    named = "mesh['x'=2,'y'=2,'z'=2], device_ids=([4,2]T(1,0)) {'y','z'}"
    other = PROGRAM.replace("mesh['a'=1,'b'=3] {'b'}", named)
    assert {c.group for c in collectives(other) if c.kind == "all-reduce"} == {(0, 2, 4, 6)}


def test_a_loop_of_unknown_length_is_not_guessed():
    with pytest.raises(ValueError, match="unknown length"):
        collectives(PROGRAM.replace("%bound = s32[] constant(5)", "%bound = s32[] parameter(1)"))


# As the compiler of TPU7x starts a gather on another core and goes on.
STARTED = """
%called (r: f32[4]) -> f32[12] {
  %r = f32[4]{0} parameter(0)
  ROOT %gather.2 = f32[12]{0} all-gather(%r), channel_id=6, replica_groups=[1,3]<=[3]
}, execution_thread="other"

ENTRY"""


def test_a_collective_on_another_core_counts():
    program = PROGRAM.replace("\nENTRY", STARTED).replace(
        "  ROOT %done =",
        "  %begun = ((f32[4]{0}, token[]), f32[12]{0}) call-start(%a, %done.1), "
        'async_execution_thread="other", to_apply=%called\n'
        "  %ended = f32[12]{0} call-done(%begun)\n  ROOT %done =",
    )
    gathers = [c.times for c in collectives(program) if c.kind == "all-gather"]
    assert sorted(gathers) == [1, 5]


def test_a_collective_that_nothing_calls_is_not_left_out():
    with pytest.raises(ValueError, match="nothing is seen to call, computation called"):
        collectives(PROGRAM.replace("\nENTRY", STARTED))
