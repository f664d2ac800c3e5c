"""An inspection in the terminal: rows token by token, then the counts, then the checks.

It can be read without colours: text that is trained on stands between ⟦ and ⟧, control tokens stand
between ⟨ and ⟩. So a literal "<end_of_turn>" in a text does not look like the control token.
"""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from jaxsft.common.text import plural, visible_text
from jaxsft.data.prepared import Prepared
from jaxsft.inspect.rows import SampleCheck, Survey, facts, fates, lessons
from jaxsft.inspect.tokens import RowView, Token

# Two alternating shades show where a token ends and the next one begins.
_STYLES = {
    "prompt": ("black on grey74", "black on grey82"),
    "loss": ("black on dark_sea_green2", "black on pale_green1"),
    "control": ("bold black on plum2", "bold black on plum2"),
}
_RULE_WIDTH = 88
_MARKS = str.maketrans({mark: f"\\u{{{ord(mark):x}}}" for mark in "⟦⟧⟨⟩"})  # in text of the data


def legend() -> Text:
    """The meaning of the colours and marks."""
    text = Text("Legend: ")
    for name, what in (("prompt", "prompt"), ("control", "⟨control token⟩")):
        text.append(f" {what} ", _STYLES[name][0]).append(" ")
    text.append("⟦").append(" trained on ", _STYLES["loss"][0]).append("⟧")
    return text.append("  ↵ line end  ⇥ tab  ⁽id⁾ with --ids", "dim")


def show_row(row: RowView, row_length: int, show_ids: bool) -> Iterator[RenderableType]:
    """A row: a line on each segment and its tokens, then the padding."""
    used = row_length - row.num_padding
    yield title(f"row {row.number}: {used:,} of {row_length:,} tokens")
    for number, segment in enumerate(row.segments, 1):
        yield Text(
            f"── segment {number}: sample {segment.sample}, {segment.source}; "
            f"{segment.num_tokens:,} tokens, {segment.num_labels:,} with loss ──",
            "cyan",
        )
        yield tokens_text(segment.tokens, show_ids)
    if row.num_padding:
        yield Text(f"── padding: {row.num_padding:,} tokens, never seen and never trained on ──")
    yield Text()


def title(text: str) -> Text:
    """A line above a row."""
    return Text(f"━━ {text} ".ljust(_RULE_WIDTH, "━"), "bold")


def tokens_text(tokens: Sequence[Token], show_ids: bool) -> Text:
    """The tokens of one segment."""
    text, in_loss = Text(), False
    for number, token in enumerate(tokens):
        if token.is_label != in_loss:
            text.append("⟦" if token.is_label else "⟧", "bold")
            in_loss = token.is_label
        _append_token(text, token, number % 2, show_ids)
    return text.append("⟧" if in_loss else "", "bold")


def _append_token(text: Text, token: Token, shade: int, show_ids: bool) -> None:
    kind = "loss" if token.is_label else "prompt"
    style = _STYLES["control" if token.is_control else kind][shade]
    # A line end is written after the id, so that no colour runs to the terminal's edge.
    shown = visible_text(token.text).translate(_MARKS)
    if token.is_control:
        shown = f"⟨{shown.strip('<>')}⟩"
    body = shown.rstrip("\n")
    for line_number, line in enumerate(body.split("\n")):
        text.append("\n" if line_number else "").append(line, style)
    if show_ids:
        text.append(f"⁽{' '.join(map(str, token.ids))}⁾", "dim")
    text.append("\n" * (len(shown) - len(body)))


def show_counts(prepared: Prepared, survey: Survey) -> Iterator[RenderableType]:
    """What is taught, the counts of the set, and of the rows that were read."""
    yield Text("What is taught:", "bold")
    table = Table.grid(padding=(0, 2))
    for name, value in lessons(prepared).items():
        table.add_row(Text(name), Text(value))
    yield table
    yield Text()
    table = Table.grid(padding=(0, 2))
    for name, value in facts(prepared, survey).items():
        table.add_row(Text(name, "bold"), Text(value))
    yield table
    yield Text()
    yield Text(f"{prepared.report.rows_read:,} rows were read:", "bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    for fate in fates(prepared):
        count = "–" if fate.num is None else f"{fate.num:,}"
        table.add_row(Text(count), Text(fate.name), Text("\n".join(fate.examples)))
    yield table
    yield Text()


def show_checks(checks: Sequence[SampleCheck], num_samples: int) -> Iterator[RenderableType]:
    """Each check, with the samples that break it."""
    yield Text(f"Checked in all {num_samples:,} samples:", "bold")
    for check in checks:
        if not check.num_failed:
            yield Text.assemble(("  ok      ", "green"), check.name)
            continue
        yield Text.assemble(
            ("  FAILED  ", "bold red"), f"{check.name}: not in {plural(check.num_failed, 'sample')}"
        )
        for example in check.examples:
            yield Text(f"            {example}")
        if check.num_failed > len(check.examples):
            yield Text("            …")
