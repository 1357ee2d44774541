"""Before any test imports Triton: without a GPU its kernels run in Triton's interpreter.

Triton decides that when it is imported, and bitsandbytes imports it, so no folder of tests could decide it for itself.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
