"""What the processes of a test of sharding do; a module of its own, for a spawned process imports it."""

import json
import os
from pathlib import Path
from unittest.mock import patch

from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.models import device as fleet
from ragkit.models import reader
from ragkit.profile import MachineSettings, ReaderSettings

SETTINGS = {"steps": 7, "checkpoints": 1, "batch": 5, "at_once": 2, "rate": 1e-3}
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")


def draw(rng):
    """A question about two people, of whom the asked one's town is wanted."""
    one, other = rng.sample(NAMES, 2)
    towns = rng.sample(("Rome", "Oslo", "Lima", "Bonn"), 2)
    passages = [
        Passage(str(i), who, f"{who} lives in {town}.")
        for i, (who, town) in enumerate(zip((one, other), towns, strict=True))
    ]
    return Question(
        id=one, text=f"Where does {one} live?", answers=(towns[0],), gold=()
    ), rng.sample(passages, 2)


def learn(rank: int, size: int, port: int, folder: Path, dies_at: int | None = None) -> None:
    """Step 1 of the embedded reader, split over the processes if there are several, with a checkpoint every two steps; dies where it is told to."""
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fleet.start(MachineSettings(processes=size), 1)
    settings = ReaderSettings(**SETTINGS, shard=size > 1)
    one = reader.Reader.load("embedded", settings, to_train=True)
    folder.mkdir(exist_ok=True)

    def report(losses, rate):
        if len(losses) == dies_at:
            os._exit(9)

    with patch.object(reader, "CHECKPOINT_EVERY", 2):
        losses = reader.fine_tune(one, draw, folder, 0, report)
    if fleet.is_main():
        (folder / "losses.json").write_text(json.dumps(losses))
