"""Compresses a CycleGAN generator with DCD: Discriminator-Cooperated Feature Map Distillation (arXiv 2212.14169).

A small student generator learns from a large teacher that is trained beside it. Their feature maps are compared not
pixel by pixel but as the teacher's discriminator D_T sees them: each tapped map goes through a 1x1 connector and D_T.
D_T also judges the student's images, and is trained together with both generators from scratch, so that it never
outgrows the small one.

    python train_cyclegan_dcd.py --toy                                    # no data needed, minutes on a laptop
    python train_cyclegan_dcd.py --data datasets/horse2zebra              # the paper's experiment
    torchrun --nproc_per_node 8 train_cyclegan_dcd.py --data datasets/horse2zebra
    python train_cyclegan_dcd.py --out runs/cyclegan_dcd_horse2zebra --resume
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
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import Dataset

import fid
import models
from fid import ImageFiles, at_least, frechet_distance, gather, generated_stats, image_errors
from losses import DCDLoss, LossMeter, PerceptualLoss, PixelLoss, discriminator_loss, generator_loss
from models import InputError, PatchDiscriminator, ResnetGenerator, init_weights, processes, say, take_step

NAME = "cyclegan_dcd"
GROWING = ("epochs", "epochs_decay")  # what --resume may enlarge
ARCHS = ("resnet_9blocks", "mobile_resnet_9blocks")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments, and the checkpoint when resuming: options that are not given are then the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=models.HelpFormatter)
    parser.error = fail
    at = parser.add_argument_group("data").add_argument
    at("--data", metavar="FOLDER", help="holds trainA/ trainB/ testA/ testB/")
    at("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which domain is translated into which")
    at("--crop-size", type=at_least(1), default=256, help="random crops for training, pixels: 24 or more, in fours")
    at("--load-size", type=at_least(1), help="images are first resized to this square; 286/256 of --crop-size")
    at("--toy", action="store_true", help="small networks on a synthetic data set: plain to striped objects")
    at = parser.add_argument_group("networks").add_argument
    at("--teacher-arch", choices=ARCHS, default="mobile_resnet_9blocks", help="the teacher's generators")
    at("--student-arch", choices=ARCHS, default="mobile_resnet_9blocks", help="the student's generator")
    at("--teacher-ngf", type=at_least(1), default=64, help="channels of the teacher's first convolution")
    at("--student-ngf", type=at_least(1), default=16, help="channels of the student's first convolution")
    at("--ndf", type=at_least(1), default=64, help="channels of the discriminators' first convolution")
    at("--teacher", nargs="+", metavar="FILE", help="trained G_A2B [G_B2A [D_B [D_A]]], or a checkpoint.pt of ours")
    at("--freeze-teacher", action="store_true", help="leave the teacher's generators as they are; D_T still trains")
    at("--student", metavar="FILE", help="a student.pt or checkpoint.pt of ours to start from")
    at("--vgg", default="auto", help="VGG16 of the perceptual loss: auto (is downloaded), random, or a weight file")
    at = parser.add_argument_group("method").add_argument
    at("--distill", choices=("dcd", "pixel"), default="dcd", help="feature maps: through D_T, or pixel by pixel")
    at("--tap-size", type=at_least(24), default=64, help="smaller feature maps are enlarged for D_T, pixels; 24: as is")
    at("--teacher-every", type=at_least(1), default=4, help="student steps per step of G_T and D_T")
    fakes = ("both", "teacher", "none")
    at("--d-fakes", choices=fakes, default="both", help="what D_T learns from; release: teacher; none: it is frozen")
    at("--lambda-gan", type=at_least(0.0), default=1.0, help="student: adversarial term")
    at("--lambda-dcd", type=at_least(0.0), default=1.0, help="student: distillation of feature maps")
    at("--lambda-style", type=at_least(0.0), default=1e4, help="student: Gram matrices in VGG16")
    at("--lambda-feature", type=at_least(0.0), default=10.0, help="student: relu2_2 of VGG16")
    at("--lambda-cycle", type=at_least(0.0), default=10.0, help="teacher: cycle consistency")
    at("--lambda-identity", type=at_least(0.0), default=0.5, help="teacher: identity, times the cycle weight")
    at("--pool-size", type=at_least(0), default=50, help="past fakes that the discriminators see again, images")
    at = parser.add_argument_group("optimisation").add_argument
    at("--epochs", type=at_least(1), default=400, help="the student's passes through the data at full learning rate")
    at("--epochs-decay", type=at_least(0), default=400, help="its further passes, of linear decay to 0")
    at("--batch-size", type=at_least(1), default=1, help="images per process and step")
    at("--lr", type=at_least(0.0), default=2e-4, help="learning rate of Adam")
    at("--ema", type=at_least(0.0), default=0.0, help="half-life of the student's moving average, images; 0: none")
    add_run_options(parser, unit="epochs", eval_every=40, auto="off")

    args = parser.parse_args(argv)
    if not (args.data or args.toy or (args.resume and args.out)):
        fail("--data is missing: the folder with trainA/ trainB/ testA/ testB/ (--toy needs none)")
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
    if args.crop_size < 24 or args.crop_size % 4:
        fail(f"--crop-size is {args.crop_size}, expected a multiple of 4 from 24 on: D_T cannot read smaller images")
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

    # Data. A is the source domain, B the target, whichever way --direction turns them.
    data = Path(args.data or out / "toy_data")
    if not args.data and rank == 0 and not args.resume:
        write_toy_dataset(data)
    gather(None)  # wait for rank 0
    source, target = args.direction[0], args.direction[-1]
    sets = [ImageFiles(data / f"{phase}{domain}", True) for phase in ("train", "test") for domain in (source, target)]
    data_facts = gather([files.survey(say, args.crop_size) for files in sets] if rank == 0 else None)[0]
    dataset = UnpairedImages(*sets[:2], args.load_size, args.crop_size, args.seed)
    test_A, test_B = (TestImages(files, args.crop_size) for files in sets[2:])
    if args.eval_every and args.inception != "none" and min(map(len, sets[2:])) < 2:
        raise InputError(f"{data}: a Fréchet distance needs two test images; or --inception none")
    global_batch = args.batch_size * world
    epoch_steps = math.ceil(len(dataset) / global_batch)
    schedule_steps = (args.epochs + args.epochs_decay) * epoch_steps
    last_step = min(schedule_steps, args.max_steps or schedule_steps)

    # Networks. The teacher is a whole CycleGAN: G translates A to B and F back, D judges B and D_A judges A.
    torch.manual_seed(args.seed)
    teacher_G, teacher_F = (init_weights(build_generator(args.teacher_arch, args.teacher_ngf)) for _ in "GF")
    teacher_D, teacher_D_A = (init_weights(PatchDiscriminator(ndf=args.ndf)) for _ in "BA")
    student_G = init_weights(build_generator(args.student_arch, args.student_ngf))
    # Taps, the feature maps that are compared: the entry of the residual blocks and the outputs of blocks 3, 6 and 9.
    tap_channels = student_G.tap_channels, teacher_G.tap_channels
    dcd_loss = PixelLoss(*tap_channels)
    if args.distill == "dcd":
        dcd_loss = DCDLoss(*tap_channels, 3, args.tap_size)
    networks = dict(teacher_G=teacher_G, teacher_F=teacher_F, teacher_D=teacher_D, teacher_D_A=teacher_D_A)
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
        teacher_G=adam(teacher_G, teacher_F),
        teacher_D=adam(teacher_D, teacher_D_A),
        student_G=adam(student_G, dcd_loss.student_connectors),
    )
    pools = {name: ImagePool(args.pool_size) for name in ("teacher_B", "teacher_A", "student_B")}
    meter, first_step = LossMeter(), 0
    record = dict(best=math.inf, scores={}, evaluated=0)  # evaluated: the step of the last evaluation

    # Resume
    torch.manual_seed(args.seed + rank)
    if checkpoint:
        own = models.restore(checkpoint, out / "checkpoint.pt", networks, optimizers)
        first_step, meter = checkpoint["step"], LossMeter(own["losses"])
        record = {key: checkpoint[key] for key in record}
        for name, pool in pools.items():
            pool.images = [image.to(device) for image in own["pools"][name]]
        if checkpoint["data"] != data_facts:
            say(f"warning: {data}: names or sizes of images have changed, the run is no longer the same bit for bit")
    models.open_output(args, checkpoint, first_step < last_step)
    batches = models.run_batches(dataset, args.batch_size, range(first_step, last_step), args.workers)
    sample_A, sample_B = (to_device(torch.stack([test[i % len(test)] for i in range(4)])) for test in (test_A, test_B))
    phi = teacher_D.features  # D_T up to its last hidden activation
    if args.compile:  # the training steps; samples, evaluation and files have the plain networks
        teacher_G, teacher_F, student_G, phi = map(torch.compile, (teacher_G, teacher_F, student_G, phi))

    def save(step):
        meter.means(step)  # stops here rather than save a run that has diverged
        own = dict(losses=meter.state(), pools={name: [image.cpu() for image in p.images] for name, p in pools.items()})
        facts = dict(script=NAME, args=vars(args), data=data_facts, step=step) | record
        models.save_checkpoint(out / "checkpoint.pt", networks, optimizers, own, **facts)
        if rank == 0:
            models.save_generator(out / "student.pt", shown, average=args.ema)

    def due(step):
        return args.eval_every and (step % (args.eval_every * epoch_steps) == 0 or step == schedule_steps)

    def score(step):
        scores = evaluate(networks["teacher_G"], shown, test_A, test_B, inception, args.workers, to_device)
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
        # G_T and D_T learn at every n-th step: online, the ratio of the release's 40 student to 10 teacher epochs.
        teacher_step = step % args.teacher_every == 0

        # Teacher: L_LSGAN(D(G(x))) + L_LSGAN(D_A(F(y))) + lambda_cycle (|F(G(x)) - x| + |G(F(y)) - y|
        # + lambda_identity (|F(x) - x| + |G(y) - y|)). G(x), G(y) are one batch, F(y), F(x), F(G(x)) another.
        teacher_D.requires_grad_(False)
        teacher_D_A.requires_grad_(False)
        if teacher_step and not args.freeze_teacher:
            with autocast():
                fakes, taps = teacher_G(torch.cat([real_A, real_B]), taps=True)
                fake_B, idt_B = fakes.chunk(2)
                fake_A, idt_A, rec_A = teacher_F(torch.cat([real_B, real_A, fake_B])).chunk(3)
                rec_B = teacher_G(fake_A)
                loss_gan = generator_loss(teacher_D(fake_B), "lsgan") + generator_loss(teacher_D_A(fake_A), "lsgan")
            loss_cycle = (rec_A - real_A).abs().mean() + (rec_B - real_B).abs().mean()
            loss_identity = (idt_A - real_A).abs().mean() + (idt_B - real_B).abs().mean()
            loss_G = loss_gan + args.lambda_cycle * (loss_cycle + args.lambda_identity * loss_identity)
            take_step(optimizers["teacher_G"], loss_G)
            meter.add(G_T_gan=loss_gan, G_T_cycle=loss_cycle, G_T_identity=loss_identity)
            # The same forward pass serves the distillation.
            fake_A, fake_B = fake_A.detach(), fake_B.detach()
            teacher_taps = [tap.detach().chunk(2)[0] for tap in taps]
        else:
            with autocast(), torch.no_grad():
                fake_B, teacher_taps = teacher_G(real_A, taps=True)

        # Student: L_S = lambda_gan L_GAN(D_T(G_S(x))) + lambda_dcd L_DCD + lambda_style L_style + lambda_feature L_f.
        # It stays in float32: bf16 in its residual blocks turns its gradient.
        terms = {}
        fake_S, student_taps = student_G(real_A, taps=True)
        with autocast():
            if weights["gan"]:
                terms["gan"] = generator_loss(teacher_D(fake_S), "lsgan")
            if weights["dcd"]:
                terms["dcd"] = dcd_loss(student_taps, teacher_taps, phi)
            if perceptual_loss:
                terms |= perceptual_loss(fake_S, fake_B, [name for name in ("style", "feature") if weights[name]])
        take_step(optimizers["student_G"], sum(weights[name] * term for name, term in terms.items()))
        meter.add(**{f"G_S_{name}": term for name, term in terms.items()})
        if args.ema:
            models.update_ema(shown, networks["student_G"], 0.5 ** (global_batch / args.ema))

        # Collaborative discriminator D_T: (E[(D_T(y) - 1)^2] + E[D_T(fake)^2]) / 2, fakes of both generators alike; and
        # the teacher's D_A in the same way.
        if teacher_step and args.d_fakes != "none":
            teacher_D.requires_grad_(True)
            teacher_D_A.requires_grad_(True)
            fakes = [pools["teacher_B"].query(fake_B)]
            if args.d_fakes == "both":
                fakes.append(pools["student_B"].query(fake_S.detach()))
            with autocast():
                real, fake = teacher_D(torch.cat([real_B, *fakes])).tensor_split([len(real_B)])
                losses = dict(D_T=discriminator_loss(real, fake, "lsgan") / 2)
                if not args.freeze_teacher:
                    real, fake = teacher_D_A(torch.cat([real_A, pools["teacher_A"].query(fake_A)])).chunk(2)
                    losses["D_T_A"] = discriminator_loss(real, fake, "lsgan") / 2
            take_step(optimizers["teacher_D"], sum(losses.values()))
            meter.add(**losses)

        # Log, samples, checkpoint, evaluation
        done, signal_number = step + 1, stop_asked()
        last = done == last_step
        if done % args.log_every == 0 or last:
            epoch, cut = done * global_batch / len(dataset), done % args.log_every > 0 and done < schedule_steps
            entry = dict(step=done, epoch=epoch, teacher_epoch=epoch / args.teacher_every, images=done * global_batch)
            progress = f"epoch {epoch:.2f} (teacher {epoch / args.teacher_every:.2f})"
            models.log_step(args, entry | dict(lr=lr), progress, meter.means(done), last_step, since, cut)
        if done % args.log_every == 0:
            meter, since = LossMeter(), (time.perf_counter(), done * global_batch)
        interrupted = time.perf_counter()
        if rank == 0 and args.sample_every and (done % args.sample_every == 0 or last):
            save_samples(out / f"samples/{done:07d}.png", networks["teacher_G"], shown, dcd_loss, sample_A, sample_B)
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
    return ResnetGenerator(ngf=ngf, separable=arch.startswith("mobile_"))


@torch.no_grad()
def evaluate(teacher_G, student_G, test_A, test_B, inception, workers, to_device):
    """{"student_to_teacher": mean |G_S(x) - G_T(x)|} over the test images, and with an Inception the Fréchet distances
    of both generators' translations to the real B, "fid_teacher" and "fid_student"."""

    def images(dataset):
        return map(to_device, models.share_batches(dataset, 8, workers))

    errors = [image_errors(student_G(x), teacher_G(x))[0].tolist() for x in images(test_A)]
    scores = dict(student_to_teacher=float(np.mean(sum(sum(gather(errors), []), []))))
    if inception:
        real = generated_stats(images(test_B), inception)
        for name, net in (("teacher", teacher_G), ("student", student_G)):
            fake = generated_stats(map(net, images(test_A)), inception)
            scores[f"{inception.key}_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


@torch.no_grad()
def save_samples(path, teacher_G, student_G, dcd_loss, real_A, real_B):
    """Columns: input, teacher, student, a real B, and the input as either first connector shows it to D_T."""
    fake_B, teacher_taps = teacher_G(real_A, taps=True)
    fake_S, student_taps = student_G(real_A, taps=True)
    columns = {"input": real_A, "teacher": fake_B, "student": fake_S, "a real B": real_B}
    if isinstance(dcd_loss, DCDLoss):
        maps = {"teacher's map": dcd_loss.teacher_connectors[0](teacher_taps[0])}
        maps["student's map"] = dcd_loss.student_connectors[0](student_taps[0])
        for name, shown in maps.items():
            shown = shown / shown.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
            columns[name] = 2 * TF.resize(shown, real_A.shape[2:], TF.InterpolationMode.NEAREST) - 1
    models.save_grid(path, columns)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def load_square(files, index, size):
    """The index-th image, resized to size x size (bicubic)."""
    return TF.resize(files[index], [size, size], TF.InterpolationMode.BICUBIC)


def to_tensor(image):
    """PIL image -> (3, H, W) in [-1, 1]."""
    return TF.to_dtype(TF.to_image(image), torch.float32, scale=True) * 2 - 1


@functools.lru_cache(maxsize=4)
def shuffled(length, seed, epoch, domain):
    return np.random.default_rng([seed, epoch, domain]).permutation(length)


class UnpairedImages(Dataset):
    """Item n of the training run: the n-th image of either domain, in an order shuffled for every pass through it.

    Order, crop and flip depend on the seed and n alone, so a run that resumes at n sees what it would have seen.
    """

    def __init__(self, files_A, files_B, load_size, crop_size, seed):
        self.domains, self.load_size, self.crop_size, self.seed = (files_A, files_B), load_size, crop_size, seed

    def __len__(self):
        return max(map(len, self.domains))

    def __getitem__(self, n):
        rng = np.random.default_rng([self.seed, n])
        pair = []
        for domain, files in enumerate(self.domains):
            epoch, k = divmod(n, len(files))
            image = load_square(files, shuffled(len(files), self.seed, epoch, domain)[k], self.load_size)
            top, left = rng.integers(self.load_size - self.crop_size + 1, size=2).tolist()
            image = TF.crop(image, top, left, self.crop_size, self.crop_size)
            pair.append(to_tensor(TF.horizontal_flip(image) if rng.random() < 0.5 else image))
        return pair


class TestImages(Dataset):
    """The images of one domain, resized to the size that the networks were trained at."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return to_tensor(load_square(self.files, index, self.size))


# What --toy changes; any flag on the command line wins over it.
TOY = dict(epochs=5, epochs_decay=5, load_size=104, crop_size=96, batch_size=2, teacher_ngf=24, student_ngf=12, ndf=16)
TOY |= dict(lr=4e-4, lambda_style=0.0, lambda_feature=20.0, vgg="random", inception="none", eval_every=5, workers=0)
TOY |= dict(log_every=20, sample_every=80, save_every=80)


def write_toy_dataset(folder, size=104, n_train=64, n_test=8):
    """A: plain, B: striped ellipses, both on textured backgrounds."""
    for domain in "AB":
        for phase, count in (("train", n_train), ("test", n_test)):
            (folder / f"{phase}{domain}").mkdir(parents=True, exist_ok=True)
            for i in range(count):
                rng = np.random.default_rng([domain == "B", phase == "test", i])
                texture = np.kron(rng.normal(size=(size // 8, size // 8)), np.ones((8, 8)))
                green = np.array([90, 150, 70]) + rng.normal(0, 12, 3)
                background = green + 14 * texture[..., None] + 5 * rng.normal(size=(size, size, 1))
                image = Image.fromarray(background.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
                mask = Image.new("L", (size, size))
                for _ in range(rng.integers(1, 3)):
                    (x, y), (rx, ry) = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.16, 0.28, 2) * size
                    ImageDraw.Draw(mask).ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
                shade = np.linspace(1.1, 0.8, size)[:, None, None] * np.ones((size, size, 1))
                coat = shade * (np.array([190, 110, 50]) + rng.normal(0, 8, 3))
                if domain == "B":
                    wave = np.arange(size)[None] + 4 * np.sin(np.arange(size)[:, None] / 9 + rng.uniform(0, 6))
                    coat = shade * np.where(np.sin(wave * 2 * np.pi / 12) > 0, 225, 30)[..., None] * np.ones(3)
                coat = Image.fromarray(coat.clip(0, 255).astype(np.uint8))
                image.paste(coat, mask=mask.filter(ImageFilter.GaussianBlur(0.7)))
                image.save(folder / f"{phase}{domain}" / f"{i:03d}.png")


class ImagePool:
    """The last so many fakes: half of the time a discriminator sees an old one, which is replaced by the new."""

    def __init__(self, size):
        self.size, self.images = size, []

    def query(self, images):
        """(N, C, H, W) without gradient -> as many, new or old."""
        chosen = []
        for image in images:
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and torch.rand(()) < 0.5:
                slot = torch.randint(self.size, ()).item()
                image, self.images[slot] = self.images[slot], image.clone()
            chosen.append(image)
        return torch.stack(chosen)


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
