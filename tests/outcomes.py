"""What became of cases that ran on several ranks."""


class Outcomes:
    """What became of each case on each rank: an empty text, or what went wrong."""

    def __init__(self, by_rank: list[dict[str, str]], output: str) -> None:
        self.by_rank = by_rank
        self.output = output

    def check(self, case: str) -> None:
        problems = {
            rank: found.get(case, "not reached: a case before it failed") for rank, found in enumerate(self.by_rank)
        }
        failed = [f"rank {rank}: {problem}" for rank, problem in problems.items() if problem]
        assert not failed, "\n".join([*failed, self.output])
