"""Keeps of the fuzzer's inputs the shortest for each way to be refused: ``pick.py DIRECTORY``."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import loading

from grinqh_ao import CheckpointError

CORPUS = Path(__file__).with_name("corpus.tar.xz")


def why(data: bytes) -> str:
    """The message of the refusal, without what differs between two of its kind."""
    try:
        return str(loading.load(data, say=True))
    except CheckpointError as error:
        return re.sub(r"\d+|'[^']*'|\[.*\]|\(.*\)|=\S*", "#", str(error))[:100]


def main() -> None:
    shortest: dict[str, bytes] = {}
    for file in sorted(Path(sys.argv[1]).iterdir(), key=lambda file: file.stat().st_size):
        data = file.read_bytes()
        shortest.setdefault(why(data), data)
    with tarfile.open(CORPUS, "w:xz") as archive:
        for number, data in enumerate(shortest.values()):
            member = tarfile.TarInfo(f"{number:03}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    print(json.dumps(list(shortest), indent=1))


if __name__ == "__main__":
    main()
