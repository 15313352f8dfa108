"""How arrays are sharded: one mesh, and rules that map the letters of a shape to mesh axes.

The mesh has two axes, `fsdp` x `tp`, over all devices. A rule set maps a letter (a dimension, see gemma.py) to the mesh axes
that it is sharded over; a letter without a rule is whole on every device.

    STORE    how parameters, Adam moments and the reference are stored: each matrix sharded over all devices.
    TRAIN    training: rows are sharded over all devices, and each layer's weights are gathered while it runs (FSDP). The
             vocabulary stays sharded; hidden states are sent to it instead.
    ROLLOUT  sampling: rows and their KV cache are sharded over all devices, attention weights are replicated, the MLP and the
             vocabulary are sharded over `tp`. No weight moves while decoding.

Weights are sharded tp-major and rows fsdp-major, so that STORE -> ROLLOUT is one all-gather over `fsdp`, and the rows of a `tp`
group are neighbours. On one device every rule is the identity. Not supported: pipeline and sequence parallelism.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, update_wrapper
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from models import ModelError

Axes = str | tuple[str, ...] | None

# For the compiler of one CPU device: LLVM's -O1 instead of -O2 compiles in four fifths of the time, and the code is no slower.
# With fewer than `SMALL` numbers in the arguments XLA's older emitters too: six tenths; larger programs would be slower.
CPU_OPTIONS = {"xla_backend_optimization_level": 1}
SMALL, SMALL_OPTIONS = 2**22, {"xla_cpu_use_fusion_emitters": False}

# For the compiler of TPUs; those of CPUs and GPUs refuse them.
# 1. It turns a product followed by a reduce-scatter into a ring of small products where an operand is larger than this many
#    MiB. The ring reads the weight once per hop, and in a backward pass copies the whole stack of saved activations once per
#    layer; a limit that no operand reaches avoids it.
# 2. An instruction may have several results: fewer passes over what they are made of.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20, "xla_jf_enable_advanced_multi_output_fusion": True}

# On chips with 128 MiB of VMEM, for the update and for decoding: one instruction may take 32 MiB of it, by default 16. Two
# products in a row become one; the update compiles half as long again.
VMEM_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": 2**15}
LARGE_VMEM = ("TPU v5 lite", "TPU v6 lite")


@dataclass(frozen=True)
class Rules:
    """The mesh axes that each letter is sharded over; a letter that is not a field is never sharded."""

    Q: Axes = None  # questions
    B: Axes = None  # rows in attention and the KV cache
    M: Axes = None  # rows in the MLP
    W: Axes = None  # rows at the vocabulary head
    D: Axes = None
    F: Axes = None
    V: Axes = None


WEIGHTS = ("tp", "fsdp")
ROWS = ("fsdp", "tp")

STORE = Rules(D=WEIGHTS, F=WEIGHTS, V=WEIGHTS)
TRAIN = Rules(Q=ROWS, B=ROWS, M=ROWS, V=WEIGHTS)
ROLLOUT = Rules(Q=ROWS, B=ROWS, M="fsdp", W="fsdp", F="tp", V="tp")


def make_mesh(tp: int = 1, devices: list | None = None) -> Mesh:
    """The mesh of `devices` (default: all devices of all processes), with groups of `tp` that share one copy of the MLP.

    `tp` 0 means the largest power of two up to 8 that divides the number of devices. Raises ModelError for a `tp` that does
    not divide it.
    """
    devices = devices or jax.devices()
    tp = math.gcd(8, len(devices)) if tp == 0 else tp
    if tp < 1 or len(devices) % tp:
        legal = [k for k in range(1, len(devices) + 1) if len(devices) % k == 0]
        raise ModelError(f"rollout_tp {tp} does not divide {len(devices)} devices; use one of {legal}")
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    return jax.make_mesh((len(devices) // tp, tp), ("fsdp", "tp"), axis_types=explicit, devices=devices)


def spec(letters: str, rules: Rules) -> PartitionSpec:
    """The sharding of a shape: `spec("BTD", TRAIN) == PartitionSpec(("fsdp", "tp"), None, None)`.

    A mesh axis is used once, by the first letter that it shards.
    """
    claimed: set[str] = set()
    axes: list[Axes] = []
    for letter in letters:
        rule = getattr(rules, letter, None)
        names = {rule} if isinstance(rule, str) else set(rule or ())
        axes.append(None if names & claimed else rule)
        claimed |= names
    return PartitionSpec(*axes)


def specs(axes, rules: Rules):
    """`spec` of every leaf of a tree of letters, such as `gemma.axes`."""
    return jax.tree.map(lambda letters: spec(letters, rules), axes)


def reshard(tree, axes, rules: Rules):
    """Shard every leaf of `tree` by its letters in `axes`; leaves that are sharded so already are not copied."""
    return jax.tree.map(lambda leaf, letters: jax.sharding.reshard(leaf, spec(letters, rules)), tree, axes)


def to_devices(x: ArrayLike, letters: str) -> Array:
    """A host array on the devices, sharded by TRAIN. With several processes, each must pass the whole array."""
    if jax.process_count() == 1:
        return jax.device_put(x, spec(letters, TRAIN))
    whole, sharding = np.asarray(x), NamedSharding(jax.sharding.get_mesh(), spec(letters, TRAIN))
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)


def to_host(tree: Any) -> Any:
    """A tree of device arrays as numpy arrays, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class MeshJit:
    """`jax.jit`, with the options for the devices of the mesh of `jax.set_mesh`, present or only described.

    `more` are options for chips with a large VMEM. Inside another program it adds nothing: the outer one has the options.
    """

    def __init__(self, function: Callable, more: dict[str, Any] | None = None, **how: Any):
        update_wrapper(self, function)
        self.function, self.more, self.how = function, more or {}, how
        self.plain = jax.jit(function, **how)
        self.with_options: dict[tuple, Any] = {}

    def chosen(self, arguments: Any = ()) -> Any:
        """The jitted function for the mesh that is set, and for such arguments, a tree."""
        try:
            mesh = jax.sharding.get_mesh()
        except ValueError:  # inside another program
            return self.plain
        if mesh.empty:
            return self.plain
        more = self.more if (chip := mesh.devices.flat[0]).device_kind in LARGE_VMEM else {}
        options = {"cpu": CPU_OPTIONS if mesh.size == 1 else {}, "tpu": TPU_OPTIONS | more}.get(chip.platform, {})
        if options is CPU_OPTIONS and sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(arguments)) < SMALL:
            options = CPU_OPTIONS | SMALL_OPTIONS
        options = {name: value for name, value in options.items() if knows_option(mesh, name, value)}
        if (key := tuple(options.items())) not in self.with_options:
            self.with_options[key] = jax.jit(self.function, compiler_options=options, **self.how)
        return self.with_options[key]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.chosen((arguments, named))(*arguments, **named)

    def lower(self, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        return self.chosen((arguments, named)).lower(*arguments, **named)

    def trace(self, *arguments: Any, **named: Any) -> jax.stages.Traced:
        return self.chosen((arguments, named)).trace(*arguments, **named)


@cache
def knows_option(mesh: Mesh, name: str, value: Any) -> bool:
    """Whether the compiler for a mesh knows an option; one of another version may not, and would compile nothing."""
    scalar = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(scalar).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        warnings.warn(f"the compiler does not know {name}: programs are compiled without it, and may be slower", stacklevel=2)
        return False
    return True


def abstract_like(function: Callable, *arguments: Any, mesh: Mesh) -> Any:
    """The shapes, dtypes and shardings of what `function` would return. Nothing is computed."""
    whole, found = NamedSharding(mesh, PartitionSpec()), jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: x.update(sharding=whole.update(spec=x.sharding.spec) if x.sharding else whole), found)


def transposed(sharding: NamedSharding) -> NamedSharding:
    """The sharding of the transpose of a matrix."""
    return sharding.update(spec=PartitionSpec(*reversed(sharding.spec)))


def activation_dtype(name: str) -> str:
    """The dtype that `name` stands for: `auto` is float32 on a CPU, where bfloat16 is slow, and bfloat16 elsewhere."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_divides(what: str, size: int, mesh: Mesh) -> None:
    """Raises ModelError when `size` cannot be sharded evenly over all devices of `mesh`."""
    if size % mesh.size:
        raise ModelError(f"{what} {size} must divide over {mesh.size} devices; use a multiple of {mesh.size}")
