"""Leaves in apt's lists what is installed or fetched: apt reads all of them each time, for every test.

"apt-get update" brings the rest back where a mirror has changed.
"""

from pathlib import Path
from subprocess import check_output

kept = set(check_output(("dpkg-query", "--show", "--showformat=${Package}\n"), text=True).split())
kept |= {path.name.partition("_")[0] for path in Path("/var/cache/apt/archives").glob("*.deb")}
for path in Path("/var/lib/apt/lists").glob("*_Packages"):
    stanzas = path.read_text().split("\n\n")
    path.write_text(
        "".join(f"{one}\n\n" for one in stanzas if one.partition("\n")[0].removeprefix("Package: ") in kept)
    )
