"""The browser that opens pages in tests: Debian's Chromium, without a window."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright


CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
# Much more than a page needs: the machine may be busy.
TIMEOUT = 60_000


@contextmanager
def open_browser() -> Iterator[Browser]:
    assert Path(CHROMIUM).exists(), f"{CHROMIUM} is missing: .ci/install_browser.sh installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def watched_page(browser: Browser, width: int, height: int) -> tuple[Page, set[str], list[str]]:
    """A new page, and what will be in it: the addresses that it asks for, and the errors that it logs."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(TIMEOUT)
    expect.set_options(timeout=TIMEOUT)
    asked, errors = set(), []
    page.on("request", lambda request: asked.add(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return page, asked, errors
