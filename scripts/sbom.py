"""List what is installed as a CycloneDX bill of materials; needs no network.

    make sbom            writes dist/sbom.json

Each package with version, licence as it states it, package URL, what it depends on, and the SHA-256 of its archive
where requirements.lock has the same version. The same installation gives the same bytes: no date, no random number.
"""

import argparse
import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LICENCE_CHARS = 200  # a longer text is the licence itself, not its name


def digests(lock: str) -> dict[tuple[str, str], str]:
    """(package, version) -> SHA-256 of its archive, from the text of requirements.lock."""
    found = re.findall(r"^(\S+)==(\S+) \\\n\s+--hash=sha256:([0-9a-f]{64})$", lock, re.MULTILINE)
    return {(plain(name), version): digest for name, version, digest in found}


def plain(name: str) -> str:
    """A package's name in the one spelling that names are compared in."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(package: metadata.Distribution) -> Iterator[str]:
    """Names of what it depends on here, without extras."""
    for text in package.requires or []:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield plain(wanted.name)


def licence(package: metadata.Distribution) -> str:
    """What the package says its licence is; empty where it says nothing short."""
    about = package.metadata
    classified = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    said = [word for field in ("License-Expression", "License") for word in about.get_all(field) or []]
    for word in [*said, ", ".join(classified)]:
        if word and len(word) <= LICENCE_CHARS and "\n" not in word:
            return str(word)
    return ""


def bill(lock: str) -> Bom:
    """The installation that this Python runs in; luthier is what it is for."""
    packages = {plain(p.metadata["Name"]): p for p in metadata.distributions()}
    known, parts = digests(lock), {}
    for name, package in sorted(packages.items()):
        version = package.version.partition("+")[0]  # a local label such as `+cpu` is no part of the package URL
        said = licence(package)
        parts[name] = Component(
            name=name,
            version=package.version,
            type=ComponentType.LIBRARY,
            bom_ref=f"{name}=={package.version}",
            purl=PackageURL("pypi", None, name, version),
            licenses=[DisjunctiveLicense(name=said)] if said else [],
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=known[name, version])]
            if (name, version) in known
            else [],
        )
    made = Bom()
    made.metadata.component = parts.pop("luthier")
    made.components.update(parts.values())
    for name, part in [("luthier", made.metadata.component), *parts.items()]:
        made.register_dependency(part, [parts[n] for n in sorted(set(needs(packages[name]))) if n in parts])
    return made


def as_json(made: Bom) -> str:
    """The bill's text, without what differs from one making to the next."""
    value = json.loads(JsonV1Dot6(made).output_as_string())
    del value["serialNumber"], value["metadata"]["timestamp"]
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "sbom.json")
    out: Path = parser.parse_args().out
    made = bill((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json(made), encoding="utf-8")
    parts = list(made.components)
    print(
        f"{out}: {len(parts)} packages, {sum(bool(p.hashes) for p in parts)} with the digest of their archive,"
        f" {sum(not p.licenses for p in parts)} that name no licence"
    )


if __name__ == "__main__":
    main()
