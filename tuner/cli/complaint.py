"""How the command line says what is wrong."""

import sys

__all__ = ["complain"]


def complain(message: object) -> None:
    """Write a message to stderr as one line, whatever it quotes.

    A key, a column or a path may hold line breaks and control codes: they are escaped.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
    sys.stderr.write(f"pwiser: {line}\n")
