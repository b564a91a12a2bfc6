"""Small launches for the judgement of mutants: few and short, but each sees as much as it can.

Results are compared with NumPy's, bit by bit; everything else the interpreter of PTX finds.
"""
