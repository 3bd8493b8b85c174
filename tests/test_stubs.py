"""The stub package says what the source says."""

from __future__ import annotations

from stubs import SOURCE, STUB, Stub


def test_the_stubs_are_those_of_the_source() -> None:
    fresh = Stub(SOURCE.read_text(encoding="utf-8")).text()

    assert STUB.read_text(encoding="utf-8") == fresh, "run `python tests/stubs.py`"


MODULE = '''
import collections
import functools
from typing import Any, Literal, NamedTuple
from dataclasses import dataclass, field
__version__ = "1"
__all__ = ["ROLES", "Row", "Thing", "make"]
ROLES = ("a", 1)
DEFAULT = "x"
_Kind = Literal["a", "b"]
Unused = Literal["c"]

@dataclass(frozen=True)
class Row:
    """Docs."""
    kind: _Kind
    more: dict[str, int] = field(default_factory=dict)
    size: int = 2 + 3
    def _hidden(self) -> None: ...

class Thing:
    LIMIT = 3
    def __init__(self, name: str | None, *, rows: list[Row] = []) -> None:
        self.name = name or DEFAULT
        self.rows, self.done = rows, not rows
        self._secret: collections.Counter[str] = collections.Counter()

    @property
    def row(self) -> Row:
        return self.rows[0]

class _Helper(NamedTuple):
    a: int

@functools.lru_cache(maxsize=1)
def make(helper: _Helper, size: int = 3) -> Thing:
    def inner() -> None: ...
    return Thing(None)

def _private() -> None: ...
'''

EXPECTED = """
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Literal
from typing import NamedTuple

__version__: str
__all__ = ['ROLES', 'Row', 'Thing', 'make']
ROLES: tuple[str, int]
_Kind = Literal['a', 'b']
@dataclass(frozen=True)
class Row:
    kind: _Kind
    more: dict[str, int] = field(default_factory=dict)
    size: int = ...
class Thing:
    name: str
    rows: list[Row]
    done: bool
    LIMIT: int
    def __init__(self, name: str | None, *, rows: list[Row]=...) -> None: ...
    @property
    def row(self) -> Row: ...
class _Helper(NamedTuple):
    a: int
def make(helper: _Helper, size: int=3) -> Thing: ...
"""


def test_a_stub_holds_the_public_names_and_what_they_need() -> None:
    assert Stub(MODULE).text().partition("\n")[2] == EXPECTED.lstrip()
