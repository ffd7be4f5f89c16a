"""A decoder and a model with faults, for the drills: with this folder on PYTHONPATH each Python process has them.

An image whose bytes hold ``drill-segfault`` ends its process by SIGSEGV; one with ``drill-endless`` is never decoded,
and holds the interpreter meanwhile, as native code does. A text of one word many times ends the process that embeds it.
"""

import ctypes
import importlib.abc
import importlib.util
import sys
from collections import Counter


def _crash():
    ctypes.string_at(0)


def _faulty_decoder(module):
    decode = module.decode_image

    def decode_image(data, limits):
        if b"drill-segfault" in data:
            _crash()
        if b"drill-endless" in data:
            ctypes.PyDLL(None).sleep(1 << 30)
        return decode(data, limits)

    module.decode_image = decode_image


def _faulty_model(module):
    encode = module.encode

    def encoded(model, collator, sequences, **options):
        for sequence in sequences:
            ids = sequence.prompt.input_ids.tolist()
            if len(ids) > 40 and Counter(ids).most_common(1)[0][1] > 0.4 * len(ids) and not len(sequence.grids):
                _crash()
        return encode(model, collator, sequences, **options)

    module.encode = encoded


_FAULTS = {"crem.data.images": _faulty_decoder, "crem.model.encoding": _faulty_model}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        plant = _FAULTS.pop(name, None)
        if plant is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            plant(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
