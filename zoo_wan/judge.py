import sys, torch, time
torch.set_num_threads(1)
from pathlib import Path
import vdmini_core.zoo.build as b
from vdmini_core.zoo.teacher import guided_answer
from vdmini_core.models import TransformerDenoiser
from vdmini_core.models.text import Wan
from vdmini_core.settings import EncodeSettings
from vdmini_core.evaluation.evaluator import load_evaluator
from vdmini_core.evaluation.quality import noise_for
from vdmini_core.data.synthetic import ALL_LABELS
from safetensors.torch import load_file
src, steps, n, scales = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [float(s) for s in sys.argv[4:]]
T = Path(".scratch/wan/target") / b.WAN_TEACHER
d = TransformerDenoiser(b.new_transformer()); d.model.eval().requires_grad_(False)
p = Path(src)
if p.is_dir() and not (p/'config.json').exists():
    f = sorted(p.glob('step-*'))[-1]; print(f)
    t = {}
    for x in f.glob('*.safetensors'): t |= load_file(x)
    own = d.model.state_dict()
    d.model.load_state_dict({k: t.get(f"teacher.ema.{k}", t.get(f"teacher.weights.{k}")).to(v.dtype) for k, v in own.items()})
else: d.model.load_state_dict({k: v.float() for k, v in load_file(p/'diffusion_pytorch_model.safetensors').items()})
pipe = Wan.load(T, ("vae", "conditioner"), "cpu")
E = load_evaluator(Path("vdmini_core/zoo/weights/evaluator"), "cpu")
@torch.no_grad()
def judge(scale):
    t0=time.time(); rows=[]; frames,h,w = 9,64,64; shape=pipe.latent_shape(frames,h,w)
    for a in range(0,n,27):
        ids=[(i*37)%216 for i in range(a,min(a+27,n))]
        labels=torch.tensor([(ALL_LABELS[i].shape,ALL_LABELS[i].colour,ALL_LABELS[i].motion) for i in ids])
        cond=pipe.condition(torch.zeros(len(ids),3,h,w),[b.CAPTIONS[i] for i in ids],EncodeSettings(),torch.Generator())
        noise=lambda k: noise_for(5,range(a,a+len(ids)),shape,torch.device('cpu'),k)
        un=torch.load('.scratch/wan/untold.pt')
        g=(lambda x,t,c: guided_answer(d,x,t,{"text":c["text"]},{"text":un["text"]},torch.full((len(x),),scale))) if scale else d
        x=pipe.sample(g,noise,cond,steps); j=E(pipe.decode(x))
        rows.append(torch.stack([j.shape_logits.argmax(1)==labels[:,0],j.colour_logits.argmax(1)==labels[:,1],j.beacon_logits.argmax(1)==labels[:,2],j.motion_logits.argmax(1)==labels[:,2]],1))
    r=torch.cat(rows).float(); print(f"scale {scale} steps {steps} N {n} shape/colour/beacon/motion",[round(v,3) for v in r.mean(0).tolist()],'content',round(r[:,:3].all(1).float().mean().item(),3),f"{time.time()-t0:.0f}s",flush=True)
for s in scales: judge(s)
