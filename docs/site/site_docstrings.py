"""Docstrings are written for readers of the source; on the site their roles and doctests become Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc|obj):`([^`]+)`")
_DOCTEST = re.compile(r"^([ ]*)>>>.*\n?(?:\1\S.*\n?)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Show of a role the last part of a name behind ``~``, else all of it, and doctests as code.

    >>> as_markdown("see :func:`~ats_stream.sampling.draw` and :data:`PADDING`")
    'see `draw` and `PADDING`'
    >>> print(as_markdown("Adds.\\n\\n>>> 1 + 1\\n2\\n"))
    Adds.
    <BLANKLINE>
    ```python
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    """

    def shown(match: re.Match[str]) -> str:
        name = match[1]
        return f"`{name.rpartition('.')[2] if name.startswith('~') else name}`"

    def fenced(match: re.Match[str]) -> str:
        indent = match[1]
        return f"{indent}```python\n{match[0].rstrip()}\n{indent}```\n"

    return _DOCTEST.sub(fenced, _ROLE.sub(shown, text))


class Docstrings(Extension):
    """What griffe calls for every object with a docstring."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = as_markdown(obj.docstring.value)
