"""``python -m gpurms demo``: word embeddings trained by sparse RMSprop steps, from text to picture.

``corpus`` finds words, ``skipgram`` makes pairs and gradients, ``train`` takes the steps under the bar of ``progress``,
``neighbours`` and ``picture`` show what was learned, ``output`` writes files, ``command`` is the command line around
them. Only ``picture`` and ``progress`` import packages of the ``demo`` extra.
"""


class InputError(Exception):
    """Something that the user can put right; the command shows it in one line."""
