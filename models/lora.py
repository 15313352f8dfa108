"""LoRA (arXiv:2106.09685): the base model is frozen, and some of its projections get two thin matrices that are trained.

    y = x W + (alpha / rank) (x A) B        A [in, J], B [J, out], float32; W in the dtype of activations

Training computes this formula (`attach`, then `models.gemma.linear`). W has no gradient, which saves half of the products of
the backward pass, and no optimizer moments; without its adapters it is also the reference. Sampling uses merged weights
(`merge`), so it costs the same as without adapters. Not supported: dropout, DoRA, adapters on the embedding, several at a time.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from models.gemma import Adapted, GemmaConfig, Params, axes
from models.sharding import Rules, reshard

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@flax.struct.dataclass
class Adapter:
    """The adapter of one projection in all layers."""

    a: Any  # LDJ
    b: Any  # LJF


Adapters = dict[str, Adapter]  # keyed by the projection's name in `Layers`


def adapter_axes(config: GemmaConfig, targets: Iterable[str]) -> Adapters:
    """The letters of every adapter: those of its projection, J between. Both are sharded alike, so merging moves nothing."""
    letters = {name: getattr(axes(config).layers, name) for name in targets}
    return {name: Adapter(a=f"L{rows}J", b=f"LJ{columns}") for name, (_, rows, columns) in letters.items()}


def adapter_shapes(config: GemmaConfig, targets: Iterable[str], rank: int) -> Adapters:
    """The shape and dtype of every adapter, as a tree of `jax.ShapeDtypeStruct`."""
    sizes = config.sizes | {"J": rank}
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct([sizes[c] for c in a], jnp.float32), adapter_axes(config, targets))


def count_adapters(config: GemmaConfig, targets: Iterable[str], rank: int) -> int:
    """The number of adapter parameters; 0 for rank 0."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter_shapes(config, targets, rank)))


def init_adapters(key: Array, config: GemmaConfig, targets: Iterable[str], rank: int, rules: Rules) -> Adapters:
    """New adapters, which leave the model unchanged: B = 0, A uniform within 1 / sqrt(in) as in peft (Kaiming, a = sqrt 5)."""
    wanted = adapter_shapes(config, targets, rank)

    def init(name: str, key: Array) -> Adapter:
        a, bound = wanted[name].a.shape, wanted[name].a.shape[1] ** -0.5
        return Adapter(jax.random.uniform(key, a, minval=-bound, maxval=bound), jnp.zeros(wanted[name].b.shape))

    def init_all(key: Array) -> Adapters:
        made = {name: init(name, jax.random.fold_in(key, PROJECTIONS.index(name))) for name in wanted}
        return reshard(made, adapter_axes(config, wanted), rules)

    return jax.jit(init_all)(key)


def attach(params: Params, adapters: Adapters, scale: float) -> Params:
    """`params` with `Adapted` projections, as the forward pass of training takes them."""
    layers = {name: Adapted(getattr(params.layers, name), adapter.a, adapter.b, scale) for name, adapter in adapters.items()}
    return replace(params, layers=replace(params.layers, **layers))


def merge(params: Params, adapters: Adapters, scale: float) -> Params:
    """`params` with the adapters added to the weights. Dtype and sharding stay the same."""
    return merged(attach(params, adapters, scale))


def merged(params: Params) -> Params:
    """`params` with each `Adapted` projection merged into one matrix, and the others unchanged."""

    def one(weight: Any) -> Any:
        if not isinstance(weight, Adapted):
            return weight
        a, b = (x.astype(weight.base.dtype) for x in (weight.a, weight.b))  # rounded as training rounds them
        # By default a TPU multiplies float32 matrices in bfloat16.
        precision = jax.lax.Precision.HIGHEST if weight.base.dtype == jnp.float32 else None
        delta = jnp.einsum(
            "LDJ,LJF->LDF", a, b, precision=precision, preferred_element_type=jnp.float32,
            out_sharding=jax.typeof(weight.base).sharding,
        )  # fmt: skip
        return (weight.base.astype(jnp.float32) + weight.scale * delta).astype(weight.base.dtype)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
