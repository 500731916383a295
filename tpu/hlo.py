"""What travels between devices, read from the text of a compiled program."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|(?:branch|true|false)_computations?)=\{?((?:%?[\w.\-]+(?:, )?)+)")


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Attributes, as written."""
    root: bool


Computations = dict[str, dict[str, Instruction]]


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      shapes: of the arrays that result, `bf16[4096,1024]`.
      times: how often a device runs it when the program runs once: those in a loop, as often as the loop goes round.
      bytes: that reach a device each time.
      where: what it is for, as jax names it.
    """

    kind: str
    shapes: tuple[str, ...]
    times: int
    bytes: float
    where: str


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of a compiled program of `devices` devices, once.

    A collective that runs beside other work is written several times, once in each part of that work; all carry one
    channel's number. Of n devices each receives, of an array of b bytes: all-gather (n − 1)/n · b of the result,
    reduce-scatter (n − 1) · b of the result, all-reduce both, all-to-all (n − 1)/n · b, collective-permute b.
    """
    program = parse(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    found: dict[tuple[str, str], Collective] = {}
    for inside, times, instruction in _reached(program, entry[1] if entry else next(iter(program)), 1):
        if (collective := _read(instruction, inside, times, devices)) is None:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = (collective.kind, channel[1] if channel else instruction.name)
        # Parts of it may stand in loops within the work it runs beside: the fewest times are its own.
        if key not in found or times < found[key].times:
            found[key] = collective
    return list(found.values())


def totals(found: list[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of one run of the program, a device."""
    sums: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        ours = [c for c in found if c.kind == kind]
        if ours:
            sums[kind] = {"count": sum(c.times for c in ours), "bytes": round(sum(c.times * c.bytes for c in ours))}
    return sums


def parse(text: str) -> Computations:
    """{computation: {instruction's name: it}}."""
    program: Computations = {}
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and not line.startswith(" "):
            current = program.setdefault(head[2], {})
        elif current is not None and (match := _INSTRUCTION.match(line)):
            kind, rest = _split_type(match[2])
            opcode, _, rest = rest.partition("(")
            arguments = rest.partition(")")[0]
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments)) or (arguments,)
            current[match[1]] = Instruction(match[1], kind, opcode, operands, rest, "ROOT " in line[: line.find("=")])
    return program


def _split_type(text: str) -> tuple[str, str]:
    """(the type, what follows): a tuple's type ends with its parenthesis, another's with the first blank."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return text[: i + 1], text[i + 2 :]
    return text, ""


def _reached(
    program: Computations, name: str, times: int, seen: tuple[str, ...] = ()
) -> Iterator[tuple[str, int, Instruction]]:
    """(the computation it is in, how often it runs, instruction) of all that is run."""
    for instruction in program.get(name, {}).values():
        yield name, times, instruction
        if instruction.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
            if body and body[1] not in seen:
                rounds = times * trip_count(program, name, instruction)
                yield from _reached(program, body[1], rounds, (*seen, name))
        elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
            for group in _CALLED.findall(instruction.rest):
                for called in re.findall(r"[\w.\-]+", group):
                    if called not in seen:
                        yield from _reached(program, called, times, (*seen, name))


def trip_count(program: Computations, caller: str, loop: Instruction) -> int:
    """How often a loop `for (i = start; i < end; i += step)` goes round; 1 where it is none."""
    names = {key: re.search(rf"{key}=%?([\w.\-]+)", loop.rest) for key in ("condition", "body")}
    if not (names["condition"] and names["body"]):
        return 1
    if known := re.search(r"known_trip_count\D*(\d+)", loop.rest):
        return int(known[1])
    condition, body = (program.get(match[1], {}) for match in names.values() if match)
    test = next((i for i in condition.values() if i.root), None)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
        return 1
    element, end = condition.get(test.operands[0]), _constant(condition, test.operands[-1])
    index = re.search(r"index=(\d+)", element.rest) if element else None
    if end is None or index is None:
        return 1
    start = _constant(program[caller], _element(program[caller], loop.operands[0], int(index[1]))) or 0
    result = next((i.name for i in body.values() if i.root), "")
    step = _increment(body, _element(body, result, int(index[1])))
    return max(1, math.ceil((end - start) / step))


def _element(computation: dict[str, Instruction], name: str, index: int) -> str:
    made = computation.get(name)
    return made.operands[index] if made is not None and made.opcode == "tuple" and index < len(made.operands) else ""


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    made = computation.get(name)
    if made is None or made.opcode not in ("constant", "copy"):
        return None
    if made.opcode == "copy":
        return _constant(computation, made.operands[0])
    return int(made.operands[0]) if re.fullmatch(r"-?\d+", made.operands[0]) else None


def _increment(computation: dict[str, Instruction], name: str) -> int:
    """What is added to a counter in one round: the constants on the way back to where it comes in."""
    total, made = 0, computation.get(name)
    while made is not None and made.opcode in ("add", "copy"):
        constants = [_constant(computation, operand) for operand in made.operands]
        total += sum(c for c in constants if c is not None)
        others = [o for o, c in zip(made.operands, constants, strict=True) if c is None]
        made = computation.get(others[0]) if others else None
    return total or 1


def _read(instruction: Instruction, inside: str, times: int, devices: int) -> Collective | None:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in KINDS:
        return None
    shapes = [f"{kind}[{sizes}]" for kind, sizes in _ARRAY.findall(instruction.type)]
    if opcode == "collective-permute":
        shapes = shapes[:1]
    elif instruction.opcode == "all-gather-start":  # (what goes in …, what comes out …)
        shapes = shapes[len(shapes) // 2 :]
    size, n = sum(map(size_of, shapes)), group_size(instruction.rest, devices)
    # On TPUs an all-reduce and the cut of its result are fused into what is a reduce-scatter.
    kind = "reduce-scatter" if opcode == "all-reduce" and inside.startswith("all-reduce-scatter") else opcode
    share = {
        "all-gather": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1 if opcode == "reduce-scatter" else (n - 1) / n,
        "all-to-all": (n - 1) / n,
    }.get(kind, 1.0)
    where = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, tuple(shapes), times, size * share, where[1] if where else "")


def size_of(shape: str) -> float:
    """Bytes of an array.

    Example:
      >>> size_of("bf16[4,128]"), size_of("f32[]")
      (1024.0, 4.0)
    """
    kind, _, sizes = shape.removesuffix("]").partition("[")
    digits = re.search(r"\d+", kind)
    width = _BYTES.get(kind, int(digits[0]) / 8 if digits else 1)
    return float(width * math.prod(int(n) for n in sizes.split(",") if n))


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in a collective together, however its groups are written.

    Example:
      >>> group_size("replica_groups=[4,8]<=[32]", 32), group_size("replica_groups={{0,1},{2,3}}", 4)
      (8, 2)
      >>> group_size("replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}", 8)
      2
    """
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        # 'axis':(before)size is a part of an axis.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes.get(name, 1) for name, part in parts)
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return match[1].count(",") + 1
    return devices
