"""The dtypes that native kernels read and write, with the numbers that `kernels.c` has for them. Owns nothing else."""

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
