"""Sentences that ask for a scene, in English and Chinese, and what each of them states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from shapes.scenes import CELLS, MAX_OBJECTS, Scene, Thing, sample_scene

LANGUAGES: Final = ("en", "zh")
ENGLISH: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
    "crescent": ("crescent", "crescent moon"),
    "heart": ("heart",),
    "arrow": ("arrow",),
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "black": ("black",),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "white": ("white",),
    "grey": ("grey", "gray"),
    "light blue": ("light blue", "pale blue"),
    "light green": ("light green", "pale green"),
    "cream": ("cream",),
    "pink": ("pink",),
    "plain": ("on a {} background", "on a plain {} background", "on {}"),
    "striped": ("on a striped {} background", "on {} stripes", "on a background with {} stripes"),
    "graded": ("on a background graded from {} to white", "on a {} background that fades to white"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
CHINESE: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("圆形", "圆"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星星", "五角星"),
    "ring": ("圆环",),
    "crescent": ("月牙", "弯月"),
    "heart": ("爱心", "心形"),
    "arrow": ("箭头",),
    "red": ("红色",),
    "orange": ("橙色",),
    "yellow": ("黄色",),
    "green": ("绿色",),
    "cyan": ("青色",),
    "blue": ("蓝色",),
    "purple": ("紫色",),
    "black": ("黑色",),
    "small": ("小",),
    "large": ("大",),
    "white": ("白色",),
    "grey": ("灰色",),
    "light blue": ("浅蓝色",),
    "light green": ("浅绿色",),
    "cream": ("米色",),
    "pink": ("粉色",),
    "plain": ("{}背景", "纯{}背景"),
    "striped": ("{}条纹背景",),
    "graded": ("{}渐变背景", "从{}到白色的渐变背景"),
    "left": ("左边",),
    "right": ("右边",),
    "above": ("上面",),
    "below": ("下面",),
}
ENGLISH_PLACES: Final = (
    ("in the upper left corner", "at the top left"),
    ("at the top", "in the middle of the top"),
    ("in the upper right corner", "at the top right"),
    ("on the left", "at the left edge"),
    ("in the middle", "in the centre", "in the center"),
    ("on the right", "at the right edge"),
    ("in the lower left corner", "at the bottom left"),
    ("at the bottom", "in the middle of the bottom"),
    ("in the lower right corner", "at the bottom right"),
)
CHINESE_PLACES: Final = (
    ("左上角",),
    ("顶部", "上方"),
    ("右上角",),
    ("左侧",),
    ("中间", "中央", "正中"),
    ("右侧",),
    ("左下角",),
    ("底部", "下方"),
    ("右下角",),
)
CHINESE_WORDS: Final = (
    "一个",
    "有",
    "和",
    "在",
    "的",
    "从左到右",
    "从上到下",
    "是",
    "背景",
    "画",
    "图中",
    "一张图",
    "上",
)
"""Words of Chinese sentences besides those of the tables above."""
_THIRDS: Final = {1: (1,), 2: (0, 2), 3: (0, 1, 2)}
"""Of the middle row or column, by the number of things that stand there, where a sentence gives no places. With places
at random a model drew one thing twice in a third of such pictures, as it had to choose between many right places."""
_MIDDLE: Final = 3
"""The first cell of the middle row."""


@dataclass(frozen=True)
class Request:
    """A sentence, the scene that it was made for, and what it states of this scene.

    Forms and colours of all things are always stated, so these are the rest: ``sizes`` and ``places`` are indices of
    things, ``relations`` are (thing, "left" | "right" | "above" | "below", thing).
    """

    text: str
    language: str
    scene: Scene
    sizes: frozenset[int] = frozenset()
    places: frozenset[int] = frozenset()
    relations: tuple[tuple[int, str, int], ...] = ()
    has_background: bool = False


def sample_request(
    rng: Random, *, objects: int = 0, language: str = "", held_out: bool = False, style: str = ""
) -> Request:
    """Draw a request for a scene.

    ``objects``: their number, 0 for any. ``held_out``: the scene has a combination that training never sees, else it
    has none. ``style``: "names" (the middle row, in the sentence's order), "places" (any, each is stated), or
    "relations" (the middle row or column), which needs two or three objects.
    """
    count = objects or rng.choices(range(1, MAX_OBJECTS + 1), (0.35, 0.4, 0.25))[0]
    language = language or rng.choice(LANGUAGES)
    style = style or rng.choice(("names", "places") if count == 1 else ("names", "places", "relations", "relations"))
    relation = ""
    if style == "relations":
        cells, relation = _line(rng, count)
    elif style == "names":
        cells = tuple(_MIDDLE + third for third in _THIRDS[count])
    else:
        cells = tuple(rng.sample(range(CELLS), count))
    scene = sample_scene(rng, cells, held_out=held_out)
    sizes = frozenset(i for i in range(count) if rng.random() < 0.4)
    has_background = rng.random() < 0.7
    write = _english if language == "en" else _chinese
    text = write(rng, scene, sizes, style, relation, has_background)
    return Request(
        text=text,
        language=language,
        scene=scene,
        sizes=sizes,
        places=frozenset(range(count) if style == "places" else ()),
        relations=tuple((i, relation, i + 1) for i in range(count - 1)) if relation else (),
        has_background=has_background,
    )


def _line(rng: Random, count: int) -> tuple[tuple[int, ...], str]:
    """Choose the cells of the middle row or column, and the relation of each to the next."""
    at = _THIRDS[count]
    is_row, is_reversed = rng.random() < 0.5, count == 2 and rng.random() < 0.5
    cells = tuple(_MIDDLE + i if is_row else i * 3 + 1 for i in (reversed(at) if is_reversed else at))
    names = ("left", "right") if is_row else ("above", "below")
    return cells, names[is_reversed]


def _english(rng: Random, scene: Scene, sizes: frozenset[int], style: str, relation: str, has_background: bool) -> str:
    def say(name: str) -> str:
        return rng.choice(ENGLISH[name])

    def noun(i: int, thing: Thing) -> str:
        words = " ".join([*([say(thing.size)] if i in sizes else []), say(thing.colour), say(thing.form)])
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    nouns = [noun(i, thing) for i, thing in enumerate(scene.things)]
    if style == "places":
        text = _listed([f"{n} {rng.choice(ENGLISH_PLACES[t.cell])}" for n, t in zip(nouns, scene.things, strict=True)])
    elif relation and len(nouns) == 2:
        text = f"{nouns[0]} {say(relation)} {nouns[1]}"
    elif relation:
        order = "from left to right" if relation == "left" else "from top to bottom"
        text = rng.choice((f"{order}: {_listed(nouns)}", f"{_listed(nouns)} {order}"))
    else:
        text = _listed(nouns)
    background = rng.choice(ENGLISH[scene.pattern]).format(say(scene.background)) if has_background else ""
    if background and rng.random() < 0.2:
        text = f"{background}, {text}"
    elif background:
        text = f"{text}{rng.choice((' ', ', '))}{background}"
    text = (
        f"{rng.choice(('', '', '', 'a picture of ', 'draw '))}{text}" if not text.startswith(("on ", "from ")) else text
    )
    text = text if rng.random() < 0.5 else text[0].upper() + text[1:]
    return text + rng.choice(("", "."))


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _chinese(rng: Random, scene: Scene, sizes: frozenset[int], style: str, relation: str, has_background: bool) -> str:
    def say(name: str) -> str:
        return rng.choice(CHINESE[name])

    def noun(i: int, thing: Thing) -> str:
        size = say(thing.size) if i in sizes else ""
        colour, form = say(thing.colour), say(thing.form)
        return "一个" + (
            rng.choice((f"{size}的{colour}{form}", f"{colour}的{size}{form}", f"{size}{colour}{form}"))
            if size
            else rng.choice((f"{colour}的{form}", f"{colour}{form}"))
        )

    nouns = [noun(i, thing) for i, thing in enumerate(scene.things)]
    if style == "places":
        places = [rng.choice(CHINESE_PLACES[thing.cell]) for thing in scene.things]
        if rng.random() < 0.5:
            text = "，".join(f"{n}在{p}" for n, p in zip(nouns, places, strict=True))
        else:
            text = "，".join(f"{p}有{n}" for n, p in zip(nouns, places, strict=True))
    elif relation and len(nouns) == 2:
        text = f"{nouns[0]}在{nouns[1]}的{say(relation)}"
    elif relation:
        order = "从左到右" if relation == "left" else "从上到下"
        text = rng.choice((f"{order}是{'、'.join(nouns)}", f"{'、'.join(nouns[:-1])}和{nouns[-1]}{order}"))
    else:
        text = f"{'、'.join(nouns[:-1])}和{nouns[-1]}" if len(nouns) > 1 else nouns[0]
    if has_background:
        background = rng.choice(CHINESE[scene.pattern]).format(say(scene.background))
        text = rng.choice((f"{text}，{background}", f"{background}上{text}", f"{background}，{text}"))
    elif rng.random() < 0.2:
        text = rng.choice(("画", "一张图，", "图中有" if style == "names" else "画")) + text
    return text + rng.choice(("", "。"))
