"""Pictures that stand elsewhere, beside the figures or programs they are drawn by.

Pages name them by their places in the repository, so that they show where no site was built.
"""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {"results": ROOT / "benchmarks" / "results", "examples": ROOT / "examples" / "pictures"}


def on_files(files, config):
    for folder, place in PICTURES.items():
        for path in sorted(place.glob("*.png")):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    for folder, place in PICTURES.items():
        markdown = markdown.replace(f"](../{place.relative_to(ROOT).as_posix()}/", f"]({folder}/")
    return markdown
