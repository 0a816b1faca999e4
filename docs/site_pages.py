"""MkDocs hook: add API pages and pages of the top folder; refuse what a page loads from elsewhere."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipelines", "preprocess", "cosmoflow_dali")
# Pages of the top folder, whose links start there.
TOP_PAGES = {"Contributing": "CONTRIBUTING.md", "Changelog": "CHANGELOG.md"}
# What a browser fetches by itself when it shows a page.
EXTERNAL_LOAD = re.compile(r"""(?:\bsrc=|<link\b[^>]*\bhref=)["']?(?:https?:)?//[^"'\s>]+""")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the generated pages to the navigation."""
    assert config.nav is not None
    config.nav += [{title: name.lower()} for title, name in TOP_PAGES.items()]
    config.nav.append({"API": [{package: f"api/{package}.md"} for package in _packages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name in TOP_PAGES.values():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    for package, modules in _packages().items():
        text = "\n".join([f"# {package}", "", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{package}.md", content=text))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads scripts, styles, fonts or images from another site."""
    if found := EXTERNAL_LOAD.search(output):
        raise PluginError(f"{page.file.src_uri}: loads {found[0]}; the site must work without a network")
    return output


def _packages() -> dict[str, list[str]]:
    """Return each package, and itself and its modules in the order of their names."""
    packages: dict[str, list[str]] = {}
    for name in PACKAGES:
        for init in sorted((ROOT / name).rglob("__init__.py")):
            package = ".".join(init.parent.relative_to(ROOT).parts)
            modules = sorted(path.stem for path in init.parent.glob("*.py") if path != init)
            packages[package] = [package, *(f"{package}.{module}" for module in modules)]
    return packages
