"""Loops over arrays: the update rule of RMSprop and everything around it that touches elements."""
