"""LoRA (arXiv:2106.09685): the base model is frozen, and some of its projections get two thin matrices that are trained.

    y = x W + (alpha / rank) (x A) B        A [in, J], B [J, out], float32; W in the dtype of activations

Training and sampling compute this formula (`attach`, then `models.gemma.linear`). W has no gradient, which saves half of the
products of the backward pass, and no optimizer moments; without its adapters it is also the reference. The two are not merged:
in bfloat16 W + AB loses most of a small AB to rounding. Not supported: dropout, DoRA, adapters on the embedding, several at a
time.
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
    """The letters of every adapter: those of its projection, J between."""
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
    """`params` with `Adapted` projections, as the forward pass takes them; or the letters of these, of those of both."""
    layers = {name: Adapted(getattr(params.layers, name), adapter.a, adapter.b, scale) for name, adapter in adapters.items()}
    return replace(params, layers=replace(params.layers, **layers))
