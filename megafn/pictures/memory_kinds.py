"""Kinds of memory as every picture shows them: a letter in text, a colour in a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# By field of Memory, in the order in which pictures stack them.
MARKS: Mapping[str, str] = MappingProxyType(
    {
        "parameters": "P",
        "gradients": "G",
        "optimizer_state": "O",
        "activations": "A",
        "other": "X",
    }
)

# Okabe and Ito's palette, which colour-blind people can tell apart.
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "parameters": "#0072B2",
        "gradients": "#E69F00",
        "optimizer_state": "#009E73",
        "activations": "#CC79A7",
        "other": "#999999",
    }
)


def stacked(amounts: Mapping[str, float], scale: float) -> str:
    """`scale` marks for each unit, kind after kind; ends are rounded, so that the sum is right.

    >>> stacked({"parameters": 1.4, "gradients": 1.4, "activations": 2.2}, scale=1)
    'PGGAA'
    """
    marks = ""
    end = 0.0
    for kind, amount in amounts.items():
        end += amount * scale
        marks += MARKS[kind] * (round(end) - len(marks))
    return marks


def legend_of(marks: str) -> str:
    """What the marks in a picture mean.

    >>> legend_of("PPO")
    'P parameters, O optimizer state'
    """
    return ", ".join(f"{mark} {words(kind)}" for kind, mark in MARKS.items() if mark in marks)


def words(kind: str) -> str:
    """A field of Memory in words."""
    return kind.replace("_", " ")
