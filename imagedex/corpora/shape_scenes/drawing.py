"""Draws a scene of ``shape_scenes`` with Pillow.

Every coordinate is a whole number from tables of whole numbers, drawn large and reduced by averaging: no sine, no
rounding of floats, hence the same pixels everywhere.
"""

from PIL import Image, ImageDraw

from imagedex.corpora.shape_scenes.graph import CELL, GRID, RADIUS, Item, Scene

_OVERSAMPLING = 4  # pixels drawn for one kept, both ways: this is the anti-aliasing
_UNITS = GRID * CELL

PALETTE = {
    "red": (214, 48, 60),
    "orange": (243, 136, 32),
    "yellow": (245, 203, 58),
    "green": (62, 160, 94),
    "blue": (48, 112, 200),
    "purple": (124, 72, 168),
    "pink": (244, 144, 184),
    "black": (54, 58, 70),
}
BACKGROUNDS = ((250, 247, 239), (238, 245, 250), (241, 247, 238), (249, 241, 245))
_SHADOW_FADE = 30  # a shadow is the background, darker by so much
_SHADOW_DROP = 1250  # thousandths of a unit, to the right and down

# Outlines in thousandths of the radius, x to the right, y downwards.
_OUTLINES = {
    "square": ((-840, -840), (840, -840), (840, 840), (-840, 840)),
    "triangle": ((0, -960), (1000, 800), (-1000, 800)),
    "diamond": ((0, -1080), (780, 0), (0, 1080), (-780, 0)),
    "star": (
        (0, -1070),
        (265, -365),
        (1018, -331),
        (428, 139),
        (629, 866),
        (0, 450),
        (-629, 866),
        (-428, 139),
        (-1018, -331),
        (-265, -365),
    ),
    "cross": (
        (-340, -960),
        (340, -960),
        (340, -340),
        (960, -340),
        (960, 340),
        (340, 340),
        (340, 960),
        (-340, 960),
        (-340, 340),
        (-960, 340),
        (-960, -340),
        (-340, -340),
    ),
    "heart": (
        (0, 980),
        (-330, 700),
        (-640, 420),
        (-850, 160),
        (-960, -100),
        (-985, -340),
        (-920, -580),
        (-770, -770),
        (-560, -860),
        (-350, -840),
        (-160, -730),
        (0, -540),
        (160, -730),
        (350, -840),
        (560, -860),
        (770, -770),
        (920, -580),
        (985, -340),
        (960, -100),
        (850, 160),
        (640, 420),
        (330, 700),
    ),
}
_CIRCLE = 960
_HOLE = 520  # the ring's inner radius


def draw_scene(scene: Scene, image_size: int = 96) -> Image.Image:
    """An RGB picture of ``image_size`` x ``image_size`` pixels: soft shadows first, then the shapes in their order."""
    background = BACKGROUNDS[scene.background]
    shadow = tuple(value - _SHADOW_FADE for value in background)
    side = image_size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), background)
    for item in scene.items:
        _paste(canvas, item, shadow, side, _SHADOW_DROP)
    for item in scene.items:
        _paste(canvas, item, PALETTE[item.colour], side, 0)
    return canvas.reduce(_OVERSAMPLING)


def _paste(canvas: Image.Image, item: Item, colour: tuple[int, ...], side: int, drop: int) -> None:
    x, y = item.centre
    radius = RADIUS[item.size]
    mask = Image.new("1", canvas.size, 0)
    draw = ImageDraw.Draw(mask)

    def place(point: tuple[int, int]) -> tuple[int, int]:
        """Thousandths of the radius around the centre, to pixels of the canvas."""
        return (
            (x * 1000 + drop + radius * point[0]) * side // (_UNITS * 1000),
            (y * 1000 + drop + radius * point[1]) * side // (_UNITS * 1000),
        )

    if item.shape in ("circle", "ring"):
        draw.ellipse((*place((-_CIRCLE, -_CIRCLE)), *place((_CIRCLE, _CIRCLE))), fill=1)
        if item.shape == "ring":
            draw.ellipse((*place((-_HOLE, -_HOLE)), *place((_HOLE, _HOLE))), fill=0)
    else:
        draw.polygon([place(point) for point in _OUTLINES[item.shape]], fill=1)
    canvas.paste(colour, (0, 0), mask)
