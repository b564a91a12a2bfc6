"""A text with planted structure: every paragraph is about one of two topics."""

import numpy as np

TOPICS = {
    "garden": ["rose", "tulip", "soil", "spade", "seed", "leaf", "root", "bloom", "hedge", "lawn"],
    "harbour": ["anchor", "sail", "mast", "tide", "rope", "deck", "crew", "buoy", "hull", "keel"],
}


def planted_text(n_paragraphs: int = 300) -> str:
    """Paragraphs of twelve words, each about one topic."""
    rng = np.random.default_rng(1)
    topics = rng.choice(sorted(TOPICS), n_paragraphs)
    return "\n\n".join(" ".join(rng.choice(TOPICS[topic], 12)) for topic in topics)
