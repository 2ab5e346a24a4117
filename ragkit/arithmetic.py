"""How long a GPU that is not here would need, by arithmetic alone: the floating-point operations of all that models do, over a share of its peak."""

from __future__ import annotations

from dataclasses import dataclass

from ragkit.memory import Lengths
from ragkit.profile import Profile
from ragkit.sizes import SetSize, Shape

SHARE_OF_PEAK = 0.3  # that well-fed large matrices reach; small models, short texts and generation reach less


def forward(shape: Shape, tokens: float) -> float:
    """Operations of one text's forward pass, without the head: two for each weight and token, and attention to what stands before."""
    return 2 * shape.block_weights * tokens + 2 * shape.layers * shape.heads * shape.size * tokens**2


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a unit of work."""

    profile: Profile
    size: SetSize
    reader: Shape
    retriever: Shape

    def by_unit(self) -> dict[str, float]:
        """Of every unit in which a model computes; a backward pass costs as much as two forward passes, checkpointing one more."""
        profile, k, lengths = self.profile, self.profile.k, Lengths.of(self.profile, self.size)
        read, alone, fewer, closed = (forward(self.reader, lengths.prompt(passages)) for passages in (k, 1, k - 1, 0))
        written = profile.reader.answer_tokens * forward(self.reader, 1)
        passage, question = forward(self.retriever, lengths.encoded()), forward(self.retriever, lengths.question)
        return {
            "Step 1 steps": profile.reader.batch * read * (4 if profile.reader.gradient_checkpointing else 3),
            "prompts recorded": read,
            "questions looked at": read + k * alone,
            "passages left out": fewer,
            "prompts read one by one": read,
            "answers": read + written,
            "closed-book answers": closed + written,
            "passages encoded": passage,
            "questions encoded": question,
            "Step 2 steps": 3 * profile.distill.batch * question,
            "Step 2 steps, both sides": 3 * profile.distill.batch * (question + k * passage),
        }
