"""CREM: one multimodal model that finds and answers (arXiv 2602.19091).

import crem
model = crem.load("out/demo/model")
model.embed(["a red apple"]); model.generate(["a red apple"], "What is it?")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Crem", "Item", "__version__", "load"]

if TYPE_CHECKING:
    from crem.data.items import Item
    from crem.inference import Crem, load


def __getattr__(name: str) -> Any:
    # torch and transformers load on first use, so that `crem --help` and the configuration do not wait for them
    if name == "Item":
        from crem.data.items import Item

        return Item
    if name in ("Crem", "load"):
        from crem import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'crem' has no attribute {name!r}")
