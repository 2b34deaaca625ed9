"""Captions of ``shape_scenes``: a small grammar, what each sentence means, and the ceiling of a perfect reader.

Grammar (``A`` and ``AN`` by the next word; sizes, frames and counts are optional):

    caption   = [frame] (list | places | relation) | count ":" list
    list      = thing {"," thing} "and" thing
    places    = thing place {"," thing place} "and" thing place
    relation  = thing side thing [", with" thing place | "and" thing side thing]
    thing     = a [size] colour shape

A caption says that its things are in the scene, each with what is said of it; only a count says that there are no
others. ``left of`` means a column further left, whatever the rows; ``at the top`` means the upper row, whatever the
column; ``in the middle`` means the cell in the middle.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from imagedex.corpora.shape_scenes.graph import VERSION, Dice, Item, Scene, make_scenes, scene_id

CAPTIONS_PER_SCENE = 5
MAX_WORDS = 20

COLOUR_WORDS = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "black": ("black", "dark"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
    "heart": ("heart",),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SIDE_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
FRAMES = ("", "", "", "there is", "a picture of", "we can see")
COUNT_WORDS = {2: "two shapes", 3: "three shapes", 4: "four shapes"}
_ROW_WORDS = {0: "at the top", 2: "at the bottom"}
_COLUMN_WORDS = {0: "on the left", 2: "on the right"}
_CORNER_ROW_WORDS = {0: ("top", "upper"), 2: ("bottom", "lower")}
_CORNER_COLUMN_WORDS = {0: "left", 2: "right"}


@dataclass(frozen=True)
class Thing:
    """What a caption says of one thing; None where it says nothing."""

    shape: str
    colour: str
    size: str | None = None
    row: int | None = None
    column: int | None = None

    def fits(self, item: Item) -> bool:
        return all(
            said is None or said == getattr(item, name)
            for name, said in (
                ("shape", self.shape),
                ("colour", self.colour),
                ("size", self.size),
                ("row", self.row),
                ("column", self.column),
            )
        )


@dataclass(frozen=True)
class Caption:
    """A sentence and its meaning: things, sides as (thing, side, thing), and how many shapes there are in all."""

    text: str
    things: tuple[Thing, ...]
    sides: tuple[tuple[int, str, int], ...] = ()
    count: int | None = None

    def is_true_of(self, scene: Scene) -> bool:
        if self.count is not None and self.count != len(scene.items):
            return False
        # Shape and colour are always said, and no scene has two of the same: at most one item can be meant.
        meant = [next((item for item in scene.items if thing.fits(item)), None) for thing in self.things]
        if None in meant:
            return False
        return all(is_beside(meant[first], side, meant[second]) for first, side, second in self.sides)


def is_beside(first: Item, side: str, second: Item) -> bool:
    """Whether ``first`` is left of / right of / above / below ``second``."""
    return {
        "left": first.column < second.column,
        "right": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[side]


def describe(scene: Scene, number: int, seed: int = 0) -> list[Caption]:
    """The five captions of scene ``number``: all true, all different, at most :data:`MAX_WORDS` words each."""
    dice = Dice("captions", VERSION, seed, number)
    kinds = dice.sample((_relation, _relation, _places, _places, _list), CAPTIONS_PER_SCENE)
    captions: list[Caption] = []
    for kind in kinds:
        while True:
            caption = kind(scene, dice)
            if len(caption.text.split()) <= MAX_WORDS and caption.text not in {other.text for other in captions}:
                captions.append(caption)
                break
    return captions


def _thing_words(item: Item, dice: Dice, sized: bool) -> str:
    words = [dice.choice(COLOUR_WORDS[item.colour]), dice.choice(SHAPE_WORDS[item.shape])]
    if sized:
        words.insert(0, dice.choice(SIZE_WORDS[item.size]))
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _thing(item: Item, dice: Dice, sized: bool) -> tuple[str, Thing]:
    thing = Thing(item.shape, item.colour, item.size if sized else None)
    return _thing_words(item, dice, sized), thing


def _placed_thing(item: Item, dice: Dice, sized: bool) -> tuple[str, Thing]:
    words, row, column = _place(item, dice)
    thing = Thing(item.shape, item.colour, item.size if sized else None, row, column)
    return f"{_thing_words(item, dice, sized)} {words}", thing


def _place(item: Item, dice: Dice) -> tuple[str, int | None, int | None]:
    """Where an item is, in words, with the row and the column that the words speak of."""
    if item.row == 1 and item.column == 1:
        return f"in the {dice.choice(('middle', 'centre'))}", 1, 1
    # Of a corner one may well tell only half: whole corners for three things would be too many words.
    told = dice.below(4) if item.row != 1 and item.column != 1 else None
    if item.row == 1 or told == 0:
        return _COLUMN_WORDS[item.column], None, item.column
    if item.column == 1 or told == 1:
        return _ROW_WORDS[item.row], item.row, None
    rows = dice.choice(_CORNER_ROW_WORDS[item.row])
    return f"at the {rows} {_CORNER_COLUMN_WORDS[item.column]}", item.row, item.column


def _side(first: Item, second: Item, dice: Dice) -> tuple[str, str]:
    side = dice.choice([side for side in SIDE_WORDS if is_beside(first, side, second)])
    return side, dice.choice(SIDE_WORDS[side])


def _joined(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _framed(text: str, dice: Dice) -> str:
    return f"{dice.choice(FRAMES)} {text}".strip()


def _relation(scene: Scene, dice: Dice) -> Caption:
    items = dice.sample(scene.items, len(scene.items))
    # Two things alone say little, so their sizes are told; further things leave less need and less room.
    sized = [len(items) == 2 or dice.below(2) == 0 for _ in items]
    (first, first_thing), (second, second_thing) = (_thing(items[i], dice, sized[i]) for i in (0, 1))
    side, words = _side(items[0], items[1], dice)
    text, things, sides = f"{first} {words} {second}", [first_thing, second_thing], [(0, side, 1)]
    if len(items) == 4 and dice.below(2):
        (third, third_thing), (fourth, fourth_thing) = (_thing(items[i], dice, False) for i in (2, 3))
        side, words = _side(items[2], items[3], dice)
        text += f" and {third} {words} {fourth}"
        things += [third_thing, fourth_thing]
        sides.append((2, side, 3))
    elif len(items) > 2:
        third, third_thing = _placed_thing(items[2], dice, sized[2])
        text += f", with {third}"
        things.append(third_thing)
    return Caption(_framed(text, dice), tuple(things), tuple(sides))


def _places(scene: Scene, dice: Dice) -> Caption:
    items = dice.sample(scene.items, min(3, len(scene.items)))
    told = [_placed_thing(item, dice, len(items) == 2 or dice.below(3) == 0) for item in items]
    return Caption(_framed(_joined([words for words, _ in told]), dice), tuple(thing for _, thing in told))


def _list(scene: Scene, dice: Dice) -> Caption:
    items = dice.sample(scene.items, len(scene.items))
    told = [_thing(item, dice, len(items) == 2 or dice.below(2) == 0) for item in items]
    text, things = _joined([words for words, _ in told]), tuple(thing for _, thing in told)
    if dice.below(2):
        return Caption(f"{COUNT_WORDS[len(items)]}: {text}", things, count=len(items))
    return Caption(_framed(text, dice), things)


@lru_cache(maxsize=4)
def captions_of(n_scenes: int, seed: int) -> tuple[tuple[Caption, ...], ...]:
    """The five captions of each scene of a corpus."""
    return tuple(tuple(describe(scene, number, seed)) for number, scene in enumerate(make_scenes(n_scenes, seed)))


def perfect_reader(
    queries: Iterable[str] | None = None,
    gallery: Iterable[str] | None = None,
    *,
    n_scenes: int = 600,
    seed: int = 0,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """The ceiling: what a reader without mistakes reaches, who can only guess among scenes a caption is true of.

    With ``n`` scenes of the gallery for which a caption is true, the right one is among the first ``k`` with
    probability ``min(1, k / n)``, and its mean reciprocal rank is ``(1 + 1/2 + ... + 1/n) / n``. Exact, no sampling.

    Args:
        queries: caption texts of the corpus; all of them when not given.
        gallery: the ``image_id`` of the scenes that can be found; all when not given. It must hold the right ones.
        n_scenes, seed: as the corpus was drawn.

    Returns:
        ``{"hits@1": ..., "hits@5": ..., "hits@10": ..., "mrr": ...}``, means over the queries.
    """
    scenes = make_scenes(n_scenes, seed)
    written = [caption for captions in captions_of(n_scenes, seed) for caption in captions]
    # A sentence means the same wherever it stands, so its text is enough to know its meaning.
    meanings = {caption.text: caption for caption in written}
    asked = written if queries is None else [meanings[text] for text in queries]
    if gallery is not None:
        wanted = set(gallery)
        scenes = [scene for number, scene in enumerate(scenes) if scene_id(number) in wanted]
    matching = count_matching(asked, scenes)
    if not matching or min(matching) == 0:
        raise ValueError("no queries, or a query whose own scene is not in the gallery")
    total = len(matching)
    result = {f"hits@{k}": float(sum(min(Fraction(1), Fraction(k, n)) for n in matching) / total) for k in ks}
    result["mrr"] = float(sum(sum(Fraction(1, rank) for rank in range(1, n + 1)) / n for n in matching) / total)
    return result


def count_matching(captions: Sequence[Caption], scenes: Sequence[Scene]) -> list[int]:
    """For each caption, of how many of the scenes it is true."""
    holding: dict[tuple[str, str], set[int]] = {}
    for number, scene in enumerate(scenes):
        for item in scene.items:
            holding.setdefault((item.shape, item.colour), set()).add(number)
    counts = []
    for caption in captions:
        named = (holding.get((thing.shape, thing.colour), set()) for thing in caption.things)
        counts.append(sum(caption.is_true_of(scenes[number]) for number in set.intersection(*named)))
    return counts
