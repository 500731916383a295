"""Collectives, read from the text of a compiled program."""

from tpu import hlo

TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%part (p.0: bf16[1,16,8]) -> bf16[1,16,32] {
  %p.0 = bf16[1,16,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[1,16,32]{2,1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={2}
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.5 = f32[64]{0} all-reduce(%p), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %cut = f32[16]{0} dynamic-slice(%all-reduce.5, %p)
}

%inner_cond (c: (u32[], f32[4,2])) -> pred[] {
  %n.1 = u32[]{:T(128)} constant(8)
  %c = (u32[]{:T(128)}, f32[4,2]{1,0}) parameter(0)
  %i.1 = u32[] get-tuple-element(%c), index=0
  ROOT %less.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%inner (c: (u32[], f32[4,2])) -> (u32[], f32[4,2]) {
  %c = (u32[]{:T(128)}, f32[4,2]{1,0}) parameter(0)
  %two = u32[] constant(2)
  %i.2 = u32[] get-tuple-element(%c), index=0
  %next = u32[] add(%i.2, %two)
  %x = f32[4,2] get-tuple-element(%c), index=1
  %collective-permute-start.1 = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %moved = f32[4,2] collective-permute-done(%collective-permute-start.1)
  %again = bf16[1,16,32] fusion(%x), kind=kCustom, calls=%part
  ROOT %out = (u32[], f32[4,2]) tuple(%next, %moved)
}

%cond (c: (s32[], f32[4,2])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %c = (s32[]{:T(128)}, f32[4,2]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (c: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %c = (s32[]{:T(128)}, f32[4,2]{1,0}) parameter(0)
  %one = s32[] constant(1)
  %i.3 = s32[] get-tuple-element(%c), index=0
  %next.1 = s32[] add(%i.3, %one)
  %x.1 = f32[4,2] get-tuple-element(%c), index=1
  %gathered = bf16[1,16,32] fusion(%x.1), kind=kCustom, calls=%part, metadata={op_name="jit(step)/while/body"}
  %zero.1 = u32[] constant(0)
  %into = (u32[], f32[4,2]) tuple(%zero.1, %x.1)
  %while.2 = (u32[], /*index=1*/f32[4,2]{1,0}) while(%into), condition=%inner_cond, body=%inner
  %y = f32[4,2] get-tuple-element(%while.2), index=1
  ROOT %out.1 = (s32[], f32[4,2]) tuple(%next.1, %y)
}

ENTRY %main (a: f32[4,2]) -> f32[] {
  %a = f32[4,2]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,2]) tuple(%zero, %a)
  %while.1 = (s32[], f32[4,2]{1,0}) while(%start), condition=%cond, body=%body
  %fused = f32[16]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %norm = (f32[], f32[8]) all-reduce(%a, %a), channel_id=11, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""  # noqa: E501  # as compilers write it


def test_collectives_are_counted_as_often_as_they_run():
    found = {c.kind: c for c in hlo.collectives(TEXT, 8)}
    # In the loop of five, once: that it is also written where it goes on, in the inner loop, does not count again.
    gather = found["all-gather"]
    assert (gather.shapes, gather.times, gather.bytes) == (("bf16[1,16,32]",), 5, 2 * 16 * 32 * 3 / 4)
    # In the inner loop of four rounds (to 8 in steps of 2), five times.
    assert (found["collective-permute"].times, found["collective-permute"].bytes) == (20, 4 * 8)
    # An all-reduce whose result is cut at once.
    assert (found["reduce-scatter"].times, found["reduce-scatter"].bytes) == (1, 4 * 64 * 3 / 4)
    assert (found["all-reduce"].shapes, found["all-reduce"].bytes) == (("f32[]", "f32[8]"), 2 * 7 / 8 * 36)
    assert hlo.totals(list(found.values()))["all-gather"] == {"count": 5, "bytes": 5 * 768}
