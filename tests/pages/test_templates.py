"""How pages are made."""

from xml.etree import ElementTree

import jinja2
import numpy as np
import pytest

from tspo_jax.pages import report, templates, video_page


def test_every_template_is_a_file_of_the_package_and_is_complete():
    """A template whose values are missing says which."""
    with pytest.raises(jinja2.UndefinedError, match="title"):
        templates.render("questions.html", examples=[])
    page = templates.render("questions.html", title="<A> & \x00\x1b B", examples=[])
    tree = ElementTree.fromstring(page.partition("\n")[2])
    assert tree.find("head/title").text == tree.find("body/main/h1").text == "<A> & �� B"
    assert tree.find("head/style").text.strip() == (templates.STATIC / "style.css").read_text().strip()


def test_pictures_are_inside_the_page():
    frame = np.zeros((90, 160, 3), np.uint8)
    assert templates.jpeg_uri(frame).startswith("data:image/jpeg;base64,/9j/")
    assert templates.jpeg(np.zeros((1, 1000, 3), np.uint8))[:2] == b"\xff\xd8"  # narrower than a pixel of height


def test_each_method_has_a_colour_of_its_own():
    """In light and in dark, by a class of its name."""
    style = (templates.STATIC / "style.css").read_text()
    variables = {}
    for method in {*report.NAMES, *video_page.METHODS}:
        (variables[method],) = [
            line.split("var(")[1].split(")")[0] for line in style.splitlines() if line.startswith(f".{method} {{")
        ]
    colours = [
        [text.split(";")[0].strip() for text in style.split(f"{variable}:")[1:]] for variable in variables.values()
    ]
    assert all(len(light_and_dark) == 2 for light_and_dark in colours)
    assert len({light for light, _ in colours}) == len({dark for _, dark in colours}) == len(variables)
