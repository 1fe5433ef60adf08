"""Coloured shapes and small landscapes, with captions that are true of them.

A caption names what is large and coloured, and never what the random light may hide. It refuses text in pictures: that
is `printed`.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from curate.demo.canvas import COLOURS, Canvas, Drawing, Point, Rgb, photo_size, pick, pick_colours, tint

SHAPES: Final = ("circle", "square", "triangle", "star", "hexagon", "cross", "heart", "diamond", "ring", "crescent")
PLACES: Final = {1: ("a {0}",), 2: ("a {0} and a {1}", "a {0} beside a {1}"), 3: ("a {0}, a {1} and a {2}",)}
OPENINGS: Final = ("", "", "a drawing of ", "an illustration of ", "a picture of ")

# time of day: sky at the top, sky at the horizon, how the caption says it
SKIES: Final[dict[str, tuple[Rgb, Rgb, tuple[str, ...]]]] = {
    "day": ((70, 140, 225), (190, 222, 245), ("on a sunny day", "under a blue sky")),
    "sunset": ((120, 60, 120), (250, 160, 70), ("at sunset", "in the evening light")),
    "night": ((6, 8, 30), (30, 40, 90), ("at night", "under the stars")),
    "overcast": ((120, 126, 134), (196, 198, 200), ("under a grey sky", "on a cloudy day")),
}
DIM: Final = {"day": 1.0, "sunset": 0.8, "night": 0.6, "overcast": 0.85}


def outline(shape: str, turn: float) -> list[Point]:
    """Corners of `shape` within the unit circle, turned by `turn` radians; ring and crescent are cut from discs."""
    regular = {"square": 4, "triangle": 3, "hexagon": 6, "circle": 48, "ring": 48, "crescent": 48, "diamond": 4}
    if shape in regular:
        sides = regular[shape]
        turn = {"square": math.pi / 4, "diamond": 0.0}.get(shape, turn) if sides == 4 else turn
        narrow = 0.62 if shape == "diamond" else 1.0
        angles = [turn + 2 * math.pi * i / sides for i in range(sides)]
        return [(narrow * math.sin(a), -math.cos(a)) for a in angles]
    if shape == "star":
        radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
        return [
            (r * math.sin(turn + i * math.pi / 5), -r * math.cos(turn + i * math.pi / 5)) for i, r in enumerate(radii)
        ]
    if shape == "cross":
        a, b = 0.34, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    steps = [2 * math.pi * i / 60 for i in range(60)]  # heart
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in steps
    ]


def paint_shape(canvas: Canvas, shape: str, centre: Point, radius: float, *, colour: Rgb, behind: Rgb) -> None:
    """Paint `shape` at the relative `centre`, with `radius` in supersampled pixels, over the colour `behind`."""
    cx, cy = centre[0] * canvas.width, centre[1] * canvas.height
    turn = canvas.uniform(-0.25, 0.25)
    canvas.pen.polygon([(cx + x * radius, cy + y * radius) for x, y in outline(shape, turn)], fill=colour)
    if shape in ("ring", "crescent"):
        shift, hole = (0.0, 0.55) if shape == "ring" else (0.42, 0.82)
        x, r = cx + shift * radius, hole * radius
        canvas.pen.ellipse((x - r, cy - r, x + r, cy + r), fill=behind)


def draw_shapes(rng: np.random.Generator) -> Drawing:
    """One to three coloured shapes on a plain ground: "a red star and a blue ring on a green background"."""
    count = int(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2)))
    names = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:count]]
    *fills, ground = pick_colours(rng, count + 1)
    behind = tint(rng, ground)
    canvas = Canvas.blank(photo_size(rng), behind, rng)
    along_x = canvas.width >= canvas.height
    room = (max(canvas.width, canvas.height) / count, min(canvas.width, canvas.height))
    for i, (name, fill) in enumerate(zip(names, fills, strict=True)):
        radius = min(room) * canvas.uniform(0.30, 0.46)
        along, across = (i + canvas.uniform(0.46, 0.54)) / count, canvas.uniform(0.44, 0.56)
        centre = (along, across) if along_x else (across, along)
        paint_shape(canvas, name, centre, radius, colour=tint(rng, fill), behind=behind)
    things = [f"{fill} {name}" for fill, name in zip(fills, names, strict=True)]
    listed = pick(rng, PLACES[count]).format(*things)
    caption = f"{pick(rng, OPENINGS)}{listed} on a {ground} background"
    return Drawing(canvas.finished(light=16, grain=7), caption, "shapes", names[0])


def dimmed(colour: Rgb, time: str) -> Rgb:
    """`colour` as it looks at that time of day."""
    r, g, b = (round(c * DIM[time]) for c in colour)
    return r, g, b


def ridge(canvas: Canvas, height: float, rough: float, points: int) -> list[Point]:
    """A jagged skyline from the left edge to the right, closed along the bottom."""
    xs = np.linspace(-0.02, 1.02, points)
    ys = height + canvas.rng.uniform(-rough, rough, points)
    return [*((float(x), float(y)) for x, y in zip(xs, ys, strict=True)), (1.02, 1.02), (-0.02, 1.02)]


def boat(canvas: Canvas, time: str) -> str:
    """A sailing boat on the sea."""
    sail = pick(canvas.rng, ("red", "white", "yellow", "orange", "purple"))
    horizon = canvas.uniform(0.45, 0.6)
    canvas.gradient(dimmed((30, 90, 160), time), dimmed((10, 50, 110), time), horizon)
    x, y, s = canvas.uniform(0.35, 0.65), horizon + canvas.uniform(0.12, 0.2), canvas.uniform(0.20, 0.27)
    canvas.polygon(
        [(x - s, y), (x + s, y), (x + 0.7 * s, y + 0.1), (x - 0.7 * s, y + 0.1)], dimmed(COLOURS["brown"], time)
    )
    canvas.polygon([(x, y - 0.02), (x, y - 2 * s), (x + s, y - 0.02)], dimmed(tint(canvas.rng, sail), time))
    canvas.polygon(
        [(x - 0.02, y - 0.02), (x - 0.02, y - 1.7 * s), (x - 0.7 * s, y - 0.02)], dimmed(tint(canvas.rng, sail), time)
    )
    return pick(canvas.rng, (f"a boat with {sail} sails on the sea", f"a sailing boat with {sail} sails"))


def house(canvas: Canvas, time: str) -> str:
    """A house on a meadow."""
    wall, roof = pick_colours(canvas.rng, 2, ("red", "yellow", "blue", "white", "pink", "orange", "black"))
    canvas.gradient(dimmed((90, 170, 70), time), dimmed((40, 110, 40), time), canvas.uniform(0.6, 0.7))
    x, y, s, h = (
        canvas.uniform(0.35, 0.65),
        canvas.uniform(0.46, 0.52),
        canvas.uniform(0.18, 0.25),
        canvas.uniform(0.28, 0.36),
    )
    canvas.box(x - s, y, x + s, y + h, dimmed(tint(canvas.rng, wall), time))
    top = y - canvas.uniform(0.18, 0.28)
    canvas.polygon([(x - 1.2 * s, y), (x, top), (x + 1.2 * s, y)], dimmed(tint(canvas.rng, roof), time))
    canvas.box(x - 0.15 * s, y + 0.45 * h, x + 0.2 * s, y + h, dimmed(COLOURS["brown"], time))
    for side in (-0.75, 0.45):
        canvas.box(x + side * s, y + 0.2 * h, x + (side + 0.3) * s, y + 0.5 * h, (250, 240, 160))
    return pick(canvas.rng, (f"a {wall} house with a {roof} roof", f"{wall} country house, {roof} roof, green meadow"))


def car(canvas: Canvas, time: str) -> str:
    """A car on a road."""
    paint = pick(canvas.rng, ("red", "yellow", "blue", "white", "green", "orange", "purple"))
    canvas.gradient(dimmed((120, 150, 90), time), dimmed((90, 120, 70), time), 0.55)
    road = canvas.uniform(0.64, 0.72)
    canvas.box(0, road, 1, 1, dimmed((88, 88, 92), time))
    for i in range(6):
        canvas.box(i / 5 - 0.04, 0.9, i / 5 + 0.06, 0.925, dimmed((230, 230, 220), time))
    x, s, y = canvas.uniform(0.38, 0.62), canvas.uniform(0.26, 0.33), road + 0.1
    body = dimmed(tint(canvas.rng, paint), time)
    canvas.box(x - s, y - 0.17, x + s, y, body)
    cabin = [(x - 0.6 * s, y - 0.17), (x - 0.38 * s, y - 0.32), (x + 0.32 * s, y - 0.32), (x + 0.58 * s, y - 0.17)]
    canvas.polygon(cabin, body)
    canvas.box(x - 0.34 * s, y - 0.29, x + 0.3 * s, y - 0.18, dimmed((190, 215, 230), time))
    for side in (-0.6, 0.6):
        canvas.disc(x + side * s, y, 0.085, (20, 20, 22))
        canvas.disc(x + side * s, y, 0.04, (150, 150, 150))
    return pick(canvas.rng, (f"a {paint} car on the road", f"a {paint} car parked by the street"))


def forest(canvas: Canvas, time: str) -> str:
    """Fir trees, green or snowy, or autumn trees."""
    leaf = pick(canvas.rng, ("green", "orange", "white"))
    ground = {"green": (60, 110, 50), "orange": (130, 100, 50), "white": (235, 238, 242)}[leaf]
    canvas.gradient(dimmed(ground, time), dimmed(ground, time), 0.68)
    for _ in range(int(canvas.rng.integers(5, 10))):
        x, y, s = canvas.uniform(0.02, 0.98), canvas.uniform(0.7, 0.92), canvas.uniform(0.07, 0.13)
        canvas.box(x - 0.012, y - 0.1, x + 0.012, y + 0.03, dimmed(COLOURS["brown"], time))
        crown = dimmed(tint(canvas.rng, leaf, 24), time)
        for step in range(3):
            top = y - 0.55 + 0.12 * step
            canvas.polygon(
                [(x, top), (x - s * (0.5 + step / 4), top + 0.24), (x + s * (0.5 + step / 4), top + 0.24)], crown
            )
    said = {
        "green": "a forest of green trees",
        "orange": "autumn forest with orange trees",
        "white": "snowy trees in winter",
    }
    return said[leaf]


def mountains(canvas: Canvas, time: str) -> str:
    """Snow-capped mountains over a plain."""
    for height, shade in ((canvas.uniform(0.3, 0.4), (120, 120, 140)), (canvas.uniform(0.45, 0.55), (84, 88, 104))):
        for _ in range(int(canvas.rng.integers(2, 4))):
            x, half, top = canvas.uniform(0.1, 0.9), canvas.uniform(0.28, 0.42), height + canvas.uniform(-0.12, 0.08)
            slope = (0.8 - top) / half
            canvas.polygon([(x - half, 0.8), (x, top), (x + half, 0.8)], dimmed(shade, time))
            cap = 0.3 * half
            foot = top + cap * slope
            peak = [(x - cap, foot), (x, top), (x + cap, foot), (x + cap / 3, foot - 0.03), (x - cap / 4, foot + 0.03)]
            canvas.polygon(peak, dimmed((245, 248, 252), time))
    canvas.gradient(dimmed((90, 120, 70), time), dimmed((60, 90, 50), time), 0.78)
    return pick(canvas.rng, ("mountains with snow on their peaks", "high snowy mountains above a valley"))


def city(canvas: Canvas, time: str) -> str:
    """Towers with windows."""
    left = -0.02
    while left < 1.0:
        wide, top = canvas.uniform(0.09, 0.19), canvas.uniform(0.15, 0.6)
        grey = int(canvas.rng.integers(50, 130))
        canvas.box(left, top, left + wide, 1.0, dimmed((grey, grey, grey + 14), time))
        lit = (250, 225, 130) if time in ("night", "sunset") else (185, 205, 220)
        for row in np.arange(top + 0.04, 0.96, 0.07):
            for column in np.arange(left + 0.015, left + wide - 0.025, 0.035):
                if canvas.rng.random() < 0.7:
                    canvas.box(column, float(row), column + 0.018, float(row) + 0.035, lit)
        left += wide + canvas.uniform(0.0, 0.02)
    return pick(canvas.rng, ("city skyline with tall buildings", "towers of a big city with many windows"))


def balloon(canvas: Canvas, time: str) -> str:
    """A hot air balloon over hills."""
    paint, stripe = pick_colours(canvas.rng, 2, ("red", "yellow", "purple", "orange", "pink", "green"))
    canvas.polygon(ridge(canvas, 0.86, 0.05, 7), dimmed((70, 120, 60), time))
    x, y, r = canvas.uniform(0.35, 0.65), canvas.uniform(0.34, 0.42), canvas.uniform(0.22, 0.28)
    rx = r * min(canvas.width, canvas.height) / canvas.width
    canvas.disc(x, y, r, dimmed(tint(canvas.rng, paint), time))
    canvas.polygon(
        [(x - 0.93 * rx, y + 0.1), (x + 0.93 * rx, y + 0.1), (x + 0.04, y + 0.36), (x - 0.04, y + 0.36)],
        dimmed(COLOURS[paint], time),
    )
    canvas.box(x - 0.97 * rx, y - 0.03, x + 0.97 * rx, y + 0.05, dimmed(tint(canvas.rng, stripe), time))
    canvas.box(x - 0.035, y + 0.38, x + 0.035, y + 0.45, COLOURS["brown"])
    return pick(
        canvas.rng,
        (f"a {paint} hot air balloon with a {stripe} stripe", f"hot air balloon, {paint} and {stripe}, over hills"),
    )


def flower(canvas: Canvas, time: str) -> str:
    """A large flower in the grass."""
    petal = pick(canvas.rng, ("red", "yellow", "purple", "pink", "white", "blue"))
    canvas.gradient(dimmed((110, 180, 80), time), dimmed((50, 120, 40), time), canvas.uniform(0.5, 0.75))
    x, y, r = canvas.uniform(0.4, 0.6), canvas.uniform(0.36, 0.46), canvas.uniform(0.13, 0.17)
    canvas.box(x - 0.015, y, x + 0.015, 0.95, dimmed((40, 110, 40), time))
    canvas.polygon([(x, 0.8), (x + 0.2, 0.66), (x + 0.1, 0.82)], dimmed((50, 130, 50), time))
    count = int(canvas.rng.integers(5, 9))
    for i in range(count):
        angle = 2 * math.pi * i / count
        short = min(canvas.width, canvas.height)
        dx, dy = 1.35 * r * math.cos(angle) * short / canvas.width, 1.35 * r * math.sin(angle) * short / canvas.height
        canvas.disc(x + dx, y + dy, r * 0.8, dimmed(tint(canvas.rng, petal), time))
    canvas.disc(x, y, r * 0.7, dimmed((230, 180, 40) if petal != "yellow" else (110, 70, 30), time))
    return pick(canvas.rng, (f"a {petal} flower in the grass", f"close view of a {petal} flower in a garden"))


def fish(canvas: Canvas, time: str) -> str:
    """A fish under water; the sky is painted over."""
    skin = pick(canvas.rng, ("red", "orange", "yellow", "pink", "white", "purple"))
    canvas.gradient(dimmed((40, 150, 190), time), dimmed((8, 50, 100), time))
    canvas.polygon(ridge(canvas, 0.88, 0.04, 9), dimmed((210, 190, 130), time))
    for _ in range(int(canvas.rng.integers(3, 7))):
        weed = canvas.uniform(0.0, 1.0)
        canvas.polygon(
            [(weed - 0.02, 0.95), (weed + canvas.uniform(-0.05, 0.05), canvas.uniform(0.45, 0.7)), (weed + 0.02, 0.95)],
            (30, 120, 70),
        )
    x, y, s = canvas.uniform(0.4, 0.6), canvas.uniform(0.35, 0.55), canvas.uniform(0.2, 0.28)
    look = -1.0 if canvas.rng.random() < 0.5 else 1.0
    body = dimmed(tint(canvas.rng, skin), time)
    points = [(x + s * math.cos(t), y + 0.6 * s * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 40)]
    canvas.polygon(points, body)
    canvas.polygon(
        [(x - look * 0.8 * s, y), (x - look * 1.5 * s, y - 0.5 * s), (x - look * 1.5 * s, y + 0.5 * s)], body
    )
    canvas.disc(x + look * 0.6 * s, y - 0.1 * s, 0.03, (250, 250, 250))
    canvas.disc(x + look * 0.6 * s, y - 0.1 * s, 0.015, (10, 10, 10))
    return pick(canvas.rng, (f"{skin} fish swimming under water", f"a {skin} fish in the ocean"))


SCENES: Final[dict[str, Callable[[Canvas, str], str]]] = {
    "boat": boat,
    "house": house,
    "car": car,
    "forest": forest,
    "mountains": mountains,
    "city": city,
    "balloon": balloon,
    "flower": flower,
    "fish": fish,
}


def draw_scene(rng: np.random.Generator) -> Drawing:
    """A small landscape at some time of day: "a boat with red sails on the sea at sunset"."""
    subject, time = pick(rng, tuple(SCENES)), pick(rng, tuple(SKIES))
    top, low, said = SKIES[time]
    canvas = Canvas.blank(photo_size(rng), top, rng)
    canvas.gradient(top, low)
    sky(canvas, time)
    phrase = SCENES[subject](canvas, time)
    caption = phrase if subject == "fish" else f"{phrase} {pick(rng, said)}"
    return Drawing(canvas.finished(light=13, grain=8), caption, "scene", subject)


def sky(canvas: Canvas, time: str) -> None:
    """Sun, moon and stars, or clouds."""
    x, y = canvas.uniform(0.08, 0.92), canvas.uniform(0.08, 0.28)
    if time in ("day", "sunset"):
        canvas.disc(x, y if time == "day" else y + 0.15, canvas.uniform(0.06, 0.1), (255, 238, 150))
    elif time == "night":
        canvas.disc(x, y, canvas.uniform(0.05, 0.09), (232, 232, 214))
        for _ in range(40):
            canvas.disc(canvas.uniform(0, 1), canvas.uniform(0, 0.5), 0.004, (240, 240, 255))
    for _ in range({"day": 2, "overcast": 7}.get(time, 0)):
        cx, cy = canvas.uniform(0, 1), canvas.uniform(0.05, 0.3)
        for part in (-0.07, 0.0, 0.06):
            canvas.disc(cx + part, cy + canvas.uniform(-0.02, 0.02), canvas.uniform(0.05, 0.09), (236, 238, 240))
