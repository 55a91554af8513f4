"""Fixtures that several test files share; everything is made here, from seeds, on the CPU."""

import torch

torch.set_num_threads(1)      # the models are tiny: two threads only get in each other's way
