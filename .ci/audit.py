"""Known vulnerabilities of what is installed, by pip-audit. Exit status 1 where there is one; what could not be asked is said.

Without the network, or where a mirror has no database of vulnerabilities, nothing is known: then it says `not checked`.
"""

import json
import subprocess
import sys

COMMAND = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--skip-editable", "--format", "json"]


def report(answer: str, complaint: str) -> tuple[list[str], bool]:
    """What to say of pip-audit's JSON and of its standard error, and whether that is well."""
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return [f"not checked: {(complaint.strip().splitlines() or ['pip-audit gave no answer'])[-1][:200]}"], True
    asked = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version'}"
        for package in asked
        for flaw in package["vulns"]
    ]
    if not asked:
        return [f"not checked: no database knows any of {len(packages)} packages"], True
    left_out = [package["name"] for package in packages if "skip_reason" in package]
    said = [f"{len(asked)} packages checked, {len(found)} known vulnerabilities", *found]
    return said + ([f"not checked: {', '.join(left_out)}"] if left_out else []), not found


if __name__ == "__main__":
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    lines, well = report(done.stdout, done.stderr)
    print("\n".join(lines))
    sys.exit(not well)
