"""Deliberately broken builds, each a mistake that has been made somewhere. They live here and nowhere else.

A build is the project with one of its own functions replaced. Each names the plan with which it breaks the guarantee
(another may not be touched by it), and what the audit must say of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

ELS = ("--plan.algorithm", "els")
QUANTILE = ("--plan.clip-quantile", "0.5")
BANDS = ("--plan.bands", "3")
TURNS = ("--plan.sampling", "none")
BUFFERS = (*TURNS, "--plan.buffers", "1")


def mechanism(name: str) -> tuple[str, str]:
    """The option that chooses a mechanism."""
    return ("--plan.mechanism", name)


@dataclass(frozen=True, kw_only=True)
class Build:
    """A broken build.

    Attributes:
        break_it: Replaces the project's code.
        found: What the audit says of it: words of a promise's fault, or the name of an attack.
        options: The plan, beside what all share.
        attacked: Whether attacks are tried too; where a promise tells, they take time and say nothing more.
    """

    break_it: Callable[[pytest.MonkeyPatch], None]
    found: str
    options: tuple[str, ...] = ()
    attacked: bool = True


BROKEN: dict[str, Build] = {}
"""The builds by name."""


def build(
    name: str, found: str, *options: str, attacked: bool = True
) -> Callable[[Callable[[pytest.MonkeyPatch], None]], None]:
    """Register a function that breaks the project."""

    def register(break_it: Callable[[pytest.MonkeyPatch], None]) -> None:
        BROKEN[name] = Build(break_it=break_it, found=found, options=options, attacked=attacked)

    return register
