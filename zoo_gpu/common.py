"""Threads, TF32 and printing of the GPU trainings."""
import os, sys, time
import torch
torch.set_num_threads(int(os.environ.get("NT", "2")))
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True
DEV = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T0 = time.time()
def say(*a):
    print(f"[{time.time()-T0:6.1f}s]", *a, flush=True)
