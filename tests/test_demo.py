"""The parts of the demo: words, pairs, gradients, training, neighbours, files."""

import dataclasses
import hashlib
import io
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import autograd.numpy as anp
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

import gpurms
from gpurms.demo import InputError, corpus, neighbours, output, picture, skipgram
from gpurms.demo.train import CtrlC, Run, Settings, sampler_of, train

TOPICS = {
    "garden": ["rose", "tulip", "soil", "spade", "seed", "leaf", "root", "bloom", "hedge", "lawn"],
    "harbour": ["anchor", "sail", "mast", "tide", "rope", "deck", "crew", "buoy", "hull", "keel"],
}
SMALL = Settings(dim=16, window=3, epochs=8, batch=64, subsample=0, min_count=1)


def planted_text(n_paragraphs: int = 300) -> str:
    """Paragraphs of twelve words, each about one topic."""
    rng = np.random.default_rng(1)
    topics = rng.choice(sorted(TOPICS), n_paragraphs)
    return "\n\n".join(" ".join(rng.choice(TOPICS[topic], 12)) for topic in topics)


def no_bar() -> SimpleNamespace:
    bar = SimpleNamespace(n=0, set_postfix=lambda **_: None)
    bar.update = lambda by: setattr(bar, "n", bar.n + by)
    return bar


def fit(text: corpus.Corpus, bar: SimpleNamespace | None = None, **changes: Any) -> Run:
    settings = dataclasses.replace(SMALL, **changes)
    return train(sampler_of(text, settings), settings, bar or no_bar())


@pytest.fixture(scope="module")
def planted() -> corpus.Corpus:
    return corpus.build([planted_text()], 1, "planted")


@pytest.fixture(scope="module")
def trained(planted: corpus.Corpus) -> Run:
    return fit(planted)


@pytest.fixture(scope="module")
def documentation() -> list[str]:
    return corpus.python_documentation()


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
    centers, contexts = skipgram.skip_grams(tokens, paragraphs, window, FullReach())  # type: ignore[arg-type]
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
        centers, contexts = skipgram.skip_grams(planted.tokens[cut], planted.paragraphs[cut], 1, FullReach())  # type: ignore[arg-type]
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


def small_model() -> tuple[skipgram.SkipGram, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    model = skipgram.SkipGram(7, 4, 3, rng)
    model.input = gpurms.Variable(rng.normal(size=(7, 4)), name="input")
    model.output = gpurms.Variable(rng.normal(size=(7, 4)), name="output")
    return model, (np.array([0, 2, 2, 6, 0]), np.array([1, 2, 5, 5, 1]), np.array([5, 1, 1, 4, 0, 3]))


def dense(slices: gpurms.IndexedSlices) -> np.ndarray:
    total = np.zeros((7, 4))
    np.add.at(total, slices.indices, slices.values)
    return total


def test_gradients_against_the_tape() -> None:
    model, (centers, contexts, noise) = small_model()
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
        np.testing.assert_allclose(dense(slices), dense(other), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_against_finite_differences(which: int) -> None:
    model, batch = small_model()
    table = (model.input, model.output)[which].value
    gradient = dense(model.gradients(*batch)[1][which][0])
    h = 1e-5
    for place in np.ndindex(table.shape):
        before, losses = table[place], []
        for table[place] in (before + h, before - h):
            losses.append(model.gradients(*batch)[0] * len(batch[0]))
        table[place] = before
        assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(gradient[place], abs=1e-8)


def test_a_model_starts_with_small_rows_and_an_output_of_zeros() -> None:
    model = skipgram.SkipGram(50, 8, 5, np.random.default_rng(0))
    assert model.input.dtype == model.output.dtype == np.float32
    assert 0.9 / 16 < np.abs(model.input.numpy()).max() <= 1 / 16
    assert not model.output.numpy().any()
    loss, _ = model.gradients(*(np.arange(5, dtype=np.int32),) * 3)
    assert float(loss) == pytest.approx(6 * np.log(2))


def test_softplus_does_not_overflow() -> None:
    x = np.array([-1e30, -200, -5, -0.0, 0, 3, 200, 1e30], np.float32)
    value, slope = skipgram.softplus(np, x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(value, np.logaddexp(0, exact), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(np.minimum(-exact, 700))), atol=1e-7)
    assert value.dtype == slope.dtype == np.float32


# -------------------------------------------------------------------------------------------------- training


def test_neighbours_recover_the_planted_topics(planted: corpus.Corpus, trained: Run) -> None:
    vectors = neighbours.unit_vectors(trained.model)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    groups = neighbours.find(planted, vectors, list(range(20)), 9)
    for group in groups:
        word = planted.vocabulary[group.probe]
        near = {planted.vocabulary[i] for i in group.near}
        topic = next(set(words) for words in TOPICS.values() if word in words)
        assert near == topic - {word}
        assert (np.diff(group.cosines) <= 0).all()


def test_training_takes_every_epoch_with_falling_loss_and_rate(planted: corpus.Corpus) -> None:
    bar = no_bar()
    run = fit(planted, bar)
    assert bar.n == SMALL.epochs * len(planted.tokens)
    steps, losses = zip(*run.losses, strict=True)
    assert list(steps) == sorted(set(steps))
    assert steps[-1] == run.steps == int(run.optimizer.iterations.numpy())
    assert abs(run.steps - run.planned) < 0.02 * run.planned
    # A word predicts its topic and no more: its contexts are twice as likely as the noise, which is drawn 5 times.
    optimum = np.log1p(5 / 2) + 5 / 2 * np.log1p(2 / 5)
    assert losses[0] > 1.1 * optimum
    assert losses[-1] == pytest.approx(optimum, rel=0.01)
    assert not run.interrupted
    config = run.optimizer.get_config()["learning_rate"]
    assert config["class_name"] == "PolynomialDecay"
    assert config["config"]["initial_learning_rate"] == SMALL.lr
    assert config["config"]["end_learning_rate"] == pytest.approx(SMALL.lr / 10)


def test_training_repeats_with_its_seed(planted: corpus.Corpus, trained: Run) -> None:
    again = fit(planted)
    np.testing.assert_array_equal(again.model.input.numpy(), trained.model.input.numpy())
    other = fit(planted, seed=1)
    assert not np.array_equal(other.model.input.numpy(), trained.model.input.numpy())


@pytest.mark.parametrize("option", ["dim", "window", "negatives", "epochs", "batch", "lr", "subsample"])
def test_every_setting_changes_the_result(planted: corpus.Corpus, trained: Run, option: str) -> None:
    value = {"lr": 0.01, "subsample": 0.01}.get(option, 2 * vars(SMALL)[option])
    run = fit(planted, **{"epochs": 1, option: value})
    usual = fit(planted, epochs=1)
    assert run.model.input.shape == (20, 32 if option == "dim" else 16)
    assert not np.array_equal(run.model.input.numpy(), usual.model.input.numpy())


def test_words_that_never_meet_cannot_be_trained_on() -> None:
    text = corpus.build(["\n\n".join(TOPICS["garden"] * 60 + TOPICS["harbour"] * 60)], 1, "x")
    with pytest.raises(InputError, match="no two of them are left in one paragraph"):
        sampler_of(text, SMALL)


def test_ctrl_c_ends_training_after_a_step(planted: corpus.Corpus) -> None:
    before = signal.getsignal(signal.SIGINT)
    bar = no_bar()
    bar.update = lambda by: signal.raise_signal(signal.SIGINT)
    run = fit(planted, bar)
    assert run.interrupted
    assert run.steps == run.losses[-1][0] == 50  # the first report to the bar
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_pressed_twice_raises() -> None:
    with CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        assert ctrl_c.pressed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------------ neighbours


def test_neighbours_leave_out_rare_words_and_words_found_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "FREQUENT", 4)
    tokens = np.array([0] * 16 + [1, 2, 3, 4] + [5] * 300, np.int32)
    tokens = np.concatenate([np.tile(np.array([0, *[7] * 15], np.int32), 15), tokens])
    counts = np.bincount(tokens).astype(np.int32)
    text = corpus.Corpus(list("abcdefgh"), counts, tokens, np.zeros_like(tokens))
    (group,) = neighbours.find(text, np.eye(8, dtype=np.float32), [1], 5)
    assert group.near.tolist() == [2, 3]  # 0 is everywhere, 1 the probe, 4 and more are rare


def test_probes_are_the_users_or_built_in_or_typical(planted: corpus.Corpus, documentation: list[str]) -> None:
    assert neighbours.choose_probes(planted, ["tide", "rose", "tide"], False) == [
        planted.vocabulary.index("tide"),
        planted.vocabulary.index("rose"),
    ]
    with pytest.raises(InputError, match=r"^--words: not among the 20 words of the text: python, ruby$"):
        neighbours.choose_probes(planted, ["python", "rose", "ruby"], False)
    built = corpus.build(documentation, 5, "Python")
    named = [built.vocabulary[i] for i in neighbours.choose_probes(built, None, True)]
    assert named == list(neighbours.PROBES)
    typical = [built.vocabulary[i] for i in neighbours.choose_probes(built, None, False)]
    assert len(typical) == neighbours.N_PROBES
    assert "decimal" in typical
    assert not {"the", "of", "and", "is", "if"} & set(typical)


def test_table_is_aligned(planted: corpus.Corpus) -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    groups = neighbours.find(planted, vectors, [3, 0], 4)
    title, *rows = neighbours.table(planted, groups).splitlines()
    assert title.split() == ["word", "count", "nearest", "words,", "with", "cosine"]
    assert [row.split()[0] for row in rows] == [planted.vocabulary[3], planted.vocabulary[0]]
    assert [len(row.split()) for row in rows] == [10, 10]
    column = title.index("nearest")
    assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows)


# --------------------------------------------------------------------------------------------------- picture


def test_picture_is_a_png(planted: corpus.Corpus, trained: Run) -> None:
    vectors = neighbours.unit_vectors(trained.model)
    groups = neighbours.find(planted, vectors, [0, 1, 2], 6)
    file = io.BytesIO()
    picture.draw(file, planted, vectors, groups, trained, "a $title$ with $ signs")
    data = file.getvalue()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    pixels = matplotlib.image.imread(io.BytesIO(data))
    assert pixels.shape[:2] == (840, 1680)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100
    left, right = pixels[100:, :560, :3], pixels[100:, 640:, :3]
    assert (left.min(axis=2) < 0.5).sum() > 1000
    assert (right.min(axis=2) < 0.5).sum() > 1000


def test_picture_of_one_step_and_two_words(planted: corpus.Corpus, trained: Run) -> None:
    vectors = neighbours.unit_vectors(trained.model)
    groups = neighbours.find(planted, vectors, [0], 1)
    run = Run(trained.model, trained.optimizer, planned=9, losses=[(1, 4.0)])
    file = io.BytesIO()
    picture.draw(file, planted, vectors, groups, run, "title")
    assert file.getvalue().startswith(b"\x89PNG")


def test_labels_stand_apart_and_inside_the_map(planted: corpus.Corpus) -> None:
    figure = Figure(figsize=(5, 5))
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
    rng = np.random.default_rng(0)
    points = {i: tuple(rng.uniform(0.1, 0.9, 2)) for i in range(20)}
    groups = [neighbours.Group(0, np.arange(1, 20), np.linspace(1, 0, 19))]
    picture._draw_labels(axes, planted, groups, points, {0: "black"})
    labels = list(axes.texts)
    assert len(labels) >= 18
    assert labels[0].get_text() == planted.vocabulary[0]
    assert labels[0].get_fontweight() == "bold"
    boxes = [label.get_window_extent() for label in labels]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    inside = axes.get_window_extent()
    for box in boxes:
        assert (inside.min <= box.min).all()
        assert (box.max <= inside.max).all()


# ----------------------------------------------------------------------------------------------------- files


def test_checkpoint_continues_in_a_fresh_optimizer(tmp_path: Path, planted: corpus.Corpus, trained: Run) -> None:
    path = tmp_path / output.CHECKPOINT
    output.save_checkpoint(path, planted, SMALL, trained)
    assert [entry.name for entry in tmp_path.iterdir()] == [output.CHECKPOINT]
    with np.load(path, allow_pickle=False) as saved:
        assert saved["vocabulary"].tolist() == planted.vocabulary
        np.testing.assert_array_equal(saved["counts"], planted.counts)
        assert json.loads(str(saved["settings"])) == vars(SMALL)
        tables = [gpurms.Variable(saved[name]) for name in ("input", "output")]
        fresh = gpurms.RMSprop.from_config(json.loads(str(saved["optimizer_config"])))
        n_weights = sum(name.startswith("optimizer_weight_") for name in saved.files)
        weights = [saved[f"optimizer_weight_{i}"] for i in range(n_weights)]
    assert fresh.iterations.numpy() == 0
    for table in tables:
        fresh.add_slot(table, "rms")
    fresh.set_weights(weights)

    indices = np.array([3, 1, 3])
    values = np.ones((3, SMALL.dim), np.float32)
    originals = [gpurms.Variable(table.numpy()) for table in (trained.model.input, trained.model.output)]
    again = gpurms.RMSprop.from_config(trained.optimizer.get_config())
    for original, slot in zip(originals, weights[1:], strict=True):
        again.add_slot(original, "rms", slot)
    again.iterations.assign(trained.steps)
    for optimizer, variables in ((fresh, tables), (again, originals)):
        step = optimizer.apply_gradients([(gpurms.IndexedSlices(values, indices), v) for v in variables])
        assert step == trained.steps + 1
    for table, original in zip(tables, originals, strict=True):
        np.testing.assert_array_equal(table.numpy(), original.numpy())


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), output.replacing(path) as file:
        file.write(b"half" * (1 // 0))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with output.replacing(path) as file:
        file.write(b"after")
    assert path.read_text() == "after"


def test_an_error_while_writing_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write to .*file: No space left"), output.replacing(tmp_path / "file"):
        raise OSError(28, "No space left on device")
