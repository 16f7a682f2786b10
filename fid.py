"""Fréchet and Kernel Inception Distance (FID, KID) between two sets of images.

    FID = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

mu, S: mean and covariance (n - 1) of the 2048 features that the FID Inception gives to the images of a set (Heusel et
al., arXiv 1706.08500). The number is pytorch-fid's for the same images and weights: bilinear resize to 299x299 without
antialiasing. KID (Binkowski et al., arXiv 1801.01401) has no bias for small sets. The file works alone.

    python fid.py real/ fake.zip                             # folders, .zip of images, .npz of statistics
    python fid.py real/ --save real.npz                      # keep the statistics of real/
    python fid.py real/ fake/ --kid --resize clean --json    # KID too, clean-fid's resize
    torchrun --nproc-per-node 8 fid.py real.npz fake/        # several GPUs share the images out
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import sys
import warnings
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from torchvision.models import inception as blocks
from torchvision.transforms.functional import pil_to_tensor

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WIDTH = 2048  # features per image
SIDE = 299  # pixels, the side of the network's input


class InputError(ValueError):
    """Bad input. The message is one line: what was found, where, and what to do."""


def first_line(error):
    """The message of an exception in one line, its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# Images


def walk(folder, above=()):
    """Yield the paths of all files under a folder. Links are followed, save those to a folder that they lie in."""
    real = os.path.realpath(folder)
    for entry in os.scandir(folder) if real not in above else ():
        if entry.is_dir():
            yield from walk(entry.path, (*above, real))
        else:
            yield entry.path


def to_rgb(image):
    """Convert a PIL image of any mode to 8-bit RGB: Pillow's conversion, but 16-bit grey is scaled, not clipped."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


class ImageFiles:
    """The images of a folder (searched recursively) or of a .zip, in the order of their names.

    Every file counts whose extension Pillow can read, unless its name or a folder's above it starts with a dot.
    `names` are relative to the source, `files[i]` is a PIL RGB image. Picklable and safe in worker processes.

    Raises InputError for a source that is missing, neither folder nor .zip, or without images; on access for an image
    that is unreadable, truncated, or larger than Image.MAX_IMAGE_PIXELS (found before it is decoded).
    """

    def __init__(self, source):
        self.source = os.fspath(source)
        self._zip = None  # (process id, ZipFile): a file handle shared between processes would share its position
        if os.path.isdir(self.source):
            self.zipped, names = False, [os.path.relpath(path, self.source) for path in walk(self.source)]
        elif not os.path.exists(self.source):
            raise InputError(f"{self.source}: no such folder or file")
        elif zipfile.is_zipfile(self.source):
            self.zipped, names = True, self._archive().namelist()
        else:
            raise InputError(f"{self.source}: neither a folder nor a .zip of images")
        readable = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        self.names = sorted(
            name
            for name in names
            if os.path.splitext(name)[1].lower() in readable
            and not any(part.startswith(".") for part in name.replace(os.sep, "/").split("/"))
        )
        if not self.names:
            raise InputError(f"{self.source}: no images found, give a folder or .zip of images")

    def __getstate__(self):
        return {**self.__dict__, "_zip": None}

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        with self._image(index) as image:
            return to_rgb(image)

    def _archive(self):
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = os.getpid(), zipfile.ZipFile(self.source)
        return self._zip[1]

    def _where(self, index):
        return f"{self.source}::{self.names[index]}" if self.zipped else os.path.join(self.source, self.names[index])

    @contextlib.contextmanager
    def _image(self, index):
        """Open an image, its header read and its pixels not yet; whatever fails inside becomes an InputError."""
        where = self._where(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                opened = self._archive().open(self.names[index]) if self.zipped else open(where, "rb")
                with opened, Image.open(opened) as image:
                    yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{where}: more pixels than Image.MAX_IMAGE_PIXELS, remove it") from error
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise InputError(f"{where}: not a readable image ({first_line(error)})") from error

    def check(self, min_size=0):
        """Open every header, decode nothing, and return the list of (width, height) in pixels.

        Raises InputError at the first image that is unreadable, too large, or has a side under min_size pixels.
        """
        sizes = []
        for index in range(len(self)):
            with self._image(index) as image:
                width, height = image.size
            if min(width, height) < min_size:
                raise InputError(f"{self._where(index)}: {width}x{height} pixels, need at least {min_size} a side")
            sizes.append((width, height))
        return sizes

    def fingerprint(self):
        """Return a hex string that changes with the names, sizes or modification times (.zip: checksums) of files."""
        if self.zipped:
            facts = [(info.CRC, info.file_size) for info in map(self._archive().getinfo, self.names)]
        else:
            facts = [(stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, map(self._where, range(len(self))))]
        return hashlib.sha256(repr((self.names, facts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# The network: Inception v3 as in TensorFlow's graph of 2015, with the module names of its PyTorch port


def bilinear(images):
    """Resize float images (N, 3, H, W) to (N, 3, 299, 299), without antialiasing; 299x299 passes unchanged."""
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def average_inside(x):
    """3x3 average pooling whose windows leave the padding out."""
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class FIDInceptionA(blocks.InceptionA):
    def forward(self, x):
        b5 = self.branch5x5_2(self.branch5x5_1(x))
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5, b3, self.branch_pool(average_inside(x))], dim=1)


class FIDInceptionC(blocks.InceptionC):
    def forward(self, x):
        b7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        b77 = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        b77 = self.branch7x7dbl_5(self.branch7x7dbl_4(b77))
        return torch.cat([self.branch1x1(x), b7, b77, self.branch_pool(average_inside(x))], dim=1)


class FIDInceptionE(blocks.InceptionE):
    def forward(self, x, pool=average_inside):
        b3, b33 = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        b3, b33 = (self.branch3x3_2a(b3), self.branch3x3_2b(b3)), (self.branch3x3dbl_3a(b33), self.branch3x3dbl_3b(b33))
        return torch.cat([self.branch1x1(x), *b3, *b33, self.branch_pool(pool(x))], dim=1)


class FIDInceptionEMax(FIDInceptionE):
    def forward(self, x):
        return super().forward(x, pool=nn.MaxPool2d(kernel_size=3, stride=1, padding=1))


class FIDInceptionV3(blocks.Inception3):
    """The FID Inception: torchvision's with 1008 classes, no auxiliary head, and the poolings of the 2015 graph.

    `metric` names the distance of its features: "FID", or "FD, random Inception" as long as no weights are loaded.
    """

    metric = "FD, random Inception"

    def __init__(self):
        kinds = [blocks.BasicConv2d, FIDInceptionA, blocks.InceptionB, FIDInceptionC, blocks.InceptionD, FIDInceptionE]
        kinds.append(blocks.InceptionAux)
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=kinds, init_weights=False)
        self.Mixed_7c = FIDInceptionEMax(2048)

    def forward(self, images, resize=True):
        """Return the features (N, 2048), float32, of float images (N, 3, H, W) in [0, 1], resized to 299x299.

        Without resize the images are taken as they are, at least 75x75. Always in float32, no TF32, also in autocast.
        """
        cudnn = torch.backends.cudnn
        exact = cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        )
        with torch.autocast(images.device.type, enabled=False), exact:
            x = bilinear(images.float()) if resize else images.float()
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
            return self.avgpool(x).flatten(1)


def init_random(net):
    """Give a FIDInceptionV3 the same random weights on every machine, uniform as He et al. (arXiv 1502.01852)."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.reset_parameters()
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(net.fc.bias)


def load_inception(weights="auto", device="cpu"):
    """Return a frozen FIDInceptionV3 in eval mode on a device, with its normalisations folded into the convolutions.

    Folded and channels last it is twice as fast on a CPU; its state dict no longer has FIDInceptionV3's keys.

    weights: a path to pytorch-fid's weight file; "auto": that file from torch hub's cache, downloaded if it is not
    there; "random": no download, the same network everywhere, its distance tells nothing but that the code runs.
    Raises InputError if the file is missing, is no weight file, or does not fit.
    """
    with torch.device("meta"):  # no time and no random numbers spent on weights that are replaced below
        net = FIDInceptionV3()
    if weights == "random":
        net.to_empty(device="cpu")
        init_random(net)
    else:
        path = weights
        if weights == "auto":
            path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(WEIGHTS_URL))
        if weights == "auto" and not os.path.exists(path):
            try:
                with contextlib.redirect_stdout(None):  # stdout is for the number
                    torch.hub.load_state_dict_from_url(
                        WEIGHTS_URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
                    )
            except Exception as error:  # whatever the network, the proxy or the disk raises
                raise InputError(
                    f"no Inception weights: put {WEIGHTS_URL} at {path}, give its path, or use random "
                    f"(download failed: {first_line(error)})"
                ) from error
        try:
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
        except Exception as error:  # torch.load raises nearly anything on a file of another kind
            # A misfit's message has a heading, then lines that each list keys: its first line and key are enough.
            reason = str(error).partition("\n\t")[2].split('", "')[0] or first_line(error)
            raise InputError(f"{path}: not the weights of the FID Inception ({first_line(reason)})") from error
        net.metric = "FID"
    net.float().eval().requires_grad_(False)
    for module in list(net.modules()):
        if isinstance(module, blocks.BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return net.to(device, memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of features


def processes():
    """Return (rank, number of processes) of torch.distributed, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(item):
    """Return the list of all processes' items, by rank, on each of them."""
    items = [item] * processes()[1]
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


class FeatureStats:
    """Mean and covariance of features, streamed in float64: memory does not grow with their number.

    n: features so far (None if loaded from a file that does not say). mean: (D,). cov: (D, D), divisor n - 1.
    metric: what their distance is called, see FIDInceptionV3. Parts are joined by the centred update of Chan, Golub
    and LeVeque (1979), stable where the mean is much larger than the deviation.
    """

    def __init__(self, metric="FID"):
        self.metric, self.n, self.mean, self._scatter = metric, 0, None, None

    @property
    def cov(self):
        if self.n is None:
            return self._scatter
        if self.n < 2:
            raise InputError(f"a covariance needs at least 2 images, got {self.n}")
        return self._scatter / (self.n - 1)

    def update(self, features):
        """Add features (N, D), a tensor on any device or an array."""
        x = np.asarray(features.detach().cpu() if torch.is_tensor(features) else features, dtype=np.float64)
        if x.ndim != 2:
            raise InputError(f"features of shape {x.shape}, need (N, D)")
        part = FeatureStats(self.metric)
        if len(x):
            part.n, part.mean = len(x), x.mean(axis=0)
            part._scatter = (x - part.mean).T @ (x - part.mean)
        self.merge(part)

    def merge(self, other):
        """Add all features of other FeatureStats."""
        if self.n is None or other.n is None:
            raise InputError("statistics loaded without their number of images cannot be merged")
        if not other.n:
            return
        if not self.n:
            self.n, self.mean, self._scatter = other.n, other.mean.copy(), other._scatter.copy()
            return
        if self.mean.shape != other.mean.shape:
            raise InputError(f"features of width {len(other.mean)} cannot join those of width {len(self.mean)}")
        n, delta = self.n + other.n, other.mean - self.mean
        self._scatter += other._scatter + np.outer(delta, delta) * (self.n * other.n / n)
        self.mean += delta * (other.n / n)
        self.n = n

    def merge_across_processes(self):
        """Make these the statistics of all processes' features, the same on each; every process has to call it."""
        parts = gather(self)
        if len(parts) > 1:
            self.n = 0
            for part in parts:
                self.merge(part)

    def save(self, path):
        """Write .npz with mu, sigma, the format of pytorch-fid, and n and metric; a crash leaves no half a file."""
        arrays = {"mu": self.mean, "sigma": self.cov, "metric": self.metric} | ({"n": self.n} if self.n else {})
        temporary = f"{os.fspath(path)}.tmp"
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path):
        """Read an .npz with mu (D,), sigma (D, D) and, if they are there, n and metric. InputError for others."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except Exception as error:  # numpy raises a different error for each way not to be an .npz
            raise InputError(f"{path}: not an .npz of statistics ({first_line(error)})") from error
        if not {"mu", "sigma"} <= arrays.keys():
            raise InputError(f"{path}: needs the arrays mu and sigma, has {', '.join(arrays) or 'none'}")
        mu, sigma = (arrays[key].astype(np.float64) for key in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise InputError(f"{path}: mu of shape {mu.shape} and sigma {sigma.shape}, need (D,) and (D, D)")
        stats = cls(str(arrays.get("metric", "FID")))
        stats.n = int(arrays["n"]) if "n" in arrays else None
        stats.mean, stats._scatter = mu, sigma * ((stats.n or 2) - 1)
        return stats


# ----------------------------------------------------------------------------------------------------------------------
# Distances


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return the squared Fréchet distance, a float >= 0, of Gaussians with means (D,) and covariances (D, D).

    tr((S1 S2)^(1/2)) is the sum of the roots of the eigenvalues of L^T S2 L for any L with S1 = L L^T: a symmetric
    problem, hence real. L = V w^(1/2) from the eigenvectors V of S1; those with w = 0 to rounding drop out.
    Raises InputError for shapes that do not match and for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        shapes = f"means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and {sigma2.shape}"
        raise InputError(f"{shapes}: both need features of the same width")
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise InputError("a mean or covariance holds NaN or infinity")
    w, V = scipy.linalg.eigh(sigma1, driver="evd", check_finite=False)
    kept = w > w[-1] * len(w) * np.finfo(np.float64).eps
    L = V[:, kept] * np.sqrt(w[kept])
    roots = np.sqrt(scipy.linalg.eigvalsh(L.T @ sigma2 @ L, check_finite=False).clip(min=0)) if kept.any() else 0.0
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sum(roots)))


def kernel_distance(features1, features2, subset_size=1000, n_subsets=100, seed=0):
    """Return KID and its standard deviation over subsets, floats, of features (N1, D) and (N2, D).

    The mean over subsets of the unbiased MMD^2 (Gretton et al. 2012, eq. 3) with the kernel (x.y / D + 1)^3; each
    subset has min(subset_size, N1, N2) features of either side, drawn without replacement. KID may be negative;
    where one subset holds everything, the deviation is 0.
    Raises InputError for features of different widths or fewer than 2.
    """
    sides = [torch.as_tensor(features).detach().cpu().double().numpy() for features in (features1, features2)]
    m = min(subset_size, *map(len, sides))
    if any(side.ndim != 2 for side in sides) or sides[0].shape[1] != sides[1].shape[1] or m < 2:
        raise InputError(f"features {sides[0].shape} and {sides[1].shape}: need 2 or more on both sides, of one width")
    if m == max(map(len, sides)):
        n_subsets = 1  # each would hold all features
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(n_subsets):
        x, y = (side[rng.choice(len(side), m, replace=False)] for side in sides)
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
        distances.append(within - 2 * xy.mean())
    return float(np.mean(distances)), float(np.std(distances))


# ----------------------------------------------------------------------------------------------------------------------
# From images to statistics


def clean_resize(image):
    """Resize a PIL RGB image as clean-fid does (arXiv 2104.11222): float32 (3, 299, 299) in [0, 255].

    Bicubic with antialiasing, each channel as float, clipped and not rounded.
    """
    channels = [band.convert("F").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for band in image.split()]
    return np.stack([np.asarray(channel) for channel in channels]).clip(0, 255)


class NetworkInput:
    """ImageFiles as tensors: uint8 (3, H, W), or, resized already, float32 (3, 299, 299) in [0, 1] for "clean"."""

    def __init__(self, files, resize):
        self.files, self.resize = files, resize

    def __getitem__(self, index):
        if self.resize == "pytorch":
            return pil_to_tensor(self.files[index])
        # clean-fid's network takes (x - 128) / 128, which is 2 (x / 256) - 1
        return torch.from_numpy(clean_resize(self.files[index])) / 256


def collate(images):
    """Stack tensors of one size; uint8 images of several sizes become float32 (N, 3, 299, 299) in [0, 1]."""
    if len({image.shape for image in images}) == 1:
        return torch.stack(images)
    return torch.cat([bilinear(image[None] / 255) for image in images])


def image_stats(files, inception, batch_size=50, workers=0, resize="pytorch", keep_features=False, progress=False):
    """Return FeatureStats of ImageFiles and, if keep_features, all features (n, 2048) in their order, else None.

    resize: "pytorch" as pytorch-fid, "clean" as clean-fid. workers: processes that decode images, 0 for none.
    progress: count images on stderr. With torch.distributed initialised, every process has to call it: each measures
    its share of the images, and all return the same. Raises InputError naming the first image that cannot be read.
    """
    if resize not in ("pytorch", "clean"):
        raise InputError(f"resize {resize!r}: need pytorch or clean")
    device = next(inception.parameters()).device
    rank, world = processes()
    share = range(rank, len(files), world)
    options = {"num_workers": workers, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    options["generator"] = torch.Generator()  # the loader draws a seed: not from a training run's random numbers
    loader = DataLoader(NetworkInput(files, resize), batch_size, sampler=share, **options)
    stats, kept = FeatureStats(inception.metric), []
    try:
        for batch in loader:
            batch = batch.to(device, non_blocking=True)
            with torch.inference_mode():
                features = inception(batch / 255 if batch.dtype == torch.uint8 else batch).cpu()
            stats.update(features)
            if keep_features:
                kept.append(features)
            finished = stats.n == len(share)
            if progress and rank == 0 and (finished or sys.stderr.isatty()):
                done = f"{files.source}: {min(stats.n * world, len(files))}/{len(files)} images"
                print(done, end="\n" if finished else "\r", file=sys.stderr, flush=True)
    except InputError as error:  # one from a worker process has its traceback for a message, ours in the last line
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error
    stats.merge_across_processes()
    if not keep_features:
        return stats, None
    features = torch.empty(len(files), len(stats.mean))
    for i, parts in enumerate(gather(kept)):
        if parts:
            features[i::world] = torch.cat(parts)
    return stats, features


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def at_least(minimum):
    """Return an argparse type: finite numbers of the minimum's own type (int or float) from it on."""

    def parse(text):
        value = type(minimum)(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {minimum} or more")
        return value

    parse.__name__ = type(minimum).__name__
    return parse


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "fid.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"fid.py: error: {' '.join(message.splitlines())}\n")
    parser.add_argument("A", help="folder of images, searched recursively, .zip of images, or .npz of statistics")
    parser.add_argument("B", nargs="?", help="the same; may be left out with --save")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of A")
    parser.add_argument("--kid", action="store_true", help="also the Kernel Inception Distance (no .npz)")
    parser.add_argument("--batch-size", type=at_least(1), default=50, help="images per forward pass (%(default)s)")
    parser.add_argument("--workers", type=at_least(0), help="processes that decode images (GPU: up to 8, CPU: 0)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--weights", default="auto", help="auto (torch hub's cache, else download), random, or a path")
    parser.add_argument("--resize", choices=["pytorch", "clean"], default="pytorch", help="as pytorch-fid or clean-fid")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(argv)
    if args.B is None and args.save is None:
        parser.error("B is missing: give a second set of images or statistics, or --save FILE.npz")
    if args.save and not args.save.endswith(".npz"):
        parser.error(f"--save {args.save}: the name has to end in .npz")
    if args.kid and (args.B is None or args.A.endswith(".npz") or args.B.endswith(".npz")):
        parser.error("--kid needs the images of both sets: give folders or .zip files")
    return args, parser


def pick_device(name):
    """Return the torch.device of that name; "auto" and "cuda" mean this process's GPU. InputError if it cannot work."""
    if name == "cuda" or name == "auto" and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise InputError("neither cpu nor cuda")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, InputError) as error:  # a build of torch without CUDA raises the second
        raise InputError(f"--device {name} does not work here, use cpu or auto ({first_line(error)})") from error
    return device


def run(args, device):
    """Measure, save and print what the parsed arguments ask for, as one of torch.distributed's processes."""
    sources = [source for source in (args.A, args.B) if source is not None]
    sides = [FeatureStats.load(source) if source.endswith(".npz") else ImageFiles(source) for source in sources]
    if args.save and not os.path.isdir(os.path.dirname(args.save) or "."):
        raise InputError(f"--save {args.save}: no such folder")
    images = any(isinstance(side, ImageFiles) for side in sides)
    inception = load_inception(args.weights, device) if images else None
    kinds = [
        (inception.metric, WIDTH) if isinstance(side, ImageFiles) else (side.metric, len(side.mean)) for side in sides
    ]
    if len(set(kinds)) > 1:
        found = (f"{source} has {d} features for {name}" for source, (name, d) in zip(sources, kinds, strict=True))
        raise InputError(f"{', '.join(found)}: need the same network and weights")
    metric = kinds[0][0]

    workers = args.workers
    if workers is None:  # on a CPU the network takes all cores
        workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    stats, features = list(sides), [None, None]
    for i, side in enumerate(sides):
        if isinstance(side, ImageFiles):
            stats[i], features[i] = image_stats(
                side, inception, args.batch_size, workers, args.resize, keep_features=args.kid, progress=True
            )
    if processes()[0] > 0:
        return

    result = {"metric": metric, "images": [side.n for side in stats], "resize": args.resize if images else None}
    if args.save:
        stats[0].save(args.save)
        result["saved"] = args.save
    lines = []
    if args.B is not None:
        result["distance"] = frechet_distance(stats[0].mean, stats[0].cov, stats[1].mean, stats[1].cov)
        lines.append(f"{metric} {result['distance']:.6g}")
        for source, n in zip(sources, result["images"], strict=True):
            if n is not None and n < WIDTH:
                warning = f"{n} images in {source}, fewer than the {WIDTH} features: the distance comes out too high"
                advice = "compare it only with one from as many images, or use --kid"
                print(f"fid.py: warning: {warning}; {advice}", file=sys.stderr)
    if args.kid:
        result["kid"], result["kid_std"] = kernel_distance(*features)
        lines.append(f"{metric.replace('F', 'K', 1)} {result['kid']:.6g} +- {result['kid_std']:.6g}")
    print(json.dumps(result) if args.json else "\n".join(lines), end="\n" if args.json or lines else "")


def main(argv=None):
    """Run the command line; bad input ends in SystemExit with status 2 and one line on stderr."""
    args, parser = parse_args(argv)
    parallel = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        device = pick_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if parallel:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        run(args, device)
    except (InputError, OSError) as error:
        parser.error(str(error))
    finally:
        if parallel and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
