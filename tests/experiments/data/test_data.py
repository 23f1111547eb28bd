"""Files of CIFAR-10 are read exactly, or refused with one line; the splits are the paper's."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.command.errors import DataError
from experiments.config import DataConfig
from experiments.data import datasets
from experiments.data.cifar_pickle import read_batch
from tests.synthetic_cifar import IMAGES, official_batch, random_batch, write_small_cifar

CPU = torch.device("cpu")


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    write_small_cifar(tmp_path, monkeypatch)
    return tmp_path


def cifar(root, **keys):
    return datasets.load(DataConfig(name="cifar10", root=str(root), **keys), CPU)


def test_a_tilde_in_front_of_the_root_is_the_home(small_cifar, monkeypatch):
    monkeypatch.setenv("HOME", str(small_cifar.parent))
    assert len(cifar(f"~/{small_cifar.name}").train) == 5 * IMAGES - 10
    with pytest.raises(DataError, match=rf"^{small_cifar.parent}/none/cifar-10-batches-py: no such folder"):
        cifar("~/none")


def test_official_layout_is_read_exactly():
    pixels, labels = random_batch(0)
    read_pixels, read_labels = read_batch(official_batch(pixels, labels), "file")
    np.testing.assert_array_equal(read_pixels, pixels)
    assert read_labels.tolist() == labels


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_copy_written_by_python_3_and_this_numpy_is_read(protocol):
    pixels, labels = random_batch(0)
    content = pickle.dumps({"data": pixels, "labels": labels}, protocol)
    np.testing.assert_array_equal(read_batch(content, "file")[0], pixels)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return touch, (self.target,)


def touch(target):
    Path(target).touch()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, protocol):
    target = tmp_path / "touched"
    content = pickle.dumps({"data": Malicious(str(target)), "labels": []}, protocol)
    with pytest.raises(DataError, match=r"^file: refused, .*touch.* nothing was executed$"):
        read_batch(content, "file")
    assert not target.exists()


@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "numpy\nload", "numpy\nfromfile"])
def test_a_global_that_is_not_admitted_is_named(name):
    with pytest.raises(DataError, match=rf"refused, .* asks for '{name.replace(chr(10), '.')}',"):
        read_batch(b"c" + name.encode() + b"\n(U\x04truetR.", "file")


def test_a_global_with_a_newline_in_its_name_is_still_one_line():
    with pytest.raises(DataError, match=r"^file: refused, this pickle asks for 'os\\n\.x\\ny', [^\n]*$"):
        read_batch(b"\x80\x04\x8c\x03os\n\x8c\x03x\ny\x93.", "file")


def test_every_truncation_is_one_line():
    content = official_batch(*random_batch(0, count=1))
    for length in range(len(content)):
        with pytest.raises(DataError, match=r"^file: (damaged|refused|must|')[^\n]*$"):
            read_batch(content[:length], "file")


def test_a_flipped_bit_of_the_structure_costs_no_memory_and_is_one_line():
    """A flip may go unseen (a label, a title); what is seen is one line. C's unpickler takes gigabytes here."""
    content = official_batch(np.zeros((1, 3072), np.uint8), [3])
    start = content.index(bytes(3072))
    problems = []
    tracemalloc.start()
    for position in [*range(start), *range(start + 3072, len(content))]:
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            problems.append(problem_with(bytes(flipped)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert sum(problem is not None for problem in problems) > len(problems) / 2
    assert all("\n" not in problem for problem in problems if problem)


def problem_with(content):
    try:
        read_batch(content, "file")
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("pixels", "labels", "problem"),
    [
        (np.zeros((2, 3071), np.uint8), [0, 1], r"'data' must be .* got the shape \(2, 3071\)"),
        (np.zeros(3072, np.uint8), [0], r"'data' must be .* got the shape \(3072,\)"),
        (np.zeros((2, 3072), np.int8), [0, 1], "the array is not uint8"),
        (np.zeros((2, 3072), np.uint8), [0], r"'labels' must be a list of 2 labels, got 1"),
        (np.zeros((2, 3072), np.uint8), [0, 10], r"'labels' must be integers from 0 to 9"),
        (np.zeros((2, 3072), np.uint8), [0, -1], r"'labels' must be integers from 0 to 9"),
    ],
)
def test_other_contents_are_refused(pixels, labels, problem):
    with pytest.raises(DataError, match=rf"^file: .*{problem}"):
        read_batch(official_batch(pixels, labels), "file")


@pytest.mark.parametrize("content", [{}, [1, 2], {"data": 3, "labels": [1]}])
def test_other_objects_are_refused(content):
    with pytest.raises(DataError, match=r"^file: (must hold a dictionary|'data' must be)"):
        read_batch(pickle.dumps(content, 2), "file")


def test_the_papers_split_in_file_order(small_cifar):
    loaded = cifar(small_cifar)
    batches = [random_batch(number) for number in range(6)]
    pixels = np.concatenate([batch[0] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch[1] for batch in batches])
    parts = ((loaded.train, 0, 90), (loaded.val, 90, 100), (loaded.test, 100, 120))
    for split, start, stop in parts:
        assert split.images.dtype == torch.float32
        np.testing.assert_array_equal(split.images, pixels[start:stop].astype(np.float32) / 255)
        assert split.labels.tolist() == labels[start:stop].tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchvision.*")  # the files name a module that numpy moved
def test_torchvision_reads_the_same(small_cifar, monkeypatch):
    from torchvision.datasets import CIFAR10

    loaded = cifar(small_cifar)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # by the official files' checksums
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    training, test = (CIFAR10(str(small_cifar), train) for train in (True, False))
    images = torch.cat([loaded.train.images, loaded.val.images]), loaded.test.images
    labels = torch.cat([loaded.train.labels, loaded.val.labels]), loaded.test.labels
    for theirs, our_images, our_labels in zip((training, test), images, labels, strict=True):
        expected = torch.tensor(theirs.data).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(our_images, expected, rtol=0, atol=0)
        assert our_labels.tolist() == theirs.targets


def test_train_samples_takes_the_first(small_cifar):
    whole, cut = cifar(small_cifar), cifar(small_cifar, train_samples=7)
    torch.testing.assert_close(cut.train.images, whole.train.images[:7], rtol=0, atol=0)
    torch.testing.assert_close(cut.val.images, whole.val.images, rtol=0, atol=0)
    assert cut.identity["train_samples"] == 7


def test_identity_tells_a_copy_from_the_official_files(small_cifar, monkeypatch):
    identity = cifar(small_cifar).identity
    assert identity["official"] is False
    assert identity["files_md5"].keys() == datasets.OFFICIAL_MD5.keys()
    monkeypatch.setattr(datasets, "OFFICIAL_MD5", identity["files_md5"])
    assert cifar(small_cifar).identity["official"] is True


def test_missing_folder_and_file_say_what_to_run(small_cifar, tmp_path):
    with pytest.raises(DataError, match=r"none/cifar-10-batches-py: no such folder; run \./get_da"):
        cifar(tmp_path / "none")
    (small_cifar / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3: cannot be read .* run \./get_data\.sh$"):
        cifar(small_cifar)


def test_a_batch_with_fewer_images_is_refused(small_cifar):
    path = small_cifar / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(official_batch(*random_batch(0, count=3)))
    with pytest.raises(DataError, match=r"test_batch: must hold 20 images, got 3$"):
        cifar(small_cifar)


@pytest.mark.parametrize(("name", "size"), [("cifar10", 45000), ("digits", 1200)])
def test_more_samples_than_there_are(name, size):
    with pytest.raises(DataError, match=rf"^data\.train_samples: must be at most {size}, .* got 45"):
        datasets.load(DataConfig(name=name, train_samples=45001), CPU)


def test_digits_fill_the_shape_of_cifar():
    from sklearn.datasets import load_digits

    loaded = datasets.load(DataConfig(name="digits"), CPU)
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [1200, 297, 300]
    images = torch.cat([loaded.train.images, loaded.val.images, loaded.test.images])
    assert images.shape == (1797, 3, 32, 32)
    expected = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    for channel in range(3):
        blocks = images[:, channel].reshape(-1, 8, 4, 8, 4)
        for row in range(4):
            torch.testing.assert_close(blocks[:, :, row, :, row], expected, rtol=0, atol=0)
    assert loaded.identity == {
        "name": "digits",
        "train_samples": 1200,
        "official": None,
        "files_md5": {},
    }
