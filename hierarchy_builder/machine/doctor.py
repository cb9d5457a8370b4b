"""What `doctor` looks at: whether this machine and its packages fit, and the command that mends what does not.

A check returns findings and may raise whatever it likes: it then counts as a check that could not be made. Nothing is
imported that could fail or hang here, except torch, which every command needs.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.flags import OUTPUT, PATH, argument, takes
from hierarchy_builder.machine.installing import DISTRIBUTION, install_extras, pip_install, this_pip
from hierarchy_builder.machine.process import num_cpus, socket_folder
from hierarchy_builder.terminal import counted, print_cells, print_json, say

State = Literal["ok", "note", "blocks"]
GIB = 2**30
LITTLE_DISK_GIB, LITTLE_SHARED_GIB = 10, 1
VISION_SHIFT = 15
"""torch 2.N is released as a pair with torchvision 0.(N + this number)."""
WHEELS = "https://download.pytorch.org/whl"
"""Where builds of torch and torchvision lie that the package index does not hold."""
BROWSERS = ("firefox", "chromium", "chromium-browser", "google-chrome", "microsoft-edge")


class Finding(NamedTuple):
    """What one check found. state: `blocks` where commands fail until it is mended; mend: what mends it."""

    state: State
    found: str
    mend: str = ""


@takes(
    folder=argument("Folder that you want to work in.", default=".", **PATH | {"metavar": "DIR"}),
    **OUTPUT,
)
def doctor(folder: Path, as_json: bool, quiet: bool) -> None:
    """Say what on this machine stops or slows commands, and what helps; exit code 1 if something stops them.

    It looks at Python, packages and pairs of them that do not fit, GPU, weights, disk, locks, Ray, fonts and browser.
    """
    findings = examined(folder)
    blocking = [check for check, each in findings if each.state == "blocks"]
    if as_json:
        print_json([{"check": check, **each._asdict()} for check, each in findings])
    else:
        shown = {"ok": "", "note": "note: ", "blocks": "BLOCKS: "}
        rows = [(check, shown[each.state] + each.found, each.mend or "–") for check, each in findings]
        print_cells(("what", "found", "what helps"), rows)
    if blocking:
        say(f"{counted(len(blocking), 'finding')} will stop commands: {', '.join(blocking)}", quiet)
        raise typer.Exit(1)
    say("nothing here will stop a command", quiet)


def examined(folder: Path) -> list[tuple[str, Finding]]:
    """All findings, with the names of their checks; a check that fails is a finding itself."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "Python": _python,
        "packages": _packages,
        "pairs": _pairs,
        "extras": _extras,
        "GPU": _gpu,
        "processors": _processors,
        "weights": _weights,
        "disk": lambda: _disk(folder),
        "file locks": lambda: _locks(folder),
        "shared memory": _shared_memory,
        "Ray": _ray,
        "fonts": _fonts,
        "pictures": _pictures,
        "browser": _browser,
    }
    findings: list[tuple[str, Finding]] = []
    for name, check in checks.items():
        try:
            findings.extend((name, each) for each in check())
        except Exception as error:  # a check must never stop the others
            failed = Finding("note", f"could not be checked: {type(error).__name__}: {error}")
            findings.append((name, failed))
    return findings


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] if _installed(DISTRIBUTION) else ""
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield Finding("ok", found)
    else:
        yield Finding("blocks", f"{found}; {wanted} is needed", "make a new environment with such a Python")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(name: str) -> list[Requirement]:
    """What an installed package needs on this machine, without its extras."""
    found = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def _packages() -> Iterator[Finding]:
    """Every package below this one in a version that its users accept, as `pip check` asks for all there are."""
    if _installed(DISTRIBUTION) is None:
        text = f"{DISTRIBUTION} runs from its sources, so nobody knows what it needs"
        yield Finding("note", text, install_extras())
        return
    waiting, seen, wrong = [DISTRIBUTION], {DISTRIBUTION}, False
    while waiting:
        user = waiting.pop()
        for needed in _requirements(user):
            version = _installed(needed.name)
            if version is not None and needed.specifier.contains(version, prereleases=True):
                if needed.name.lower() not in seen:
                    seen.add(needed.name.lower())
                    waiting.append(needed.name)
                continue
            wrong = True
            has = "is not installed" if version is None else f"is {version}"
            # only what this package itself asks for is sure to be needed
            state: State = "blocks" if user == DISTRIBUTION else "note"
            wants = f"{needed.name} {has}, {user} needs {needed.specifier or 'it'}"
            yield Finding(state, wants, pip_install(f"{needed.name}{needed.specifier}"))
    if not wrong:
        version = _installed(DISTRIBUTION)
        yield Finding("ok", f"{DISTRIBUTION} {version} and the {len(seen) - 1} packages below it fit")


def _pairs() -> Iterator[Finding]:
    """Packages that hinder each other, which no package says of itself."""
    torch, vision = _installed("torch"), _installed("torchvision")
    good = []
    if torch and vision:
        wanted = f"0.{int(torch.split('.')[1]) + VISION_SHIFT}"
        (release, _, build), (own, _, own_build) = torch.partition("+"), vision.partition("+")
        if not vision.startswith(f"{wanted}."):
            text = f"torchvision {vision} with torch {torch}, which was made for torchvision {wanted}"
            yield Finding("blocks", text, pip_install(f"torch=={release}", f"torchvision=={wanted}.*"))
        elif build != own_build:  # of the same release
            text = (
                f"torch {torch} and torchvision {vision} are built for different devices; commands work, since none of "
                "torchvision's operators is used"
            )
            source = [f"--index-url={WHEELS}/{build}"] if build else []
            again = pip_install(f"torchvision=={own}", "--force-reinstall", "--no-deps", *source)
            yield Finding("note", text, again)
        else:
            good.append(f"torch {torch} with torchvision {vision}")
    names = {dist.name.lower().replace("_", "-") for dist in importlib.metadata.distributions() if dist.name}
    faiss = sorted(name for name in names if re.fullmatch(r"faiss-(cpu|gpu.*)", name))
    if len(faiss) > 1:
        keep = next((name for name in faiss if name != "faiss-cpu"), faiss[0])
        away = f"{this_pip()} uninstall -y {shlex.join(faiss)}"
        text = f"{' and '.join(faiss)} install the same module `faiss`, and one overwrites the other"
        yield Finding("blocks", text, f"{away} && {pip_install(keep)}")
    for cuml in sorted(name for name in names if name.startswith("cuml-cu")):
        generation = cuml.removeprefix("cuml-cu")
        if torch and (found := re.search(r"\+cu(\d\d)", torch)) and found[1] != generation:
            text = f"{cuml} with torch {torch}: they are built for different generations of CUDA"
            yield Finding("note", text, pip_install(f"cuml-cu{found[1]}"))
    if good:
        yield Finding("ok", ", ".join(good) + (f", {faiss[0]}" if len(faiss) == 1 else ""))


def _extras() -> Iterator[Finding]:
    """Which of the optional parts are installed; `doctor` cannot know which are wanted."""
    parts = {
        "studio": ("gradio", "the editor in the browser"),
        "onnx": ("onnxruntime", "onnx:FILE encoders"),
        "faiss": ("faiss", "--backend faiss"),
        "formats": ("pillow_heif", "HEIC pictures"),
        "fid": ("torch_fidelity", "evaluate --inception"),
        "wandb": ("wandb", "Weights & Biases"),
    }
    lacking = [extra for extra, (module, _) in parts.items() if importlib.util.find_spec(module) is None]
    if has := [extra for extra in parts if extra not in lacking]:
        yield Finding("ok", f"installed: {', '.join(has)}")
    if lacking:
        uses = ", ".join(f"{extra} ({parts[extra][1]})" for extra in lacking)
        yield Finding("note", f"not installed: {uses}", install_extras(*lacking))


def _gpu() -> Iterator[Finding]:
    import torch

    smi, driver = shutil.which("nvidia-smi"), ""
    if smi is not None:
        ask = [smi, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        asked = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False)
        driver = asked.stdout.strip().replace("\n", "; ") if asked.returncode == 0 else ""
    if torch.cuda.is_available():
        cards = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            cards.append(f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
        yield Finding("ok", f"{'; '.join(cards)}; torch for CUDA {torch.version.cuda}")
    elif driver and torch.version.cuda is None:
        plain = torch.__version__.partition("+")[0]
        text = f"{driver} is there, but torch {torch.__version__} was built for CPUs only"
        yield Finding("note", text, pip_install(f"torch==={plain}", "--force-reinstall"))
    elif driver:
        text = f"{driver} is there, but torch for CUDA {torch.version.cuda} cannot use it: the driver may be too old"
        yield Finding(
            "note", text, "nvidia-smi shows the newest CUDA that the driver knows; update the driver"
        )
    else:
        yield Finding("note", "none; everything runs on the CPU, with presets and decoders made for it")


def _processors() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    if text.isdecimal():
        memory = min(memory, int(text) / GIB)
    yield Finding("ok", f"{counted(num_cpus(), 'CPU')} and {memory:.1f} GiB of memory for this process")


def _weights() -> Iterator[Finding]:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    stored = sorted(
        path.name.removeprefix("models--timm--")
        for path in cache.glob("models--timm--*")
        if any(path.glob("snapshots/*/*"))
    )
    if stored:
        yield Finding("ok", f"of encoders in {cache}: {', '.join(stored)}")
        return
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    how = "HF_HUB_OFFLINE forbids to fetch any" if offline else "the first build fetches those it needs"
    text = f"of encoders: none in {cache}; {how}; dct needs none"
    yield Finding("note", text, "build … --weights FILE takes a local file")


def _disk(folder: Path) -> Iterator[Finding]:
    place = _nearest(folder)
    free = shutil.disk_usage(place).free / GIB
    temporary = shutil.disk_usage(tempfile.gettempdir()).free / GIB
    found = f"{free:.1f} GiB free in {place}, {temporary:.1f} GiB in {tempfile.gettempdir()}"
    if free < LITTLE_DISK_GIB:
        yield Finding("note", found, "hierarchy-builder plan PHOTOS --out DIR says how much a build needs")
    else:
        yield Finding("ok", found)


def _nearest(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())


def _locks(folder: Path) -> Iterator[Finding]:
    place = _nearest(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                text = f"{place} gives no locks ({error.strerror}): two commands at once could damage a build"
                yield Finding("blocks", text, "choose an --out on a disk of this machine")
            else:
                yield Finding("ok", f"{place} can be written and locked")
    except OSError as error:
        text = f"{place} cannot be written: {error.strerror}"
        yield Finding("blocks", text, "choose another --out")


def _shared_memory() -> Iterator[Finding]:
    place, slower = Path("/dev/shm"), "Ray then works on the disk, slower"
    if not place.is_dir():
        yield Finding("note", f"no {place}; {slower}", "--workers 0")
        return
    free = shutil.disk_usage(place).free / GIB
    found = f"{free:.1f} GiB free in {place}"
    if free < LITTLE_SHARED_GIB:
        help_with = "docker run --shm-size=8g …, or --workers 0"
        yield Finding("note", f"{found}; {slower}", help_with)
    else:
        yield Finding("ok", found)


def _ray() -> Iterator[Finding]:
    version = _installed("ray")
    if version is None:
        yield Finding("note", "not installed; only builds with --workers 0 work", pip_install("ray"))
        return
    try:
        place = socket_folder()
    except BuilderError as error:
        problem, _, help_with = str(error).rpartition(": ")
        yield Finding("note", f"Ray {version}: {problem}", help_with)
        return
    found = f"Ray {version}, sockets in {place}"
    if address := os.environ.get("RAY_ADDRESS"):
        yield Finding(
            "note", f"{found}; RAY_ADDRESS={address}: builds join that cluster", "unset RAY_ADDRESS"
        )
    else:
        yield Finding("ok", found)


def _fonts() -> Iterator[Finding]:
    from PIL import features

    if features.check("freetype2"):
        yield Finding("ok", "Pillow draws text with FreeType; pages use the fonts of the browser")
    else:
        text = "this Pillow has no FreeType: sheets and the studio draw their labels with it"
        yield Finding("blocks", text, pip_install("--force-reinstall", "pillow"))


def _pictures() -> Iterator[Finding]:
    from PIL import features

    lacking = [name for name in ("jpg", "webp", "avif") if not features.check(name)]
    if lacking:
        text = f"this Pillow does not read {', '.join(lacking)}"
        yield Finding("note", text, pip_install("--upgrade", "--force-reinstall", "pillow"))


def _browser() -> Iterator[Finding]:
    found = [name for name in BROWSERS if shutil.which(name)]
    found += ["open"] * (sys.platform == "darwin")
    if found:
        yield Finding("ok", f"{found[0]} can show pages and the studio")
    else:
        text = (
            "none on this machine; pages are single files, and the studio can be reached from another machine"
        )
        yield Finding("note", text, "ssh -L 7860:127.0.0.1:7860 THIS-MACHINE, then trainer studio RUN")
