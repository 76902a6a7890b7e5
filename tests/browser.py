"""Fixtures that show pages in headless Chromium, and how well text on a ground can be read."""

import shutil

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CONTRAST = """([ink, ground]) => {
    const light = colour => {
        const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const [a, b] = [light(ink), light(ground)];
    return Math.max(a, b) / Math.min(a, b);
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium to show the page in")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser):
    """Opens a page, at an address or in a file, of a width in a colour scheme."""
    opened = []

    def open_page(place, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(context)
        shown = context.new_page()
        shown.problems, shown.requests = [], []
        shown.on("console", lambda message: shown.problems.append(message.text))
        shown.on("pageerror", lambda error: shown.problems.append(str(error)))
        shown.on("request", lambda request: shown.requests.append(request.url))
        shown.goto(place if isinstance(place, str) else place.as_uri())
        return shown

    yield open_page
    for context in opened:
        context.close()
