"""Gemma 1, 2 and 3 (text) as pure functions over a tree of stacked weights.

A letter means one thing everywhere: in einsum strings, in `axes`, in sharding rules and in shape comments.

    L layers            Q questions (prompts)        N query heads          F hidden width of the MLP
    D embedding width   G completions a question     K key/value heads      V vocabulary
    B rows = Q*G        P prompt slots               R = N/K                A = N*H, all query heads
    T tokens in a call  C completion slots           H head size            E = K*H, all key/value heads
    S key slots         M rows in the MLP, W rows at the head (both are B, laid out otherwise; see sharding.py)

Three drivers share the layer's two halves, `project` and `finish`:

    forward          tokens -> hidden states, and the keys and values for later      (prefill; the plain model)
    forward_group    prompts once, each read by its G completions -> hidden states   (training, reference)
    forward_cached   one token a row against prompt and completion caches            (decoding: reads every weight once)

A slot's position decides what sees it: a query at position q sees a key at position k when 0 <= q - k < window. Padding
sits at position FAR, in the future of every token, so there is no other mask. Left out: images, dropout, biases.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from models.sharding import TRAIN, Rules, reshard, spec

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
    def sizes(self) -> dict[str, int]:
        """The size of each letter that a weight has."""
        return dict(
            L=self.num_layers, D=self.embed_dim, d=self.embed_dim, F=self.mlp_dim, V=self.vocab_size, H=self.head_dim,
            A=self.num_heads * self.head_dim, E=self.num_kv_heads * self.head_dim,
        )  # fmt: skip


@dataclass(frozen=True)
class Compute:
    """How a forward pass runs: where arrays lie, in which dtype, what the backward pass keeps, whether layers are unrolled."""

    rules: Rules = TRAIN
    dtype: str = "float32"
    remat: str = "none"  # none | dots | full: what the backward pass recomputes
    unroll: bool = False  # faster updates on a CPU, slower decoding, slower to compile

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
class Params:
    embedding: Any  # also the head
    layers: Layers
    final_norm: Any


@flax.struct.dataclass
class KV:
    """Keys and values of some slots, and the positions they sit at. Stacked over layers, k and v have a leading L."""

    k: Array  # BKSH: a head's slots lie together, so that attention reads them without a transpose
    v: Array  # BKSH
    positions: Array  # BS


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
    return (x32 * (1 + scale.astype(jnp.float32))).astype(x.dtype)


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


def attention_logits(q: Array, kv: KV, positions: Array, window: Array, config: GemmaConfig, at) -> Array:
    """Masked, scaled and capped scores, float32.  BTNH, (QKSH, QS), BT -> BKTRS

    B may be a multiple of the rows of `kv`: then each row of keys is read by a group of G consecutive rows of queries.
    """
    B, T, N, H = q.shape
    Q, K, S, _ = kv.k.shape
    q = lax.reshape(q, (Q, B // Q, T, K, N // K, H), out_sharding=at("QGTKRH"))
    scores = jnp.einsum("QGTKRH,QKSH->QGKTRS", q, kv.k, preferred_element_type=jnp.float32)
    scores = softcap(scores * config.query_scale, config.attn_softcap)
    positions = lax.reshape(positions, (Q, B // Q, T), out_sharding=at("QGT"))
    age = positions[..., None] - kv.positions[:, None, None]  # QGTS
    visible = (age >= 0) & (age < window)
    scores = jnp.where(visible[:, :, None, :, None], scores, -1e30)
    return lax.reshape(scores, (B, K, T, N // K, S), out_sharding=at("BKTRS"))


def mix_values(weights: Array, kv: KV, at) -> Array:  # BKTRS, QKSH -> BKTRH
    B, K, T, R, S = weights.shape
    Q, _, _, H = kv.v.shape
    weights = lax.reshape(weights, (Q, B // Q, K, T, R, S), out_sharding=at("QGKTRS"))
    mixed = jnp.einsum("QGKTRS,QKSH->QGKTRH", weights, kv.v, preferred_element_type=jnp.float32)
    return lax.reshape(mixed, (B, K, T, R, H), out_sharding=at("BKTRH"))


def attend(q: Array, pieces: list[KV], positions: Array, window: Array, config: GemmaConfig, at) -> Array:
    """One softmax over the keys of all `pieces` (the group's prompt, the row's own tokens).  BTNH -> BTA"""
    B, T, N, H = q.shape
    logits = [attention_logits(q, kv, positions, window, config, at) for kv in pieces]
    tops = [scores.max(axis=-1, keepdims=True) for scores in logits]
    top = lax.stop_gradient(tops[0] if len(tops) == 1 else jnp.maximum(*tops))
    weights = [jnp.exp(scores - top) for scores in logits]
    total = sum((w.sum(axis=-1, keepdims=True) for w in weights), jnp.float32(0))
    mixed = sum((mix_values(w.astype(q.dtype), kv, at) for w, kv in zip(weights, pieces, strict=True)), jnp.float32(0))
    mixed = jnp.moveaxis((mixed / total).astype(q.dtype), 1, 2)  # BKTRH -> BTKRH
    return lax.reshape(mixed, (B, T, N * H), out_sharding=at("BTA"))


def project(x: Array, w: Layers, table: Array, config: GemmaConfig, at) -> tuple[Array, Array, Array]:
    """The first half of a layer: queries, keys and values.  BTD -> BTNH, BKTH, BKTH"""
    B, T, _ = x.shape
    h = rms_norm(x, w.pre_attn_norm, config.norm_eps)

    def heads(weight, count):
        return lax.reshape(h @ weight, (B, T, count, config.head_dim), out_sharding=at("BTNH"))

    q, k, v = heads(w.q, config.num_heads), heads(w.k, config.num_kv_heads), heads(w.v, config.num_kv_heads)
    if config.qk_norms:
        q, k = rms_norm(q, w.q_norm, config.norm_eps), rms_norm(k, w.k_norm, config.norm_eps)
    return rotate(q, table), jnp.moveaxis(rotate(k, table), 1, 2), jnp.moveaxis(v, 1, 2)


def finish(x: Array, w: Layers, q: Array, pieces: list[KV], positions: Array, window: Array, config: GemmaConfig, at):
    """The second half of a layer: attention over `pieces`, then the MLP.  BTD, BTNH -> BTD"""
    h = attend(q, pieces, positions, window, config, at) @ w.o
    x = x + (rms_norm(h, w.post_attn_norm, config.norm_eps) if config.post_norms else h)
    h = rms_norm(x, w.pre_mlp_norm, config.norm_eps)
    h = jax.sharding.reshard(h, at("MTd"))
    h = jax.nn.gelu(h @ w.gate, approximate=True) * (h @ w.up)
    h = jnp.einsum("MTF,FD->MTD", h, w.down, out_sharding=at("BTd"))
    return x + (rms_norm(h, w.post_mlp_norm, config.norm_eps) if config.post_norms else h)


def embed(params: Params, tokens: Array, config: GemmaConfig, compute: Compute) -> Array:  # BT -> BTD
    scale = jnp.asarray(config.embed_dim**0.5, compute.dtype)  # rounded to the dtype, as transformers does
    table = reshard(params.embedding, "Vd", compute.rules)
    return table.at[tokens].get(out_sharding=compute.at("BTd")).astype(compute.dtype) * scale


def scan_layers(step, carry, params: Params, extra, config: GemmaConfig, compute: Compute):
    """Run `step(carry, weights, is_local, extra)` for each layer; `extra` is stacked on L like the weights."""
    letters = jax.tree.map(lambda s: s.removeprefix("L"), axes(config).layers)

    def body(carry, layer):
        weights, local, extra = layer
        return step(carry, compute.use(weights, letters), local, extra)

    if compute.remat != "none":
        policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        body = jax.checkpoint(body, policy=policies[compute.remat], prevent_cse=False)
    stacked = (params.layers, jnp.array(config.local_layers, jnp.int32), extra)
    return lax.scan(body, carry, stacked, unroll=config.num_layers if compute.unroll else 1)


def layer_window(local: Array, config: GemmaConfig) -> Array:
    return jnp.where(local == 1, min(config.sliding_window, FAR), FAR)


def forward(params: Params, tokens: Array, positions: Array, config: GemmaConfig, compute: Compute) -> tuple[Array, KV]:
    """The plain causal model.  BT, BT -> hidden BTD after the final norm, and the keys and values of all layers.

    A padded slot has position FAR; what comes out there means nothing.
    """
    table = rope_table(positions, config)

    def step(x, w, local, _):
        q, k, v = project(x, w, table[local], config, compute.at)
        x = finish(x, w, q, [KV(k, v, positions)], positions, layer_window(local, config), config, compute.at)
        return x, (k, v)

    x = embed(params, tokens, config, compute)
    x, (k, v) = scan_layers(step, x, params, None, config, compute)
    return rms_norm(x, params.final_norm, config.norm_eps), KV(k, v, positions)


def forward_group(params: Params, prompts: Array, lengths: Array, completions: Array, config: GemmaConfig, compute: Compute):
    """Hidden states that predict each completion token, each prompt computed once.  QP, Q, BC -> BCD

    Row b continues prompt b // G. Equal to `forward` on every prompt + completion written out.
    """
    Q, P = prompts.shape
    B, C = completions.shape
    at = compute.at
    prompt_positions = prompt_slots(lengths, P)
    positions = repeat(lengths, B // Q, at)[:, None] + jnp.arange(C)
    prompt_table, table = rope_table(prompt_positions, config), rope_table(positions, config)

    def step(carry, w, local, _):
        prompt, x = carry
        window = layer_window(local, config)
        q, k, v = project(prompt, w, prompt_table[local], config, at)
        shared = KV(k, v, prompt_positions)
        prompt = finish(prompt, w, q, [shared], prompt_positions, window, config, at)
        q, k, v = project(x, w, table[local], config, at)
        x = finish(x, w, q, [shared, KV(k, v, positions)], positions, window, config, at)
        return (prompt, x), None

    carry = embed(params, prompts, config, compute), embed(params, completions, config, compute)
    (prompt, x), _ = scan_layers(step, carry, params, None, config, compute)
    first = repeat(last_slot(prompt, lengths), B // Q, at)[:, None]
    return rms_norm(jnp.concatenate([first, x[:, :-1]], axis=1), params.final_norm, config.norm_eps)


def forward_cached(params: Params, tokens: Array, slot: Array, prefix: KV, cache: KV, config: GemmaConfig, compute: Compute):
    """One token a row, written to `slot` of the cache.  B, scalar, (LQKPH, QP), (LBKCH, BC) -> hidden BD, cache"""
    positions = lax.dynamic_slice_in_dim(cache.positions, slot, 1, axis=1)
    table = rope_table(positions, config)
    at = compute.at

    def step(carry, w, local, extra):
        x, all_k, all_v = carry
        layer, prefix_k, prefix_v = extra
        q, k, v = project(x, w, table[local], config, at)
        all_k = lax.dynamic_update_slice(all_k, k[None], (layer, 0, 0, slot, 0))
        all_v = lax.dynamic_update_slice(all_v, v[None], (layer, 0, 0, slot, 0))
        own = KV(all_k[layer], all_v[layer], cache.positions)
        shared = KV(prefix_k, prefix_v, prefix.positions)
        x = finish(x, w, q, [shared, own], positions, layer_window(local, config), config, at)
        return (x, all_k, all_v), None

    carry = embed(params, tokens[:, None], config, compute), cache.k, cache.v
    extra = jnp.arange(config.num_layers), prefix.k, prefix.v
    (x, k, v), _ = scan_layers(step, carry, params, extra, config, compute)
    return rms_norm(x[:, 0], params.final_norm, config.norm_eps), KV(k, v, cache.positions)


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


def vocab_logits(hidden: Array, params: Params, config: GemmaConfig, compute: Compute) -> Array:
    """float32 logits over the vocabulary, soft-capped.  BTD -> WTV"""
    hidden = jax.sharding.reshard(hidden, compute.at("WTd"))
    embedding = compute.use(params.embedding, "Vd")
    logits = jnp.einsum("WTD,VD->WTV", hidden, embedding, preferred_element_type=jnp.float32)
    return softcap(logits, config.final_softcap)


def pick_logprobs(logits: Array, tokens: Array, temperature: Array) -> Array:
    """log softmax(logits / temperature) at `tokens`.  ...V, ..., ... -> ...

    The one definition of a log-probability: sampler, reference and trainer all use it. Temperature 0 (greedy) counts as 1.
    A masked sum picks the token, so that V may stay cut over devices.
    """
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)[..., None]
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], logits, 0.0).sum(axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_logprobs(
    params: Params, hidden: Array, tokens: Array, temperature: float, config: GemmaConfig, compute: Compute, chunk: int
):
    """Log-probabilities of `tokens` from the hidden states that predict them.  BCD, BC -> BC

    Works on `chunk` tokens of every row at a time and recomputes them in the backward pass: the [B, C, V] logits, 1 MB a token
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
        tokens = jax.sharding.reshard(tokens, compute.at("WT"))
        picked = pick_logprobs(vocab_logits(hidden, params, config, compute), tokens, jnp.asarray(temperature))
        return None, jax.sharding.reshard(picked, compute.at("BT"))

    if count > 1:
        body = jax.checkpoint(body, prevent_cse=False)
    _, picked = lax.scan(body, None, (chunks(hidden), chunks(tokens)))
    return jnp.moveaxis(picked, 0, 1).reshape(B, count * chunk)[:, :C]
