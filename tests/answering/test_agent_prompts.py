import pytest

from tspo_jax.answering.agent_prompts import Asked, prompt, shown
from tspo_jax.answering.caption_memory import Row

ROWS = [Row(0, (0.0, 60.0), "a harbour", True), Row(1, (0.0, 10.0), "a ferry\nat sea", False)]
ASKED = Asked("q", "v", "What arrives?", ("a plane", "a ferry"))


def test_shown():
    assert shown(ROWS) == ["1. [0.0 s to 60.0 s] a harbour", "  - [0.0 s to 10.0 s] a ferry at sea"]


@pytest.mark.parametrize("agent", ["coarse_answer", "type", "answer", "localize", "force", "flat"])
def test_prompt_says_all(agent):
    text = prompt(agent, ASKED, ROWS, 60.0, excluded=[(0.0, 10.0)], fault="it held no dictionary")
    for part in (*shown(ROWS), "What arrives?", "A. a plane", "B. a ferry", "letter of A, B", "(0.0, 10.0)", "no dict"):
        assert part in text
    assert text.count("{") == text.count("}") == 1


def test_prompt_without_options_or_descriptions():
    text = prompt("force", Asked("q", "v", "Why {x}?"), [], 1.0)
    assert "one letter" not in text and "no descriptions" in text and "Why {x}?" in text
