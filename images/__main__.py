"""`python -m images`: write packages and Dockerfile of every image to `images/dockerfiles/<name>`.

Each folder is a whole build context, for an operator without Flyte's builder: `docker build images/dockerfiles/tier1`.
The packages are those of `images/specs.py` (for `edge` the wheel's own) with all that they need, by the metadata of
what is installed here, at the versions of constraints.txt. What torch's CUDA build needs is not in the metadata of the
CPU build that may be installed here: it is taken from constraints.txt as it stands.
"""

import tempfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from flytekit.image_spec.default_builder import create_docker_context
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from images import specs

ROOT = Path(__file__).resolve().parent.parent
CUDA = ("cuda-", "nvidia-", "triton")
PLATFORM = {
    "python_version": specs.PYTHON,
    "python_full_version": f"{specs.PYTHON}.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "os_name": "posix",
    "platform_machine": "x86_64",
}


def pins() -> dict[str, str]:
    """Return the pins of constraints.txt that hold in the images: name → version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    holding = [pin for pin in found if not pin.marker or pin.marker.evaluate(PLATFORM)]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in holding}


def roots() -> dict[str, tuple[str, ...]]:
    """Return what each image is asked to have."""
    wheel = [Requirement(line) for line in distribution("fednested_lib").requires or ()]
    edge = tuple(line.name for line in wheel if "extra" not in str(line.marker))
    return {"control": specs.CONTROL, "tier1": specs.TIER1, "connector": specs.CONNECTOR, "edge": edge}


def locked(names: tuple[str, ...], *, cuda: bool) -> list[str]:
    """Return `name==version` of the packages and of all that they need, sorted."""
    pinned, waiting = pins(), [Requirement(name) for name in names]
    seen: dict[str, set[str]] = {}
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), wanted.extras | {""}
        new = extras - seen.setdefault(name, set())
        seen[name] |= new
        for line in _requires(name, pinned):
            if any(not line.marker or line.marker.evaluate({**PLATFORM, "extra": extra}) for extra in new):
                waiting.append(line)
    if cuda and "torch" in seen:
        seen |= {name: set() for name in pinned if name.startswith(CUDA)}
    return [f"{name}=={pinned[name]}" for name in sorted(seen)]


def _requires(name: str, pinned: dict[str, str]) -> list[Requirement]:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed: run `make setup`") from None
    if name not in pinned:
        raise SystemExit(f"{name} {found.version} has no pin in constraints.txt: its first lines say how it is made")
    return [Requirement(line) for line in found.requires or ()]


def write(name: str, packages: list[str], directory: Path) -> None:
    """Write the build context of one image: packages and Dockerfile, without the repository's code."""
    spec = replace(getattr(specs, name), packages=packages, source_copy_mode=None, source_root=None)
    with tempfile.TemporaryDirectory() as scratch:
        create_docker_context(spec, Path(scratch))
        text = (Path(scratch) / "Dockerfile").read_text(encoding="utf-8")
    # Left out: a hash over the registry too, by which flytekit tells the image it runs in; nothing here asks for it.
    lines = text.partition("# NOTE: Important to set this env var")[0].splitlines()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "Dockerfile").write_text("\n".join(map(str.rstrip, lines)).rstrip() + "\n", encoding="utf-8")
    # Not the rendered list: flytekit adds itself to one without it, and a device has no use for it.
    (directory / "requirements_uv.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for image, names in roots().items():
        write(image, locked(names, cuda=image != "edge"), specs.CONTEXTS / image)
