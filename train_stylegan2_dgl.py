"""Compresses StyleGAN2 with DGL-GAN: the teacher's discriminator guides a narrow student (arXiv 2112.06502).

The student generator G_S has two judges: its own discriminator D_S, trained with it, and the discriminator D_T of a
trained teacher, frozen. Neither the teacher's generator nor its features are needed. Stage 0 trains the teacher if none
is given; stage 1 trains the student pair from scratch as a plain StyleGAN2; stage 2 goes on from there with D_T's term,
which is unstable from random weights. With --student-width 1 the method improves an uncompressed StyleGAN2.

    python train_stylegan2_dgl.py --toy                                                # no data needed, minutes
    python train_stylegan2_dgl.py --data images/ --size 256 --mirror --teacher ffhq.pt # stages 1 and 2
    python train_stylegan2_dgl.py --data images.zip --size 256 --mirror                # stages 0, 1 and 2
    python train_stylegan2_dgl.py --data images/ --mirror --teacher ffhq.pt --student stage1.pt # stage 2
    torchrun --nproc_per_node 8 train_stylegan2_dgl.py --data images/ --mirror --teacher ffhq.pt --batch-size 4
    python train_stylegan2_dgl.py --out runs/stylegan2_dgl_images --resume
"""

import argparse
import copy
import functools
import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import fid
import models
from fid import ImageFiles, StoredSquares, at_least, frechet_distance, gather, generated_stats
from losses import LossMeter, PathLengthPenalty, discriminator_loss, generator_loss, r1_penalty
from models import InputError, StyleGAN2Discriminator, StyleGAN2Generator, processes, say, take_step

NAME = "stylegan2_dgl"
GROWING = ("teacher_kimg", "stage1_kimg", "stage2_kimg")  # what --resume may enlarge
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = ("teacher", "student alone", "student with the teacher's discriminator")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments, and the checkpoint when resuming: options that are not given are then the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=models.HelpFormatter)
    parser.error = fail
    at = parser.add_argument_group("data").add_argument
    at("--data", metavar="IMAGES", help="a folder of images, searched recursively, or a .zip of images")
    at("--size", type=int, choices=SIZES, default=256, help="side of the images, pixels")
    at("--mirror", action=argparse.BooleanOptionalAction, default=False, help="flip half of the images, at random")
    at("--cache", metavar="FOLDER", help="where the resized images are kept, 3 SIZE^2 bytes each; OUT")
    at("--toy", action="store_true", help="small networks on a synthetic data set of round faces")
    at = parser.add_argument_group("networks").add_argument
    at("--teacher", metavar="FILE", help="{g, d, g_ema} of the community, or a teacher.pt or checkpoint.pt of ours")
    at("--student", metavar="FILE", help="the same, to start from: a stage1.pt, stage2.pt or checkpoint.pt of ours")
    width = at_least(1 / 512)
    at("--teacher-width", type=width, default=1.0, help="factor on the channels of the teacher's networks")
    at("--student-width", type=width, default=0.5, help="factor on the channels of the student's generator")
    at("--student-d-width", type=width, default=0.5, help="factor on the channels of its discriminator")
    at("--channel-multiplier", type=at_least(1), default=2, help="of resolutions from 64 on; 2 is config f")
    at("--style-dim", type=at_least(1), default=512, help="width of z, w and the mapping network")
    at("--n-mlp", type=at_least(1), default=8, help="layers of the mapping network")
    at = parser.add_argument_group("method").add_argument
    at("--teacher-kimg", type=at_least(0.0), default=25000.0, help="stage 0, thousand images; 0 with --teacher")
    at("--stage1-kimg", type=at_least(0.0), default=25000.0, help="stage 1, thousand images; 0 with --student")
    at("--stage2-kimg", type=at_least(0.0), default=25000.0, help="stage 2, thousand images")
    at("--lambda-dgl", type=at_least(0.0), default=0.1, help="stage 2: weight of D_T's term")
    at("--r1-gamma", type=at_least(0.0), default=10.0, help="gradient penalty of D on real images, 0: none")
    at("--r1-every", type=at_least(1), default=16, help="steps between its steps")
    at("--path-weight", type=at_least(0.0), default=2.0, help="path length penalty of G, 0: none")
    at("--path-every", type=at_least(1), default=4, help="steps between its steps")
    at("--style-mixing", type=at_least(0.0), default=0.9, help="probability of mixing two latents")
    at("--ema-kimg", type=at_least(0.0), default=10.0, help="half-life of G's moving average, thousand images")
    at = parser.add_argument_group("optimisation").add_argument
    at("--batch-size", type=at_least(1), default=32, help="images per process and step")
    at("--lr", type=at_least(0.0), default=0.002, help="learning rate of Adam")
    at("--eval-images", type=at_least(2), default=50000, help="images that G's moving average draws for a FID")
    add_run_options(parser, unit="thousand images", eval_every=500, auto="bf16 on CUDA")

    args = parser.parse_args(argv)
    if not (args.data or args.toy or (args.resume and args.out)):
        fail("--data is missing: a folder or .zip of images (--toy needs none)")
    parser.set_defaults(**TOY if args.toy else {})
    parser.set_defaults(out=args.out or f"runs/{NAME}_{Path(args.data).resolve().stem if args.data else 'toy'}")
    if args.teacher and not args.resume:  # what is given need not be trained, and brings its size and widths along
        parser.set_defaults(**read_pair(args.teacher, "teacher")[1], teacher_kimg=0.0)
    if args.student and not args.resume:
        parser.set_defaults(**read_pair(args.student, "student")[1], stage1_kimg=0.0)
    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        args, checkpoint = read_checkpoint(parser, argv)
    if not (args.teacher_kimg or args.stage1_kimg or args.stage2_kimg):
        fail("--teacher-kimg, --stage1-kimg and --stage2-kimg are all 0: nothing to train")
    if args.teacher and args.teacher_kimg:
        fail(f"--teacher {args.teacher} is trained already: leave out --teacher-kimg {args.teacher_kimg:g}")
    if args.stage2_kimg and not (args.teacher or args.teacher_kimg):
        fail(
            "stage 2 needs a teacher: give --teacher FILE or a --teacher-kimg, or leave out stage 2: --stage2-kimg 0; "
            "to go on from a run without one, start another with --student OUT/stage1.pt"
        )
    return args, checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# The method


def train(args, checkpoint):
    device = fid.pick_device(args.device)
    models.start_processes(device)
    rank, world = processes()
    out = Path(args.out)
    models.check_output(args)
    amp = args.amp == "bf16" or (args.amp == "auto" and device.type == "cuda")
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=amp)

    def to_device(images):
        """uint8 on the host -> [-1, 1] on the device."""
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        return images.float() / 127.5 - 1

    # Data
    data = Path(args.data or out / "toy_data")
    if not args.data and rank == 0 and not args.resume:
        write_toy_dataset(data)
    gather(None)  # wait for rank 0
    files = ImageFiles(data, True)
    data_facts = gather(files.survey(say, args.size) if rank == 0 else None)[0]
    if args.eval_every and args.inception != "none" and len(files) < 2:
        raise InputError(f"{data}: a Fréchet distance needs two images; or --inception none")

    # Networks
    torch.manual_seed(args.seed)
    teacher = build_pair(args, args.teacher_width, args.teacher_width)
    student = build_pair(args, args.student_width, args.student_d_width)
    known = teacher.keys() if args.teacher_kimg else ()
    if checkpoint:
        known = [name for name in teacher if f"teacher_{name}" in checkpoint["networks"]]
    elif args.teacher:
        known = load_pair(args.teacher, "teacher", {name: teacher[name] for name in ("d", "g_ema")}, ["d"])
    if args.student and not checkpoint:
        load_pair(args.student, "student", student, ["g", "d", "g_ema"])
    networks = {f"teacher_{name}": teacher[name] for name in known}
    networks |= {f"student_{name}": net for name, net in student.items()}
    for net in networks.values():
        net.to(device).requires_grad_(False)
    models.share_weights(networks.values())
    inception = fid.load_inception(args.inception, device) if args.eval_every and args.inception != "none" else None

    # Stages; steps count through them all
    global_batch = args.batch_size * world

    def stage_ends(options):
        return [*itertools.accumulate(math.ceil(options[name] * 1000 / global_batch) for name in GROWING)]

    ends = stage_ends(vars(args))
    last_step = min(ends[-1], args.max_steps or ends[-1])
    eval_steps = math.ceil(args.eval_every * 1000 / global_batch)
    ema_decay = 0.5 ** (global_batch / max(1000 * args.ema_kimg, 1e-8))
    optimizers, meter, first_step = {}, LossMeter(), 0
    record = dict(best=math.inf, scores={}, evaluated=0)  # evaluated: the step of the last evaluation

    # Resume
    torch.manual_seed(args.seed + rank)
    if checkpoint:
        own = models.restore(checkpoint, out / "checkpoint.pt", networks)
        first_step, meter = checkpoint["step"], LossMeter(own["losses"])
        record = {key: checkpoint[key] for key in record}
        if checkpoint["data"] != data_facts:
            say(f"warning: {data}: names or sizes of images have changed, the run is no longer the same bit for bit")
        for name, end in zip(GROWING, stage_ends(checkpoint["args"]), strict=True):
            if getattr(args, name) > checkpoint["args"][name] and first_step > end:
                raise InputError(f"--{name.replace('_', '-')}: that stage is over, a later one has begun")
    models.open_output(args, checkpoint, first_step < last_step)
    images = StoredSquares(files, args.size, args.cache or out, say, args.workers)
    dataset = TrainingImages(images, args.mirror, args.seed)
    batches = models.run_batches(dataset, args.batch_size, range(first_step, last_step), args.workers)

    @functools.cache
    def real_stats():
        return generated_stats(map(to_device, models.share_batches(images, 32, args.workers)), inception)

    def save(step):
        meter.means(step)  # stops here rather than save a run that has diverged
        facts = dict(script=NAME, args=vars(args), data=data_facts, step=step) | record
        models.save_checkpoint(out / "checkpoint.pt", networks, optimizers, dict(losses=meter.state()), **facts)
        if rank == 0 and step > ends[0]:
            models.save_generator(out / "student.pt", student["g_ema"], average=args.ema_kimg * 1000)

    def due(step):
        return args.eval_every and inception and (step % eval_steps == 0 or step in ends)

    def score(step):
        nets = {} if step <= ends[0] else dict(student=student["g_ema"])
        if "g_ema" in known and (step <= ends[0] or f"{inception.key}_teacher" not in record["scores"]):
            nets["teacher"] = teacher["g_ema"]
        scores = record["scores"] = record["scores"] | evaluate(nets, real_stats(), inception, args)
        models.log(args, dict(step=step, evaluation=True) | scores, f"step {step}", scores, cut=not due(step))
        if due(step):
            distance = scores.get(f"{inception.key}_student", math.inf)
            if rank == 0 and distance < record["best"]:
                models.save_generator(out / "best_student.pt", student["g_ema"], average=args.ema_kimg * 1000)
            record.update(best=min(distance, record["best"]), evaluated=step)

    say(f"{out}: steps {first_step} to {last_step} of {ends[-1]}, {len(files)} images, on {world} x {device}")
    if first_step >= last_step:
        last = [name for name in GROWING if getattr(args, name)][-1]
        say(f"nothing is left to train; a larger --{last.replace('_', '-')} extends the run")
    elif not checkpoint and args.stage2_kimg and not (args.stage1_kimg or args.student):
        say("stage 2 will start from random weights, which the paper found unstable: see --stage1-kimg and --student")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if checkpoint and due(first_step) and record["evaluated"] < first_step:
        score(first_step)
        models.amend_checkpoint(out / "checkpoint.pt", checkpoint, args=vars(args), **record)
    for stage, (stage_start, stage_end) in enumerate(itertools.pairwise((0, *ends))):
        steps = range(max(first_step, stage_start), min(stage_end, last_step))
        if not steps:
            continue
        role, pair = ("student", student) if stage else ("teacher", teacher)
        G, D, G_ema, path_length = pair.values()
        optimizers["G"] = lazy_adam(G, args.lr, args.path_every if args.path_weight else None)
        optimizers["D"] = lazy_adam(D, args.lr, args.r1_every if args.r1_gamma else None)
        if checkpoint and stage_start < first_step:
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(checkpoint["optimizers"][name])
        if stage > 0:
            networks.pop("teacher_g", teacher["g"]).cpu()  # has served
        # torch.compile cannot differentiate twice: the penalties use the plain networks.
        synthesis, judge, teacher_judge = G.synthesis, D, teacher["d"]
        if args.compile:
            synthesis, judge, teacher_judge = map(torch.compile, (synthesis, judge, teacher_judge))
        say(f"stage {stage} ({STAGES[stage]}): {getattr(args, GROWING[stage]):g} thousand images, to step {stage_end}")
        since = time.perf_counter(), steps[0] * global_batch
        for step in steps:
            real = to_device(next(batches))

            # Discriminator: E[ softplus(-D(y)) ] + E[ softplus(D(G(z))) ]
            D.requires_grad_(True)
            with autocast():
                with torch.no_grad():
                    fake = synthesis(latents(G, args.batch_size, args))
                loss_D = discriminator_loss(judge(real), judge(fake), "logistic")
            take_step(optimizers["D"], loss_D)
            meter.add(D=loss_D)

            # R1: gamma / 2 E[ |grad_y D(y)|^2 ], times the steps that it stands for; in bf16 its gradient would turn.
            if args.r1_gamma and (step - stage_start) % args.r1_every == 0:
                real.requires_grad_(True)
                loss_r1 = r1_penalty(D(real), real)
                take_step(optimizers["D"], args.r1_gamma / 2 * args.r1_every * loss_r1)
                meter.add(R1=loss_r1)

            # Generator: E[ softplus(-D(G(z))) ], in stage 2 + lambda_dgl E[ softplus(-D_T(G(z))) ], D_T being frozen
            D.requires_grad_(False)
            G.requires_grad_(True)
            with autocast():
                fake = synthesis(latents(G, args.batch_size, args))
                objective = loss_G = generator_loss(judge(fake), "logistic")
                if stage == 2:
                    loss_dgl = generator_loss(teacher_judge(fake), "logistic")
                    objective = loss_G + args.lambda_dgl * loss_dgl
                    meter.add(G_dgl=loss_dgl)
            take_step(optimizers["G"], objective)
            meter.add(G=loss_G)

            # Path length: E[ (|J_w^T y| - a)^2 ] on half a batch
            if args.path_weight and (step - stage_start) % args.path_every == 0:
                with autocast():
                    w = latents(G, max(1, args.batch_size // 2), args)
                    fake = G.synthesis(w)
                loss_path = path_length(fake, w)
                take_step(optimizers["G"], args.path_weight * args.path_every * loss_path)
                if world > 1:
                    dist.all_reduce(path_length.mean)
                    path_length.mean /= world
                meter.add(path=loss_path, path_mean=path_length.mean)
            G.requires_grad_(False)
            models.update_ema(G_ema, G, ema_decay)

            # Log, samples, checkpoint, evaluation
            done, signal_number = step + 1, stop_asked()
            last, stage_over = done == last_step, done == stage_end
            if done % args.log_every == 0 or stage_over or last:
                kimg, stage_kimg = (n * global_batch / 1000 for n in (done, done - stage_start))
                entry = dict(
                    step=done, stage=stage, kimg=kimg, stage_kimg=stage_kimg, images=done * global_batch, lr=args.lr
                )
                progress = f"stage {stage}  kimg {kimg:.1f} ({stage_kimg:.1f} in the stage)"
                cut = done % args.log_every > 0 and not stage_over
                models.log_step(args, entry, progress, meter.means(done), last_step, since, cut)
            if done % args.log_every == 0 or stage_over:
                meter, since = LossMeter(), (time.perf_counter(), done * global_batch)
            interrupted = time.perf_counter()
            if rank == 0 and args.sample_every and (done % args.sample_every == 0 or stage_over or last):
                nets = dict(teacher=teacher["g_ema"]) if "g_ema" in known else {}
                nets |= dict(student=student["g_ema"]) if stage else {}
                save_samples(out / f"samples/stage{stage}_{done:07d}.png", nets, args)
            if rank == 0 and stage_over:
                save_pair(out / f"{GROWING[stage].removesuffix('_kimg')}.pt", pair, role, args)
            if done % args.save_every == 0 or stage_over or last or due(done) or signal_number:
                save(done)
            if due(done) or (last and args.eval_every and inception):
                score(done)
                save(done)
            if signal_number:
                name = signal.Signals(signal_number).name
                say(f"stopped by {name} after step {done}, saved; go on: --out {out} --resume")
                sys.exit(128 + signal_number)
            since = since[0] + time.perf_counter() - interrupted, since[1]

    inputs = [torch.randn(1, args.style_dim, device=device)]
    teacher["g"].to(device)
    models.write_summary(args, max(first_step, last_step), teacher["g"], student["g"], inputs, record["scores"])


def build_pair(args, g_width, d_width):
    if args.size not in SIZES:  # a teacher file may bring any
        raise InputError(f"--size {args.size}: expected one of {', '.join(map(str, SIZES))}")
    G = StyleGAN2Generator(args.size, args.style_dim, args.n_mlp, args.channel_multiplier, g_width)
    D = StyleGAN2Discriminator(args.size, args.channel_multiplier, d_width)
    return dict(g=G, d=D, g_ema=copy.deepcopy(G), path=PathLengthPenalty(decay=0.01))


def lazy_adam(net, lr, every):
    """Adam for a network whose penalty has a step of its own after every so many steps, or never (None).

    k + 1 steps then do the work of k: lr * c and beta ** c with c = k / (k + 1) keep the pace (StyleGAN2, appendix B).
    """
    c = every / (every + 1) if every else 1.0
    return torch.optim.Adam(net.parameters(), lr=lr * c, betas=(0.0, 0.99**c), fused=True)


def latents(G, n, args):
    """w of n images, (n, layers, style_dim); with probability --style-mixing of two z, mixed at a random layer."""
    count = 1 + int(torch.rand(()) < args.style_mixing)
    return G.mapping(torch.randn(count, n, args.style_dim, device=next(G.parameters()).device).unbind())


def evaluate(nets, real, inception, args):
    """{"fid_teacher": .., "fid_student": ..}: Fréchet distances of each net's images to the real ones' statistics."""
    scores = {}
    for name, net in nets.items():
        fake = generated_stats(draw(net, args), inception)
        scores[f"{inception.key}_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


@torch.no_grad()
def draw(G, args):
    """Yields this process's share of --eval-images images, from the same latents and noise every time."""
    device = next(G.parameters()).device
    rank, world = processes()
    for start in range(rank * args.batch_size, args.eval_images, args.batch_size * world):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed + start)
            z = torch.randn(min(args.batch_size, args.eval_images - start), args.style_dim, device=device)
            images = G(z)
        yield images


@torch.no_grad()
def save_samples(path, nets, args):
    """Two rows of images from each net, of the same latents and noise every time."""
    columns = max(2, min(8, 2048 // args.size))
    z = torch.randn(2 * columns, args.style_dim, generator=torch.Generator().manual_seed(args.seed))
    blocks = {}
    for name, net in nets.items():
        parts = z.to(next(net.parameters()).device).split(columns)
        blocks[name] = torch.cat([net(part, noise="fixed") for part in parts])
    models.save_grid(path, blocks, columns)


def read_pair(path, role):
    """A trained pair, {g, d, g_ema}, or the one with that role in a checkpoint.pt of ours -> it, its options."""
    content = models.load_file(path)
    names = dict(size="size", latent="style_dim", n_mlp="n_mlp", channel_multiplier="channel_multiplier")
    names |= dict(width=f"{role}_width") | (dict(d_width="student_d_width") if role == "student" else {})
    if "script" in content:
        content = models.load_checkpoint(path, NAME)
        prefix, nets = f"{role}_", content["networks"]
        pair = {name.removeprefix(prefix): weights for name, weights in nets.items() if name.startswith(prefix)}
        return pair, {name: content["args"][name] for name in names.values()}
    known = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    return content, {name: known[key] for key, name in names.items() if key in known}


def load_pair(path, role, networks, needed):
    """Loads a pair into networks of the names g, d, g_ema -> the names that were found; InputError for needed ones."""
    content, _ = read_pair(path, role)
    for name in needed:
        if name not in content:
            found = ", ".join(list(content)[:5]) or "nothing"
            raise InputError(f"{path}: has no {name!r}, expected the state dicts g, d and g_ema, found {found}")
    found = [name for name in networks if name in content]
    for name in found:
        models.load_weights(networks[name], content[name], f"{path}, {name} with this --size and these widths")
    return found


def save_pair(path, pair, role, args):
    """Writes a trained pair as the community does: {g, d, g_ema, args}; --teacher and --student read it."""
    content = {}
    for name, net in pair.items():
        content[name] = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    widths = (args.teacher_width,) * 2 if role == "teacher" else (args.student_width, args.student_d_width)
    sizes = dict(size=args.size, latent=args.style_dim, n_mlp=args.n_mlp, channel_multiplier=args.channel_multiplier)
    content["args"] = argparse.Namespace(**sizes, width=widths[0], d_width=widths[1])
    models.write_atomically(path, lambda file: torch.save(content, file))


# ----------------------------------------------------------------------------------------------------------------------
# Data


@functools.lru_cache(maxsize=4)
def shuffled(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


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


# What --toy changes; any flag on the command line wins over it.
TOY = dict(size=32, teacher_width=1 / 32, student_width=1 / 64, student_d_width=1 / 32, style_dim=64, n_mlp=4)
TOY |= dict(teacher_kimg=9.0, stage1_kimg=7.0, stage2_kimg=4.0, batch_size=8, lr=0.01, r1_gamma=4.0, path_every=8)
TOY |= dict(ema_kimg=0.5, mirror=True, inception="none", eval_every=0, log_every=100, sample_every=500)
TOY |= dict(save_every=500, workers=0)


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
# Plumbing, the same in the training scripts: a run's options, signals


def fail(error):
    """Bad input: one line on stderr, exit status 2."""
    line = str(error).strip().splitlines()[-1].rsplit("InputError: ", 1)[-1]  # a worker's has its traceback before it
    print(f"{Path(__file__).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


def add_run_options(parser, unit, eval_every, auto):
    group = parser.add_argument_group("run")
    at, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    at("--out", metavar="FOLDER", help=f"where everything is written, runs/{NAME}_DATA if it is not given")
    either("--resume", action="store_true", help="go on from OUT/checkpoint.pt; a larger budget extends the run")
    either("--overwrite", action="store_true", help="replace the run that OUT holds")
    at("--seed", type=at_least(0), default=0, help="of all random numbers")
    at("--device", default="auto", help="auto, cpu, cuda")
    at("--amp", choices=("auto", "bf16", "off"), default="auto", help=f"mixed precision, auto is {auto}")
    at("--compile", action="store_true", help="compile the training steps with torch.compile")
    at("--workers", type=at_least(0), default=4, help="data loader processes")
    at("--max-steps", type=at_least(1), help="stop after so many steps; schedule and budgets stay")
    at("--log-every", type=at_least(1), default=100, help="steps between log lines")
    at("--sample-every", type=at_least(0), default=1000, help="steps between sample grids, 0: none")
    at("--save-every", type=at_least(1), default=1000, help="steps between checkpoints")
    at("--eval-every", type=at_least(0), default=eval_every, help=f"{unit} between evaluations, 0: none")
    at("--inception", default="auto", help="FID Inception: auto (is downloaded), random, none, or a weight file")
    parser.set_defaults(extended=[])


FREE = "data cache vgg inception out resume overwrite device workers compile max_steps".split()
FREE += "log_every sample_every save_every eval_every".split()


def read_checkpoint(parser, argv):
    """OUT/checkpoint.pt -> (arguments completed from it, checkpoint).

    FREE options may differ from the run's own, but no random features from trained ones; the budgets GROWING may be
    larger; anything else is refused.
    """
    out = parser.parse_args(argv).out
    checkpoint = models.load_checkpoint(Path(out, "checkpoint.pt"), NAME)
    saved = checkpoint["args"] | dict(overwrite=False, out=out, max_steps=None)
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    changed = {k: v for k, v in vars(args).items() if v != saved.get(k)}
    changed = {k: v for k, v in changed.items() if k not in FREE or "random" in (v, saved.get(k))}
    grown = {k: v for k, v in changed.items() if k in GROWING and v > saved[k]}
    refused = [
        f"--{k.replace('_', '-')} {v} (the run has {saved.get(k)})" for k, v in changed.items() if k not in grown
    ]
    if refused:
        raise InputError(f"{out}: the checkpoint contradicts {', '.join(refused)}; drop that or start a new run")
    if grown:
        args.extended = saved["extended"] + [dict(step=checkpoint["step"], extended=grown)]
    return args, checkpoint


stop_signals = []


def on_signal(number, _frame):
    """The first SIGINT or SIGTERM lets the step finish and the run be saved; a later one ends it at once."""
    if stop_signals and time.monotonic() - stop_signals[0][1] > 1:  # torchrun passes on what the group has got
        os._exit(128 + number)
    if not stop_signals:
        os.write(2, b"finishing the step and saving; again to quit without\n")
    stop_signals.append((number, time.monotonic()))


def stop_asked():
    """The signal that this process or another got, as a number; 0: none."""
    number = torch.tensor(stop_signals[0][0] if stop_signals else 0)
    if processes()[1] > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def main(argv=None):
    try:
        train(*parse_args(argv))
    except (InputError, fid.InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:  # before the loop
        sys.exit(130)
    finally:
        stop_signals.clear()
        models.end_processes()


if __name__ == "__main__":
    main()
