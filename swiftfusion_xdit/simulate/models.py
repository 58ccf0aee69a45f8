"""The models whose steps are simulated: attention, and the rest of the transformer by size.

Numbers are those of the published configurations. Images and videos go through a VAE that shrinks
each side by 8 and through patches of 2 x 2; videos shrink in time by 4, after their first frame.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

PIXELS_PER_TOKEN = 16  # per side: VAE 8, patch 2
FRAMES_PER_TOKEN = 4
# Reads and writes of the hidden rows [rows, hidden] in one eager layer besides attention and matrix
# products: norms, modulation, RoPE, GELU and residuals, in part in fp32. Measured on FLUX.1 on two
# H200 (docs/simulator.md): what its step takes beyond attention and products, at two sizes alike.
EAGER_PASSES = 170


@dataclass(frozen=True)
class Model:
    """A diffusion transformer.

    Args:
        num_layers: transformer blocks; each has one self-attention.
        joint_text_tokens: text rows that take part in self-attention.
        cross_text_tokens: text rows that a cross-attention of every block looks at, or 0.
        layer_weights: weights of one block's matrix products that each row meets.
        size: of the example workload: (height, width) pixels; ``frames`` and ``fps`` of a video.
    """

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    layer_weights: float
    joint_text_tokens: int = 0
    cross_text_tokens: int = 0
    size: tuple[int, int] = (1024, 1024)
    frames: int = 1
    fps: float = 0.0
    eager_passes: float = EAGER_PASSES

    @property
    def hidden(self) -> int:
        return self.num_heads * self.head_dim

    def sequence(self, height: int, width: int, frames: int = 1) -> int:
        """Rows of self-attention for a picture, or a video of ``frames``.

        Raises:
            ValueError: a side that is no positive multiple of 16, or frames that do not fit.
        """
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % PIXELS_PER_TOKEN:
                raise ValueError(
                    f"{name} must be a positive multiple of {PIXELS_PER_TOKEN}, got {value}"
                )
        if frames < 1 or (not self.fps and frames != 1):
            raise ValueError(f"frames must be 1 for {self.name}'s pictures, got {frames}")
        latent_frames = (frames - 1) // FRAMES_PER_TOKEN + 1
        rows = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        return self.joint_text_tokens + latent_frames * rows

    def frames_of(self, seconds: float) -> int:
        """Frames of a video of that length, the first one included.

        Raises:
            ValueError: a model of pictures, or a length that is not positive.
        """
        if not self.fps or seconds <= 0:
            raise ValueError(f"seconds must be positive and need a video model, got {seconds}")
        return round(seconds * self.fps) + 1

    def with_eager_passes(self, factor: float) -> Model:
        """The model with more or less memory traffic besides attention and matrix products."""
        return dataclasses.replace(self, eager_passes=factor * self.eager_passes)

    def product_flops(self, rows: float) -> float:
        """FLOPs of one block's matrix products and cross-attention over ``rows`` rows."""
        cross = 4.0 * self.cross_text_tokens * self.hidden
        return rows * (2.0 * self.layer_weights + cross)

    def memory_bytes(self, rows: float) -> float:
        """Bytes that one block's other operations read and write over ``rows`` rows, bf16."""
        return 2.0 * self.eager_passes * rows * self.hidden


def _dense(hidden: int, ratio: float = 4.0) -> float:
    """Query, key, value and output projections, and a feed-forward of ``ratio`` times hidden."""
    return (4 + 2 * ratio) * hidden**2


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        # 19 double and 38 single blocks: a row meets as many weights in either.
        Model("flux", 57, 24, 128, _dense(3072), joint_text_tokens=512),
        # 48 heads of 64 in the published configuration; a review of the paper says 24.
        Model(
            "cogvideox-5b", 42, 48, 64, _dense(3072), joint_text_tokens=226,
            size=(768, 1360), frames=49, fps=8,
        ),
        Model(
            "wan2.1-14b", 40, 40, 128, _dense(5120, 2.7) + 2 * 5120**2, cross_text_tokens=512,
            size=(720, 1280), frames=81, fps=16,
        ),
        # 20 double and 40 single blocks.
        Model(
            "hunyuanvideo", 60, 24, 128, _dense(3072), joint_text_tokens=256,
            size=(720, 1280), frames=129, fps=24,
        ),
    )
}  # fmt: skip
ALIASES = {"cogvideox": "cogvideox-5b", "wan": "wan2.1-14b", "hunyuan": "hunyuanvideo"}


def model_named(name: str) -> Model:
    """A model by its name or alias.

    Raises:
        ValueError: an unknown name.
    """
    found = MODELS.get(ALIASES.get(name, name))
    if found is None:
        known = ", ".join(sorted({*MODELS, *ALIASES}))
        raise ValueError(f"model must be one of {known}, got {name!r}")
    return found
