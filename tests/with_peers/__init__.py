"""Tests beside the libraries whose RMSprop is reproduced: torch, tf_keras, Keras 3 and optax, all installed."""
