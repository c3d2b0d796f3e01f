"""Puts measured tables and plots, which lie outside of docs/, beside the pages that show them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "bench/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds bench/results/*.png and *.csv to the site."""
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in (".csv", ".png"):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **unused: object) -> str:
    """Links of pages as they are in the source tree -> as they are in the site."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
