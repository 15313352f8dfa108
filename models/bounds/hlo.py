"""What a compiled program does: its loops, the traffic between chips, large copies, which inputs it overwrites, its cycles.

Reads the text of an optimized HLO module (`compiled.as_text()`) for a CPU, a GPU or a TPU. All shapes and bytes are those of
one chip. A chip receives, when n chips take part and an operand has b bytes:

    all-gather (n-1) b      reduce-scatter, all-to-all (n-1)/n b      all-reduce 2 (n-1)/n b      collective-permute b

The contents of a loop count once per trip. A loop whose trip count depends on data is "open" and counts as one trip, unless
`Module.trips` says otherwise.

A TPU's compiler writes the cycles that it expects behind each fusion (`estimated_cycles`); others write none. This is its
opinion, not a time. It leaves out asynchronous copies (`moved_bytes`), collectives, custom calls and the launch of a program.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that only move or convert data. A computation of these alone is a copy, whatever indices it calculates.
MOVES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "transpose", "reshape", "slice", "dynamic-slice",
    "convert",
}  # fmt: skip
# Copies that run beside the program; the operands of the last are those of the operation that it wraps.
ASYNCHRONOUS = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start", "async-start")
WIDTHS = {"pred": 1, "token": 0, "opaque": 0}  # bytes per number; the names of other types contain their bits


@dataclass(frozen=True)
class Shape:
    """The dtype and dimensions of an array on one chip."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0  # TPU: 0 is HBM, 1 is VMEM

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        width = WIDTHS[self.dtype] if self.dtype in WIDTHS else int(bits[0]) / 8 if bits else 0
        return math.ceil(math.prod(self.dims) * width)


@dataclass(frozen=True)
class Operation:
    """One line of a computation: `%name = shapes kind(arguments), attributes`."""

    name: str
    kind: str  # as HLO spells it: all-gather-start, while, fusion
    shapes: tuple[Shape, ...]  # of the result; of each element when it is a tuple
    operands: tuple[str, ...]
    arguments: str  # the text in the brackets: operands, or a constant's value
    attributes: str  # the text after the brackets

    def attribute(self, name: str) -> str | None:
        """The identifier after `name=`, as in `body=%region.3`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def calls(self) -> list[str]:
        """The computations that run as part of this operation, without the functions of reductions and the parts of loops."""
        if self.kind.endswith(("-done", "-update")) or self.kind == "while":
            return []
        branches = re.search(r"branch_computations=\{(.*?)\}", self.attributes)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return names + [c for key in ("calls", "true_computation", "false_computation") if (c := self.attribute(key))]


Computation = dict[str, Operation]  # by name, in the order of execution; Module.roots names the result


@dataclass(frozen=True)
class Module:
    """A parsed HLO module."""

    computations: dict[str, Computation]
    roots: dict[str, str]  # computation -> its root operation
    entry: str  # the computation where the program starts
    devices: int
    aliases: dict[tuple[int, ...], int]  # output -> the parameter whose memory it reuses
    trips: Mapping[str, int] = field(default_factory=dict)  # of open loops by their body, where the caller knows them
    branch: int | None = None  # the one that runs of each switch, or its last one if it has fewer; None: all of them


@dataclass(frozen=True)
class Loop:
    """A while loop; its computations by name."""

    body: str
    condition: str
    trips: int | None  # None: it depends on data


@dataclass(frozen=True)
class Collective:
    """One collective operation, and the bytes that a chip receives by it."""

    kind: str
    name: str
    shapes: tuple[Shape, ...]  # of input or output, whichever is larger: a gathered weight, a gradient before it is scattered
    group: int  # chips that take part together
    received: float  # bytes per execution
    times: int

    @property
    def bytes(self) -> float:
        """Bytes received in all executions."""
        return self.received * self.times


def parse(text: str | None) -> Module:
    """Parse `compiled.as_text()`. Raises ValueError for a text without a module, which some backends return."""
    text = text or ""
    computations: dict[str, Computation] = {}
    roots, entry, name = {}, "", ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif line.startswith("  ") and name and (operation := parse_operation(line)):
            computations[name][operation.name] = operation
            if line.lstrip().startswith("ROOT "):
                roots[name] = operation.name
    if not entry:
        raise ValueError("no HLO module: it has no ENTRY computation")
    head = text.partition("\n")[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head))
    pairs = re.findall(r"\{([\d, ]*)\}: \((\d+), \{\}", head.partition("input_output_alias=")[2])
    aliases = {tuple(int(i) for i in output.split(",") if i.strip()): int(parameter) for output, parameter in pairs}
    return Module(computations, roots, entry, devices, aliases)


def parse_operation(line: str) -> Operation | None:
    """Parse a line such as `%x = f32[2,4]{1,0} add(%a, %b), metadata=...`; None for a line that is not an operation."""
    line = re.sub(r"/\*.*?\*/", "", line.strip().removeprefix("ROOT "))
    found = re.match(r"%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest, shapes = rest[end:].lstrip().partition("(")[0], rest[end:].lstrip(), parse_shapes(rest[:end])
    start = len(kind)
    end = closing(rest, start)
    arguments = rest[start + 1 : end - 1]
    return Operation(found[1], kind, shapes, tuple(re.findall(r"%([\w.\-]+)", arguments)), arguments, rest[end:])


def closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"brackets do not close: {text[:80]}")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`(f32[2,4]{1,0:T(8,128)S(1)}, u32[])` -> its two shapes."""
    shapes = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", text):
        memory = re.search(r"S\((\d+)\)", layout)
        shapes.append(Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(memory[1]) if memory else 0))
    return tuple(shapes)


def operations(module: Module, computation: str, times: int = 1) -> Iterator[tuple[Operation, str, int]]:
    """Each operation that runs as part of `computation`, the computation that contains it, and how often it runs."""
    for operation in module.computations[computation].values():
        yield operation, computation, times
        if operation.kind == "while":
            loop = as_loop(module, computation, operation)
            for part in (loop.condition, loop.body):
                yield from operations(module, part, times * (1 if loop.trips is None else loop.trips))
        called = operation.calls
        if operation.kind == "conditional" and module.branch is not None:
            called = called[: module.branch + 1][-1:]
        for part in called:
            yield from operations(module, part, times)


def loops(module: Module, computation: str | None = None) -> list[Loop]:
    """Every loop that runs in `computation` (default: the whole program), in order; inner loops follow their outer one."""
    found = operations(module, computation or module.entry)
    return [as_loop(module, where, operation) for operation, where, _ in found if operation.kind == "while"]


def open_loops(module: Module) -> list[Loop]:
    """The loops whose trip count depends on data. A sampler has one for each size of its batch and its cache."""
    return [loop for loop in loops(module) if loop.trips is None]


def outermost(module: Module, found: list[Loop]) -> list[Loop]:
    """The loops that no other of them contains."""
    inside = {inner.body for loop in found for inner in loops(module, loop.body)}
    return [loop for loop in found if loop.body not in inside]


def as_loop(module: Module, computation: str, operation: Operation) -> Loop:
    condition, body = operation.attribute("condition"), operation.attribute("body")
    assert condition and body
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', operation.attributes)
    trips = int(known[1]) if known else count_trips(module, computation, operation, condition, body)
    return Loop(body, condition, module.trips.get(body) if trips is None else trips)


def count_trips(module: Module, computation: str, operation: Operation, condition: str, body: str) -> int | None:
    """The trips of a loop `for (i = start; i < limit; i += step)`, which a TPU's compiler does not state; None for others."""
    test = module.computations[condition][module.roots[condition]]
    if test.kind != "compare" or "direction=LT" not in test.attributes:
        return None
    counter = follow(module, condition, test.operands[0])
    index = counter.attribute("index")
    limit = constant(module, condition, test.operands[1])
    if counter.kind != "get-tuple-element" or index is None or limit is None:
        return None
    initial = follow(module, computation, operation.operands[0])
    following = module.computations[body][module.roots[body]]
    if initial.kind != "tuple" or following.kind != "tuple":
        return None
    start = constant(module, computation, initial.operands[int(index)])
    add = follow(module, body, following.operands[int(index)])
    steps = [constant(module, body, name) for name in add.operands] if add.kind == "add" else []
    step = next((value for value in steps if value), None)
    return None if start is None or step is None else max(0, -(-(limit - start) // step))


def follow(module: Module, computation: str, name: str) -> Operation:
    """The operation that `name` is a copy, bitcast or conversion of."""
    operation = module.computations[computation][name]
    while operation.kind in ("copy", "bitcast", "convert"):
        operation = module.computations[computation][operation.operands[0]]
    return operation


def constant(module: Module, computation: str, name: str) -> int | None:
    """The value of an integer constant; None for anything else."""
    operation = follow(module, computation, name)
    return int(operation.arguments) if operation.kind == "constant" and re.fullmatch(r"-?\d+", operation.arguments) else None


def collectives(module: Module, *computations: str) -> list[Collective]:
    """Every collective that runs in `computations` (default: the whole program) and involves more than one chip.

    A TPU's compiler splits an all-gather into a chain of fusions, each of which repeats it; the chain counts once.
    """
    found, chains = [], set()
    for start in computations or (module.entry,):
        for operation, where, times in operations(module, start):
            kind = operation.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            chain = re.search(r'chain_id="(\d+)"', operation.attributes)
            key = (start, operation.attribute("channel_id"), chain and chain[1])
            group = group_size(operation, module.devices)
            if group > 1 and not (chain and key in chains):
                chains.add(key)
                found.append(as_collective(module, operation, where, kind, group, times))
    return found


def as_collective(module: Module, operation: Operation, where: str, kind: str, group: int, times: int) -> Collective:
    body = module.computations[where]
    shapes = tuple(shape for name in operation.operands for shape in body[name].shapes)
    size = sum(shape.bytes for shape in shapes)
    if kind == "all-reduce" and only_slices_read(body, operation):
        kind = "reduce-scatter"  # a TPU's compiler writes it as a fusion of all-reduce and dynamic-slice
    rates = {"all-gather": group - 1, "all-reduce": 2 * (group - 1) / group, "collective-permute": 1}
    if kind == "all-gather":
        shapes = tuple(shape for shape in operation.shapes if shape.dims not in {s.dims for s in shapes}) or shapes
    return Collective(kind, operation.name, shapes, group, size * rates.get(kind, (group - 1) / group), times)


def only_slices_read(body: Computation, operation: Operation) -> bool:
    """Whether every use of the result, or of its elements, is a dynamic-slice."""
    readers = [other for other in body.values() if operation.name in other.operands]
    parts = [reader for reader in readers if reader.kind == "get-tuple-element"]
    if parts:
        return len(parts) == len(readers) and all(only_slices_read(body, part) for part in parts)
    return bool(readers) and all(reader.kind == "dynamic-slice" for reader in readers)


def group_size(operation: Operation, devices: int) -> int:
    """How many chips take part together. HLO has three notations: {{0,1},{2,3}}, [2,4]<=[8] and mesh['a'=2,'b'=4] {'b'}."""
    if operation.kind.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", operation.attributes)
        return len(pairs[1].split("},")) if pairs else devices
    text = operation.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if tiled := re.match(r"\[\d+,(\d+)\]", text):
        return int(tiled[1])
    if named := re.match(r"@?mesh.*?\[(.*?)\] ?\{(.*?)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def copies(module: Module, computation: str, least: int) -> list[tuple[Operation, int]]:
    """Copies of at least `least` bytes from main memory to main memory in `computation`, and how often each runs.

    A copy is a copy, transpose or convert operation, or a fusion that does nothing else. Transfers to a TPU's VMEM do not
    count, because every operand must go there.
    """
    found, inside = [], fused(module)
    for operation, where, times in operations(module, computation):
        kind = operation.kind.removesuffix("-start")
        moves = kind in ("copy", "transpose", "convert") or (kind == "fusion" and only_moves(module, operation))
        large = [shape for shape in operation.shapes if shape.bytes >= least]
        if moves and where not in inside and large and all(shape.memory == 0 for shape in large):
            found.append((operation, times))
    return found


def fused(module: Module) -> set[str]:
    """The computations inside fusions."""
    return {name for body in module.computations.values() for op in body.values() if op.kind == "fusion" for name in op.calls}


def only_moves(module: Module, fusion: Operation) -> bool:
    """Whether a fusion only moves data, apart from index arithmetic."""
    parts = [operation for name in fusion.calls for operation in module.computations[name].values()]
    return all(operation.kind in MOVES or all(not shape.dims for shape in operation.shapes) for operation in parts)


def copied_bytes(found: list[tuple[Operation, int]]) -> int:
    """The bytes that copies write. The result of an asynchronous copy contains its operand too; only the larger counts."""
    total = 0
    for operation, times in found:
        written = max if operation.kind.endswith("-start") else sum
        total += written(shape.bytes for shape in operation.shapes) * times
    return total


@dataclass(frozen=True)
class Cost:
    """What the compiler expects of one operation."""

    operation: Operation
    cycles: int  # per execution
    times: int

    @property
    def label(self) -> str:
        """The path of the source operation; the operation's own name where it has none."""
        path = re.search(r'op_name="([^"]*)"', self.operation.attributes)
        return path[1] if path and path[1] else self.operation.name


def costs(module: Module, *computations: str) -> list[Cost]:
    """Every operation of `computations` (default: the whole program) with an estimate; that of a fusion covers its parts."""
    found, inside = [], fused(module)
    for start in computations or (module.entry,):
        for operation, where, times in operations(module, start):
            estimate = re.search(r'"estimated_cycles":"(\d+)"', operation.attributes)
            if estimate and where not in inside:
                found.append(Cost(operation, int(estimate[1]), times))
    return found


def moved_bytes(module: Module, *computations: str) -> int:
    """HBM traffic of a TPU's asynchronous copies: into VMEM and out of it once; within HBM twice, read and written."""
    total = 0
    for start in computations or (module.entry,):
        for operation, _, times in operations(module, start):
            arrays = [shape for shape in operation.shapes if shape.dims]  # not indices and the flag that it is done
            if operation.kind in ASYNCHRONOUS and len(arrays) > 1 and not wraps_collective(module, operation):
                places = [shape.memory for shape in arrays[:2]]
                passes = 2 - sum(place != 0 for place in places)
                total += passes * min(shape.bytes for shape in arrays[:2]) * times
    return total


def wraps_collective(module: Module, operation: Operation) -> bool:
    """Whether an asynchronous operation runs a collective, which is traffic between chips."""
    return any(part.kind in COLLECTIVES for name in operation.calls for part in module.computations[name].values())
