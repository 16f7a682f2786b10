"""Compresses a CycleGAN generator with DCD: Discriminator-Cooperated Feature Map Distillation (arXiv 2212.14169).

A small student generator learns from a large teacher that is trained alongside it. Four feature maps of each, the taps,
are compared not pixel by pixel but as the teacher's discriminator D_T sees them: each tap goes through a 1x1 connector
and all layers of D_T but the last. D_T also judges the student's images. By default it starts from random weights and
learns together with teacher and student: a trained D_T would be too strong an opponent for the small student.

    python train_cyclegan_dcd.py --toy                                    # no data needed, minutes on a laptop
    python train_cyclegan_dcd.py --data datasets/horse2zebra              # the paper's experiment
    torchrun --nproc_per_node 8 train_cyclegan_dcd.py --data datasets/horse2zebra
"""

import copy
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.functional import l1_loss
from torch.utils.data import Dataset

import fid
import models
from fid import ImageFiles, frechet_distance, gather, generated_stats
from losses import DCDLoss, Meter, PerceptualLoss, PixelLoss, discriminator_loss, generator_loss, take_step, update_ema
from models import InputError, PatchDiscriminator, ResnetGenerator, at_least, init_weights, say

NAME = "cyclegan_dcd"
ARCHS = ("mobile_resnet_9blocks", "resnet_9blocks")
D_FAKES = ("both", "teacher", "none")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments and, when resuming, the checkpoint."""
    parser = models.run_parser(__doc__)
    option, number = models.add_section(parser, "data")
    option("--data", metavar="FOLDER", help="holds trainA/ trainB/ testA/ testB/; with --resume if it has moved")
    option("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which domain is translated into which")
    number("--crop-size", 256, "side of the random crops, pixels, a multiple of 4", minimum=24)
    option("--load-size", type=at_least(24), help="images are first resized to this square; crop size * 286/256")
    option("--toy", action="store_true", help="small networks; without --data synthetic pictures, plain to striped")
    option, number = models.add_section(parser, "networks; what files of ours store wins")
    option("--teacher", nargs="+", metavar="FILE", help="G [F [D_T [D_A]]] (CycleGAN's G_A G_B D_A D_B), checkpoint.pt")
    option("--student", nargs=1, metavar="FILE", help="a student.pt or checkpoint.pt of ours to start from")
    option("--teacher-arch", choices=ARCHS, default=ARCHS[0], help="the teacher's generators")
    option("--student-arch", choices=ARCHS, default=ARCHS[0], help="the student's generator")
    number("--teacher-ngf", 64, "channels of the teacher's first convolution")
    number("--student-ngf", 16, "channels of the student's first convolution")
    number("--ndf", 64, "channels of the discriminators' first convolution")
    option("--vgg", default="auto", help="VGG16 of the perceptual terms: auto (is downloaded) or a weight file")
    option, number = models.add_section(parser, "method")
    number("--lambda-gan", 1.0, "student: weight of the adversarial term")
    number("--lambda-dcd", 1.0, "student: weight of the distillation of feature maps")
    number("--lambda-style", 1e4, "student: weight of the Gram matrices in VGG16")
    number("--lambda-feature", 10.0, "student: weight of relu2_2 of VGG16")
    number("--lambda-cycle", 10.0, "teacher: weight of cycle consistency")
    number("--lambda-identity", 0.5, "teacher: weight of the identity term, times that of the cycle")
    number("--teacher-every", 4, "the teacher and the discriminators learn at every N-th step of the student")
    number("--pool-size", 50, "past fakes that the discriminators see again, images", minimum=0)
    option("--distill", choices=("dcd", "pixel"), default="dcd", help="feature maps through D_T or pixel by pixel")
    number("--tap-size", 64, "shortest side of the maps given to D_T, pixels: smaller ones are enlarged", minimum=24)
    option("--d-fakes", choices=D_FAKES, default="both", help="whose fakes D_T learns from; none: D_T, D_A are frozen")
    option("--freeze-teacher", action="store_true", help="leave the teacher's generators as they are; D_T learns")
    option, number = models.add_section(parser, "optimisation")
    number("--epochs", 400, "the student's passes through the data at full learning rate")
    number("--epochs-decay", 400, "further passes, the learning rate falling towards 0", minimum=0)
    number("--batch-size", 1, "images per process and step")
    number("--lr", 2e-4, "learning rate of Adam")
    number("--ema", 0.0, "half-life of the student's moving average, images; 0: a copy")
    models.add_run_options(parser, unit="epochs", eval_every=40, auto="")

    args, checkpoint = models.parse_run(parser, argv, NAME, TOY, budgets=("epochs", "epochs_decay"))
    check(args)
    return args, checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# The method


def train(args, checkpoint):
    device = fid.pick_device(args.device)
    rank, world = models.start_processes(device, args.amp, one_thread=args.toy)
    out = Path(args.out)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.amp == "bf16")
    layout = models.fast_layout(device)
    to_device = functools.partial(torch.Tensor.to, device=device, memory_format=layout, non_blocking=True)
    dataset, test_A, test_B = open_data(args, checkpoint)  # A is the source domain, B the target

    # Networks: the teacher is a whole CycleGAN. teacher_G, in the formulas G, translates A to B, teacher_F, F, back;
    # teacher_D, D_T, judges B, teacher_D_A, D_A, judges A. The student is student_G, G_S, alone
    torch.manual_seed(args.seed)
    teacher_G = init_weights(ResnetGenerator(args.teacher_ngf, separable="mobile" in args.teacher_arch))
    teacher_F = init_weights(ResnetGenerator(args.teacher_ngf, separable="mobile" in args.teacher_arch))
    teacher_D = init_weights(PatchDiscriminator(3, args.ndf))
    teacher_D_A = init_weights(PatchDiscriminator(3, args.ndf))
    student_G = init_weights(ResnetGenerator(args.student_ngf, separable="mobile" in args.student_arch))
    networks = dict(teacher_G=teacher_G, teacher_F=teacher_F, teacher_D=teacher_D, teacher_D_A=teacher_D_A)
    networks["student_G"] = student_G
    # Files may have other widths, so before the connectors and the optimisers
    models.load_given(args, checkpoint, networks, ["teacher_G", "teacher_F", "teacher_D", "teacher_D_A"])

    # Losses. The taps are the input of the first residual block and the outputs of the third, sixth and ninth, at a
    # quarter of the image's side; connectors turn each into the 3 channels that D_T reads, then --tap-size enlarges it
    if args.distill == "dcd":
        distill_loss = DCDLoss(student_G.tap_channels, teacher_G.tap_channels, 3, args.tap_size)
    else:
        distill_loss = PixelLoss(student_G.tap_channels, teacher_G.tap_channels)
    perceptual_loss = None
    if args.lambda_style or args.lambda_feature:
        perceptual_loss = PerceptualLoss(args.vgg).to(device, memory_format=layout)

    # The student's moving average is what is evaluated and written to student.pt; distill_loss holds the connectors
    student_G_ema = copy.deepcopy(student_G).requires_grad_(False)
    networks |= dict(student_G_ema=student_G_ema, distill_loss=distill_loss)
    for net in networks.values():
        net.to(device, memory_format=layout)
    models.broadcast_weights(networks.values())
    measures_fid = args.eval_every and args.inception != "none"
    inception = fid.load_inception(args.inception, device) if measures_fid else None

    # Optimisers; the teacher's connectors are in none of them
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(0.5, 0.999), fused=True)
    optimizer_T = adam([*teacher_G.parameters(), *teacher_F.parameters()])
    optimizer_D = adam([*teacher_D.parameters(), *teacher_D_A.parameters()])
    optimizer_S = adam([*student_G.parameters(), *distill_loss.student_connectors.parameters()])
    optimizers = dict(teacher_G=optimizer_T, teacher_D=optimizer_D, student_G=optimizer_S)

    # Steps
    global_batch = args.batch_size * world
    epoch_steps = math.ceil(len(dataset) / global_batch)
    decay_steps = args.epochs_decay * epoch_steps
    schedule_steps = args.epochs * epoch_steps + decay_steps
    ema_decay = 0.5 ** (global_batch / max(args.ema, 1e-8))

    # Resume, or begin; own is what each process has for itself
    torch.manual_seed(args.seed + rank)
    first_step, own = 0, dict(losses={}, pools=[[], [], []])
    if checkpoint:
        own = models.restore(checkpoint, networks, optimizers)
        first_step = checkpoint["step"]
        if first_step > schedule_steps:
            raise InputError(f"{out}: has already been trained for {first_step / epoch_steps:.3g} epochs")
    best, scores = models.read_scores(args, first_step)
    meter = Meter(own["losses"])
    pools = [ImagePool(args.pool_size, images) for images in own["pools"]]
    pool_B, pool_A, pool_S = pools  # of G's, F's and G_S's fakes
    last_step = max(first_step, min(schedule_steps, args.max_steps or schedule_steps))
    models.open_output(args, first_step)
    items = range(first_step * global_batch, last_step * global_batch)
    batches = iter(models.share_batches(dataset, args.batch_size, args.workers, items))
    say(f"{out}: steps {first_step} to {last_step} of {schedule_steps}, {epoch_steps} an epoch, on {world} x {device}")

    models.defer_signals()
    pace = models.Pace(global_batch, first_step, last_step)
    for step in range(first_step + 1, last_step + 1):
        real_A, real_B = map(to_device, next(batches))
        n = len(real_A)  # images of each domain

        # The learning rate is constant, then falls linearly, to lr / (decay_steps + 1) at the last step
        steps_left = schedule_steps - step + 1
        lr = args.lr * min(1.0, steps_left / (decay_steps + 1))
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        # The student learns at every step, the teacher and the discriminators at one in teacher_every: 4, since the
        # released code alternates 10 epochs of the teacher with 40 of the student
        teacher_step = (step - 1) % args.teacher_every == 0
        teacher_learns = teacher_step and not args.freeze_teacher
        # The discriminators are fixed while the generators learn
        teacher_D.requires_grad_(False)
        teacher_D_A.requires_grad_(False)

        # Teacher, with x = real_A and y = real_B; |.| is the mean absolute value:
        # L_T = E[(D_T(G(x)) - 1)^2] + E[(D_A(F(y)) - 1)^2]
        #       + lambda_cycle (|F(G(x)) - x| + |G(F(y)) - y| + lambda_identity (|F(x) - x| + |G(y) - y|))
        if teacher_learns:
            with autocast():
                # As one batch: x and y through G; y, x and G(x) through F; instance norm sees every image alone
                images_B, taps_of_xy = teacher_G(torch.cat([real_A, real_B]), taps=True)
                fake_B, idt_B = images_B[:n], images_B[n:]
                fake_A, idt_A, rec_A = teacher_F(torch.cat([real_B, real_A, fake_B])).chunk(3)
                rec_B = teacher_G(fake_A)
                loss_gan = generator_loss(teacher_D(fake_B), "lsgan") + generator_loss(teacher_D_A(fake_A), "lsgan")
            loss_cycle = l1_loss(rec_A, real_A) + l1_loss(rec_B, real_B)
            loss_identity = l1_loss(idt_A, real_A) + l1_loss(idt_B, real_B)
            loss_T = loss_gan + args.lambda_cycle * (loss_cycle + args.lambda_identity * loss_identity)
            take_step(optimizer_T, loss_T)
            meter.add(G_T_gan=loss_gan, G_T_cycle=loss_cycle, G_T_identity=loss_identity)
            # Student and discriminators see these fakes and taps, of G and F before their update
            fake_A, fake_B = fake_A.detach(), fake_B.detach()
            teacher_taps = [tap[:n].detach() for tap in taps_of_xy]  # those of x
        else:
            with autocast(), torch.no_grad():
                fake_B, teacher_taps = teacher_G(real_A, taps=True)

        # Student, with taps f_i, connectors c_i, and phi, which is D_T without its last layer:
        # L_S = lambda_gan E[(D_T(G_S(x)) - 1)^2] + lambda_dcd sum_i |phi(c_i^S(f_i^S)) - phi(c_i^T(f_i^T))|
        #       + lambda_style L_style(G_S(x), G(x)) + lambda_feature L_feature(G_S(x), G(x))
        # The teacher's connectors c_i^T stay random: if both learned, mapping all to zero would be optimal. L_style and
        # L_feature are L1 distances in VGG16, of Gram matrices and of relu2_2
        fake_S, student_taps = student_G(real_A, taps=True)  # no autocast: bf16 changes its gradient's direction
        with autocast():
            loss_gan = generator_loss(teacher_D(fake_S), "lsgan")
            loss_dcd = distill_loss(student_taps, teacher_taps, phi=teacher_D.features)
            loss_S = args.lambda_gan * loss_gan + args.lambda_dcd * loss_dcd
            if perceptual_loss:
                loss_style, loss_feature = perceptual_loss(fake_S, fake_B)
                loss_S = loss_S + args.lambda_style * loss_style + args.lambda_feature * loss_feature
                meter.add(G_S_style=loss_style, G_S_feature=loss_feature)
        take_step(optimizer_S, loss_S)
        meter.add(G_S_gan=loss_gan, G_S_dcd=loss_dcd)
        update_ema(student_G_ema, student_G, ema_decay)

        # Discriminators: (E[(D_T(y) - 1)^2] + E[D_T(fake)^2]) / 2, half of the fakes G's, half G_S's: that makes D_T
        # what the paper calls collaborative. D_A, the teacher's alone, in the same way with x and F's fakes
        if teacher_step and args.d_fakes != "none":
            teacher_D.requires_grad_(True)
            teacher_D_A.requires_grad_(True)
            fakes = [pool_B.query(fake_B)]
            if args.d_fakes == "both":
                fakes.append(pool_S.query(fake_S.detach()))
            with autocast():
                logits = teacher_D(torch.cat([real_B, *fakes]))
                loss_D = discriminator_loss(logits[:n], logits[n:], "lsgan") / 2
                meter.add(D_T=loss_D)
                if teacher_learns:
                    logits = teacher_D_A(torch.cat([real_A, pool_A.query(fake_A)]))
                    loss_D_A = discriminator_loss(logits[:n], logits[n:], "lsgan") / 2
                    loss_D = loss_D + loss_D_A
                    meter.add(D_A=loss_D_A)
            take_step(optimizer_D, loss_D)

        # Log
        last = step == last_step
        if step % args.log_every == 0 or last:
            epoch = step * global_batch / len(dataset)
            entry = dict(step=step, epoch=epoch, images=step * global_batch, lr=lr)
            models.log(args, entry | pace.read(step) | meter.means())
            meter = Meter()

        # Samples
        if rank == 0 and args.sample_every and (step % args.sample_every == 0 or last):
            save_samples(out / f"samples/{step:07d}.png", teacher_G, student_G_ema, test_A, test_B)

        # Save, before the evaluation, which takes long. After a signal stop here, without evaluating
        stop_signal = models.stop_asked()
        due = args.eval_every and (step % (args.eval_every * epoch_steps) == 0 or last)
        if step % args.save_every == 0 or due or last or stop_signal:
            own = dict(losses=meter.state(), pools=[pool.state() for pool in pools])
            models.save_checkpoint(out / "checkpoint.pt", networks, optimizers, own, step=step)
            models.save(out / "student.pt", student_G_ema)
        if stop_signal:
            models.end_run(args, step, stop_signal)

        # Evaluate
        if due:
            scores = dict(step=step, evaluation=True)
            with models.interruptible():
                scores |= evaluate(teacher_G, student_G_ema, test_A, test_B, inception, args.workers, to_device)
            if scores.get("fid_student", math.inf) < best:
                best = scores["fid_student"]
                models.save(out / "best_student.pt", student_G_ema)
            models.log(args, scores)
            pace.restart(step)

    if rank == 0:
        image = torch.randn(1, 3, args.crop_size, args.crop_size, device=device)
        calls = dict(teacher=(teacher_G, image), student=(student_G_ema, image))
        models.write_summary(out, last_step, scores, calls)


def check(args):
    """Settles the load size; InputError for options that contradict each other."""
    args.load_size = args.load_size or round(args.crop_size * 286 / 256)
    if args.crop_size % 4 or args.load_size < args.crop_size:
        raise InputError(f"--crop-size {args.crop_size}: expected a multiple of 4, up to --load-size {args.load_size}")
    if args.freeze_teacher and not args.teacher:
        raise InputError("--freeze-teacher needs a trained --teacher FILE")
    if args.d_fakes == "none" and not args.freeze_teacher:
        raise InputError("--d-fakes none needs --freeze-teacher: no teacher can learn against a frozen D_T")


class ImagePool:
    """Up to size past fakes. Once full, each new fake is, half of the time, swapped for a stored one at random."""

    def __init__(self, size, images):
        self.size, self.images = size, images

    def state(self):
        return [image.cpu() for image in self.images]

    def query(self, images):
        """(N, C, H, W) without gradient -> as many, new or old."""
        chosen = []
        for image in images:
            if len(self.images) < self.size:  # the pool fills up
                self.images.append(image.clone())
            elif self.size and torch.rand(()) < 0.5:  # a stored one goes out, the new one takes its place
                slot = torch.randint(self.size, ()).item()
                old = self.images[slot]
                self.images[slot] = image.clone()
                image = old.to(images.device)  # it may be from a checkpoint
            chosen.append(image)
        return torch.stack(chosen)


@torch.no_grad()
def evaluate(teacher_G, student_G, test_A, test_B, inception, workers, to_device):
    """{"student_to_teacher": mean |G_S(x) - G(x)|} over the test images, and with an Inception network the Fréchet
    distances of both generators' translations to the real B, "fid_teacher" and "fid_student"."""

    def batches(dataset):
        return map(to_device, models.share_batches(dataset, 8, workers))

    errors = []
    for x in batches(test_A):
        difference = student_G(x) - teacher_G(x)
        errors += difference.abs().mean((1, 2, 3)).tolist()
    errors = sum(gather(errors), [])
    scores = dict(student_to_teacher=float(np.mean(errors)))
    if inception:
        real = generated_stats(batches(test_B), inception)
        for name, net in dict(teacher=teacher_G, student=student_G).items():
            fake = generated_stats(map(net, batches(test_A)), inception)
            scores[f"fid_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


@torch.no_grad()
def save_samples(path, teacher_G, student_G, test_A, test_B):
    """The first four test images: input, teacher, student, a real B."""
    device = next(student_G.parameters()).device
    shown = range(min(4, len(test_A), len(test_B)))
    real_A = torch.stack([test_A[i] for i in shown]).to(device)
    real_B = torch.stack([test_B[i] for i in shown])
    columns = {"input": real_A, "teacher": teacher_G(real_A), "student": student_G(real_A), "a real B": real_B}
    models.save_grid(path, columns)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(args, checkpoint):
    """The training set and the test sets of A and B, swapped as --direction says; checks every header."""
    data = models.data_folder(args, checkpoint, write_toy_dataset)
    source, target = args.direction.split("to")
    train_A, train_B = ImageFiles(data / f"train{source}"), ImageFiles(data / f"train{target}")
    test_A, test_B = ImageFiles(data / f"test{source}"), ImageFiles(data / f"test{target}")
    for files in (train_A, train_B, test_A, test_B):
        files.check()
        say(files)
    dataset = UnpairedImages(train_A, train_B, args.load_size, args.crop_size, args.seed)
    return dataset, TestImages(test_A, args.crop_size), TestImages(test_B, args.crop_size)


def load_square(files, index, size):
    """The index-th image, or the next that can be read, resized to size x size (bicubic)."""
    return TF.resize(files.next_readable(index), [size, size], TF.InterpolationMode.BICUBIC)


def to_tensor(image):
    """PIL image -> (3, H, W) in [-1, 1]."""
    return TF.to_dtype(TF.to_image(image), torch.float32, scale=True) * 2 - 1


class UnpairedImages(Dataset):
    """Item n of the training run: the n-th image of each domain, in an order shuffled for every pass through it.

    Order, crop and flip depend on the seed and n alone, so a run that resumes at n sees what it would have seen.
    """

    def __init__(self, files_A, files_B, load_size, crop_size, seed):
        self.domains = files_A, files_B
        self.load_size, self.crop_size, self.seed = load_size, crop_size, seed

    def __len__(self):
        return max(map(len, self.domains))

    def __getitem__(self, n):
        rng = np.random.default_rng([self.seed, n])
        pair = []
        for domain, files in enumerate(self.domains):
            epoch, k = divmod(n, len(files))
            order = models.shuffled(len(files), self.seed, epoch, domain)
            image = load_square(files, order[k], self.load_size)
            margin = self.load_size - self.crop_size
            top, left = rng.integers(margin + 1, size=2).tolist()
            image = TF.crop(image, top, left, self.crop_size, self.crop_size)
            if rng.random() < 0.5:
                image = TF.horizontal_flip(image)
            pair.append(to_tensor(image))
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
TOY = dict(
    epochs=9,
    epochs_decay=8,
    load_size=72,
    crop_size=64,
    batch_size=2,
    lr=4e-4,
    ema=100.0,
    teacher_ngf=16,
    student_ngf=8,
    ndf=16,
    lambda_dcd=10.0,
    lambda_style=0.0,
    lambda_feature=0.0,
    inception="none",
    eval_every=9,
    log_every=20,
    sample_every=160,
    save_every=320,
    workers=1,
)


def write_toy_dataset(folder, size=104):
    """A: plain, B: striped ellipses, both on textured backgrounds."""

    def picture(pixels):
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    for domain in "AB":
        for phase, count in (("train", 64), ("test", 8)):
            (folder / f"{phase}{domain}").mkdir(parents=True, exist_ok=True)
            for i in range(count):
                rng = np.random.default_rng([domain == "B", phase == "test", i])
                patches = rng.normal(size=(size // 8, size // 8))
                texture = np.kron(patches, np.ones((8, 8)))[..., None]
                green = np.array([90, 150, 70]) + rng.normal(0, 12, 3)
                noise = rng.normal(size=(size, size, 1))
                ground = picture(green + 14 * texture + 5 * noise)
                image = ground.filter(ImageFilter.GaussianBlur(1.5))
                mask = Image.new("L", (size, size))
                for _ in range(rng.integers(1, 3)):
                    x, y = rng.uniform(0.3, 0.7, 2) * size
                    rx, ry = rng.uniform(0.16, 0.28, 2) * size
                    box = (x - rx, y - ry, x + rx, y + ry)
                    ImageDraw.Draw(mask).ellipse(box, fill=255)
                coat = np.array([190, 110, 50]) + rng.normal(0, 8, 3)
                if domain == "B":
                    places = np.arange(size)
                    bend = 4 * np.sin(places / 9 + rng.uniform(0, 6))
                    wave = places + bend[:, None]
                    stripes = np.sin(wave * 2 * np.pi / 12) > 0
                    coat = np.where(stripes, 225, 30)[..., None]
                shade = np.linspace(1.1, 0.8, size)[:, None, None]
                coat = picture(shade * coat * np.ones((size, size, 3)))
                soft_mask = mask.filter(ImageFilter.GaussianBlur(0.7))
                image.paste(coat, mask=soft_mask)
                image.save(folder / f"{phase}{domain}" / f"{i:03d}.png")


def main(argv=None):
    models.run_script(f"train_{NAME}", parse_args, train, argv)


if __name__ == "__main__":
    main()
