"""Write down what is installed: constraints.txt (versions) and requirements.lock (versions and digests).

constraints.txt serves every platform. requirements.lock names one archive per package by its SHA-256, as pip would
choose it on this platform and this Python; `make test LOCKED=1` installs from it and from nothing else. torch stands in
neither digest list, because its builds for one version differ by platform and index; it is pinned by version.

    make lock
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def frozen() -> list[str]:
    """`name==version` of everything installed or pinned but luthier, without local labels such as `+cpu`."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.partition("+")[0] for line in said.splitlines() if "==" in line]
    here = {name_of(line) for line in lines}
    # What is not installed here (the extra `docs` before `make docs-site`) keeps its pin.
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    lines += [line for line in pinned if "==" in line and name_of(line) not in here]
    return sorted(lines, key=str.lower)


def name_of(pin: str) -> str:
    """The package of a line `name==version`, spelt as indexes compare it."""
    return pin.partition("==")[0].strip().lower().replace("_", "-").replace(".", "-")


def digests() -> dict[str, tuple[str, str]]:
    """Package -> (version, sha256) of the archives that pip would install here under constraints.txt."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"),
                *("--report", str(report), "-c", str(ROOT / "constraints.txt"), f"{ROOT}[dev]"),
            ],
            check=True,
        )
        found = {}
        for item in json.loads(report.read_text())["install"]:
            name, info = item["metadata"]["name"], item["download_info"]
            if name not in ("luthier", "torch"):
                found[name.lower().replace("_", "-")] = (
                    item["metadata"]["version"],
                    info["archive_info"]["hashes"]["sha256"],
                )
        return found


def main() -> None:
    (ROOT / "constraints.txt").write_text("\n".join(frozen()) + "\n")
    lines = [
        f"# By `make lock`, for Python {platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]} on "
        f"{sys.platform} {platform.machine()}. torch is installed before, by its version: see scripts/lock.py.",
    ]
    for name, (version, sha256) in sorted(digests().items()):
        lines += [f"{name}=={version} \\", f"    --hash=sha256:{sha256}"]
    (ROOT / "requirements.lock").write_text("\n".join(lines) + "\n")
    print(f"constraints.txt and requirements.lock: {len(lines) // 2} packages with digests")


if __name__ == "__main__":
    main()
