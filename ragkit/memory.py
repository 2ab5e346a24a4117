"""Memory and disk that stages need, from first principles: weights, gradients, optimizer states, activations, caches, vectors, indexes.

Bytes throughout. What a training step keeps of a layer for its backward pass is counted tensor by tensor, as Korthikanti et al. (2022,
"Reducing Activation Recomputation in Large Transformer Models") do it, for fused attention: nothing of tokens x tokens is kept, but for the
bias that ALiBi adds to every head. Exact to about a quarter; what an allocator wastes is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ragkit.profile import IndexSettings, Profile
from ragkit.sizes import SetSize, Shape
from ragkit.vectors import BLOCK_BYTES
from ragkit.work import Stage

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
TRAINED = 16  # of a weight in training: itself, its gradient, and AdamW's two means, all in float32
LONGEST = 1.3  # of the longest prompts, in mean lengths
PROCESS, CONTEXT = 0.7e9, 0.6e9  # Python with its libraries; what a GPU keeps for a process
POSTING = 30  # bytes of a word of a passage while BM25 is made
TEMPLATE_TOKENS = 12  # of a prompt: 'question:', 'answer:', line ends
TITLE_TOKENS = 6  # of a passage, with its line end


@dataclass(frozen=True)
class Lengths:
    """Tokens of a set's texts: the mean ones count for time, the longest for memory."""

    passage: float
    question: float
    answer: float
    context: int
    passage_limit: int

    @classmethod
    def of(cls, profile: Profile, size: SetSize) -> Lengths:
        reader = profile.reader
        return cls(size.passage_tokens + TITLE_TOKENS, size.question_tokens, min(reader.answer_tokens, 6), reader.context, profile.retriever.passage_tokens)

    def prompt(self, passages: int, longest: bool = False) -> float:
        """Tokens of a prompt with so many passages and its answer."""
        whole = TEMPLATE_TOKENS + self.question + passages * self.passage + self.answer
        return min(float(self.context), whole * (LONGEST if longest else 1))

    def encoded(self, longest: bool = False) -> float:
        """Tokens of a passage as the retriever reads it."""
        return min(float(self.passage_limit), self.passage * (LONGEST if longest else 1))


def passing(shape: Shape, texts: float, tokens: float, width: int) -> float:
    """Of a forward pass without gradients: one layer's inputs, outputs and widened states, and the bias of every head."""
    bias = shape.heads * tokens * width if shape.biased else 1
    return texts * tokens * ((4 * shape.hidden + (3 if shape.gated else 2) * shape.widened) * width + bias)


def kept_of_layer(shape: Shape, width: int) -> float:
    """What a layer keeps of one token for the backward pass: what its norms read (in float32) and what every matrix and activation reads."""
    attention = 2 * shape.heads * shape.size + 2 * shape.kv_heads * shape.size
    return 2 * shape.hidden * 4 + (2 * shape.hidden + attention + (4 if shape.gated else 2) * shape.widened) * width


def kept(shape: Shape, texts: float, tokens: float, width: int, checkpointing: bool = False) -> float:
    """What a forward pass keeps for the backward pass; with checkpointing the layers' inputs and one layer's tensors."""
    whole_layers = 1 if checkpointing else shape.layers
    bias = shape.heads * tokens * width if shape.biased else 1
    inputs = shape.layers * shape.hidden * 4 if checkpointing else 0
    return texts * tokens * (whole_layers * kept_of_layer(shape, width) + inputs + bias)


def trained(shape: Shape, width: int, lora_rank: int = 0, parts: int = 1) -> float:
    """Weights with gradients and AdamW's states, and the copies of the weights in the dtype computed in.

    Split into `parts` (FSDP) a process holds one, and whole what is computed with: two layers, and what lies outside the layers. It
    begins with the whole weights, before they are split.
    """
    if parts > 1:
        outside, a_layer = shape.parameters - shape.block_weights, shape.block_weights / shape.layers
        together = (2 * a_layer + outside) * 2 * width  # weights, and gradients before they are dealt out
        return max(shape.parameters * (4 + 4 / parts), shape.parameters * TRAINED / parts + together)
    weights, adapters = shape.parameters, lora_rank * shape.adapter_weights
    copies = weights * width if width < 4 else 0
    return (weights * 4 + adapters * TRAINED if lora_rank else weights * TRAINED) + copies


def keys_and_values(shape: Shape, texts: float, tokens: float, width: int) -> float:
    """The cache of generation."""
    return texts * tokens * 2 * shape.layers * shape.kv_heads * shape.size * width


def recorded(shape: Shape, texts: float, tokens: float, rows: float) -> float:
    """What recording attention adds: a layer's rows in float32 (logits, softmax and copies), and every layer's contributions."""
    return texts * tokens * 4 * (4 * shape.heads * rows + 2 * 3 * shape.layers)


@dataclass(frozen=True)
class Memory:
    """What the stages of one set need."""

    profile: Profile
    size: SetSize
    reader: Shape
    retriever: Shape

    @property
    def lengths(self) -> Lengths:
        return Lengths.of(self.profile, self.size)

    def peak(self, stage: Stage) -> tuple[float, float]:
        """Bytes on the device that computes, and beside them in the host's memory, at the stage's highest point."""
        device = self.of_device(stage)
        return device + (CONTEXT if device and self.profile.machine.device == "cuda" else 0.0), PROCESS + self.held(stage)

    def of_device(self, stage: Stage) -> float:
        settings, lengths, k = self.profile.reader, self.lengths, self.profile.k
        width, shape, at_once = WIDTH[settings.dtype], self.reader, settings.at_once
        weights = shape.parameters * width
        whole, alone, fewer = (lengths.prompt(passages, longest=True) for passages in (k, 1, k - 1))
        looked = passing(shape, at_once, whole, width) + recorded(shape, at_once, whole, lengths.answer + 2)
        if stage.kind == "teacher":
            return weights + max(looked, passing(shape, 4 * at_once, alone, width))
        if stage.kind == "loop":
            return weights + passing(shape, at_once, fewer, width)
        if stage.kind == "tokens":
            return weights + looked
        if stage.kind == "contextual":
            return weights + passing(shape, 1, whole, width)
        if stage.kind == "answers":
            cache = keys_and_values(shape, 2 * at_once, whole + settings.answer_tokens, width)
            return weights + cache + passing(shape, 2 * at_once, whole, width) + 2 * at_once * shape.vocabulary * 4
        return self.step1() if stage.kind == "step1" else self.searching(stage)

    def step1(self) -> float:
        """The fine-tuning: `at_once` prompts of this process's share in a pass; logits are made where an answer token is predicted."""
        settings, machine, lengths = self.profile.reader, self.profile.machine, self.lengths
        width = WIDTH[settings.dtype]
        prompts = min(settings.at_once, -(-settings.batch // machine.processes))
        logits = 3 * prompts * (lengths.answer + 1) * self.reader.vocabulary * 4
        states = trained(self.reader, width, settings.lora_rank, machine.processes if settings.shard else 1)
        a_pass = kept(self.reader, prompts, lengths.prompt(self.profile.k, longest=True), width, settings.gradient_checkpointing) + logits
        merged = 2 * self.reader.parameters * 4 if settings.lora_rank else 0  # the reader and a copy with the adapters in its weights
        return max(states + a_pass, merged)

    def searching(self, stage: Stage) -> float:
        """Stages in which the retriever computes; 0 for those in which no model does."""
        settings, distill, lengths = self.profile.retriever, self.profile.distill, self.lengths
        width, shape = WIDTH[settings.dtype], self.retriever
        tokens, asked = lengths.encoded(longest=True), LONGEST * lengths.question
        copies = shape.parameters * width if width < 4 else 0
        encoding = shape.parameters * 4 + copies + passing(shape, settings.at_once, tokens, width)
        needed = [encoding] if stage.units.get("passages encoded") or stage.units.get("questions encoded") else [0.0]
        if stage.units.get("crop steps"):
            needed.append(trained(shape, width) + kept(shape, 2 * settings.crop_batch, 0.7 * tokens, width))
        batch = -(-distill.batch // self.profile.machine.processes)
        if stage.units.get("Step 2 steps"):
            needed.append(trained(shape, width) + kept(shape, batch, asked, width))
        if stage.units.get("Step 2 steps, both sides"):
            needed.append(trained(shape, width) + kept(shape, batch, asked, width) + kept(shape, batch * self.profile.k, tokens, width))
        return max(needed)

    def left_on_disk(self, stage: Stage) -> float:
        """Bytes that the stage leaves behind."""
        profile, size, k = self.profile, self.size, self.profile.k
        d, questions = self.retriever.hidden, min(profile.distill.questions, size.questions["distill"])
        if stage.kind in ("corpus", "vectors", "index") and not stage.home and profile.twin(stage.set_name):
            return 0.0  # links to those of another set
        if stage.kind == "corpus":
            return size.bytes_on_disk
        if stage.kind == "retriever":
            return self.retriever.parameters * 4
        if stage.kind == "vectors":
            return size.passages * d * WIDTH[profile.index.dtype]
        if stage.kind == "index":
            return index_bytes(profile.index, size.passages, d)
        if stage.kind == "step1":
            return (len(profile.reader.kept_steps) + 1) * self.reader.parameters * 4
        layers = self.reader.layers
        if stage.kind == "teacher":
            return questions * k * (3 * 2 * layers * 2 + profile.reader.answer_tokens) * 4
        if stage.kind == "tokens":
            return stage.units["prompts recorded"] * self.lengths.prompt(k) * (3 * 2 * layers * 4 + 32)
        return 0.0

    def held(self, stage: Stage) -> float:
        """What a stage holds in the host's memory: vectors block by block, the index where one is searched or built, BM25 with all passages."""
        index, n, d = self.profile.index, self.size.passages, self.retriever.hidden
        block = min(n * d * 4.0, BLOCK_BYTES)
        if stage.kind == "vectors":
            return min(n, index.shard) * (d * 4 + self.size.bytes_on_disk / n)
        if stage.units.get("vectors indexed"):
            return block + max(index_bytes(index, n, d), min(n, index.trained_on) * d * 4.0)
        if stage.kind == "answers" and self.profile.evaluate.bm25:
            return self.size.bytes_on_disk + n * self.size.passage_words * POSTING
        found = index_bytes(index, n, d) if stage.units.get("searches") else 0.0
        again = 2 * n * d * 4.0 if stage.units.get("passages encoded") and stage.kind != "step1" else 0.0  # both sides: all new vectors, and FAISS's copy
        return max(found + again, block if stage.units.get("vectors read") else 0.0)


def index_bytes(index: IndexSettings, n: float, d: int) -> float:
    """Bytes of an index over n vectors of d dimensions, on disk and in memory, as FAISS's guide has them; an exact search needs none.

    IVF-PQ: a code and a number of each vector, and the cells' centres. HNSW: the vectors in a byte a dimension and twice `links` neighbours of each.
    """
    if index.kind == "exact":
        return 0.0
    return n * (index.code_bytes + 8) + index.lists * d * 4 if index.kind == "ivfpq" else n * (d + index.links * 2 * 4)
