"""What names something by all that it is made from: a training, a data set, a part that others stand on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np


def fingerprint(facts: Any, *arrays: np.ndarray) -> str:
    """SHA-256 of `facts` (JSON) and of the types, shapes and numbers of `arrays`: 64 hex digits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(json.dumps([str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
