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

from models.gemma import Adapted, GemmaConfig, Params, axes, leaf_shape
from models.sharding import Rules, reshard

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@flax.struct.dataclass
class Adapter:
    """The adapter of one projection in all layers."""

    a: Any  # LDJ
    b: Any  # LJF


Adapters = dict[str, Adapter]  # keyed by the projection's name in `Params.layers`: "q", in Gemma 4 "local.q"


def by_kind(layers: Any) -> dict[str, Any]:
    """Layers of each kind; of models of one kind under the name ""."""
    return layers if isinstance(layers, dict) else {"": layers}


def projections(config: GemmaConfig, targets: Iterable[str]) -> dict[str, str]:
    """The letters of each projection among `targets`, which are "q" for that of every kind of layers, or "local.q" for one."""
    targets, found = set(targets), {}
    for kind, layers in by_kind(axes(config).layers).items():
        for short in PROJECTIONS:
            name, letters = f"{kind}.{short}".removeprefix("."), getattr(layers, short)
            if letters and {name, short} & targets:
                found[name] = letters
    return found


def adapter_axes(config: GemmaConfig, targets: Iterable[str]) -> Adapters:
    """The letters of every adapter: those of its projection, J between."""
    letters = projections(config, targets)
    return {name: Adapter(a=f"L{rows}J", b=f"LJ{columns}") for name, (_, rows, columns) in letters.items()}


def adapter_shapes(config: GemmaConfig, targets: Iterable[str], rank: int) -> Adapters:
    """The shape and dtype of every adapter, as a tree of `jax.ShapeDtypeStruct`."""

    def shape(name: str, letters: str) -> jax.ShapeDtypeStruct:
        sizes = leaf_shape(f"layers.{name}", letters.replace("J", ""), config)
        where = letters.index("J")
        return jax.ShapeDtypeStruct((*sizes[:where], rank, *sizes[where:]), jnp.float32)

    letters = adapter_axes(config, targets)
    return {name: Adapter(shape(name, adapter.a), shape(name, adapter.b)) for name, adapter in letters.items()}


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
        keys = {}
        for name in wanted:
            kind, _, short = name.rpartition(".")
            number = PROJECTIONS.index(short) + len(PROJECTIONS) * (list(config.kinds).index(kind))
            keys[name] = jax.random.fold_in(key, number)
        made = {name: init(name, key) for name, key in keys.items()}
        return reshard(made, adapter_axes(config, wanted), rules)

    return jax.jit(init_all)(key)


def attach(params: Params, adapters: Adapters, scale: float) -> Params:
    """`params` with `Adapted` projections, as the forward pass takes them; or the letters of these, of those of both."""
    layers = dict(by_kind(params.layers))
    for name, adapter in adapters.items():
        kind, _, short = name.rpartition(".")
        adapted = Adapted(getattr(layers[kind], short), adapter.a, adapter.b, scale)
        layers[kind] = replace(layers[kind], **{short: adapted})
    return replace(params, layers=layers.get("", layers))


def attached(params: Params) -> dict[str, Adapted]:
    """The `Adapted` projections of `params`, by name."""
    return {
        f"{kind}.{short}".removeprefix("."): weight
        for kind, layers in by_kind(params.layers).items()
        for short in PROJECTIONS
        if isinstance(weight := getattr(layers, short), Adapted)
    }
