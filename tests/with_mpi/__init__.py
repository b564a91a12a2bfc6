"""Tests of `gpurms.distributed` with real processes: `pytest tests/with_mpi`, with the extra `test-mpi`.

The modules `*_cases.py` hold functions of a communicator that every rank runs, under `mpiexec`; a `test_*.py` starts
them, all cases of a module in one go, and has one test per case and number of ranks.
"""
