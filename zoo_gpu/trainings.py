"""trainings.py probe|main: the zoo's text-to-video trainings, a CUDA graph a step, both families side by side in one process."""
from common import *
import copy, json, math, threading, traceback
from dataclasses import replace
from pathlib import Path
import shutil
import torch.nn as nn
from torch.nn import functional as F
import vdmini_core.zoo.build as build
from vdmini_core.zoo import vae as vaes
from vdmini_core.zoo.clips import render_set, to_model_range
from vdmini_core.zoo.teacher import encode_set, guided_answer, LEVELS, UNTOLD_SHARE
from vdmini_core.zoo.consistency import GUIDANCE, guided_step
from vdmini_core.distillation.losses import pseudo_huber_loss
from vdmini_core.diffusion.process import like
from vdmini_core.models import UNetDenoiser, TransformerDenoiser, Wan, TextToVideoUNet
from vdmini_core.settings import EncodeSettings
from vdmini_core.evaluation.evaluator import load_evaluator
from vdmini_core.evaluation.quality import noise_for
from vdmini_core.data.synthetic import ALL_LABELS
from safetensors.torch import save_file

MODE = sys.argv[1]
CUDA = DEV.type == "cuda"
OUT = Path(os.environ.get("OUT", ".scratch/zoo_out")); OUT.mkdir(parents=True, exist_ok=True)
Z = Path(".scratch/zoo_fast"); shutil.rmtree(Z, ignore_errors=True); shutil.copytree("zoo_gpu/parts", Z)
SMALL = MODE == "cpu"
N_VAE, N_TEXT = (216, 216) if SMALL else (int(os.environ.get("NV", 4320)), int(os.environ.get("NT2", 6480)))
B = json.loads(os.environ.get("B", "{}"))
bs = lambda name, default: 2 if SMALL else B.get(name, default)
torch.backends.cudnn.benchmark = True
torch.backends.cuda.matmul.allow_tf32 = True
HIST = {}
# A graph's launch takes as long as the graph and keeps the interpreter to itself, so that another thread's small calls
# wait that long each: whoever does anything but launch graphs holds TURN meanwhile.
TURN = threading.Lock()
conv3d = nn.Conv3d.forward
def over_time(self, x):
    """A convolution over time alone as one over a plane, which the GPU's library does better; the same numbers."""
    if self.kernel_size != (3, 1, 1) or self.padding != (1, 0, 0): return conv3d(self, x)
    b, c, t, h, w = x.shape
    return F.conv2d(x.reshape(b, c, t, h * w), self.weight[..., 0], self.bias, padding=(1, 0)).view(b, -1, t, h, w)
nn.Conv3d.forward = over_time

class Job:
    """One training: `loss(gen)` draws its own batch; AdamW, clipping, EMA; a step is one graph."""
    def __init__(s, name, module, loss, lr, ema=.998, seed=0, warmup=50, decay=.5, betas=(.9, .99)):
        s.name, s.module, s.loss, s.lr, s.decay_fraction, s.warmup, s.ema_decay = name, module, loss, lr, decay, warmup, ema
        s.weights = [p for p in module.parameters() if p.requires_grad]
        for p in s.weights: p.grad = torch.zeros_like(p)
        s.average = [p.detach().clone() for p in s.weights]
        s.lr_t = torch.tensor(float(lr), device=DEV)
        kw = dict(capturable=True) if CUDA else {}
        s.opt = torch.optim.AdamW(s.weights, lr=s.lr_t, betas=betas, weight_decay=WD, fused=True, **kw)
        s.gen = torch.Generator(DEV).manual_seed(1000 + seed)
        s.stream = torch.cuda.Stream() if CUDA else None
        s.last = torch.zeros((), device=DEV); s.n = 0; s.graph = None
        s.after = lambda: None
    def body(s):
        torch._foreach_zero_([p.grad for p in s.weights])
        total = s.loss(s.gen); total.backward()
        grads = [p.grad for p in s.weights]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (1.0 / norm.clamp_min(1.0)))
        s.opt.step()
        torch._foreach_lerp_(s.average, [p.detach() for p in s.weights], 1 - s.ema_decay)
        s.last.copy_(total.detach())
    def capture(s):
        if not CUDA: return
        t = time.time()
        kept = [p.detach().clone() for p in s.weights]
        s.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(s.stream):
            s.lr_t.zero_()
            for _ in range(3): s.body()
        torch.cuda.synchronize()
        s.graph = torch.cuda.CUDAGraph()
        s.graph.register_generator_state(s.gen)
        with torch.cuda.graph(s.graph, stream=s.stream):
            s.body()
        torch.cuda.synchronize()
        with torch.no_grad():
            for p, k in zip(s.weights, kept): p.copy_(k)
            for a, k in zip(s.average, kept): a.copy_(k)
            for st in s.opt.state.values():
                for v in st.values():
                    if torch.is_tensor(v): v.zero_()
        torch.cuda.synchronize()
        say(s.name, f"captured in {time.time()-t:.1f}s")
    def start_from(s, state=None):
        """EMA from the present weights."""
        with torch.no_grad():
            for a, p in zip(s.average, s.weights): a.copy_(p)
    def run(s, until=None, steps=None):
        """To a time (learning rate by the share of it gone) or for some steps."""
        t0 = time.time(); events = []; said = t0
        ctx = torch.cuda.stream(s.stream) if CUDA else torch.enable_grad()
        if CUDA: s.stream.wait_stream(torch.cuda.default_stream())
        with ctx:
            while True:
                now = time.time()
                share = s.n / steps if steps else (now - t0) / max(until - t0, 1e-3)
                if share >= 1: break
                into = (share - (1 - s.decay_fraction)) / s.decay_fraction
                factor = min(1, (s.n + 1) / s.warmup) * (0.5 * (1 + math.cos(math.pi * into)) if into > 0 else 1)
                if s.graph is not None:
                    with TURN:
                        s.lr_t.fill_(s.lr * factor)
                        s.graph.replay()
                    e = torch.cuda.Event(blocking=True); e.record(); events.append(e)
                    if len(events) > 3: events.pop(0).synchronize()
                else:
                    s.lr_t.fill_(s.lr * factor); s.body()
                s.n += 1
                if now - said > 15 or s.n == 1:
                    said = now; v = s.last.item(); HIST.setdefault(s.name, []).append((s.n, round(v, 5)))
                    say(s.name, s.n, f"loss {v:.4f} lr {factor:.2f} {(now-t0)/s.n*1000:.1f} ms")
                    if not math.isfinite(v): raise RuntimeError(f"{s.name}: loss {v}")
            if CUDA: s.stream.synchronize()
        say(s.name, "done", s.n, f"loss {s.last.item():.4f}, {(time.time()-t0)/max(s.n,1)*1000:.2f} ms each")
        HIST.setdefault(s.name, []).append((s.n, round(s.last.item(), 5)))
    def finish(s):
        with torch.no_grad():
            for p, a in zip(s.weights, s.average): p.copy_(a)
        if CUDA: torch.cuda.synchronize()
WD = float(os.environ.get("WD", "0.0"))

# ---------- VAEs
def whole_pass(v, images):
    """What encode and decode do for Wan without compression in time, all frames at once."""
    return vaes.DiagonalGaussianDistribution(v.quant_conv(v.encoder(images)))
def vae_job(name, v, clips, batch, lr, seed, decay=.6):
    window = vaes.WINDOW[type(v).__name__]; wan = type(v).__name__ == "AutoencoderKLWan"
    v.to(DEV).train().requires_grad_(True)
    frames = clips.shape[1]
    def loss(gen):
        ids = torch.randint(len(clips), (batch,), generator=gen, device=DEV)
        first = torch.randint(frames - window + 1, (batch, 1), generator=gen, device=DEV)
        pixels = clips[ids[:, None], first + torch.arange(window, device=DEV)]
        x = pixels.movedim(-1, 1).float() / 127.5 - 1
        if wan: images = x; moments = v.quant_conv(v.encoder(images))
        else: images = x.transpose(1, 2).flatten(0, 1); moments = v.quant_conv(v.encoder(images))
        mean, logvar = moments.chunk(2, 1); logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=gen, device=DEV)
        out = v.decoder(v.post_quant_conv(z))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        l1, l2 = (out - images).abs().mean(), (out - images).square().mean()
        return l1 + 2 * l2 + vaes.KL_WEIGHT * kl
    return Job(name, v, loss, lr, ema=.998, seed=seed, decay=decay)
@torch.no_grad()
def vae_statistics(v, clips):
    v.eval(); x = to_model_range(clips[:64]).to(DEV)
    if type(v).__name__ == "AutoencoderKLWan":
        l = torch.cat([v.encode(p).latent_dist.mode() for p in x.split(16)])
        spread = {"latents_mean": l.mean((0, 2, 3, 4)), "latents_std": l.std((0, 2, 3, 4))}
        v.register_to_config(**{k: [round(a, 5) for a in t.tolist()] for k, t in spread.items()})
    else:
        l = v.encode(x.transpose(1, 2).flatten(0, 1)).latent_dist.mode()
        v.register_to_config(scaling_factor=round(1 / l.std().item(), 5))

# ---------- denoisers
class Data:
    """Static GPU buffers that graphs are captured over, filled when the clips are encoded."""
    def __init__(s, latent_shape, text_shape, n):
        s.latents = torch.randn(n, *latent_shape, device=DEV); s.text = torch.randn(n, *text_shape, device=DEV)
        s.weights = torch.ones(n, 1, *latent_shape[1:], device=DEV); s.untold = torch.randn(1, *text_shape, device=DEV)
    def fill(s, data, untold):
        s.latents.copy_(data.latents); s.text.copy_(data.condition["text"]); s.weights.copy_(data.weights); s.untold.copy_(untold)
        if CUDA: torch.cuda.synchronize()
def draw_sigma(process, batch, levels, gen):
    sigma = (levels[0] + levels[1] * torch.randn(batch, generator=gen, device=DEV)).exp()
    return process.sigmas[process.time(sigma)] if hasattr(process, "sigmas") else sigma
def teacher_job(name, denoiser, process, d, batch, lr, levels, seed, ema=.998, decay=.5, guide=None, half=False):
    denoiser.model.to(DEV).eval().requires_grad_(True)
    def loss(gen):
        ids = torch.randint(len(d.latents), (batch,), generator=gen, device=DEV)
        x0, text = d.latents[ids], d.text[ids]
        sigma = draw_sigma(process, batch, levels, gen)
        noise = torch.randn(x0.shape, generator=gen, device=DEV)
        noisy, t = process.noised(x0, noise, sigma), process.time(sigma)
        if guide is None:
            kept = torch.rand(batch, generator=gen, device=DEV) >= UNTOLD_SHARE
            text = torch.where(like(kept, text), text, d.untold)
            target = process.target(x0, noise, sigma)
        else:
            scale = torch.full_like(sigma, guide[1])
            with torch.autocast(DEV.type, torch.bfloat16, enabled=half): target = guided_answer(guide[0], noisy, t, {"text": text}, {"text": d.untold}, scale)
        w = d.weights[ids] * like(process.velocity_weight(sigma), x0)
        with torch.autocast(DEV.type, torch.bfloat16, enabled=half): answer = denoiser(noisy, t, {"text": text}).float()
        return ((answer - target).square() * w).mean()
    return Job(name, denoiser.model, loss, lr, ema=ema, seed=seed, decay=decay, warmup=100)
FREQ = torch.exp(torch.arange(128, device=DEV) * -(math.log(10000.0) / 127))
def embed(scale):
    a = 1000.0 * scale[:, None] * FREQ
    return torch.cat([a.sin(), a.cos()], 1)
def lcm_job(name, base, student, target, process, levels, d, batch, lr, seed, ema=.95, decay=.5):
    for m in (base.model, target.model): m.to(DEV).eval().requires_grad_(False)
    student.model.to(DEV).eval().requires_grad_(True)
    lower = torch.cat([torch.zeros(1, device=DEV), levels[:-1]])
    def loss(gen):
        ids = torch.randint(len(d.latents), (batch,), generator=gen, device=DEV)
        level = torch.randint(len(levels), (batch,), generator=gen, device=DEV)
        scale = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(batch, generator=gen, device=DEV)
        x0 = d.latents[ids]; noise = torch.randn(x0.shape, generator=gen, device=DEV)
        with torch.no_grad():
            sigma, following = levels[level], lower[level]
            noisy = process.noised(x0, noise, sigma); told = {"text": d.text[ids]}
            reached = guided_step(base, process, noisy, sigma, following, told, {"text": d.untold}, scale)
            told = told | {"guidance": embed(scale)}
            # time(0) is the lowest step; its answer counts for nothing at the clean end
            goal = process.clean(target(reached, process.time(following), told).float(), reached, following)
        x = process.clean(student(noisy, process.time(sigma), told).float(), noisy, sigma)
        return pseudo_huber_loss(x, goal, d.weights[ids])
    j = Job(name, student.model, loss, lr, ema=ema, seed=seed, decay=decay)
    j.average = [dict(target.model.named_parameters())[n] for n, p in student.model.named_parameters() if p.requires_grad]
    return j

# ---------- judging
EV = load_evaluator(Path("vdmini_core/zoo/weights/evaluator"), DEV)
def right(v, labels):
    j = EV(v.to(DEV)); l = labels.to(DEV)
    return torch.stack([j.shape_logits.argmax(1) == l[:, 0], j.colour_logits.argmax(1) == l[:, 1], j.beacon_logits.argmax(1) == l[:, 2], j.motion_logits.argmax(1) == l[:, 2]], 1).cpu()
def report(name, rows):
    r = torch.cat(rows); text = "shape %.3f colour %.3f beacon %.3f motion %.3f" % tuple(r.float().mean(0).tolist())
    content = r[:, :3].all(1).float().mean().item(); HIST.setdefault("judged", []).append((name, text, round(content, 4)))
    say("JUDGED", name, f"N {len(r)}:", text, f"content {content:.3f}")
@torch.no_grad()
def judge_vae(pipe, clips, name, n=108):
    rows, errors = [], []; n = 36 if SMALL else n
    for a in range(0, n, 36):
        x = to_model_range(clips.pixels[a:a + 36]).to(DEV); rec = pipe.decode(pipe.encode(x)); errors.append((rec.to(DEV) - x).square().mean())
        rows.append(right(rec, clips.labels[a:a + 36]))
    say(name, "psnr", round(10 * torch.log10(4 / torch.stack(errors).mean()).item(), 2)); report(name, rows)
@torch.no_grad()
def judge(pipe, denoiser, name, lcm, steps, n, scale=None, guided=None):
    """`guided`: classifier-free guidance outside of the network (base models)."""
    n = 4 if SMALL else n; frames, h, w = pipe.default_shape(); shape = pipe.latent_shape(frames, h, w); rows = []
    for a in range(0, n, 54):
        ids = [(i * 37) % 216 if n < 216 else i % 216 for i in range(a, min(a + 54, n))]
        labels = torch.tensor([(ALL_LABELS[i].shape, ALL_LABELS[i].colour, ALL_LABELS[i].motion) for i in ids])
        cond = pipe.condition(torch.zeros(len(ids), 3, h, w), [build.CAPTIONS[i] for i in ids], EncodeSettings(guidance=scale or 7.5), torch.Generator())
        noise = lambda k: noise_for(5, range(a, a + len(ids)), shape, DEV, k)
        if guided is not None:
            untold = pipe.condition(torch.zeros(1, 3, h, w), [""], EncodeSettings(), torch.Generator())
            g = lambda x, t, c: guided_answer(denoiser, x, t, {"text": c["text"]}, {"text": untold["text"]}, torch.full((len(x),), guided, device=DEV))
            if lcm:
                sig = torch.cat([pipe.process.solver_levels(steps).flip(0), torch.zeros(1)])
                x = pipe.process.sample(lambda x, t: g(x, t, cond), noise(0), sig)
            else: x = pipe.sample(g, noise, cond, steps)
        else: x = pipe.sample(denoiser, noise, cond, steps)
        rows.append(right(pipe.decode(x), labels))
    report(name, rows)

# ---------- everything
torch.manual_seed(0)
T = json.loads(os.environ.get("T", "{}"))
say("rendering")
wan_clips9 = render_set(N_VAE, build.TEXT_VAE_SEED, frames=9, size=64)
lcm_clips8 = render_set(N_VAE, build.VAE_SEED, frames=8, size=64)
wan_set = render_set(N_TEXT, build.TEXT_TEACHER_SEED, frames=9, size=64)
lcm_set = render_set(N_TEXT, build.TEXT_TEACHER_SEED, frames=8, size=64)
held9, held8 = render_set(108, 999, frames=9, size=64), render_set(108, 999, frames=8, size=64)
captions = [build.CAPTIONS[i % len(build.CAPTIONS)] for i in range(N_TEXT)]
say("rendered")
from diffusers import AutoencoderKL
from vdmini_core.models.loading import load_component
LCM, WAN = Z / build.LCM_TEACHER, Z / build.WAN_TEACHER
torch.manual_seed(0); wan_vae = build.new_causal_vae()
frame_vae = load_component(AutoencoderKL, LCM / "vae").float()
pixels = {n: c.pixels.to(DEV) for n, c in (("wan", wan_clips9), ("lcm", lcm_clips8))}
jobs = {}
def add(job): jobs[job.name] = job; job.capture() if CUDA else None; return job
add(vae_job("frame_vae", frame_vae, pixels["lcm"], bs("fv", 16), 1e-3, 1))
add(vae_job("wan_vae", wan_vae, pixels["wan"], bs("wv", 8), 2e-3, 2))
wd, ld = Data((4, 9, 16, 16), (512 if False else 512, 64), 1) if False else (None, None)
pipe_l = TextToVideoUNet.load(LCM, ("vae", "conditioner"), DEV)
pipe_w = Wan.load(WAN, ("vae", "conditioner"), DEV)
tell = lambda pipe, texts: pipe.condition(torch.zeros(len(texts), 3, 64, 64), texts, EncodeSettings(), torch.Generator())["text"]
ld = Data(pipe_l.latent_shape(8, 64, 64), tuple(tell(pipe_l, [""]).shape[1:]), N_TEXT)
wd = Data(pipe_w.latent_shape(9, 64, 64), tuple(tell(pipe_w, [""]).shape[1:]), N_TEXT)
say("shapes", tuple(ld.latents.shape), tuple(ld.text.shape), tuple(wd.latents.shape), tuple(wd.text.shape))
proc_l = copy.deepcopy(pipe_l.process); proc_l.sigmas = proc_l.sigmas.to(DEV); proc_w = pipe_w.process
levels = pipe_l.process.solver_levels(build.SOLVER_STEPS).to(DEV)
torch.manual_seed(0); base = UNetDenoiser(build.new_text_unet())
add(teacher_job("lcm_base", base, proc_l, ld, bs("lb", 32), float(os.environ.get("LBLR", 1e-3)), build.LCM_LEVELS, 3))
torch.manual_seed(0); wan = TransformerDenoiser(build.new_transformer())
add(teacher_job("text_teacher", wan, proc_w, wd, bs("wb", 64), 1e-3, LEVELS, 4, half=True))
frozen_l, student, target = (UNetDenoiser(copy.deepcopy(base.model)) for _ in range(3))
add(lcm_job("lcm_distilled", frozen_l, student, target, proc_l, levels, ld, bs("ld", 32), 3e-4, 5))
frozen_w, wan_g = (TransformerDenoiser(copy.deepcopy(wan.model)) for _ in range(2))
frozen_w.model.requires_grad_(False).eval()
add(teacher_job("text_guided", wan_g, proc_w, wd, bs("wg", 64), 3e-4, LEVELS, 6, ema=.99, decay=.8, guide=(frozen_w, build.TEXT_GUIDANCE), half=True))
if CUDA: say("memory", torch.cuda.memory_allocated() // 2**20, "MiB")
for n in ("frame_vae", "wan_vae"): jobs[n].module.to(DEV)

def copy_into(a, b):
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters()): p.copy_(q)
    if CUDA: torch.cuda.synchronize()

if MODE == "probe":
    for j in jobs.values(): j.run(steps=40)
    th = [threading.Thread(target=jobs[n].run, kwargs={"until": time.time() + 6}) for n in ("lcm_base", "text_teacher")]
    for j in jobs.values(): j.n = 0
    for t in th: t.start()
    for t in th: t.join()
    th = [threading.Thread(target=jobs[n].run, kwargs={"until": time.time() + 4}) for n in ("frame_vae", "wan_vae")]
    for j in jobs.values(): j.n = 0
    for t in th: t.start()
    for t in th: t.join()
    sys.exit()

END = T0 + T.get("end", 520)
t_vae_l, t_vae_w, t_lb, t_wb, t_ld, t_wg = (T0 + T[k] for k in ("fv", "wv", "lb", "wb", "ld", "wg"))
ENC = threading.Lock()
def lcm_line():
    jobs["frame_vae"].run(until=t_vae_l)
    with TURN: jobs["frame_vae"].finish()
    with TURN: vae_statistics(frame_vae, lcm_clips8.pixels); frame_vae.half().save_pretrained(LCM / "vae")
    with TURN: pipe = TextToVideoUNet.load(LCM, ("vae", "conditioner"), DEV)
    with TURN: judge_vae(pipe, held8, "frame VAE")
    with TURN: data = encode_set(lcm_set, captions, pipe, build.TEXT_TEACHER_SEED, build.FOREGROUND_WEIGHT)
    with TURN: ld.fill(data, tell(pipe, [""])); say("lcm encoded", data.latents.std())
    jobs["lcm_base"].run(until=t_lb)
    with TURN: jobs["lcm_base"].finish()
    with TURN: save_file({k: v.half().contiguous().cpu() for k, v in base.model.state_dict().items()}, OUT / "lcm_base.safetensors")
    with TURN:
        for m in (frozen_l, student, target): copy_into(m.model, base.model)
    with TURN: judge(pipe, base, "LCM base, DDIM 10, w 5", True, 10, 54, guided=5.0)
    jobs["lcm_distilled"].run(until=t_ld)
    with TURN: jobs["lcm_distilled"].finish()
    with TURN: save_file({k: v.contiguous().cpu() for k, v in student.model.state_dict().items()}, OUT / "lcm_f32.safetensors")
    with TURN: student.model.half().save_pretrained(LCM / "unet"); student.model.float()
    with TURN: judge(pipe, student, "LCM 4 steps", True, 4, 216)
    with TURN: judge(pipe, student, "LCM 8 steps", True, 8, 216)
    with TURN: judge(pipe, student, "LCM 4 steps w 4", True, 4, 216, scale=4.0)
    with TURN: judge(pipe, base, "LCM base, DDIM 10, w 3", True, 10, 54, guided=3.0)
def wan_line():
    jobs["wan_vae"].run(until=t_vae_w)
    with TURN: jobs["wan_vae"].finish()
    with TURN: vae_statistics(wan_vae, wan_clips9.pixels); wan_vae.half().save_pretrained(WAN / "vae")
    with TURN: pipe = Wan.load(WAN, ("vae", "conditioner"), DEV)
    with TURN: judge_vae(pipe, held9, "Wan VAE")
    with TURN: data = encode_set(wan_set, captions, pipe, build.TEXT_TEACHER_SEED, build.FOREGROUND_WEIGHT)
    with TURN: wd.fill(data, tell(pipe, [""])); say("wan encoded", data.latents.std())
    jobs["text_teacher"].run(until=t_wb)
    with TURN: jobs["text_teacher"].finish()
    with TURN: save_file({k: v.half().contiguous().cpu() for k, v in wan.model.state_dict().items()}, OUT / "wan_base.safetensors")
    with TURN:
        for m in (frozen_w, wan_g): copy_into(m.model, wan.model)
    with TURN: judge(pipe, wan, "Wan base 8 steps, no guidance", False, 8, 54)
    with TURN: judge(pipe, wan, "Wan base 8 steps, w 3", False, 8, 54, guided=3.0)
    with TURN: judge(pipe, wan, "Wan base 8 steps, w 5", False, 8, 54, guided=5.0)
    with TURN: jobs["text_guided"].start_from()
    jobs["text_guided"].run(until=t_wg)
    with TURN: jobs["text_guided"].finish()
    with TURN: save_file({k: v.contiguous().cpu() for k, v in wan_g.model.state_dict().items()}, OUT / "wan_f32.safetensors")
    with TURN: wan_g.model.half().save_pretrained(WAN / "transformer"); wan_g.model.float()
    with TURN: judge(pipe, wan_g, "Wan 8 steps", False, 8, 216)
    with TURN: judge(pipe, wan_g, "Wan 16 steps", False, 16, 216)
def guarded(f):
    def g():
        try: f()
        except Exception: traceback.print_exc(); say("FAILED", f.__name__)
    return g
lines = [threading.Thread(target=guarded(f), daemon=True) for f in (lcm_line, wan_line)]
for t in lines: t.start()
for t in lines: t.join(max(END - time.time(), 1))
json.dump({**HIST, "steps": {n: j.n for n, j in jobs.items()}}, open(OUT / "history.json", "w"))
import subprocess
for n in (build.LCM_TEACHER, build.WAN_TEACHER): subprocess.run(["tar", "czf", str(OUT / f"{n}.tgz"), "-C", str(Z), n])
say("written", [(p.name, p.stat().st_size) for p in OUT.iterdir()])
os._exit(0)
