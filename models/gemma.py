"""Gemma 1, 2, 3 and 4 (text only) as pure functions over a tree of stacked weights.

Each letter names one dimension everywhere: in einsum strings, in `axes`, in sharding rules and in shape comments.

    L layers            Q questions (prompts)        N query heads          F hidden width of the MLP
    D embedding width   G completions a question     K key/value heads      V vocabulary
    B rows = Q*G        P prompt slots               R = N/K                A = N*H, all query heads
    T tokens in a call  C completion slots           H head size            E = K*H, all key/value heads
    S key slots         J rank of an adapter   U width of a per-layer embedding, Z = L*U
    M rows in the MLP, W rows at the vocabulary head: both are B, sharded differently (sharding.py)

A lower-case letter is the same dimension, never sharded; a dot is a dimension without a letter.

Three forward passes share the two halves of a layer, `attention_inputs` and `attention_out_and_mlp`:

    forward          whole sequences -> hidden states, and the keys and values of all layers  (prefill; the plain model)
    forward_group    each prompt once, with its G completions -> hidden states                (training, reference)
    forward_cached   one token per row, against cached keys and values                        (decoding: kv_cache.py)

Attention is masked by position: a query at position q sees a key at position k when 0 <= q - k < window. Padding has position
FAR, in the future of every token, so it needs no mask of its own.

Layers of Gemma 1, 2 and 3 have one shape and are stacked together. Gemma 4 has two to four `kinds` of layers, each stacked by
itself: local and global ones, and of both those that have keys and values and those that share the keys and values of an
earlier layer. Each kind has a `GemmaConfig` of its own, so that the halves of a layer need not know. Not supported: images,
sound, experts, dropout, biases.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import groupby
from operator import itemgetter
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from models.sharding import ROWS, TRAIN, Rules, reshard, spec, transposed

TYPES = ("global", "local")
NORMS = ("Ld", "LH", "d", "U", "L")  # letters of the weights that multiply
FAR = 2**30  # the position of padding and of empty cache slots; as a window, one without a limit


@dataclass(frozen=True)
class GemmaConfig:
    """The dimensions of one model; `convert.read_config` reads them from a `config.json`."""

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    query_scale: float  # factor of the attention scores: query_pre_attn_scalar ** -0.5
    local_layers: tuple[bool, ...]  # for each layer, whether it attends within `sliding_window` only
    sliding_window: int = FAR
    rope_base: float = 10_000.0
    rope_local_base: float = 10_000.0
    rope_factor: float = 1.0  # positions are divided by it in global layers
    attn_softcap: float | None = None
    final_softcap: float | None = None
    post_norms: bool = False
    qk_norms: bool = False
    norm_eps: float = 1e-6
    norm_offset: float = 1.0  # a norm multiplies by this plus its weight; 0 in Gemma 4
    # Gemma 4: the sizes of its other kinds of layers, and the weights that only it has
    global_head_dim: int = 0
    global_kv_heads: int = 0
    rope_fraction: float = 1.0  # of the pairs of a head, how many RoPE turns in global layers
    values_are_keys: bool = False  # in global layers: the projection of keys, before its norm, gives the values too
    shared_layers: int = 0  # so many last layers read the keys and values of the last one before them of their type
    shared_mlp_dim: int = 0
    per_layer_dim: int = 0  # width of the embedding that each layer has of every token; 0: none

    @property
    def family(self) -> int:
        """Gemma 1, 2, 3 or 4."""
        return 4 if self.norm_offset == 0 else 3 if self.qk_norms else 2 if self.post_norms else 1

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension that a weight has, by its letter. Those of layers hold for models of one kind."""
        return dict(
            L=self.num_layers, D=self.embed_dim, d=self.embed_dim, F=self.mlp_dim, V=self.vocab_size, H=self.head_dim,
            A=self.num_heads * self.head_dim, E=self.num_kv_heads * self.head_dim, U=self.per_layer_dim,
            Z=self.num_layers * self.per_layer_dim,
        )  # fmt: skip

    @property
    def own_layers(self) -> int:
        """The layers that have keys and values; they are the first."""
        return self.num_layers - self.shared_layers

    @property
    def projected_heads(self) -> int:
        """The heads of queries, keys and values that a layer computes, in a model of one kind."""
        own = self.num_kv_heads * (1 if self.values_are_keys else 2) if self.own_layers else 0
        return self.num_heads + own

    @property
    def cache_width(self) -> int:
        """The numbers of a token's keys, as many as of its values, in all layers that have any."""
        return sum(kind.own_layers * kind.num_kv_heads * kind.head_dim for kind in self.kinds.values())

    @cached_property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer: "" in a model of one kind, otherwise "local", "global", "shared_local" or "shared_global"."""
        if self.family < 4:
            return ("",) * self.num_layers
        types = ["local" if local else "global" for local in self.local_layers]
        return tuple(name if i < self.own_layers else f"shared_{name}" for i, name in enumerate(types))

    @cached_property
    def kinds(self) -> dict[str, "GemmaConfig"]:
        """For each kind, the model that would consist of these layers alone."""
        return {name: self.kind(name) for name in dict.fromkeys(self.layer_kinds)}

    def kind(self, name: str) -> "GemmaConfig":
        if name == "":
            return self
        count, shared, local = self.layer_kinds.count(name), name.startswith("shared"), name.endswith("local")
        return replace(
            self,
            num_layers=count,
            local_layers=(local,) * count,
            shared_layers=count if shared else 0,
            head_dim=self.head_dim if local else self.global_head_dim or self.head_dim,
            num_kv_heads=self.num_kv_heads if local else self.global_kv_heads or self.num_kv_heads,
            mlp_dim=self.shared_mlp_dim or self.mlp_dim if shared else self.mlp_dim,
            values_are_keys=self.values_are_keys and not local,
        )

    def layers_of(self, kind: str) -> list[int]:
        """The numbers of the layers of a kind."""
        return [i for i, name in enumerate(self.layer_kinds) if name == kind]

    def kv_layer(self, layer: int) -> int:
        """The layer whose keys and values a layer reads: itself, or the last one of its type that has any."""
        if layer < self.own_layers:
            return layer
        return max(i for i in range(self.own_layers) if self.local_layers[i] == self.local_layers[layer])

    @cached_property
    def periods(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """The kinds of layers in order, as periods and how often each repeats: E2B is 3 times 4 local and a global layer, then
        4 times the same that share."""
        found = []
        for kinds in (self.layer_kinds[: self.own_layers], self.layer_kinds[self.own_layers :]):
            if kinds:
                lengths = [n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0]
                size = next(n for n in lengths if kinds[:n] * (len(kinds) // n) == kinds)
                found.append((kinds[:size], len(kinds) // size))
        return tuple(found)


@dataclass(frozen=True)
class ExecutionConfig:
    """How a forward pass runs: sharding rules, dtype, rematerialization, unrolled or scanned layers."""

    rules: Rules = TRAIN
    dtype: str = "float32"  # of activations, and of weights as a layer uses them
    remat: str = "none"  # none | dots | full: what the backward pass recomputes
    unroll: bool = False  # unroll the loop over layers: faster on a CPU, slower to compile

    def at(self, letters: str):
        """The sharding of an activation with these dimensions."""
        return spec(letters, self.rules)

    def use(self, weights, letters):
        """Weights as a layer uses them: cast to `dtype` and sharded by `rules`. Both arguments may be trees."""
        return reshard(jax.tree.map(lambda leaf: leaf.astype(self.dtype), weights), letters, self.rules)


@flax.struct.dataclass
class Layers:
    """The weights of all layers, stacked on L; or of one layer, without it."""

    pre_attn_norm: Any  # Ld
    q: Any  # LDA
    k: Any  # LDE; None in layers that share keys and values
    v: Any  # LDE; None there, and where the values are the keys
    o: Any  # LAD
    pre_mlp_norm: Any  # Ld
    gate: Any  # LdF
    up: Any  # LdF
    down: Any  # LFd
    post_attn_norm: Any = None  # Ld; not in Gemma 1
    post_mlp_norm: Any = None  # Ld; not in Gemma 1
    q_norm: Any = None  # LH; Gemma 3 and 4
    k_norm: Any = None  # LH; Gemma 3 and 4
    layer_gate: Any = None  # LDU; Gemma 4, for the layer's own embedding of each token
    layer_out: Any = None  # LUD
    post_layer_norm: Any = None  # Ld
    scale: Any = None  # L, what the layer's result is multiplied by; never trained


@flax.struct.dataclass
class Adapted:
    """A frozen projection with a LoRA adapter (lora.py). It stands for the matrix base + scale * a @ b."""

    base: Any  # LDF
    a: Any  # LDJ
    b: Any  # LJF
    scale: float = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class PerLayer:
    """What gives every layer an embedding of its own for each token (Gemma 4 E2B and E4B)."""

    table: Any  # VZ, half of all weights of E2B; frozen unless asked for
    projection: Any  # DZ
    norm: Any  # U


@flax.struct.dataclass
class Params:
    """All weights of a model."""

    embedding: Any  # Vd
    layers: Any  # Layers, stacked on L; or a dict of them, for each kind; or a tuple of L of them (`unroll`)
    final_norm: Any  # d
    head: Any = None  # dV, a transposed copy of the embedding (`unroll`)
    per_layer: Any = None  # PerLayer


@flax.struct.dataclass
class KV:
    """Keys and values of S slots per row, and the positions of these slots.

    For one layer k and v have the layout that the products of attention read. Stacked over layers both are LBKSH, in Gemma 4 in
    a dict: those of local and those of global layers, of which a cache has fewer slots for the local ones, and two `positions`.
    """

    k: Any  # BKHS
    v: Any  # BKSH
    positions: Any  # BS
    segments: Any = None  # BS, when a row holds several texts that must not attend to each other
    readers: Any = None  # tuple of BT, then the segments that each query reads


def axes(config: GemmaConfig) -> Params:
    """The letters of every weight. `config.sizes` turns them into shapes, a rule set into shardings."""
    kinds = {name: layer_axes(kind) for name, kind in config.kinds.items()}
    per_layer = PerLayer(table="VZ", projection="DZ", norm="U") if config.per_layer_dim else None
    return Params(embedding="Vd", layers=kinds.get("", kinds), final_norm="d", per_layer=per_layer)


def layer_axes(kind: GemmaConfig) -> Layers:
    """The letters of the weights of layers of one kind."""

    def given(letters: str, condition: Any) -> str | None:
        return letters if condition else None

    own, post, qk, per_layer = kind.own_layers, kind.post_norms, kind.qk_norms, kind.per_layer_dim
    return Layers(
        pre_attn_norm="Ld", q="LDA", k=given("LDE", own), v=given("LDE", own and not kind.values_are_keys), o="LAD",
        pre_mlp_norm="Ld", gate="LdF", up="LdF", down="LFd", post_attn_norm=given("Ld", post), post_mlp_norm=given("Ld", post),
        q_norm=given("LH", qk), k_norm=given("LH", qk and own), layer_gate=given("LDU", per_layer),
        layer_out=given("LUD", per_layer), post_layer_norm=given("Ld", per_layer), scale=given("L", kind.family == 4),
    )  # fmt: skip


def leaf_name(path: Any) -> str:
    """The name of a leaf by its path in the tree: "embedding", "layers.q", in Gemma 4 "layers.local.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def split_table(params: Params) -> tuple[Params, Params]:
    """The weights without the table of per-layer embeddings, and that table alone."""
    rest = replace(params, per_layer=replace(params.per_layer, table=None))
    return rest, Params(None, None, None, per_layer=PerLayer(params.per_layer.table, None, None))


def kind_of(leaf: str) -> str:
    """The kind of layers that a leaf belongs to; "" in a model of one kind, and for leaves outside layers."""
    parts = leaf.split(".")
    return parts[1] if parts[0] == "layers" and len(parts) == 3 else ""


def leaf_shape(leaf: str, letters: str, config: GemmaConfig) -> tuple[int, ...]:
    """The shape of a leaf with these letters."""
    sizes = config.kind(kind_of(leaf)).sizes
    return tuple(sizes[letter] for letter in letters)


def shapes(config: GemmaConfig, dtype: str = "float32") -> Params:
    """The shape and dtype of every weight, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, letters: jax.ShapeDtypeStruct(leaf_shape(leaf_name(path), letters, config), jnp.dtype(dtype)), axes(config)
    )


def init_params(key: Array, config: GemmaConfig, rules: Rules, dtype: str = "float32") -> Params:
    """Random weights, sharded by `rules`: matrices normal with variance 1 / input width, embeddings with 0.02**2; norms leave
    what they norm, and layers' scales are 1."""

    def init(key):
        leaves, tree = jax.tree.flatten(axes(config))
        made = []
        for i, (letters, leaf) in enumerate(zip(leaves, jax.tree.leaves(shapes(config)), strict=True)):
            scale = 0.0 if letters in NORMS else 0.02 if letters[0] == "V" else leaf.shape[-2] ** -0.5
            mean = 1 - config.norm_offset if letters in NORMS else 0.0
            made.append((mean + scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)).astype(dtype))
        return reshard(jax.tree.unflatten(tree, made), axes(config), rules)

    return jax.jit(init)(key)


def rms_norm(x: Array, scale: Any, config: GemmaConfig) -> Array:  # ...D, D -> ...D
    """x / sqrt(mean(x**2) + eps) * (offset + scale), computed in float32; the result has the dtype of x.

    The offset is 1, in Gemma 4 0. Without a scale (None) nothing is multiplied.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    if scale is None:
        return x32.astype(x.dtype)
    scale = scale.astype(x.dtype).astype(jnp.float32)  # rounded as in the sampling params, so that both paths agree
    return (x32 * (config.norm_offset + scale)).astype(x.dtype)


def linear(
    x: Array, weight: Any, letters: str, execution: ExecutionConfig, out: str | None = None, dtype: str | None = None
) -> Array:
    """x @ weight, where `weight` is a matrix or `Adapted`; `remat="dots"` saves the result.  ...D, DF -> ...F

    An adapter's product is small beside that of the base. Both stay in float32 until they are added, and the sum is rounded
    once: rounded apart, most of an adapter's first updates would be lost in bfloat16.
    """
    if isinstance(weight, Adapted):
        thin = None if out is None else out[:-1] + "J"
        narrow = weight.scale * product(x, weight.a, letters[0] + "J", execution, thin, "float32")
        wide = product(narrow.astype(x.dtype), weight.b, "J" + letters[1], execution, out, "float32")
        y = (product(x, weight.base, letters, execution, out, "float32") + wide).astype(dtype or x.dtype)
    else:
        y = product(x, weight, letters, execution, out, dtype)
    return checkpoint_name(y, "linear")


def product(
    x: Array, weight: Array, letters: str, execution: ExecutionConfig, out: str | None = None, dtype: str | None = None
) -> Array:
    """x @ weight in `dtype` (default: that of x), sharded as `out` (default: as XLA propagates it).  ...D, DF -> ...F

    The backward pass is written out for two reasons. It saves the weight as stored, and casts and gathers it again: no gathered
    weight stays in memory. And it computes the weight's gradient as xᵀ·dy, reduced directly into the stored layout. Automatic
    differentiation computes dyᵀ·x. A CPU has to transpose one of the two: here the smaller, and on one device apart from the
    product, since XLA's fast library takes no product with a folded transpose.

    The weight's gradient has the dtype of x until it has been summed over chips, so in bfloat16 it is rounded once a product
    and once a hop: 0.2% and, over eight chips, 0.4% of its size, beside the 1.5% that bfloat16 costs the whole gradient (four
    layers of width 64). A float32 one would leave it at 1.5%. Microbatches and chunks of the vocabulary are added in float32.
    """
    placed = None if out is None else execution.at(out)

    def forward(x, weight):
        return jnp.einsum(
            "...D,DF->...F", x, execution.use(weight, letters), out_sharding=placed, preferred_element_type=dtype or x.dtype
        )

    def backward(kept, dy):
        x, weight = kept
        dy = dy.astype(x.dtype)
        dx = jnp.einsum("...F,DF->...D", dy, execution.use(weight, letters), out_sharding=jax.typeof(x).sharding)
        stored, wall = jax.typeof(weight).sharding, lax.optimization_barrier

        def straight(x, dy, sharding=stored):
            return jnp.einsum("...D,...F->DF", x, dy, out_sharding=sharding)

        def apart(x, dy, sharding):
            return wall(jnp.einsum("D...,...F->DF", wall(jnp.moveaxis(x, -1, 0)), dy, out_sharding=sharding))

        def smaller(x, dy):
            form = apart if stored.mesh.size == 1 else straight
            return form(x, dy, stored) if x.shape[-1] <= dy.shape[-1] else form(dy, x, transposed(stored)).T

        dw = lax.platform_dependent(x, dy, cpu=smaller, default=straight)
        return dx, dw.astype(weight.dtype)

    apply = jax.custom_vjp(forward)
    apply.defvjp(lambda x, weight: (forward(x, weight), (x, weight)), backward)
    return apply(x, weight)


def softcap(x: Array, cap: float | None) -> Array:
    """x, squashed smoothly into (-cap, cap)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def highest(x: Array, cap: float | None) -> Array:  # ...S -> ...1
    """The highest entry of each row, to subtract before exponentials are summed; 0 where all lie in (-cap, cap), a range in
    which float32 neither overflows nor underflows. Without the maximum, a TPU takes the sum in the product that makes x."""
    top = x.max(axis=-1, keepdims=True)
    return top if cap is None or cap > 60 else jnp.zeros_like(top)


def rope_table(positions: Array, config: GemmaConfig) -> Any:  # BT -> [global, local][cos, sin]BTH/2
    """Cosines and sines of the RoPE angles, computed once for all layers: those of global layers, then those of local ones.

    float32, because bfloat16 cannot tell positions 256 and 257 apart. Two arrays in Gemma 4, whose heads have two sizes.
    """
    sizes = config.global_head_dim or config.head_dim, config.head_dim
    exponents = [np.arange(0, size, 2, dtype=np.float32) / np.float32(size) for size in sizes]
    bases = config.rope_base, config.rope_local_base
    rates = [np.float32(base) ** -exponent for base, exponent in zip(bases, exponents, strict=True)]
    rates[0] = rates[0] / np.float32(config.rope_factor)
    rates[0][int(config.rope_fraction * len(rates[0])) :] = 0  # these pairs do not turn
    angles = [positions[..., None].astype(jnp.float32) * rate for rate in rates]
    tables = [jnp.stack([jnp.cos(angle), jnp.sin(angle)]) for angle in angles]
    return jnp.stack(tables) if config.family < 4 else tables


def rotate(x: Array, table: Array) -> Array:  # BTNH, [cos, sin]BTH/2 -> BTNH
    """RoPE: rotate each pair (x[i], x[i + H/2]) by its angle. Computed in float32, returned in the dtype of x."""
    cos, sin = table[0][:, :, None], table[1][:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(q: Array, pieces: list[KV], positions: Array, window: Array, config: GemmaConfig, at) -> Array:
    """Attention with one softmax over the keys of all `pieces`, such as the prompt and the row's own tokens.  BTNH, BT -> BTA

    The softmax of each piece is computed over its own keys; then each piece is weighted by its share of the total, as in flash
    attention (arXiv 2205.14135). So is its backward pass: `remat="dots"` saves the result and the log of the total, from which
    the weights follow without another pass over the scores.
    """
    B, T, N, H = q.shape

    def forward(q, pieces, positions, window):
        found = [attend_piece(q, kv, positions, window, config, at) for kv in pieces]
        values, totals, tops = zip(*found, strict=True)
        top = tops[0] if len(pieces) == 1 else jnp.maximum(*tops)
        shares = [jnp.exp(piece_top - top) for piece_top in tops]
        total = sum((share * t for share, t in zip(shares, totals, strict=True)), jnp.zeros(()))
        mixed = sum((share * v for share, v in zip(shares, values, strict=True)), jnp.zeros(())) / total
        mixed = lax.reshape(mixed.astype(q.dtype), (B, T, N * H), out_sharding=at("BTA"))
        mixed, log_total = checkpoint_name((mixed, top + jnp.log(total)), "linear")
        return mixed, (q, pieces, positions, window, mixed, log_total)

    def backward(kept, dy):
        q, pieces, positions, window, mixed, log_total = kept
        dy, mixed = (lax.reshape(x, (B, T, N, H), out_sharding=at("BTNH")) for x in (dy, mixed))
        mean = (dy.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
        found = [attend_piece_backward(q, kv, positions, window, log_total, mean, dy, config, at) for kv in pieces]
        dq = sum((piece_dq for piece_dq, _, _ in found), jnp.zeros(())).astype(q.dtype)
        return dq, [KV(dk, dv, None, None) for _, dk, dv in found], None, None

    apply = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    apply.defvjp(forward, backward)
    return apply(q, pieces, positions, window)


def attend_piece(q: Array, kv: KV, positions: Array, window: Array, config: GemmaConfig, at) -> tuple[Array, Array, Array]:
    """Attention to one piece before normalization: sum of weighted values, sum of weights, and the highest score.

    Weights are exp(score - `highest` score). BTNH, (QKHS, QKSH, QS), BT -> BTNH, BTN1, BTN1, in float32. B is a multiple of Q:
    each row of keys is read by a group of G = B / Q consecutive rows of queries.
    """
    scores, visible = attention_scores(by_key_head(q, kv, at), kv, positions, window, config, at)
    scores = jnp.where(visible, scores, -1e30)
    top = highest(scores, config.attn_softcap)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    values = dot(weights.astype(kv.v.dtype), kv.v, (5,), (2,))  # QKGTRH
    return by_row(values, at), by_row(total, at), by_row(top, at)


def attend_piece_backward(
    q: Array, kv: KV, positions: Array, window: Array, log_total: Array, mean: Array, dy: Array, config: GemmaConfig, at
) -> tuple[Array, Array, Array]:
    """Gradients with respect to q, kv.k and kv.v. `dy` BTNH is that of the result, `mean` BTN1 the product of both."""
    q, dy, log_total, mean = (by_key_head(x, kv, at) for x in (q, dy, log_total, mean))
    scores, visible = attention_scores(q, kv, positions, window, config, at)
    weights = jnp.where(visible, jnp.exp(scores - log_total), 0.0)
    slope = 1.0 if config.attn_softcap is None else 1 - (scores / config.attn_softcap) ** 2
    dscores = weights * (dot(dy, kv.v, (5,), (3,)) - mean) * slope * config.query_scale
    weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
    dq = dot(dscores, kv.k, (5,), (3,))
    dk = dot(q, dscores, (2, 3, 4), (2, 3, 4)).astype(kv.k.dtype)
    dv = dot(weights, dy, (2, 3, 4), (2, 3, 4)).astype(kv.v.dtype)
    return by_row(dq, at), dk, dv


def attention_scores(
    q: Array, kv: KV, positions: Array, window: Array, config: GemmaConfig, at
) -> tuple[Array, Array]:  # QKGTRH -> QKGTRS, Q1GT1S
    """Soft-capped scores in float32, and which of them count."""
    Q, _, G, T, _, _ = q.shape
    scores = softcap(dot(q, kv.k, (5,), (2,)) * config.query_scale, config.attn_softcap)
    positions = lax.reshape(positions, (Q, G, T), out_sharding=at("QGT"))
    age = positions[..., None] - kv.positions[:, None, None]  # QGTS
    visible = (age >= 0) & (age < window)
    if kv.segments is not None:
        readers = [lax.reshape(each, (Q, G, T, 1), out_sharding=at("QGT.")) for each in kv.readers]
        visible &= reduce(jnp.logical_or, [each == kv.segments[:, None, None] for each in readers])
    return scores, visible[:, None, :, :, None]


def dot(x: Array, y: Array, of_x: tuple[int, ...], of_y: tuple[int, ...]) -> Array:  # QK..., QK... -> QK...
    """The products over dimensions `of_x` and `of_y`, one for each question and key head, in float32."""
    return lax.dot_general(x, y, ((of_x, of_y), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def by_key_head(x: Array, kv: KV, at) -> Array:  # BTN. -> QKGTR.
    """Heads and rows of queries grouped by the keys that they read."""
    (B, T, N, last), (Q, K) = x.shape, kv.k.shape[:2]
    return jnp.moveaxis(lax.reshape(x, (Q, B // Q, T, K, N // K, last), out_sharding=at("QGTKR.")), 3, 1)


def by_row(x: Array, at) -> Array:  # QKGTR. -> BTN.
    """The inverse of `by_key_head`."""
    Q, K, G, T, R, last = x.shape
    return lax.reshape(jnp.moveaxis(x, 1, 3), (Q * G, T, K * R, last), out_sharding=at("BTN."))


def attention_inputs(
    x: Array, w: Layers, table: Array, config: GemmaConfig, execution: ExecutionConfig
) -> tuple[Array, Any, Any]:
    """The first half of a layer: norm, projections and RoPE.  BTD -> queries BTNH, keys BTKH, values BTKH

    Keys and values are None in layers that share those of another.
    """
    B, T, _ = x.shape
    h = rms_norm(x, w.pre_attn_norm, config)

    def heads(weight, letters, count):
        return lax.reshape(
            linear(h, weight, letters, execution), (B, T, count, config.head_dim), out_sharding=execution.at("BTNH")
        )

    q = heads(w.q, "DA", config.num_heads)
    if w.k is None:
        return rotate(rms_norm(q, w.q_norm, config), table), None, None
    k = heads(w.k, "DE", config.num_kv_heads)
    v = k if w.v is None else heads(w.v, "DE", config.num_kv_heads)
    if config.qk_norms:
        q, k = rms_norm(q, w.q_norm, config), rms_norm(k, w.k_norm, config)
    if config.family == 4:
        v = rms_norm(v, None, config)
    return rotate(q, table), rotate(k, table), v


def attention_out_and_mlp(
    x: Array, w: Layers, mixed: Array, token: Any, config: GemmaConfig, execution: ExecutionConfig
) -> Array:
    """The second half of a layer: output projection, MLP, and both residual connections.  BTD, BTA -> BTD

    In Gemma 4 also the layer's own embedding of each `token`, BTU or None, and the factor of the result.
    """
    h = linear(mixed, w.o, "AD", execution)
    x = x + (rms_norm(h, w.post_attn_norm, config) if config.post_norms else h)
    h = rms_norm(x, w.pre_mlp_norm, config)
    h = jax.sharding.reshard(h, execution.at("MTd"))
    h = gated(linear(h, w.gate, "dF", execution), linear(h, w.up, "dF", execution))
    h = linear(h, w.down, "Fd", execution, out="BTd")
    x = x + (rms_norm(h, w.post_mlp_norm, config) if config.post_norms else h)
    if token is not None:
        h = activate(linear(x, w.layer_gate, "DU", execution), token)
        x = x + rms_norm(linear(h, w.layer_out, "UD", execution), w.post_layer_norm, config)
    return x if w.scale is None else x * lax.stop_gradient(w.scale).astype(x.dtype)


def activate(gate: Array, up: Array) -> Array:  # ...F, ...F -> ...F
    """gelu(gate) * up."""
    return jax.nn.gelu(gate, approximate=True) * up


# The same, with both gradients made together: apart, a TPU makes one in a pass of its own, not in the product before it.
gated = jax.custom_vjp(activate)
gated.defvjp(
    lambda gate, up: (activate(gate, up), (gate, up)),
    lambda kept, dy: lax.optimization_barrier(jax.vjp(activate, *kept)[1](dy)),
)


def embed(params: Params, tokens: Array, config: GemmaConfig, execution: ExecutionConfig) -> Array:  # BT -> BTD
    """Rows of the embedding table, times sqrt(D)."""
    scale = jnp.asarray(config.embed_dim**0.5, execution.dtype)  # rounded to the dtype, as transformers does
    return look_up(params.embedding, "Vd", tokens, execution) * scale


def look_up(table: Array, letters: str, tokens: Array, execution: ExecutionConfig) -> Array:  # Vd, BT -> BTd
    """Rows of a table that may be sharded over V.

    Then tokens are gathered to all devices, each device looks up the ones whose rows it holds, and a reduce-scatter sums the
    results back to where each token came from. The table itself does not move.
    """
    table = reshard(table, letters, execution.rules)
    sizes = jax.sharding.get_abstract_mesh().shape
    over = tuple(axis for axis in ROWS if axis in (execution.rules.V or ()) and sizes.get(axis, 1) > 1)
    if not over:
        return table.at[tokens].get(out_sharding=execution.at("BTd")).astype(execution.dtype)

    @partial(jax.shard_map, in_specs=(execution.at(letters), execution.at("BT")), out_specs=execution.at("BTd"))
    def lookup(table, tokens):
        tokens = lax.all_gather(tokens, over, tiled=True)
        mine = tokens - lax.axis_index(execution.rules.V) * len(table)
        found = (mine >= 0) & (mine < len(table))
        x = jnp.where(found[..., None], table[jnp.where(found, mine, 0)].astype(execution.dtype), 0)
        return lax.psum_scatter(x, over, tiled=True)

    return lookup(table, tokens)


def embed_per_layer(params: Params, tokens: Array, x: Array, config: GemmaConfig, execution: ExecutionConfig) -> Any:
    """Every layer's own embedding of each token, from its table and from the common embedding.  BT, BTD -> LBTU, or None"""
    if (own := params.per_layer) is None:
        return None

    def by_layer(rows: Array) -> Array:  # BTZ -> BTLU
        shape = (*tokens.shape, config.num_layers, config.per_layer_dim)
        return lax.reshape(rows, shape, out_sharding=execution.at("BTLU"))

    found = look_up(own.table, "VZ", tokens, execution) * jnp.asarray(config.per_layer_dim**0.5, execution.dtype)
    made = linear(x, own.projection, "DZ", execution) * config.embed_dim**-0.5
    made = rms_norm(by_layer(made), own.norm, config)
    return jnp.moveaxis((made + by_layer(found)) * 2**-0.5, 2, 0)


def scan_layers(
    step, carry, layers: Any, tokens: Any, config: GemmaConfig, execution: ExecutionConfig, learning: bool = True
) -> tuple[Any, Any]:  # fmt: skip
    """Run `step(kind, local, carry, index, weights, token, shared)` for each layer. -> the carry, the results of all steps

    `kind` is the configuration of layers of this shape, `local` (0 or 1) says whether the layer is one of those, `index` is its
    place among stacked keys and values, `token` its slice of `tokens` (LBTU or None), `shared` the result of the layer whose
    keys and values it shares, or None. `layers` is stacked on L, and compiles to one loop; or it is a tuple (`unstack`), and
    compiles to L copies of the body. Layers of several kinds compile to one loop over each run of equal periods. Results are
    stacked on L, in Gemma 4 in a dict: those of local and those of global layers that have keys and values. `learning` False
    says that there is no backward pass, and that results are not needed.
    """

    def body(*kind_and_local):
        run = partial(step, *kind_and_local)
        if execution.remat == "none":
            return run
        policies = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names("linear")}
        return jax.checkpoint(run, policy=policies[execution.remat], prevent_cse=False)

    if isinstance(layers, tuple):
        return unrolled_layers(body, carry, layers, tokens, config)
    if config.family == 4:
        return scan_periods(body, carry, layers, tokens, config, learning)
    run, local = body(config), jnp.array(config.local_layers, jnp.int32)

    def two_layers(carry, first):
        for i in (first, first + 1):
            carry, _ = run(local[i], carry, i, jax.tree.map(itemgetter(i), layers), None, None)
        return carry, None

    if not learning and len(local) % 2 == 0:  # half the trips: by a TPU's estimate 3% of a decode step
        return lax.scan(two_layers, carry, jnp.arange(0, len(local), 2))
    return lax.scan(lambda carry, x: run(x[2], carry, x[0], x[1], None, None), carry, (jnp.arange(len(local)), layers, local))


def unrolled_layers(body, carry, layers: tuple, tokens: Any, config: GemmaConfig):
    """`scan_layers` with a copy of the body for each layer; keys and values are tuples too, so `index` is the layer."""
    results: list[Any] = []
    local = jnp.array(config.local_layers, jnp.int32)
    for i, weights in enumerate(layers):
        kind, source = config.layer_kinds[i], config.kv_layer(i)
        run = body(config, local[i]) if kind == "" else body(config.kinds[kind], int(config.local_layers[i]))
        token, shared = None if tokens is None else tokens[i], None if source == i else results[source]
        carry, result = run(carry, source, weights, token, shared)
        results.append(result)

    def stacked(kind: str) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(results[i] for i in config.layers_of(kind)))

    own = {name: stacked(name) for name in config.kinds if not name.startswith("shared")}
    return carry, own.get("", own)


def scan_periods(body, carry, layers: dict[str, Layers], tokens: Any, config: GemmaConfig, learning: bool):
    """`scan_layers` for layers of several kinds.

    Weights are inputs of the loops, which then stack their gradients. Without a backward pass they are read where they lie: a
    TPU would copy those of a period for the loop inside it, at every decoded token.
    """
    results: dict[str, Any] = {}
    bodies = {name: body(kind, int(kind.local_layers[0])) for name, kind in config.kinds.items()}
    first = 0
    for period, repeats in config.periods:
        counts = Counter(period)

        def one_period(carry, x, period=period, counts=counts, results=results):
            number, weights, tokens = x
            found: dict[str, list] = {name: [] for name in counts}
            taken, done = Counter(), 0
            for name, run in groupby(period):  # layers of one kind in a row are a loop inside the loop
                source, size = name.removeprefix("shared_"), len(list(run))
                shared = jax.tree.map(itemgetter(-1), results[source]) if name != source else None

                def one_layer(carry, x, name=name, source=source, shared=shared):
                    i, w, token = x
                    place = number * counts[name] + i
                    index = place if name == source else config.kinds[source].num_layers - 1
                    w = w if learning else jax.tree.map(itemgetter(place), layers[name])
                    return bodies[name](carry, index, w, token, shared)

                here = slice(taken[name], taken[name] + size)
                own = jax.tree.map(itemgetter(here), weights[name]) if learning else None
                inputs = jnp.arange(here.start, here.stop), own, None if tokens is None else tokens[done : done + size]
                carry, result = lax.scan(one_layer, carry, inputs)
                found[name].append(result)
                taken[name] += size
                done += size
            return carry, {name: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each) for name, each in found.items()}

        def by_period(leaf, repeats=repeats):  # L... -> [repeats, layers of this kind in a period, ...]
            return reshape_first(leaf, (repeats, len(leaf) // repeats), 1)

        last = first + repeats * len(period)
        weights = {name: layers[name] for name in counts} if learning else None
        inputs = weights, None if tokens is None else tokens[first:last]
        carry, found = lax.scan(one_period, carry, (jnp.arange(repeats), *jax.tree.map(by_period, inputs)))
        results = results | jax.tree.map(lambda leaf: reshape_first(leaf, (leaf.shape[0] * leaf.shape[1],), 2), found)
        first = last
    return carry, {name: result for name, result in results.items() if not name.startswith("shared")}


def reshape_first(x: Array, sizes: tuple[int, ...], count: int) -> Array:
    """The first `count` dimensions, which are not sharded, as ones of these sizes."""
    shape, placed = (*sizes, *x.shape[count:]), jax.typeof(x).sharding
    return lax.reshape(x, shape, out_sharding=placed.update(spec=(*(None,) * len(sizes), *placed.spec[count:])))


def unstack(tree: Any, config: GemmaConfig, execution: ExecutionConfig, count: int | None = None) -> Any:
    """With `execution.unroll`, a tree stacked on L, or a dict of those for each kind, as a tuple of (the first) L trees."""
    if isinstance(tree, tuple) or not execution.unroll:
        return tree
    kinds, found = config.layer_kinds[:count], []
    for i, kind in enumerate(kinds):
        place = kinds[:i].count(kind)
        found.append(jax.tree.map(itemgetter(place), tree[kind] if kind else tree))
    return tuple(found)


def layer_window(local: Array, config: GemmaConfig) -> Array:  # 0 or 1 -> scalar
    """The attention window of a local or a global layer."""
    return jnp.where(local == 1, min(config.sliding_window, FAR), FAR)


def forward(
    params: Params, tokens: Array, positions: Array, config: GemmaConfig, execution: ExecutionConfig
) -> tuple[Array, KV]:
    """The plain causal model.  BT, BT -> hidden states BTD after the final norm, keys and values LBKSH of all layers.

    Padding has position FAR; its hidden states are meaningless.
    """
    table = rope_table(positions, config)

    def step(kind, local, x, _, w, token, shared):
        q, k, v = attention_inputs(x, w, table[local], kind, execution)
        if k is None:
            k, v = (jnp.swapaxes(each, 1, 2) for each in shared)
        kv = with_kv(KV(None, None, positions), k, v)
        mixed = attend(q, [kv], positions, layer_window(local, kind), kind, execution.at)
        return attention_out_and_mlp(x, w, mixed, token, kind, execution), (jnp.swapaxes(kv.k, 2, 3), kv.v)

    x = embed(params, tokens, config, execution)
    per_layer = embed_per_layer(params, tokens, x, config, execution)
    x, found = scan_layers(step, x, unstack(params.layers, config, execution), per_layer, config, execution)
    k, v = found if config.family < 4 else [{name: pair[i] for name, pair in found.items()} for i in (0, 1)]
    return rms_norm(x, params.final_norm, config), KV(k, v, positions)


def forward_group(
    params: Params, prompts: Array, lengths: Array, tokens: Array, config: GemmaConfig, execution: ExecutionConfig,
    positions: Array | None = None, segments: Array | None = None, owners: Array | None = None,
) -> Array:  # fmt: skip
    """The hidden states that predict each completion token, with each prompt computed once.  QP, Q, BC -> BCD

    Row b continues prompt b // (B / Q). It holds one completion, or several of the group packed one after another: then
    `positions` restart with each completion and `segments` number them (both BC). Equal to `forward` on each prompt with its
    completion.

    Several questions may share rows: then each row of `prompts` holds n prompts of P / n slots, their lengths are Qn, and
    `owners` BC says which of the n prompts a slot continues (padding: none of them).
    """
    (Q, P), (B, C), at = prompts.shape, tokens.shape, execution.at
    n = lengths.size // Q
    lengths = lax.reshape(lengths, (Q, n), out_sharding=at("Q."))
    starts = repeat(lengths, B // Q, at)
    positions = starts + jnp.arange(C) if positions is None else positions
    prompt_positions = lax.reshape(prompt_slots(lengths, P // n), (Q, P), out_sharding=at("QP"))
    segments, owners = (jnp.zeros_like(tokens) if x is None else x for x in (segments, owners))
    table = rope_table(join_rows(prompt_positions, positions, at), config)

    def with_prompts(of_prompts, own):  # QP..., BC... -> B, P + C, ...: a row attends to a copy of its prompts and to itself
        own = jax.sharding.reshard(own, at("BC" + "." * (own.ndim - 2)))
        return jnp.concatenate([repeat(of_prompts, B // Q, at), own], axis=1)

    numbers = jax.sharding.reshard(-1 - jnp.broadcast_to(jnp.arange(P) // (P // n), (Q, P)), at("QP"))  # segments of prompts
    prompt = KV(None, None, prompt_positions, numbers, (numbers,))
    readers = segments, -1 - owners
    row = KV(None, None, with_prompts(prompt_positions, positions), with_prompts(numbers, segments), readers)

    def step(kind, local, x, _, w, token, shared):
        q, k, v = attention_inputs(x, w, table[local], kind, execution)
        if k is None:
            k, v = shared
        window, q_own = layer_window(local, kind), split_rows(q, P, B, at)
        of_row = [with_prompts(side[:, :P], split_rows(side, P, B, at)) for side in (k, v)]
        mixed = join_rows(
            attend(q[:, :P], [with_kv(prompt, k[:, :P], v[:, :P])], prompt_positions, window, kind, at),
            attend(q_own, [with_kv(row, *of_row)], positions, window, kind, at),
            at,
        )
        return attention_out_and_mlp(x, w, mixed, token, kind, execution), (k, v) if config.shared_layers else None

    ids = join_rows(prompts, tokens, at)
    x = embed(params, ids, config, execution)
    per_layer = embed_per_layer(params, ids, x, config, execution)
    x, _ = scan_layers(step, x, unstack(params.layers, config, execution), per_layer, config, execution)
    before = jnp.roll(split_rows(x, P, B, at), 1, axis=1)
    for i in range(n):
        last = repeat(last_slot(x[:, i * P // n : (i + 1) * P // n], lengths[:, i]), B // Q, at)[:, None]
        before = jnp.where(((positions == starts[:, i : i + 1]) & (owners == i))[..., None], last, before)
    return rms_norm(before, params.final_norm, config)


def with_kv(kv: KV, k: Array, v: Array) -> KV:  # BSKH, BSKH -> BKHS, BKSH
    """The same slots with these keys and values."""
    return replace(kv, k=jnp.moveaxis(k, 1, 3), v=jnp.moveaxis(v, 1, 2))


def join_rows(prompts: Array, rows: Array, at) -> Array:
    """Each prompt followed by all rows of its group, so that each product runs once.  QP..., BC... -> Q, P + (B/Q)C, ..."""
    Q, (B, C) = len(prompts), rows.shape[:2]
    rows = lax.reshape(rows, (Q, B // Q * C, *rows.shape[2:]), out_sharding=at("Q." + "." * (rows.ndim - 2)))
    return jnp.concatenate([jax.sharding.reshard(prompts, jax.typeof(rows).sharding), rows], axis=1)


def split_rows(x: Array, P: int, B: int, at) -> Array:
    """The inverse of `join_rows`, without the prompts.  Q, P + (B/Q)C, ... -> BC..."""
    C = (x.shape[1] - P) * len(x) // B
    return lax.reshape(x[:, P:], (B, C, *x.shape[2:]), out_sharding=at("BC" + "." * (x.ndim - 2)))


def prompt_slots(lengths: Array, width: int) -> Array:  # Q -> QP
    """Positions of right-padded prompts: 0, 1, ... for tokens and FAR for padding."""
    slots = jnp.arange(width)
    return jnp.where(slots < lengths[..., None], slots, FAR)


def last_slot(hidden: Array, lengths: Array) -> Array:  # QPD, Q -> QD
    """The hidden state of each prompt's last token."""
    chosen = jnp.arange(hidden.shape[1]) == lengths[:, None] - 1
    return jnp.where(chosen[..., None], hidden, 0).sum(axis=1)


def repeat(x: Array, times: int, at) -> Array:  # Q... -> B...
    """Each row `times` times in a row: from one row per question to one per completion."""
    grouped = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
    return lax.reshape(grouped, (x.shape[0] * times, *x.shape[1:]), out_sharding=at("B" + "." * (x.ndim - 1)))


def vocab_logits(hidden: Array, params: Params, config: GemmaConfig, execution: ExecutionConfig) -> Array:
    """Soft-capped logits over the vocabulary, in float32.  BTD -> WTV"""
    hidden = jax.sharding.reshard(hidden, execution.at("WTd"))
    head = params.embedding.T if params.head is None else params.head
    logits = linear(hidden, head, "dV", execution, dtype="float32")
    return softcap(logits, config.final_softcap)


def pick_logprobs(logits: Array, tokens: Array, temperature: Array, cap: float | None = None) -> Array:
    """log softmax(logits / temperature) at `tokens`.  ...V, ..., ... -> ...   `cap` bounds |logits / temperature|, if known.

    This defines the log-probabilities of trainer and reference. The sampler's `draw` computes the same, up to rounding, from
    values that it has at hand. Temperature 0 (greedy) counts as 1. A masked sum picks the token, because V may be sharded. The
    backward pass needs the logits and the log of the total ("log_total"), and sums nothing over V again.
    """

    def scaled(logits, tokens, temperature):
        divisor = jnp.where(temperature > 0, temperature, 1.0)[..., None]
        return logits / divisor, jnp.arange(logits.shape[-1]) == tokens[..., None], divisor

    def forward(logits, tokens, temperature):
        divided, chosen, _ = scaled(logits, tokens, temperature)
        top = highest(divided, cap)
        log_total = checkpoint_name(top[..., 0] + jnp.log(jnp.exp(divided - top).sum(axis=-1)), "log_total")
        return jnp.where(chosen, divided, 0.0).sum(axis=-1) - log_total, (logits, tokens, temperature, log_total)

    def backward(kept, dy):
        logits, tokens, temperature, log_total = kept
        divided, chosen, divisor = scaled(logits, tokens, temperature)
        return dy[..., None] * (chosen - jnp.exp(divided - log_total[..., None])) / divisor, None, None

    apply = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    apply.defvjp(forward, backward)
    return apply(logits, tokens, temperature)


def chunk_size(slots: int, most: int) -> int:
    """The slots of a row that `token_logprobs` takes at a time: all, or a multiple of 8 (a TPU's tile) that pads few."""
    count = -(-slots // most)
    if count == 1 or most < 8:
        return -(-slots // count)
    return min(range(8 * (most // 8), most // 2, -8), key=lambda size: -(-slots // size) * size)


def token_logprobs(
    params: Params, hidden: Array, tokens: Array, temperature: float, config: GemmaConfig, execution: ExecutionConfig,
    chunk: int,
) -> Array:  # fmt: skip
    """Log-probabilities of `tokens` from the hidden states that predict them.  BCD, BC -> BC

    Processes `chunk` slots of every row at a time and recomputes their logits in the backward pass, so the logits BCV (1 MB per
    token in float32 for Gemma) never exist at once. With `chunk` >= C they do, and nothing is recomputed.
    """
    B, C, _ = hidden.shape
    chunk = chunk_size(C, chunk)
    count = -(-C // chunk)
    padding = count * chunk - C
    cap = config.final_softcap
    if cap is not None:  # the bound is unknown inside a program that takes the temperature as an argument
        cap = cap / (temperature or 1.0) if isinstance(temperature, int | float) else None

    def chunks(x):  # BC... -> [count, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, chunk, *x.shape[2:]), 1, 0)

    def body(_, xs):
        hidden, tokens = xs
        tokens = jax.sharding.reshard(tokens, execution.at("WT"))
        picked = pick_logprobs(vocab_logits(hidden, params, config, execution), tokens, jnp.asarray(temperature), cap)
        return None, jax.sharding.reshard(picked, execution.at("BT"))

    if count > 1:
        kept = jax.checkpoint_policies.save_only_these_names("log_total")
        body = jax.checkpoint(body, policy=kept, prevent_cse=False)
    _, picked = lax.scan(body, None, (chunks(hidden), chunks(tokens)))
    return jnp.moveaxis(picked, 0, 1).reshape(B, count * chunk)[:, :C]
