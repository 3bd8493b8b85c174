"""The types of ``openai_sft`` as a stub package, for a single module can't hold ``py.typed``.

``python tests/stubs.py`` writes ``openai_sft-stubs/__init__.pyi`` from ``openai_sft.py``.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE, STUB = ROOT / "openai_sft.py", ROOT / "openai_sft-stubs" / "__init__.pyi"
HEADER = "# Made from openai_sft.py by `python tests/stubs.py`. Don't edit.\n"
# A type checker forgets the parameters of what these wrap.
CACHES = ("cache", "lru_cache", "functools.cache", "functools.lru_cache")

Parameters = dict[str, str]


class Stub:
    """What a module shows a type checker: the public names and what they need."""

    def __init__(self, source: str) -> None:
        self.module = ast.parse(source)
        self.imports: dict[str, str] = {}
        self.definitions: dict[str, ast.stmt] = {}
        self.returns: Parameters = {}
        self._read(self.module.body)
        for node in ast.walk(self.module):
            if isinstance(node, ast.FunctionDef) and node.returns:
                self.returns.setdefault(node.name, ast.unparse(node.returns))

    def _read(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                self._read(node.body)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = (alias.asname or alias.name).split(".")[0]
                    self.imports[name] = ast.unparse(ast.Import([alias]))
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                for alias in node.names:
                    line = ast.unparse(ast.ImportFrom(node.module, [alias], node.level))
                    self.imports[alias.asname or alias.name] = line
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.definitions[node.target.id] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.definitions[node.targets[0].id] = node

    def text(self) -> str:
        """The whole stub, in the order of the module."""
        listed = self.definitions["__all__"]
        assert isinstance(listed, ast.Assign)
        wanted = {"__all__", "__version__", *ast.literal_eval(listed.value)}
        wanted |= {
            name
            for name, node in self.definitions.items()
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not name.startswith("_")
        }
        parts: dict[str, list[str]] = {}
        while missing := wanted - parts.keys():
            for name in missing & self.definitions.keys():
                parts[name] = list(self._top(self.definitions[name], name))
            parts |= {name: [] for name in missing - self.definitions.keys()}
            used = {name for part in parts.values() for name in names_in(part)}
            wanted |= used & self.definitions.keys()
        used = {name for part in parts.values() for name in names_in(part)} | {"Any"}
        imports = sorted({line for name, line in self.imports.items() if name in used})
        body = itertools.chain.from_iterable(parts.get(name, []) for name in self.definitions)
        return HEADER + "\n".join([*imports, "", *body]) + "\n"

    def _top(self, node: ast.stmt, name: str) -> Iterator[str]:
        if isinstance(node, ast.ClassDef):
            yield from self._class(node, "")
        elif isinstance(node, ast.FunctionDef):
            yield from self._function(node, "")
        elif isinstance(node, ast.AnnAssign):
            alias = ast.unparse(node.annotation) in ("TypeAlias", "typing.TypeAlias")
            yield ast.unparse(node if alias else without_value(node))
        elif isinstance(node, ast.Assign) and (name == "__all__" or is_type(node.value)):
            yield ast.unparse(node)
        elif isinstance(node, ast.Assign):
            yield f"{name}: {self._infer(node.value, {})}"

    def _class(self, node: ast.ClassDef, indent: str) -> Iterator[str]:
        yield from (f"{indent}@{ast.unparse(one)}" for one in node.decorator_list)
        bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
        yield f"{indent}class {node.name}({bases}):" if bases else f"{indent}class {node.name}:"
        record = any("dataclass" in ast.unparse(one) for one in node.decorator_list)
        record |= any(ast.unparse(base) in ("NamedTuple", "TypedDict") for base in node.bases)
        inner, members = indent + "    ", list[str]()
        known: set[str] = set()
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                if record or not part.target.id.startswith("_"):
                    known.add(part.target.id)
                    members.append(
                        inner + ast.unparse(shown(part) if record else without_value(part))
                    )
            elif isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name):
                if not (name := part.targets[0].id).startswith("_"):
                    known.add(name)
                    members.append(f"{inner}{name}: {self._infer(part.value, {})}")
            elif isinstance(part, ast.FunctionDef):
                known.add(part.name)
                if is_public(part.name):
                    members.extend(self._function(part, inner))
            elif isinstance(part, ast.ClassDef) and is_public(part.name):
                members.extend(self._class(part, inner))
        attributes = self._attributes(node)
        found = [f"{inner}{n}: {kind}" for n, kind in attributes.items() if n not in known]
        yield from [*found, *members] or [f"{inner}..."]

    def _attributes(self, node: ast.ClassDef) -> Parameters:
        """The public names that methods assign on ``self``."""
        found: Parameters = {}
        for method in node.body:
            if not isinstance(method, ast.FunctionDef):
                continue
            known = parameters(method)
            for part in ast.walk(method):
                if isinstance(part, ast.AnnAssign) and is_attribute(part.target):
                    found[part.target.attr] = ast.unparse(part.annotation)  # type: ignore[union-attr]
                for target, value in pairs(part) if isinstance(part, ast.Assign) else ():
                    if is_attribute(target):
                        found.setdefault(target.attr, self._infer(value, known))  # type: ignore[attr-defined]
        return {name: kind for name, kind in found.items() if not name.startswith("_")}

    def _function(self, node: ast.FunctionDef, indent: str) -> Iterator[str]:
        for decorator in map(ast.unparse, node.decorator_list):
            if decorator.partition("(")[0] not in CACHES:
                yield f"{indent}@{decorator}"
        given = node.args
        given.defaults = list(map(brief, given.defaults))
        given.kw_defaults = [one and brief(one) for one in given.kw_defaults]
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{indent}def {node.name}({ast.unparse(given)}){returned}: ..."

    def _infer(self, value: ast.expr, known: Parameters) -> str:
        """The type of a value by its looks; ``Any`` where they don't tell."""
        if isinstance(value, ast.Constant):
            return "None" if value.value is None else type(value.value).__name__
        if isinstance(value, ast.Compare) or (
            isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
        ):
            return "bool"
        if isinstance(value, ast.IfExp):
            return union(self._infer(value.body, known), self._infer(value.orelse, known))
        if isinstance(value, ast.BoolOp) and isinstance(value.op, ast.Or):
            *first, last = (self._infer(one, known) for one in value.values)
            return union(*(one.replace(" | None", "") for one in first if one != "None"), last)
        if isinstance(value, ast.Tuple):
            return f"tuple[{', '.join(self._infer(one, known) for one in value.elts)}]"
        if isinstance(value, ast.Name):
            return self._infer_name(value.id, known)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            return self._infer_call(value.func.id, value, known)
        return "Any"

    def _infer_name(self, name: str, known: Parameters) -> str:
        node = self.definitions.get(name)
        if name in known:
            return known[name]
        if isinstance(node, ast.AnnAssign):
            return ast.unparse(node.annotation)
        return self._infer(node.value, {}) if isinstance(node, ast.Assign) else "Any"

    def _infer_call(self, name: str, call: ast.Call, known: Parameters) -> str:
        if isinstance(self.definitions.get(name), ast.ClassDef):
            return name
        if name in self.imports and name[0].isupper():
            return name
        if name in ("list", "tuple", "set", "frozenset") and len(call.args) == 1:
            inside = self._infer(call.args[0], known).partition("[")[2].removesuffix("]")
            return f"{name}[{inside or 'Any'}{', ...' if name == 'tuple' else ''}]"
        return self.returns.get(name, "Any")


def names_in(part: Iterable[str]) -> Iterator[str]:
    text = "\n".join(part)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            yield node.id


def is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def is_attribute(target: ast.expr) -> bool:
    return isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"


def is_type(value: ast.expr) -> bool:
    """``Literal[...]``, ``int | None``, ``TypeVar("T")``: an alias, kept word for word."""
    if isinstance(value, ast.BinOp):
        return isinstance(value.op, ast.BitOr) and any(map(is_type, (value.left, value.right)))
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) in ("TypeVar", "NewType", "NamedTuple", "TypedDict")
    if isinstance(value, ast.Name):
        return hasattr(builtins, value.id) or (value.id[0].isupper() and not value.id.isupper())
    return isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name)


def union(*kinds: str) -> str:
    parts = list(dict.fromkeys(part for kind in kinds for part in kind.split(" | ")))
    return "Any" if "Any" in parts else " | ".join(sorted(parts, key=lambda one: one == "None"))


def parameters(function: ast.FunctionDef) -> Parameters:
    given = function.args
    every = (*given.posonlyargs, *given.args, *given.kwonlyargs)
    return {one.arg: ast.unparse(one.annotation) for one in every if one.annotation}


def pairs(assignment: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in assignment.targets:
        value = assignment.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            yield from zip(target.elts, value.elts, strict=True)
        else:
            yield target, value


def brief(default: ast.expr) -> ast.expr:
    """A default that says something in itself; else the three dots."""
    return default if isinstance(default, ast.Constant) else ast.Constant(...)


def without_value(node: ast.AnnAssign) -> ast.AnnAssign:
    return ast.AnnAssign(node.target, node.annotation, None, node.simple)


def shown(node: ast.AnnAssign) -> ast.AnnAssign:
    """A record's field: whether it has a default matters to who makes one."""
    value = node.value and (node.value if isinstance(node.value, ast.Call) else brief(node.value))
    return ast.AnnAssign(node.target, node.annotation, value, node.simple)


if __name__ == "__main__":
    STUB.parent.mkdir(exist_ok=True)
    STUB.write_text(Stub(SOURCE.read_text(encoding="utf-8")).text(), encoding="utf-8")
    sys.stdout.write(f"{STUB.relative_to(ROOT)}\n")
