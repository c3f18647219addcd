"""Words and numbers as HTML. All text that comes from outside goes through `text`."""

import html
import math


def text(value: object) -> str:
    """Any value as text that is no markup, also inside quotes."""
    return html.escape(str(value), quote=True)


def field(name: str) -> str:
    """A config field's dotted name, which a narrow column breaks behind dots and underscores."""
    return text(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def number(value: int | float) -> str:
    """Three digits, as few signs as it takes: 0.0012, 31,400."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def span(seconds: int | float) -> str:
    """A duration in words: "2 d 3 h", "1 h 5 min", "40 s"."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = max(round(seconds), 0)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def amount(size: int | float) -> str:
    """Bytes in a readable unit: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def large(value: int | float) -> str:
    """A count in words: "12,300", "4.5 million"."""
    for limit, word in ((1e9, "billion"), (1e6, "million")):
        if value >= limit:
            return f"{value / limit:.3g} {word}"
    return f"{value:,.0f}"
