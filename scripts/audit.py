"""Ask whether a package of constraints.txt has a known weakness, and say so where nothing could be asked.

    make audit                                          all of constraints.txt, against the package index's advisories
    python scripts/audit.py --service osv FILE ...      another service, other lists of pins

pip-audit alone ends with "No known vulnerabilities found" and exit code 0 where the index did not know one single
package. Here a package that was not looked up counts as a failure.

Exit codes: 0, every package was looked up and none has a known weakness; 1, some have; 2, not (wholly) audited.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMED = 10  # packages named in a message


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit code, and lines that say why.

    Args:
        report: what `pip-audit --format json` writes.
    """
    packages = report["dependencies"]
    weak = [p for p in packages if p.get("vulns")]
    skipped = [p for p in packages if "skip_reason" in p]
    lines = []
    for package in weak:
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version yet"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    looked_up = len(packages) - len(skipped)
    if skipped:
        names = ", ".join(p["name"] for p in skipped[:NAMED]) + (", ..." if len(skipped) > NAMED else "")
        lines.append(
            f"NOT AUDITED: {len(skipped)} of {len(packages)} packages ({names}); first reason:"
            f" {skipped[0]['skip_reason']}. Ask a service that knows them: python scripts/audit.py --service osv."
        )
    if not packages:
        lines.append("NOT AUDITED: the list of packages is empty.")
    lines.append(f"{looked_up} of {len(packages)} packages looked up, {len(weak)} with a known weakness.")
    return (1 if weak else 2 if skipped or not packages else 0), lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="lists of name==version; default: constraints.txt")
    parser.add_argument("--service", choices=["pypi", "osv"], default="pypi")
    words = parser.parse_args()
    files = words.files or [ROOT / "constraints.txt"]
    asked = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"),
            *("--format", "json", "--vulnerability-service", words.service),
            *[word for file in files for word in ("-r", str(file))],
        ],
        capture_output=True,
        text=True,
    )
    try:
        report = json.loads(asked.stdout)
    except ValueError:  # it writes no report where it fails
        reason = (asked.stderr.strip() or "no output").splitlines()[-1]
        print(
            f"NOT AUDITED: pip-audit ended with {asked.returncode} and no report. An audit needs the network and the"
            f" service {words.service!r}. What it said last: {reason}",
            file=sys.stderr,
        )
        return 2
    code, lines = verdict(report)
    print("\n".join(lines), file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
