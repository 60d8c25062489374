"""Where there is no GPU, its kernels are interpreted: Triton settles that when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
