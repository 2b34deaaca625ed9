"""The drawing of the way through the trie, read back as XML."""

import xml.etree.ElementTree as ElementTree

from imagedex.page.page import literal
from imagedex.page.trie_drawing import draw, laid_out, merged

PATHS = [
    [("a", -0.5, 3), ("b", -1.0, 2), ("</s>", -0.1, 1)],
    [("a", -0.5, 3), ("c", -2.0, 2), ("</s>", -0.1, 1)],
    [("${x}`<b>", -3.0, 3), ("</s>", -0.1, 12345)],
    [("a", -0.5, 3), ("b", -1.0, 2), ("d", -4.0, 1), ("</s>", -0.1, 1)],
]
CARDS = [{"thumbnail": f"/t/{n}", "title": f"picture {n}", "score": f"-{n}.000"} for n in range(4)]


def texts(svg, kind):
    return [text.text for text in ElementTree.fromstring(svg).iter("text") if text.get("class") == kind]


def test_what_is_shared_is_drawn_once():
    root = merged(PATHS)
    assert list(root.children) == ["a", "${x}`<b>"] and root.choices == 3
    assert list(root.children["a"][0].children) == ["b", "c"]
    nodes = laid_out(root)
    assert len(nodes) == 1 + 9  # the root, and one node behind each token
    ends = sorted((node.ends, node.y) for node in nodes if node.ends >= 0)
    assert [end for end, _ in ends] == [0, 1, 2, 3] and len({y for _, y in ends}) == 4


def test_tokens_costs_choices_and_pictures_are_there():
    svg = draw(CARDS, PATHS, literal)
    assert sorted(texts(svg, "token")) == sorted(["a", "b", "</s>", "c", "</s>", "${x}`<b>", "</s>", "d", "</s>"])
    assert sorted(texts(svg, "cost")) == sorted(["-0.50", "-1.00", "-2.00", "-3.00", "-4.00", *["-0.10"] * 4])
    assert sorted(texts(svg, "choices")) == sorted(["3", "2", "1", "1", "1", "12345"])
    assert texts(svg, "name") != [] and set(texts(svg, "name")) == {card["title"] for card in CARDS}
    assert set(texts(svg, "score")) == {card["score"] for card in CARDS}
    for program in ("${", "`", "<b>"):
        assert program not in svg
    assert draw(CARDS, [], literal) == ""


def test_a_likelier_token_has_a_thicker_line_and_a_long_one_is_cut():
    svg = draw(CARDS[:1], [[("x" * 40, -0.1, 2), ("</s>", -5.0, 1)]], literal)
    assert sorted(texts(svg, "token")) == ["</s>", "x" * 11 + "…"]
    unlikely, likely = sorted(float(path.get("stroke-width")) for path in ElementTree.fromstring(svg).iter("path"))
    assert likely > 5 and 1 <= unlikely < 1.1
