"""What the CPU suite asks, in order."""

QUESTIONS = ("dense", "rules", "dtypes", "small", "sparse", "memory", "imports", "compiling")
