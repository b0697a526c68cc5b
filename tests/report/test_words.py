import pytest
from report.documents import HOSTILE, document, file

from edgekit.report import words


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_name_is_one_line_that_every_text_file_can_hold(kind):
    shown = words.name(HOSTILE[kind])
    shown.encode("utf-8")
    assert len(shown.splitlines()) == 1
    assert len(shown) <= words.NAME + 1
    # The ranges of XML 1.0's production Char, and no direction mark.
    assert all(
        c == " " or 0x20 < ord(c) < 0x7F or 0xA0 <= ord(c) <= 0xD7FF or 0xE000 <= ord(c) <= 0xFFFD for c in shown
    )
    assert not set(shown) & set("\u202e\u2066\u061c\u200b")
    assert shown[0] not in "=+-@"


def test_an_ordinary_name_stays_as_it_is():
    for name in ("onnx-int8", "Fahrrad (öffentlich)", "猫", "a_b.c"):
        assert words.name(name) == name
    assert words.name("x" * words.NAME) == "x" * words.NAME


def test_a_long_name_keeps_both_ends():
    shown = words.name("head" + "x" * 500 + "tail")
    assert (shown[:4], shown[-4:], len(shown)) == ("head", "tail", words.NAME)
    assert "…" in shown


@pytest.mark.parametrize(
    ("radius", "norm", "said"), [(8 / 255, "Linf", "8/255"), (0.03, "Linf", "0.03"), (0.5, "L2", "0.5")]
)
def test_an_epsilon_of_whole_levels_is_said_in_levels(radius, norm, said):
    assert words.epsilon(document(file(), epsilon=radius, norm=norm)) == said


def test_where_the_reasons_stand_is_said_as_seen_from_the_sentence():
    assert "the reason stands above" in words.closing(document(file(robust=488)))
    assert "the reason stands below" in words.closing(document(file(robust=488)), "below")
