"""What queries see, and the kernels against XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dllm_jax.mesh import MESH_AXES, make_mesh
from dllm_jax.models.attention import KERNELS, Visible, attend, kernel, split_keys, visible
from dllm_jax.models.splash import block_sizes, splash

REAL_BS = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
COLUMNS_1S = np.arange(6)[None]
POSITIONS_BS = COLUMNS_1S - np.array([[1], [0]])


def mask(causal_block: int, *, first: int = 0, start: object = None, segment_BT: object = None) -> np.ndarray:
    """The mask [B, T, S] of the queries from a column on."""
    seen = visible(
        jnp.asarray(REAL_BS),
        jnp.asarray(POSITIONS_BS[:, first:]),
        start=start,
        causal_block=causal_block,
        segment_BT=segment_BT,
    ).mask
    return np.broadcast_to(seen, (2, 1, 6 - first, 6))[:, 0]


@pytest.mark.parametrize("block", [0, 1, 2, 4])
def test_a_query_sees_the_real_keys_up_to_the_end_of_its_block(block: int) -> None:
    of_B = POSITIONS_BS // block if block else np.zeros_like(POSITIONS_BS)
    expected = REAL_BS[:, None] & (of_B[:, None] <= of_B[:, :, None])
    np.testing.assert_array_equal(mask(block), expected)
    for start in (jnp.int32(2), jnp.array([2, 2])):  # the queries of a cached step
        np.testing.assert_array_equal(mask(block, first=2, start=start), expected[:, 2:])


def test_packed_samples_do_not_see_each_other() -> None:
    segment_BT = np.array([[0, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 3]])
    expected = REAL_BS[:, None] & (segment_BT[:, None] == segment_BT[:, :, None])
    np.testing.assert_array_equal(mask(0, segment_BT=jnp.asarray(segment_BT)), expected)
    causal = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(mask(1, segment_BT=jnp.asarray(segment_BT)), expected & causal)


SHAPES = [  # rows, queries, keys, key/value heads, query heads of each, head width
    (2, 128, 128, 2, 1, 64),  # a full step
    (4, 33, 256, 2, 3, 128),  # a block step of a model that shifts its logits
    (1, 140, 256, 1, 4, 64),  # two blocks of queries
    (2, 8, 4096, 1, 1, 64),  # two blocks of keys
]


def inputs(shape: tuple[int, ...], *, causal_block: int) -> tuple[jax.Array, jax.Array, jax.Array, Visible]:
    """Random queries, keys and values, with padding on both sides; the last of several rows has no key at all."""
    rows, queries, keys, kv_heads, groups, head_dim = shape
    normal = np.random.default_rng(0).normal
    q = jnp.asarray(normal(size=(rows, queries, kv_heads * groups, head_dim)), jnp.float32)
    k, v = (jnp.asarray(normal(size=(rows, keys, kv_heads, head_dim)), jnp.float32) for _ in range(2))
    columns, pad = np.arange(keys)[None], 5 * np.arange(rows)[:, None]
    real = (columns >= pad) & (columns < keys - 9)
    if rows > 1:
        real[-1] = False
    start_B = 1 + np.arange(rows) if queries < keys else np.zeros(rows, int)
    positions_BT = start_B[:, None] + np.arange(queries) - pad
    seen = visible(
        jnp.asarray(real),
        jnp.asarray(positions_BT),
        start=jnp.asarray(start_B),
        causal_block=causal_block,
        segment_BT=None,
    )
    return q, k, v, seen


@pytest.mark.parametrize(("shape", "causal_block"), [*((shape, 0) for shape in SHAPES), (SHAPES[0], 1), (SHAPES[1], 8)])
def test_the_kernels_equal_xla(shape: tuple[int, ...], causal_block: int) -> None:
    arguments = inputs(shape, causal_block=causal_block)
    kernels = (KERNELS["xla"], functools.partial(splash, interpret=True), split_keys, KERNELS["chunks"])
    expected, *others = jax.jit(lambda *a: [run(*a) for run in kernels])(*arguments)
    assert np.isfinite(expected).all()
    for got in others:
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("segments", [False, True])
def test_the_gradients_of_chunks_equal_those_of_xla(segments: bool) -> None:
    *arguments, seen = inputs(SHAPES[0], causal_block=0)
    if segments:
        seen = Visible(seen.real_BS, segment_BT=jnp.arange(128)[None] // jnp.array([[30], [50]]))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(name: str, *arguments: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *a: jnp.sum(KERNELS[name](*a, seen) ** 2), argnums=(0, 1, 2))(*arguments)

    for got, expected in zip(gradients("chunks", *arguments), gradients("xla", *arguments), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_splash_on_a_mesh(shape: tuple[int, int, int]) -> None:
    """Also where the heads, or the rows, do not come out even."""
    data, fsdp, tensor = shape
    arguments = inputs(SHAPES[1], causal_block=1)
    run = functools.partial(splash, interpret=True)
    alone = jax.jit(run)(*arguments)
    with jax.set_mesh(make_mesh(data=data, fsdp=fsdp, tensor=tensor)):
        split = jax.jit(run)(*arguments)
    np.testing.assert_array_equal(split, alone)


def test_cudnn_gets_lengths_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(SHAPES[1], causal_block=1)
    expected, reference = KERNELS["xla"](*arguments), jax.nn.dot_product_attention

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array, implementation: str) -> jax.Array:
        assert (q.shape[1], mask.shape, implementation) == (64, (4, 1, 64, 256), "cudnn")
        return reference(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    np.testing.assert_allclose(KERNELS["cudnn"](*arguments), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 32, 165, 512, 513, 1152, 1280, 1408, 2048, 2176, 5 * 2048])
@pytest.mark.parametrize("keys", [128, 512, 1408, 2048, 2176, 4096])
def test_blocks_of_splash(queries: int, keys: int) -> None:
    sizes = block_sizes(queries, keys)
    assert sizes.block_q % 16 == 0
    assert sizes.block_q <= 512
    blocks = -(-queries // sizes.block_q)
    assert blocks * sizes.block_q - queries < (1 if queries % 128 == 0 else 16 * blocks)
    assert keys % sizes.block_kv == 0
    assert sizes.block_kv % sizes.block_kv_compute == 0
    assert sizes.block_kv_compute % 128 == 0
    assert sizes.block_q * sizes.block_kv_compute * 4 <= 2**20  # bytes of scores


BLOCK_STEP = {"queries": 32, "keys": 2048}


@pytest.mark.parametrize(
    ("platform", "dtype", "shape", "name"),
    [
        ("cpu", "bfloat16", {}, "xla"),
        ("cpu", "float32", {}, "chunks"),
        ("cpu", "float32", {"packed": True}, "chunks"),
        ("cpu", "float32", {"queries": 255}, "xla"),
        ("cpu", "float16", {}, "xla_wide"),
        ("", "bfloat16", {}, "xla"),
        ("", "float16", {}, "xla_wide"),
        ("gpu", "bfloat16", {}, "cudnn"),
        ("gpu", "float16", {}, "cudnn"),
        ("gpu", "float32", {}, "xla"),
        ("gpu", "bfloat16", {"keys": 500}, "xla"),
        ("gpu", "bfloat16", {"head_dim": 12}, "xla"),
        ("gpu", "bfloat16", {"packed": True}, "xla"),
        ("gpu", "bfloat16", BLOCK_STEP, "cudnn"),
        ("gpu", "bfloat16", BLOCK_STEP | {"rows": 1}, "split_keys"),
        ("gpu", "bfloat16", {"rows": 1}, "cudnn"),
        ("gpu", "bfloat16", BLOCK_STEP | {"rows": 1, "keys": 512}, "cudnn"),
        ("tpu", "bfloat16", {}, "splash"),
        ("tpu", "bfloat16", BLOCK_STEP | {"rows": 1}, "splash"),
        ("tpu", "float32", {}, "xla"),
        ("tpu", "float64", {}, "xla"),
        ("tpu", "float16", {}, "xla_wide"),
        ("tpu", "bfloat16", {"head_dim": 16}, "xla"),
        ("tpu", "bfloat16", {"keys": 192}, "xla"),
        ("tpu", "bfloat16", {"packed": True}, "xla"),
    ],
)
def test_the_kernel_follows_platform_dtype_and_shape(
    platform: str, dtype: str, shape: dict[str, int], name: str
) -> None:
    sizes = {"rows": 8, "queries": 512, "keys": 512, "head_dim": 128} | shape
    assert kernel(platform, jnp.dtype(dtype), **sizes) == name


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_platform_is_that_of_the_mesh(platform: str) -> None:
    device = AbstractDevice(device_kind="", num_cores=1, platform=platform)
    mesh = AbstractMesh((1, 1, 1), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=device)
    shape = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(lambda q, real: attend(q, q, q, seen=Visible(real)))(shape, jnp.ones((1, 128), bool)))
    assert ("pallas_call" in text) == (platform == "tpu")
