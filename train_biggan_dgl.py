"""Compresses BigGAN with DGL-GAN: the teacher's discriminator guides a narrow student (arXiv 2112.06502).

The student generator G_S has two judges: its own discriminator D_S, trained with it, and the discriminator D_T of a
trained teacher, frozen. Both know the class of an image. Stage 0 trains the teacher if none is given; stage 1 trains
the student pair from scratch as a plain BigGAN; stage 2 goes on from there with D_T's term. With --student-ch 96 and
--student-d-ch 96 the method improves an uncompressed BigGAN.

    python train_biggan_dgl.py --toy                                                   # no data needed, minutes
    python train_biggan_dgl.py --data imagenet/train --teacher D.pth G_ema.pth         # the paper's: stages 1 and 2
    python train_biggan_dgl.py --data images.zip                                       # stages 0, 1 and 2
    torchrun --nproc_per_node 8 train_biggan_dgl.py --data imagenet/train --teacher D.pth G_ema.pth --batch-size 32
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
from losses import Meter, discriminator_loss, finish_step, generator_loss, update_ema
from models import BigGANDiscriminator, BigGANGenerator, InputError, init_biggan, processes, say

NAME = "biggan_dgl"
STAGES = ("the teacher", "the student alone", "the student, guided by D_T")
BUDGETS = ("teacher_kimg", "stage1_kimg", "stage2_kimg")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments and, when resuming, the checkpoint."""
    parser = models.run_parser(__doc__)
    option, number = models.add_section(parser, "data")
    option("--data", metavar="IMAGES", help="a folder a class, in a folder or .zip; with --resume if it has moved")
    option("--size", type=int, choices=(32, 64, 128, 256), default=128, help="side of the images, pixels")
    option("--mirror", action=argparse.BooleanOptionalAction, default=False, help="flip half of the images, at random")
    option("--cache", metavar="FOLDER", help="for the resized images, 3 SIZE^2 bytes each; if not given OUT")
    option("--toy", action="store_true", help="small networks; without --data synthetic pictures, four shapes")
    option, number = models.add_section(parser, "networks; what files of ours store wins")
    option("--teacher", nargs="+", metavar="FILE", help="trained D [G_ema], or a teacher.pt of ours")
    option("--student", nargs=1, metavar="FILE", help="a stage1.pt or stage2.pt of ours to start from")
    number("--teacher-ch", 96, "channel multiplier of the teacher's networks")
    number("--student-ch", 48, "channel multiplier of the student's generator")
    number("--student-d-ch", 96, "channel multiplier of the student's discriminator")
    number("--dim-z", 120, "length of the latent; rounded down to fit the blocks", minimum=8)
    number("--shared-dim", 128, "length of the class embedding; 0: a table in every norm", minimum=0)
    option("--hierarchical", action=argparse.BooleanOptionalAction, default=True, help="every block gets a part of z")
    option("--attention", type=int, choices=(0, 16, 32, 64, 128), default=64, help="side of maps with attention, or 0")
    option("--init", choices=("orthogonal", "normal"), default="orthogonal", help="of the weights; normal: N(0, 0.02)")
    option, number = models.add_section(parser, "method")
    number("--teacher-kimg", 280000.0, "stage 0, thousand real images; 0 with --teacher")
    number("--stage1-kimg", 280000.0, "stage 1, thousand real images; 0 with --student")
    number("--stage2-kimg", 280000.0, "stage 2, thousand real images")
    number("--lambda-dgl", 0.1, "stage 2: weight of D_T's term")
    number("--ema-decay", 0.9999, "of G's moving average, a step")
    number("--ema-start", 20000, "steps of a pair before which the average is a copy", minimum=0)
    option, number = models.add_section(parser, "optimisation")
    number("--batch-size", 256, "images per process and micro-batch")
    number("--accumulate", 8, "micro-batches whose gradients make one update, of G and D")
    number("--d-steps", 1, "updates of D for each of G")
    number("--lr", 1e-4, "learning rate of G")
    number("--d-lr", 4e-4, "learning rate of D")
    number("--adam-eps", 1e-6, "epsilon of Adam")
    number("--eval-images", 50000, "images that G's moving average draws for FID and IS", minimum=20)
    models.add_run_options(parser, unit="thousand images", eval_every=2000, auto=", and bf16 where the device has it")
    parser.set_defaults(log_every=10, sample_every=250, save_every=100)  # a step has 2048 images

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
    files, classes, labels = open_data(args, checkpoint)

    def to_device(images):
        """uint8 on the host -> [-1, 1] on the device."""
        return images.to(device, memory_format=layout, non_blocking=True).float() / 127.5 - 1

    # Networks: a pair is G and D, with G's moving average. What is given keeps its file's configuration,
    # which read_pairs copies into args: a student is built as its teacher
    records = checkpoint["networks"] if checkpoint else models.read_pairs(args)
    for name in ("teacher_d", "student_d"):
        if name in records:
            check_classes(records[name].get("facts", {}).get("classes"), classes, name)
    torch.manual_seed(args.seed)
    teacher = build_pair(args, args.teacher_ch, args.teacher_ch, classes)
    student = build_pair(args, args.student_ch, args.student_d_ch, classes)
    networks = {f"student_{name}": net for name, net in student.items()}
    for name, net in teacher.items():  # of a given teacher what its files hold: D alone is needed
        if args.teacher_kimg or f"teacher_{name}" in records:
            networks[f"teacher_{name}"] = net
    models.load_networks(networks, records)
    for net in networks.values():
        net.to(device, memory_format=layout).requires_grad_(False)
    models.broadcast_weights(networks.values())
    measures_fid = args.eval_every and args.inception != "none"
    inception = fid.load_inception(args.inception, device) if measures_fid else None

    # Data
    images = StoredSquares(files, args.size, args.cache or out, args.workers, Image.Resampling.BILINEAR)
    dataset = LabelledImages(images, labels, args.mirror, args.seed)

    # Steps count through all stages; one shows D so many micro-batches of real images, and G makes one update
    micro_batches = args.d_steps * args.accumulate
    step_images = args.batch_size * micro_batches * world
    stage_steps = [math.ceil(getattr(args, budget) * 1000 / step_images) for budget in BUDGETS]
    stage_ends = list(itertools.accumulate(stage_steps))
    eval_steps = math.ceil(args.eval_every * 1000 / step_images)

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
    say(f"{out}: steps {first_step} to {last_step} of {stage_ends[-1]}, {step_images} images each, {world} x {device}")

    models.defer_signals()
    pace = models.Pace(step_images, first_step, last_step)
    for stage, (stage_start, stage_end) in enumerate(itertools.pairwise([0, *stage_ends])):
        steps = range(max(first_step, stage_start) + 1, min(stage_end, last_step) + 1)
        if not steps:  # the stage is over, or --max-steps ends before it
            continue
        say(f"stage {stage}, {STAGES[stage]}: to step {stage_end}")
        pair = teacher if stage == 0 else student
        teacher_D = teacher["d"]
        teacher_D.train(stage == 0)  # then it is frozen: in train mode its spectral vectors would move
        G, D, G_ema = pair["g"], pair["d"], pair["g_ema"]
        adam = functools.partial(torch.optim.Adam, betas=(0.0, 0.999), eps=args.adam_eps, fused=True)
        optimizer_G = adam(G.parameters(), lr=args.lr)
        optimizer_D = adam(D.parameters(), lr=args.d_lr)
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
            # Discriminator: E[ max(0, 1 - D(x, y)) ] + E[ max(0, 1 + D(G(z, y'), y')) ]
            D.requires_grad_(True)
            for _ in range(args.d_steps):
                optimizer_D.zero_grad()
                for _ in range(args.accumulate):
                    real, real_y = next(batches)
                    real, real_y = to_device(real), real_y.to(device, non_blocking=True)
                    z, fake_y = draw_inputs(G, args.batch_size)
                    with autocast():
                        with torch.no_grad():
                            fake = G(z, fake_y)
                        logits = D(torch.cat([fake, real]), torch.cat([fake_y, real_y]))
                        fake_logits, real_logits = logits.split(args.batch_size)
                    loss_D = discriminator_loss(real_logits, fake_logits, "hinge")
                    (loss_D / args.accumulate).backward()
                    meter.add(D=loss_D, D_real=real_logits.float().mean(), D_fake=fake_logits.float().mean())
                finish_step(optimizer_D)

            # Generator: -E[ D(G(z, y), y) ], in stage 2 - lambda_dgl E[ D_T(G(z, y), y) ], D_T being frozen
            D.requires_grad_(False)
            optimizer_G.zero_grad()
            for _ in range(args.accumulate):
                z, y = draw_inputs(G, args.batch_size)
                with autocast():
                    fake = G(z, y)
                    loss_G = generator_loss(D(fake, y), "hinge")
                    meter.add(G=loss_G)
                    if stage == 2:
                        loss_dgl = generator_loss(teacher_D(fake, y), "hinge")
                        loss_G = loss_G + args.lambda_dgl * loss_dgl
                        meter.add(G_dgl=loss_dgl)
                (loss_G / args.accumulate).backward()
            finish_step(optimizer_G)

            # The moving average is a copy for the first steps of a pair; a student that is given has had them
            pair_step = step - 1 - (stage_ends[0] if stage else 0)
            averaging = pair_step >= args.ema_start or (stage and args.student)
            decay = args.ema_decay if averaging else 0.0
            update_ema(G_ema, G, decay, buffers=True)

            # Log
            last, stage_over = step == last_step, step == stage_end
            if step % args.log_every == 0 or stage_over or last:
                entry = dict(step=step, stage=stage, kimg=step * step_images / 1000, images=step * step_images)
                models.log(args, entry | pace.read(step) | meter.means())
                meter = Meter()

            # Samples
            if rank == 0 and args.sample_every and (step % args.sample_every == 0 or stage_over or last):
                save_samples(out / f"samples/stage{stage}_{step:07d}.png", generators, classes, args.seed)

            # Save, before the evaluation, which takes long. After a signal stop here, without evaluating
            stop_signal = models.stop_asked()
            due = inception is not None and (step % eval_steps == 0 or stage_over or last)
            if stage_over:
                name = BUDGETS[stage].removesuffix("_kimg")
                models.save(out / f"{name}.pt", pair)
            if step % args.save_every == 0 or due or stage_over or last or stop_signal:
                models.broadcast_weights(networks.values())  # running statistics: an evaluation draws with rank 0's
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
        y = torch.zeros(1, dtype=torch.long, device=device)
        calls = {}
        for name in ("teacher_g_ema", "student_g_ema"):
            if name in networks:
                G = networks[name]
                calls[name.removesuffix("_g_ema")] = (G, torch.randn(1, G.dim_z, device=device), y)
        models.write_summary(out, last_step, scores, calls)


def build_pair(args, g_ch, d_ch, classes):
    attention, shared_dim = args.attention or None, args.shared_dim or None
    G = BigGANGenerator(args.size, g_ch, len(classes), args.dim_z, shared_dim, args.hierarchical, attention)
    D = BigGANDiscriminator(args.size, d_ch, len(classes), attention)
    for net in (G, D):
        init_biggan(net, args.init == "orthogonal")
        net.facts = dict(classes=classes)  # stored with the weights
    return dict(g=G, d=D, g_ema=copy.deepcopy(G).eval())


def check_classes(known, classes, name):
    """InputError if the classes that the network of that name has learnt (None: unknown) are not those of the data."""
    if known is None:
        say(f"{name}: names no classes; they are taken as 0 {classes[0]}, 1 {classes[1]}, .. {classes[-1]}")
        return
    for number, (theirs, ours) in enumerate(itertools.zip_longest(known, classes)):
        if theirs != ours:
            raise InputError(f"{name}: its class {number} is {theirs!r}, in --data {ours!r}: labels would be mixed up")


def draw_inputs(G, n):
    """Latents and random classes of n images."""
    device = next(G.parameters()).device
    z = torch.randn(n, G.dim_z, device=device)
    y = torch.randint(G.config["n_classes"], (n,), device=device)
    return z, y


def evaluate(generators, images, inception, to_device, args):
    """{"fid_NAME": .., "is_NAME": ..}: Fréchet distances of each generator's images to the real ones' statistics, and
    Inception scores."""

    def reals():
        return map(to_device, models.share_batches(images, 32, args.workers))

    kept = Path(args.out, images.path.stem)
    real = kept_stats(kept, reals, inception)
    scores = {}
    for name, G in generators.items():
        fake, (score, _) = generated_stats(draw(G, args), inception, splits=10)
        scores[f"is_{name}"] = score
        scores[f"fid_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


@torch.no_grad()
def draw(G, args):
    """Yields this process's share of --eval-images images, from the same latents and classes every time."""
    device = next(G.parameters()).device
    rank, world = processes()
    for start in range(0, args.eval_images, args.batch_size * world):
        n = min(args.batch_size * world, args.eval_images - start)
        generator = torch.Generator().manual_seed(args.seed + start)
        z = torch.randn(n, G.dim_z, generator=generator)
        y = torch.randint(G.config["n_classes"], (n,), generator=generator)
        if rank < n:
            yield G(z[rank::world].to(device), y[rank::world].to(device))


@torch.no_grad()
def save_samples(path, generators, classes, seed):
    """A row for each class, of ten at the most, from each generator; the same latents every time."""
    labels = np.linspace(0, len(classes) - 1, min(10, len(classes))).round().astype(int).tolist()
    names = ", ".join(classes[label] for label in labels)
    blocks = {}
    for name, G in generators.items():
        device = next(G.parameters()).device
        z = torch.randn(8, G.dim_z, generator=torch.Generator().manual_seed(seed)).to(device)
        rows = [G(z, torch.full((8,), label, device=device)) for label in labels]
        blocks[f"{name}: {names}"] = torch.cat(rows)
    models.save_grid(path, blocks, columns=8)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(args, checkpoint):
    """The images' files, the names of the classes, and the class of each file; the toy's are written."""
    data = models.data_folder(args, checkpoint, write_toy_dataset)
    files = ImageFiles(data)
    say(files)
    return files, *find_classes(files)


def find_classes(files):
    """The names of the class folders in sorted order, and the class of each image: its first folder's number."""
    parts = [name.split("/") for name in files.names]
    while files.zipped:  # folders around all of it do not count
        tops = {part[0] for part in parts}
        if len(tops) > 1 or min(map(len, parts)) < 3:
            break
        parts = [part[1:] for part in parts]
    if min(map(len, parts)) < 2:
        name = files.names[[len(part) for part in parts].index(1)]
        raise InputError(f"{files.source}: {name} lies in no class folder, expected one folder for each class")
    classes = sorted({part[0] for part in parts})
    if len(classes) == 1:
        raise InputError(f"{files.source}: one class alone, {classes[0]}, expected a folder for each of two or more")
    numbers = {name: n for n, name in enumerate(classes)}
    return classes, [numbers[part[0]] for part in parts]


class LabelledImages(Dataset):
    """Item n of the training run: image and class, in an order shuffled for every pass through them, flipped at random.

    Order and flip depend on the seed and n alone, so a run that resumes at n sees what it would have seen.
    """

    def __init__(self, images, labels, mirror, seed):
        self.images, self.labels, self.mirror, self.seed = images, labels, mirror, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, n):
        epoch, k = divmod(n, len(self))
        index = int(models.shuffled(len(self), self.seed, epoch)[k])
        image = self.images[index]
        if self.mirror and np.random.default_rng([self.seed, n]).random() < 0.5:
            image = image.flip(2)
        return image, self.labels[index]


# What --toy changes; any flag on the command line wins over it.
TOY = dict(
    size=32,
    teacher_ch=6,
    student_ch=4,
    student_d_ch=6,
    dim_z=32,
    shared_dim=16,
    attention=0,
    teacher_kimg=5.6,
    stage1_kimg=6.4,
    stage2_kimg=1.6,
    batch_size=16,
    accumulate=1,
    lr=1.2e-3,
    d_lr=1.2e-3,
    adam_eps=1e-8,
    ema_decay=0.98,
    ema_start=50,
    inception="none",
    eval_every=0,
    workers=0,
    log_every=50,
    sample_every=200,
    save_every=500,
)


def write_toy_dataset(folder, size=32):
    """Classes: shapes in bright colours on dark ground, of many sizes, places and turns."""
    corners = dict(circle=40, moon=40, square=4, triangle=3)
    for label, (name, n) in enumerate(corners.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(100):
            rng = np.random.default_rng([label, i])
            scale = 4 * size  # drawn four times larger and filtered down: smooth edges
            ground = tuple(rng.integers(10, 60, 3).tolist())
            colour = np.roll([rng.integers(200, 256), rng.integers(60, 256), 60], label)
            image = Image.new("RGB", (scale, scale), ground)
            draw = ImageDraw.Draw(image)
            x, y = rng.uniform(0.42, 0.58, 2) * scale
            radius = rng.uniform(0.25, 0.36) * scale
            turn = rng.uniform(-15, 15)
            draw.regular_polygon((x, y, radius), n, turn, fill=tuple(colour.tolist()))
            if name == "moon":
                box = (x - 0.3 * radius, y - 0.9 * radius, x + 1.5 * radius, y + 0.9 * radius)
                draw.ellipse(box, fill=ground)
            image = image.resize((size, size), Image.Resampling.LANCZOS)
            image.save(folder / name / f"{i:03d}.png")


def main(argv=None):
    models.run_script(f"train_{NAME}", parse_args, train, argv)


if __name__ == "__main__":
    main()
