"""The zoo's own text_teacher / text_guided, in two processes, attention written out (see the manifest)."""
import copy, json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
import torch.nn.functional as F
torch.set_num_threads(1)
import vdmini_core.zoo.build as b
from vdmini_core.zoo.teacher import load_set, train_teacher
from vdmini_core.models import TransformerDenoiser
from vdmini_core.models.text import Wan
def written_out(query, key, value, scale=None, **rest):
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(-1, dtype=query.dtype) @ value
F.scaled_dot_product_attention = written_out
dist.init_process_group("gloo")
rank = dist.get_rank()
which, steps, steps_g, scale = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
T = Path(".scratch/wan/target") / b.WAN_TEACHER; S = Path(".scratch/wan/scratch")
base_s = b.SETTINGS["text_teacher"].model_copy(update=dict(max_steps=steps, precision="bf16", checkpoint_every=200, keep_checkpoints=2, ema_decay=.998))
guided_s = b.SETTINGS["text_guided"].model_copy(update=dict(max_steps=steps_g, precision="bf16", checkpoint_every=100, keep_checkpoints=2))
t0 = time.time()
def log(m, step):
    if rank == 0 and step % 50 == 0: print(f"[{time.time()-t0:7.0f}s] {step}", {k.split('/')[-1]: round(v, 4) for k, v in m.items()}, flush=True)
torch.manual_seed(base_s.seed)
d = TransformerDenoiser(b.new_transformer())
data = load_set(S / "t2v.safetensors"); untold = torch.load(".scratch/wan/untold.pt")
dev = torch.device("cpu")
from vdmini_core.artifacts import json_digest
run = lambda n, s: dict(settings=s, device=dev, checkpoints=S / n, fingerprint=json_digest(s), log=log)

from safetensors.torch import load_file, save_file
base = {k.removeprefix("teacher.ema."): v for k, v in load_file(S / "text_teacher/step-00003400/state.safetensors").items() if k.startswith("teacher.ema.")}
own = d.model.state_dict(); d.model.load_state_dict(own | {k: v.to(own[k].dtype) for k, v in base.items()})
refined_s = base_s.model_copy(update=dict(seed=2, max_steps=steps, decay_fraction=.7))
train_teacher(d, Wan.process, data, untold=untold, learning_rate=8e-4, levels=(0.0, 1.0), **run("text_refined", refined_s))
if rank == 0: d.model.half().save_pretrained(".scratch/wan/refined")
dist.destroy_process_group()
