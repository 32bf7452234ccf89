"""How every page is made: a file of `templates/` is filled in, and gets the shared look of `static/style.css`.

A new page, say the trace of an answer given in rounds, takes a template and one call:

    templates/trace.html      {% extends "document.html" %}
                              {% block body %}
                              <h1>{{ title }}</h1>
                              {% for step in steps %}
                              <section><h3>{{ step.query }}</h3><p>{{ step.seconds | clock }}</p>
                                <img src='{{ step.frame | jpeg_uri }}' alt='frame' /></section>
                              {% endfor %}
                              {% endblock %}

    html = templates.render("trace.html", title="Trace", steps=steps)

The result is one self-contained page: the style is inside, pictures are data URIs. Values are escaped, so that text of
others cannot break the page; a value that the template names and the call does not give is an error. Filters beside
Jinja's own: `clock` (seconds -> 1:02:05.5), `jpeg_uri` (uint8 [H, W, 3] -> data URI). Parts that pages share are
macros: `question` of question.html (a question with its curve and the frames of every method), `line_chart` and
`score_chart` of charts.html. Colours, cards (`section`), strips of frames (`.strip`) and so on are in style.css; each
selection method has a colour of its own by a class of its name. A page that needs more style or a script keeps them as
files in `static/` and adds `{{ static("trace.css") }}` inside a <style> in the block `style`.

Write templates as well-formed XML (quoted attributes, `<br />`): tests parse the pages.
"""

import base64
import functools
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from tspo_jax.pages.contact_sheet import clock

STATIC = Path(__file__).parent / "static"
THUMBNAIL = 144  # pixels, width
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")  # control characters, which a page may not hold


def render(template: str, **values) -> str:
    """A template of `templates/` with these values as text of HTML; jinja2.UndefinedError where one is missing."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment():
    import jinja2  # here: commands that make no page start without it
    from markupsafe import Markup

    def text(value):
        return _NO_TEXT.sub("�", value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tspo_jax.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=text,
    )
    environment.filters.update(clock=clock, jpeg_uri=jpeg_uri)
    environment.globals["static"] = lambda name: Markup((STATIC / name).read_text(encoding="utf-8"))
    return environment


def jpeg(frame: np.ndarray, width: int = THUMBNAIL) -> bytes:
    """uint8 [H, W, 3] -> JPEG that is `width` pixels wide."""
    height = max(1, round(frame.shape[0] * width / frame.shape[1]))
    buffer = io.BytesIO()
    Image.fromarray(frame).resize((width, height)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def jpeg_uri(frame: np.ndarray, width: int = THUMBNAIL) -> str:
    """`jpeg` as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(frame, width)).decode()
