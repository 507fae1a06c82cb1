"""Makes docs/page.png and docs/page.webp from a recorded run, in a real browser.

    make demo    # or: step-sglang watch --save demo.html
    python bench/page_picture.py demo.html docs

Needs Debian's `chromium` and `chromium-driver`, and `pip install selenium`. The picture is of a
moment at which traces run and others were pruned; the animation is the whole run.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, HEIGHT = 1120, 980
FRAMES, FRAME, LAST = 60, 90, 2500  # milliseconds
SEEK = """
const at = document.getElementById('at');
at.value = arguments[0]; at.dispatchEvent(new Event('input'));
const done = arguments[1];
requestAnimationFrame(() => requestAnimationFrame(() => done()));
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a page with a recorded run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moment", type=float, default=0.7, help="of the picture, 0 to 1")
    options = parser.parse_args()
    chrome = webdriver.ChromeOptions()
    chrome.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        chrome.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=chrome, service=service)
    try:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get(options.run.resolve().as_uri())
        browser.find_element("id", "stretch").click()

        def picture(at: float) -> Image.Image:
            browser.execute_async_script(SEEK, at)
            return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")

        picture(options.moment).save(options.folder / "page.png", optimize=True)
        frames = [picture(place / FRAMES) for place in range(1, FRAMES + 1)]
    finally:
        browser.quit()
    target = options.folder / "page.webp"
    frames[0].save(
        target, save_all=True, append_images=frames[1:], loop=0, quality=60, method=4,
        duration=[FRAME] * (FRAMES - 1) + [LAST],
    )  # fmt: skip
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB, {FRAMES} frames")


if __name__ == "__main__":
    main()
