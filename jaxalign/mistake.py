"""A user's mistake: an error whose text holds the value, the rule and the way out, and which names its settings.

Everything that a user can put right is raised as a `Mistake`, before device work. Any other error is a defect of
jaxalign, or of a library under it, and shows its traceback.

A message writes a setting as the config does, between backquotes: "`max_length` 64 leaves no room". A Python user reads
it as it stands; the command line spells it as the flag `--max-length` (`spelled`). So no floor but cli/ knows flags.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

_NAME = re.compile(r"`([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*)`")


class Mistake(ValueError):
    """An error that a user can put right."""

    def __init__(self, text: str, *, setting: str | None = None):
        """
        Args:
          text: the value, the rule and the way out, in one line; settings stand between backquotes.
          setting: the dotted name of the setting that is wrong; by default the first that the text names.
        """
        super().__init__(text)
        names = _NAME.findall(text)
        self.setting = setting or (names[0] if names else None)


@contextlib.contextmanager
def about(setting: str) -> Iterator[None]:
    """Names the setting in a Mistake of the block, or of the function that it decorates, where it names none."""
    try:
        yield
    except Mistake as mistake:
        if mistake.setting is not None:
            raise
        raise Mistake(f"`{setting}`: {mistake}", setting=setting) from mistake


def spelled(text: str, spell: Callable[[str], str | None]) -> str:
    """The text with each name between backquotes as `spell` writes it, and without the backquotes of others."""
    return _NAME.sub(lambda match: spell(match[1]) or match[0], text).replace("`", "")
