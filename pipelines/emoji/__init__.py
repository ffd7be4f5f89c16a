"""The embedded corpus: about 1,600 emoji concepts, each drawn by three to seven vendors, in the raw format.

``build.py`` builds it, ``corpus/LICENSES.md`` names the sources, ``corpus/concepts.csv`` lists the concepts.
"""

from __future__ import annotations

import os
from importlib import resources

from crem.errors import CremError

__all__ = ["corpus_path"]


def corpus_path() -> str:
    """Path of the shipped corpus folder, the input of ``crem prepare``.

    Raises:
        CremError: the installed package lacks its data.
    """
    path = os.fspath(resources.files(__name__) / "corpus")  # type: ignore[call-overload]
    if not os.path.isfile(os.path.join(path, "images.zip")):
        raise CremError(
            f"the embedded corpus is missing from {path}: reinstall the package, or rebuild it with "
            f"`python -m pipelines.emoji.draw_corpus --out {path}`"
        )
    return path
