"""HTML pages that hold everything in one file: tables, embedded figures, fit for print."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from os import PathLike
from typing import TYPE_CHECKING

from diffaug.files import atomic_write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.25rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .92rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.pass, .unclear, .fail { display: inline-block; min-width: 4.2rem; text-align: center; font-weight: 600;
  border-radius: .3rem; padding: .05rem .5rem; border: 2px solid }
.pass { color: #00543a; border-color: #009e73 } .unclear { color: #6b4e00; border-color: #e69f00;
  border-style: dashed }
.fail { color: #fff; background: #a33100; border-color: #a33100 }
.box { border-left: 5px solid #888; background: #f5f5f5; padding: .6rem 1rem; margin: 1rem 0 }
.small { font-size: .85rem; color: #555 } img { max-width: 100% } figure { margin: 1rem 0 } code {
  font-size: .85em }
figcaption { font-size: .88rem; color: #444 }
@media print { body { max-width: none; margin: 0; font-size: 11pt } h2 { break-after: avoid }
  figure, tr, .box { break-inside: avoid } }
"""


def write_html(title: str, parts: Iterable[str], path: str | PathLike[str]) -> None:
    """Write a page of HTML parts, whole or not at all; nothing in it is fetched."""
    atomic_write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n",
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; cells are HTML."""
    cells = "".join(f"<th>{title}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def picture(draw: "Callable[[Figure], None]", size: tuple[float, float], caption: str) -> str:
    """A figure of a size in inches as an embedded PNG."""
    return embedded(png(draw, size), caption)


def png(draw: "Callable[[Figure], None]", size: tuple[float, float]) -> bytes:
    """A figure of a size in inches as a PNG file's bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def embedded(image: bytes, caption: str) -> str:
    """A PNG file's bytes, with a caption."""
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
