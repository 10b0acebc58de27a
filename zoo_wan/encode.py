import torch, time
torch.set_num_threads(1)
from pathlib import Path
import vdmini_core.zoo.build as b
from vdmini_core.models.text import Wan
t=time.time()
B=b.Builder(Path('.scratch/wan/target'),Path('.scratch/wan/scratch'),torch.device('cpu'),say=print)
p=Wan.load(B.target/b.WAN_TEACHER,('vae','conditioner'),'cpu')
d=B._encoded('t2v',p,b.TEXT_TEACHER_SEED,b.TEXT_FRAMES)
print(d.latents.shape,d.latents.std(),{k:v.shape for k,v in d.condition.items()},time.time()-t)
torch.save(B._untold(p),'.scratch/wan/untold.pt')
