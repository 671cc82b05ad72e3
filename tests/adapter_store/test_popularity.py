from pathlib import Path

import pytest

from lorry.adapter_store.image_key import ImageKey
from lorry.adapter_store.memory_file import NAME, Memory, MemoryFile
from lorry.adapter_store.popularity import HALF_LIFE_S, Popularity
from lorry.kernels.page_layout import Dtype, PageLayout, TpStrategy
from lorry.rpc.names import AdapterName
from tests.support.adapters import TINY

LAYOUT = PageLayout(geometry=TINY, dtype=Dtype.FP32)


def key(number: int) -> ImageKey:
    return ImageKey(bytes([number]) * 32, LAYOUT)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_was_wanted_of_late_counts_more() -> None:
    clock = Clock()
    popularity = Popularity({}, now_s=clock)
    for _ in range(4):
        popularity.record(key(1))
    clock.now_s = 3 * HALF_LIFE_S
    popularity.record(key(2))
    assert popularity.snapshot() == {key(2): 1.0, key(1): 0.5}


def test_counts_survive_years() -> None:
    clock = Clock()
    popularity = Popularity({key(1): 3.0}, now_s=clock)
    for _ in range(300):
        clock.now_s += 100 * HALF_LIFE_S
        popularity.record(key(2))
        assert list(popularity.snapshot()) == [key(2), key(1)]


def test_only_the_largest_are_kept() -> None:
    popularity = Popularity({}, kept=10, now_s=Clock())
    for number in range(200):
        popularity.record(key(number))
        popularity.record(key(7))
        assert len(popularity._counts) <= 20
    assert next(iter(popularity.snapshot())) == key(7)
    assert len(popularity.snapshot()) == 10


def test_memory_is_read_as_it_was_written(tmp_path: Path) -> None:
    split = PageLayout(
        geometry=TINY, dtype=Dtype.BF16, tp_size=2, tp_rank=1, tp_strategy=TpStrategy.SLORA
    )
    memory = Memory(
        pins=(AdapterName("acme", "sql"),),
        wanted={key(1): 2.5, ImageKey(b"v" * 32, split): 2.0, key(2): 1.0},
    )
    MemoryFile(tmp_path, TINY).write(memory)
    found = MemoryFile(tmp_path, TINY).read()
    assert found == memory
    assert list(found.wanted) == list(memory.wanted)


@pytest.mark.parametrize("content", ["", "{}", '{"pins": 1}', '{"pins": [], "layouts": [{}]}'])
def test_a_damaged_file_is_no_memory(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    assert MemoryFile(tmp_path, TINY).read() == Memory()


def test_without_a_directory_nothing_is_remembered() -> None:
    file = MemoryFile(None, TINY)
    file.write(Memory(pins=(AdapterName("acme", "sql"),)))
    assert file.read() == Memory()
