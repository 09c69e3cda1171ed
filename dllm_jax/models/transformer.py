"""The one transformer behind every family: pure (tokens, positions, real, cache) -> (hidden, cache), and its head.

Families differ in the fields of `TransformerConfig` and in the names of their tensors (`llada.py`, ...). Nothing here
samples, pads or knows what a canvas is.

Layers are a list, which runs unrolled, or stacked, every parameter of all of them in one array, and then `jax.lax.scan`
runs them. On GPUs and CPUs a list decodes faster (docs/performance.md). On TPUs the scan reads its slices inside the
matrix products, so it moves no more memory, and compiles many times faster into far less code.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.mesh import constrain
from dllm_jax.models.attention import Looks, Visible, Watch, visible
from dllm_jax.models.cache import Cache, LayerCache
from dllm_jax.models.experts import WHOLE, Experts, ExpertSettings
from dllm_jax.models.layers import Attention, RMSNorm, Storage, SwiGLU, weight

Carried = tuple[Float[Array, "B T D"], LayerCache | None]  # between layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that decides a model's shapes and arithmetic; hashable, read from config.json by its family."""

    family: str  # one of `registry`: model_type in config.json, "llada_moe" for LLaDA-MoE
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int  # rows of the embedding and of the head
    rope_theta: float
    norm_eps: float
    max_length: int  # longest prompt + generation
    qkv_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalised head by head before they are rotated
    rotary_dim: int = 0  # the first dimensions of a head, which are rotated; 0: all
    experts: ExpertSettings | None = None  # instead of the MLP, but for some layers; None: all layers have an MLP
    tied_embeddings: bool | None = False  # None: config.json does not say, what is stored decides
    causal_block: int = 0  # 0: a position sees all others; n: those up to the end of its block of n; 1: causal
    block_causal: bool = False  # `causal_block` is the family's, and a decode may take another (`with_causal_block`)
    logit_shift: int = 0  # 1: a position is predicted by the hidden state of its left neighbour (Dream)
    mask_id: int | None = None  # the [MASK] token; None for autoregressive models
    eos_id: int  # end of text, also what fills the output behind it
    other_end_ids: tuple[int, ...] = ()  # further tokens that end a text, such as the end of a turn
    pad_ids: tuple[int, ...] = ()  # the padding of other frameworks; ends a text, unless it is ordinary text
    kv_copies: int = 1  # of every key/value head, each with a part of its query heads; see `on_mesh`
    stacked: bool = False  # layers in one array per parameter, looped over
    quantize: str = ""  # "int8": matrices but the embedding in 8 bits
    remat: bool = False  # layers are computed again in a backward pass

    @property
    def causal(self) -> bool:
        """Whether a position sees itself and those before it only."""
        return self.causal_block == 1

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has an MLP, not experts."""
        return self.experts is None or layer in self.experts.dense_layers

    @property
    def apart(self) -> int:
        """Layers in front of those that are stacked: those with an MLP where the others have experts."""
        return len(self.experts.dense_layers) if self.experts and self.stacked else 0

    @property
    def stackable(self) -> bool:
        """Whether layers that are not alike come first, so that the others can be looped over."""
        dense = self.experts.dense_layers if self.experts else ()
        return dense == tuple(range(len(dense))) and len(dense) < self.num_layers

    @property
    def stored_kv_heads(self) -> int:
        """Key/value heads of weights and caches, with their copies."""
        return self.num_kv_heads * self.kv_copies

    @property
    def stored_groups(self) -> int:
        """Query heads of each of them."""
        return -(-self.num_heads // (self.num_kv_heads * self.kv_copies))

    @property
    def stored_heads(self) -> int:
        """Query heads of the weights, with those of zeros."""
        return self.stored_kv_heads * self.stored_groups

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a text, as the model's files name them: EoS, then the others by id; never the mask."""
        return (self.eos_id, *sorted({*self.other_end_ids, *self.pad_ids} - {self.eos_id, self.mask_id}))


def on_mesh(config: TransformerConfig, mesh: Mesh | AbstractMesh) -> TransformerConfig:
    """The configuration with as many key/value heads as `tensor` can divide, by copies of those there are.

    The query heads of one key/value head are dealt out to its copies, with heads of zeros where they do not come out
    even: Dream's 28 query and 4 key/value heads become 8 times (4 + 1) on 8 devices. Else all of the attention would
    run on every device.
    """
    tensor = mesh.shape["tensor"]
    return dataclasses.replace(config, kv_copies=tensor // math.gcd(config.num_kv_heads, tensor))


class Block(nnx.Module):
    """Pre-norm attention and MLP, or experts, with residual connections."""

    def __init__(self, config: TransformerConfig, storage: Storage, *, dense: bool) -> None:
        dim, eps = config.embed_dim, config.norm_eps
        self.attention_norm = RMSNorm(dim, eps=eps, storage=storage)
        self.attention = Attention(
            dim,
            kv_heads=config.stored_kv_heads,
            groups=config.stored_groups,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            bias=config.qkv_bias,
            norm_eps=config.norm_eps if config.qk_norm else None,
            rotary_dim=config.rotary_dim,
            storage=storage,
        )
        self.mlp_norm = RMSNorm(dim, eps=eps, storage=storage)
        self.mlp: SwiGLU | None = None
        self.experts: Experts | None = None
        if dense or config.experts is None:
            self.mlp = nnx.data(SwiGLU(dim, hidden_dim=config.mlp_dim, storage=storage))
        else:
            made = Experts(dim, settings=config.experts, differentiable=config.remat, storage=storage)
            self.experts = nnx.data(made)
        self.apart = config.apart

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        seen: Visible,
        *,
        cache: LayerCache | None,
        layer: Int[Array, ""] | None,
        start: Int[Array, ""] | Int[Array, "B"] | None,
        kept_BT: Bool[Array, "B T"] | None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache, Looks | None]:
        """One layer; returns the keys and values that were attended to, in the cache if there is one, and how."""
        attended, keys, looks = self.attention(
            self.attention_norm(x),
            positions_BT,
            seen,
            cache=cache,
            layer=layer,
            start=start,
            kept_BT=kept_BT,
            watch=watch,
        )
        x = constrain(x + attended, "batch", None, None)
        normed = self.mlp_norm(x)
        if self.mlp is not None:
            made = self.mlp(normed)
        else:
            assert self.experts is not None
            made = self.experts(normed, layer=None if layer is None else layer - self.apart)
        return constrain(x + made, "batch", None, None), keys, looks


class Transformer(nnx.Module):
    """Embedding, layers, final norm; `unembed` is apart so that logits are computed only where somebody looks."""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None) -> None:
        init = nnx.initializers.normal(0.02)
        self.config = config
        once = Storage(dtype=dtype, rngs=rngs, quantize=config.quantize)
        dim, rows = config.embed_dim, config.vocab_size
        self.embedding = once.parameter({"vocab": rows, "vocab_embed": dim}, init)
        self.first: Block | None = None
        self.layers: Block | nnx.List[Block]
        if config.stacked:
            stack = dataclasses.replace(once, layers=config.num_layers - config.apart)
            self.layers = Block(config, stack, dense=config.experts is None)
            if config.apart:
                before = dataclasses.replace(once, layers=config.apart)
                self.first = nnx.data(Block(config, before, dense=True))
        else:
            dense = map(config.is_dense, range(config.num_layers))
            self.layers = nnx.List([Block(config, once, dense=each) for each in dense])
        self.final_norm = RMSNorm(dim, eps=config.norm_eps, storage=once)
        self.head: nnx.Param | None = None
        self.head_scale: nnx.Param | None = None
        if not config.tied_embeddings:
            sizes = {"vocab_embed": dim, "vocab": rows}
            self.head, self.head_scale = map(nnx.data, once.matrix(sizes, inputs=["vocab_embed"]))

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        *,
        real_BS: Bool[Array, "B S"],
        segment_BT: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        start: Int[Array, ""] | Int[Array, "B"] | None = None,
        kept_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Runs the network.

        Args:
            tokens_BT: token ids.
            positions_BT: rotary position of every token.
            real_BS: the keys that hold text; S = T without a cache, the cache's columns with one. Which of them a
                query sees is in the configuration.
            segment_BT: which sample of a packed row a token belongs to; it sees no other. Without a cache only.
            cache: keys and values of every layer; those of the tokens given are written into it first.
            start: with a cache, the column of the first token, for all rows or per row.
            kept_BT: with a cache, True for columns whose keys and values stay as they are there; None: for none.

        Returns:
            Hidden states before the final norm's head projection (already normalised), and the cache attended to.
        """
        seen = visible(real_BS, positions_BT, start=start, causal_block=self.config.causal_block, segment_BT=segment_BT)
        x, keys, _ = self._run(tokens_BT, positions_BT, seen, cache=cache, start=start, kept_BT=kept_BT)
        return x, keys

    def watched(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        *,
        real_BS: Bool[Array, "B T"],
        pattern_BTS: Bool[Array, "B T T"] | None = None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache, Looks | None]:
        """Runs the network without a cache, for those who look closer.

        Args:
            tokens_BT: token ids.
            positions_BT: rotary position of every token.
            real_BS: the keys that hold text.
            pattern_BTS: what a query may see besides; None: all that the configuration lets it.
            watch: whose attention is told; None: nobody's.

        Returns:
            Hidden states and keys and values as above; and the attention.
        """
        block = self.config.causal_block
        seen = visible(real_BS, positions_BT, start=None, causal_block=block, segment_BT=None, pattern_BTS=pattern_BTS)
        return self._run(tokens_BT, positions_BT, seen, cache=None, start=None, kept_BT=None, watch=watch)

    def _run(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        seen: Visible,
        *,
        cache: Cache | None,
        watch: Watch | None = None,
        **places: Array | None,
    ) -> tuple[Float[Array, "B T D"], Cache, Looks | None]:
        x = constrain(weight(self.embedding)[tokens_BT], "batch", None, None)
        keys: Cache
        if isinstance(self.layers, Block):
            assert not isinstance(cache, list), "stacked layers have one cache"
            stacks = [self.layers] if self.first is None else [self.first, self.layers]
            x, keys, looks = _stacked(stacks, x, positions_BT, seen, cache, config=self.config, watch=watch, **places)
            return self.final_norm(x), keys, looks
        assert not isinstance(cache, LayerCache), "every layer of a list has a cache"
        keys, found = [], []
        first_watched = self.config.num_layers - (watch.layers if watch else 0)
        for index, layer in enumerate(self.layers):
            old = None if cache is None else cache[index]
            watching = watch if index >= first_watched else None
            run = _recomputed(layer) if self.config.remat else layer
            x, layer_keys, looks = run(x, positions_BT, seen, cache=old, layer=None, watch=watching, **places)
            keys.append(layer_keys)
            found += [looks] if looks is not None else []
        return self.final_norm(x), keys, _mean(found)

    def unembed(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the positions given, accumulated and returned in float32 (float64 for a float64 model)."""
        dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
        head_DV = weight(self.embedding).T if self.head is None else weight(self.head).astype(hidden_BTD.dtype)
        logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=dtype)
        if self.head_scale is not None:
            logits_BTV = logits_BTV * weight(self.head_scale)[None, None]
        return constrain(logits_BTV, "batch", None, "vocab")


def _recomputed(layer: Block) -> Callable[..., Any]:
    """A layer of which a backward pass keeps the input alone."""
    graphdef, params = nnx.split(layer)

    def run(x: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], seen: Visible, **how: Any) -> Any:
        def on(params: nnx.State, x: Float[Array, "B T D"]) -> Any:
            return nnx.merge(graphdef, params)(x, positions_BT, seen, **how)

        return jax.checkpoint(on)(params, x)

    return run


def _mean(looks: Sequence[Looks]) -> Looks | None:
    """Of several layers; None of none."""
    return jax.tree.map(lambda *each: sum(each) / len(each), *looks) if looks else None


def _stacked(
    stacks: Sequence[Block],
    x: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    seen: Visible,
    cache: LayerCache | None,
    *,
    config: TransformerConfig,
    watch: Watch | None,
    **places: Array | None,
) -> tuple[Float[Array, "B T D"], LayerCache, Looks | None]:
    """Stacked layers with one cache, one after the other: the last stack, and perhaps one of other layers before it.

    Returns:
        Their output, their keys and values, and the attention watched.
    """

    def scanned(carried: Carried, stack: Block, layers: range, whole: range, watching: Watch | None) -> Any:
        """Runs some layers of a stack that holds the layers `whole`."""
        split: Any = nnx.split(stack, lambda path, _: str(path[-1]).startswith(WHOLE), ...)
        graphdef, of_all, params = split

        def run(carried: Carried, one: tuple[nnx.State, Int[Array, ""]]) -> tuple[Carried, Any]:
            (x, cache), (params, layer) = carried, one
            block = nnx.merge(graphdef, of_all, params)
            x, keys, looks = block(x, positions_BT, seen, cache=cache, layer=layer, watch=watching, **places)
            return ((x, None), (keys, looks)) if cache is None else ((x, keys), (None, looks))

        cut = slice(layers.start - whole.start, layers.stop - whole.start)
        some = params if layers == whole else jax.tree.map(lambda leaf: leaf[cut], params)
        step = jax.checkpoint(run) if config.remat else run
        return jax.lax.scan(step, carried, (some, jnp.arange(layers.start, layers.stop)))

    made, looks = [], []
    first_watched = config.num_layers - (watch.layers if watch else 0)
    ranges = (range(config.apart), range(config.apart, config.num_layers))[-len(stacks) :]
    for stack, whole in zip(stacks, ranges, strict=True):
        middle = min(max(first_watched, whole.start), whole.stop)
        for layers, watching in ((range(whole.start, middle), None), (range(middle, whole.stop), watch)):
            if layers:
                (x, cache), (own, told) = scanned((x, cache), stack, layers, whole, watching)
                made += [] if own is None else [own]
                looks += [jax.tree.map(lambda x, at=at: x[at], told) for at in range(len(layers)) if watching]
    keys = cache if cache is not None else jax.tree.map(lambda *each: jnp.concatenate(each), *made)
    return x, keys, _mean(looks)
