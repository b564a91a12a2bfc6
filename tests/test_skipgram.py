"""What the demo trains on: words of texts, pairs of words, gradients of their loss."""

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest

import gpurms
from gpurms.demo import InputError, corpus, skipgram
from tests.engines import Engine, running
from tests.support import dense, host

# ---------------------------------------------------------------------------------------------------- corpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC", ["don't", "panic"]),
        ("the list's end, lists' ends", ["the", "list", "end", "lists", "ends"]),
        ("the list\u2019s end isn\u2019t", ["the", "list", "end", "isn\u2019t"]),
        ("a x1 utf8 __init__ snake_case 3.14", ["utf", "init", "snake", "case"]),
        ("Größe größer", ["größe", "größer"]),
        ("'quoted' \"words\"", ["quoted", "words"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert corpus.words(text) == expected


def test_python_documentation_is_real_english(documentation: list[str]) -> None:
    count = sum(len(corpus.words(text)) for text in documentation)
    assert 200_000 < count < 600_000
    built = corpus.build(documentation, 5, "Python")
    assert 2_000 < len(built.vocabulary) < 10_000
    assert {"file", "string", "thread", "socket", "exception"} <= set(built.vocabulary)
    assert built.vocabulary[0] == "the"


def test_python_documentation_depends_on_nothing_random_and_imports_nothing(documentation: list[str]) -> None:
    code = (
        "import sys, hashlib; from gpurms.demo import corpus\n"
        "texts = corpus.python_documentation()\n"
        "print(hashlib.sha256('\\0'.join(texts).encode()).hexdigest())\n"
        "print(sorted({'antigravity', 'asyncio', 'this', 'tkinter', 'turtle', 'xml'} & set(sys.modules)))"
    )
    environment = {"PYTHONHASHSEED": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    digest, imported = done.stdout.splitlines()
    assert digest == hashlib.sha256("\0".join(documentation).encode()).hexdigest()
    assert imported == "[]"


def test_library_files_are_sorted_and_leave_out_tests_and_packages(tmp_path: Path) -> None:
    kept = ["b.py", "c.py", "a/z.py", "email/x.py"]
    left_out = [
        "notes.txt",
        "test/t.py",
        "email/tests/t.py",
        "site-packages/numpy/n.py",
        "idlelib/i.py",
        "a/__pycache__/c.py",
    ]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in corpus._library_files(str(tmp_path))]
    assert found == kept


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Of the module."""\nclass A:\n    """Of A."""\n    async def f(self):\n        "Of\\ f."\n        x = "no"\n'
    )
    assert sorted(corpus._docstrings(path)) == ["Of A.", "Of the module.", "Of\\ f."]
    path.write_text("not python at all")
    assert list(corpus._docstrings(path)) == []


def test_build_numbers_words_by_frequency() -> None:
    names = [f"{letter}{letter}" for letter in "abcdefghijklmnopqrst"]
    text = "\n\n".join(" ".join([name] * (100 - 2 * i)) for i, name in enumerate(names)) + "\n \nonce aa once"
    built = corpus.build([text, "bb"], 3, "x")
    assert built.vocabulary == names
    assert built.counts.tolist() == [101, 99, *(100 - 2 * i for i in range(2, 20))]
    assert np.bincount(built.tokens).tolist() == built.counts.tolist()
    last = built.tokens[-2:].tolist(), (built.paragraphs[-2:] - built.paragraphs[-3]).tolist()
    assert last == ([0, 1], [1, 2])
    assert built.tokens.dtype == built.paragraphs.dtype == np.int32


def test_build_refuses_too_few_words() -> None:
    with pytest.raises(InputError) as caught:
        corpus.build(["one two three three"], 2, "FILE")
    assert str(caught.value) == (
        "FILE: too few words to train on: 2 words, 1 of them distinct, occur at least 2 times each; "
        "expected 1,000 and 20 or more"
    )


# ----------------------------------------------------------------------------------------------------- pairs


class FullReach:
    """A generator under which every centre reaches the whole window."""

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        return np.full(size, high - 1)


@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_skip_grams_against_loops(n: int, window: int) -> None:
    rng = np.random.default_rng(n)
    tokens = np.arange(n, dtype=np.int32)
    paragraphs = np.sort(rng.integers(0, 5, n))
    expected = [
        (i, j)
        for i, j in itertools.permutations(range(n), 2)
        if abs(i - j) <= window and paragraphs[i] == paragraphs[j]
    ]
    centers, contexts = skipgram.skip_grams(tokens, paragraphs, window, FullReach())
    assert sorted(zip(centers.tolist(), contexts.tolist(), strict=True)) == expected


def test_skip_grams_draw_the_reach_of_each_centre() -> None:
    tokens = np.arange(30_000, dtype=np.int32)
    centers, contexts = skipgram.skip_grams(tokens, np.zeros(30_000), 4, np.random.default_rng(0))
    distances = np.bincount(np.abs(centers - contexts))
    assert distances[0] == 0
    np.testing.assert_allclose(distances[1:] / (2 * 30_000), [1, 0.75, 0.5, 0.25], atol=0.01)


@pytest.mark.parametrize("block", [1 << 20, 1000])
def test_an_epoch_holds_every_pair_once(planted: corpus.Corpus, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(skipgram, "BLOCK", block)
    sampler = skipgram.Sampler(planted, window=1, batch=100, subsample=0, seed=3)
    batches = list(sampler.epoch())
    pairs = [(int(c), int(o)) for centers, contexts, _, _ in batches for c, o in zip(centers, contexts, strict=True)]
    expected = []
    for start in range(0, len(planted.tokens), block):
        cut = slice(start, start + block)
        centers, contexts = skipgram.skip_grams(planted.tokens[cut], planted.paragraphs[cut], 1, FullReach())
        expected += zip(centers.tolist(), contexts.tolist(), strict=True)
    assert sorted(pairs) == sorted(expected)
    assert pairs != expected
    done = [done for *_, done in batches]
    assert done == sorted(done)
    assert done[-1] == len(planted.tokens)
    assert max(len(centers) for centers, *_ in batches) == 100
    assert abs(len(batches) - sampler.expected_batches) <= len(planted.tokens) // block + 1


def test_noise_follows_the_power_of_the_counts() -> None:
    counts = np.array([8000, 1000, 64, 8], np.int32)
    text = corpus.Corpus(
        list("abcd"), counts, np.repeat(np.arange(4, dtype=np.int32), counts), np.zeros(9072, np.int32)
    )
    sampler = skipgram.Sampler(text, window=2, batch=10, subsample=0, seed=0)
    noise = np.concatenate([noise for _, _, noise, _ in sampler.epoch()])
    expected = counts**0.75 / (counts**0.75).sum()
    np.testing.assert_allclose(np.bincount(noise, minlength=4) / len(noise), expected, atol=0.004)


def test_subsampling_thins_out_frequent_words() -> None:
    counts = np.array([90_000, 9_000, 1_000], np.int32)
    tokens = np.random.default_rng(0).permutation(np.repeat(np.arange(3, dtype=np.int32), counts))
    text = corpus.Corpus(list("abc"), counts, tokens, np.zeros(100_000, np.int32))
    sampler = skipgram.Sampler(text, window=1, batch=1 << 20, subsample=0.01, seed=0)
    ((centers, *_),) = sampler.epoch()
    share = counts / counts.sum()
    keep = np.minimum(1, np.sqrt(0.01 / share) + 0.01 / share)
    np.testing.assert_allclose(np.bincount(centers) / 2, counts * keep, rtol=0.03)


# ------------------------------------------------------------------------------------------------- gradients


def small_model(library: Engine) -> tuple[skipgram.SkipGram, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    model = skipgram.SkipGram(7, 4, 3, rng)
    model.input = library.variable(rng.normal(size=(7, 4)), name="input")
    model.output = library.variable(rng.normal(size=(7, 4)), name="output")
    return model, (np.array([0, 2, 2, 6, 0]), np.array([1, 2, 5, 5, 1]), np.array([5, 1, 1, 4, 0, 3]))


def test_gradients_against_the_tape(library: Engine) -> None:
    model, (centers, contexts, noise) = small_model(library)
    with gpurms.GradientTape() as tape:
        v = gpurms.gather(model.input, centers)
        u = gpurms.gather(model.output, contexts)
        w = gpurms.gather(model.output, noise)
        near = anp.logaddexp(0, -anp.sum(v * u, axis=1))
        far = anp.logaddexp(0, anp.dot(v, w.T))
        loss = anp.sum(near) + 3 / 6 * anp.sum(far)
    expected = tape.gradient(loss, [model.input, model.output])
    _, pairs = model.gradients(centers, contexts, noise)
    assert [variable for _, variable in pairs] == [model.input, model.output]
    for (slices, _), other in zip(pairs, expected, strict=True):
        assert isinstance(slices, gpurms.IndexedSlices)
        np.testing.assert_allclose(dense(slices, (7, 4)), dense(other, (7, 4)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_against_finite_differences(which: int) -> None:
    with running("numpy") as library:
        model, batch = small_model(library)
    table = (model.input, model.output)[which].value
    gradient = dense(model.gradients(*batch)[1][which][0], (7, 4))
    h = 1e-5
    for place in np.ndindex(table.shape):
        before, losses = table[place], []
        for table[place] in (before + h, before - h):
            losses.append(model.gradients(*batch)[0] * len(batch[0]))
        table[place] = before
        assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(gradient[place], abs=1e-8)


def test_a_model_starts_with_small_rows_and_an_output_of_zeros(library: Engine) -> None:
    model = skipgram.SkipGram(50, 8, 5, np.random.default_rng(0))
    assert type(model.input.value) is type(model.output.value) is library.xp.ndarray
    assert model.input.dtype == model.output.dtype == np.float32
    assert 0.9 / 16 < np.abs(model.input.numpy()).max() <= 1 / 16
    assert not model.output.numpy().any()
    loss, _ = model.gradients(*(np.arange(5, dtype=np.int32),) * 3)
    assert float(loss) == pytest.approx(6 * np.log(2))


def test_softplus_does_not_overflow(library: Engine) -> None:
    x = np.array([-1e30, -200, -5, -0.0, 0, 3, 200, 1e30], np.float32)
    value, slope = (host(each) for each in skipgram.softplus(library.xp, library.put(x)))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(value, np.logaddexp(0, exact), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(np.minimum(-exact, 700))), atol=1e-7)
    assert value.dtype == slope.dtype == np.float32
