"""Gemma 1, 2 and 3 (text) as pure functions over a tree of stacked weights.

A letter means one thing everywhere: in einsum strings, in `axes`, in sharding rules and in shape comments.

    L layers            Q questions (prompts)        N query heads          F hidden width of the MLP
    D embedding width   G completions a question     K key/value heads      V vocabulary
    B rows = Q*G        P prompt slots               R = N/K                A = N*H, all query heads
    T tokens in a call  C completion slots           H head size            E = K*H, all key/value heads
    S key slots         J rank of an adapter
    M rows in the MLP, W rows at the head: both are B, laid out otherwise (sharding.py)

Three drivers share the layer's two halves, `project` and `finish`:

    forward          tokens -> hidden states, and the keys and values for later      (prefill; the plain model)
    forward_group    prompts once, each read by its G completions -> hidden states   (training, reference)
    forward_cached   one token a row against prompt and completion caches            (decoding: reads every weight once)

A slot's position decides what sees it: a query at position q sees a key at position k when 0 <= q - k < window. Padding
sits at position FAR, in the future of every token, so there is no other mask. Left out: images, dropout, biases.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from models.sharding import ROWS, TRAIN, Rules, reshard, spec, transposed

FAR = 2**30


@dataclass(frozen=True)
class GemmaConfig:
    """The dimensions of one model; `convert.read_config` fills it from a `config.json`."""

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    query_scale: float  # multiplies q; query_pre_attn_scalar ** -0.5
    local_layers: tuple[bool, ...]  # which layers attend within `sliding_window` only
    sliding_window: int = FAR
    rope_base: float = 10_000.0
    rope_local_base: float = 10_000.0
    rope_factor: float = 1.0  # positions of global layers are divided by it
    attn_softcap: float | None = None
    final_softcap: float | None = None
    post_norms: bool = False
    qk_norms: bool = False
    norm_eps: float = 1e-6

    @property
    def family(self) -> int:
        """Gemma 1, 2 or 3."""
        return 3 if self.qk_norms else 2 if self.post_norms else 1

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter that a weight has."""
        return dict(
            L=self.num_layers, D=self.embed_dim, d=self.embed_dim, F=self.mlp_dim, V=self.vocab_size, H=self.head_dim,
            A=self.num_heads * self.head_dim, E=self.num_kv_heads * self.head_dim,
        )  # fmt: skip


@dataclass(frozen=True)
class ExecutionConfig:
    """How a forward pass runs: where arrays lie, in which dtype, what the backward pass keeps, whether layers are unrolled."""

    rules: Rules = TRAIN
    dtype: str = "float32"
    remat: str = "none"  # none | dots | full: what the backward pass recomputes
    unroll: bool = False  # the layers: faster on a CPU, slower to compile

    def at(self, letters: str):
        return spec(letters, self.rules)

    def use(self, weights, letters):
        """A weight as a layer uses it: in the compute dtype, where the rules want it."""
        return reshard(jax.tree.map(lambda leaf: leaf.astype(self.dtype), weights), letters, self.rules)


@flax.struct.dataclass
class Layers:
    pre_attn_norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    pre_mlp_norm: Any
    gate: Any
    up: Any
    down: Any
    post_attn_norm: Any = None  # Gemma 2, 3
    post_mlp_norm: Any = None  # Gemma 2, 3
    q_norm: Any = None  # Gemma 3
    k_norm: Any = None  # Gemma 3


@flax.struct.dataclass
class Adapted:
    """A frozen projection and the adapter on it (lora.py), for what they are together: base + scale * a @ b."""

    base: Any  # LDF
    a: Any  # LDJ
    b: Any  # LJF
    scale: float = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Params:
    embedding: Any
    layers: Any  # Layers, stacked on L; or, to be unrolled, a tuple of them (`unstack`)
    final_norm: Any
    head: Any = None  # the embedding transposed, where it is worth a copy (`unstack`)


@flax.struct.dataclass
class KV:
    """Keys and values of some slots, and the positions they sit at. Stacked over layers, k and v have a leading L."""

    k: Any  # BKHS: each as the products of attention read it. Stacked, it rests as v does
    v: Any  # BKSH
    positions: Array  # BS
    segments: Any = None  # BS, when a row holds several texts that must not see each other


def axes(config: GemmaConfig) -> Params:
    """The letters of every weight: its shape by `config.sizes`, its sharding by a rule set.

    A lower-case letter is the same dimension, never cut.
    """
    layers = Layers(
        pre_attn_norm="Ld", q="LDA", k="LDE", v="LDE", o="LAD", pre_mlp_norm="Ld", gate="LdF", up="LdF", down="LFd",
        post_attn_norm="Ld" if config.post_norms else None, post_mlp_norm="Ld" if config.post_norms else None,
        q_norm="LH" if config.qk_norms else None, k_norm="LH" if config.qk_norms else None,
    )  # fmt: skip
    return Params(embedding="Vd", layers=layers, final_norm="d")


def shapes(config: GemmaConfig, dtype: str = "float32") -> Params:
    """The tree of `jax.ShapeDtypeStruct` that a checkpoint must match."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct([config.sizes[c] for c in a], jnp.dtype(dtype)), axes(config))


def init_params(key: Array, config: GemmaConfig, rules: Rules, dtype: str = "float32") -> Params:
    """Random weights, each matrix normal with variance 1 / (its input width), made where they will lie."""

    def init(key):
        leaves, tree = jax.tree.flatten(axes(config))
        made = []
        for i, letters in enumerate(leaves):
            shape = [config.sizes[letter] for letter in letters]
            scale = 0.0 if letters in ("Ld", "LH", "d") else 0.02 if letters == "Vd" else shape[-2] ** -0.5
            made.append((scale * jax.random.normal(jax.random.fold_in(key, i), shape)).astype(dtype))
        return reshard(jax.tree.unflatten(tree, made), axes(config), rules)

    return jax.jit(init)(key)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:  # ...D, D -> ...D
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = scale.astype(x.dtype).astype(jnp.float32)  # rounded as the sampler's weights are
    return (x32 * (1 + scale)).astype(x.dtype)


def linear(
    x: Array, weight: Any, letters: str, execution: ExecutionConfig, out: str | None = None, dtype: str | None = None
) -> Array:
    """x @ weight, a matrix or an `Adapted` one; `remat="dots"` keeps it.  ...D, DF -> ...F"""
    if isinstance(weight, Adapted):
        narrow = weight.scale * product(x, weight.a, letters[0] + "J", execution)
        wide = product(narrow, weight.b, "J" + letters[1], execution, out, dtype)
        y = product(x, weight.base, letters, execution, out, dtype) + wide
    else:
        y = product(x, weight, letters, execution, out, dtype)
    return checkpoint_name(y, "linear")


def product(
    x: Array, weight: Array, letters: str, execution: ExecutionConfig, out: str | None = None, dtype: str | None = None
) -> Array:
    """x @ weight, where the rules want its result, in `dtype` (the one of x).  ...D, DF -> ...F

    The backward pass is written out for two reasons. It keeps the weight as stored and casts and gathers it again, so that no
    gathered weight waits for it. And the weight's gradient is xᵀ·dy, summed straight into the stored layout: automatic
    differentiation has dyᵀ·x, which transposes the larger of the two.
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
        stored = jax.typeof(weight).sharding
        if x.shape[-1] <= dy.shape[-1]:
            dw = jnp.einsum("...D,...F->DF", x, dy, out_sharding=stored)
        else:
            dw = jnp.einsum("...F,...D->FD", dy, x, out_sharding=transposed(stored)).T
        return dx, dw.astype(weight.dtype)

    apply = jax.custom_vjp(forward)
    apply.defvjp(lambda x, weight: (forward(x, weight), (x, weight)), backward)
    return apply(x, weight)


def softcap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_table(positions: Array, config: GemmaConfig) -> Array:  # BT -> [global, local][cos, sin]BTH/2
    """Angles of both kinds of layer, once for all layers; float32, as bfloat16 cannot tell positions 256 and 257 apart."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    rates = [np.float32(base) ** -exponents for base in (config.rope_base, config.rope_local_base)]
    rates[0] = rates[0] / np.float32(config.rope_factor)
    angles = [positions[..., None].astype(jnp.float32) * rate for rate in rates]
    return jnp.stack([jnp.stack([jnp.cos(angle), jnp.sin(angle)]) for angle in angles])


def rotate(x: Array, table: Array) -> Array:  # BTNH, [cos, sin]BTH/2 -> BTNH
    cos, sin = table[0][:, :, None], table[1][:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(q: Array, pieces: list[KV], positions: Array, window: Array, config: GemmaConfig, at) -> Array:
    """One softmax over the keys of all `pieces` (the group's prompt, the row's own tokens).  BTNH -> BTA

    Each piece has its own softmax, over its own keys; the pieces are then weighted by their share of the whole sum.
    """
    B, T, N, H = q.shape
    values, totals, tops = zip(*(attend_piece(q, kv, positions, window, config, at) for kv in pieces), strict=True)
    top = lax.stop_gradient(tops[0] if len(pieces) == 1 else jnp.maximum(*tops))
    shares = [jnp.exp(piece_top - top) for piece_top in tops]
    total = sum((share * t for share, t in zip(shares, totals, strict=True)), jnp.zeros(()))
    mixed = sum((share * v for share, v in zip(shares, values, strict=True)), jnp.zeros(())) / total
    return lax.reshape(mixed.astype(q.dtype), (B, T, N * H), out_sharding=at("BTA"))


def attend_piece(q: Array, kv: KV, positions: Array, window: Array, config: GemmaConfig, at) -> tuple[Array, Array, Array]:
    """Attention before its division: sum of weighted values, sum of weights, the score both are relative to.

    BTNH, (QKHS, QKSH, QS), BT -> BTNH, BTN1, BTN1, float32. B may be a multiple of the rows of `kv`: then each row of keys is
    read by a group of G consecutive rows of queries.
    """
    B, T, N, H = q.shape
    Q, K = kv.k.shape[:2]
    q = jnp.moveaxis(lax.reshape(q, (Q, B // Q, T, K, N // K, H), out_sharding=at("QGTKRH")), 3, 1)
    scores = lax.dot_general(q, kv.k, (((5,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)  # QKGTRS
    scores = softcap(scores * config.query_scale, config.attn_softcap)
    positions = lax.reshape(positions, (Q, B // Q, T), out_sharding=at("QGT"))
    age = positions[..., None] - kv.positions[:, None, None]  # QGTS
    visible = (age >= 0) & (age < window)
    if kv.segments is not None:  # then queries and keys are the same slots
        visible &= (kv.segments[:, :, None] == kv.segments[:, None])[:, None]
    scores = jnp.where(visible[:, None, :, :, None], scores, -1e30)
    top = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    values = lax.dot_general(
        weights.astype(kv.v.dtype), kv.v, (((5,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )  # QKGTRH

    def rows(x):  # QKGTR. -> BTN.
        return lax.reshape(jnp.moveaxis(x, 1, 3), (B, T, N, x.shape[-1]), out_sharding=at("BTN."))

    return rows(values), rows(total), rows(top)


def attention_inputs(
    x: Array, w: Layers, table: Array, config: GemmaConfig, execution: ExecutionConfig
) -> tuple[Array, Array, Array]:
    """What comes before a layer's attention: queries, keys and values.  BTD -> BTNH, BTKH, BTKH"""
    B, T, _ = x.shape
    h = rms_norm(x, w.pre_attn_norm, config.norm_eps)

    def heads(weight, letters, count):
        return lax.reshape(
            linear(h, weight, letters, execution), (B, T, count, config.head_dim), out_sharding=execution.at("BTNH")
        )

    N, K = config.num_heads, config.num_kv_heads
    q, k, v = heads(w.q, "DA", N), heads(w.k, "DE", K), heads(w.v, "DE", K)
    if config.qk_norms:
        q, k = rms_norm(q, w.q_norm, config.norm_eps), rms_norm(k, w.k_norm, config.norm_eps)
    return rotate(q, table), rotate(k, table), v


def attention_out_and_mlp(x: Array, w: Layers, mixed: Array, config: GemmaConfig, execution: ExecutionConfig) -> Array:
    """What comes behind a layer's attention: its output projection, and the MLP.  BTD, BTA -> BTD"""
    h = linear(mixed, w.o, "AD", execution)
    x = x + (rms_norm(h, w.post_attn_norm, config.norm_eps) if config.post_norms else h)
    h = rms_norm(x, w.pre_mlp_norm, config.norm_eps)
    h = jax.sharding.reshard(h, execution.at("MTd"))
    h = jax.nn.gelu(linear(h, w.gate, "dF", execution), approximate=True) * linear(h, w.up, "dF", execution)
    h = linear(h, w.down, "Fd", execution, out="BTd")
    return x + (rms_norm(h, w.post_mlp_norm, config.norm_eps) if config.post_norms else h)


def embed(params: Params, tokens: Array, config: GemmaConfig, execution: ExecutionConfig) -> Array:  # BT -> BTD
    """Each token's row of the table, whose rows are cut over devices: tokens travel to the rows, what they find travels back.

    Every device looks up the tokens of all, and finds those it holds; the sum over devices is taken where the token came from.
    """
    table = reshard(params.embedding, "Vd", execution.rules)
    sizes = jax.sharding.get_abstract_mesh().shape
    over = tuple(axis for axis in ROWS if axis in (execution.rules.V or ()) and sizes.get(axis, 1) > 1)
    scale = jnp.asarray(config.embed_dim**0.5, execution.dtype)  # rounded to the dtype, as transformers does
    if not over:
        return table.at[tokens].get(out_sharding=execution.at("BTd")).astype(execution.dtype) * scale

    @partial(jax.shard_map, in_specs=(execution.at("Vd"), execution.at("BT")), out_specs=execution.at("BTd"))
    def lookup(table, tokens):
        tokens = lax.all_gather(tokens, over, tiled=True)
        mine = tokens - lax.axis_index(execution.rules.V) * len(table)
        found = (mine >= 0) & (mine < len(table))
        x = jnp.where(found[..., None], table[jnp.where(found, mine, 0)].astype(execution.dtype), 0)
        return lax.psum_scatter(x, over, tiled=True)

    return lookup(table, tokens) * scale


def scan_layers(step, carry, layers: Any, extra: Any, config: GemmaConfig, execution: ExecutionConfig):
    """Run `step(carry, i, weights, is_local, extra)` for each layer i; `extra` is stacked on L, or apart, as `layers` is.

    Stacked layers make a loop of the compiled program, layers apart (`unstack`) one copy of its body for each.
    """
    if execution.remat != "none":
        policies = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names("linear")}
        step = jax.checkpoint(step, policy=policies[execution.remat], prevent_cse=False)
    local = jnp.array(config.local_layers, jnp.int32)
    if not isinstance(layers, tuple):
        return lax.scan(lambda carry, x: step(carry, *x), carry, (jnp.arange(len(local)), layers, local, extra))
    results = []
    for i, weights in enumerate(layers):
        carry, result = step(carry, i, weights, local[i], extra and extra[i])
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def unroll(params: Params, config: GemmaConfig, execution: ExecutionConfig) -> Params:
    """Weights for a loop to use again and again: layers apart, the head as the product reads it fastest."""
    head = lax.optimization_barrier(params.embedding.T)
    return replace(params, layers=unstack(params.layers, config, execution), head=head) if execution.unroll else params


def unroll_kv(kv: KV, execution: ExecutionConfig) -> KV:
    """Keys and values, stacked on L, for the same loop: LBKSH, LBKSH -> L of BKHS, L of BKSH."""
    return KV(tuple(jnp.swapaxes(k, 2, 3) for k in kv.k), tuple(kv.v), kv.positions) if execution.unroll else kv


def unstack(tree: Any, config: GemmaConfig, execution: ExecutionConfig) -> Any:
    """Where layers are to be unrolled: one tree for each, out of one whose leaves are stacked on L."""
    if isinstance(tree, tuple) or not execution.unroll:
        return tree
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(config.num_layers))


def layer_window(local: Array, config: GemmaConfig) -> Array:
    return jnp.where(local == 1, min(config.sliding_window, FAR), FAR)


def forward(
    params: Params, tokens: Array, positions: Array, config: GemmaConfig, execution: ExecutionConfig
) -> tuple[Array, KV]:
    """The plain causal model.  BT, BT -> hidden BTD after the final norm, and the keys and values of all layers.

    A padded slot has position FAR; what comes out there means nothing.
    """
    table = rope_table(positions, config)

    def step(x, _, w, local, __):
        q, k, v = attention_inputs(x, w, table[local], config, execution)
        kv = KV(jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2), positions)
        mixed = attend(q, [kv], positions, layer_window(local, config), config, execution.at)
        return attention_out_and_mlp(x, w, mixed, config, execution), (jnp.swapaxes(kv.k, 2, 3), kv.v)

    x = embed(params, tokens, config, execution)
    x, (k, v) = scan_layers(step, x, unstack(params.layers, config, execution), None, config, execution)
    return rms_norm(x, params.final_norm, config.norm_eps), KV(k, v, positions)


def forward_group(
    params: Params, prompts: Array, lengths: Array, tokens: Array, config: GemmaConfig, execution: ExecutionConfig,
    positions: Array | None = None, segments: Array | None = None,
) -> Array:  # fmt: skip
    """Hidden states that predict each completion token, each prompt computed once.  QP, Q, BC -> BCD

    Row b continues prompt b // (B / Q) with one completion, or with several of the group packed one behind the other: then
    `positions` restart at each completion, and `segments` tell the completions apart (both BC). Equal to `forward` on every
    prompt + completion written out.
    """
    (Q, P), (B, C), at = prompts.shape, tokens.shape, execution.at
    starts = repeat(lengths, B // Q, at)[:, None]
    positions = starts + jnp.arange(C) if positions is None else positions
    prompt_positions = prompt_slots(lengths, P)
    table = rope_table(join_rows(prompt_positions, positions, at), config)

    def step(x, _, w, local, __):
        q, k, v = attention_inputs(x, w, table[local], config, execution)
        window = layer_window(local, config)
        shared = KV(jnp.moveaxis(k[:, :P], 1, 3), jnp.moveaxis(v[:, :P], 1, 2), prompt_positions)
        q_own, k_own, v_own = (split_rows(side, P, B, at) for side in (q, k, v))
        own = KV(jnp.moveaxis(k_own, 1, 3), jnp.moveaxis(v_own, 1, 2), positions, segments)
        mixed = join_rows(
            attend(q[:, :P], [shared], prompt_positions, window, config, at),
            attend(q_own, [shared, own], positions, window, config, at),
            at,
        )
        return attention_out_and_mlp(x, w, mixed, config, execution), None

    x = embed(params, join_rows(prompts, tokens, at), config, execution)
    x, _ = scan_layers(step, x, unstack(params.layers, config, execution), None, config, execution)
    last = repeat(last_slot(x[:, :P], lengths), B // Q, at)[:, None]
    before = jnp.where((positions == starts)[..., None], last, jnp.roll(split_rows(x, P, B, at), 1, axis=1))
    return rms_norm(before, params.final_norm, config.norm_eps)


def join_rows(prompts: Array, rows: Array, at) -> Array:
    """A prompt and the slots of all its rows in one line: each product runs once.  QP..., BC... -> Q, P + (B/Q)C, ..."""
    Q, (B, C) = len(prompts), rows.shape[:2]
    rows = lax.reshape(rows, (Q, B // Q * C, *rows.shape[2:]), out_sharding=at("Q." + "." * (rows.ndim - 2)))
    return jnp.concatenate([jax.sharding.reshard(prompts, jax.typeof(rows).sharding), rows], axis=1)


def split_rows(x: Array, P: int, B: int, at) -> Array:
    """The rows that `join_rows` put behind the P slots of each prompt.  Q, P + (B/Q)C, ... -> BC..."""
    C = (x.shape[1] - P) * len(x) // B
    return lax.reshape(x[:, P:], (B, C, *x.shape[2:]), out_sharding=at("BC" + "." * (x.ndim - 2)))


def forward_cached(
    params: Params, tokens: Array, slot: Array, prefix: KV, cache: KV, config: GemmaConfig, execution: ExecutionConfig
) -> tuple[Array, KV]:
    """One token a row, written to `slot` of the cache.  B, scalar, (LQKPH, QP), (LBKCH, BC) -> hidden BD, cache

    Their positions stand in the cache already. Layers, prefix and cache are stacked on L, or apart (`unroll`, `unroll_kv`).
    """
    positions = lax.dynamic_slice_in_dim(cache.positions, slot, 1, axis=1)
    table = lax.optimization_barrier(rope_table(positions, config))  # else a CPU computes sines anew for each head
    apart = isinstance(params.layers, tuple)

    def step(carry, layer, w, local, shared):
        x, all_k, all_v = carry
        q, k, v = attention_inputs(x, w, table[local], config, execution)
        all_k, k = write_slot(all_k, layer, jnp.moveaxis(k, 1, 3 if apart else 2), slot, axis=3 if apart else 2)
        all_v, v = write_slot(all_v, layer, jnp.moveaxis(v, 1, 2), slot, axis=2)
        keys = (shared[0], k) if apart else (jnp.swapaxes(shared[0], 2, 3), jnp.swapaxes(k, 2, 3))
        pieces = [KV(keys[0], shared[1], prefix.positions), KV(keys[1], v, cache.positions)]
        mixed = attend(q, pieces, positions, layer_window(local, config), config, execution.at)
        return (attention_out_and_mlp(x, w, mixed, config, execution), all_k, all_v), None

    shared = tuple(zip(prefix.k, prefix.v, strict=True)) if apart else [prefix.k, prefix.v]
    carry = embed(params, tokens[:, None], config, execution), cache.k, cache.v
    (x, k, v), _ = scan_layers(step, carry, params.layers, shared, config, execution)
    return rms_norm(x[:, 0], params.final_norm, config.norm_eps), KV(k, v, cache.positions)


def write_slot(cache: Any, layer: Any, new: Array, slot: Array, axis: int) -> tuple[Any, Array]:
    """`new` into one slot of one layer's cache: all layers' cache, and that layer's."""
    where: list[Any] = [0, 0, 0, 0]
    where[axis] = slot
    if isinstance(cache, tuple):
        own = lax.dynamic_update_slice(cache[layer], new, where)
        return (*cache[:layer], own, *cache[layer + 1 :]), own
    cache = lax.dynamic_update_slice(cache, new[None], (layer, *where))
    return cache, cache[layer]


def prompt_slots(lengths: Array, width: int) -> Array:  # Q -> QP
    """Positions of right-padded prompts: 0, 1, ... and FAR from each prompt's length on."""
    slots = jnp.arange(width)
    return jnp.where(slots < lengths[:, None], slots, FAR)


def last_slot(hidden: Array, lengths: Array) -> Array:  # QPD, Q -> QD
    chosen = jnp.arange(hidden.shape[1]) == lengths[:, None] - 1
    return jnp.where(chosen[..., None], hidden, 0).sum(axis=1)


def repeat(x: Array, times: int, at) -> Array:  # Q... -> B...
    """Each row `times` times in a row: what is true of a question holds for its group."""
    grouped = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
    return lax.reshape(grouped, (x.shape[0] * times, *x.shape[1:]), out_sharding=at("B" + "." * (x.ndim - 1)))


def vocab_logits(hidden: Array, params: Params, config: GemmaConfig, execution: ExecutionConfig) -> Array:
    """float32 logits over the vocabulary, soft-capped.  BTD -> WTV"""
    hidden = jax.sharding.reshard(hidden, execution.at("WTd"))
    head = params.embedding.T if params.head is None else params.head
    logits = linear(hidden, head, "dV", execution, dtype="float32")
    return softcap(logits, config.final_softcap)


def pick_logprobs(logits: Array, tokens: Array, temperature: Array) -> Array:
    """log softmax(logits / temperature) at `tokens`.  ...V, ..., ... -> ...

    The definition of a log-probability for reference and trainer; the sampler's `draw` has the same from what it has computed
    anyway, to rounding. Temperature 0 (greedy) counts as 1.
    A masked sum picks the token, so that V may stay cut over devices.
    """
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)[..., None]
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], logits, 0.0).sum(axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_logprobs(
    params: Params,
    hidden: Array,
    tokens: Array,
    temperature: float,
    config: GemmaConfig,
    execution: ExecutionConfig,
    chunk: int,
):
    """Log-probabilities of `tokens` from the hidden states that predict them.  BCD, BC -> BC

    Works on `chunk` slots of every row at a time and recomputes them in the backward pass: the [B, C, V] logits, 1 MB a token
    in float32 for Gemma, never exist at once. With `chunk` >= C they do, and nothing is recomputed.
    """
    B, C, _ = hidden.shape
    count = -(-C // chunk)
    chunk = -(-C // count)
    padding = count * chunk - C

    def chunks(x):  # BC... -> count, B, chunk...
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, chunk, *x.shape[2:]), 1, 0)

    def body(_, xs):
        hidden, tokens = xs
        tokens = jax.sharding.reshard(tokens, execution.at("WT"))
        picked = pick_logprobs(vocab_logits(hidden, params, config, execution), tokens, jnp.asarray(temperature))
        return None, jax.sharding.reshard(picked, execution.at("BT"))

    if count > 1:
        body = jax.checkpoint(body, prevent_cse=False)
    _, picked = lax.scan(body, None, (chunks(hidden), chunks(tokens)))
    return jnp.moveaxis(picked, 0, 1).reshape(B, count * chunk)[:, :C]
