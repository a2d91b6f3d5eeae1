"""Check whether an asynchronous exception could skip the end of a `with` or `try` block.

A thread can set an exception that CPython raises in another thread. CPython raises such a pending
exception only at certain instructions. Two of them are harmful:

- Since Python 3.14, `with` calls ``__enter__`` like any function. An exception at the end of that
  call leaves a lock held, because the block that releases it was never entered (CPython issue
  148874).
- Python 3.12 and 3.13 compile the last jump of some `while` loops outside the block around the
  loop. An exception there skips the end of the block.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

LOADS_ENTER = "LOAD_SPECIAL"
"""The instruction with which `with` loads ``__enter__`` before calling it (Python 3.14 and newer).
"""
# In Python 3.14, CALL_KW does not raise pending exceptions.
CHECKS = {"CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD"}
"""The instructions at which CPython raises a pending exception."""
EXITS = {"RETURN_VALUE", "RETURN_CONST", "YIELD_VALUE", "RAISE_VARARGS", "RERAISE"}
IS_UNAFFECTED = sys.version_info < (3, 12)
RAISES_AT_ONCE = sys.version_info < (3, 13)
"""Whether a thread raises a pending exception as soon as it gets the GIL.

In newer versions, the thread raises it at the next instruction in `CHECKS`, or when the current C
function returns.
"""
CODE_UNIT = 2
# Reading the instructions takes long enough for the checked thread to continue.
CACHE_SIZE = 100
"""Maximum number of functions whose instructions are cached."""


class _Code(NamedTuple):
    instructions: Sequence[dis.Instruction]
    indexes: Mapping[int, int]
    """Maps the offset of each instruction to its index in ``instructions``.

    In Python 3.12, a thread's offset can be that of a cache entry after an instruction, so these
    offsets are included.
    """
    harmful: frozenset[int]
    """The indexes of instructions where an exception would skip the end of a block."""

    def after(self, index: int) -> list[int]:
        """Return the indexes of the instructions that can follow.

        The list is empty if the function exits.
        """
        instruction = self.instructions[index]
        is_jump = instruction.opcode in dis.hasjrel
        jumps = [self.indexes[instruction.argval]] if is_jump else []
        goes_on = instruction.opname not in EXITS and not instruction.opname.startswith("JUMP_")
        return [*jumps, index + 1] if goes_on else jumps


def may_skip_a_block(frame: FrameType | None) -> bool:
    """Check whether an exception raised now could skip the end of a `with` or `try` block.

    :param frame: the current frame of the thread. The frames of its callers are also checked.
    """
    if IS_UNAFFECTED:
        return False
    while frame is not None:
        found = _ahead(_read(frame.f_code), frame.f_lasti)
        if found is not None:
            return found
        # If the function returns before the exception is raised, its caller raises it.
        frame = frame.f_back
    return False


def _ahead(code: _Code, offset: int) -> bool | None:
    """Check whether a function could raise a pending exception at a harmful instruction.

    :param offset: the offset of the function's current instruction.
    :return: None if the function can exit before it raises the exception.
    """
    start = code.indexes[offset]
    name = code.instructions[start].opname
    if name in CHECKS:
        if start in code.harmful and (name == "CALL" or RAISES_AT_ONCE):
            return True
        if RAISES_AT_ONCE:
            return False
    may_exit = False
    seen = {start}
    ahead = code.after(start)
    while ahead:
        index = ahead.pop()
        if index in code.harmful:
            return True
        name = code.instructions[index].opname
        may_exit = may_exit or name in EXITS
        if index not in seen and name not in CHECKS:
            seen.add(index)
            ahead += code.after(index)
    return None if may_exit else False


@lru_cache(maxsize=CACHE_SIZE)
def _read(code: CodeType) -> _Code:
    instructions = list(dis.get_instructions(code))
    blocks: Any = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]

    def block_of(offset: int) -> int | None:
        return next((block.target for block in blocks if block.start <= offset < block.end), None)

    return _Code(
        instructions,
        {offset: index for index, offset in _offsets(instructions, len(code.co_code))},
        frozenset(
            index
            for index, op in enumerate(instructions)
            if (op.opname == "CALL" and index and instructions[index - 1].opname == LOADS_ENTER)
            or (op.opname == "JUMP_BACKWARD" and block_of(op.offset) != block_of(op.argval))
        ),
    )


def _offsets(instructions: Sequence[dis.Instruction], end: int) -> Iterator[tuple[int, int]]:
    # Yield each index with each offset of its instruction, which is one for each code unit.
    ends = [instruction.offset for instruction in instructions[1:]] + [end]
    for index, (instruction, next_offset) in enumerate(zip(instructions, ends, strict=True)):
        for offset in range(instruction.offset, next_offset, CODE_UNIT):
            yield index, offset
