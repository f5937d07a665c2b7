"""Opens a running server's page in headless Chromium, asks a question by keyboard and checks both streamed answers.

    metier serve runs/icd10cm --port 8000 &
    python scripts/check_page.py http://127.0.0.1:8000 --screenshot page.png

Needs playwright and a Chromium (`--browser`). It fails when the page talks to any other host, when an answer's text
does not grow while it is written, or when either side stays empty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def check(page: Page, url: str, question: str) -> list[str]:
    """What was seen, one line each; raises AssertionError for what should not be."""
    page.set_default_timeout(120_000)
    hosts: set[str] = set()
    errors: list[str] = []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if request.url.startswith("http") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#left option", state="attached")
    assert page.evaluate("document.activeElement.id") == "prompt", "the question has the focus at the start"
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    lengths: list[list[int]] = []
    page.wait_for_selector("article .answer", state="attached")
    while page.is_disabled("#send"):
        lengths.append(page.eval_on_selector_all("article .answer", "nodes => nodes.map(n => n.textContent.length)"))
        page.wait_for_timeout(40)
    answers = page.locator("article .answer").all_text_contents()
    stats = page.locator("article .stats").all_text_contents()
    assert len(answers) == 2 and all(answers), answers
    steps = [len({row[side] for row in lengths if len(row) == 2}) for side in (0, 1)]
    assert max(steps) > 2, f"no answer grew while it was written: {steps}"
    assert hosts == {url.split("/")[2]}, hosts
    assert not errors, errors
    names = page.locator("article h2").all_text_contents()
    return [
        f"{name}: {len(a)} characters in {n} steps; {s}"
        for name, a, n, s in zip(names, answers, steps, stats, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--screenshot", type=Path, required=True)
    parser.add_argument("--language", default="en-US", choices=["en-US", "zh-CN"])
    parser.add_argument("--question", default="What is acute bronchitis? Answer in three sentences.")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 760}, locale=args.language)
        try:
            for line in check(page, args.url, args.question):
                print(line)
            page.keyboard.press("Tab")
        finally:
            page.screenshot(path=str(args.screenshot))
            browser.close()
    print(f"screenshot: {args.screenshot}", file=sys.stderr)


if __name__ == "__main__":
    main()
