"""One thread: on small arrays, threads that wait for each other made these tests ten times slower on a busy machine."""

import torch

torch.set_num_threads(1)
