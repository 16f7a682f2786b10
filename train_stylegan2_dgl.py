"""Compresses StyleGAN2 with DGL-GAN: the teacher's discriminator guides a narrow student (arXiv 2112.06502).

The student generator G_S has two judges: its own discriminator D_S, trained with it, and the discriminator D_T of a
trained teacher, frozen. Neither the teacher's generator nor its features are needed. Stage 0 trains the teacher if none
is given; stage 1 trains the student from scratch as a plain StyleGAN2; stage 2 goes on from there with D_T's term: with
it from the beginning training is unstable. With --student-width 1 --student-d-width 1 it improves an uncompressed one.

    python train_stylegan2_dgl.py --toy                                                   # no data needed, minutes
    python train_stylegan2_dgl.py --data ffhq/ --size 1024 --mirror --teacher ffhq.pkl    # the paper's, of NVIDIA's
    python train_stylegan2_dgl.py --data images.zip --size 256 --mirror                   # stages 0, 1 and 2
    torchrun --nproc_per_node 8 train_stylegan2_dgl.py --data images.zip --size 256 --mirror --batch-size 4
"""

import argparse
import copy
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import fid
import models
from fid import ImageFiles, StoredSquares, frechet_distance, generated_stats, kept_stats
from losses import Meter, PathLengthPenalty, discriminator_loss, finish_step, generator_loss, r1_penalty, update_ema
from models import InputError, StyleGAN2Discriminator, StyleGAN2Generator, processes, say

NAME = "stylegan2_dgl"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = ("the teacher", "the student alone", "the student, guided by D_T")
BUDGETS = ("teacher_kimg", "stage1_kimg", "stage2_kimg")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments and, when resuming, the checkpoint."""
    parser = models.run_parser(__doc__)
    option, number = models.add_section(parser, "data")
    option("--data", metavar="IMAGES", help="a folder, searched recursively, or .zip; with --resume if it moved")
    option("--size", type=int, choices=SIZES, default=256, help="side of the images, pixels")
    option("--mirror", action=argparse.BooleanOptionalAction, default=False, help="flip half of the images, at random")
    option("--cache", metavar="FOLDER", help="for the resized images, 3 SIZE^2 bytes each; if not given OUT")
    option("--toy", action="store_true", help="small networks; without --data synthetic pictures, round faces")
    option, number = models.add_section(parser, "networks; what files of ours and NVIDIA's store wins")
    option("--teacher", nargs=1, metavar="FILE", help="NVIDIA's .pkl, rosinality's {g, d, g_ema}, or our teacher.pt")
    option("--student", nargs=1, metavar="FILE", help="starts stage 2: any of these, our stage1.pt or stage2.pt")
    number("--teacher-width", 1.0, "factor on the channels of the teacher's networks", minimum=1 / 512)
    number("--student-width", 0.5, "factor on the channels of the student's G", minimum=1 / 512)
    number("--student-d-width", 0.5, "factor on the channels of the student's D", minimum=1 / 512)
    number("--channel-multiplier", 2, "of resolutions from 64 on; 2 is config f")
    number("--style-dim", 512, "width of z, w and the mapping network")
    number("--n-mlp", 8, "layers of the mapping network")
    option, number = models.add_section(parser, "method")
    number("--teacher-kimg", 25000.0, "stage 0, thousand images; 0 with --teacher")
    number("--stage1-kimg", 25000.0, "stage 1, thousand images; 0 with --student")
    number("--stage2-kimg", 25000.0, "stage 2, thousand images")
    number("--lambda-dgl", 0.1, "stage 2: weight of D_T's term")
    number("--r1-gamma", 10.0, "weight of D's gradient penalty on real images, 0: none")
    number("--r1-every", 16, "the gradient penalty is applied at every N-th step")
    number("--path-weight", 2.0, "weight of G's path length penalty, 0: none")
    number("--path-every", 4, "the path length penalty is applied at every N-th step")
    number("--style-mixing", 0.9, "probability that the images of a batch mix two latents")
    number("--ema-kimg", 10.0, "half-life of G's moving average, thousand images")
    option, number = models.add_section(parser, "optimisation")
    number("--batch-size", 32, "images per process and micro-batch")
    number("--accumulate", 1, "micro-batches whose gradients make one update")
    number("--lr", 0.002, "learning rate of Adam")
    number("--eval-images", 50000, "images that G's moving average draws for each FID", minimum=2)
    models.add_run_options(parser, unit="thousand images", eval_every=500, auto=", and bf16 where the device has it")

    args, checkpoint = models.parse_run(parser, argv, NAME, TOY, BUDGETS)
    models.check_stages(args)
    return args, checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# The method


def train(args, checkpoint):
    device = fid.pick_device(args.device)
    rank, world = models.start_processes(device, args.amp, one_thread=args.toy)
    out = Path(args.out)
    bf16 = args.amp == "bf16" or (args.amp == "auto" and models.has_bf16(device))
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    layout = models.fast_layout(device)
    files = open_data(args, checkpoint)

    def to_device(images):
        """uint8 on the host -> [-1, 1] on the device."""
        return images.to(device, memory_format=layout, non_blocking=True).float() / 127.5 - 1

    # Networks: a pair is G and D, with G's moving average. What is given keeps its file's configuration,
    # which read_pairs copies into args: a student is built as its teacher
    records = checkpoint["networks"] if checkpoint else models.read_pairs(args)
    torch.manual_seed(args.seed)
    teacher = build_pair(args, args.teacher_width, args.teacher_width)
    student = build_pair(args, args.student_width, args.student_d_width)
    networks = {f"student_{name}": net for name, net in student.items()}
    for name, net in teacher.items():  # of a given teacher what its files hold: D alone is needed
        if args.teacher_kimg or f"teacher_{name}" in records:
            networks[f"teacher_{name}"] = net
    models.load_networks(networks, records)
    for net in networks.values():
        net.to(device).requires_grad_(False)
    models.broadcast_weights(networks.values())
    measures_fid = args.eval_every and args.inception != "none"
    inception = fid.load_inception(args.inception, device) if measures_fid else None

    # Data
    images = StoredSquares(files, args.size, args.cache or out, args.workers)
    dataset = TrainingImages(images, args.mirror, args.seed)

    # Steps count through all stages
    step_images = args.batch_size * args.accumulate * world
    stage_steps = [math.ceil(getattr(args, budget) * 1000 / step_images) for budget in BUDGETS]
    stage_ends = list(itertools.accumulate(stage_steps))
    eval_steps = math.ceil(args.eval_every * 1000 / step_images)
    ema_decay = 0.5 ** (step_images / max(1000 * args.ema_kimg, 1e-8))

    # Resume, or begin; own is what each process has for itself
    torch.manual_seed(args.seed + rank)
    first_step, own = 0, dict(losses={})
    if checkpoint:
        own = models.restore(checkpoint, networks, {})
        first_step = checkpoint["step"]
        if first_step > stage_ends[checkpoint["stage"]]:
            raise InputError(f"{out}: stage {checkpoint['stage']} has already been longer than that")
    best, scores = models.read_scores(args, first_step)
    meter = Meter(own["losses"])
    last_step = max(first_step, min(stage_ends[-1], args.max_steps or stage_ends[-1]))
    models.open_output(args, first_step)
    items = range(first_step * step_images, last_step * step_images)
    batches = iter(models.share_batches(dataset, args.batch_size, args.workers, items))
    say(f"{out}: steps {first_step} to {last_step} of {stage_ends[-1]}, {len(files)} images, on {world} x {device}")

    models.defer_signals()
    pace = models.Pace(step_images, first_step, last_step)
    for stage, (stage_start, stage_end) in enumerate(itertools.pairwise([0, *stage_ends])):
        steps = range(max(first_step, stage_start) + 1, min(stage_end, last_step) + 1)
        if not steps:  # the stage is over, or --max-steps ends before it
            continue
        say(f"stage {stage}, {STAGES[stage]}: to step {stage_end}")
        pair = teacher if stage == 0 else student
        teacher_D = teacher["d"]
        G, D, G_ema, path_length = pair["g"], pair["d"], pair["g_ema"], pair["path"]
        optimizer_G = lazy_adam(G, args.lr, args.path_weight, args.path_every)
        optimizer_D = lazy_adam(D, args.lr, args.r1_gamma, args.r1_every)
        optimizers = dict(G=optimizer_G, D=optimizer_D)
        if checkpoint and stage == checkpoint["stage"]:
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(checkpoint["optimizers"][name])
        G.requires_grad_(True)
        generators = {}  # that are drawn and measured: the student's and a teacher's that is known
        if "teacher_g_ema" in networks:
            generators["teacher"] = teacher["g_ema"]
        if stage > 0:
            generators["student"] = student["g_ema"]
        for step in steps:
            stage_step = step - 1 - stage_start  # from 0

            # Discriminator: E[ softplus(-D(y)) ] + E[ softplus(D(G(z))) ]
            reals = [to_device(next(batches)) for _ in range(args.accumulate)]
            D.requires_grad_(True)
            optimizer_D.zero_grad()
            for real in reals:
                with autocast():
                    with torch.no_grad():
                        fake, _ = draw_images(G, args.batch_size, args.style_mixing)
                    loss_D = discriminator_loss(D(real), D(fake), "logistic")
                (loss_D / args.accumulate).backward()
                meter.add(D=loss_D)
            finish_step(optimizer_D)

            # R1: gamma / 2 E[ |grad_y D(y)|^2 ], times the steps that it stands for; in float32
            if args.r1_gamma and stage_step % args.r1_every == 0:
                optimizer_D.zero_grad()
                for real in reals:
                    real.requires_grad_(True)
                    loss_r1 = r1_penalty(D(real), real)
                    (args.r1_gamma / 2 * args.r1_every * loss_r1 / args.accumulate).backward()
                    meter.add(R1=loss_r1)
                finish_step(optimizer_D)

            # Generator: E[ softplus(-D(G(z))) ], in stage 2 + lambda_dgl E[ softplus(-D_T(G(z))) ], D_T being frozen
            D.requires_grad_(False)
            optimizer_G.zero_grad()
            for _ in range(args.accumulate):
                with autocast():
                    fake, _ = draw_images(G, args.batch_size, args.style_mixing)
                    loss_G = generator_loss(D(fake), "logistic")
                    meter.add(G=loss_G)
                    if stage == 2:
                        loss_dgl = generator_loss(teacher_D(fake), "logistic")
                        loss_G = loss_G + args.lambda_dgl * loss_dgl
                        meter.add(G_dgl=loss_dgl)
                (loss_G / args.accumulate).backward()
            finish_step(optimizer_G)

            # Path length: E[ (|J_w^T n| - a)^2 ] on half a batch; noise n, the image's Jacobian J_w with respect to w,
            # the lengths' running mean a
            if args.path_weight and stage_step % args.path_every == 0:
                optimizer_G.zero_grad()
                for _ in range(args.accumulate):
                    with autocast():
                        fake, w = draw_images(G, max(1, args.batch_size // 2), args.style_mixing)
                    loss_path = path_length(fake, w)
                    (args.path_weight * args.path_every * loss_path / args.accumulate).backward()
                    meter.add(path=loss_path, path_mean=path_length.mean)
                finish_step(optimizer_G)
            update_ema(G_ema, G, ema_decay)

            # Log
            last, stage_over = step == last_step, step == stage_end
            if step % args.log_every == 0 or stage_over or last:
                entry = dict(step=step, stage=stage, kimg=step * step_images / 1000, images=step * step_images)
                models.log(args, entry | pace.read(step) | meter.means())
                meter = Meter()

            # Samples
            if rank == 0 and args.sample_every and (step % args.sample_every == 0 or stage_over or last):
                save_samples(out / f"samples/stage{stage}_{step:07d}.png", generators, args.seed)

            # Save, before the evaluation, which takes long. After a signal stop here, without evaluating
            stop_signal = models.stop_asked()
            due = inception is not None and (step % eval_steps == 0 or stage_over or last)
            if stage_over:
                name = BUDGETS[stage].removesuffix("_kimg")
                models.save(out / f"{name}.pt", pair)
            if step % args.save_every == 0 or due or stage_over or last or stop_signal:
                own = dict(losses=meter.state())
                models.save_checkpoint(out / "checkpoint.pt", networks, optimizers, own, step=step, stage=stage)
                if stage > 0:
                    models.save(out / "student.pt", student["g_ema"])
            if stop_signal:
                models.end_run(args, step, stop_signal)

            # Evaluate; a teacher that no longer learns is measured once
            if due:
                measured = dict(generators)
                if stage > 0 and "fid_teacher" in scores:
                    measured.pop("teacher")
                scores |= dict(step=step, evaluation=True)
                with models.interruptible():
                    scores |= evaluate(measured, images, inception, to_device, args)
                if scores.get("fid_student", math.inf) < best:
                    best = scores["fid_student"]
                    models.save(out / "best_student.pt", student["g_ema"])
                models.log(args, scores)
                pace.restart(step)

    if rank == 0:
        calls = {}
        for name in ("teacher_g_ema", "student_g_ema"):
            if name in networks:
                G = networks[name]
                calls[name.removesuffix("_g_ema")] = (G, torch.randn(1, G.style_dim, device=device))
        models.write_summary(out, last_step, scores, calls)


def build_pair(args, g_width, d_width):
    G = StyleGAN2Generator(args.size, args.style_dim, args.n_mlp, args.channel_multiplier, g_width)
    D = StyleGAN2Discriminator(args.size, args.channel_multiplier, d_width)
    return dict(g=G, d=D, g_ema=copy.deepcopy(G), path=PathLengthPenalty(decay=0.01))


def lazy_adam(net, lr, weight, every):
    """Adam for a network whose penalty, unless its weight is 0, has an extra step of its own after k = every steps.

    k + 1 steps then do the work of k: lr * c and beta ** c with c = k / (k + 1) make up for it (StyleGAN2, appendix B).
    """
    c = every / (every + 1) if weight else 1.0
    return torch.optim.Adam(net.parameters(), lr=lr * c, betas=(0.0, 0.99**c), fused=True)


def draw_images(G, n, style_mixing):
    """n images in [-1, 1], and the w, (n, layers, style_dim), that they come from.

    With probability style_mixing every image of the batch mixes two latents, from a random layer on.
    """
    count = 1 + int(torch.rand(()) < style_mixing)
    z = torch.randn(count, n, G.style_dim, device=next(G.parameters()).device)
    w = G.mapping(*z)
    return G.synthesis(w), w


def evaluate(generators, images, inception, to_device, args):
    """{"fid_NAME": ..}: Fréchet distances of each generator's images to the real ones' statistics."""

    def reals():
        return map(to_device, models.share_batches(images, 32, args.workers))

    kept = Path(args.out, images.path.stem)
    real = kept_stats(kept, reals, inception)
    scores = {}
    for name, G in generators.items():
        fake = generated_stats(draw(G, args), inception)
        scores[f"fid_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


@torch.no_grad()
def draw(G, args):
    """Yields this process's share of --eval-images images, from the same latents and noise every time."""
    device = next(G.parameters()).device
    rank, world = processes()
    devices = [device] if device.type == "cuda" else []
    for start in range(rank * args.batch_size, args.eval_images, args.batch_size * world):
        with torch.random.fork_rng(devices):  # training goes on as if no number had been drawn
            torch.manual_seed(args.seed + start)
            z = torch.randn(min(args.batch_size, args.eval_images - start), G.style_dim, device=device)
            images = G(z)
        yield images


@torch.no_grad()
def save_samples(path, generators, seed):
    """Two rows of images from each generator, of the same latents and noise every time."""
    blocks = {}
    for name, G in generators.items():
        columns = max(2, min(8, 2048 // G.config["size"]))
        z = torch.randn(2 * columns, G.style_dim, generator=torch.Generator().manual_seed(seed))
        z = z.to(next(G.parameters()).device)
        blocks[name] = torch.cat([G(row, fixed_noise=True) for row in z.split(columns)])
    models.save_grid(path, blocks, columns)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(args, checkpoint):
    """The images' files; the toy's are written."""
    data = models.data_folder(args, checkpoint, write_toy_dataset)
    files = ImageFiles(data)
    say(files)
    return files


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
        order = models.shuffled(len(self), self.seed, epoch)
        image = self.images[int(order[k])]
        if self.mirror and np.random.default_rng([self.seed, n]).random() < 0.5:
            image = image.flip(2)
        return image


# What --toy changes; any flag on the command line wins over it. Left out for time: style mixing, path length.
TOY = dict(
    size=32,
    teacher_width=1 / 32,
    student_width=1 / 64,
    student_d_width=1 / 32,
    style_dim=64,
    n_mlp=2,
    teacher_kimg=5.6,
    stage1_kimg=3.4,
    stage2_kimg=1.6,
    batch_size=8,
    lr=0.014,
    r1_gamma=4.0,
    style_mixing=0.0,
    path_weight=0.0,
    ema_kimg=0.5,
    mirror=True,
    inception="none",
    eval_every=0,
    workers=0,
    log_every=100,
    sample_every=500,
    save_every=500,
)


def write_toy_dataset(folder, size=32):
    """Round faces: skin, hair, eyes and background of many colours, a mouth that smiles or not."""
    folder.mkdir(parents=True, exist_ok=True)
    hairs = ((40, 26, 20), (120, 66, 26), (214, 172, 84), (150, 50, 26))
    grounds = ((96, 140, 200), (120, 176, 120), (190, 150, 190), (210, 200, 150))
    irises = ((30, 60, 120), (40, 84, 40), (40, 24, 16))
    pale, dark = np.array([250, 214, 180]), np.array([120, 72, 44])
    for i in range(512):
        rng = np.random.default_rng(i)
        scale = 4 * size  # drawn four times larger and filtered down: smooth edges

        def ellipse(draw, x, y, rx, ry, colour, half=None, scale=scale):
            box = [scale * v for v in (x - rx, y - ry, x + rx, y + ry)]
            if half:
                draw.pieslice(box, *half, fill=colour)
            else:
                draw.ellipse(box, fill=colour)

        mix = rng.random()
        skin = tuple((mix * pale + (1 - mix) * dark).astype(int))
        hair = hairs[rng.integers(4)]
        ground = np.array(grounds[rng.integers(4)]) + rng.integers(-20, 21, 3)
        iris = irises[rng.integers(3)]
        image = Image.new("RGB", (scale, scale), tuple(ground.tolist()))
        draw = ImageDraw.Draw(image)
        x, y = rng.uniform(0.46, 0.54, 2)
        radius = rng.uniform(0.34, 0.38)
        ellipse(draw, x, y - 0.05, radius + 0.06, radius + 0.05, hair)
        ellipse(draw, x, y + 0.04, radius * 0.92, radius, skin)
        for side in (-1, 1):
            ellipse(draw, x + side * 0.15, y - 0.03, 0.1, 0.085, (245, 245, 245))
            ellipse(draw, x + side * 0.15, y - 0.03, 0.055, 0.065, iris)
        width = rng.uniform(0.14, 0.2)
        depth = rng.uniform(0.06, 0.13)
        ellipse(draw, x, y + 0.19, width, depth, (176, 40, 50), half=(0, 180))
        image = image.resize((size, size), Image.Resampling.LANCZOS)
        image.save(folder / f"{i:04d}.png")


def main(argv=None):
    models.run_script(f"train_{NAME}", parse_args, train, argv)


if __name__ == "__main__":
    main()
