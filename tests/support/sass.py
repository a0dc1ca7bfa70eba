"""Machine code of sm_90 as a graph of instructions: what a loop executes, counted without a GPU."""

import re
import shutil
import subprocess
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_emulated import ROOT, SIMT


def tool(name):
    """A tool of the CUDA toolkit or, failing that, the copy that Triton brings."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton

            bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
            found = str(bundled) if bundled.exists() else None
        except ImportError:
            pass
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def compile_kernels(folder, arch="90", csrc=ROOT / "csrc", source=SIMT / "ops.cpp"):
    """(binary, what ptxas says of it) of the kernels that a source instantiates."""
    cubin = folder / f"kernels_{arch}.cubin"
    command = [tool("nvcc"), "-std=c++20", "-O3", "-Xptxas", "-v", "-x", "cu", "-cubin"]
    command += [f"-arch=sm_{arch}", f"-I{csrc}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return cubin, done.stderr


def resources(log):
    """{mangled name: (registers, bytes of shared memory, bytes of spills, bytes of stack)}."""
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?[^\n]*"
    )
    return {
        name: (int(registers), int(shared or 0), int(spills), int(stack))
        for name, stack, spills, registers, shared in re.findall(pattern, log, re.DOTALL)
    }


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    conditional: bool
    target: int | None  # of a branch: index of an instruction


def functions(cubin):
    """{mangled name: its instructions}."""
    text = subprocess.check_output([tool("cuobjdump"), "-sass", str(cubin)], text=True)
    pieces = re.split(r"Function : (\w+)", text)
    return {name: _parse(body) for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def _parse(body):
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", body, re.MULTILINE)
    place = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    return [_instruction(text, place) for _, text in lines]


def _instruction(text, place):
    predicate, opcode, operands = re.fullmatch(r"(@!?\w+\s+)?(\S+)\s*(.*)", text).groups()
    target = None
    if opcode.startswith("BRA"):
        target = place[int(re.search(r"0x([0-9a-f]+)\s*$", operands).group(1), 16)]
    # BRA.DIV branches for a warp whose lanes are apart; BRA P0, target has a condition of its own.
    own = re.match(r"!?U?P\d", operands) is not None
    return Instruction(opcode, bool(predicate) or own or opcode == "BRA.DIV", target)


class Loop:
    """A natural loop: ``latch`` jumps back to ``header``, through which alone it is entered."""

    def __init__(self, code, before, header, latch):
        self.code, self.header, self.latch = code, header, latch
        self.body, waiting = {header, latch}, [latch]
        while waiting:
            index = waiting.pop()
            if index == header:
                continue
            waiting += before[index] - self.body
            self.body |= before[index]

    def holds(self, opcode):
        return sum(self.code[index].opcode.startswith(opcode) for index in self.body)

    def executed(self, **wanted):
        """The fewest instructions of one round that executes the wanted number of each opcode, as
        in ``executed(LDG_E_128=4)``: what is skipped unless wanted is not part of it."""
        opcodes = {name.replace("_", "."): count for name, count in wanted.items()}

        def tally(seen, index):
            opcode = self.code[index].opcode
            return tuple(
                min(count + opcode.startswith(name), opcodes[name])
                for name, count in zip(opcodes, seen, strict=True)
            )

        start = (self.header, tally((0,) * len(opcodes), self.header))
        steps, waiting = {start: 1}, deque([start])
        while waiting:
            index, seen = state = waiting.popleft()
            if index == self.latch and seen == tuple(opcodes.values()):
                return steps[state]
            for follower in successors(self.code, index):
                if follower not in self.body or follower == self.header:
                    continue
                after = (follower, tally(seen, follower))
                if after not in steps:
                    steps[after] = steps[state] + 1
                    waiting.append(after)
        raise AssertionError(f"no round of the loop executes {opcodes}")


def successors(code, index):
    instruction = code[index]
    if instruction.opcode in ("EXIT", "RET", "BRX") and not instruction.conditional:
        return []
    following = [] if instruction.target is None else [instruction.target]
    if instruction.target is None or instruction.conditional:
        following += [index + 1] if index + 1 < len(code) else []
    return following


def loops(code):
    """All loops, the smallest first."""
    before = defaultdict(set)
    for index in range(len(code)):
        for follower in successors(code, index):
            before[follower].add(index)
    found = [
        Loop(code, before, instruction.target, index)
        for index, instruction in enumerate(code)
        if instruction.target is not None and instruction.target <= index
    ]
    # Code set apart for lanes that have diverged jumps back too, into the middle of something.
    found = [loop for loop in found if 0 not in loop.body]
    return sorted(found, key=lambda loop: len(loop.body))
