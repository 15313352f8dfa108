"""Checkpoints of the training state by orbax, verified by digests. The only file that imports orbax.

    RUN_DIR/checkpoints/STEP/{state,meta}      committed by a rename, so a step is there whole or not at all
    RUN_DIR/checkpoints/STEP.damaged           one that was found damaged, and moved out of the way

`meta` says what the state belongs to, and holds a digest of each leaf, the same on any devices. A checkpoint is written while
training goes on, then read back and compared; only then does it count, and an older one is given up. On restoring, the newest
one whose digests agree is taken. Left out: other formats (models/formats/save.py, scripts/export.py).
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax import Array
from jax.sharding import Mesh, NamedSharding

from grpo.errors import RunError
from grpo.runs.distributed import all_processes, broadcast_from_main, is_main_process
from models.formats.adapters import LoadedAdapters
from models.formats.convert import Keep, Reader, as_it_is, layers_of, leaf_names, load_leaves
from models.gemma import GemmaConfig, Params, leaf_name, leaf_shape
from models.lora import Adapter
from models.sharding import Rules, spec

SPARE = 2**26  # bytes that a save leaves free
LEFTOVER = ".orbax-checkpoint-tmp"  # in the name of directories that are half written or half deleted
PIECE = 2**22  # elements digested at a time on the host
SMALL = 2**19  # elements of a leaf for whose digest no program is compiled


class Checkpoints:
    """The checkpoints of one run directory. Keeps the last `keep`, and those whose meta says `final`."""

    def __init__(self, folder: Path, keep: int = 1, background: bool = True):
        self.folder, self.keep, self.background = folder.absolute(), keep, background
        handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
        self.writer = ocp.AsyncCheckpointer(handler)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of orbax's tasks, when a save fails: tracebacks
        self.thread = ThreadPoolExecutor(1)
        self.pending: tuple[int, Future[None]] | None = None  # the save in progress
        self.failures = 0  # in a row

    def steps(self) -> list[int]:
        return saved_steps(self.folder)

    def clean(self) -> None:
        """Remove what killed processes left half written."""
        if not is_main_process():
            return
        for path in self.folder.glob(f"*{LEFTOVER}*"):
            shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------------- saving

    def save(self, step: int, state: Any, meta: dict[str, Any], wait: bool = False) -> None:
        """Start to write the state after `step`; with `wait`, return when it is written and verified.

        An existing step is not written again. One failure is a warning, the second in a row a RunError.
        """
        self.settle()
        while step not in broadcast_from_main(self.steps()):
            self.begin(step, state, meta)
            self.settle(wait or not self.background)
            if not wait:
                return

    def begin(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SPARE
        found = digests(state)
        failed: Exception | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = broadcast_from_main(shutil.disk_usage(self.folder).free)
            if free < needed:
                raise OSError(f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(sealed(meta | {"digests": found}))
            )
            self.writer.save(self.folder / str(step), args=args)
        except Exception as error:  # orbax and the file system raise many types
            failed = error
        future: Future[None] = Future()
        if failed is None:
            future = self.thread.submit(self.finish, step, found)
        else:
            future.set_exception(failed)
        self.pending = step, future

    def finish(self, step: int, found: dict[str, str]) -> None:
        """Wait until the checkpoint is committed, then read it back."""
        self.writer.wait_until_finished()
        if is_main_process():
            folder = self.folder / str(step)
            read_meta(folder)
            wrong = [name for name, words in found.items() if host_digest(folder, name) != words]
            if wrong:
                raise OSError(f"read back, {wrong[0]} is not what was written")

    def settle(self, wait: bool = True) -> None:
        """Handle the end of the save in progress, if it has ended; with `wait`, wait for it."""
        if self.pending is None or not (wait or (self.pending[1].done() and jax.process_count() == 1)):
            return
        (step, future), self.pending = self.pending, None
        error = future.exception()
        if all_processes(error is None):
            self.failures = 0
            self.give_up_old(step)
            return
        self.failures += 1
        self.delete(step)
        self.clean()
        reason = " ".join(str(error).split())[:300] if error else "another process failed"
        message = f"checkpoint {self.folder / str(step)} could not be saved: {reason}"
        if self.failures > 1:
            raise RunError(f"{message}; twice in a row, so the run stops; older checkpoints are as they were")
        if is_main_process():
            print(f"warning: {message}; one more failure ends the run", file=sys.stderr, flush=True)

    def give_up_old(self, newest: int) -> None:
        """Delete older checkpoints, once `newest` is verified."""
        if not is_main_process():
            return
        older = [step for step in self.steps() if step < newest]
        for step in older[: max(len(older) - self.keep + 1, 0)]:
            try:
                final = read_meta(self.folder / str(step)).get("final")
            except Exception:
                continue  # unreadable: keep it
            if not final:
                self.delete(step)

    def delete(self, step: int) -> None:
        """Remove a step. It is renamed first, so that `clean` removes the rest if this process is killed."""
        folder = self.folder / str(step)
        if is_main_process() and folder.exists():
            shutil.rmtree(folder.rename(self.folder / f"{step}{LEFTOVER}"), ignore_errors=True)

    def close(self) -> None:
        """Wait for the save in progress."""
        try:
            self.settle()
        finally:
            self.thread.shutdown()
            self.writer.close()

    # ---------------------------------------------------------------------------------------------------------- restoring

    def restore(
        self, abstract_like: Any, accept: Callable[[dict[str, Any]], None], only: int | None = None
    ) -> "Restored | None":
        """The newest good state, each leaf with the shape, dtype and layout of `like`; None when there is no step at all.

        `accept` sees the meta before any array is read, and raises ConfigError when the state belongs to something else. What
        is damaged is passed over, loudly; when nothing else is there, RunError. `only` looks at no other step.
        """
        steps = [step for step in broadcast_from_main(self.steps()) if only in (None, step)]
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            folder, fault, meta, state = self.folder / str(step), "", {}, None
            try:
                meta = read_meta(folder)
            except PermissionError as error:
                raise RunError(f"checkpoint {folder} cannot be read: {error.strerror}") from None
            except Exception as error:
                fault = f"its meta cannot be read ({type(error).__name__}: {error})"
            if all_processes(not fault):
                accept(meta)
                try:
                    state = self.read_state(folder, abstract_like)
                except Exception as error:
                    if isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(error):
                        raise  # the checkpoint is not to blame
                    fault = f"its arrays cannot be read ({type(error).__name__}: {error})"
                if all_processes(not fault):
                    wrong = differing(digests(state), meta["digests"])
                    if not wrong:
                        return Restored(step, state, meta, list(damaged))
                    fault = f"the digest of {wrong[0]} is wrong, of {len(wrong)} leaves in all"
            damaged[step] = " ".join(fault.split())[:300]
            if is_main_process():
                print(f"warning: checkpoint {folder} is damaged: {damaged[step]}", file=sys.stderr, flush=True)
        if not steps:
            return None
        raise RunError(f"no checkpoint in {self.folder} can be restored ({'; '.join(map(str, steps))} are damaged)")

    def read_state(self, folder: Path, abstract_like: Any) -> Any:
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), abstract_like)
        return self.writer.restore(folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]

    def set_aside(self, steps: list[int]) -> None:
        """Rename damaged steps, so that their numbers can be used again."""
        if not is_main_process():
            return
        for step in steps:
            name = f"{step}.damaged"
            while (self.folder / name).exists():
                name += "-"
            (self.folder / str(step)).rename(self.folder / name)


def saved_steps(folder: Path) -> list[int]:
    """The steps in a checkpoint directory, oldest first, whether or not they can be restored."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


@dataclass(frozen=True)
class Restored:
    step: int
    state: Any
    meta: dict[str, Any]
    damaged: list[int]  # newer steps that could not be restored


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """The meta with a SHA-256 of its other entries."""
    meta = {name: value for name, value in meta.items() if name != "sha256"}
    return meta | {"sha256": hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()}


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta of a checkpoint. Any exception means that it cannot be trusted."""
    meta = json.loads((folder / "meta" / "metadata").read_text("utf-8"))
    if sealed(meta) != meta or folder.name != str(meta["step"]):
        raise ValueError("its hash or its step is wrong")
    return meta


def read_params(folder: Path, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str, keep: Keep = as_it_is) -> Params:
    """The trained parameters of a checkpoint, cast to `dtype`, sharded by `rules`; see `load_leaves`. Raises RunError."""
    expected = read_meta(folder)["digests"]

    def read(leaf_of: str, letters: str) -> Array:
        name, shape = f"params.{leaf_of}", leaf_shape(leaf_of, letters, config)
        try:
            stored = open_leaf(folder, name)
            if stored.shape != shape:
                raise ValueError(f"{name} has shape {stored.shape}, config.json says {shape}")
            sharding = NamedSharding(mesh, spec(letters, rules))
            leaf = jax.make_array_from_callback(shape, sharding, lambda index: stored[index].read().result())
        except Exception as error:  # tensorstore raises many types
            raise RunError(f"checkpoint {folder} is damaged ({error}); give another step") from None
        if hexadecimal(np.asarray(leaf_words(leaf))) != expected[name]:
            raise RunError(f"checkpoint {folder} is damaged: the digest of {name} is wrong; give another step")
        return leaf.astype(dtype)

    with jax.set_mesh(mesh):
        return load_leaves(read, config, keep)


def open_params(folder: Path, config: GemmaConfig) -> Reader:
    """A reader of the weights of a checkpoint on the host, with one leaf in memory at a time. Raises RunError."""
    held: dict[str, np.ndarray] = {}

    def read(leaf: str, layer: int, index: Any) -> np.ndarray:
        if leaf not in held:
            held.clear()
            held[leaf] = read_verified(folder, f"params.{leaf}")
        return held[leaf][layers_of(leaf, config).index(layer)][index] if leaf.startswith("layers.") else held[leaf][index]

    return read


def read_adapters(folder: Path) -> LoadedAdapters:
    """The adapters of a checkpoint of a LoRA run. Raises RunError."""
    meta = read_meta(folder)
    config, stored = meta["config"], [name.removeprefix("params.") for name in meta["digests"] if name.startswith("params.")]
    names = [name.removesuffix(".a") for name in stored if name.endswith(".a")]
    weights = {name: Adapter(*(read_verified(folder, f"params.{name}.{side}") for side in "ab")) for name in names}
    return LoadedAdapters(weights, config["lora_rank"], config["lora_alpha"] / config["lora_rank"])


def read_verified(folder: Path, name: str) -> np.ndarray:
    """A leaf on the host, its digest verified. Raises RunError."""
    try:
        leaf = np.asarray(open_leaf(folder, name).read().result())
        if array_digest(leaf) != read_meta(folder)["digests"][name]:
            raise ValueError(f"the digest of {name} is wrong")
    except Exception as error:  # tensorstore raises many types
        raise RunError(f"checkpoint {folder} is damaged ({error}); give another step") from None
    return leaf


def open_leaf(folder: Path, name: str) -> Any:
    """A leaf on disk, to be read by slices."""
    base = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/state/", "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": base}, open=True).result()


def host_digest(folder: Path, name: str) -> str:
    """The digest of a leaf on disk."""
    return array_digest(np.asarray(open_leaf(folder, name).read().result()))


def array_digest(leaf: np.ndarray) -> str:
    """The digest of an array on the host, equal to that on devices."""
    leaf = leaf.reshape(-1)
    words = np.zeros(2, np.uint32)
    for start in range(0, leaf.size, PIECE):
        piece = leaf[start : start + PIECE]
        bits = piece.view(f"uint{8 * piece.dtype.itemsize}").astype(np.uint32)
        words += place_sums(bits, np.arange(start, start + piece.size).astype(np.uint32))
    return hexadecimal(words)


def scramble(x: Any) -> Any:
    """Murmur3's finalizer: maps 32-bit words one to one, and a flipped bit flips about half of the others."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def place_sums(bits: Any, index: Any) -> list[Any]:
    """Two 32-bit words that change with any element: sums of scrambled values and positions, mod 2^32."""
    return [scramble(bits ^ scramble(index + np.uint32(salt))).sum(dtype=np.uint32) for salt in (0, 0x9E3779B9)]


@jax.jit
def leaf_words(leaf: Array) -> Array:
    """`place_sums` of a leaf on any devices."""
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # row-major position
        place = jnp.arange(bits.shape[axis], dtype=jnp.uint32) * jnp.uint32(stride % 2**32)
        index = index + place.reshape([-1] + [1] * (bits.ndim - 1 - axis))
        stride *= bits.shape[axis]
    return jnp.stack(place_sums(bits.astype(jnp.uint32), index))


def digests(tree: Any) -> dict[str, str]:
    """The digest (16 hex digits) of each leaf by its name. It depends on the values alone, not on the sharding."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {leaf_name(path): leaf_digest(leaf) for path, leaf in flat}


def leaf_digest(leaf: Array) -> str:
    """The digest of one leaf: of a small one on the host, where that takes less time than compiling for its shape."""
    if leaf.size <= SMALL and leaf.is_fully_addressable:
        return array_digest(np.asarray(leaf))
    return hexadecimal(np.asarray(leaf_words(leaf)))


def hexadecimal(words: np.ndarray) -> str:
    return "".join(f"{int(word):08x}" for word in words)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names whose values differ, or that only one of the two has."""
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def digest(tree: Any) -> str:
    """One digest of a tree of arrays, their names, shapes and dtypes: 16 hex digits."""
    return digest_of(digests(tree), [f"{leaf.shape} {leaf.dtype}" for leaf in jax.tree.leaves(tree)])


def load_digested(load: Callable[[Keep], Params], config: GemmaConfig) -> tuple[Params, str]:
    """What `load(keep)` loads, and the `digest` of the leaves that it shows to `keep`."""
    found: dict[str, tuple[str, str]] = {}

    def keep(name: str, leaf: Array) -> Array:
        found[name] = leaf_digest(leaf), f"{leaf.shape} {leaf.dtype}"
        return leaf

    params, names = load(keep), leaf_names(config)
    return params, digest_of({name: found[name][0] for name in names}, [found[name][1] for name in names])


def read_digest(read: Reader, config: GemmaConfig) -> str:
    """`digest` of the weights from `read`, in float32, one leaf at a time on the host."""
    found, shapes = {}, []
    for name, letters in leaf_names(config).items():
        index = tuple(slice(0, size) for size in leaf_shape(name, letters, config))
        if letters[0] == "L":
            leaf = np.stack([read(name, layer, index[1:]).astype(np.float32) for layer in layers_of(name, config)])
        else:
            leaf = read(name, 0, index).astype(np.float32)
        found[name] = array_digest(leaf)
        shapes.append(f"{leaf.shape} {leaf.dtype}")
    return digest_of(found, shapes)


def digest_of(digests: dict[str, str], shapes: list[str]) -> str:
    return hashlib.sha256(repr((digests, shapes)).encode()).hexdigest()[:16]
