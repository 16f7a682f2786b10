"""Compresses a Pix2Pix generator with DCD: Discriminator-Cooperated Feature Map Distillation (arXiv 2212.14169).

A small student generator learns from a large teacher that is trained beside it. Their feature maps are compared not
pixel by pixel but as the teacher's discriminator D_T sees them: each tapped map goes through a 1x1 connector and D_T.
D_T, which reads (input, image) pairs, also judges the student's images, and is trained together with both generators
from scratch, so that it never outgrows the small one.

    python train_pix2pix_dcd.py --toy                                     # no data needed, minutes on a laptop
    python train_pix2pix_dcd.py --data datasets/edges2shoes               # the paper's experiment
    python train_pix2pix_dcd.py --data datasets/edges2shoes --teacher-arch unet_256 --student-arch unet_256
    torchrun --nproc_per_node 8 train_pix2pix_dcd.py --data datasets/edges2shoes
    python train_pix2pix_dcd.py --out runs/pix2pix_dcd_edges2shoes --resume
"""

import argparse
import copy
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import fid
import models
from fid import ImageFiles, at_least, frechet_distance, gather, generated_stats, image_errors
from losses import DCDLoss, LossMeter, PerceptualLoss, PixelLoss, discriminator_loss, generator_loss
from models import InputError, PatchDiscriminator, ResnetGenerator, UnetGenerator, processes, say, take_step

NAME = "pix2pix_dcd"
GROWING = ("epochs", "epochs_decay")  # what --resume may enlarge
ARCHS = ("mobile_resnet_9blocks", "resnet_9blocks", "unet_256")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments, and the checkpoint when resuming: options that are not given are then the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=models.HelpFormatter)
    parser.error = fail
    at = parser.add_argument_group("data").add_argument
    at("--data", metavar="FOLDER", help="holds train/ and val/ or test/, A left of B in each image")
    at("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which domain is translated into which")
    at("--crop-size", type=at_least(1), default=256, help="random crops, pixels: 24 or more, in fours; U-Net: 256 ..")
    at("--load-size", type=at_least(1), help="images are first resized to this square; 286/256 of --crop-size")
    at("--toy", action="store_true", help="small networks on a synthetic data set: drawings to solid shapes")
    at = parser.add_argument_group("networks").add_argument
    at("--teacher-arch", choices=ARCHS, default=ARCHS[0], help="the teacher's generator")
    at("--student-arch", choices=ARCHS, default=ARCHS[0], help="the student's generator")
    at("--teacher-ngf", type=at_least(1), default=64, help="channels of the teacher's first convolution")
    at("--student-ngf", type=at_least(1), default=16, help="channels of the student's first convolution")
    at("--ndf", type=at_least(1), default=128, help="channels of the discriminator's first convolution")
    at("--teacher", nargs="+", metavar="FILE", help="trained G [D], or a checkpoint.pt of ours")
    at("--freeze-teacher", action="store_true", help="leave the teacher's generator as it is; D_T still trains")
    at("--student", metavar="FILE", help="a student.pt or checkpoint.pt of ours to start from")
    at("--vgg", default="auto", help="VGG16 of the perceptual loss: auto (is downloaded), random, or a weight file")
    at = parser.add_argument_group("method").add_argument
    at("--distill", choices=("dcd", "pixel"), default="dcd", help="feature maps: through D_T, or pixel by pixel")
    at("--tap-size", type=at_least(24), default=64, help="smaller feature maps are enlarged for D_T, pixels; 24: as is")
    at("--teacher-every", type=at_least(1), default=1, help="student steps per step of G_T and D_T")
    fakes = ("both", "teacher", "none")
    at("--d-fakes", choices=fakes, default="both", help="what D_T learns from; release: teacher; none: it is frozen")
    at("--lambda-gan", type=at_least(0.0), default=1.0, help="student: adversarial term")
    at("--lambda-dcd", type=at_least(0.0), default=1.0, help="student: distillation of feature maps")
    at("--lambda-style", type=at_least(0.0), default=1e4, help="student: Gram matrices in VGG16")
    at("--lambda-feature", type=at_least(0.0), default=10.0, help="student: relu2_2 of VGG16")
    at("--lambda-l1", type=at_least(0.0), default=100.0, help="teacher: L1 distance to the real image")
    at = parser.add_argument_group("optimisation").add_argument
    at("--epochs", type=at_least(1), default=100, help="passes through the data at full learning rate")
    at("--epochs-decay", type=at_least(0), default=100, help="further passes, of linear decay to 0")
    at("--batch-size", type=at_least(1), default=4, help="images per process and step")
    at("--lr", type=at_least(0.0), default=2e-4, help="learning rate of Adam")
    at("--ema", type=at_least(0.0), default=0.0, help="half-life of the student's moving average, images; 0: none")
    add_run_options(parser, unit="epochs", eval_every=10, auto="off")

    args = parser.parse_args(argv)
    if not (args.data or args.toy or (args.resume and args.out)):
        fail("--data is missing: the folder with train/ and val/ or test/ (--toy needs none)")
    parser.set_defaults(**TOY if args.toy else {})
    parser.set_defaults(out=args.out or f"runs/{NAME}_{Path(args.data).resolve().name if args.data else 'toy'}")
    if not args.resume:  # trained networks of ours bring their architecture and width along
        parser.set_defaults(**models.trained_options(args.teacher[0], NAME, "teacher") if args.teacher else {})
        parser.set_defaults(**models.trained_options(args.student, NAME, "student") if args.student else {})
    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        args, checkpoint = read_checkpoint(parser, argv)
    args.load_size = args.load_size or round(args.crop_size * 286 / 256)
    if not any((args.lambda_gan, args.lambda_dcd, args.lambda_style, args.lambda_feature)):
        fail("all four weights of the student's objective are 0: nothing would be learnt")
    if args.freeze_teacher and not args.teacher:
        fail("--freeze-teacher needs --teacher FILE: an untrained teacher has nothing to teach")
    if args.d_fakes == "none" and not args.teacher:
        fail("--d-fakes none needs a --teacher with its trained discriminator")
    if ("unet" in args.teacher_arch) != ("unet" in args.student_arch):
        fail(f"{args.teacher_arch}, {args.student_arch}: taps of different sizes, choose two ResNets or two U-Nets")
    smallest, multiple = (256, 256) if args.student_arch == "unet_256" else (24, 4)
    if args.crop_size < smallest or args.crop_size % multiple:
        fail(f"--crop-size is {args.crop_size}: expected a multiple of {multiple} from {smallest} on")
    if args.load_size < args.crop_size:
        fail(f"--load-size {args.load_size} is smaller than --crop-size {args.crop_size}")
    return args, checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# The method


def train(args, checkpoint):
    device = fid.pick_device(args.device)
    models.start_processes(device)
    rank, world = processes()
    out = Path(args.out)
    models.check_output(args)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.amp == "bf16")

    def to_device(x):
        return x.to(device, memory_format=torch.channels_last, non_blocking=True)

    # Data. A is the input, B the target, whichever way --direction turns them.
    data = Path(args.data or out / "toy_data")
    if not args.data and rank == 0 and not args.resume:
        write_toy_dataset(data)
    gather(None)  # wait for rank 0
    sets = [ImageFiles(data / phase, True) for phase in ("train", "val" if (data / "val").exists() else "test")]
    data_facts = gather([check_pairs(files, args.crop_size) for files in sets] if rank == 0 else None)[0]
    dataset = PairedImages(sets[0], args.direction, args.load_size, args.crop_size, args.seed)
    test_pairs = TestPairs(sets[1], args.direction, args.crop_size)
    if args.eval_every and args.inception != "none" and len(sets[1]) < 2:
        raise InputError(f"{data}: a Fréchet distance needs two test images; or --inception none")
    global_batch = args.batch_size * world
    epoch_steps = math.ceil(len(dataset) / global_batch)
    schedule_steps = (args.epochs + args.epochs_decay) * epoch_steps
    last_step = min(schedule_steps, args.max_steps or schedule_steps)

    # Networks. The discriminator is conditional: it reads input and image as six channels.
    torch.manual_seed(args.seed)
    teacher_G = models.init_weights(build_generator(args.teacher_arch, args.teacher_ngf))
    teacher_D = models.init_weights(PatchDiscriminator(6, args.ndf))
    student_G = models.init_weights(build_generator(args.student_arch, args.student_ngf))
    # Taps are the four feature maps that are compared, see the generators' forward.
    tap_channels = student_G.tap_channels, teacher_G.tap_channels
    dcd_loss = PixelLoss(*tap_channels)
    if args.distill == "dcd":
        dcd_loss = DCDLoss(*tap_channels, 6, args.tap_size)
    networks = dict(teacher_G=teacher_G, teacher_D=teacher_D)
    if args.teacher and not args.resume:
        trained = models.load_networks(args.teacher, networks, NAME)
        if args.d_fakes == "none" and "teacher_D" not in trained:
            raise InputError("--d-fakes none needs a --teacher with its trained discriminator")
    if args.student and not args.resume:
        models.load_networks([args.student], dict(student_G=student_G), NAME)
    networks |= dict(student_G=student_G, dcd_loss=dcd_loss)
    if args.ema:
        networks["student_G_ema"] = copy.deepcopy(student_G).requires_grad_(False)
    shown = networks["student_G_ema" if args.ema else "student_G"]  # what is evaluated, and shipped as student.pt
    for net in networks.values():
        net.to(device, memory_format=torch.channels_last)
    models.share_weights(networks.values())
    weights = dict(gan=args.lambda_gan, dcd=args.lambda_dcd, style=args.lambda_style, feature=args.lambda_feature)
    perceptual_loss = None
    if weights["style"] or weights["feature"]:
        perceptual_loss = PerceptualLoss(args.vgg).to(device, memory_format=torch.channels_last)
    inception = fid.load_inception(args.inception, device) if args.eval_every and args.inception != "none" else None

    # Optimisers
    def adam(*nets):
        parameters = [p for net in nets for p in net.parameters()]
        return torch.optim.Adam(parameters, lr=args.lr, betas=(0.5, 0.999), fused=True)

    optimizers = dict(
        teacher_G=adam(teacher_G),
        teacher_D=adam(teacher_D),
        student_G=adam(student_G, dcd_loss.student_connectors),
    )
    meter, first_step = LossMeter(), 0
    record = dict(best=math.inf, scores={}, evaluated=0)  # evaluated: the step of the last evaluation

    # Resume
    torch.manual_seed(args.seed + rank)
    if checkpoint:
        own = models.restore(checkpoint, out / "checkpoint.pt", networks, optimizers)
        first_step, meter = checkpoint["step"], LossMeter(own["losses"])
        record = {key: checkpoint[key] for key in record}
        if checkpoint["data"] != data_facts:
            say(f"warning: {data}: names or sizes of images have changed, the run is no longer the same bit for bit")
    models.open_output(args, checkpoint, first_step < last_step)
    batches = models.run_batches(dataset, args.batch_size, range(first_step, last_step), args.workers)
    shown_pairs = [test_pairs[i % len(test_pairs)] for i in range(4)]
    samples = [to_device(torch.stack(half)) for half in zip(*shown_pairs, strict=True)]
    phi = teacher_D.features  # D_T up to its last hidden activation
    if args.compile:  # the training steps; samples, evaluation and files have the plain networks
        teacher_G, student_G, phi = map(torch.compile, (teacher_G, student_G, phi))

    def save(step):
        meter.means(step)  # stops here rather than save a run that has diverged
        facts = dict(script=NAME, args=vars(args), data=data_facts, step=step) | record
        models.save_checkpoint(out / "checkpoint.pt", networks, optimizers, dict(losses=meter.state()), **facts)
        if rank == 0:
            models.save_generator(out / "student.pt", shown, average=args.ema)

    def due(step):
        return args.eval_every and (step % (args.eval_every * epoch_steps) == 0 or step == schedule_steps)

    def score(step):
        scores = evaluate(networks["teacher_G"], shown, test_pairs, inception, args.workers, to_device)
        models.log(args, dict(step=step, evaluation=True) | scores, f"step {step}", scores, cut=not due(step))
        record["scores"] = scores
        if due(step):
            distance = scores.get(f"{inception.key}_student") if inception else math.inf
            if rank == 0 and distance < record["best"]:
                models.save_generator(out / "best_student.pt", shown, average=args.ema)
            record.update(best=min(distance, record["best"]), evaluated=step)

    say(f"{out}: steps {first_step} to {last_step} of {schedule_steps}, {epoch_steps} an epoch, on {world} x {device}")
    if args.ema > schedule_steps * global_batch / 5:
        say(f"warning: --ema {args.ema:g} is over a fifth of the run, the average keeps much of its start")
    if first_step >= last_step:
        say("nothing is left to train; larger --epochs or --epochs-decay extend the run")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if checkpoint and due(first_step) and record["evaluated"] < first_step:
        score(first_step)
        models.amend_checkpoint(out / "checkpoint.pt", checkpoint, args=vars(args), **record)
    since = time.perf_counter(), first_step * global_batch
    for step in range(first_step, last_step):
        real_A, real_B = map(to_device, next(batches))
        lr = args.lr * min(1.0, (schedule_steps - step) / (args.epochs_decay * epoch_steps + 1))
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = lr
        # G_T and D_T learn at every n-th step, the student at every one.
        teacher_step = step % args.teacher_every == 0
        train_G = teacher_step and not args.freeze_teacher

        # One forward pass of either generator serves its own update, the distillation and the discriminator. The
        # student stays in float32: bf16 in its residual blocks turns its gradient.
        with autocast(), torch.set_grad_enabled(train_G):
            fake_B, teacher_taps = teacher_G(real_A, taps=True)
        fake_S, student_taps = student_G(real_A, taps=True)

        # Collaborative discriminator D_T: (E[max(0, 1 - D_T(x, y))] + E[max(0, 1 + D_T(x, fake))]) / 2, fakes of both
        # generators alike.
        if teacher_step and args.d_fakes != "none":
            teacher_D.requires_grad_(True)
            images = [real_B, fake_B.detach()] + ([fake_S.detach()] if args.d_fakes == "both" else [])
            with autocast():
                logits = teacher_D(torch.cat([torch.cat([real_A, image], 1) for image in images]))
                real, fake = logits.tensor_split([len(real_A)])
                loss_D = discriminator_loss(real, fake, "hinge") / 2
            take_step(optimizers["teacher_D"], loss_D)
            meter.add(D_T=loss_D)

        # Teacher: -E[D_T(x, G(x))] + lambda_l1 |G(x) - y|
        teacher_D.requires_grad_(False)
        if train_G:
            with autocast():
                loss_gan = generator_loss(teacher_D(torch.cat([real_A, fake_B], 1)), "hinge")
            loss_l1 = (fake_B - real_B).abs().mean()
            take_step(optimizers["teacher_G"], loss_gan + args.lambda_l1 * loss_l1)
            meter.add(G_T_gan=loss_gan, G_T_l1=loss_l1)

        # Student: L_S = lambda_gan L_GAN(D_T(x, G_S(x))) + lambda_dcd L_DCD + lambda_style L_style + lambda_feature L_f
        terms = {}
        with autocast():
            if weights["gan"]:
                terms["gan"] = generator_loss(teacher_D(torch.cat([real_A, fake_S], 1)), "hinge")
            if weights["dcd"]:
                terms["dcd"] = dcd_loss(student_taps, teacher_taps, phi)
            if perceptual_loss:
                terms |= perceptual_loss(fake_S, fake_B, [name for name in ("style", "feature") if weights[name]])
        take_step(optimizers["student_G"], sum(weights[name] * term for name, term in terms.items()))
        meter.add(**{f"G_S_{name}": term for name, term in terms.items()})
        if args.ema:
            models.update_ema(shown, networks["student_G"], 0.5 ** (global_batch / args.ema))

        # Log, samples, checkpoint, evaluation
        done, signal_number = step + 1, stop_asked()
        last = done == last_step
        if done % args.log_every == 0 or last:
            epoch, cut = done * global_batch / len(dataset), done % args.log_every > 0 and done < schedule_steps
            entry = dict(step=done, epoch=epoch, images=done * global_batch, lr=lr)
            models.log_step(args, entry, f"epoch {epoch:.2f}", meter.means(done), last_step, since, cut)
        if done % args.log_every == 0:
            meter, since = LossMeter(), (time.perf_counter(), done * global_batch)
        interrupted = time.perf_counter()
        if rank == 0 and args.sample_every and (done % args.sample_every == 0 or last):
            save_samples(out / f"samples/{done:07d}.png", networks["teacher_G"], shown, dcd_loss, *samples)
        if done % args.save_every == 0 or last or due(done) or signal_number:
            save(done)
        if due(done) or (last and args.eval_every):
            score(done)
            save(done)
        if signal_number:
            name = signal.Signals(signal_number).name
            say(f"stopped by {name} after step {done}, saved; go on: --out {out} --resume")
            sys.exit(128 + signal_number)
        since = since[0] + time.perf_counter() - interrupted, since[1]

    image = torch.randn(1, 3, args.crop_size, args.crop_size, device=device)
    models.write_summary(args, max(first_step, last_step), networks["teacher_G"], shown, [image], record["scores"])


def build_generator(arch, ngf):
    return UnetGenerator(ngf=ngf) if arch == "unet_256" else ResnetGenerator(ngf=ngf, separable="mobile" in arch)


@torch.no_grad()
def evaluate(teacher_G, student_G, test_pairs, inception, workers, to_device):
    """{"mae_teacher": mean |G_T(x) - y|, "psnr_teacher": dB, the same of the student, "student_to_teacher": ..} over
    the test pairs and, with an Inception, the Fréchet distances "fid_teacher", "fid_student"."""

    def pairs():
        return (map(to_device, pair) for pair in models.share_batches(test_pairs, 8, workers))

    def errors(real_A, real_B):
        fake_B, fake_S = teacher_G(real_A), student_G(real_A)
        found = *image_errors(fake_B, real_B), *image_errors(fake_S, real_B), image_errors(fake_S, fake_B)[0]
        return torch.stack(found, 1).tolist()

    rows = sum(gather([row for real_A, real_B in pairs() for row in errors(real_A, real_B)]), [])
    names = ("mae_teacher", "psnr_teacher", "mae_student", "psnr_student", "student_to_teacher")
    scores = dict(zip(names, np.mean(rows, 0).tolist(), strict=True))
    if inception:
        real = generated_stats((real_B for _, real_B in pairs()), inception)
        for name, net in (("teacher", teacher_G), ("student", student_G)):
            fake = generated_stats((net(real_A) for real_A, _ in pairs()), inception)
            scores[f"{inception.key}_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


@torch.no_grad()
def save_samples(path, teacher_G, student_G, dcd_loss, real_A, real_B):
    """Columns: input, teacher, student, the real B, and the input as either first connector shows it to D_T."""
    fake_B, teacher_taps = teacher_G(real_A, taps=True)
    fake_S, student_taps = student_G(real_A, taps=True)
    columns = {"input": real_A, "teacher": fake_B, "student": fake_S, "the real B": real_B}
    if isinstance(dcd_loss, DCDLoss):
        maps = {"teacher's map": dcd_loss.teacher_connectors[0](teacher_taps[0])}
        maps["student's map"] = dcd_loss.student_connectors[0](student_taps[0])
        for name, shown in maps.items():
            shown = shown[:, 3:]  # the channels in which D_T expects the image
            shown = shown / shown.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
            columns[name] = 2 * TF.resize(shown, real_A.shape[2:], TF.InterpolationMode.NEAREST) - 1
    models.save_grid(path, columns)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def load_pair(files, index, direction, size):
    """The halves of the index-th image as (input, target), each resized to size x size (bicubic)."""
    image = files[index]
    half = image.width // 2
    pair = image.crop((0, 0, half, image.height)), image.crop((half, 0, 2 * half, image.height))
    pair = [TF.resize(part, [size, size], TF.InterpolationMode.BICUBIC) for part in pair]
    return pair if direction == "AtoB" else pair[::-1]


def check_pairs(files, crop_size):
    """Says what is unusual about the images, refuses those that are not two halves -> digest of names and sizes."""
    facts = files.survey(say, crop_size, halves=True)
    for name, (width, height) in zip(files.names, files.sizes, strict=True):
        if width % 2:
            raise InputError(f"{files.source}: {name} is {width}x{height} pixels, expected two halves side by side")
    return facts


def to_tensor(image):
    """PIL image -> (3, H, W) in [-1, 1]."""
    return TF.to_dtype(TF.to_image(image), torch.float32, scale=True) * 2 - 1


@functools.lru_cache(maxsize=4)
def shuffled(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


class PairedImages(Dataset):
    """Item n of the training run: input and target with the same crop and flip, reshuffled for every epoch.

    Order, crop and flip depend on the seed and n alone, so a run that resumes at n sees what it would have seen.
    """

    def __init__(self, files, direction, load_size, crop_size, seed):
        self.files, self.direction, self.seed = files, direction, seed
        self.load_size, self.crop_size = load_size, crop_size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, n):
        epoch, k = divmod(n, len(self))
        rng = np.random.default_rng([self.seed, n])
        top, left = rng.integers(self.load_size - self.crop_size + 1, size=2).tolist()
        flip = rng.random() < 0.5
        pair = load_pair(self.files, shuffled(len(self), self.seed, epoch)[k], self.direction, self.load_size)
        pair = [TF.crop(image, top, left, self.crop_size, self.crop_size) for image in pair]
        return [to_tensor(TF.horizontal_flip(image) if flip else image) for image in pair]


class TestPairs(Dataset):
    """The pairs held out, resized to the size that the networks were trained at."""

    def __init__(self, files, direction, size):
        self.files, self.direction, self.size = files, direction, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return [to_tensor(image) for image in load_pair(self.files, index, self.direction, self.size)]


# What --toy changes; any flag on the command line wins over it.
TOY = dict(epochs=4, epochs_decay=4, load_size=104, crop_size=96, batch_size=2, teacher_ngf=24, student_ngf=12, ndf=16)
TOY |= dict(lr=6e-4, lambda_style=0.0, lambda_feature=300.0, vgg="random", inception="none", eval_every=4, workers=0)
TOY |= dict(log_every=20, sample_every=80, save_every=80)


def write_toy_dataset(folder, size=104, n_train=96, n_test=8):
    """A: discs outlined in red and triangles in blue; B: the same shapes solid and shaded."""
    for phase, count in (("train", n_train), ("val", n_test)):
        (folder / phase).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng([phase == "val", i])
            drawing = Image.new("RGB", (size, size), "white")
            solid = Image.fromarray(np.full((size, size, 3), (225, 215, 195), np.uint8))
            for kind in rng.permutation([0, 1, rng.integers(2)]):
                (x, y), r = rng.uniform(0.22, 0.78, 2) * size, rng.uniform(0.12, 0.22) * size
                n = (32, 3)[kind]
                angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(n) / n
                corners = [(x + r * np.cos(a), y + r * np.sin(a)) for a in angles]
                mask = Image.new("L", (size, size))
                ImageDraw.Draw(mask).polygon(corners, fill=255)
                ys, xs = np.mgrid[:size, :size]
                shade = np.clip(1.15 - ((xs - x) + (ys - y)) / (3 * r), 0.4, 1.3)[..., None]
                colour = shade * np.array([(205, 60, 50), (60, 90, 200)][kind])
                solid.paste(Image.fromarray(colour.clip(0, 255).astype(np.uint8)), mask=mask)
                ImageDraw.Draw(drawing).polygon(
                    corners, fill="white", outline=((170, 20, 10), (10, 30, 160))[kind], width=2
                )
            both = Image.new("RGB", (2 * size, size))
            both.paste(drawing, (0, 0))
            both.paste(solid, (size, 0))
            both.save(folder / phase / f"{i:03d}.png")


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
