"""Fréchet and Kernel Inception Distance (FID, KID) between two sets of images, and the Inception Score (IS) of one.

    FID = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

mu, S: mean and covariance (n - 1) of the 2048 features that the FID Inception gives to the images of a set (Heusel et
al., arXiv 1706.08500). The number is pytorch-fid's for the same images and weights: bilinear resize to 299x299 without
antialiasing; but here transparency is shown on white, and EXIF orientation applied. KID (Binkowski et al., arXiv
1801.01401) has no bias for small sets. IS: Salimans et al., arXiv 1606.03498. The file works alone.

    python fid.py real/ fake.zip                             # folders, .zip of images, .npz of statistics
    python fid.py real/ --save real.npz                      # keep the statistics of real/
    python fid.py real/ fake/ --kid --resize clean --json    # KID too, clean-fid's resize
    python fid.py fake/ --is                                 # Inception Score
    torchrun --nproc-per-node 8 fid.py real.npz fake/        # several GPUs share the images out
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
import warnings
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
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
ROWS = 2048  # features collected between two updates of a covariance


class InputError(ValueError):
    """Bad input. The message is one line: what was found, where, and what to do."""


def first_line(error):
    """The message of an exception in one line, its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_atomically(path, write):
    """Call write(file) on a temporary file beside path, and move it into place: a crash leaves no half a file."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"  # two processes may want the same file at once
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Images


def digest(facts):
    """Return a short name for facts that are compared or that name a file."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def walk(folder, above=()):
    """Yield the paths of all files under a folder. Links are followed, save those to a folder that they lie in."""
    real = os.path.realpath(folder)
    for entry in os.scandir(folder) if real not in above else ():
        if entry.is_dir():
            yield from walk(entry.path, (*above, real))
        else:
            yield entry.path


def to_rgb(image):
    """Convert a PIL image of any mode to 8-bit RGB: turned as its EXIF data say, transparency on white.

    Otherwise Pillow's conversion, but 16-bit grey is scaled, not clipped.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data count for none
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey, clear = np.asarray(image), image.info.get("transparency", -1)
        image = Image.fromarray(np.where(grey == clear, 255, (grey / 257 + 0.5).clip(0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageFiles:
    """The images of a folder (searched recursively) or of a .zip, in the order of their names.

    Every file counts whose extension Pillow can read, unless its name or a folder's above it starts with a dot.
    `names` are relative to the source, `files[i]` is a PIL RGB image, see to_rgb. Picklable and safe in workers.

    replace: instead of an image that cannot be read, the next that can, of its own folder if there is one, with one
    warning on stderr over all workers.

    Raises InputError for a source that is missing, neither folder nor .zip, or without images; on access for an image
    that is unreadable, truncated, or larger than Image.MAX_IMAGE_PIXELS (found before it is decoded), with replace if
    none is left.
    """

    def __init__(self, source, replace=False):
        self.source = os.fspath(source)
        self.transparent = 0  # images whose header announces transparency, counted by check
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
        # Which images have been warned of, seen by all workers; None without replace.
        self._warned = torch.zeros(len(self.names), dtype=torch.bool).share_memory_() if replace else None

    def __getstate__(self):
        return {**self.__dict__, "_zip": None}

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        index = range(len(self))[index]
        try:
            with self._image(index) as image:
                return to_rgb(image)
        except InputError as error:
            if self._warned is None:
                raise
            problem = error
        others = [*range(index + 1, len(self)), *range(index)]
        others.sort(key=lambda i: os.path.dirname(self.names[i]) != os.path.dirname(self.names[index]))
        for i in others:
            with contextlib.suppress(InputError):
                with self._image(i) as image:
                    rgb = to_rgb(image)
                if not self._warned[index]:
                    self._warned[index] = True
                    print(f"warning: {problem}; {self._where(i)} stands in for it", file=sys.stderr, flush=True)
                return rgb
        raise InputError(f"{self.source}: none of {len(self)} images can be read, the first: {problem}")

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
                warnings.simplefilter("ignore")  # Pillow's, of flaws that it can live with
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                opened = self._archive().open(self.names[index]) if self.zipped else open(where, "rb")
                with opened, Image.open(opened) as image:
                    yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{where}: more pixels than Image.MAX_IMAGE_PIXELS, remove it") from error
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise InputError(f"{where}: not a readable image ({first_line(error)})") from error

    def check(self):
        """Open every header, decode nothing, and return the list of (width, height) in pixels, before EXIF turns.

        Counts the transparent images in `transparent`. Raises InputError at the first image that has no readable
        header or is too large, also with replace.
        """
        self.transparent, self.sizes = 0, []
        for index in range(len(self)):
            with self._image(index) as image:
                self.sizes.append(image.size)
                self.transparent += image.has_transparency_data
        return self.sizes

    def survey(self, say, least=0, halves=False):
        """Check, say what is unusual, a line each, and return a short digest of the names and sizes.

        least: pixels; smaller images are counted, which the caller will enlarge. halves: an image is two, side by side.
        """
        sizes = self.check()
        small = [(w // 2 if halves else w, h) for w, h in sizes if min(w // 2 if halves else w, h) < least]
        if small:
            smallest = "{}x{}".format(*min(small, key=min))
            say(f"{self.source}: {len(small)} of {len(self)} are under {least} pixels and enlarged, down to {smallest}")
        if self.transparent:
            say(f"{self.source}: {self.transparent} of {len(self)} pictures have transparency, shown on white")
        return digest((self.names, sizes))

    def fingerprint(self):
        """Return a short digest of the names, sizes and modification times (.zip: checksums) of the files."""
        if self.zipped:
            facts = [(info.CRC, info.file_size) for info in map(self._archive().getinfo, self.names)]
        else:
            facts = [(stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, map(self._where, range(len(self))))]
        return digest((self.names, facts))


class Squares:
    """The central squares of ImageFiles, resized by Pillow to side x side: uint8 tensors (3, side, side)."""

    def __init__(self, files, side, resample):
        self.files, self.side, self.resample = files, side, resample

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = self.files[index]
        short = min(image.size)
        left, top = (round((length - short) / 2) for length in image.size)
        square = image.crop((left, top, left + short, top + short))
        return pil_to_tensor(square.resize((self.side, self.side), self.resample))


class StoredSquares:
    """The squares of ImageFiles, decoded and resized once: item i is a uint8 tensor (3, side, side).

    They stand in one .npy in a folder, 3 side^2 bytes an image, that all processes map. Rank 0 writes it, under another
    name until it is whole, if the folder does not hold it yet for these files; every process has to call this.

    resample: one of Image.Resampling. say: called with a line of progress now and then.
    """

    def __init__(self, files, side, folder, say, workers=0, resample=Image.Resampling.BICUBIC):
        self.path = os.path.join(folder, f"squares_{side}_{digest((files.fingerprint(), resample))}.npy")
        if processes()[0] == 0 and not os.path.exists(self.path):
            os.makedirs(folder, exist_ok=True)
            loader = DataLoader(Squares(files, side, resample), 32, num_workers=workers, generator=torch.Generator())
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, side, side)}

            def write(file):
                np.lib.format.write_array_header_1_0(file, header)
                said = time.monotonic()
                for n, images in enumerate(loader):
                    file.write(images.numpy().tobytes())
                    if time.monotonic() > said + 10:
                        said = time.monotonic()
                        say(f"{files.source}: resized {32 * n + len(images)} of {len(files)} pictures")

            write_atomically(self.path, write)
        self.path = gather(self.path)[0]  # and wait for rank 0
        self.images = np.load(self.path, mmap_mode="r")

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):  # a worker maps the file, a copy would hold all images
        self.path, self.images = state["path"], np.load(state["path"], mmap_mode="r")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(np.array(self.images[index]))


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

    `metric` names the distance of its features, "FID" or, as long as no weights are loaded, "FD, random Inception";
    `key` names it in files, fid or fd_random.
    """

    metric, key = "FD, random Inception", "fd_random"

    def __init__(self):
        kinds = [blocks.BasicConv2d, FIDInceptionA, blocks.InceptionB, FIDInceptionC, blocks.InceptionD, FIDInceptionE]
        kinds.append(blocks.InceptionAux)
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=kinds, init_weights=False)
        self.Mixed_7c = FIDInceptionEMax(2048)

    def forward(self, images, resize=True, logits=False):
        """Return the features (N, 2048), float32, of float images (N, 3, H, W) in [0, 1], resized to 299x299.

        With logits a tuple (features, logits), logits (N, 1008) without the bias of the last layer, as the code of the
        Inception Score has them. Without resize the images are taken as they are, at least 75x75. Images may be on any
        device. Always in float32, no TF32, also in autocast.
        """
        images, cudnn = images.to(self.fc.weight), torch.backends.cudnn
        exact = cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        )
        with torch.autocast(images.device.type, enabled=False), exact:
            x = bilinear(images) if resize else images
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
            features = self.avgpool(x).flatten(1)
            if not logits:
                return features
            return features, F.linear(features.double(), self.fc.weight.double()).float()  # there is no TF32 in float64


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


def fetch_weights(url, option):
    """Return the path of a weight file in torch hub's cache, downloaded if it is not there, with a bar on stderr.

    The file's name ends in the first eight hex digits of its SHA-256. With torch.distributed initialised, every process
    has to call it: the first downloads, the others wait. option: how the user gives a file instead, "--weights FILE".
    Raises InputError, the same in every process, if the download fails; no part of the file stays.
    """
    name = os.path.basename(url)
    path, problem = os.path.join(torch.hub.get_dir(), "checkpoints", name), None
    if processes()[0] == 0 and not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:  # torch leaves a part on a full disk
                part = os.path.join(folder, name)
                torch.hub.download_url_to_file(url, part, hash_prefix=name.rpartition("-")[2][:8])
                os.replace(part, path)
        except Exception as error:  # whatever the network, the proxy or the disk raises
            problem = first_line(error)
    problem = gather(problem)[0]
    if problem:
        raise InputError(
            f"no weights {name} (download failed: {problem}): get {url} and give {option}, or put it at {path}"
        )
    return path


def load_inception(weights="auto", device="cpu", option="--inception FILE"):
    """Return a frozen FIDInceptionV3 in eval mode on a device, with its normalisations folded into the convolutions.

    Folded and channels last it is twice as fast on a CPU; its state dict no longer has FIDInceptionV3's keys.

    weights: a path to pytorch-fid's weight file; "auto": that file from torch hub's cache, see fetch_weights, option
    too; "random": no download, the same network everywhere, its distance tells nothing but that the code runs.
    Raises InputError if the file is missing, is no weight file, or does not fit.
    """
    with torch.device("meta"):  # no time and no random numbers spent on weights that are replaced below
        net = FIDInceptionV3()
    if weights == "random":
        net.to_empty(device="cpu")
        init_random(net)
    else:
        path = fetch_weights(WEIGHTS_URL, option) if weights == "auto" else weights
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other kinds of files, which are refused
                net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
        except Exception as error:  # torch.load raises nearly anything on a file of another kind
            # A misfit's message has a heading, then lines that each list keys: its first line and key are enough.
            misfit = str(error).partition("FIDInceptionV3:\n\t")[2].split('", "')[0]
            reason = misfit or (error if isinstance(error, OSError) else "damaged, or a file of another kind")
            raise InputError(f"{path}: not the weights of the FID Inception ({first_line(reason)})") from error
        net.metric, net.key = "FID", "fid"
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
    metric: what their distance is called, see FIDInceptionV3. resize: how the images came to 299x299, "pytorch" or
    "clean", None if unknown. Parts are joined by the centred update of Chan, Golub and LeVeque (1979), stable where the
    mean is much larger than the deviation; single features wait until there are enough to be worth an update.
    """

    def __init__(self, metric="FID", resize=None):
        self.metric, self.resize = metric, resize
        self._n, self._mean, self._scatter, self._waiting = 0, None, None, []

    @property
    def n(self):
        return None if self._n is None else self._n + sum(map(len, self._waiting))

    @property
    def mean(self):
        self._flush()
        return self._mean

    @property
    def cov(self):
        self._flush()
        if self._n is None:
            return self._scatter
        if self._n < 2:
            raise InputError(f"a covariance needs at least 2 images, got {self._n}")
        return self._scatter / (self._n - 1)

    def update(self, features):
        """Add features (N, D), a tensor on any device or an array."""
        x = torch.as_tensor(features).detach().to("cpu", torch.float64, copy=True).numpy()
        if x.ndim != 2:
            raise InputError(f"features of shape {x.shape}, need (N, D)")
        if len(x):
            self._waiting.append(x)
        if self._n is None or sum(map(len, self._waiting)) >= ROWS:
            self._flush()

    def _flush(self):
        """Join the waiting features to the mean and the covariance."""
        if self._waiting:
            x, part = np.concatenate(self._waiting), FeatureStats()
            self._waiting = []
            part._n, part._mean = len(x), x.mean(axis=0)
            x -= part._mean
            part._scatter = x.T @ x
            self.merge(part)

    def merge(self, other):
        """Add all features of other FeatureStats."""
        if self._n is None or other._n is None:
            raise InputError("statistics loaded without their number of images cannot be merged")
        self._flush()
        other._flush()
        if not other._n:
            return
        if not self._n:
            self._n, self._mean, self._scatter = other._n, other._mean.copy(), other._scatter.copy()
            return
        if self._mean.shape != other._mean.shape:
            raise InputError(f"features of width {len(other._mean)} cannot join those of width {len(self._mean)}")
        n, delta = self._n + other._n, other._mean - self._mean
        self._scatter += other._scatter
        self._scatter += np.outer(delta, delta * (self._n * other._n / n))
        self._mean += delta * (other._n / n)
        self._n = n

    def merge_across_processes(self):
        """Make these the statistics of all processes' features, the same on each; every process has to call it."""
        self._flush()
        parts = gather(self)
        if len(parts) > 1:
            self._n = 0
            for part in parts:
                self.merge(part)

    def save(self, path):
        """Write .npz with mu, sigma, the format of pytorch-fid, n, metric and resize; a crash leaves no half a file."""
        facts = {"n": self.n, "metric": self.metric, "resize": self.resize}
        arrays = {"mu": self.mean, "sigma": self.cov} | {key: fact for key, fact in facts.items() if fact is not None}
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path):
        """Read an .npz with mu (D,), sigma (D, D) and, if there, n, metric and resize. InputError for others."""
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
        stats = cls(str(arrays.get("metric", "FID")), str(arrays["resize"]) if "resize" in arrays else None)
        stats._n = int(arrays["n"]) if "n" in arrays else None
        stats._mean, stats._scatter = mu, sigma * ((stats._n or 2) - 1)
        return stats


# ----------------------------------------------------------------------------------------------------------------------
# Distances and scores


def root(sigma):
    """Return L (D, rank) with L L^T = sigma, symmetric (D, D), whose eigenvalues of 0 to rounding drop out."""
    w, V = scipy.linalg.eigh(sigma, driver="evd", check_finite=False)
    kept = w > w[-1] * len(w) * np.finfo(np.float64).eps
    return V[:, kept] * np.sqrt(w[kept])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return the squared Fréchet distance, a float >= 0, of Gaussians with means (D,) and covariances (D, D).

    tr((S1 S2)^(1/2)) is the sum of the singular values of L1^T L2 for any L with S = L L^T: real, the same both ways,
    and without the roots of a product's eigenvalues, which near 0 are nothing but rounding.
    Raises InputError for shapes that do not match and for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        shapes = f"means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and {sigma2.shape}"
        raise InputError(f"{shapes}: both need features of the same width")
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise InputError("a mean or covariance holds NaN or infinity")
    L1, L2 = map(root, (sigma1, sigma2))
    overlap = scipy.linalg.svdvals(L1.T @ L2, check_finite=False).sum()
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap))


def image_errors(images, targets):
    """Return the mean absolute error and the PSNR in dB of each image (N, C, H, W) in [-1, 1], (N,) and (N,)."""
    difference = (images.float() - targets.float()).flatten(1)
    return difference.abs().mean(1), 10 * (4 / difference.square().mean(1).clamp(min=1e-10)).log10()


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


def inception_score(logits, splits=10):
    """Return the Inception Score and its standard deviation over splits, floats, of logits (N, classes).

    exp(E KL(p(y|x) || p(y))) of each of `splits` consecutive parts, as the code of Salimans et al. (arXiv 1606.03498):
    images sorted by class come out too low. Logits as FIDInceptionV3 gives them.
    Raises InputError for fewer images than splits and for logits that are not finite.
    """
    logits = torch.as_tensor(logits).detach().cpu()
    if logits.ndim != 2 or len(logits) < splits or not logits.isfinite().all():
        raise InputError(f"logits {tuple(logits.shape)}: Inception Score needs finite ones of {splits} images or more")
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits : (i + 1) * len(logits) // splits].double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


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


@torch.no_grad()
def measure(batches, inception, resize, keep=()):
    """Return FeatureStats of batches (N, 3, H, W) in [0, 1] and {name: all outputs} for the names in keep, on the CPU.

    "features" are (n, 2048), "logits" (n, 1008). Over all processes, in the order of their ranks; each has to call it.
    """
    stats, kept = FeatureStats(inception.metric, resize), {name: [] for name in keep}
    for images in batches:
        features, logits = inception(images, logits=True) if "logits" in keep else (inception(images), None)
        stats.update(features)
        for name in keep:
            kept[name].append({"features": features, "logits": logits}[name].cpu())
    stats.merge_across_processes()
    return stats, {name: torch.cat([part for parts in gather(kept[name]) for part in parts]) for name in keep}


def image_stats(files, inception, batch_size=50, workers=0, resize="pytorch", keep=(), progress=False):
    """Return FeatureStats of ImageFiles and a dictionary of what to keep, in their order: see measure.

    resize: "pytorch" as pytorch-fid, "clean" as clean-fid. workers: processes that decode images, 0 for none. keep:
    names out of "features" and "logits". progress: count images on stderr. With torch.distributed initialised, every
    process has to call it: each measures its share of the images, and all return the same.
    Raises InputError naming the first image that cannot be read.
    """
    if resize not in ("pytorch", "clean"):
        raise InputError(f"resize {resize!r}: need pytorch or clean")
    device = next(inception.parameters()).device
    rank, world = processes()
    share = range(len(files) * rank // world, len(files) * (rank + 1) // world)
    options = {"num_workers": workers, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    options["generator"] = torch.Generator()  # the loader draws a seed: not from a training run's random numbers
    loader = DataLoader(NetworkInput(files, resize), batch_size, sampler=share, **options)

    def batches():
        for i, batch in enumerate(loader, 1):
            batch = batch.to(device, non_blocking=True)
            yield batch / 255 if batch.dtype == torch.uint8 else batch
            finished = i == len(loader)
            if progress and rank == 0 and (finished or sys.stderr.isatty()):
                done = f"{files.source}: {len(files) if finished else i * batch_size * world}/{len(files)} images"
                print(done, end="\n" if finished else "\r", file=sys.stderr, flush=True)

    try:
        return measure(batches(), inception, resize, keep)
    except InputError as error:  # one from a worker process has its traceback for a message, ours in the last line
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error


def generated_stats(batches, inception, splits=None):
    """Return FeatureStats of generated images, with splits a tuple (FeatureStats, their inception_score).

    batches: iterable of float images (N, 3, H, W) in [-1, 1] on any device; values outside are clipped, and all are
    rounded to 8 bits like the files that image_stats reads. With torch.distributed initialised, every process has to
    call it with its own share of the images, and all return the same.
    """
    rounded = (((images.float().clamp(-1, 1) + 1) * 127.5).round() / 255 for images in batches)
    stats, kept = measure(rounded, inception, "pytorch", ["logits"] if splits else [])
    return (stats, inception_score(kept["logits"], splits)) if splits else stats


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
    parser.add_argument("B", nargs="?", help="the same; may be left out with --save or --is")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of A")
    parser.add_argument("--kid", action="store_true", help="also the Kernel Inception Distance (no .npz)")
    parser.add_argument("--is", dest="score", action="store_true", help="also the Inception Score of A (in 10 parts)")
    parser.add_argument("--batch-size", type=at_least(1), default=50, help="images per forward pass (%(default)s)")
    parser.add_argument("--workers", type=at_least(0), help="processes that decode images (GPU: up to 8, CPU: 0)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--weights", default="auto", help="auto (torch hub's cache, else download), random, or a path")
    parser.add_argument("--resize", choices=["pytorch", "clean"], default="pytorch", help="as pytorch-fid or clean-fid")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(argv)
    if args.B is None and args.save is None and not args.score:
        parser.error("B is missing: give a second set of images or statistics, --save FILE.npz, or --is")
    if args.save and not args.save.endswith(".npz"):
        parser.error(f"--save {args.save}: the name has to end in .npz")
    if args.kid and (args.B is None or args.A.endswith(".npz") or args.B.endswith(".npz")):
        parser.error("--kid needs the images of both sets: give folders or .zip files")
    if args.score and args.A.endswith(".npz"):
        parser.error("--is needs the images of A: give a folder or .zip file")
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
    resizes = [args.resize if isinstance(side, ImageFiles) else side.resize for side in sides]
    if len({*resizes} - {None}) > 1:
        raise InputError(f"{args.A} is resized as {resizes[0]}, {args.B} as {resizes[1]}: need the same --resize")
    images = any(isinstance(side, ImageFiles) for side in sides)
    inception = load_inception(args.weights, device, "--weights FILE") if images else None
    kinds = [
        (inception.metric, WIDTH) if isinstance(side, ImageFiles) else (side.metric, len(side.mean)) for side in sides
    ]
    if len(set(kinds)) > 1:
        found = (f"{source} has {d} features for {name}" for source, (name, d) in zip(sources, kinds, strict=True))
        raise InputError(f"{', '.join(found)}: need the same network and weights")
    metric = kinds[0][0]

    for side in sides:
        if isinstance(side, ImageFiles):
            side.survey(lambda line: print(line, file=sys.stderr) if processes()[0] == 0 else None)
    workers = args.workers
    if workers is None:  # on a CPU the network takes all cores
        workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    stats, kept = list(sides), [{}, {}]
    for i, side in enumerate(sides):
        if isinstance(side, ImageFiles):
            keep = ["features"] * args.kid + ["logits"] * (args.score and i == 0)
            stats[i], kept[i] = image_stats(side, inception, args.batch_size, workers, args.resize, keep, progress=True)
    if processes()[0] > 0:
        return

    result = {"metric": metric, "images": [side.n for side in stats], "resize": next(filter(None, resizes), None)}
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
        result["kid"], result["kid_std"] = kernel_distance(*(outputs["features"] for outputs in kept))
        lines.append(f"{metric.replace('F', 'K', 1)} {result['kid']:.6g} +- {result['kid_std']:.6g}")
    if args.score:
        result["is"], result["is_std"] = inception_score(kept[0]["logits"])
        name = metric.replace("FID", "IS").replace("FD", "IS")
        lines.append(f"{name} {result['is']:.6g} +- {result['is_std']:.6g}")
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
        if parallel:
            dist.destroy_process_group()
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
