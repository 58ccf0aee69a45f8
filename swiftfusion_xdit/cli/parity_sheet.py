"""A contact sheet: a row per model, a column per run, and what differs, amplified."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 8
LABEL_WIDTH = 150
HEADER_HEIGHT = 36
LINE_HEIGHT = 17
BACKGROUND = (255, 255, 255)
INK = (20, 20, 20)


@dataclass(frozen=True)
class Row:
    """One model: `pictures [h, w, 3]` in 0..1 of `single` and each strategy.

    `relative` is the largest relative difference of any rank's latents from the single process.
    """

    title: str
    pictures: Mapping[str, np.ndarray]
    relative: Mapping[str, float]

    @property
    def difference(self) -> np.ndarray:
        """|torus - single| of the picture."""
        torus = self.pictures["torus"].astype(np.float64)
        return np.nan_to_num(np.abs(torus - self.pictures["single"]), nan=1.0)

    @property
    def amplification(self) -> int:
        """1, 2 or 5 times a power of ten: the largest that leaves 99 % of differences in 0..1."""
        most = max(float(np.quantile(self.difference, 0.99)), 1e-9)
        power = 10 ** max(0, math.floor(-math.log10(most)))
        return max(step * power for step in (1, 2, 5) if step == 1 or step * power * most <= 1)


def draw(rows: Sequence[Row], caption: str) -> Image.Image:
    """The sheet; all pictures have one size."""
    height, width, _ = rows[0].pictures["single"].shape
    strategies = list(rows[0].relative)
    headers = ["one process,\ndiffusers", *(f"xDiT,\n{name}" for name in strategies)]
    headers.append("|torus - one process|,\namplified")
    sheet_size = (
        LABEL_WIDTH + len(headers) * (width + GAP) + GAP,
        HEADER_HEIGHT + len(rows) * (height + GAP) + 3 * LINE_HEIGHT + GAP,
    )
    sheet = Image.new("RGB", sheet_size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for column, header in enumerate(headers):
        left = LABEL_WIDTH + column * (width + GAP)
        pen.multiline_text((left, 4), header, fill=INK, font=_font(), spacing=2)
    for index, row in enumerate(rows):
        top = HEADER_HEIGHT + index * (height + GAP)
        lines = [row.title, *(f"{name}  {row.relative[name]:.1e}" for name in strategies)]
        lines.append(f"picture  x {row.amplification:,}")
        pen.multiline_text((GAP, top), "\n".join(lines), fill=INK, font=_font(), spacing=5)
        tiles = [row.pictures[name] for name in ("single", *strategies)]
        tiles.append(row.difference * row.amplification)
        for column, tile in enumerate(tiles):
            sheet.paste(_image(tile), (LABEL_WIDTH + column * (width + GAP), top))
    notes = f"{caption}\nnumbers: norm of the latents' difference from one process / their norm,"
    notes += "\nworst rank; pictures: first frame of videos, through a tiny random VAE"
    bottom = HEADER_HEIGHT + len(rows) * (height + GAP)
    pen.multiline_text((GAP, bottom), notes, fill=INK, font=_font(), spacing=4)
    return sheet


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=12)


def _image(tile: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(tile, 0, 1) * 255).round().astype(np.uint8))
