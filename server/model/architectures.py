"""The families of models that are tested to be served: one list for what refusals say, the docs and the tests.

Owns names only. What decides is the check of the model itself at load (`base.py`): a family that is not listed here and
passes it is served, too. Knows nothing about how models are loaded or checked.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one kind: what people call them, transformers' `model_type`, and what is special about serving them."""

    name: str
    model_type: str
    special: str


FAMILIES = (
    Family("Llama", "llama", "grouped queries; biases where the checkpoint has them"),
    Family("Mistral", "mistral", "a sliding window in all layers"),
    Family("Qwen2 and Qwen2.5", "qwen2", "biases on q, k, v; windows by layer; tied embeddings in the small ones"),
    Family("Qwen3", "qwen3", "queries and keys normed per head"),
    Family("Gemma 2", "gemma2", "caps on scores and logits; windows in every other layer; scaled embeddings"),
    Family("Gemma 3", "gemma3_text", "two RoPE types and windows by layer; queries and keys normed; scaled embeddings"),
    Family("Phi-3 and Phi-4", "phi3", "fused q, k, v and gate, up; longrope by each sequence's own length"),
    Family("GPT-2", "gpt2", "transposed weights; learned positions, whose embedding is a site"),
    Family("OPT", "opt", "learned positions, whose embedding is no site; projections around narrow embeddings"),
    Family("GPT-NeoX and Pythia", "gpt_neox", "fused q, k, v by head; parallel blocks; partly rotated heads"),
    Family("Mixtral", "mixtral", "experts stay unquantized and are no sites"),
    Family("Qwen3-MoE", "qwen3_moe", "experts stay unquantized and are no sites; its plain layers are"),
)

SERVED = "families that work: " + ", ".join(family.name for family in FAMILIES)
