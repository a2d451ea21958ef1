"""Where what is printed goes: pipes that close, terminals that lack letters."""

import codecs
import os
import signal
import sys

SPELT = {
    "ε": "eps", "δ": "delta", "σ": "sigma", "μ": "mu", "α": "alpha", "×": "x", "÷": "/", "·": "*", "√": "sqrt",
    "≤": "<=", "≥": ">=", "→": "->", "−": "-", "–": "-", "—": "-", "…": "...", "±": "+-", "∞": "inf", "≈": "~",
    "•": "*", "’": "'", "‘": "'", "“": '"', "”": '"', "²": "^2", "‖": "|", "∈": "in", "Σ": "sum",
}  # fmt: skip
"""Letters of ours, for terminals without them."""
ERRORS = "fedsim-spelt"


def spell_what_is_missing() -> None:
    """Let standard output and error write what their encoding lacks in letters that it has, instead of failing."""
    codecs.register_error(ERRORS, _spelt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors=ERRORS)


def after_a_closed_pipe() -> int:
    """Leave nothing to write, for nobody reads any more; returns the exit code of a program that SIGPIPE ended."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    return 128 + signal.SIGPIPE


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(SPELT.get(letter, "?") for letter in letters), error.end
