"""The code of README and documentation runs, page by page, each page in one namespace."""

import re
from pathlib import Path

import pytest
import torch

from attn_ext import compat

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment that the reader does not see, or a block, with what is said of it before.
CODE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$|"
    r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?```python\n(?P<block>.*?)^```$",
    re.M | re.S,
)


def run_page(text: str, name: str) -> int:
    """Run the code of a page, with line numbers as they are there; how many blocks it had."""
    namespace: dict = {"__name__": "__page__"}
    blocks = 0
    for match in CODE.finditer(text):
        part = "setup" if match["setup"] is not None else "block"
        lines_before = text.count("\n", 0, match.start(part))
        program = compile("\n" * lines_before + match[part], name, "exec")
        blocks += part == "block"
        reason = match["reason"]
        if reason is None or (reason == "needs a GPU" and torch.cuda.is_available()):
            torch.manual_seed(0)
            exec(program, namespace)
        else:
            assert re.fullmatch(r"needs .+|takes \d+ s", reason), f"{name}: {reason}"
    # No block is missed for its form.
    assert blocks == len(re.findall(r"^ *(?:```|~~~) *(?:py|pycon|python)\b", text, re.M)), name
    return blocks


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="an installed package has no pages")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path):
    run_page(page.read_text(), page.name)


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="an installed package has no pages")
def test_the_table_of_replacements_is_what_is_supported(capsys: pytest.CaptureFixture):
    compat.supported()
    assert capsys.readouterr().out in (ROOT / "docs" / "replace.md").read_text()


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="an installed package has no pages")
def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 150
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 10
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]
