"""Compresses StyleGAN2 with DGL-GAN: the teacher's discriminator guides a narrow student (arXiv 2112.06502).

The student generator G_S has two judges: its own discriminator D_S, trained with it, and the discriminator D_T of a
trained teacher, frozen. Neither the teacher's generator nor its features are needed. Stage 0 trains the teacher if none
is given; stage 1 trains the student pair from scratch as a plain StyleGAN2; stage 2 goes on from there with D_T's term,
which is unstable from random weights. With --student-width 1 the method improves an uncompressed StyleGAN2.

    python train_stylegan2_dgl.py --toy                                                # no data needed, minutes
    python train_stylegan2_dgl.py --data images/ --size 256 --mirror --teacher ffhq.pt # stages 1 and 2
    python train_stylegan2_dgl.py --data images.zip --size 256 --mirror                # stages 0, 1 and 2
    python train_stylegan2_dgl.py --data images/ --teacher ffhq.pt --student stage1.pt # stage 2
    torchrun --nproc_per_node 8 train_stylegan2_dgl.py --data images/ --teacher ffhq.pt --batch-size 4
    python train_stylegan2_dgl.py --out runs/stylegan2_dgl_images --resume
"""

import argparse
import atexit
import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid, save_image

import fid
from fid import FeatureStats, ImageFiles, at_least, frechet_distance, gather, load_inception, pick_device, processes
from losses import (
    PathLengthPenalty,
    dgl_generator_loss,
    discriminator_logistic_loss,
    generator_logistic_loss,
    r1_penalty,
)
from models import (
    InputError,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    comparison,
    cost,
    load_file,
    load_weights,
    save_checkpoint,
    save_generator,
    write_atomically,
    write_json,
)

NAME = "stylegan2_dgl"
STAGES = ("teacher", "student alone", "student with the teacher's discriminator")
# What --toy changes; any flag on the command line wins over it.
TOY = dict(size=32, teacher_width=1 / 32, student_width=1 / 64, student_d_width=1 / 32, style_dim=64, n_mlp=4)
TOY |= dict(teacher_kimg=9.0, stage1_kimg=7.0, stage2_kimg=4.0, batch_size=8, lr=0.01, r1_gamma=4.0, path_every=8)
TOY |= dict(ema_kimg=0.5, mirror=True, cache=True, inception="none", eval_every=0, log_every=100, sample_every=500)
TOY |= dict(save_every=500, workers=0)

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments, and the checkpoint when resuming: options that are not given are then the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    at = parser.add_argument_group("data").add_argument
    at("--data", metavar="IMAGES", help="a folder of images, searched recursively, or a .zip of images")
    at("--size", type=int, choices=[2**n for n in range(3, 11)], default=256, help="side of the images, pixels (256)")
    choice = argparse.BooleanOptionalAction
    at("--mirror", action=choice, default=False, help="flip half of the images, at random")
    at("--cache", action=choice, default=False, help="keep all images in memory, 3 SIZE^2 bytes each")
    at("--workers", type=at_least(0), default=4, help="data loader processes (4)")
    at("--toy", action="store_true", help="small networks on a synthetic data set of round faces")
    at = parser.add_argument_group("networks").add_argument
    at("--teacher", metavar="FILE", help="{g, d, g_ema}: a community checkpoint or a teacher.pt of ours")
    at("--student", metavar="FILE", help="{g, d, g_ema} to start from: a stage1.pt or stage2.pt of ours")
    width = at_least(1 / 512)
    at("--teacher-width", type=width, default=1.0, help="factor on the channels of the teacher's networks (1)")
    at("--student-width", type=width, default=0.5, help="factor on the channels of the student's generator (0.5)")
    at("--student-d-width", type=width, default=0.5, help="factor on the channels of its discriminator (0.5)")
    at("--channel-multiplier", type=at_least(1), default=2, help="of resolutions from 64 on; config f: 2 (2)")
    at("--style-dim", type=at_least(1), default=512, help="width of z, w and the mapping network (512)")
    at("--n-mlp", type=at_least(1), default=8, help="layers of the mapping network (8)")
    at = parser.add_argument_group("method").add_argument
    kimg = at_least(0.0)
    at("--teacher-kimg", type=kimg, default=25000.0, help="stage 0, thousand images (25000; 0 with --teacher)")
    at("--stage1-kimg", type=kimg, default=25000.0, help="stage 1, thousand images (25000; 0 with --student)")
    at("--stage2-kimg", type=kimg, default=25000.0, help="stage 2, thousand images (25000)")
    at("--lambda-dgl", type=at_least(0.0), default=0.1, help="stage 2: weight of D_T's term (0.1)")
    at("--r1-gamma", type=at_least(0.0), default=10.0, help="gradient penalty of D on real images, 0: none (10)")
    at("--r1-every", type=at_least(1), default=16, help="steps between its steps (16)")
    at("--path-weight", type=at_least(0.0), default=2.0, help="path length penalty of G, 0: none (2)")
    at("--path-every", type=at_least(1), default=4, help="steps between its steps (4)")
    at("--style-mixing", type=at_least(0.0), default=0.9, help="probability of mixing two latents (0.9)")
    at("--ema-kimg", type=at_least(0.0), default=10.0, help="half-life of G's moving average, thousand images (10)")
    at = parser.add_argument_group("optimisation").add_argument
    at("--max-steps", type=at_least(1), help="stop after so many steps of all stages together; the budgets stay")
    at("--batch-size", type=at_least(1), default=32, help="images per process and step (32)")
    at("--lr", type=at_least(0.0), default=0.002, help="learning rate of Adam (0.002)")
    at("--seed", type=at_least(0), default=0)
    at = parser.add_argument_group("evaluation").add_argument
    at("--eval-images", type=at_least(2), default=50000, help="images that G's moving average draws for a FID (50000)")
    add_run_options(parser, eval_unit="kimg", eval_every=500)

    args = parser.parse_args(argv)
    if args.toy:
        parser.set_defaults(**TOY)
    # What is given need not be trained.
    if args.teacher:
        parser.set_defaults(teacher_kimg=0.0)
    if args.student:
        parser.set_defaults(stage1_kimg=0.0)
    args = parser.parse_args(argv)
    if not (args.data or args.toy or (args.resume and args.out)):
        fail("--data is missing: a folder or .zip of images (--toy needs none)")
    args.out = args.out or f"runs/{NAME}_{Path(args.data).resolve().stem if args.data else 'toy'}"
    args, checkpoint = read_checkpoint(args, parser, argv) if args.resume else (args, None)
    if not (args.teacher_kimg or args.stage1_kimg or args.stage2_kimg):
        fail("--teacher-kimg, --stage1-kimg and --stage2-kimg are all 0: nothing to train")
    if args.teacher and args.teacher_kimg and not checkpoint:
        fail(f"--teacher {args.teacher} is trained already: leave out --teacher-kimg {args.teacher_kimg:g}")
    if args.stage2_kimg and not (args.teacher or args.teacher_kimg):
        fail("stage 2 needs a teacher: give --teacher FILE or a --teacher-kimg, or leave out stage 2: --stage2-kimg 0")
    return args, checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# Data


@functools.lru_cache(maxsize=4)
def shuffled(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


class SquareImages(Dataset):
    """The images' central squares, resized to size x size (bicubic, antialiased): (3, size, size), uint8."""

    def __init__(self, files, size):
        self.files, self.size, self.cached = files, size, None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.cached is not None:
            return self.cached[index]
        image = self.files[index]
        square = TF.center_crop(image, [min(image.size)] * 2)
        return TF.pil_to_tensor(TF.resize(square, [self.size] * 2, TF.InterpolationMode.BICUBIC))

    def cache(self, workers):
        """Decodes all images into one tensor (N, 3, size, size), which processes forked later share."""
        images = DataLoader(self, batch_size=64, num_workers=workers, generator=torch.Generator())
        self.cached = torch.cat(list(images))


class TrainingImages(Dataset):
    """Item n of the training run: images in an order shuffled for every pass through them, flipped at random.

    Order and flip depend on the seed and n alone, so a run that resumes at n sees what it would have seen.
    """

    def __init__(self, images, mirror, seed):
        self.images, self.mirror, self.seed = images, mirror, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, n):
        epoch, k = divmod(n, len(self))
        image = self.images[int(shuffled(len(self), self.seed, epoch)[k])]
        return image.flip(2) if self.mirror and np.random.default_rng([self.seed, n]).random() < 0.5 else image


def write_toy_dataset(folder, size=32, count=512):
    """Round faces: skin, hair, eyes and background of many colours, a mouth that smiles or not."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        scale = 4 * size  # drawn four times larger and filtered down: smooth edges

        def ellipse(draw, x, y, rx, ry, colour, half=None, scale=scale):
            box = [scale * v for v in (x - rx, y - ry, x + rx, y + ry)]
            draw.pieslice(box, *half, fill=colour) if half else draw.ellipse(box, fill=colour)

        pale, dark = np.array([250, 214, 180]), np.array([120, 72, 44])
        mix = rng.random()
        skin = tuple((mix * pale + (1 - mix) * dark).astype(int))
        hair = ((40, 26, 20), (120, 66, 26), (214, 172, 84), (150, 50, 26))[rng.integers(4)]
        background = ((96, 140, 200), (120, 176, 120), (190, 150, 190), (210, 200, 150))[rng.integers(4)]
        background = tuple((np.array(background) + rng.integers(-20, 21, 3)).tolist())
        iris = ((30, 60, 120), (40, 84, 40), (40, 24, 16))[rng.integers(3)]
        image = Image.new("RGB", (scale, scale), background)
        draw = ImageDraw.Draw(image)
        x, y = rng.uniform(0.46, 0.54, 2)
        radius = rng.uniform(0.34, 0.38)
        ellipse(draw, x, y - 0.05, radius + 0.06, radius + 0.05, hair)
        ellipse(draw, x, y + 0.04, radius * 0.92, radius, skin)
        for side in (-1, 1):
            ellipse(draw, x + side * 0.15, y - 0.03, 0.1, 0.085, (245, 245, 245))
            ellipse(draw, x + side * 0.15, y - 0.03, 0.055, 0.065, iris)
        width, depth = rng.uniform(0.14, 0.2), rng.uniform(0.06, 0.13)
        ellipse(draw, x, y + 0.19, width, depth, (176, 40, 50), half=(0, 180))
        image.resize((size, size), Image.Resampling.LANCZOS).save(folder / f"{i:04d}.png")


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing, the same in the three training scripts: arguments, processes, checkpoints


def last_line(error):
    """What an error says, also one that comes with the traceback of a data loader worker."""
    return str(error).strip().splitlines()[-1].removeprefix("fid.InputError: ")


def fail(error):
    """Bad input: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: error: {last_line(error)}", file=sys.stderr)
    sys.exit(2)


def add_run_options(parser, eval_unit, eval_every):
    at = parser.add_argument_group("run").add_argument
    at("--out", metavar="FOLDER", help=f"output folder (runs/{NAME}_DATA)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    either("--overwrite", action="store_true", help="replace the run that OUT holds")
    at("--device", default="auto", help="auto, cpu, cuda (auto)")
    at("--amp", choices=("auto", "bf16", "off"), default="auto", help="mixed precision; auto: bf16 on CUDA")
    at("--compile", action="store_true", help="compile the networks with torch.compile")
    at("--log-every", type=at_least(1), default=100, help="steps between log lines (100)")
    at("--sample-every", type=at_least(0), default=1000, help="steps between sample grids, 0: none (1000)")
    at("--save-every", type=at_least(1), default=1000, help="steps between checkpoints (1000)")
    unit = f"--eval-{eval_unit}"
    at(
        "--eval-every",
        unit,
        type=at_least(0),
        default=eval_every,
        help=f"{eval_unit} between FIDs, 0: none ({eval_every})",
    )
    at("--inception", default="auto", help="FID Inception: auto, random, none, or a weight file (auto)")


# Options that a resumed run may change without contradicting its checkpoint.
FREE = "data out resume overwrite device workers cache compile max_steps"
FREE += " log_every sample_every save_every eval_every"


def read_checkpoint(args, parser, argv):
    """Reads OUT/checkpoint.pt -> (arguments completed from it, checkpoint); refuses options that contradict it."""
    checkpoint = load_file(Path(args.out, "checkpoint.pt"))
    if checkpoint.get("script") != NAME:
        raise InputError(f"{args.out}/checkpoint.pt: not a checkpoint of {Path(__file__).name}")
    saved = checkpoint["args"] | dict(overwrite=False)
    parser.set_defaults(**saved)
    completed = parser.parse_args(argv)
    completed.out = args.out
    changed = [k for k, v in vars(completed).items() if k not in FREE.split() and v != saved.get(k)]
    if changed:
        texts = (f"--{k.replace('_', '-')} {getattr(completed, k)} (the run has {saved.get(k)})" for k in changed)
        raise InputError(f"{args.out}: the checkpoint contradicts {', '.join(texts)}; drop that or start a new run")
    return completed, checkpoint


def start_processes(args):
    """Joins the process group that torchrun describes, if any -> device, rank, world size."""
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif sys.platform == "linux":
        # glibc would give every tensor over 32 MB back to the system, and clearing its pages anew can cost half a step.
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: blocks mapped one by one
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes kept at the end of the heap
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(end_workers)
    return device, *processes()


def share_weights(modules, world):
    """Gives every process rank 0's parameters and buffers."""
    if world > 1:
        for module in modules:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def average_gradients(optimizer, world):
    """Replaces the gradients of the optimiser's parameters by their mean over the processes."""
    if world > 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def gather_to_rank_0(item, rank, world):
    """The list of all processes' items, on rank 0 alone."""
    items = [item] * world if rank == 0 else None
    if world > 1:
        dist.gather_object(item, items)
    return items


def digest(facts):
    """A short name for facts that are compared or that name a file."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def random_state(device):
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return dict(python=random.getstate(), numpy=(kind, keys.tolist(), *rest), torch=torch.get_rng_state(), cuda=cuda)


def restore_random_state(state, device):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_output(args):
    """Refuses an output folder that holds a run, or that cannot be written, before anything is."""
    out = Path(args.out).absolute()
    if (out / "args.json").exists() and not (args.resume or args.overwrite):
        raise InputError(f"{args.out}: holds a run; go on with --resume, replace it with --overwrite, or choose --out")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{args.out}: cannot be written, {existing} is no folder or is write-protected")


def open_output(args, step):
    """Makes the output folder; drops a replaced run's files, and log lines after the step that is resumed from."""
    out = Path(args.out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        files = ("checkpoint.pt", "student.pt", "best_student.pt", "log.jsonl", "summary.json")
        for old in (*(out / name for name in files), *out.glob("samples/*.png")):
            old.unlink(missing_ok=True)
    if args.resume and (out / "log.jsonl").exists():
        lines = [line for line in (out / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("}\n")]
        lines = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomically(out / "log.jsonl", lambda file: file.write("".join(lines).encode()))
    write_json(out / "args.json", vars(args))


class LossMeter:
    """Mean of each loss since the last log line; the sums stay on the device until they are read."""

    def __init__(self, sums=()):
        self.sums = dict(sums)  # name: (sum, how many were finite, how many)

    def add(self, **losses):
        for name, loss in losses.items():
            total, finite, count = self.sums.get(name, (0.0, 0, 0))
            loss = loss.detach()
            self.sums[name] = total + loss, finite + loss.isfinite(), count + 1

    def state(self):
        return {name: (float(total), int(finite), count) for name, (total, finite, count) in self.sums.items()}

    def means(self, step):
        """{name: mean over steps and processes}; stops the run when one is not finite, naming the first that was."""
        states = gather(self.state())
        means = {name: sum(s[name][0] / s[name][2] for s in states) / len(states) for name in self.sums}
        bad = [name for name, mean in means.items() if not math.isfinite(mean)]
        if bad:
            name = min(bad, key=lambda name: min(s[name][1] / s[name][2] for s in states))
            raise SystemExit(
                f"error: diverged, the loss {name} is {means[name]} at step {step}; the last checkpoint stays"
            )
        return means


stop_signals = []


def on_signal(number, _frame):
    """The first SIGTERM or SIGINT lets the step finish and the run be saved; a second one ends at once."""
    if stop_signals:
        os._exit(128 + number)
    stop_signals.append(number)


def ignore_signals(_worker):
    """Data loader workers go on until the main process, which may get the same signal, has done its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_workers():
    """At exit, however it comes: workers ignore the SIGTERM that the interpreter would send them, and wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def next_batch(batches):
    """The next batch, and what forbids to go on: a signal's number or a bad image, on any process; else None."""
    batch, problem = None, stop_signals[0] if stop_signals else None
    if not problem:
        try:
            batch = next(batches)
        except fid.InputError as error:
            problem = last_line(error)
    return batch, next(filter(None, gather(problem)), None)


def stop_run(problem, out, step, say):
    """Ends a run that was saved after step, with the conventional status of the signal, or the error's."""
    if not isinstance(problem, int):
        raise InputError(f"{problem}; saved after step {step}: replace the file, then --out {out} --resume")
    say(f"stopped by {signal.Signals(problem).name} after step {step}, saved; go on with: --out {out} --resume")
    sys.exit(128 + problem)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def load_pair(path, networks, needed):
    """Loads {"g": .., "d": .., "g_ema": ..} of a file into networks of these names -> the names that the file has."""
    content = load_file(path)
    for name in needed:
        if name not in content:
            found = ", ".join(list(content)[:5]) or "nothing"
            raise InputError(f"{path}: has no {name!r}, expected the state dicts g, d and g_ema, found {found}")
    found = [name for name in networks if name in content]
    for name in found:
        try:
            load_weights(networks[name], content[name], f"{path}, {name}")
        except InputError as error:
            raise InputError(
                f"{error}; check --size, the widths, --channel-multiplier, --style-dim, --n-mlp"
            ) from error
    return found


def save_pair(path, G, D, G_ema, args, width):
    """Writes a trained pair as the community does: {g, d, g_ema, args}; --teacher and --student read it."""
    content = {
        name: {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
        for name, net in (("g", G), ("d", D), ("g_ema", G_ema))
    }
    content["args"] = argparse.Namespace(
        size=args.size, latent=args.style_dim, n_mlp=args.n_mlp, channel_multiplier=args.channel_multiplier, width=width
    )
    write_atomically(path, lambda file: torch.save(content, file))


def lazy_adam(net, lr, every):
    """Adam for a network whose penalty has a step of its own after every so many steps, or never (None).

    k + 1 steps then do the work of k: lr * c and beta ** c with c = k / (k + 1) keep the pace (StyleGAN2, appendix B).
    """
    c = every / (every + 1) if every else 1.0
    return torch.optim.Adam(net.parameters(), lr=lr * c, betas=(0.0, 0.99**c), fused=True)


@torch.no_grad()
def update_ema(G_ema, G, images, half_life):
    """Moves G_ema towards G so that a weight from half_life images ago counts half; images: those of this step."""
    decay = 0.5 ** (images / max(half_life, 1e-8))
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - decay)


def train(args, checkpoint):
    device, rank, world = start_processes(args)
    say = print if rank == 0 else lambda *_, **__: None
    out = Path(args.out)
    if rank == 0:
        check_output(args)
    stop_signals.clear()
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    amp = args.amp == "bf16" or (args.amp == "auto" and device.type == "cuda")
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=amp)

    def to_device(images):
        """uint8 on the host -> [-1, 1] on the device."""
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        return images.float() / 127.5 - 1

    # Networks
    def build_pair(g_width, d_width):
        G = StyleGAN2Generator(args.size, args.style_dim, args.n_mlp, args.channel_multiplier, g_width)
        return G, StyleGAN2Discriminator(args.size, args.channel_multiplier, d_width), copy.deepcopy(G)

    teacher_G, teacher_D, teacher_G_ema = build_pair(args.teacher_width, args.teacher_width)
    student_G, student_D, student_G_ema = build_pair(args.student_width, args.student_d_width)
    teacher = dict(teacher_G=teacher_G, teacher_D=teacher_D, teacher_G_ema=teacher_G_ema)
    student = dict(student_G=student_G, student_D=student_D, student_G_ema=student_G_ema)
    if checkpoint:
        known = [name for name in teacher if name in checkpoint["networks"]]
    elif args.teacher:
        found = load_pair(args.teacher, dict(d=teacher_D, g_ema=teacher_G_ema), ["d"])
        known = ["teacher_D"] + ["teacher_G_ema"] * ("g_ema" in found)
    else:
        known = list(teacher) if args.teacher_kimg else []
    if args.student and not checkpoint:
        load_pair(args.student, dict(g=student_G, d=student_D, g_ema=student_G_ema), ["g", "d", "g_ema"])
    networks = {name: teacher[name] for name in known} | student
    for net in networks.values():
        net.to(device)
    share_weights(networks.values(), world)
    inception = load_inception(args.inception, device) if args.eval_every and args.inception != "none" else None

    # Data
    data = Path(args.data or out / "toy_data")
    if not args.data and rank == 0 and not args.resume:
        write_toy_dataset(data)
    gather(None)  # wait for rank 0
    files = ImageFiles(data)
    data_facts = digest([(files.names, files.check(args.size))])
    if inception and len(files) < 2:
        raise InputError(f"{data}: a Fréchet distance needs 2 images or more; or --eval-every 0")
    square_images = SquareImages(files, args.size)
    dataset = TrainingImages(square_images, args.mirror, args.seed)
    if args.cache:
        square_images.cache(args.workers)
        say(f"{len(files)} images in memory, {square_images.cached.nbytes / 2**20:.0f} MiB for each process")

    # Stages: number, first step, the step after the last one; steps count through all stages
    global_batch = args.batch_size * world
    budgets = (args.teacher_kimg, args.stage1_kimg, args.stage2_kimg)
    ends = list(itertools.accumulate(math.ceil(kimg * 1000 / global_batch) for kimg in budgets))
    stages = list(zip(range(3), (0, *ends), ends, strict=False))
    last_step = min(ends[-1], args.max_steps or ends[-1])
    eval_steps = math.ceil(args.eval_every * 1000 / global_batch)

    meter = LossMeter()
    best, scores = math.inf, {}
    first_step = 0

    # Resume
    if checkpoint:
        if checkpoint["world"] != world:
            raise InputError(f"{out}: the run has {checkpoint['world']} processes, found {world}: start as many")
        if checkpoint["data"] != data_facts:
            raise InputError(f"{data}: names or sizes of the images are not those that the run in {out} began with")
        for name, net in networks.items():
            load_weights(net, checkpoint["networks"][name], f"{out}/checkpoint.pt, {name}")
        first_step, best, scores = checkpoint["step"], checkpoint["best"], checkpoint["scores"]
    if rank == 0:
        open_output(args, first_step)
    loader = DataLoader(
        dataset,
        batch_sampler=(
            range((step * world + rank) * args.batch_size, (step * world + rank + 1) * args.batch_size)
            for step in range(first_step, last_step)
        ),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(args.seed),
    )
    batches = iter(loader)
    if checkpoint:
        mine = checkpoint["ranks"][rank]
        meter = LossMeter(mine["meter"])
        restore_random_state(mine["random"], device)
    else:
        random.seed(args.seed + rank)
        torch.manual_seed(args.seed + rank)

    def save(step):
        meter.means(step)  # stops here rather than save a run that has diverged
        ranks = gather_to_rank_0(dict(random=random_state(device), meter=meter.state()), rank, world)
        if rank == 0:
            content = dict(script=NAME, step=step, args=vars(args), world=world, data=data_facts, ranks=ranks)
            content |= dict(best=best, scores=scores, path_length=path_length.state_dict())
            content["optimizers"] = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            save_checkpoint(out / "checkpoint.pt", networks, content)
            if stage > 0:
                save_generator(out / "student.pt", student_G_ema)

    def log(entry):
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    # Evaluation: every process takes its share of the images; quantised like the files that fid.py reads.
    def add_images(stats, images):
        stats.update(inception(((images.clamp(-1, 1) + 1) * 127.5).round() / 255))

    def real_stats():
        stats = FeatureStats(inception.metric)
        share = range(rank, len(files), world)
        options = dict(num_workers=args.workers, worker_init_fn=ignore_signals, generator=torch.Generator())
        for images in DataLoader(square_images, batch_size=32, sampler=share, **options):
            add_images(stats, to_device(images))
        stats.merge_across_processes()
        return stats

    def fake_stats(net):
        """Of --eval-images images from the same latents and noise every time; leaves the random state alone."""
        stats = FeatureStats(inception.metric)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for start in range(rank * args.batch_size, args.eval_images, global_batch):
                torch.manual_seed(args.seed + start)
                z = torch.randn(min(args.batch_size, args.eval_images - start), args.style_dim, device=device)
                add_images(stats, net(z))
        stats.merge_across_processes()
        return stats

    @torch.no_grad()
    def evaluate(nets):
        """Fréchet distance of each net's images to all training images, unflipped -> {"FID teacher": ..}."""
        path = out / f"reference_{digest((files.fingerprint(), args.size, args.inception))}.npz"
        if not all(gather(path.exists())):
            reference = real_stats()
            if rank == 0:
                reference.save(path)
        else:
            reference = FeatureStats.load(path)
        metrics = {}
        for name, net in nets.items():
            stats = fake_stats(net)
            metrics[f"{inception.metric} {name}"] = frechet_distance(
                stats.mean, stats.cov, reference.mean, reference.cov
            )
        return metrics

    @torch.no_grad()
    def save_samples(path, nets):
        """Two rows of images from each net, of the same latents and noise every time."""
        columns = max(2, min(8, 2048 // args.size))
        z = torch.randn(2 * columns, args.style_dim, generator=torch.Generator().manual_seed(args.seed)).to(device)
        rows = torch.cat([net(part, noise="fixed") for net in nets for part in z.split(columns)])
        grid = make_grid((rows.float().cpu().clamp(-1, 1) + 1) / 2, nrow=columns)
        write_atomically(path, lambda file: save_image(grid, file, format="png"))

    def sample_latents(n):
        """z of n images; with probability --style-mixing two of them, to be mixed at a random layer."""
        count = 2 if random.random() < args.style_mixing else 1
        return torch.randn(count, n, args.style_dim, device=device).unbind()

    # The loop
    say(f"{out}: steps {first_step} to {last_step} of {ends[-1]}, {len(files)} images, on {world} x {device}")
    if first_step >= last_step:
        say("nothing is left to train")
    elif args.stage2_kimg and not (args.stage1_kimg or args.student):
        say("stage 2 will start from random weights, which the paper found unstable: see --stage1-kimg and --student")
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    for stage, stage_start, stage_end in stages:
        steps = range(max(first_step, stage_start), min(stage_end, last_step))
        if not steps:
            continue
        G, D, G_ema = (teacher if stage == 0 else student).values()
        optimizers = dict(
            G=lazy_adam(G, args.lr, args.path_every if args.path_weight else None),
            D=lazy_adam(D, args.lr, args.r1_every if args.r1_gamma else None),
        )
        path_length = PathLengthPenalty(decay=0.01).to(device)
        if checkpoint and stage_start < first_step:
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(checkpoint["optimizers"][name])
            path_length.load_state_dict(checkpoint["path_length"])
        for net in networks.values():
            net.requires_grad_(False)
        # torch.compile cannot differentiate twice: the penalties use the plain networks.
        synthesis, judge, teacher_judge = G.synthesis, D, teacher_D
        if args.compile:
            synthesis, judge, teacher_judge = map(torch.compile, (synthesis, judge, teacher_judge))
        say(f"stage {stage} ({STAGES[stage]}): {budgets[stage]:g} thousand images, to step {stage_end}")
        since, logged_step = time.perf_counter(), steps[0]
        for step in steps:
            batch, problem = next_batch(batches)
            if problem:
                save(step)
                stop_run(problem, out, step, say)
            real = to_device(batch)

            # Discriminator: E[ softplus(-D(y)) ] + E[ softplus(D(G(z))) ]
            D.requires_grad_(True)
            with autocast():
                with torch.no_grad():
                    fake = synthesis(G.mapping(sample_latents(args.batch_size)))
                loss_D = discriminator_logistic_loss(judge(real), judge(fake))
            optimizers["D"].zero_grad()
            loss_D.backward()
            average_gradients(optimizers["D"], world)
            optimizers["D"].step()
            meter.add(D=loss_D)

            # R1: gamma / 2 E[ |grad_y D(y)|^2 ], times the steps that it stands for. The penalties build second-order
            # graphs, whose gradients of gradients are too small and too many for bf16: they stay out of autocast.
            if args.r1_gamma and (step - stage_start) % args.r1_every == 0:
                real.requires_grad_(True)
                loss_r1 = r1_penalty(D(real), real)
                optimizers["D"].zero_grad()
                (args.r1_gamma / 2 * args.r1_every * loss_r1).backward()
                average_gradients(optimizers["D"], world)
                optimizers["D"].step()
                meter.add(R1=loss_r1)

            # Generator: E[ softplus(-D(G(z))) ], in stage 2 + lambda_dgl E[ softplus(-D_T(G(z))) ] (the paper's method)
            D.requires_grad_(False)
            G.requires_grad_(True)
            with autocast():
                fake = synthesis(G.mapping(sample_latents(args.batch_size)))
                logits = judge(fake)
                if stage == 2:
                    teacher_logits = teacher_judge(fake)
                    loss_G = dgl_generator_loss(logits, teacher_logits, args.lambda_dgl)
                else:
                    loss_G = generator_logistic_loss(logits)
            optimizers["G"].zero_grad()
            loss_G.backward()
            average_gradients(optimizers["G"], world)
            optimizers["G"].step()
            meter.add(G=loss_G)
            if stage == 2:
                meter.add(G_dgl=generator_logistic_loss(teacher_logits.detach()))

            # Path length: E[ (|J_w^T y| - a)^2 ] on half a batch
            if args.path_weight and (step - stage_start) % args.path_every == 0:
                latents = G.mapping(sample_latents(max(1, args.batch_size // 2)))
                loss_path = path_length(G.synthesis(latents), latents)
                optimizers["G"].zero_grad()
                (args.path_weight * args.path_every * loss_path).backward()
                average_gradients(optimizers["G"], world)
                optimizers["G"].step()
                if world > 1:
                    dist.all_reduce(path_length.mean)
                    path_length.mean /= world
                meter.add(path=loss_path, path_mean=path_length.mean)
            G.requires_grad_(False)
            update_ema(G_ema, G, global_batch, 1000 * args.ema_kimg)

            # Log, samples, evaluation, checkpoint
            done = step + 1
            last = done == last_step
            images = done * global_batch
            logged = done % args.log_every == 0 or done == stage_end
            if logged:
                means = meter.means(done)
                meter = LossMeter()
                rate = (done - logged_step) * global_batch / (time.perf_counter() - since)
                kimg, stage_kimg = images / 1000, (done - stage_start) * global_batch / 1000
                if rank == 0:
                    entry = dict(step=done, stage=stage, kimg=kimg, stage_kimg=stage_kimg, images=images)
                    entry |= {f"lr_{name}": o.param_groups[0]["lr"] for name, o in optimizers.items()}
                    log(entry | dict(images_per_second=rate) | means)
                    left = timedelta(seconds=round((last_step - done) * global_batch / rate))
                    losses = "  ".join(f"{name} {mean:.3g}" for name, mean in means.items())
                    progress = (
                        f"stage {stage}  step {done}/{last_step}  kimg {kimg:.1f} ({stage_kimg:.1f} in the stage)"
                    )
                    say(f"{progress}  {losses}  lr {args.lr:g}  {rate:.1f} images/s  {left} left", flush=True)
            due = inception and (done % eval_steps == 0 or done == stage_end)
            if due or (inception and last):
                nets = dict(teacher=teacher_G_ema) if stage == 0 else dict(student=student_G_ema)
                if "teacher_G_ema" in known and f"{inception.metric} teacher" not in scores:
                    nets["teacher"] = teacher_G_ema
                scores |= evaluate(nets)
                say("  ".join(f"{name} {value:.2f}" for name, value in scores.items()), flush=True)
                if due:  # the record of a run cut short by --max-steps goes on as if it had not been
                    score = scores.get(f"{inception.metric} student", math.inf)
                    if rank == 0:
                        log(dict(step=done) | scores)
                    if rank == 0 and score < best:
                        save_generator(out / "best_student.pt", student_G_ema)
                    best = min(best, score)
            if rank == 0 and args.sample_every and (done % args.sample_every == 0 or done == stage_end or last):
                shown = [net for name, net in networks.items() if name == "teacher_G_ema"]
                save_samples(out / f"samples/stage{stage}_{done:07d}.png", shown + [student_G_ema] * (stage > 0))
            if rank == 0 and done == stage_end:
                name, width = ("teacher", args.teacher_width) if stage == 0 else (f"stage{stage}", args.student_width)
                save_pair(out / f"{name}.pt", G, D, G_ema, args, width)
            if done == stage_end:
                networks.pop("teacher_G", None)  # has served
            if done % args.save_every == 0 or done == stage_end or last:
                save(done)
            if logged:
                since, logged_step = time.perf_counter(), done

    # Summary: teacher against student
    if rank == 0:
        z = torch.randn(1, args.style_dim, device=device)
        rows = {}
        for name, (G, D, _) in (("teacher", teacher.values()), ("student", student.values())):
            rows[name] = cost(G.to(device).eval(), z) | dict(d_parameters=sum(p.numel() for p in D.parameters()))
        rows["ratio"] = {key: rows["teacher"][key] / rows["student"][key] for key in rows["student"]}
        for key, value in scores.items():
            metric, _, name = key.rpartition(" ")
            rows[name][metric] = value
        write_json(out / "summary.json", dict(steps=last_step, image_size=args.size, **rows))
        say("\n" + comparison(rows))
        say(f"\ncompressed generator: {out}/student.pt, pictures: {out}/samples")


def main(argv=None):
    try:
        train(*parse_args(argv))
    except (InputError, fid.InputError, OSError) as error:
        fail(error)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
