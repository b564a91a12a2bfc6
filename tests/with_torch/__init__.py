"""Tests of `gpurms.torch`: `pytest tests/with_torch`, with the extra `test-torch`."""
