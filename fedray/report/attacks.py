"""Pages about attacks on a run: whether members are recognised, and whether synthetic pictures are copies."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedray.report import figures
from fedray.report.markup import legend, page, section, table, text

if TYPE_CHECKING:
    from fedray.metrics.membership import Attack

Pair = tuple[np.ndarray, np.ndarray, str]  # a picture (C, H, W), the one that it is nearest to, and what they are


def membership_page(attack: "Attack", about: Mapping[str, Any], out: Path) -> None:
    """The ROC curve of a membership attack on logarithmic axes, with what it comes to."""
    rows = [
        ["measure", "value", "chance"],
        ["area under the ROC curve", f"{attack.auc:.4f} ± {attack.auc_error:.4f}", "0.5"],
        ["balanced accuracy, at its best", f"{attack.balanced_accuracy:.4f}", "0.5"],
        *([f"true positives at {rate:g} false ones", f"{tpr:.4f}", f"{rate:g}"] for rate, tpr in attack.tpr_at.items()),
    ]
    curve = figures.roc_svg(np.array(attack.fpr), np.array(attack.tpr))
    settings = [["setting", "value"], *([name.replace("_", " "), str(value)] for name, value in about.items())]
    note = "An attack is read at the left: it is bad if few members are recognised with certainty. Dashed: chance."
    body = f'<div class="pair"><figure>{curve}</figure>{table(rows)}</div>'
    sections = [section("Members recognised", body, note), section("How", table(settings))]
    out.write_text(page(f"Membership: {out.resolve().parent.name}", "LiRA (Carlini et al., 2022)", sections))


def neighbours_page(
    distances: Mapping[str, np.ndarray], pairs: Mapping[str, Sequence[Pair]], closer: float, out: Path
) -> None:
    """Pairs of pictures that are nearest to each other, and how far all are from their nearest private one.

    Args:
        distances: Of each kind of picture to the nearest private one.
        pairs: The nearest pairs of each kind; the second picture of each is the private one.
        closer: The share of synthetic ones that are nearer than 99 % of the test pictures.
        out: The file.
    """
    drawn = legend(list(distances)) + f"<figure>{figures.histograms_svg(distances, 'distance')}</figure>"
    words = f"{closer:.2%} of the synthetic pictures are nearer to a private one than 99 % of the test pictures are."
    sections = [section("Distances to the nearest private picture", drawn, f"{words} By chance it were 1 %.")]
    for kind, found in pairs.items():
        cells = "".join(
            f"<figure>{_picture(one)} {_picture(other)}<figcaption>{text(what)}</figcaption></figure>"
            for one, other, what in found
        )
        title = f"The nearest: {kind} at the left, private at the right"
        sections.append(section(title, f'<div class="grid small">{cells}</div>'))
    out.write_text(page(f"Copies: {out.resolve().parent.name}", "nearest neighbours", sections))


def _picture(pixels: np.ndarray) -> str:
    from fedray.synthesis.generator import png

    content = base64.b64encode(png(pixels.transpose(1, 2, 0) / 255)).decode()
    return f'<img style="image-rendering:pixelated;width:45%" alt="" src="data:image/png;base64,{content}">'
