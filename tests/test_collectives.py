"""The parser of collectives, on what the compilers print; shortened from steps of an 8B model."""

# ruff: noqa: E501 (a line of XLA's text is one line)

import pytest

from benchmarks.collectives import collectives

MESH = "replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}"
GPU = f"""
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%x, %y)
}}

%wrapped (p: bf16[8,64]) -> bf16[8,64] {{
  ROOT %all-to-all.1 = bf16[8,64]{{1,0}} all-to-all(%p), channel_id=4, {MESH}, dimensions={{0}}
}}

%body (state: (s32[], bf16[512,16])) -> (s32[], bf16[512,16]) {{
  %all-gather-start.1 = ((bf16[512,16]{{1,0}}, bf16[512,1024]{{1,0}}), (bf16[4096,16]{{1,0}}, bf16[4096,1024]{{1,0}})) all-gather-start(%a, %b), channel_id=1, {MESH}, dimensions={{0}}
  %all-gather-done.1 = (bf16[4096,16]{{1,0}}, bf16[4096,1024]{{1,0}}) all-gather-done(%all-gather-start.1)
  %reduce-scatter-start = ((bf16[1,8192]{{1,0}}, bf16[1,64]{{1,0}}), (bf16[1,1024]{{1,0}}, bf16[1,8]{{1,0}})) reduce-scatter-start(%f, %g), channel_id=1, {MESH}, dimensions={{1}}, to_apply=%add
  %reduce-scatter-done = (bf16[1,1024]{{1,0}}, bf16[1,8]{{1,0}}) reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start.1 = f32[16,4096]{{1,0}} all-reduce-start(%c), channel_id=2, {MESH}, to_apply=%add
  %all-reduce-done.1 = f32[16,4096]{{1,0}} all-reduce-done(%all-reduce-start.1)
}}

%condition (state: (s32[], bf16[512,16])) -> pred[] {{
  ROOT %wrapped_compare = pred[] fusion(%i, %bound), kind=kLoop, calls=%compare_computation
}}

%compare_computation (i: s32[], bound: s32[]) -> pred[] {{
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}}

ENTRY %main (arg: bf16[512,16]) -> bf16[] {{
  %while.1 = (s32[], bf16[512,16]{{1,0}}) while(%tuple), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"32"}}}}
  %async.1 = ((bf16[8,64]{{1,0}}), bf16[8,64]{{1,0}}) async-start(%d), calls=%wrapped
  %async.2 = bf16[8,64]{{1,0}} async-done(%async.1), calls=%wrapped
  %collective-permute-start = (s32[1,2048]{{1,0}}, s32[1,2048]{{1,0}}, u32[], u32[]) collective-permute-start(%e), channel_id=5, source_target_pairs={{{{0,1}}}}
}}
"""

PART = "all-gather(%part), channel_id=7, " + MESH + ", dimensions={1}"
WHOLE = "bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)}"
TPU = f"""
HloModule jit_step, is_scheduled=true

%start (part: bf16[1,512,4096]) -> (bf16[1,512,4096], bf16[1,4096,4096]) {{
  %all-gather.341 = {WHOLE} {PART}
}}

%step (part: bf16[1,512,4096], whole: bf16[1,4096,4096]) -> bf16[1,4096,4096] {{
  %all-gather.343 = {WHOLE} {PART}
}}

%done (part: bf16[1,512,4096], whole: bf16[1,4096,4096]) -> bf16[1,4096,4096] {{
  ROOT %all-gather.347 = {WHOLE} {PART}
}}

%inner (state: (s32[])) -> (s32[]) {{
  %fusion.1208 = {WHOLE} fusion(%a), kind=kOutput, calls=%step
}}

%fewer_than_2 (state: (s32[])) -> pred[] {{
  %constant.506 = s32[]{{:T(128)}} constant(2)
  ROOT %lt.110 = pred[]{{:T(512)}} compare(%i, %constant.506), direction=LT
}}

%body (state: (s32[])) -> (s32[]) {{
  %async-collective-start.11 = ({WHOLE}) fusion(%b), kind=kCustom, calls=%start
  %while.193 = (s32[]{{:T(128)}}) while(%tuple.2), condition=%fewer_than_2, body=%inner
  %async-collective-done.11 = {WHOLE} fusion(%c), kind=kCustom, calls=%done
}}

%fewer_than_32 (state: (s32[])) -> pred[] {{
  %constant.514 = s32[]{{:T(128)}} constant(32)
  ROOT %lt.121 = pred[]{{:T(512)}} compare(%i, %constant.514), direction=LT
}}

ENTRY %main (arg: s32[]) -> s32[] {{
  %while.189 = (s32[]{{:T(128)}}) while(%tuple.1), condition=%fewer_than_32, body=%body
}}
"""

CPU = """
%body (state: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %reduce-scatter.1 = f32[8,8]{1,0} reduce-scatter(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (arg: f32[64,8]) -> f32[64,8] {
  %while.1 = (s32[], f32[64,8]{1,0}) while(%tuple), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %all-gather.2 = f32[64,8]{1,0} all-gather(%b), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%unknown (state: (s32[], f32[64,8])) -> pred[] {
  ROOT %ge = pred[] compare(%i, %j), direction=GE
}
"""


def found(text):
    return {one.kind: (one.devices, one.times, one.loop, one.sent) for one in collectives(text)}


def test_pairs_of_start_and_done_in_a_loop_of_noted_length():
    assert found(GPU) == {
        "all-gather": (8, 32, True, 4096 * (16 + 1024) * 2 * 7 / 8),
        # Of one channel with the gather, as those of a `shard_map` are.
        "reduce-scatter": (8, 32, True, (8192 + 64) * 2 * 7 / 8),
        "all-reduce": (8, 32, True, 2 * 16 * 4096 * 4 * 7 / 8),
        "all-to-all": (8, 1, False, 8 * 64 * 2 * 7 / 8),
        "collective-permute": (2, 1, False, 2048 * 4),
    }


def test_a_collective_that_libtpu_fuses_into_several_kernels_is_one():
    assert found(TPU) == {"all-gather": (8, 32, True, 4096 * 4096 * 2 * 7 / 8)}


def test_groups_as_lists_and_as_shapes():
    assert found(CPU) == {
        "reduce-scatter": (4, 2, True, 32 * 8 * 4 * 3 / 4),
        "all-gather": (4, 1, False, 64 * 8 * 4 * 3 / 4),
    }


def test_groups_of_devices_in_another_order():
    order = "axis_2'=1], device_ids=([4,2]T(1,0)) {"
    assert found(TPU.replace("axis_2'=1] {", order)) == found(TPU)
    with pytest.raises(ValueError, match="the groups of devices are not known"):
        collectives(TPU.replace("replica_groups=mesh", "replica_groups=?"))


def test_a_loop_of_unknown_length_is_refused():
    text = CPU.replace(', backend_config={"known_trip_count":{"n":"2"}}', "")
    with pytest.raises(ValueError, match="a loop of unknown length has collectives"):
        collectives(text)
