"""Courses: seeds, and runs that end before their time and go on from where they were."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from leankv_mlx.cache.masks import Masks, load
from leankv_mlx.errors import CalibrationError, UsageError
from leankv_mlx.evaluation.lab import SILENT
from leankv_mlx.learning import course as courses
from leankv_mlx.learning import masks as learning
from leankv_mlx.learning.checkpoint import Checkpoint
from leankv_mlx.learning.course import taught
from leankv_mlx.learning.gates import Gates
from leankv_mlx.learning.lessons import Lesson, Lessons, Material
from leankv_mlx.learning.masks import Course, divergence, gates_of, learn
from leankv_mlx.mlx_lm import load as load_model
from leankv_mlx.mlx_lm.loading import fingerprint
from leankv_mlx.mlx_lm.patches import asking
from leankv_mlx.resources import demo_model
from tests.learning import tiny
from tests.models import TINY

COURSE = Course(0.5, steps=26)
MODEL_OF = {"model": "this one", "steps": 26}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("LEANKV_HOME", str(home))
    monkeypatch.setattr(learning, "EVERY", 5)
    return home


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TINY["llama"](64)


@pytest.fixture(scope="module")
def lessons(model: nn.Module) -> Lessons:
    return tiny.lessons(model)


def run(
    model: nn.Module,
    lessons: Lessons,
    stop: int = 0,
    course: Course = COURSE,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> tuple[Masks, list[int]]:
    """A course that is interrupted after a step, and the steps that were done."""
    seen: list[int] = []

    def look(step: int, loss: float) -> None:
        seen.append(step)
        assert np.isfinite(loss)
        if step == stop:
            raise KeyboardInterrupt

    checkpoint = checkpoint or Checkpoint("mine", MODEL_OF)
    with asking(model):
        return learn(model, lessons, course, seed, checkpoint, look), seen


@pytest.fixture(scope="module")
def whole(model: nn.Module, lessons: Lessons) -> Masks:
    """What a course ends with that nobody interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "load", lambda _: None)
        patch.setattr(Checkpoint, "save", lambda *_: None)
        return run(model, lessons)[0]


def same(one: Masks, other: Masks) -> bool:
    return one.digest == other.digest and bool((one.alphas == other.alphas).all())


def test_a_course_ends_with_the_best_groups_of_what_it_learned(
    model: nn.Module, lessons: Lessons, whole: Masks
) -> None:
    assert whole.layers == Masks.of(whole.alphas, 0.5).layers
    assert whole.groups.sum() == whole.groups.size  # of two groups each
    assert whole.ratio == 0.5 and len(np.unique(whole.alphas)) > 100
    assert not same(whole, run(model, lessons, seed=1, checkpoint=Checkpoint("other", {}))[0])


@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9])
def test_any_share_is_left_out_exactly(ratio: float, model: nn.Module, lessons: Lessons) -> None:
    found, _ = run(model, lessons, course=Course(ratio, steps=3))
    total = found.groups.size * 2
    assert found.groups.sum() == round((1 - ratio) * total)


def test_what_is_learned_is_better_than_what_is_drawn(
    model: nn.Module, lessons: Lessons, whole: Masks
) -> None:
    draw = np.random.default_rng(0)
    every = (*lessons.answers, *lessons.texts)
    found = []
    with asking(model):
        for mask in (
            whole,
            *(
                Masks.of(draw.uniform(0, 1, whole.alphas.shape).astype(np.float32), 0.5)
                for _ in range(6)
            ),
        ):
            gates = gates_of(mask)
            found.append(sum(float(divergence(model, lesson, gates)) for lesson in every))
    assert found[0] < min(found[1:])


def many(lessons: Lessons) -> Lessons:
    """So many that some are for the exam."""
    return Lessons(lessons.answers * 4, lessons.texts * 4)


def test_lessons_of_the_exam_are_never_drawn(lessons: Lessons) -> None:
    each = many(lessons)
    marked = Lessons(
        *(
            tuple(replace(one, first=i) for i, one in enumerate(x))
            for x in (each.answers, each.texts)
        )
    )
    answers, texts = zip(*(marked.draw(0, step) for step in range(200)), strict=True)
    assert {one.first for one in answers} == {one.first for one in texts} == {0, 1, 2, 3, 4, 6, 7}
    assert [one.first for one in marked.exam] == [5, 5]
    assert not lessons.exam  # too few to spare any


def test_the_mask_that_does_best_in_the_exam_is_taken(
    model: nn.Module, lessons: Lessons, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = many(lessons)
    apart = [replace(lesson) for lesson in each.exam]  # other objects than those that are drawn
    given = Lessons(
        (*each.answers[:5], apart[0], *each.answers[6:]),
        (*each.texts[:5], apart[1], *each.texts[6:]),
    )
    examined: list[np.ndarray] = []

    def judged(model: nn.Module, lesson: Lesson, gates: Gates) -> mx.array:
        """The second mask that is examined is the best one."""
        if not any(lesson is one for one in apart):
            return divergence(model, lesson, gates)
        if lesson is apart[0]:
            examined.append(np.array(gates.channels) > 0)
        return mx.array(0.0 if len(examined) == 2 else 100.0)

    monkeypatch.setattr(learning, "divergence", judged)
    found, _ = run(model, given)
    assert len(examined) > 2
    assert (found.kept == examined[1]).all()
    assert (found.kept != examined[-1]).any()


def test_gates_close_by_what_they_cost(model: nn.Module, lessons: Lessons) -> None:
    worth = []
    for price in (0.0, 0.3, 3.0):
        course, checkpoint = Course(0.5, steps=10, price=price), Checkpoint("mine", {"at": price})
        worth.append(run(model, lessons, course=course, checkpoint=checkpoint)[0].alphas.mean())
    assert 1 > worth[0] > worth[1] > worth[2]


def test_an_interrupted_course_goes_on_and_ends_with_the_same_mask(
    model: nn.Module, lessons: Lessons, whole: Masks
) -> None:
    """Before the first state, between two, at one, around where the second part begins."""
    assert COURSE.first == 15
    first = []
    for stop in (2, 7, 10, 14, 15, 16, 24):
        with pytest.raises(KeyboardInterrupt):
            run(model, lessons, stop)
        found = Checkpoint("mine", MODEL_OF).load()
        first.append(found[0] if found else 0)
    assert first == [0, 5, 10, 10, 15, 15, 20]
    found, seen = run(model, lessons)
    assert seen == [*range(21, 27)] and same(found, whole)


def test_a_course_whose_mask_could_not_be_written_is_not_done_again(
    model: nn.Module, lessons: Lessons, whole: Masks
) -> None:
    run(model, lessons)
    found, seen = run(model, lessons)
    assert not seen and same(found, whole)


@pytest.mark.parametrize("more", [{"model": "another"}, {"steps": 27}, {"text": "new"}], ids=str)
def test_the_state_of_another_course_is_not_taken(
    more: dict[str, str], model: nn.Module, lessons: Lessons, whole: Masks
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, lessons, 12, checkpoint=Checkpoint("mine", MODEL_OF | more))
    found, seen = run(model, lessons)
    assert seen[0] == 1 and same(found, whole)


def test_a_damaged_state_is_not_taken(model: nn.Module, lessons: Lessons, whole: Masks) -> None:
    checkpoint = Checkpoint("mine", MODEL_OF)
    with pytest.raises(KeyboardInterrupt):
        run(model, lessons, 12)
    assert checkpoint.load() is not None
    content = checkpoint.path.read_bytes()
    bad = bytearray(content)
    bad[len(bad) // 2] ^= 1
    for damaged in (bytes(bad), content[:-40], b"", b"no state"):
        checkpoint.path.write_bytes(damaged)
        assert checkpoint.load() is None
    checkpoint.path.unlink()
    checkpoint.path.mkdir()
    assert checkpoint.load() is None
    checkpoint.path.rmdir()
    checkpoint.path.write_bytes(content[:-40])
    found, seen = run(model, lessons)
    assert seen[0] == 1 and same(found, whole)


def test_where_no_state_can_be_kept_is_one_line(
    own_home: Path, model: nn.Module, lessons: Lessons, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(KeyboardInterrupt):
        run(model, lessons, 7)
    with monkeypatch.context() as patch:
        patch.setattr("leankv_mlx.atomic.os.fsync", full)
        with pytest.raises(CalibrationError) as caught:
            run(model, lessons)
    assert "No space left on device" in str(caught.value) and "\n" not in str(caught.value)
    found = Checkpoint("mine", MODEL_OF).load()
    assert found is not None and found[0] == 5  # what was there stays
    monkeypatch.setenv("LEANKV_HOME", str(own_home / "file"))
    (own_home / "file").write_text("")
    with pytest.raises(
        CalibrationError, match=r"^cannot write \S+mine\.safetensors: Not a dir"
    ) as c:
        run(model, lessons)
    assert "\n" not in str(c.value)


@pytest.mark.parametrize(
    ("ratio", "steps", "message"),
    [
        (0.0, 10, "--ratio 0 is out of range"),
        (1.0, 10, "--ratio 1 is out of range"),
        (float("nan"), 10, "--ratio nan is out of range"),
        (0.5, 1, "--steps 1 is too small"),
    ],
)
def test_courses_have_a_share_and_steps(ratio: float, steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Course(ratio, steps=steps)


def test_both_parts_begin_and_end_slowly() -> None:
    course = Course(0.5, steps=100, rate=0.12)
    rates = [course.rate_of(step) for step in range(100)]
    parts = rates[: course.first], rates[course.first :]
    assert max(parts[0]) == pytest.approx(0.12) and max(parts[1]) == pytest.approx(0.04)
    for part in parts:
        assert min(part) > 0 and part == pytest.approx(part[::-1]) and part[0] < max(part) / 7
    drawn = [course.drawn(step) for step in range(100)]
    assert not any(drawn[: course.first + 1]) and drawn == sorted(drawn)
    assert drawn[course.first + 1] < 0.05 and drawn[-12] == drawn[-1] == 1


class Given:
    """`taught` with the tiny model's lessons in place of those of the bundled model's documents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = load_model(projections="mlx")
        self.model.model.set_dtype(mx.float32)
        self.lessons = tiny.lessons(self.model.model)
        self.told: list[tuple[str, int]] = []
        monkeypatch.setattr(courses, "load", lambda *_, **__: self.model)
        monkeypatch.setattr(courses, "prepare", lambda *_: self.lessons)

    def advance(self, what: str, tokens: int) -> None:
        self.told.append((what, tokens))

    def __call__(self, name: str = "mine", steps: int = 12, text: str | None = None) -> Masks:
        progress = replace(SILENT, advance=lambda *told: self.advance(*told))
        found, path = taught(
            None, name, Course(0.7, steps=steps), Material(1, 512, 0, text), progress
        )
        assert path == Path(os.environ["LEANKV_HOME"]) / "masks" / f"{name}.safetensors"
        assert same(load(name), found)
        return found


def test_a_mask_says_what_it_is_of_and_its_state_is_gone(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach = Given(monkeypatch)
    found = teach()
    assert (found.model, found.name) == (fingerprint(demo_model()), "demo_model")
    assert found.notes["text"] == "generated" and found.notes["steps"] == "12"
    assert found.notes["seed"] == "0" and found.ratio == 0.7
    assert found.groups.sum() == round(0.3 * found.groups.size * 2)
    assert not list(own_home.rglob("*.tmp"))
    assert [path.name for path in own_home.rglob("*.safetensors")] == ["mine.safetensors"]
    assert same(found, teach("again"))


def test_another_text_is_another_course_and_what_was_done_before_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a course whose mask cannot be written, so that its state stays."""

    def full(masks: Masks, name: str) -> NoReturn:
        raise CalibrationError("no room.")

    teach = Given(monkeypatch)
    monkeypatch.setattr(courses, "save", full)
    done = []
    for text in (None, "one", "two", "two"):
        teach.told.clear()
        with pytest.raises(CalibrationError, match="no room"):
            teach(steps=4, text=text)
        done.append(len(teach.told))
    assert done == [4, 4, 4, 0]


def test_steps_of_a_run_that_ended_count_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    teach = Given(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(teach, "advance", _interrupting(8))
        with pytest.raises(KeyboardInterrupt):
            teach()
    teach.told.clear()
    teach()
    assert len(teach.told) == 7 and sum(tokens for _, tokens in teach.told) == 12 * 256
    assert teach.told[0][0].startswith("step 6 of 12, divergence ")


def _interrupting(step: int) -> Callable[[str, int], None]:
    def advance(what: str, tokens: int) -> None:
        if what.startswith(f"step {step} "):
            raise KeyboardInterrupt

    return advance


@pytest.mark.slow
def test_a_killed_run_goes_on(own_home: Path) -> None:
    """And writes the same file as one that was not killed."""
    command = [
        sys.executable, "-m", "leankv_mlx.cli", "learn", "masks", "--documents", "1", "--tokens",
        "512", "--steps", "60", "--ratio", "0.7", "-o", "mine",
    ]  # fmt: skip
    whole = own_home.with_name("whole")
    subprocess.run(command, env={**os.environ, "LEANKV_HOME": str(whole)}, check=True, timeout=300)
    state = own_home / "cache" / "learning" / "mine.safetensors"
    for _ in range(2):
        before = state.stat().st_mtime_ns if state.exists() else 0
        running = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        while not state.exists() or state.stat().st_mtime_ns == before:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        assert running.wait(30) == -signal.SIGKILL
        assert not (own_home / "masks").exists() and not (own_home / "profiles.toml").exists()
    subprocess.run(command, check=True, timeout=300)
    assert not state.exists()
    for name in ("masks/mine.safetensors", "profiles.toml"):
        assert (own_home / name).read_bytes() == (whole / name).read_bytes()
