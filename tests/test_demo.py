"""What the demo makes of pairs and gradients: training, neighbours, picture, files."""

import dataclasses
import io
import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

import gpurms
from gpurms.demo import InputError, corpus, neighbours, output, picture
from gpurms.demo.train import CtrlC, Run, Settings, sampler_of, train
from tests.engines import Engine, running
from tests.planted import TOPICS

SMALL = Settings(dim=16, window=3, epochs=8, batch=64, subsample=0, min_count=1)


def no_bar() -> SimpleNamespace:
    bar = SimpleNamespace(n=0, set_postfix=lambda **_: None)
    bar.update = lambda by: setattr(bar, "n", bar.n + by)
    return bar


def fit(text: corpus.Corpus, bar: SimpleNamespace | None = None, **changes: Any) -> Run:
    settings = dataclasses.replace(SMALL, **changes)
    return train(sampler_of(text, settings), settings, bar or no_bar())


@pytest.fixture(scope="module")
def trained(planted: corpus.Corpus) -> Run:
    return fit(planted)


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


def test_training_on_a_device_leads_where_numpy_leads(device: Engine, planted: corpus.Corpus) -> None:
    changes = {"epochs": 1, "batch": 1024}
    run = fit(planted, **changes)
    assert type(run.model.input.value) is type(run.optimizer.weights[1].value) is device.xp.ndarray
    with running("numpy"):
        expected = fit(planted, **changes)
    assert [step for step, _ in run.losses] == [step for step, _ in expected.losses]
    np.testing.assert_allclose(run.losses[-1][1], expected.losses[-1][1], rtol=1e-5)
    for name in ("input", "output"):
        got, want = getattr(run.model, name).numpy(), getattr(expected.model, name).numpy()
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert np.abs(want).max() > 0.1


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
