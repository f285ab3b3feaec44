"""Curves, histograms and the map of embeddings as SVG that sits in a page and takes its colours of text from it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from code_worker.data.datasets.examples import FAKE, REAL, group_of
from code_worker.system.libraries import import_without_home
from code_worker.training.evaluation.metrics import calibration

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.training.embed import Embedded
    from code_worker.training.evaluation.evaluate import Scored

_MOST: Final = 1500


def project(embeddings: NDArray[np.float32], *, seed: int = 0) -> NDArray[np.float32]:
    """`(n, 2) float32`: t-SNE (van der Maaten & Hinton 2008) of `(n, d)` embeddings by cosine distance."""
    from sklearn.manifold import TSNE  # seconds to import, and only some epochs draw

    perplexity = min(30.0, max(2.0, (len(embeddings) - 1) / 3))
    plane = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
    return np.asarray(plane, dtype=np.float32)


def draw_embeddings(
    path: Path, embeddings: NDArray[np.float32], groups: Sequence[str], *, title: str, seed: int = 0
) -> None:
    """Writes a PNG with a dot per image, a colour per generator and grey for real ones.

    Of more than 1,500 images a seeded choice is drawn.
    """
    with import_without_home():
        from matplotlib.figure import Figure

    chosen = np.random.default_rng(seed).permutation(len(groups))[:_MOST]
    plane, names = project(embeddings[chosen], seed=seed), np.array(groups)[chosen]
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for name in sorted(set(names), key=lambda name: (name != "real", name)):
        points = plane[names == name]
        axes.scatter(
            points[:, 0], points[:, 1], s=9, label=f"{name} ({len(points)})", color="0.6" if name == "real" else None
        )
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(fontsize=8, markerscale=2, framealpha=0.9)
    figure.savefig(path, dpi=110)


with import_without_home():
    import matplotlib as mpl
    from matplotlib.figure import Figure

# After Okabe and Ito: colours that colour-blind readers tell apart too; both themes of the page bear them.
_COLOURS: Final = ("#1f83c6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a000", "#7b5ea7")
_STYLES: Final = ("-", "--", ":", "-.")
_MARKERS: Final = ("o", "^", "s", "D", "v", "P", "X", "*")
_REAL: Final = "#8c8c8c"
_INK: Final = "#123456"
"""Stands for the page's colour of text until the picture is in the page."""
_BINS: Final = 40
_MOST_POINTS: Final = 2000
_MOST_GROUPS: Final = 12
_RC: Final[Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 10,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def roc_plot(scored: Sequence[Scored]) -> str:
    """Share of fakes found over false alarms, a line per head; a logarithm shows where borders are."""
    with mpl.rc_context(_RC):
        figure, axes = _figure("roc", width=3.9, height=3.2)
        least = 1.0
        for place, one in enumerate(scored):
            fpr, tpr, _ = roc_curve(one.labels, one.scores, drop_intermediate=False)
            least = min(least, 1 / max(2, int((one.labels == REAL).sum())))
            axes.plot(np.maximum(fpr, least / 2), tpr, label=one.head, drawstyle="steps-post", **_line(place))
        ramp = np.geomspace(least / 2, 1, 200)
        axes.plot(ramp, ramp, color=_INK, alpha=0.35, linewidth=0.8)
        axes.set(xscale="log", xlim=(least / 2, 1), ylim=(-0.02, 1.02))
        axes.set(xlabel="false alarms: share of reals called fake", ylabel="share of fakes found")
        axes.legend(loc="lower right")
        return _svg(figure, "ROC curve of each head")


def precision_recall_plot(scored: Sequence[Scored]) -> str:
    """Precision over recall, a line per head; the fakes are what is looked for."""
    with mpl.rc_context(_RC):
        figure, axes = _figure("pr", width=3.9, height=3.2)
        for place, one in enumerate(scored):
            precision, recall, _ = precision_recall_curve(one.labels, one.scores)
            axes.plot(recall, precision, label=one.head, drawstyle="steps-pre", **_line(place))
        share = float((scored[0].labels == FAKE).mean())
        axes.axhline(share, color=_INK, alpha=0.35, linewidth=0.8)
        axes.set(xlim=(-0.02, 1.02), ylim=(min(0.45, 0.9 * share), 1.02))
        axes.set(xlabel="recall: share of fakes found", ylabel="precision: share of finds that are fake")
        axes.legend(loc="lower left")
        return _svg(figure, "precision-recall curve of each head")


def calibration_plot(scored: Sequence[Scored]) -> str:
    """Returns how many of the images of about one score are generated, a line per head.

    Area of a dot as its images.
    """
    with mpl.rc_context(_RC):
        figure, axes = _figure("calibration", width=3.9, height=3.2)
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.35, linewidth=0.8)
        for place, one in enumerate(scored):
            bins = calibration(one.labels, one.scores)
            x, y = [part.mean_score for part in bins], [part.fakes for part in bins]
            axes.plot(x, y, label=one.head, alpha=0.85, **_line(place))
            area = [8 + 150 * part.n / len(one.scores) for part in bins]
            axes.scatter(x, y, s=area, color=_COLOURS[place % len(_COLOURS)], alpha=0.5, linewidths=0)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.set(xlabel="mean score", ylabel="share that is generated")
        axes.legend(loc="upper left")
        return _svg(figure, "calibration curve of each head")


def histogram_plot(scored: Scored, thresholds: tuple[float, float]) -> str:
    """Scores of the reals and of each generator's images, one row each, with the thresholds in use."""
    groups = _by_origin(scored.examples)
    with mpl.rc_context(_RC):
        figure, axes = _figure("histogram", width=9.4, height=0.8 + 0.58 * len(groups))
        for place, (name, members) in enumerate(groups.items()):
            colour = _REAL if name == "real" else _COLOURS[(place - 1) % len(_COLOURS)]
            counts, edges = np.histogram(scored.scores[members], bins=_BINS, range=(0, 1))
            heights = 0.85 * counts / max(1, counts.max())
            axes.stairs(heights - place, edges, baseline=-place, fill=True, color=colour, alpha=0.85)
            axes.axhline(-place, color=_INK, linewidth=0.6, alpha=0.5)
        for border in sorted(set(thresholds)):
            axes.axvline(border, color=_INK, linewidth=1, linestyle="--", alpha=0.8)
        axes.set(xlim=(0, 1), ylim=(0.1 - len(groups), 0.95))
        axes.set_yticks(
            [0.35 - place for place in range(len(groups))],
            [f"{_short(name)}  ({len(members)})" for name, members in groups.items()],
        )
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("score (higher: more likely generated); dashed: thresholds in use")
        return _svg(figure, "histogram of scores of real images and of each generator")


def map_plot(embedded: Embedded, *, seed: int = 0) -> str | None:
    """The embeddings laid out in a plane by t-SNE, a colour and form per generator; None for fewer than eight images.

    Of more than 2,000 images a seeded choice is drawn. Distances between clusters mean nothing, neighbours do.
    """
    if len(embedded.examples) < 8:
        return None
    chosen = np.sort(np.random.default_rng(seed).permutation(len(embedded.examples))[:_MOST_POINTS])
    plane = project(embedded.embeddings[chosen], seed=seed)
    groups = _by_origin([embedded.examples[row] for row in chosen])
    with mpl.rc_context(_RC):
        figure, axes = _figure("map", width=9.4, height=5.6)
        for place, (name, members) in enumerate(groups.items()):
            real = name == "real"
            axes.scatter(
                *plane[members].T,
                s=13,
                marker="o" if real else _MARKERS[place % len(_MARKERS)],
                color=_REAL if real else _COLOURS[(place - 1) % len(_COLOURS)],
                alpha=0.45 if real else 0.8,
                linewidths=0,
                label=f"{_short(name)} ({len(members)})",
            )
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.6)
        return _svg(figure, "t-SNE map of the embeddings, coloured by generator")


def _by_origin(examples: Sequence[Any]) -> Mapping[str, NDArray[np.int64]]:
    """Rows of the reals, then of each generator by falling number; those beyond the twelfth together."""
    names = np.array([group_of(one.label, one.generator) for one in examples], object)
    found = {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}
    fakes = sorted((name for name in found if name != "real"), key=lambda name: (-len(found[name]), name))
    ordered = {name: found[name] for name in (["real"] if "real" in found else []) + fakes[:_MOST_GROUPS]}
    if rest := fakes[_MOST_GROUPS:]:
        ordered[f"{len(rest)} others"] = np.concatenate([found[name] for name in rest])
    return ordered


def _figure(salt: str, *, width: float, height: float) -> tuple[Figure, Any]:
    # Ids within the pictures of one page must differ, and be the same from run to run.
    mpl.rcParams["svg.hashsalt"] = salt
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _line(place: int) -> dict[str, Any]:
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _STYLES[place % len(_STYLES)]}


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _svg(figure: Figure, description: str) -> str:
    """The picture as an element: no prologue, no metadata, nothing that points out of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(_INK, "currentColor")
    # Names of groups are the same in every picture, and nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # Sizes come from the page; the first tag keeps the view box alone.
    text = re.sub(
        r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{description}">', text, count=1
    )
    return text.strip()
