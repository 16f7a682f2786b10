"""Compresses a Pix2Pix generator with DCD: Discriminator-Cooperated Feature Map Distillation (arXiv 2212.14169).

A small student generator learns from a large teacher that is trained alongside it. Four feature maps of each, the taps,
are compared not pixel by pixel but as the teacher's discriminator D_T sees them: each tap goes through a 1x1 connector
and all layers of D_T but the last. D_T, which reads (input, image) pairs, also judges the student's images. By default
it starts from random weights and learns together with teacher and student: a trained D_T would be too strong an
opponent for the small student.

    python train_pix2pix_dcd.py --toy                                     # no data needed, minutes on a laptop
    python train_pix2pix_dcd.py --data datasets/edges2shoes               # the paper's experiment
    python train_pix2pix_dcd.py --data datasets/edges2shoes --teacher-arch unet_256 --student-arch unet_256
    torchrun --nproc_per_node 8 train_pix2pix_dcd.py --data datasets/edges2shoes
"""

import copy
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from torch.nn.functional import l1_loss
from torch.utils.data import Dataset

import fid
import models
from fid import ImageFiles, frechet_distance, gather, generated_stats
from losses import DCDLoss, Meter, PerceptualLoss, PixelLoss, discriminator_loss, generator_loss, take_step, update_ema
from models import InputError, PatchDiscriminator, ResnetGenerator, UnetGenerator, at_least, init_weights, say

NAME = "pix2pix_dcd"
ARCHS = ("mobile_resnet_9blocks", "resnet_9blocks", "unet_256")
D_FAKES = ("both", "teacher", "none")

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments and, when resuming, the checkpoint."""
    parser = models.run_parser(__doc__)
    option, number = models.add_section(parser, "data")
    option("--data", metavar="FOLDER", help="holds train/ and val/ or test/, of pairs; with --resume if it has moved")
    option("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which domain is translated into which")
    number("--crop-size", 256, "side of the random crops, pixels: 4 n, for a U-Net 256 n", minimum=24)
    option("--load-size", type=at_least(24), help="images are first resized to this square; crop size * 286/256")
    option("--toy", action="store_true", help="small networks; without --data synthetic pictures, drawings to solids")
    option, number = models.add_section(parser, "networks; what files of ours store wins")
    option("--teacher", nargs="+", metavar="FILE", help="trained G [D], or a checkpoint.pt of ours")
    option("--student", nargs=1, metavar="FILE", help="a student.pt or checkpoint.pt of ours to start from")
    option("--teacher-arch", choices=ARCHS, default=ARCHS[0], help="the teacher's generator")
    option("--student-arch", choices=ARCHS, default=ARCHS[0], help="the student's generator")
    number("--teacher-ngf", 64, "channels of the teacher's first convolution")
    number("--student-ngf", 16, "channels of the student's first convolution")
    number("--ndf", 128, "channels of the discriminator's first convolution")
    option("--vgg", default="auto", help="VGG16 of the perceptual terms: auto (is downloaded) or a weight file")
    option, number = models.add_section(parser, "method")
    number("--lambda-gan", 1.0, "student: weight of the adversarial term")
    number("--lambda-dcd", 1.0, "student: weight of the distillation of feature maps")
    number("--lambda-style", 1e4, "student: weight of the Gram matrices in VGG16")
    number("--lambda-feature", 10.0, "student: weight of relu2_2 of VGG16")
    number("--lambda-l1", 100.0, "teacher: weight of the L1 distance to the real image")
    number("--teacher-every", 1, "the teacher and D_T learn at every N-th step of the student")
    option("--distill", choices=("dcd", "pixel"), default="dcd", help="feature maps through D_T or pixel by pixel")
    number("--tap-size", 64, "shortest side of the maps given to D_T, pixels: smaller ones are enlarged", minimum=24)
    option("--d-fakes", choices=D_FAKES, default="both", help="whose fakes D_T learns from; none: it is frozen")
    option("--freeze-teacher", action="store_true", help="leave the teacher's generator as it is; D_T learns")
    option, number = models.add_section(parser, "optimisation")
    number("--epochs", 100, "passes through the data at full learning rate")
    number("--epochs-decay", 100, "further passes, the learning rate falling towards 0", minimum=0)
    number("--batch-size", 4, "images per process and step")
    number("--lr", 2e-4, "learning rate of Adam")
    number("--ema", 0.0, "half-life of the student's moving average, images; 0: a copy")
    models.add_run_options(parser, unit="epochs", eval_every=10, auto="")

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
    dataset, test_set = open_data(args, checkpoint)  # A is the input, B the target

    # Networks: teacher_D, the paper's D_T, is conditional, it reads input and image as six channels
    torch.manual_seed(args.seed)
    teacher_G = init_weights(build_generator(args.teacher_arch, args.teacher_ngf))
    teacher_D = init_weights(PatchDiscriminator(6, args.ndf))
    student_G = init_weights(build_generator(args.student_arch, args.student_ngf))
    networks = dict(teacher_G=teacher_G, teacher_D=teacher_D, student_G=student_G)
    # Files may have other widths, so before the connectors and the optimisers
    models.load_given(args, checkpoint, networks, ["teacher_G", "teacher_D"])

    # Losses: for the taps see the generators' forward
    if args.distill == "dcd":
        distill_loss = DCDLoss(student_G.tap_channels, teacher_G.tap_channels, 6, args.tap_size)
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
    optimizer_T = adam(teacher_G.parameters())
    optimizer_D = adam(teacher_D.parameters())
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
    first_step, own = 0, dict(losses={})
    if checkpoint:
        own = models.restore(checkpoint, networks, optimizers)
        first_step = checkpoint["step"]
        if first_step > schedule_steps:
            raise InputError(f"{out}: has already been trained for {first_step / epoch_steps:.3g} epochs")
    best, scores = models.read_scores(args, first_step)
    meter = Meter(own["losses"])
    last_step = max(first_step, min(schedule_steps, args.max_steps or schedule_steps))
    models.open_output(args, first_step)
    items = range(first_step * global_batch, last_step * global_batch)
    batches = iter(models.share_batches(dataset, args.batch_size, args.workers, items))
    say(f"{out}: steps {first_step} to {last_step} of {schedule_steps}, {epoch_steps} an epoch, on {world} x {device}")

    models.defer_signals()
    pace = models.Pace(global_batch, first_step, last_step)
    for step in range(first_step + 1, last_step + 1):
        real_A, real_B = map(to_device, next(batches))

        # The learning rate is constant, then falls linearly, to lr / (decay_steps + 1) at the last step
        steps_left = schedule_steps - step + 1
        lr = args.lr * min(1.0, steps_left / (decay_steps + 1))
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        # The student learns at every step, the teacher and D_T at one in teacher_every
        teacher_step = (step - 1) % args.teacher_every == 0
        teacher_learns = teacher_step and not args.freeze_teacher

        # One forward pass of each generator serves its own update, the distillation and the discriminator. G_S is kept
        # out of autocast: bf16 in its residual blocks would change the direction of its gradient
        with autocast(), torch.set_grad_enabled(teacher_learns):
            fake_B, teacher_taps = teacher_G(real_A, taps=True)
        fake_S, student_taps = student_G(real_A, taps=True)

        # Discriminator, with x = real_A, y = real_B, half of the fakes G's, half G_S's, as the paper's collaborative
        # discriminator sees them:
        # L_D = (E[max(0, 1 - D_T(x, y))] + E[max(0, 1 + D_T(x, fake))]) / 2
        if teacher_step and args.d_fakes != "none":
            teacher_D.requires_grad_(True)
            images = [real_B, fake_B.detach()]
            if args.d_fakes == "both":
                images.append(fake_S.detach())
            pairs = torch.cat([torch.cat([real_A, image], 1) for image in images])
            with autocast():
                logits = teacher_D(pairs)
                real, fake = logits[: len(real_A)], logits[len(real_A) :]
                loss_D = discriminator_loss(real, fake, "hinge") / 2
            take_step(optimizer_D, loss_D)
            meter.add(D_T=loss_D)

        # Teacher: L_T = - E[D_T(x, G(x))] + lambda_l1 |G(x) - y|
        teacher_D.requires_grad_(False)  # D_T is fixed while the generators learn
        if teacher_learns:
            with autocast():
                loss_gan = generator_loss(teacher_D(torch.cat([real_A, fake_B], 1)), "hinge")
            loss_l1 = l1_loss(fake_B, real_B)
            loss_T = loss_gan + args.lambda_l1 * loss_l1
            take_step(optimizer_T, loss_T)
            meter.add(G_T_gan=loss_gan, G_T_l1=loss_l1)

        # Student, with taps f_i, connectors c_i, and phi, which is D_T without its last layer:
        # L_S = - lambda_gan E[D_T(x, G_S(x))] + lambda_dcd sum_i |phi(c_i^S(f_i^S)) - phi(c_i^T(f_i^T))|
        #       + lambda_style L_style(G_S(x), G(x)) + lambda_feature L_feature(G_S(x), G(x))
        # The teacher's connectors c_i^T stay random: if both learned, mapping all to zero would be optimal. L_style and
        # L_feature are L1 distances in VGG16, of Gram matrices and of relu2_2
        with autocast():
            loss_gan = generator_loss(teacher_D(torch.cat([real_A, fake_S], 1)), "hinge")
            loss_dcd = distill_loss(student_taps, teacher_taps, phi=teacher_D.features)
            loss_S = args.lambda_gan * loss_gan + args.lambda_dcd * loss_dcd
            if perceptual_loss:
                loss_style, loss_feature = perceptual_loss(fake_S, fake_B)
                loss_S = loss_S + args.lambda_style * loss_style + args.lambda_feature * loss_feature
                meter.add(G_S_style=loss_style, G_S_feature=loss_feature)
        take_step(optimizer_S, loss_S)
        meter.add(G_S_gan=loss_gan, G_S_dcd=loss_dcd)
        update_ema(student_G_ema, student_G, ema_decay)

        # Log
        last = step == last_step
        if step % args.log_every == 0 or last:
            epoch = step * global_batch / len(dataset)
            entry = dict(step=step, epoch=epoch, images=step * global_batch, lr=lr)
            models.log(args, entry | pace.read(step) | meter.means())
            meter = Meter()

        # Samples
        if rank == 0 and args.sample_every and (step % args.sample_every == 0 or last):
            save_samples(out / f"samples/{step:07d}.png", teacher_G, student_G_ema, test_set)

        # Save, before the evaluation, which takes long. After a signal stop here, without evaluating
        stop_signal = models.stop_asked()
        due = args.eval_every and (step % (args.eval_every * epoch_steps) == 0 or last)
        if step % args.save_every == 0 or due or last or stop_signal:
            own = dict(losses=meter.state())
            models.save_checkpoint(out / "checkpoint.pt", networks, optimizers, own, step=step)
            models.save(out / "student.pt", student_G_ema)
        if stop_signal:
            models.end_run(args, step, stop_signal)

        # Evaluate
        if due:
            scores = dict(step=step, evaluation=True)
            with models.interruptible():
                scores |= evaluate(teacher_G, student_G_ema, test_set, inception, args.workers, to_device)
            if scores.get("fid_student", math.inf) < best:
                best = scores["fid_student"]
                models.save(out / "best_student.pt", student_G_ema)
            models.log(args, scores)
            pace.restart(step)

    if rank == 0:
        image = torch.randn(1, 3, args.crop_size, args.crop_size, device=device)
        calls = dict(teacher=(teacher_G, image), student=(student_G_ema, image))
        models.write_summary(out, last_step, scores, calls)


def build_generator(arch, ngf):
    if arch == "unet_256":
        return UnetGenerator(ngf)
    return ResnetGenerator(ngf, separable="mobile" in arch)


def check(args):
    """Settles the load size; InputError for options that contradict each other."""
    args.load_size = args.load_size or round(args.crop_size * 286 / 256)
    multiple = 256 if args.student_arch == "unet_256" else 4
    if args.crop_size % multiple or args.load_size < args.crop_size:
        expected = f"a multiple of {multiple}, up to --load-size {args.load_size}"
        raise InputError(f"--crop-size {args.crop_size}: expected {expected}")
    if ("unet" in args.teacher_arch) != ("unet" in args.student_arch):
        raise InputError(
            f"{args.teacher_arch}, {args.student_arch}: choose two ResNets or two U-Nets, taps differ in size"
        )
    if args.freeze_teacher and not args.teacher:
        raise InputError("--freeze-teacher needs a trained --teacher FILE")
    if args.d_fakes == "none" and not args.freeze_teacher:
        raise InputError("--d-fakes none needs --freeze-teacher: no teacher can learn against a frozen D_T")


@torch.no_grad()
def evaluate(teacher_G, student_G, test_set, inception, workers, to_device):
    """{"mae_teacher": mean |G(x) - y|, "psnr_teacher": dB, the same of the student, "student_to_teacher": mean
    |G_S(x) - G(x)|} over the test pairs, and with an Inception network the Fréchet distances "fid_teacher"
    and "fid_student"."""

    def pairs():
        for real_A, real_B in models.share_batches(test_set, 8, workers):
            yield to_device(real_A), to_device(real_B)

    rows = []
    for real_A, real_B in pairs():
        fake_B, fake_S = teacher_G(real_A), student_G(real_A)
        for y, t, s in zip(real_B, fake_B, fake_S, strict=True):
            of_teacher = [mae(t, y), psnr(t, y)]
            of_student = [mae(s, y), psnr(s, y)]
            rows.append([*of_teacher, *of_student, mae(s, t)])
    means = np.mean(sum(gather(rows), []), axis=0)
    names = ("mae_teacher", "psnr_teacher", "mae_student", "psnr_student", "student_to_teacher")
    scores = dict(zip(names, means.tolist(), strict=True))
    if inception:
        real = generated_stats((real_B for _, real_B in pairs()), inception)
        for name, net in dict(teacher=teacher_G, student=student_G).items():
            fake = generated_stats((net(real_A) for real_A, _ in pairs()), inception)
            scores[f"fid_{name}"] = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    return scores


def mae(image, target):
    """Mean absolute error of an image in [-1, 1]."""
    return (image - target).abs().mean().item()


def psnr(image, target):
    """Peak signal-to-noise ratio, dB, of an image in [-1, 1]."""
    mean_square = (image - target).square().mean().item()
    return 10 * math.log10(4 / max(mean_square, 1e-10))


@torch.no_grad()
def save_samples(path, teacher_G, student_G, test_set):
    """The first four test pairs: input, teacher, student, the real B."""
    device = next(student_G.parameters()).device
    pairs = [test_set[i] for i in range(min(4, len(test_set)))]
    real_A = torch.stack([pair[0] for pair in pairs]).to(device)
    real_B = torch.stack([pair[1] for pair in pairs])
    columns = {"input": real_A, "teacher": teacher_G(real_A), "student": student_G(real_A), "the real B": real_B}
    models.save_grid(path, columns)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(args, checkpoint):
    """The training set and the test set; checks every header."""
    data = models.data_folder(args, checkpoint, write_toy_dataset)
    test_folder = data / "val"
    if not test_folder.exists():
        test_folder = data / "test"
    train, test = ImageFiles(data / "train"), ImageFiles(test_folder)
    for files in (train, test):
        say(files)
        for name, (width, height) in zip(files.names, files.check(), strict=True):
            if width % 2:
                raise InputError(f"{files.source}: {name} is {width}x{height} pixels, expected two halves side by side")
    dataset = PairedImages(train, args.direction, args.load_size, args.crop_size, args.seed)
    return dataset, TestPairs(test, args.direction, args.crop_size)


def load_pair(files, index, direction, size):
    """The halves of the index-th image, or of the next that can be read, as (input, target), each resized to size x
    size (bicubic)."""
    image = files.next_readable(index)
    half = image.width // 2
    pair = []
    for x in (0, half):
        part = image.crop((x, 0, x + half, image.height))
        pair.append(TF.resize(part, [size, size], TF.InterpolationMode.BICUBIC))
    if direction == "BtoA":
        pair.reverse()
    return pair


def to_tensor(image):
    """PIL image -> (3, H, W) in [-1, 1]."""
    return TF.to_dtype(TF.to_image(image), torch.float32, scale=True) * 2 - 1


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
        margin = self.load_size - self.crop_size
        top, left = rng.integers(margin + 1, size=2).tolist()
        order = models.shuffled(len(self), self.seed, epoch)
        pair = load_pair(self.files, order[k], self.direction, self.load_size)
        pair = [TF.crop(image, top, left, self.crop_size, self.crop_size) for image in pair]
        if rng.random() < 0.5:
            pair = [TF.horizontal_flip(image) for image in pair]
        return [to_tensor(image) for image in pair]


class TestPairs(Dataset):
    """The pairs held out, resized to the size that the networks were trained at."""

    def __init__(self, files, direction, size):
        self.files, self.direction, self.size = files, direction, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return [to_tensor(image) for image in load_pair(self.files, index, self.direction, self.size)]


# What --toy changes; any flag on the command line wins over it.
TOY = dict(
    epochs=5,
    epochs_decay=5,
    load_size=72,
    crop_size=64,
    batch_size=2,
    lr=6e-4,
    ema=100.0,
    teacher_every=2,
    teacher_ngf=16,
    student_ngf=8,
    ndf=16,
    lambda_dcd=10.0,
    lambda_style=0.0,
    lambda_feature=0.0,
    inception="none",
    eval_every=5,
    log_every=20,
    sample_every=160,
    save_every=320,
    workers=0,
)


def write_toy_dataset(folder, size=104):
    """A: discs outlined in red and triangles in blue; B: the same shapes solid and shaded."""
    for phase, count in (("train", 96), ("val", 8)):
        (folder / phase).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng([phase == "val", i])
            drawing = Image.new("RGB", (size, size), "white")
            solid = Image.fromarray(np.full((size, size, 3), (225, 215, 195), np.uint8))
            for kind in rng.permutation([0, 1, rng.integers(2)]):
                x, y = rng.uniform(0.22, 0.78, 2) * size
                r = rng.uniform(0.12, 0.22) * size
                n = (32, 3)[kind]
                turn = rng.uniform(0, 2 * np.pi)
                angles = turn + 2 * np.pi * np.arange(n) / n
                corners = [(x + r * np.cos(a), y + r * np.sin(a)) for a in angles]
                mask = Image.new("L", (size, size))
                ImageDraw.Draw(mask).polygon(corners, fill=255)
                ys, xs = np.mgrid[:size, :size]
                offset = (xs - x) + (ys - y)  # from the centre to the right and down, where it is darker
                shade = np.clip(1.15 - offset / (3 * r), 0.4, 1.3)
                colour = np.array([(205, 60, 50), (60, 90, 200)][kind])
                pixels = (shade[..., None] * colour).clip(0, 255).astype(np.uint8)
                solid.paste(Image.fromarray(pixels), mask=mask)
                outline = ((170, 20, 10), (10, 30, 160))[kind]
                ImageDraw.Draw(drawing).polygon(corners, fill="white", outline=outline, width=2)
            both = Image.new("RGB", (2 * size, size))
            both.paste(drawing, (0, 0))
            both.paste(solid, (size, 0))
            both.save(folder / phase / f"{i:03d}.png")


def main(argv=None):
    models.run_script(f"train_{NAME}", parse_args, train, argv)


if __name__ == "__main__":
    main()
