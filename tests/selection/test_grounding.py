import json

import pytest

from tspo_jax.selection import grounding


@pytest.fixture(scope="module")
def released(golden):
    return json.loads((golden / "tstar_grounding.json").read_text())


def test_golden_names(released):
    for piece, expected in released["check_objects_str"]:
        assert grounding.name_released(piece) == expected, piece


def test_golden_responses(released):
    for case in released["responses"]:
        if case["error"]:
            with pytest.raises(ValueError, match="not two"):
                grounding.parse_released(case["response"])
        else:
            assert grounding.parse_released(case["response"]) == (case["targets"], case["cues"])


def test_golden_frame_numbers(released):
    (name,) = (name for name in released if name.startswith("frame_numbers"))
    num_frames = int(name.removeprefix("frame_numbers_of_a_video_of_").removesuffix("_frames"))
    assert grounding.frame_numbers(num_frames) == released[name]


def test_frame_numbers_of_short_videos():
    assert grounding.frame_numbers(3) == [0, 1, 2]
    assert grounding.frame_numbers(9) == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("response", "targets", "cues"),
    [
        ("couch, table\ntv, lamp", ("couch", "table"), ("tv", "lamp")),
        ("1. Key objects:couch\n2. Cue objects:tv", ("couch",), ("tv",)),  # no space behind the colon
        ("Key object: pan\nCue object: stove", ("pan",), ("stove",)),
        ("**Key objects:** car\n- road", ("car",), ("road",)),
        ("Key objects:\ncouch\nCue objects:\ntv", ("couch",), ("tv",)),  # headings on lines of their own
        ("1) key objects: Red Ball.\r\n\r\n2) none", ("red ball",), ()),
        ("Couch, couch, *, none\ncouch, TV", ("couch",), ("tv",)),
        ("a, b, c, d, e\nf, g, h, i, j", ("a", "b", "c", "d"), ("f", "g", "h", "i")),
        ("man's hat, t-shirt\nice_cream", ("man's hat", "t-shirt"), ("ice_cream",)),
        ("3 cats\nkeyboard", ("3 cats",), ("keyboard",)),  # no numbering, no heading
    ],
)
def test_names(response, targets, cues):
    assert grounding.parse(response) == (targets, cues)


@pytest.mark.parametrize("response", ["", "couch", "a\nb\nc", "none\ntv", "I cannot tell.", "*\ntv"])
def test_answers_of_another_form(response):
    with pytest.raises(ValueError, match="the answer"):
        grounding.parse(response)


def test_request():
    text = grounding.request("Who?", ["a man", "a dog"])
    assert "Question: Who?\n" in text and "Options: a man; a dog\n" in text
    assert "Options" not in grounding.request("Who?")
