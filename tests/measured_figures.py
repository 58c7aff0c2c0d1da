"""What overlaps in a drawn figure, and what is cut; names long and short."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def long(text, i):
    return f"{text}.denseblock{i % 4}.denselayer{i:03d}.convolution.of.a.network.with.long.names"[:60].ljust(60, "m")


def short(text, i):
    return f"{text[0]}{i}"


def corners(text):
    """Corners [4, 2] in pixels of what a text covers, slanted as it is."""
    angle = text.get_rotation()
    if angle % 90:
        assert text.get_rotation_mode() == "anchor"
        text.set_rotation(0)
    box = text.get_window_extent()
    text.set_rotation(angle)
    found = np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])
    if angle % 90:
        anchor = text.get_transform().transform(text.get_position())
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        found = anchor + (found - anchor) @ np.array([[cos, sin], [-sin, cos]])
    return found


def overlap(a, b, spare=0.5):
    """Whether two convex shapes [n, 2] share more than `spare` pixels: no edge of either separates them."""
    for shape in (a, b):
        for edge in np.roll(shape, -1, axis=0) - shape:
            normal = np.array([-edge[1], edge[0]]) / max(np.hypot(*edge), 1e-9)
            if min((a @ normal).max(), (b @ normal).max()) - max((a @ normal).min(), (b @ normal).min()) <= spare:
                return False
    return True


def drawn_texts(figure):
    hidden = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden |= {
                tick.label1 for tick in axis.get_major_ticks() if not low - 1e-9 <= tick.get_loc() <= high + 1e-9
            }
    return [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in hidden
    ]


def problems(figure):
    """What overlaps in a drawn figure, and what leaves it."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.size
    texts = drawn_texts(figure)
    shapes = [corners(text) for text in texts]
    lows, highs = (np.array([edge(shape, axis=0) for shape in shapes]).reshape(-1, 2) for edge in (np.min, np.max))
    found = []
    for i, text in enumerate(texts):
        if (lows[i] < -0.5).any() or (highs[i] > (width + 0.5, height + 0.5)).any():
            found.append(f"cut: {text.get_text()!r}")
        near = ((lows[i + 1 :] < highs[i]) & (highs[i + 1 :] > lows[i])).all(axis=1)
        for j in np.flatnonzero(near) + i + 1:
            if overlap(shapes[i], shapes[j]):
                found.append(f"texts: {text.get_text()!r} and {texts[j].get_text()!r}")
    legends = [(legend, set(legend.findobj(Text)), box(legend)) for legend in figure.legends]
    panels = [(ax, set(ax.findobj(Text)), box(ax)) for ax in figure.axes]
    for owner, own, shape in [*legends, *panels]:
        for i in np.flatnonzero(((lows < shape.max(0)) & (highs > shape.min(0))).all(axis=1)):
            if texts[i] not in own and overlap(shapes[i], shape):
                found.append(f"{type(owner).__name__}: {texts[i].get_text()!r}")
    for _, _, shape in legends:
        found += ["legend on a panel" for *_, panel in panels if overlap(shape, panel)]
        if (shape < -0.5).any() or (shape > (width + 0.5, height + 0.5)).any():
            found.append("legend cut")
    return found


def box(artist):
    extent = artist.get_window_extent()
    return np.array([(extent.x0, extent.y0), (extent.x1, extent.y0), (extent.x1, extent.y1), (extent.x0, extent.y1)])
