"""Compresses BigGAN with DGL-GAN: the teacher's discriminator guides a narrow student (arXiv 2112.06502).

The student generator G_S has two judges: its own discriminator D_S, trained with it, and the discriminator D_T of a
trained teacher, frozen. Both know the class of an image. Stage 0 trains the teacher if none is given; stage 1 trains
the student pair from scratch as a plain BigGAN; stage 2 goes on from there with D_T's term. With --student-ch 96 and
--student-d-ch 96 the method improves an uncompressed BigGAN.

    python train_biggan_dgl.py --toy                                                   # no data needed, minutes
    python train_biggan_dgl.py --data imagenet/train --teacher D.pth G_ema.pth         # the paper's: stages 1 and 2
    python train_biggan_dgl.py --data images.zip                                       # stages 0, 1 and 2
    torchrun --nproc_per_node 8 train_biggan_dgl.py --data imagenet/train --teacher D.pth G_ema.pth --batch-size 32
    python train_biggan_dgl.py --out runs/biggan_dgl_train --resume
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
from losses import LossMeter, discriminator_loss, generator_loss
from models import BigGANDiscriminator, BigGANGenerator, InputError, init_biggan, processes, say

NAME = "biggan_dgl"
GROWING = ("teacher_kimg", "stage1_kimg", "stage2_kimg")  # what --resume may enlarge
STAGES = ("teacher", "student alone", "student with the teacher's discriminator")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments, and the checkpoint when resuming: options that are not given are then the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=models.HelpFormatter)
    parser.error = fail
    at = parser.add_argument_group("data").add_argument
    at("--data", metavar="IMAGES", help="a folder, or a .zip, with one folder of images for each class")
    at("--size", type=int, choices=(32, 64, 128, 256), default=128, help="side of the images, pixels")
    at("--mirror", action=argparse.BooleanOptionalAction, default=False, help="flip half of the images, at random")
    at("--cache", metavar="FOLDER", help="where the resized images are kept, 3 SIZE^2 bytes each; OUT")
    at("--toy", action="store_true", help="small networks on a synthetic data set: shapes of six classes")
    at = parser.add_argument_group("networks").add_argument
    at("--teacher", nargs="+", metavar="FILE", help="trained D [G_ema], state dicts; or a teacher.pt or checkpoint.pt")
    at("--student", metavar="FILE", help="a stage1.pt, stage2.pt or checkpoint.pt of ours to start from")
    at("--teacher-ch", type=at_least(1), default=96, help="channel multiplier of the teacher's networks")
    at("--student-ch", type=at_least(1), default=48, help="of the student's generator")
    at("--student-d-ch", type=at_least(1), default=96, help="of its discriminator")
    at("--dim-z", type=at_least(8), default=120, help="length of the latent; rounded down to fit the blocks")
    at("--shared-dim", type=at_least(0), default=128, help="length of the class embedding; 0: a table in every norm")
    at("--hierarchical", action=argparse.BooleanOptionalAction, default=True, help="every block gets a part of z")
    at("--attention", type=at_least(0), default=64, help="side of the maps with an attention layer, 0: none")
    at("--init", choices=("orthogonal", "normal"), default="orthogonal", help="of the weights; normal: N(0, 0.02)")
    at("--sn-eps", type=at_least(0.0), default=1e-6, help="epsilon of the spectral norm")
    at = parser.add_argument_group("method").add_argument
    at("--teacher-kimg", type=at_least(0.0), default=280000.0, help="stage 0, thousand real images; 0 with --teacher")
    at("--stage1-kimg", type=at_least(0.0), default=280000.0, help="stage 1, thousand real images; 0 with --student")
    at("--stage2-kimg", type=at_least(0.0), default=280000.0, help="stage 2, thousand real images")
    at("--lambda-dgl", type=at_least(0.0), default=0.1, help="stage 2: weight of D_T's term")
    at("--ema-decay", type=at_least(0.0), default=0.9999, help="of G's moving average, a step")
    at("--ema-start", type=at_least(0), default=20000, help="steps of a pair before which the average is a copy")
    at = parser.add_argument_group("optimisation").add_argument
    at("--batch-size", type=at_least(1), default=256, help="images per process and micro-batch")
    at("--accumulate", type=at_least(1), default=8, help="micro-batches whose gradients make one update, of G and D")
    at("--d-steps", type=at_least(1), default=1, help="updates of D for each of G")
    at("--lr", type=at_least(0.0), default=1e-4, help="learning rate of G")
    at("--d-lr", type=at_least(0.0), default=4e-4, help="learning rate of D")
    at("--adam-eps", type=at_least(0.0), default=1e-6, help="epsilon of Adam")
    at("--eval-images", type=at_least(20), default=50000, help="images that G's moving average draws for FID and IS")
    add_run_options(parser, unit="thousand images", eval_every=2000, auto="bf16 on CUDA")
    parser.set_defaults(log_every=10, sample_every=250, save_every=100)  # a step has 2048 images

    args = parser.parse_args(argv)
    if not (args.data or args.toy or (args.resume and args.out)):
        fail("--data is missing: a folder or .zip with a folder for each class (--toy needs none)")
    parser.set_defaults(**TOY if args.toy else {})
    parser.set_defaults(out=args.out or f"runs/{NAME}_{Path(args.data).resolve().stem if args.data else 'toy'}")
    if args.teacher and not args.resume:  # what is given need not be trained; files of ours bring their networks along
        parser.set_defaults(**read_pair(args.teacher, "teacher")[1], teacher_kimg=0.0)
    if args.student and not args.resume:
        parser.set_defaults(**read_pair([args.student], "student")[1], stage1_kimg=0.0)
    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        args, checkpoint = read_checkpoint(parser, argv)
    if not (args.teacher_kimg or args.stage1_kimg or args.stage2_kimg):
        fail("--teacher-kimg, --stage1-kimg and --stage2-kimg are all 0: nothing to train")
    if args.teacher and args.teacher_kimg:
        fail(f"--teacher {args.teacher[0]} is trained already: leave out --teacher-kimg {args.teacher_kimg:g}")
    if args.stage2_kimg and not (args.teacher or args.teacher_kimg):
        fail(
            "stage 2 needs a teacher: give --teacher FILE or a --teacher-kimg, or leave out stage 2: --stage2-kimg 0; "
            "to go on from a run without one, start another with --student OUT/stage1.pt"
        )
    if args.hierarchical and not args.shared_dim:
        fail("--hierarchical needs --shared-dim: without a shared embedding give --no-hierarchical")
    if args.attention and min(args.teacher_ch, args.student_ch, args.student_d_ch) < 8:
        fail("--attention needs channel multipliers of 8 or more, or give --attention 0")
    if args.attention and (args.attention > args.size // 2 or args.attention not in (16, 32, 64, 128)):
        fail(f"--attention {args.attention}: no maps of that side in both networks at --size {args.size}, 0 is none")
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
    classes, labels = find_classes(files)
    data_facts = gather(files.survey(say, args.size) if rank == 0 else None)[0]

    # Networks
    torch.manual_seed(args.seed)
    teacher = build_pair(args, args.teacher_ch, args.teacher_ch, len(classes))
    student = build_pair(args, args.student_ch, args.student_d_ch, len(classes))
    known = teacher.keys() if args.teacher_kimg else ()
    if checkpoint:
        known = [name for name in teacher if f"teacher_{name}" in checkpoint["networks"]]
    elif args.teacher:
        known = load_pair(args.teacher, "teacher", {name: teacher[name] for name in ("d", "g_ema")}, ["d"])
    if args.student and not checkpoint:
        load_pair([args.student], "student", student, ["g", "d", "g_ema"])
    networks = {f"teacher_{name}": teacher[name] for name in known}
    networks |= {f"student_{name}": net for name, net in student.items()}
    for net in networks.values():
        net.to(device, memory_format=torch.channels_last).requires_grad_(False)
    models.share_weights(networks.values())
    inception = fid.load_inception(args.inception, device) if args.eval_every and args.inception != "none" else None

    # Stages; steps count through them all. A step shows D so many micro-batches of real images, and G makes one update.
    micro_batches = args.d_steps * args.accumulate
    step_images = args.batch_size * world * micro_batches

    def stage_ends(options):
        return [*itertools.accumulate(math.ceil(options[name] * 1000 / step_images) for name in GROWING)]

    ends = stage_ends(vars(args))
    last_step = min(ends[-1], args.max_steps or ends[-1])
    eval_steps = math.ceil(args.eval_every * 1000 / step_images)
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
    images = StoredSquares(files, args.size, args.cache or out, say, args.workers, Image.Resampling.BILINEAR)
    dataset = LabelledImages(images, labels, args.mirror, args.seed)
    numbers = range(first_step * micro_batches, last_step * micro_batches)
    batches = models.run_batches(dataset, args.batch_size, numbers, args.workers)

    @functools.cache
    def real_stats():
        return generated_stats(map(to_device, models.share_batches(images, 32, args.workers)), inception)

    def save(step):
        meter.means(step)  # stops here rather than save a run that has diverged
        models.share_weights(networks.values())  # running statistics and spectral vectors: rank 0's
        facts = dict(script=NAME, args=vars(args), data=data_facts, step=step) | record
        models.save_checkpoint(out / "checkpoint.pt", networks, optimizers, dict(losses=meter.state()), **facts)
        if rank == 0 and step > ends[0]:
            models.save_generator(out / "student.pt", student["g_ema"], classes=classes)

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
                models.save_generator(out / "best_student.pt", student["g_ema"], classes=classes)
            record.update(best=min(distance, record["best"]), evaluated=step)

    say(f"{out}: steps {first_step} to {last_step} of {ends[-1]}, {len(files)} images of {len(classes)} classes")
    say(f"{step_images} real images a step, on {world} x {device}")
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
        G, D, G_ema = pair.values()
        optimizers |= dict(G=adam(G, args.lr, args.adam_eps), D=adam(D, args.d_lr, args.adam_eps))
        if checkpoint and stage_start < first_step:
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(checkpoint["optimizers"][name])
        if stage > 0:
            networks.pop("teacher_g", teacher["g"]).cpu()  # has served
            teacher["d"].eval()  # a frozen D_T: in train mode its spectral vectors would move
        generate, judge, teacher_judge = G, D, teacher["d"]
        if args.compile:
            generate, judge, teacher_judge = map(torch.compile, (generate, judge, teacher_judge))
        say(f"stage {stage} ({STAGES[stage]}): {getattr(args, GROWING[stage]):g} thousand images, to step {stage_end}")
        since = time.perf_counter(), steps[0] * step_images
        for step in steps:
            # Discriminator: E[ max(0, 1 - D(x, y)) ] + E[ max(0, 1 + D(G(z, y'), y')) ]
            D.requires_grad_(True)
            for _ in range(args.d_steps):
                optimizers["D"].zero_grad()
                for _ in range(args.accumulate):
                    real, real_y = next(batches)
                    z, fake_y = draw_inputs(G, args.batch_size)
                    with autocast():
                        with torch.no_grad():
                            fake = generate(z, fake_y)
                        both = torch.cat([fake, to_device(real)]), torch.cat([fake_y, real_y.to(device)])
                        fake_logits, real_logits = judge(*both).split(args.batch_size)
                    loss_D = discriminator_loss(real_logits, fake_logits, "hinge")
                    (loss_D / args.accumulate).backward()
                    meter.add(D=loss_D, D_real=real_logits.float().mean(), D_fake=fake_logits.float().mean())
                models.average_gradients(optimizers["D"])
                optimizers["D"].step()

            # Generator: -E[ D(G(z, y), y) ], in stage 2 - lambda_dgl E[ D_T(G(z, y), y) ], D_T being frozen
            D.requires_grad_(False)
            G.requires_grad_(True)
            optimizers["G"].zero_grad()
            for _ in range(args.accumulate):
                z, y = draw_inputs(G, args.batch_size)
                with autocast():
                    fake = generate(z, y)
                    objective = loss_G = generator_loss(judge(fake, y), "hinge")
                    if stage == 2:
                        loss_dgl = generator_loss(teacher_judge(fake, y), "hinge")
                        objective = loss_G + args.lambda_dgl * loss_dgl
                        meter.add(G_dgl=loss_dgl)
                (objective / args.accumulate).backward()
                meter.add(G=loss_G)
            models.average_gradients(optimizers["G"])
            optimizers["G"].step()
            G.requires_grad_(False)
            started = step >= args.ema_start + (ends[0] if stage else 0) or (stage and args.student)
            models.update_ema(G_ema, G, args.ema_decay if started else 0.0, buffers=True)

            # Log, samples, checkpoint, evaluation
            done, signal_number = step + 1, stop_asked()
            last, stage_over = done == last_step, done == stage_end
            if done % args.log_every == 0 or stage_over or last:
                kimg, stage_kimg = (n * step_images / 1000 for n in (done, done - stage_start))
                entry = dict(
                    step=done, stage=stage, kimg=kimg, stage_kimg=stage_kimg, images=done * step_images, lr=args.lr
                )
                progress = f"stage {stage}  kimg {kimg:.1f} ({stage_kimg:.1f} in the stage)"
                cut = done % args.log_every > 0 and not stage_over
                models.log_step(args, entry, progress, meter.means(done), last_step, since, cut)
            if done % args.log_every == 0 or stage_over:
                meter, since = LossMeter(), (time.perf_counter(), done * step_images)
            interrupted = time.perf_counter()
            if rank == 0 and args.sample_every and (done % args.sample_every == 0 or stage_over or last):
                nets = dict(teacher=teacher["g_ema"]) if "g_ema" in known else {}
                nets |= dict(student=student["g_ema"]) if stage else {}
                save_samples(out / f"samples/stage{stage}_{done:07d}.png", nets, classes, args.seed)
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

    inputs = [torch.randn(1, student["g"].dim_z, device=device), torch.zeros(1, dtype=torch.long, device=device)]
    teacher["g"].to(device)
    models.write_summary(args, max(first_step, last_step), teacher["g"], student["g"], inputs, record["scores"])


def build_pair(args, g_ch, d_ch, n_classes):
    attention, shared_dim = args.attention or None, args.shared_dim or None
    z = dict(dim_z=args.dim_z, shared_dim=shared_dim, hierarchical=args.hierarchical)
    G = BigGANGenerator(args.size, g_ch, n_classes, attention=attention, sn_eps=args.sn_eps, **z)
    D = BigGANDiscriminator(args.size, d_ch, n_classes, attention, args.sn_eps)
    G, D = (init_biggan(net, args.init == "orthogonal") for net in (G, D))
    return dict(g=G, d=D, g_ema=copy.deepcopy(G).eval())


def adam(net, lr, eps):
    return torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 0.999), eps=eps, fused=True)


def draw_inputs(G, n):
    """Latents and random classes of n images."""
    device = next(G.parameters()).device
    return torch.randn(n, G.dim_z, device=device), torch.randint(G.config["n_classes"], (n,), device=device)


def evaluate(nets, real, inception, args):
    """{"fid_teacher": .., "is_teacher": .., the same of the student}: Fréchet distances of each net's images to the
    real ones' statistics, and Inception scores."""
    scores, score_key = {}, "is" if inception.key == "fid" else "is_random"
    for name, net in nets.items():
        fake, (scores[f"{score_key}_{name}"], _) = generated_stats(draw(net, args), inception, 10)
        scores[f"{inception.key}_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


@torch.no_grad()
def draw(G, args):
    """Yields this process's share of --eval-images images, from the same latents and classes every time."""
    device = next(G.parameters()).device
    rank, world = processes()
    for start in range(rank * args.batch_size, args.eval_images, args.batch_size * world):
        n, generator = min(args.batch_size, args.eval_images - start), torch.Generator().manual_seed(args.seed + start)
        z = torch.randn(n, G.dim_z, generator=generator)
        y = torch.randint(G.config["n_classes"], (n,), generator=generator)
        yield G(z.to(device), y.to(device))


@torch.no_grad()
def save_samples(path, nets, classes, seed):
    """A row for each class, of ten at the most, from each net; the same latents every time."""
    shown = np.linspace(0, len(classes) - 1, min(10, len(classes))).round().astype(int).tolist()
    blocks = {}
    for name, net in nets.items():
        device = next(net.parameters()).device
        z = torch.randn(8, net.dim_z, generator=torch.Generator().manual_seed(seed)).to(device)
        rows = [net(z, torch.full((8,), label, device=device)) for label in shown]
        blocks[f"{name}: {', '.join(classes[label] for label in shown)}"] = torch.cat(rows)
    models.save_grid(path, blocks, 8)


def pair_options(role):
    """The options that a trained pair with that role brings along."""
    widths = ("teacher_ch",) if role == "teacher" else ("student_ch", "student_d_ch")
    return ("size", "dim_z", "shared_dim", "hierarchical", "attention", "sn_eps", *widths)


def read_pair(paths, role):
    """A trained pair: state dicts D [G_ema], or {g, d, g_ema} or a checkpoint.pt of ours -> it, its options."""
    content = models.load_file(paths[0])
    if len(paths) > (1 if "script" in content or "d" in content else 2):
        raise InputError(f"{' '.join(paths)}: expected D.pth [G_ema.pth], or one file of ours")
    if "script" in content:
        content = models.load_checkpoint(paths[0], NAME)
        nets, known = content["networks"], content["args"]
        content = {name.removeprefix(f"{role}_"): weights for name, weights in nets.items() if name.startswith(role)}
    elif "d" in content:
        known = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    else:
        content, known = dict(zip(("d", "g_ema"), [content, *map(models.load_file, paths[1:2])], strict=False)), {}
    return content, {name: known[name] for name in pair_options(role) if name in known}


def load_pair(paths, role, networks, needed):
    """Loads a pair into networks of the names g, d, g_ema -> the names that were found; InputError for needed ones."""
    content, _ = read_pair(paths, role)
    for name in needed:
        if name not in content:
            raise InputError(f"{paths[0]}: has no {name!r}, expected the state dicts g, d and g_ema")
    found = [name for name in networks if name in content]
    for name in found:
        source = f"{paths[0]}, {name} with this --size, width and number of classes"
        models.load_weights(networks[name], content[name], source)
    return found


def save_pair(path, pair, role, args):
    """Writes a trained pair, {g, d, g_ema, args}; --teacher and --student read it."""
    content = {}
    for name, net in pair.items():
        content[name] = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    content["args"] = argparse.Namespace(**{name: getattr(args, name) for name in pair_options(role)})
    models.write_atomically(path, lambda file: torch.save(content, file))


# ----------------------------------------------------------------------------------------------------------------------
# Data


def find_classes(files):
    """The names of the class folders in sorted order, and the class of each image: its first folder's number."""
    parts = [name.replace("\\", "/").split("/") for name in files.names]
    while files.zipped and len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 2:
        parts = [part[1:] for part in parts]  # a folder around all of the .zip
    if min(map(len, parts)) < 2:
        name = files.names[[len(part) for part in parts].index(1)]
        raise InputError(f"{files.source}: {name} lies in no class folder, expected one folder for each class")
    classes = sorted({part[0] for part in parts})
    if len(classes) == 1:
        raise InputError(f"{files.source}: one class alone, {classes[0]}, expected a folder for each of two or more")
    numbers = {name: n for n, name in enumerate(classes)}
    return classes, [numbers[part[0]] for part in parts]


@functools.lru_cache(maxsize=4)
def shuffled(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


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
        index = int(shuffled(len(self), self.seed, epoch)[k])
        flip = self.mirror and np.random.default_rng([self.seed, n]).random() < 0.5
        return self.images[index].flip(2) if flip else self.images[index], self.labels[index]


# What --toy changes; any flag on the command line wins over it.
TOY = dict(size=32, teacher_ch=8, student_ch=4, student_d_ch=8, dim_z=32, shared_dim=16, attention=0, sn_eps=1e-8)
TOY |= dict(teacher_kimg=40.0, stage1_kimg=30.0, stage2_kimg=12.0, batch_size=32, accumulate=1, d_steps=2, lr=1e-3)
TOY |= dict(d_lr=1e-3, adam_eps=1e-8, ema_decay=0.99, ema_start=50, inception="none", eval_every=0, workers=0)
TOY |= dict(log_every=50, sample_every=200, save_every=200)


def write_toy_dataset(folder, size=32, count=100):
    """Classes: shapes in bright colours on dark ground, of many sizes, places and turns."""
    corners = dict(circle=40, cross=0, moon=0, square=4, star=10, triangle=3)
    for label, (name, n) in enumerate(corners.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng([label, i])
            scale = 4 * size  # drawn four times larger and filtered down: smooth edges
            ground, colour = (
                rng.integers(10, 60, 3),
                np.roll([rng.integers(200, 256), rng.integers(60, 256), 60], label),
            )
            image = Image.new("RGB", (scale, scale), tuple(ground.tolist()))
            draw, colour = ImageDraw.Draw(image), tuple(colour.tolist())
            (x, y), r, turn = (
                rng.uniform(0.42, 0.58, 2) * scale,
                rng.uniform(0.25, 0.36) * scale,
                rng.uniform(-0.3, 0.3),
            )
            if n:
                angles = turn - np.pi / 2 + np.pi * (n == 4) / 4 + 2 * np.pi * np.arange(n) / n
                radii = r * np.where(np.arange(n) % 2 * (n == 10), 0.45, 1.0)
                draw.polygon([*zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)], fill=colour)
            elif name == "cross":
                draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
                draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)
            else:
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
                draw.ellipse((x - r / 4, y - r, x + 1.4 * r, y + r * 0.8), fill=tuple(ground.tolist()))
            image.resize((size, size), Image.Resampling.LANCZOS).save(folder / name / f"{i:03d}.png")


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
