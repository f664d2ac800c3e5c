"""The console of every command: styles of ours, harmless text of others, plain lines in a pipe."""

import atexit
import sys
from collections.abc import Iterable
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from jaxsft.common.streams import discard_unwritten, styled_stream
from jaxsft.common.text import harmless


def make_console(
    *, log_width: int | None = None, strict: bool = False, on_stderr: bool = False
) -> Console:
    """A console on the current stdout, or stderr. It wraps lines only on a terminal.

    Args:
      log_width: the width of tables, and of wrapped lines, where there is no terminal.
      strict: output that fails raises OSError, or SystemExit(1) where the reader of a pipe has
        gone. Else nothing is raised and the exit code does not change.
    """
    atexit.unregister(discard_unwritten)
    atexit.register(discard_unwritten)
    file = styled_stream(sys.stderr if on_stderr else sys.stdout, strict)
    is_log = not file.isatty()
    return _HarmlessConsole(
        file=cast(IO[str], file),  # it has what rich uses
        highlight=False,
        markup=False,  # file names may contain brackets
        emoji=False,  # and :words:
        width=log_width if is_log else None,
        soft_wrap=is_log and log_width is None,
    )


class _HarmlessConsole(Console):
    """A console whose texts cannot steer the terminal: see `harmless`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        if isinstance(renderable, Text):  # before it is wrapped
            renderable = self._harmless_text(renderable)
        for text, style, control in super().render(renderable, options):
            if control:  # rich's own: bars, cursor
                yield Segment(text, style, control)
            else:
                if style and style.link:  # only other people's text has links
                    style = style.update_link(None)
                yield Segment(harmless(text), style)

    def _harmless_text(self, text: Text) -> Text:
        if harmless(text.plain) == text.plain:
            return text
        found = text.blank_copy()
        for segment in text.render(self):
            found.append(harmless(segment.text), segment.style)
        return found
