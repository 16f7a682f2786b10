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
import atexit
import ctypes
import functools
import hashlib
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
from losses import DCDLoss, PerceptualLoss, gan_loss
from models import (
    InputError,
    PatchDiscriminator,
    ResnetGenerator,
    UnetGenerator,
    comparison,
    cost,
    init_weights,
    load_file,
    load_networks,
    load_weights,
    save_checkpoint,
    save_generator,
    write_atomically,
    write_json,
)

NAME = "pix2pix_dcd"
ARCHS = ("mobile_resnet_9blocks", "resnet_9blocks", "unet_256")
# What --toy changes; any flag on the command line wins over it.
TOY = dict(epochs=4, epochs_decay=4, load_size=104, crop_size=96, batch_size=2, teacher_ngf=24, student_ngf=12, ndf=16)
TOY |= dict(lr=6e-4, lambda_style=0.0, lambda_feature=300.0, vgg="random", inception="none", eval_every=0, workers=0)
TOY |= dict(log_every=20, sample_every=80, save_every=80)

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv):
    """Returns the arguments, and the checkpoint when resuming: options that are not given are then the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    at = parser.add_argument_group("data").add_argument
    at("--data", metavar="FOLDER", help="holds train/ and val/ or test/, A left of B in each image")
    at("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which domain is translated into which")
    at("--load-size", type=at_least(1), default=286, help="images are resized to this square, pixels (286)")
    at("--crop-size", type=at_least(1), default=256, help="random crops for training, pixels (256)")
    at("--workers", type=at_least(0), default=4, help="data loader processes (4)")
    at("--toy", action="store_true", help="small networks on a synthetic data set: drawings to solid shapes")
    at = parser.add_argument_group("networks").add_argument
    at("--teacher-arch", choices=ARCHS, default="mobile_resnet_9blocks")
    at("--student-arch", choices=ARCHS, default="mobile_resnet_9blocks")
    at("--teacher-ngf", type=at_least(1), default=64, help="channels of the teacher's first convolution (64)")
    at("--student-ngf", type=at_least(1), default=16, help="channels of the student's first convolution (16)")
    at("--ndf", type=at_least(1), default=128, help="channels of the discriminator's first convolution (128)")
    at("--teacher", nargs="+", metavar="FILE", help="trained G [D], or a checkpoint.pt of ours")
    at("--freeze-teacher", action="store_true", help="leave the teacher's generator as it is; D_T still trains")
    at("--vgg", default="auto", help="VGG16 of the perceptual loss: auto, random, or a weight file (auto)")
    at = parser.add_argument_group("method").add_argument
    at("--teacher-every", type=at_least(1), default=1, help="student steps per step of G_T and D_T (1)")
    at("--d-fakes", choices=("both", "teacher"), default="both", help="fakes that D_T learns from; release: teacher")
    at("--lambda-gan", type=at_least(0.0), default=1.0, help="student: adversarial term (1)")
    at("--lambda-dcd", type=at_least(0.0), default=1.0, help="student: feature distillation through D_T (1)")
    at("--lambda-style", type=at_least(0.0), default=1e4, help="student: Gram matrices in VGG16 (1e4)")
    at("--lambda-feature", type=at_least(0.0), default=10.0, help="student: relu2_2 of VGG16 (10)")
    at("--lambda-l1", type=at_least(0.0), default=100.0, help="teacher: L1 distance to the real image (100)")
    at = parser.add_argument_group("optimisation").add_argument
    at("--epochs", type=at_least(1), default=100, help="epochs at full learning rate (100)")
    at("--epochs-decay", type=at_least(0), default=100, help="further epochs of linear decay to 0 (100)")
    at("--max-steps", type=at_least(1), help="stop after so many steps; the schedule stays")
    at("--batch-size", type=at_least(1), default=4, help="images per process and step (4)")
    at("--lr", type=at_least(0.0), default=2e-4, help="learning rate of Adam (2e-4)")
    at("--seed", type=at_least(0), default=0)
    add_run_options(parser, eval_unit="epochs", eval_every=10)

    args = parser.parse_args(argv)
    if args.toy:
        parser.set_defaults(**TOY)
        args = parser.parse_args(argv)
    if not (args.data or args.toy or (args.resume and args.out)):
        fail("--data is missing: the folder with train/ and val/ or test/ (--toy needs none)")
    args.out = args.out or f"runs/{NAME}_{Path(args.data).resolve().name if args.data else 'toy'}"
    args, checkpoint = read_checkpoint(args, parser, argv) if args.resume else (args, None)
    if not any((args.lambda_gan, args.lambda_dcd, args.lambda_style, args.lambda_feature)):
        fail("all four weights of the student's objective are 0: nothing would be learnt")
    if ("unet" in args.teacher_arch) != ("unet" in args.student_arch):
        fail(f"{args.teacher_arch}, {args.student_arch}: taps of different sizes, choose two ResNets or two U-Nets")
    if args.freeze_teacher and not args.teacher:
        fail("--freeze-teacher needs --teacher FILE: an untrained teacher has nothing to teach")
    if args.load_size < args.crop_size:
        fail(f"--load-size {args.load_size} is smaller than --crop-size {args.crop_size}")
    return args, checkpoint


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
    """The images' sizes; refuses those that are not two halves of at least crop_size a side."""
    sizes = files.check(crop_size)
    for name, (width, height) in zip(files.names, sizes, strict=True):
        if width % 2 or width // 2 < crop_size:
            need = f"expected two halves side by side, each at least {crop_size} wide"
            raise InputError(f"{files.source}: {name} is {width}x{height} pixels, {need}")
    return sizes


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


def build_generator(arch, ngf):
    return UnetGenerator(ngf=ngf) if arch == "unet_256" else ResnetGenerator(ngf=ngf, separable="mobile" in arch)


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

    def to_device(x):
        return x.to(device, memory_format=torch.channels_last, non_blocking=True)

    # Networks. The discriminator is conditional: it reads input and image as six channels.
    teacher_G = init_weights(build_generator(args.teacher_arch, args.teacher_ngf))
    teacher_D = init_weights(PatchDiscriminator(6, args.ndf))
    student_G = init_weights(build_generator(args.student_arch, args.student_ngf))
    dcd_loss = DCDLoss(student_G.tap_channels, teacher_G.tap_channels, 6, teacher_D.min_size)
    multiple = teacher_G.size_multiple
    smallest = math.ceil(4 * teacher_D.min_size / multiple) * multiple  # the largest taps have a quarter of the size
    if args.crop_size < smallest or args.crop_size % multiple:
        why = "the generator halves it that often, and the discriminator cannot read the feature maps of a smaller one"
        raise InputError(
            f"--crop-size is {args.crop_size}, expected a multiple of {multiple} from {smallest} on: {why}"
        )
    perceptual_loss = PerceptualLoss(args.vgg) if args.lambda_style or args.lambda_feature else None
    inception = load_inception(args.inception, device) if args.eval_every and args.inception != "none" else None
    teacher = dict(teacher_G=teacher_G, teacher_D=teacher_D)
    if args.teacher and not args.resume:
        load_networks(args.teacher, teacher)
    networks = teacher | dict(student_G=student_G, dcd_loss=dcd_loss)
    for net in networks.values():
        net.to(device, memory_format=torch.channels_last)
    if perceptual_loss:
        perceptual_loss.to(device, memory_format=torch.channels_last)
    share_weights(networks.values(), world)

    # Data. A is the input, B the target, whichever way --direction turns them.
    data = Path(args.data or out / "toy_data")
    if not args.data and rank == 0 and not args.resume:
        write_toy_dataset(data)
    gather(None)  # wait for rank 0
    train_files = ImageFiles(data / "train")
    test_files = ImageFiles(data / ("val" if (data / "val").exists() else "test"))
    sets = (train_files, test_files)
    data_facts = digest([(files.names, check_pairs(files, args.crop_size)) for files in sets])
    if inception and len(test_files) < 2:
        raise InputError(f"{test_files.source}: a Fréchet distance needs 2 test images or more; or --eval-every 0")
    dataset = PairedImages(train_files, args.direction, args.load_size, args.crop_size, args.seed)
    test_pairs = TestPairs(test_files, args.direction, args.crop_size)
    global_batch = args.batch_size * world
    epoch_steps = math.ceil(len(dataset) / global_batch)
    schedule_steps = (args.epochs + args.epochs_decay) * epoch_steps
    last_step = min(schedule_steps, args.max_steps or schedule_steps)

    # Optimisers
    def adam(*nets):
        parameters = [p for net in nets for p in net.parameters()]
        return torch.optim.Adam(parameters, lr=args.lr, betas=(0.5, 0.999), fused=True)

    optimizers = dict(
        teacher_G=adam(teacher_G),
        teacher_D=adam(teacher_D),
        student_G=adam(student_G, dcd_loss.student_connectors),
    )
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
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
        first_step, best, scores = checkpoint["step"], checkpoint["best"], checkpoint["scores"]
    if rank == 0:
        open_output(args, first_step)
    if args.compile:
        for net in (*teacher.values(), student_G):
            net.compile()
        teacher_D.features = torch.compile(teacher_D.features)
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
            content |= dict(best=best, scores=scores)
            content["optimizers"] = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            save_checkpoint(out / "checkpoint.pt", networks, content)
            save_generator(out / "student.pt", student_G)

    def log(entry):
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    # Evaluation: every process takes its share of the test pairs; quantised like the files that fid.py reads.
    def test_stats(choose):
        share = range(rank, len(test_pairs), world)
        shares = DataLoader(
            test_pairs,
            batch_size=8,
            sampler=share,
            num_workers=args.workers,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),
        )
        stats = FeatureStats(inception.metric)
        for real_A, real_B in shares:
            images = choose(to_device(real_A), to_device(real_B)).clamp(-1, 1)
            stats.update(inception(((images + 1) * 127.5).round() / 255))
        stats.merge_across_processes()
        return stats

    @torch.no_grad()
    def evaluate():
        """Fréchet distance of both generators' translations to the real test images -> {"FID teacher": ..}."""
        facts = (test_files.fingerprint(), args.direction, args.crop_size, args.inception)
        path = out / f"reference_{digest(facts)}.npz"
        if not all(gather(path.exists())):
            reference = test_stats(lambda real_A, real_B: real_B)
            if rank == 0:
                reference.save(path)
        else:
            reference = FeatureStats.load(path)
        found = {}
        for name, net in (("teacher", teacher_G), ("student", student_G)):
            stats = test_stats(lambda real_A, real_B, net=net: net(real_A))
            found[f"{inception.metric} {name}"] = frechet_distance(stats.mean, stats.cov, reference.mean, reference.cov)
        return found

    @torch.no_grad()
    def save_samples(step):
        """Rows of: input, teacher, student, the real B, and the input as either first connector shows it to D_T."""
        pairs = [test_pairs[i % len(test_pairs)] for i in range(4)]
        real_A, real_B = (to_device(torch.stack(half)) for half in zip(*pairs, strict=True))
        fake_B, teacher_taps = teacher_G(real_A, taps=True)
        fake_S, student_taps = student_G(real_A, taps=True)
        columns = [(x + 1) / 2 for x in (real_A, fake_B, fake_S, real_B)]
        for connectors, taps in (
            (dcd_loss.teacher_connectors, teacher_taps),
            (dcd_loss.student_connectors, student_taps),
        ):
            shown = connectors[0](taps[0])[:, 3:]  # the channels in which D_T expects the image
            shown = shown / shown.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
            columns.append(TF.resize(shown, [args.crop_size] * 2, TF.InterpolationMode.NEAREST))
        grid = make_grid(torch.stack(columns, 1).flatten(0, 1).float().cpu().clamp(0, 1), nrow=len(columns))
        write_atomically(out / f"samples/{step:07d}.png", lambda file: save_image(grid, file, format="png"))

    # The loop
    say(f"{out}: steps {first_step} to {last_step} of {schedule_steps}, {epoch_steps} an epoch, on {world} x {device}")
    if perceptual_loss and args.vgg == "random":
        say("VGG16 has random weights: the perceptual terms are for demonstration only")
    say("samples: input | teacher | student | the real one | teacher's and student's first connector")
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    since, logged_step = time.perf_counter(), first_step
    for step in range(first_step, last_step):
        batch, problem = next_batch(batches)
        if problem:
            save(step)
            stop_run(problem, out, step, say)
        real_A, real_B = map(to_device, batch)
        decay = (schedule_steps - step) / (args.epochs_decay * epoch_steps + 1)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, decay)
        # G_T and D_T learn at every n-th step, the student at every one.
        train_D = step % args.teacher_every == 0
        train_G = train_D and not args.freeze_teacher

        # One forward pass of either generator serves its own update, the distillation and the discriminator.
        with autocast(), torch.set_grad_enabled(train_G):
            fake_B, taps = teacher_G(real_A, taps=True)
        with autocast():
            fake_S, student_taps = student_G(real_A, taps=True)

        # Collaborative discriminator D_T: real pairs against the teacher's fakes and the student's, of equal weight.
        if train_D:
            teacher_D.requires_grad_(True)
            images = [real_B, fake_B.detach()] + ([fake_S.detach()] if args.d_fakes == "both" else [])
            with autocast():
                logits = teacher_D(torch.cat([torch.cat([real_A, image], 1) for image in images]))
                real, fake = logits.tensor_split([len(real_A)])
                loss_D = (gan_loss(real, True, "hinge") + gan_loss(fake, False, "hinge")) / 2
            optimizers["teacher_D"].zero_grad()
            loss_D.backward()
            average_gradients(optimizers["teacher_D"], world)
            optimizers["teacher_D"].step()
            meter.add(D_T=loss_D)

        # Teacher generator: hinge loss under the conditional discriminator, and L1 to the real image.
        teacher_D.requires_grad_(False)
        if train_G:
            with autocast():
                loss_gan = gan_loss(teacher_D(torch.cat([real_A, fake_B], 1)), True, "hinge", False)
            loss_l1 = (fake_B - real_B).abs().mean()
            optimizers["teacher_G"].zero_grad()
            (loss_gan + args.lambda_l1 * loss_l1).backward()
            average_gradients(optimizers["teacher_G"], world)
            optimizers["teacher_G"].step()
            meter.add(G_T_gan=loss_gan, G_T_l1=loss_l1)

        # Student: L_S = lambda_gan L_GAN(D_T(G_S(x))) + lambda_dcd L_DCD + lambda_style L_style + lambda_feature L_feat
        terms = {}
        with autocast():
            if args.lambda_gan:
                terms["gan"] = gan_loss(teacher_D(torch.cat([real_A, fake_S], 1)), True, "hinge", False)
            if args.lambda_dcd:
                terms["dcd"] = dcd_loss(student_taps, taps, teacher_D.features)
            if perceptual_loss:
                style, feature = perceptual_loss(fake_S, fake_B, args.lambda_style > 0, args.lambda_feature > 0)
                terms |= dict(style=style) if args.lambda_style else {}
                terms |= dict(feature=feature) if args.lambda_feature else {}
        loss_S = sum(getattr(args, f"lambda_{name}") * term for name, term in terms.items())
        optimizers["student_G"].zero_grad()
        loss_S.backward()
        average_gradients(optimizers["student_G"], world)
        optimizers["student_G"].step()
        meter.add(**{f"G_S_{name}": term for name, term in terms.items()})

        # Log, samples, evaluation, checkpoint
        done = step + 1
        last = done == last_step
        images = done * global_batch
        if done % args.log_every == 0 or done == schedule_steps:
            means = meter.means(done)
            meter = LossMeter()
            rate = (done - logged_step) * global_batch / (time.perf_counter() - since)
            if rank == 0:
                epoch = images / len(dataset)
                log(
                    dict(step=done, epoch=epoch, images=images, lr=args.lr * min(1.0, decay), images_per_second=rate)
                    | means
                )
                left = timedelta(seconds=round((last_step - done) * global_batch / rate))
                losses = "  ".join(f"{name} {mean:.3g}" for name, mean in means.items())
                say(
                    f"step {done}/{last_step}  epoch {epoch:.2f}  {losses}  {rate:.1f} images/s  {left} left",
                    flush=True,
                )
        due = inception and (done % (args.eval_every * epoch_steps) == 0 or done == schedule_steps)
        if due or (inception and last):
            scores = evaluate()
            say("  ".join(f"{name} {value:.2f}" for name, value in scores.items()), flush=True)
            if due:  # the record of a run cut short by --max-steps goes on as if it had not been
                score = scores[f"{inception.metric} student"]
                if rank == 0:
                    log(dict(step=done) | scores)
                if rank == 0 and score < best:
                    save_generator(out / "best_student.pt", student_G)
                best = min(best, score)
        if rank == 0 and args.sample_every and (done % args.sample_every == 0 or last):
            save_samples(done)
        if done % args.save_every == 0 or last:
            save(done)
        if done % args.log_every == 0:
            since, logged_step = time.perf_counter(), done

    # Summary: teacher against student
    if rank == 0:
        image = torch.randn(1, 3, args.crop_size, args.crop_size, device=device)
        rows = {}
        for name in ("teacher", "student"):
            net = build_generator(getattr(args, f"{name}_arch"), getattr(args, f"{name}_ngf"))
            rows[name] = cost(net.to(device).eval(), image)
        rows["ratio"] = {key: rows["teacher"][key] / rows["student"][key] for key in rows["student"]}
        for key, value in scores.items():
            metric, _, name = key.rpartition(" ")
            rows[name][metric] = value
        write_json(out / "summary.json", dict(steps=last_step, image_size=args.crop_size, **rows))
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
