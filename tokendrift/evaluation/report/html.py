"""Pages that stand alone: one file without a reference to any other, for light and dark, with plots as inline SVG."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokendrift.evaluation.plots import require_matplotlib
from tokendrift.plain_text import printable

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the page's text colour and becomes currentColor, so that plots follow light and dark
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
SIZE = (5.6, 3.8)  # inches; the page scales plots to its columns
LEGEND_WIDTH, HANDLE_WIDTH, LONGEST_LABEL = 85, 8, 60  # letters


def render(template: str, *, script: str = "", **values: Any) -> str:
    """Return a page made from a template. All values are escaped, and a policy allows no script but ``script``.

    Control characters in values are replaced.

    Args:
        template: File in the folder ``templates``; it may extend ``base.html.j2``.
        script: JavaScript of the page. Default: empty.
        **values: Values that the template shows.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tokendrift.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # Markup is a page's own
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(script), script_digest=digest, **values)


def inline_svg(draw: Callable[[Axes], None], name: str, title: str, description: str) -> Markup:
    """Return a plot as an SVG element without background, its ink in the colour of the page's text.

    Args:
        draw: Draws on the axes; every artist with a label appears in the legend.
        name: Name of the plot, unique within the page; every id in the element begins with it.
        title: Accessible name.
        description: Description for readers who do not see the plot.

    Raises:
        TokenDriftError: If matplotlib is missing.
    """
    from markupsafe import Markup, escape

    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(INKED, INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "tokendrift", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(alpha=0.25)
        labelled = [one.get_legend_handles_labels() for one in figure.axes]
        handles = [handle for some, _ in labelled for handle in some]
        texts = [text for _, some in labelled for text in some]
        # Beside the axes: inside them it would hide error bars, which the search for a free corner does not see.
        columns = max(1, min(3, LEGEND_WIDTH // (max(map(len, texts), default=0) + HANDLE_WIDTH)))
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles, texts, **place, frameon=False, fontsize=8, labelcolor=INK)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    description = escape(printable(description))
    words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{description}</desc>'
    element = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title {name}-desc" ', 1)
    return Markup(element.replace(">", f">{words}", 1))


def as_label(name: str) -> str:
    """Return a name as a label, shortened if it is long, in which matplotlib finds no formula and no hidden label."""
    if len(name) > LONGEST_LABEL:
        name = f"{name[: LONGEST_LABEL - 3]}..."
    name = printable(name)
    return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")
