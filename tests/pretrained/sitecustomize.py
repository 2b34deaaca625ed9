"""Every process that has this folder on PYTHONPATH can import torchvision beside a CPU build of torch.

The ordinary wheel of torchvision is compiled for CUDA. Beside a CPU torch its operators are missing, and the import fails
where it registers shapes for them. Declaring them is enough: timm and the image processors call none.
"""

import contextlib
import importlib.util
import re
from pathlib import Path


def declare_operators():
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    import torch

    source = Path(spec.submodule_search_locations[0], "_meta_registrations.py").read_text(encoding="utf-8")
    names = {"nms", *re.findall(r'register_fake\("torchvision::(\w+)"\)', source)}
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(names):
        with contextlib.suppress(RuntimeError):  # torchvision's own are there
            library.define(f"{name}(Tensor x) -> Tensor")
    return library


KEPT = declare_operators()  # the declarations live as long as this object
