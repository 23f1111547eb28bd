"""What the tests of all figures ask of a page."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Page
from matplotlib.text import Text


def y_tick_labels(page: Page) -> list[Text]:
    return [label for axes in page.axes for label in axes.get_yticklabels()]


def assert_all_is_on_the_paper(page: Page, *others: Text) -> None:
    """Every text of the page and its legends, the titles and labels of its axes, and others."""
    canvas = FigureCanvasAgg(page)
    canvas.draw()
    shown = [*page.texts, *page.legends, *(text for legend in page.legends for text in legend.get_texts()), *others]
    for axes in page.axes:
        shown += [axes.title, axes.xaxis.label, axes.yaxis.label]
    for item in shown:
        box = item.get_window_extent(canvas.get_renderer())
        assert page.bbox.x0 <= box.x0 <= box.x1 <= page.bbox.x1, item
        assert page.bbox.y0 <= box.y0 <= box.y1 <= page.bbox.y1, item
