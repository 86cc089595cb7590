"""Mutation testing: small mistakes, one at a time, in the parts that everything rests on; the tests meant to guard a part must notice each.

    python benchmarks/mutation.py                  # every part
    python benchmarks/mutation.py budget --list    # one part; --list only shows its mutants

Mutants are cosmic-ray's. Its own runner starts a fresh interpreter a mutant, most of whose time would go into importing torch; here each
mutant lives in a fork of one process that has imported everything but `kvpress`, and no file is changed. Prints one JSON line a survivor
or mutant that hangs, and one a part. `ACCEPTED` names survivors that change nothing; the exit code is 1 when there are others, or when an
accepted one is none.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BINARY = ("Add_Sub", "Sub_Add", "Mul_Add", "FloorDiv_Mul", "Mod_Add", "BitAnd_BitOr", "BitOr_BitAnd", "Pow_Mul")
COMPARED = (
    "Lt_LtE",
    "Lt_GtE",
    "LtE_Lt",
    "LtE_Gt",
    "Gt_GtE",
    "Gt_LtE",
    "GtE_Gt",
    "GtE_Lt",
    "Eq_NotEq",
    "NotEq_Eq",
    "Is_IsNot",
    "IsNot_Is",
)
PLAIN = (
    "NumberReplacer",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ZeroIterationForLoop",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceUnaryOperator_USub_UAdd",
)
PYTEST = ("-x", "-q", "--no-header", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception")
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in BINARY),
    *(f"core/ReplaceComparisonOperator_{name}" for name in COMPARED),
    *(f"core/{name}" for name in PLAIN),
)


@dataclass(frozen=True)
class Part:
    """A file and the tests that guard it, the quickest first.

    Attributes:
        module, path: of what is mutated.
        tests: arguments of pytest.
    """

    module: str
    path: str
    tests: tuple[str, ...]


_SLOT_TESTS = (
    "tests/cache/test_slot_table.py",
    "tests/cache/test_shared_positions.py",
    "tests/cache/test_prepared_slots.py",
    "tests/cache/test_slot_table_machine.py",
)
PARTS = {
    "budget": Part("kvpress.policies.budget", "policies/budget.py", ("tests/policies/test_budget_values.py",)),
    "masks": Part("kvpress.masks", "kvpress/masks.py", ("tests/cache/test_masks_and_tokens.py",)),
    "tokens": Part("kvpress.tokens", "kvpress/tokens.py", ("tests/cache/test_masks_and_tokens.py",)),
    "slots": Part("kvpress.slots", "kvpress/slots.py", _SLOT_TESTS),
    "key_values": Part("kvpress.key_values", "kvpress/key_values.py", _SLOT_TESTS),
    "columns": Part("kvpress.columns", "kvpress/columns.py", _SLOT_TESTS),
}
PAUSE = 0.02  # seconds between two looks at a mutant's process
ONE_ROW = "the branch for batch rows that are alike"
LAST_OF_TWO = "the mask is two-dimensional here"
SIZE_ONE = "the dimension has one entry"
NEGATIVE = "whatever is negative is empty, and sorts before every token"
HELD = "there is a head, and none holds fewer than no token"
SOONER = "only what is known is asked again"
_ONES = (
    'rest = torch.ones(mask.shape[0], arguments["kv_length"] - mask.shape[-1], dtype=torch.bool, device=mask.device)'
)
_SHORT = 'if mask.shape[-1] < arguments["kv_length"]:  # tokens fed without a mask of their own are real'
_RANGE = "positions = torch.arange(before[0], before[0] + rows, dtype=torch.int32, device=device)[None]"
_VALID = "valid = mask[:, 0, 0, -rows:].to(device)"
_COUNTED = "counts = tuple(valid.sum(dim=-1).tolist())"
_CUMULATED = "positions = torch.where(valid, start + valid.int().cumsum(-1, dtype=torch.int32) - 1, -1)"
_SEEN = "seen = tuple(past + count for past, count in zip(before, counts, strict=True))"
_SIZE = "tokens = ((self.size or 0) - fixed_bytes) // bytes_per_token - spare"
_LENGTH = "length = None if self.rows is None else self.count"
_SPARE_KEPT = "kept = kept.scatter(-1, self.spare, -1)"
_SPARE_SORTED = "positions = self.positions.scatter(-1, spare, -1)"
_KEPT_SHOWN = "kept = kept[..., : int(self.held.max(initial=0))]"
_KEPT = "kept = int(self.held.max(initial=0))"
_ORDER = "order = positions.argsort(dim=-1, stable=True)[..., self.count - kept :]"
_UNKNOWN = "self._complete = False  # known to have no empty slot; real tokens appended or exchanged do not change that"
_BEGUN = "self.held, self._complete = numpy.zeros(keys.shape[:2], dtype=numpy.int64), False"
_MASKED = "if min(counts) < positions.shape[-1]:"


def _accepted(*changes: tuple[str, str, str, str]) -> dict[str, str]:
    """`(line, what, by what, why)` as `- before + after` -> why."""
    return {f"- {line} + {line.replace(old, new, 1)}": why for line, old, new, why in changes}


ACCEPTED = {  # part -> a survivor -> why it changes nothing
    "budget": _accepted(
        ("@dataclass(frozen=True)", "True", "False", "nobody writes to it"),
        (_SIZE, "or 0", "or 1", "a size is given there"),
        (_SIZE, "or 0", "or -1", "a size is given there"),
    ),
    "masks": _accepted(
        (_ONES, '"] - mask', '"] + mask', "what is too long is cut off in the last line"),
        (_ONES, "] - mask.shape[-1]", "] - mask.shape[+1]", LAST_OF_TWO),
        (_SHORT, " < ", " <= ", "nothing is appended then"),
        (_SHORT, "[-1]", "[+1]", LAST_OF_TWO),
        ("mask = torch.cat([mask, rest], dim=-1)", "-1", "+1", LAST_OF_TWO),
    ),
    "tokens": _accepted(
        ("key = (before, rows, mask is None)", "is None", "is not None", "one of two values all the same"),
        (_VALID, "[:, 0, 0", "[:, -1, 0", SIZE_ONE),
        (_VALID, "[:, 0, 0", "[:, 0, -1", SIZE_ONE),
        (_RANGE, "arange(before[0]", "arange(before[ -1]", ONE_ROW),
        (_RANGE, ", before[0]", ", before[ -1]", ONE_ROW),
        ("return Tokens(rows, counts, seen, positions, seen[0] - 1)", "[0]", "[ -1]", ONE_ROW),
        ("@dataclass(frozen=True)", "True", "False", "nobody writes to it"),
        (_SEEN, "strict=True", "strict=False", "a mask has as many rows as the batch"),
        (_COUNTED, "dim=-1", "dim=+1", LAST_OF_TWO),
        (_CUMULATED, "cumsum(-1", "cumsum(+1", LAST_OF_TWO),
    ),
    "slots": _accepted(
        (_MASKED, " < ", " <= ", SOONER),
        (_MASKED, "[-1]", "[+1]", "positions are two-dimensional"),
        ("if counts.min() < kept:", " < ", " <= ", "no slot is surplus then"),
        (_LENGTH, "is None", "is not None", "columns are cut to the slots in use, or longer than those: only memory"),
        (_LENGTH, "self.rows is", "not self.rows is", "as the line before"),
        (_SPARE_KEPT, "spare, -1", "spare, - 2", NEGATIVE),
        (_SPARE_SORTED, "spare, -1", "spare, - 2", NEGATIVE),
        (_KEPT_SHOWN, "initial=0", "initial= -1", HELD),
        (_KEPT, "initial=0", "initial= -1", HELD),
        (_KEPT, "initial=0", "initial= 1", "a steady table holds a token of some head at least"),
        ("self.held += counts[0]", "[0]", "[ -1]", "counts are alike in that branch"),
        (_ORDER, "stable=True", "stable=False", "only empty slots have equal positions"),
        (_UNKNOWN, "= False", "= True", "the first tokens, or a loaded state, begin anew"),
        (_BEGUN, "False", "True", "place takes it back where a token is padding"),
    ),
    "key_values": _accepted(
        (
            "if TYPE_CHECKING:",
            "if TYPE",
            "if not TYPE",
            "what is imported there is asked for by the type checker alone",
        ),
    ),
}


@dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        source: of the whole file.
        change: `- before + after`.
        line: number in the original.
    """

    source: str
    change: str
    line: int


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant that is another program: annotations are no part of it."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    known = {_program(source)}
    for name in OPERATORS:
        operator = get_operator(name)()
        occurrence = 0
        while (changed := mutate_code(source.encode(), operator, occurrence)) is not None:
            occurrence += 1
            text = changed.decode() if isinstance(changed, bytes) else changed
            try:
                program = _program(text)
            except SyntaxError:
                continue
            if program in known:
                continue
            known.add(program)
            yield Mutant(text, *_change(source, text))


def _program(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                argument.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def _change(before: str, after: str) -> tuple[str, int]:
    old, new = before.splitlines(), after.splitlines()
    for tag, first, last, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            removed, added = (" ".join(line.strip() for line in lines) for lines in (old[first:last], new[start:end]))
            return f"- {removed} + {added}", first + 1
    raise ValueError("no line changed")


class _Swap(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from given source."""

    def __init__(self, part: Part, source: str) -> None:
        self.part, self.source = part, source

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.part.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(ROOT / self.part.path))

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, str(ROOT / self.part.path), "exec"), module.__dict__)


def run(part: Part, source: str, timeout: float) -> str:
    """`"survived"`, `"killed"` or `"timeout"`: the part's tests with `source` in place of its file."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        import pytest

        sys.meta_path.insert(0, _Swap(part, source))
        code = pytest.main([*PYTEST, *(str(ROOT / test) for test in part.tests)])
        os._exit(int(code))
    for _ in range(round(timeout / PAUSE)):  # looks are counted, so that time in which all of this is halted is not
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(PAUSE)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def mutate(name: str, only: Sequence[int] | None, skip: int, timeout: float) -> bool:
    """Run a part; whether nothing unexpected survived."""
    part, accepted = PARTS[name], ACCEPTED.get(name, {})
    source = (ROOT / part.path).read_text()
    start = time.monotonic()
    if run(part, source, 10 * timeout) != "survived":
        raise SystemExit(f"the tests of {name} fail, or take too long, without a mutant")
    took = time.monotonic() - start
    counts = {"killed": 0, "timeout": 0, "survived": 0}
    argued, unexpected = set(), 0
    for number, mutant in enumerate(mutants(source)):
        if number < skip:
            continue
        if number % 50 == 0:
            print(f"{name}: mutant {number}, {counts}", file=sys.stderr, flush=True)
        if only is not None and mutant.line not in only:
            continue
        outcome = run(part, source=mutant.source, timeout=max(timeout, 8 * took))
        counts[outcome] += 1
        if outcome == "timeout":
            print(json.dumps({"part": name, "line": mutant.line, "timeout": mutant.change}), flush=True)
        if outcome != "survived":
            continue
        argued.add(mutant.change)
        unexpected += mutant.change not in accepted
        why = accepted.get(mutant.change)
        print(json.dumps({"part": name, "line": mutant.line, "survivor": mutant.change, "why": why}), flush=True)
    stale = sorted(set(accepted) - argued) if only is None and not skip else []
    facts = {
        "part": name,
        "mutants": sum(counts.values()),
        **counts,
        "argued": len(argued) - unexpected,
        "stale": stale,
    }
    print(json.dumps({**facts, "tests_s": round(took, 1), "s": round(time.monotonic() - start, 1)}), flush=True)
    return not unexpected and not stale


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--line", type=int, nargs="+", help="only mutants of these lines")
    parser.add_argument("--skip", type=int, default=0, help="go on after so many mutants")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a mutant, at least")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if given.list:
        for name in given.parts:
            for mutant in mutants((ROOT / PARTS[name].path).read_text()):
                print(json.dumps({"part": name, "line": mutant.line, "change": mutant.change}))
        return 0
    for module in (
        "numpy",
        "torch",
        "transformers",
        "transformers.cache_utils",
        "hypothesis",
        "hypothesis.stateful",
        "pytest",
    ):
        importlib.import_module(module)
    import torch
    from transformers import DynamicCache, LlamaForCausalLM  # noqa: F401  their modules are imported when they are first named

    torch.set_num_threads(1)
    return int(not all([mutate(name, given.line, given.skip, given.timeout) for name in given.parts]))


if __name__ == "__main__":
    raise SystemExit(main())
