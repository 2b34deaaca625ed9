"""The way through the trie, drawn: from the root at the left along the tokens of the best identifiers to their pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

COLUMN, ROW, MARGIN, PICTURE = 104, 64, 22, 52  # pixels
LONGEST_TOKEN = 12  # characters
CLOSING = 150  # pixels for the picture, its score and its name


@dataclass
class Node:
    """Of the part of the trie that the pictures' identifiers take. choices: its children in the whole trie, 0 at an end."""

    depth: int
    choices: int = 0
    children: dict[str, tuple["Node", float]] = field(default_factory=dict)  # token -> (node, its log-probability)
    ends: int = -1  # the picture's place
    y: float = 0.0


def merged(paths: Sequence[Sequence[tuple]]) -> Node:
    """The tree of several paths, each of (token, log-probability, choices) steps; children in the order of the paths."""
    root = Node(0)
    for place, steps in enumerate(paths):
        node = root
        for token, log_prob, choices in steps:
            node.choices = choices
            node = node.children.setdefault(token, (Node(node.depth + 1), log_prob))[0]
        node.ends = place
    return root


def laid_out(root: Node) -> list[Node]:
    """All nodes, with their heights: ends one below the other, a parent amid its children."""
    nodes, next_row = [], 0

    def place(node: Node) -> None:
        nonlocal next_row
        for child, _ in node.children.values():
            place(child)
        if node.children:
            heights = [child.y for child, _ in node.children.values()]
            node.y = (heights[0] + heights[-1]) / 2
        else:
            node.y = MARGIN + ROW * (next_row + 0.3)
            next_row += 1
        nodes.append(node)

    place(root)
    return nodes


def draw(cards: Sequence[dict], paths: Sequence[Sequence[tuple]], literal: Callable[[str], str]) -> str:
    """SVG; "" without paths.

    Args:
        cards: "thumbnail", "title", "score" of each picture, as HTML shows them.
        paths: for each of them the steps, see `imagedex.modeling.identifier_paths`.
        literal: a text as HTML shows it.
    """
    if not paths:
        return ""
    nodes = laid_out(merged(paths))
    depth = max(node.depth for node in nodes)
    right = MARGIN + COLUMN * depth
    width, height = right + PICTURE + CLOSING, 2 * MARGIN + ROW * sum(node.ends >= 0 for node in nodes)
    lines = [line for node in nodes for line in edges(node, literal)]
    circles = [circle(node) for node in nodes if node.children]
    ends = [end(node, cards[node.ends], right) for node in nodes if node.ends >= 0]
    drawn = "".join([*lines, *circles, *ends])
    return (
        f'<svg class="trie" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">{drawn}</svg>'
    )


def across(node: Node) -> int:
    return MARGIN + COLUMN * node.depth


def edges(node: Node, literal: Callable[[str], str]) -> list[str]:
    """A line to each child: the likelier its token, the thicker."""
    drawn = []
    for token, (child, log_prob) in node.children.items():
        x, y, to_x, to_y = across(node), node.y, across(child), child.y
        bend, probability = x + 0.36 * (to_x - x), math.exp(log_prob)
        thickness = f"{1 + 5 * probability:.1f}"
        curve = f"M{x},{y:.0f} C{bend:.0f},{y:.0f} {x + 8},{to_y:.0f} {bend:.0f},{to_y:.0f} H{to_x}"
        shown = token if len(token) <= LONGEST_TOKEN else token[: LONGEST_TOKEN - 1] + "…"
        tip = f"{token}: {100 * probability:.2g} %, one of {node.choices}"
        label = f'<text class="token" x="{to_x - 16}" y="{to_y - 7:.0f}">{literal(shown)}</text>'
        cost = f'<text class="cost" x="{to_x - 16}" y="{to_y + 14:.0f}">{log_prob:.2f}</text>'
        drawn.append(f'<g><title>{literal(tip)}</title><path d="{curve}" stroke-width="{thickness}"/>{label}{cost}</g>')
    return drawn


def circle(node: Node) -> str:
    """How many ways lead on from here."""
    x, y = across(node), f"{node.y:.0f}"
    size = 9 if len(str(node.choices)) > 3 else 11
    text = f'<text class="choices" x="{x}" y="{y}" font-size="{size}">{node.choices}</text>'
    return f'<g><circle cx="{x}" cy="{y}" r="15"/>{text}</g>'


def end(node: Node, card: dict, right: int) -> str:
    x, y = across(node), node.y
    line = f'<path class="to-picture" d="M{x},{y:.0f} H{right + 8}"/>' if x < right else ""
    picture = f'<image href="{card["thumbnail"]}" x="{right + 10}" y="{y - PICTURE / 2:.0f}" width="{PICTURE}" '
    picture += f'height="{PICTURE}" preserveAspectRatio="xMidYMid slice"/>'
    beside = right + PICTURE + 20
    words = f'<text class="score" x="{beside}" y="{y - 4:.0f}">{card["score"]}</text>'
    words += f'<text class="name" x="{beside}" y="{y + 13:.0f}">{card["title"]}</text>'
    return line + picture + words
