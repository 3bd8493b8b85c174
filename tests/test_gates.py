"""The gates of the house that ruff can't keep: sizes, the public names, no arrow up the file.

``python tests/test_gates.py`` prints the figures.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY, COMMAND = "openai_sft", "openai_sft_example"
REHEARSAL, LOCAL = "openai_sft_rehearsal", "openai_sft_local"
REPORT = "openai_sft_report"
MODULES = (LIBRARY, COMMAND, REHEARSAL, LOCAL, REPORT)
FACE = "OpenAISFT"
FUNCTION_LINES, CLASS_LINES, FACE_ATTRIBUTES = 60, 800, 12
UNTYPED = 11  # dict[str, Any] between our own functions: lower it with each one that goes
BANNER = re.compile(r"# ── (.+?) ─+")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = Function | ast.Lambda
Definition = Function | ast.ClassDef


def source(module: str) -> str:
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module))


def lines_of(node: Definition) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def lengths(module: str, kind: type[ast.AST]) -> dict[str, int]:
    """The lines of each function or class, by its dotted name, the longest first."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, path: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = path
            if isinstance(child, Definition):
                inner = (*path, child.name)
                if isinstance(child, kind):
                    found[".".join(inner)] = lines_of(child)
            visit(child, inner)

    visit(tree(module), ())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def functions_over_the_limit(module: str) -> dict[str, int]:
    long = lengths(module, ast.FunctionDef) | lengths(module, ast.AsyncFunctionDef)
    return {name: lines for name, lines in long.items() if lines > FUNCTION_LINES}


def classes_over_the_limit(module: str) -> dict[str, int]:
    return {n: lines for n, lines in lengths(module, ast.ClassDef).items() if lines > CLASS_LINES}


def face() -> ast.ClassDef:
    return next(
        node for node in tree(LIBRARY).body if isinstance(node, ast.ClassDef) and node.name == FACE
    )


def face_methods() -> list[str]:
    return [node.name for node in face().body if isinstance(node, Function)]


def face_attributes() -> list[str]:
    """What is assigned on ``self`` anywhere in the class."""
    return sorted(
        {
            node.attr
            for node in ast.walk(face())
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    )


def names_bound_by(statement: ast.stmt) -> set[str]:
    """The names that a statement of the top level defines; imports define none."""
    if isinstance(statement, Definition):
        return {statement.name}
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def public_names() -> tuple[set[str], set[str], set[str]]:
    """``__all__``; the functions and classes without an underscore; the constants without one."""
    listed: set[str] = set()
    definitions: set[str] = set()
    constants: set[str] = set()
    for statement in tree(LIBRARY).body:
        names = {name for name in names_bound_by(statement) if not name.startswith("_")}
        if isinstance(statement, Definition):
            definitions |= names
        else:
            constants |= names
        if isinstance(statement, ast.Assign) and "__all__" in names_bound_by(statement):
            listed = set(ast.literal_eval(statement.value))
    return listed, definitions, constants


def imported_by_our_other_modules() -> set[str]:
    return {
        alias.name
        for module in MODULES[1:]
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and node.module == LIBRARY
        for alias in node.names
        if not alias.name.startswith("_")
    }


def own_names(scope: Scope) -> set[str]:
    """Arguments of a function and what it assigns: they hide names of the module."""
    arguments = scope.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
    outer: set[str] = set()
    waiting: list[ast.AST] = [*scope.body] if isinstance(scope.body, list) else [scope.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Global):
            outer.update(node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, Definition):
            names.add(node.name)
        elif not isinstance(node, ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return names - outer


def references(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[str]:
    """The names that code reads, without annotations and without what a function hides."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node.id
    within = hidden
    if isinstance(node, Function | ast.Lambda):
        within = hidden | own_names(node)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        inner = within if field == "body" else hidden
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from references(child, inner)


def arrows_up() -> list[tuple[str, str]]:
    """``(what refers, name of a later section)``, but for the section of the face."""
    text = source(LIBRARY)
    banners = [n for n, line in enumerate(text.splitlines(), 1) if BANNER.fullmatch(line)]

    def section(node: ast.stmt) -> int:
        return sum(line < node.lineno for line in banners)

    body = ast.parse(text).body
    home = {name: section(node) for node in body for name in names_bound_by(node)}
    arrows: set[tuple[str, str]] = set()
    for statement in body:
        here = section(statement)
        if here == home[FACE] or isinstance(statement, ast.If):
            continue
        parts = statement.body if isinstance(statement, ast.ClassDef) else [statement]
        owner = f"{statement.name}." if isinstance(statement, ast.ClassDef) else ""
        for part in parts:
            name = getattr(part, "name", f"line {part.lineno}")
            arrows |= {(owner + name, r) for r in references(part) if home.get(r, -1) > here}
    return sorted(arrows)


def untyped() -> list[str]:
    """The functions between our own whose signature says ``dict[str, Any]``, once for each time.

    What a user calls stands at the edge, where plain dicts stay: names of ``__all__`` and the
    methods without an underscore of its classes.
    """
    listed = public_names()[0]
    found: list[str] = []

    def visit(node: ast.AST, path: tuple[str, ...], edge: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner, at_the_edge = path, edge
            if isinstance(child, Definition):
                inner = (*path, child.name)
                at_the_edge = (
                    (edge and not child.name.startswith("_")) if path else child.name in listed
                )
            if isinstance(child, Function):
                signature = ast.unparse(child.args) + ast.unparse(child.returns or ast.Tuple([]))
                times = 0 if at_the_edge else signature.count("dict[str, Any]")
                found.extend([".".join(inner)] * times)
                at_the_edge = False
            visit(child, inner, at_the_edge)

    visit(tree(LIBRARY), (), True)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_function_is_read_on_one_page(module):
    assert functions_over_the_limit(module) == {}


@pytest.mark.parametrize("module", MODULES)
def test_a_class_is_held_in_one_head(module):
    assert classes_over_the_limit(module) == {}


def test_the_face_keeps_little():
    assert len(face_attributes()) <= FACE_ATTRIBUTES, face_attributes()


def test_every_function_and_class_without_an_underscore_is_public_and_no_other():
    listed, definitions, constants = public_names()

    assert listed - constants == definitions


def test_a_constant_is_public_where_another_module_of_ours_needs_it():
    listed, _, constants = public_names()

    assert imported_by_our_other_modules() & constants <= listed


def test_no_arrow_goes_up_the_file_but_from_the_face():
    assert arrows_up() == []


def test_no_more_signatures_between_our_own_functions_are_untyped():
    assert len(untyped()) <= UNTYPED, untyped()


def figures() -> Iterator[str]:
    for module in MODULES:
        name, lines = next(iter(lengths(module, ast.FunctionDef).items()))
        over = len(functions_over_the_limit(module))
        yield f"{module}.py: {len(source(module).splitlines())} lines"
        yield f"  longest function: {name}, {lines}; {over} over {FUNCTION_LINES}"
        name, lines = next(iter(lengths(module, ast.ClassDef).items()))
        yield f"  longest class: {name}, {lines}"
    kept = face_attributes()
    yield f"{FACE}: {lines_of(face())} lines, {len(face_methods())} methods"
    yield f"  {len(kept)} attributes: {', '.join(kept)}"
    listed, definitions, constants = public_names()
    yield f"public names: {len(listed)} in __all__, {len(definitions)} functions and classes"
    yield f"  not listed: {', '.join(sorted(definitions - listed))}"
    needed = imported_by_our_other_modules() & constants - listed
    yield f"  constants not listed but imported: {', '.join(sorted(needed))}"
    yield f"arrows up: {len(arrows_up())}"
    yield from (f"  {owner} -> {name}" for owner, name in arrows_up())
    yield f"dict[str, Any] between our own functions: {len(untyped())}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in figures())
