"""Reads Universal Dependencies treebanks (CoNLL-U): words, parts of speech and the text."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sentence:
    """`spaces[i]`: whether a space follows word i. `spans[i]`: where it stands in `text`."""

    id: str
    words: list[str]
    tags: list[str]
    spaces: list[bool]

    @property
    def text(self) -> str:
        return "".join(
            word + " " * space for word, space in zip(self.words, self.spaces, strict=True)
        )

    @property
    def spans(self) -> list[tuple[int, int]]:
        found, at = [], 0
        for word, space in zip(self.words, self.spaces, strict=True):
            found.append((at, at + len(word)))
            at += len(word) + space
        return found

    def lower(self) -> "Sentence":
        return Sentence(self.id, [word.lower() for word in self.words], self.tags, self.spaces)


def read_conllu(path: Path) -> list[Sentence]:
    """All sentences, the words of a contraction ("do", "n't") side by side, without empty nodes."""
    sentences = []
    for block in path.read_text("utf8").strip().split("\n\n"):
        words, tags, spaces = [], [], []
        name, together, contraction_ends, space_after = "", 0, 0, True
        for line in block.split("\n"):
            if line.startswith("# sent_id = "):
                name = line.removeprefix("# sent_id = ")
            if line.startswith("#"):
                continue
            number, word, _, tag, *_, misc = line.split("\t")
            if "-" in number:
                together, contraction_ends = map(int, number.split("-"))
                space_after = "SpaceAfter=No" not in misc
            elif number.isdigit():
                inside = together <= int(number) < contraction_ends
                last = int(number) == contraction_ends
                words.append(word)
                tags.append(tag)
                spaces.append(not inside and (space_after if last else "SpaceAfter=No" not in misc))
        sentences.append(Sentence(name, words, tags, spaces))
    return sentences
