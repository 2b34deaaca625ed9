"""The one printer of tables: rows of figures as aligned text."""

from collections.abc import Mapping

from imagedex.evaluation.intervals import interval_of

DASH = "–"  # where there is nothing to say


def table(rows: Mapping[str, Mapping], columns: Mapping[str, str], corner: str = "") -> str:
    """Aligned text, one line a row; numbers to the right, words to the left. A figure's interval stands beside it.

    Args: rows, name -> figures by column; columns, column -> its heading; corner, the heading of the names.
    """
    cells = [[corner, *columns.values()]]
    cells += [[name, *(cell_with_interval(column, row) for column in columns)] for name, row in rows.items()]
    words = [True, *(any(isinstance(row.get(column), str) for row in rows.values()) for column in columns)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        texts = (
            text.ljust(width) if is_word else text.rjust(width)
            for text, width, is_word in zip(line, widths, words, strict=True)
        )
        lines.append("  ".join(texts).rstrip())
    return "\n".join(lines)


def cell_with_interval(column: str, row: Mapping) -> str:
    """`cell` of a row's figure, and behind it the interval where the row has one: `0.431 (0.38 to 0.48)`."""
    text, interval = cell(column, row.get(column)), interval_of(row, column)
    return text if interval is None else f"{text} ({interval[0]:.2f} to {interval[1]:.2f})"


def cell(column: str, value) -> str:
    """A figure as people read it: shares with three decimals, milliseconds with one, bytes as MB, counts with commas."""
    if value is None:
        return DASH
    if column == "bytes":
        return f"{value / 1e6:.1f} MB"
    if column == "ms_per_query":
        return f"{value:.1f}"
    if column == "median_rank":
        return f"{value:g}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
