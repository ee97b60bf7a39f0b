"""Guards are found in a source, and disabled one at a time in the functions that are loaded."""

import types

import pytest

from tests.mutation.guards import disable, guards
from tests.mutation.nearest import SOURCES, nearest
from tests.places import ROOT

SOURCE = """
def rule(x, y=None):
    if x < 0 and y is None:
        raise ValueError("negative")
    match x:
        case 0:
            raise ValueError("zero")
        case int() if x > 9:
            return None
        case float(real=1.0):
            return "one"
    found = [n for n in range(x) if n % 2]
    return found if found else None

class Rules:
    @property
    def even(self):
        return (self.x % 2 == 0) or self.any
"""


@pytest.fixture
def module():
    made = types.ModuleType("made")
    made.__file__ = "made.py"
    exec(compile(SOURCE, "made.py", "exec"), made.__dict__)
    return made


def test_each_kind_is_found():
    found = [(g.function, g.kind, g.text) for g in guards(SOURCE)]
    assert sorted(found) == sorted([
        ("rule", "condition", "x < 0 and y is None"), ("rule", "operand", "x < 0"), ("rule", "operand", "y is None"),
        ("rule", "case", "0"), ("rule", "case", "x > 9"), ("rule", "literal", "1.0"), ("rule", "filter", "n % 2"),
        ("rule", "condition", "found"),
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind", "argument", "result"),
    [
        ("x < 0 and y is None", "condition", -1, None),
        ("0", "case", 0, None),
        ("x > 9", "case", 10, [1, 3, 5, 7, 9]),
        ("1.0", "literal", 2.5, "one"),
        ("n % 2", "filter", 3, [0, 1, 2]),
        ("found", "condition", 1, []),
    ],
)
def test_a_disabled_guard_lets_through_what_it_kept_out(module, text, kind, argument, result):
    held = module.rule  # as a table of rules holds it
    (guard,) = [g for g in guards(SOURCE) if (g.text, g.kind) == (text, kind)]
    disable(module, SOURCE, guard)
    assert held(argument) == result


def test_an_operand_is_disabled_on_its_own(module):
    (guard,) = [g for g in guards(SOURCE) if g.text == "y is None"]
    disable(module, SOURCE, guard)
    with pytest.raises(ValueError, match="negative"):
        module.rule(-1, y=1)


def test_a_guard_of_another_source_is_an_error(module):
    with pytest.raises(LookupError):
        disable(module, "def rule(x):\n    return x", guards(SOURCE)[0])


@pytest.mark.checkout
@pytest.mark.parametrize("source", SOURCES)
def test_the_map_names_what_is_there(source):
    assert (ROOT / source).exists()
    assert nearest(source)
    assert all(list((ROOT / "tests").glob(pattern)) for pattern in SOURCES[source])
