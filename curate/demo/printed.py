"""Drawings that carry text or marks: documents, charts, signs, and the watermark that any drawing can get.

They are planted so that text, document and watermark scorers have something true to find. It refuses claims that the
pixels do not show: a document's caption names the title that is printed on it.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from curate.demo.canvas import COLOURS, Canvas, Drawing, Rgb, font, photo_size, pick, pick_colours, tint
from curate.demo.scenes import SKIES, dimmed, outline, sky

WORDS: Final = (
    "the of and to in for with on by from that this was are report data year result value market people school water "
    "river train station letter morning garden winter summer price annual budget public council street number total "
    "growth north south first second third section article notice meeting member office paper history music science "
    "travel library energy health early later under between against through during before after every other"
)
TITLES: Final = (
    "annual report",
    "meeting notes",
    "school letter",
    "train timetable",
    "lease agreement",
    "user manual",
    "garden handbook",
    "local history",
    "price list",
    "weather bulletin",
)
SIGN_WORDS: Final = ("STOP", "OPEN", "CLOSED", "EXIT", "SALE", "CAFE", "HOTEL", "PARKING", "SLOW", "BAKERY", "TAXI")
QUANTITIES: Final = ("rainfall", "sales", "visitors", "energy use", "population", "prices", "temperature", "exports")
WATERMARKS: Final = ("SAMPLE", "stock photo", "PREVIEW ONLY", "© picture bank")


def words(rng: np.random.Generator, count: int) -> str:
    """`count` common words."""
    known = WORDS.split()
    return " ".join(known[i] for i in rng.integers(len(known), size=count))


def draw_document(rng: np.random.Generator) -> Drawing:
    """A photographed page of text, with a title, one or two columns and sometimes a grey figure."""
    width = int(rng.integers(360, 513))
    height = round(width * float(rng.uniform(1.15, 1.42)))
    paper: Rgb = pick(rng, ((250, 250, 248), (244, 238, 222), (232, 236, 240)))
    canvas = Canvas.blank((width, height), paper, rng)
    title, columns = pick(rng, TITLES), int(rng.integers(1, 3))
    size = int(canvas.width * canvas.uniform(0.026, 0.036))
    margin = canvas.width * canvas.uniform(0.06, 0.13)
    ink = pick(rng, ((20, 20, 24), (40, 36, 60), (60, 50, 40)))
    y = canvas.height * canvas.uniform(0.04, 0.12)
    canvas.pen.text((margin, y), title.title(), fill=ink, font=font(int(size * canvas.uniform(1.8, 2.6))))
    top = y + size * 4
    wide = (canvas.width - (columns + 1) * margin) / columns
    for column in range(columns):
        print_column(canvas, (margin + column * (wide + margin), top, wide), size, ink)
    said = (f"scanned page of text titled {title}", f"page of a {title}, printed text", f"document: {title}")
    return Drawing(canvas.finished(light=9, grain=4), pick(rng, said), "document", "document")


def print_column(canvas: Canvas, place: tuple[float, float, float], size: int, ink: Rgb) -> None:
    """Print lines of `size` supersampled pixels down from `place` = (left, top, width), with gaps and one figure."""
    left, y, wide = place
    face, figure_at = font(size), canvas.uniform(0.25, 1.4) * canvas.height
    per_line = max(2, int(wide / (size * 2.9)))
    while y < canvas.height * 0.94:
        if figure_at < y < figure_at + canvas.height:
            tall = canvas.height * canvas.uniform(0.1, 0.22)
            canvas.pen.rectangle((left, y, left + wide, min(y + tall, canvas.height * 0.95)), fill=(168, 172, 178))
            y, figure_at = y + tall + size, math.inf
            continue
        last = canvas.rng.random() < 0.18
        canvas.pen.text((left, y), words(canvas.rng, max(1, per_line // 2 if last else per_line)), fill=ink, font=face)
        y += size * (2.4 if last else 1.45)


def draw_chart(rng: np.random.Generator) -> Drawing:
    """A bar, line or pie chart with title and axes."""
    style = pick(rng, tuple(CHARTS))
    quantity, year = pick(rng, QUANTITIES), int(rng.integers(1990, 2024))
    canvas = Canvas.blank(photo_size(rng), pick(rng, ((252, 252, 252), (244, 244, 236), (232, 240, 248))), rng)
    ink = (30, 30, 34)
    size = int(min(canvas.width, canvas.height) * 0.07)
    canvas.pen.text(
        (canvas.width * 0.12, canvas.height * 0.03), f"{quantity.title()}, {year}", fill=ink, font=font(size)
    )
    colour = pick(rng, ("red", "blue", "green", "orange", "purple"))
    if style != "pie":
        axis = [(0.12 * canvas.width, 0.15 * canvas.height), (0.12 * canvas.width, 0.88 * canvas.height)]
        canvas.pen.line([*axis, (0.96 * canvas.width, 0.88 * canvas.height)], fill=ink, width=4)
        for i in range(5):
            y = (0.2 + 0.15 * i) * canvas.height
            label = str(int(rng.integers(1, 9)) * (5 - i))
            canvas.pen.text((0.03 * canvas.width, y - size / 3), label, fill=ink, font=font(int(size * 0.6)))
            canvas.pen.line([(0.12 * canvas.width, y), (0.96 * canvas.width, y)], fill=(205, 205, 205), width=2)
    CHARTS[style](canvas, colour)
    described = f"{style} chart of {quantity} in {year}" + ("" if style == "pie" else f", {colour}")
    return Drawing(canvas.finished(light=7, grain=4), described, "chart", f"{style} chart")


def bars(canvas: Canvas, colour: str) -> None:
    """Upright bars of random height."""
    count = int(canvas.rng.integers(4, 10))
    for i in range(count):
        x, step = 0.15 + 0.8 * i / count, 0.8 / count
        canvas.box(x, 0.88 - canvas.uniform(0.1, 0.68), x + 0.7 * step, 0.88, tint(canvas.rng, colour))


def lines(canvas: Canvas, colour: str) -> None:
    """One or two random walks."""
    for name in (colour, "black")[: int(canvas.rng.integers(1, 3))]:
        steps = 0.5 + np.cumsum(canvas.rng.normal(0, 0.08, 14))
        ys = np.clip(steps, 0.2, 0.86) * canvas.height
        xs = np.linspace(0.13, 0.95, 14) * canvas.width
        canvas.pen.line(
            list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=tint(canvas.rng, name), width=12, joint="curve"
        )


def pie(canvas: Canvas, colour: str) -> None:
    """Slices of different colours; `colour` has the first."""
    count = int(canvas.rng.integers(3, 7))
    edges = np.concatenate(([0.0], np.cumsum(canvas.rng.dirichlet(np.full(count, 3.0))))) * 360
    others = [name for name in pick_colours(canvas.rng, len(COLOURS)) if name not in (colour, "white")]
    r = 0.36 * min(canvas.width, canvas.height)
    cx, cy = canvas.width * canvas.uniform(0.4, 0.6), canvas.height * 0.56
    for name, start, end in zip([colour, *others], edges, edges[1:], strict=False):
        canvas.pen.pieslice((cx - r, cy - r, cx + r, cy + r), float(start), float(end), fill=tint(canvas.rng, name))


CHARTS: Final[dict[str, Callable[[Canvas, str], None]]] = {"bar": bars, "line": lines, "pie": pie}


def draw_sign(rng: np.random.Generator) -> Drawing:
    """A sign with one word, on a pole before a sky."""
    time = pick(rng, ("day", "sunset", "overcast"))
    word, board = pick(rng, SIGN_WORDS), pick(rng, ("red", "yellow", "blue", "green", "white", "black"))
    top, low, said = SKIES[time]
    canvas = Canvas.blank(photo_size(rng), top, rng)
    canvas.gradient(top, low)
    sky(canvas, time)
    canvas.gradient(dimmed((110, 130, 90), time), dimmed((80, 90, 70), time), canvas.uniform(0.75, 0.85))
    x, y, r = canvas.uniform(0.4, 0.6), canvas.uniform(0.38, 0.48), canvas.uniform(0.27, 0.33)
    canvas.box(x - 0.02, y, x + 0.02, 0.97, (110, 110, 114))
    radius = r * min(canvas.width, canvas.height)
    shape = pick(rng, ("hexagon", "circle", "board"))
    half, tall = (radius * 1.25, radius * 0.62) if shape == "board" else (radius, radius)
    corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)] if shape == "board" else outline(shape, math.pi / 6)
    cx, cy = x * canvas.width, y * canvas.height
    light_ink = board not in ("yellow", "white")
    for grow, colour in ((1.08, (245, 245, 245) if light_ink else (30, 30, 30)), (1.0, dimmed(tint(rng, board), time))):
        canvas.pen.polygon([(cx + a * half * grow, cy + b * tall * grow) for a, b in corners], fill=colour)
    face = font(int(min(2.9 * half / len(word), tall * 0.95)))
    canvas.pen.text((cx, cy), word, fill=(250, 250, 250) if light_ink else (20, 20, 20), font=face, anchor="mm")
    phrase = pick(rng, (f"a {board} sign that says {word.lower()}", f"{word.lower()} sign in {board}"))
    return Drawing(canvas.finished(light=12, grain=8), f"{phrase} {pick(rng, said)}", "sign", "sign")


def watermarked(image: Image.Image, seed: int) -> Image.Image:
    """A copy of `image` (RGB) under repeated half-transparent words, slanted, as picture agencies put them."""
    rng = np.random.default_rng([seed, 77])
    text, size = pick(rng, WATERMARKS), max(14, min(image.size) // 9)
    side = 2 * max(image.size)
    sheet = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(sheet)
    step = round(font(size).getlength(text) * 1.4)
    for row, y in enumerate(range(0, side, size * 3)):
        for x in range(-(row % 2) * step // 2, side, step):
            pen.text((x, y), text, fill=118, font=font(size))
    slanted = sheet.rotate(float(rng.uniform(20, 40)), Image.Resampling.BILINEAR)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    mask = slanted.crop((left, top, left + image.width, top + image.height))
    return Image.composite(Image.new("RGB", image.size, (255, 255, 255)), image, mask)
