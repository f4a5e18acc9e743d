"""Processes that a test has started, found by what Ray calls them."""

import psutil

__all__ = ["descendants"]


def descendants(pid: int, title: str) -> list[psutil.Process]:
    """Those below a process whose title begins so; what ends meanwhile is left out."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith(title):
                found.append(child)
        except psutil.Error:
            continue
    return found
