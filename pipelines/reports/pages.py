"""The template environment that the report pages of all jobs share.

A page is self-contained: style, charts and images are in the file, and it loads nothing. Its template in ``templates/``
extends ``base.html.j2``, which has the style; colours are those of ``charts.PALETTE``. A name that a template does not
get is an error.
"""

from __future__ import annotations

import base64

import jinja2

from pipelines.reports.charts import PALETTE

__all__ = ["data_url", "render"]


def render(template: str, **context: object) -> str:
    """The page of a template; texts of the context are escaped, charts (``Markup``) are not."""
    return _ENVIRONMENT.get_template(template).render(**context)


def data_url(image: bytes) -> str:
    """An encoded image as a URL that holds it."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{share * 100:.{digits}f} %"


def _kib(size_bytes: float | None) -> str:
    return "–" if size_bytes is None else f"{size_bytes / 1024:.1f} KiB"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _thousands(value: int) -> str:
    return f"{value:,}"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("pipelines.reports"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters |= {"thousands": _thousands, "kib": _kib, "number": _number, "percent": _percent}
_ENVIRONMENT.globals["palette"] = PALETTE
