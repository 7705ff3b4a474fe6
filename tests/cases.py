"""How a test file declares a rule or an attack, so that the tests of all rules or attacks find it.

A test file in ``tests/aggregators`` has a list named CASES of :class:`RuleCase`, one in ``tests/attacks`` of
:class:`AttackCase` or :class:`DataAttackCase`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

from oracles import Oracle, Rows
from torch import nn

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.attacks import Attack

# From the honest rows, and what the Byzantine workers would send if they were honest, to what they send.
AttackOracle = Callable[[Rows, Rows], Rows]


@dataclass(frozen=True)
class Exempt:
    """Properties that a rule or an attack does not have.

    Args:
        properties: names of them, see PROPERTIES of the case.
        because: the reason.
        where: the numbers (m, f) of which this is true; all by default.

    """

    properties: Sequence[str]
    because: str
    where: Callable[[int, int], bool] | None = None


@dataclass(frozen=True)
class Case:
    """A rule or an attack, with its oracle and the properties that it does not have.

    Args:
        subject: the rule or the attack. It may have state, so tests call a copy of it: see `fresh`.
        oracle: the same formula in float64 loops over the rows. None only with an exemption that says why.
        exempt: properties that it does not have, with reasons.
        name: name of the case. None for the name of the class and of what it is built on, such as CTMA(NNM(Mean)).

    """

    PROPERTIES: ClassVar[dict[str, str]] = {}

    subject: Any = field(repr=False)
    oracle: Callable[..., Any] | None = field(default=None, repr=False)
    exempt: Sequence[Exempt] = field(default=(), repr=False)
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is None:
            object.__setattr__(self, "name", name_of(self.subject))
        unknown = {each for exempt in self.exempt for each in exempt.properties} - set(self.PROPERTIES)
        if unknown:
            raise ValueError(f"properties must be among {', '.join(self.PROPERTIES)}, got {unknown}")
        if (self.oracle is None) is self.has("oracle"):
            raise ValueError(f"{self.name} needs an oracle, or a reason why it has none, and not both")

    def fresh(self) -> Any:
        """Return the rule or the attack as it is before its first call."""
        return copy.deepcopy(self.subject)

    def has(self, wanted: str) -> bool:
        """Tell whether a property holds, but perhaps for some numbers of workers."""
        return not any(wanted in exempt.properties and exempt.where is None for exempt in self.exempt)

    def has_at(self, wanted: str, m: int, f: int) -> bool:
        """Tell whether a property holds with m workers of which f are Byzantine."""
        return not any(
            wanted in exempt.properties and (exempt.where is None or exempt.where(m, f)) for exempt in self.exempt
        )


@dataclass(frozen=True)
class RuleCase(Case):
    """A rule, and its oracle: a function of the list of all rows and f.

    Args:
        slow_from: the number of workers from which on the oracle takes seconds, and is left to ``pytest -m slow``.

    """

    PROPERTIES: ClassVar[dict[str, str]] = {
        "oracle": "the result is the oracle's",
        "ties": "it is the oracle's among duplicates and ties as well",
        "cuts": "it is the same to the bit wherever the columns are cut into blocks",
        "translation": "it moves with the rows",
        "scaling": "it scales with the rows",
        "permutation": "it does not depend on the order of the workers",
        "agreement": "where all workers send the same, that is the result",
        "robustness": "f rows of any kind leave it near the honest ones",
        "dropping": "rows that can't be measured change it no more than if they were not there",
    }

    subject: Aggregator = field(repr=False)
    oracle: Oracle | None = field(default=None, repr=False)
    slow_from: int = 100

    def serves(self, m: int, f: int) -> bool:
        """Tell whether the rule accepts m workers of which f are Byzantine."""
        try:
            self.subject.check(m, f)
        except ValueError:
            return False
        return True

    def at_most(self, f: int, m: int) -> int:
        """Return the largest number of Byzantine workers up to f that the rule accepts."""
        return next(fewer for fewer in range(f, -1, -1) if self.serves(m, fewer))

    def fewest_workers(self, f: int) -> int:
        """Return the smallest number of workers of which the rule accepts f Byzantine ones."""
        return next(m for m in range(2 * f + 1, 100) if self.serves(m, f))


@dataclass(frozen=True)
class AttackCase(Case):
    """An attack on vectors, and its oracle: a function of the honest rows and of the Byzantine workers' own."""

    PROPERTIES: ClassVar[dict[str, str]] = {
        "oracle": "what is sent is the oracle's",
        "change": "it changes what every Byzantine worker sends, from the first step on",
        "cuts": "it is the same wherever the columns are cut into blocks",
        "shards": "shards of the columns give what the whole gives",
        "permutation": "it does not depend on the order of the honest workers",
        "scaling": "it scales with the rows",
        "finite": "what is sent is finite",
        "resuming": "all that it keeps is in its state_dict",
    }

    subject: Attack = field(repr=False)
    oracle: AttackOracle | None = field(default=None, repr=False)

    def serves(self, m: int, byzantine: Sequence[int]) -> bool:
        """Tell whether the attack can be run by these of m workers."""
        try:
            self.subject.check(m, byzantine)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class DataAttackCase:
    """An attack on data, a batch, and what it makes of that."""

    subject: Attack = field(repr=False)
    batch: Any = field(repr=False)
    poisoned: Any = field(repr=False)
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or name_of(self.subject))

    def fresh(self) -> Attack:
        """Return the attack as it is before its first call."""
        return copy.deepcopy(self.subject)


def name_of(module: nn.Module) -> str:
    """Return the name of a rule or an attack with those of what it is built on, such as CTMA(NNM(Mean))."""
    parts = [name_of(part) for part in module.children() if isinstance(part, Aggregator | Attack)]
    return type(module).__name__ + (f"({', '.join(parts)})" if parts else "")


def shown_arguments(module: nn.Module) -> list[str]:
    """Return what ``repr`` should show: arguments that are not the defaults, and what it is built on."""
    shown = []
    for name, parameter in signature(type(module)).parameters.items():
        value = getattr(module, name, parameter.default)
        if isinstance(value, nn.Module):
            shown.append(type(value).__name__)
        elif not callable(value) and value != parameter.default:
            shown.append(f"{name}={value!r}")
    return shown


def declared_in(folder: Path, kind: type) -> list[Any]:
    """Return all cases of one kind in the lists named CASES of a folder's test files."""
    modules = [import_module(path.stem) for path in sorted(folder.glob("test_*.py"))]
    cases = [case for module in modules for case in getattr(module, "CASES", []) if isinstance(case, kind)]
    names = [case.name for case in cases]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"cases must have different names, got several of {sorted(repeated)}")
    return cases
