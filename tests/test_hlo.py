"""The parser of compiled programs: on programs compiled for eight devices, and on lines as a TPU's program has them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dllm_jax.hlo import ArrayType, Moved, Program
from dllm_jax.mesh import make_mesh

MESH = make_mesh(data=2, tensor=4)
SPLIT, WHOLE = PartitionSpec("tensor"), PartitionSpec()
F32 = 4

# A step loop that copies a weight in front, with a loop of four trips over one more and a conditional inside.
TPU = r"""HloModule jit_decode, is_scheduled=true, num_partitions=8

%moves (p: bf16[64,32]) -> bf16[32,64] {
  %p = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %t = bf16[32,64]{1,0:T(8,128)(2,1)} transpose(%p), dimensions={1,0}
}

%trips (s: (s32[], bf16[64,32])) -> pred[] {
  %s = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %four = s32[]{:T(128)} constant(4)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %four), direction=LT
}

%layer (s.1: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %s.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %w = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%s.1), index=1
  %moved = bf16[32,64]{1,0:T(8,128)(2,1)} fusion(%w), kind=kLoop, calls=%moves
  %ahead = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %sum = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%w), channel_id=1, replica_groups=mesh['a'=1,'b'=2,'c'=4] {'b','c'}, to_apply=%add, metadata={op_name="jit(decode)/while/body/full_step/dot"}
  ROOT %next = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%i.1, %sum)
}

%small (x: bf16[8]) -> bf16[8] {
  ROOT %x = bf16[8]{0} parameter(0)
}

%large (y: bf16[8]) -> bf16[8] {
  %y = bf16[8]{0} parameter(0)
  ROOT %g = bf16[64]{0} all-gather(%y), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%body (c: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %c = (s32[]{:T(128)}, /*index=1*/bf16[64,32]{1,0}) parameter(0)
  %layers = (s32[]{:T(128)}, bf16[64,32]{1,0}) while(%c), condition=%trips, body=%layer, metadata={op_name="jit(decode)/while/body/full_step/while"}
  %either = bf16[64]{0} conditional(%n, %c, %c), branch_computations={%small, %large}, metadata={op_name="jit(decode)/while/body/full_step/cond"}
  ROOT %out = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%j, %k)
}

ENTRY %main (q: bf16[64,32]) -> bf16[64,32] {
  %q = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %relaid = bf16[64,32]{0,1:T(8,128)(2,1)} copy(%q), metadata={op_name="jit(decode)/while"}
  %loop = (s32[]{:T(128)}, bf16[64,32]{1,0}) while(%start), condition=%more, body=%body, metadata={op_name="jit(decode)/while"}
  ROOT %r = bf16[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def compiled(function: Callable[..., object], *arguments: object) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def sharded(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))


COLLECTIVES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "tensor"), Moved("all-reduce", 16 * F32, 4)),
    "all-gather": (lambda x: jax.lax.all_gather(x, "tensor", tiled=True), Moved("all-gather", 64 * F32, 4)),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), Moved("reduce-scatter", 16 * F32, 4)),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x.reshape(4, 4), "tensor", 0, 1).reshape(-1),
        Moved("all-to-all", 16 * F32, 4),
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),
        Moved("collective-permute", 16 * F32, 8),
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_every_kind_of_collective_with_its_bytes(kind: str) -> None:
    function, expected = COLLECTIVES[kind]
    mapped = jax.shard_map(function, mesh=MESH, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
    program = compiled(mapped, sharded((64,), SPLIT))
    assert program.moved("ENTRY") == [expected]


def test_what_a_ring_sends() -> None:
    assert Moved("all-reduce", 800, 4).sent == 1200
    assert Moved("all-gather", 800, 4).sent == 600
    assert Moved("collective-permute", 800, 4).sent == 800


def decode_like(x: jax.Array, weight: jax.Array, count: jax.Array) -> jax.Array:
    """Trips of a full step and, inside, of cached steps: the first sums over devices once, the second twice."""

    @jax.named_scope("cached_step")
    def cached(_: int, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ weight) @ weight)

    @jax.named_scope("full_step")
    def full(x: jax.Array) -> jax.Array:
        return jnp.sin(x @ weight)

    return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.fori_loop(0, count, cached, full(x)), x)


def test_loops_are_told_apart_by_their_scopes() -> None:
    count = jax.ShapeDtypeStruct((), jnp.int32)
    program = compiled(decode_like, sharded((8, 16), WHOLE), sharded((16, 16), SPLIT), count)
    (outer,), (inner,) = program.loop_bodies("full_step"), program.loop_bodies("cached_step")
    moved = Moved("all-reduce", 8 * 16 * F32, 4)
    assert program.moved(outer, without=[inner]) == [moved]
    assert program.moved(inner) == [moved] * 2
    assert program.moved("ENTRY", without=[outer]) == []
    assert program.loop_bodies("other_step") == []


def test_one_device_moves_nothing() -> None:
    arguments = (jnp.zeros((8, 16)), jnp.zeros((16, 16)), jnp.int32(2))
    program = compiled(decode_like, *arguments)
    assert program.moved("ENTRY") == []
    assert program.devices == 1


def test_copies_in_a_loop_are_seen_by_shape() -> None:
    def swaps(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, x.shape[0], lambda i, xy: (xy[1].at[i].add(1), xy[0]), (x, y))[0]

    program = compiled(swaps, jnp.zeros((6, 50)), jnp.ones((6, 50)))
    (body,) = program.bodies(1)
    copies = functools.partial(program.copies, body)
    assert copies([ArrayType("f32", (50, 1, 6))])
    assert not copies([ArrayType("f32", (6, 51))])
    assert not copies([ArrayType("s32", (6, 50))])


def test_a_tpu_program() -> None:
    program = Program(TPU)
    weight = [ArrayType("bf16", (64, 32))]
    (body,) = program.loop_bodies("full_step")
    assert body == "body"
    # The inner loop runs four times; of the conditional the larger branch counts.
    assert program.moved(body) == [Moved("all-reduce", 4096, 8)] * 4 + [Moved("all-gather", 128, 2)]
    # The fusion only transposes; reading ahead into fast memory is no copy.
    assert len(program.copies(body, weight)) == 4
    assert len(program.copies("ENTRY", weight, without=[body])) == 1
    assert program.copies("ENTRY", weight, without=["layer"]) == program.copies("ENTRY", weight, without=[body])


def test_bytes_of_types() -> None:
    sizes = {"bf16": 2, "pred": 1, "f8e4m3fn": 1, "s32": 4, "c64": 8, "token": 0}
    assert {name: ArrayType(name, (3, 5)).bytes for name in sizes} == {name: 15 * size for name, size in sizes.items()}
    assert ArrayType("s4", (3, 2)).bytes == 3


# A collective that overlaps with a matrix product stands in three fusions: its start, the product, its end.
OVERLAPPED = r"""HloModule jit_decode, is_scheduled=true, num_partitions=8

%first (p: bf16[8,4]) -> (bf16[8,4], bf16[64,4], u32[]) {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=mesh['a'=8] {'a'}, dimensions={0}
  ROOT %c = (bf16[8,4]{1,0}, bf16[64,4]{1,0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p.1: bf16[8,4]) -> bf16[8,8] {
  %p.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g.1 = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=2, replica_groups=mesh['a'=8] {'a'}, dimensions={0}
  ROOT %d = bf16[8,8]{1,0} convolution(%p.1, %p.1), dim_labels=bf_io->bf
}

%last (p.2: bf16[8,4]) -> bf16[64,4] {
  %p.2 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g.2 = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=2, replica_groups=mesh['a'=8] {'a'}, dimensions={0}
  ROOT %c.2 = bf16[64,4]{1,0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%sliced (p.3: s8[4,64,32]) -> bf16[64,32] {
  %p.3 = s8[4,64,32]{2,1,0:T(8,128)(4,1)} parameter(0)
  %s = s8[1,64,32]{2,1,0:T(8,128)(4,1)} dynamic-slice(%p.3, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %wide = bf16[64,32]{1,0:T(8,128)(2,1)} convert(%s)
}

%used (p.4: s8[4,64,32]) -> bf16[8,32] {
  %p.4 = s8[4,64,32]{2,1,0:T(8,128)(4,1)} parameter(0)
  %s.1 = s8[1,64,32]{2,1,0:T(8,128)(4,1)} dynamic-slice(%p.4, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %product = bf16[8,32]{1,0:T(8,128)(2,1)} convolution(%x, %s.1), dim_labels=bf_io->bf
}

ENTRY %main (q: bf16[8,4], w: s8[4,64,32]) -> bf16[64,4] {
  %q = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = s8[4,64,32]{2,1,0:T(8,128)(4,1)} parameter(1)
  %start = (bf16[8,4]{1,0}, bf16[64,4]{1,0}, u32[]{:S(2)}) fusion(%q), kind=kCustom, calls=%first
  %middle = bf16[8,8]{1,0} fusion(%q), kind=kOutput, calls=%async_collective_fusion.3
  %one = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%w), kind=kLoop, calls=%sliced
  %ahead = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kLoop, calls=%sliced
  %product = bf16[8,32]{1,0:T(8,128)(2,1)} fusion(%w), kind=kOutput, calls=%used
  ROOT %done = bf16[64,4]{1,0:T(8,128)(2,1)} fusion(%q), kind=kCustom, calls=%last
}
"""


def test_an_overlapped_collective_counts_once() -> None:
    assert Program(OVERLAPPED).moved("ENTRY") == [Moved("all-gather", 64 * 4 * 2, 8)]


def test_a_slice_or_conversion_of_a_weight_in_memory_is_a_copy() -> None:
    """Not where it is read ahead, nor inside the product that uses it."""
    copies = Program(OVERLAPPED).copies("ENTRY", [ArrayType("bf16", (64, 32))])
    assert [copy.shape for copy in copies] == [(64, 32)]
